"""Where messages come from: one source over any number of lanes.

A *lane* is one way messages come in: a stream in shared memory (:class:`~.consumer.Consumer`) or the TCP connection to one
producer elsewhere (:class:`~..transport.tcp.lane.TcpLane`). A source asks its lanes in turn. Only when none has anything, after
a :class:`~.waiting.Spin` if one message is wanted, does it sleep: at one poller, for slot numbers and TCP alike.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Protocol

import zmq

from ..closing import Closable
from ..errors import BlendtorchError, OutOfSharedMemory, SegmentError, SegmentMissing, StreamClosed
from ..memory.segment import Segment
from ..message.wire import Message
from ..process import forks, interrupts, leaving
from .consumer import Consumer
from .inbox import Inbox
from .lease import Calls
from .newest import Newest, NewestConsumer
from .place import Place
from .waiting import IDLE_S, Spin

log = logging.getLogger("blendtorch.stream")

_LOOK_AFTER_S = 0.5
"""A source that is busy looks for new streams and dead consumers this often."""
_CLOSING_PATIENCE_S = 2.0
"""How long closing waits for another thread that is just receiving."""


class Lane(Protocol):
    """One way messages come in. An interrupt may cut any of its calls short; it makes good what that left at its next call."""

    def take(self) -> Message | None:
        """The next message, if one is here and can be opened. What cannot is noted in the source's :class:`~.lease.Calls`."""

    def take_many(self, count: int) -> list[Message]:
        """Messages that are here, `count` at most, but for those that cannot be opened."""

    def explain(self) -> str:
        """What it is connected to, and how far that went; for messages to people."""

    def close(self) -> None:
        """Receive no more. Arrays that were handed out stay valid."""


class RemoteLane(Lane, Protocol):
    """A lane that sleeps at sockets of its own."""

    @property
    def sockets(self) -> Sequence[zmq.Socket[bytes] | int]:
        """One of them is readable when it may have something. A number is that of a file descriptor."""

    def is_answered(self) -> bool:
        """Whether anybody has ever answered there."""


class Source(Closable):
    """Hands out messages: each to one source only, those of one producer in order where it has one source.

    One thread at a time may receive. Any other one may close.

    Args:
        places: of streams in shared memory, some of which may not exist yet.
        lanes: from elsewhere; closed with this source.
        calls: that those lanes note their messages in.
        own: see :class:`~.consumer.Consumer`.
        newest: hand out the newest message of each stream alone, and skip older ones; what was handed out so far. None: hand out
            each.

    Example::

        with open_source(launch_info.addresses["DATA"]) as source:
            message = source.receive(timeout_s=10.0)
            if message is not None:
                print(message.fields["image"].shape)
    """

    def __init__(
        self,
        places: Sequence[Place] = (),
        lanes: Sequence[RemoteLane] = (),
        calls: Calls | None = None,
        *,
        own: bool = True,
        newest: Newest | None = None,
    ) -> None:
        self._absent: dict[Place, str] = dict.fromkeys(places, "")  # and why, if it is not that nobody has made it yet
        self._streams: list[Consumer] = []
        self._elsewhere = list(lanes)
        self._lanes: list[Lane] = list(lanes)
        self._own = own
        self._newest = newest
        self._turn = 0
        self._turns: dict[int, int] = {}  # by key of a stream: its index in `_lanes`
        self._rejected = 0  # at the inbox, and counted
        self._calls = calls if calls is not None else Calls()
        self._calls.source = weakref.ref(self)
        self._thread = 0  # which receives, or did last
        self._unusable = ""  # why
        self._is_down = threading.Event()
        self._spin = Spin()
        self._looked_after = time.monotonic()
        self._poller = zmq.Poller()
        self._inbox: Inbox | None = None
        try:
            if places:
                self._inbox = Inbox()
                self._poller.register(self._inbox.socket, zmq.POLLIN)
            for lane in lanes:
                for socket in lane.sockets:
                    self._poller.register(socket, zmq.POLLIN)
            forks.register(self)
            if lanes:
                leaving.join(self)
            self._attach()
        except BaseException:
            self._take_down()
            raise

    def receive(self, timeout_s: float, *, held: bool = False) -> Message | None:
        """The next message, or None after `timeout_s` seconds without one.

        Args:
            timeout_s: patience.
            held: the message counts as received with :meth:`hand_over`. Without that, the next call puts it back, and so does
                :meth:`close`: nobody may use it then.

        Raises:
            UnreadableMessage: the next one cannot be opened here; the call after that gives the one behind it.
            OutOfSharedMemory: this process may not map the memory of a stream.
            StreamClosed: it was closed, perhaps by another thread meanwhile; or it was opened before a fork.
        """
        calls = self._calls
        if calls.number != calls.handed:
            self._check_alone()
        try:
            self._begin()
            message = self._take() or self._wait(time.monotonic() + timeout_s, spins=True)
        except BaseException:
            calls.cut = True  # here: Python looks for the next signal when a function begins
            if self._unusable:
                self._take_down()
            raise
        if held and message is not None:
            calls.cut = True
        else:
            calls.handed = calls.number  # last: from 3.11 on, no signal is looked for until the caller has the message
        return message

    def hand_over(self) -> None:
        """What was received last counts as received: somebody else has it now."""
        calls = self._calls
        calls.cut = False
        calls.handed = calls.number  # last, as in receive

    def receive_many(self, count: int, timeout_s: float) -> list[Message]:
        """The next messages, `count` at most, without waiting for more than the first; none after `timeout_s` seconds.

        Raises:
            UnreadableMessage, OutOfSharedMemory, StreamClosed: as for :meth:`receive`. Where messages arrived with it, the next
                call raises.
        """
        calls = self._calls
        if calls.number != calls.handed:
            self._check_alone()
        try:
            self._begin()
            messages = self._take_many(count)
            if not messages:
                # No spinning: who wants many is a thread beside others.
                first = self._wait(time.monotonic() + timeout_s, spins=False)
                if first is not None:
                    messages = [first, *self._take_many(count - 1)]
                    del first
        except BaseException:
            calls.cut = True  # here: Python looks for the next signal when a function begins
            if self._unusable:
                self._take_down()
            raise
        calls.handed = calls.number
        return messages

    def segments(self) -> list[Segment]:
        """The shared memory that messages lie in now, for who makes it known to a device."""
        return [segment for stream in self._streams for segment in stream.segments()]

    def delivered(self) -> int:
        """How many messages of its streams in shared memory have been received, here and by all other consumers. It changes
        whenever anybody receives one.
        """
        return sum(stream.delivered() for stream in self._streams)

    def absent(self) -> list[Place]:
        """The streams in shared memory that it has not joined (yet)."""
        return list(self._absent)

    def is_answered(self) -> bool:
        """Whether every producer that is read over TCP has answered at least once, and there is one."""
        return bool(self._elsewhere) and all(lane.is_answered() for lane in self._elsewhere)

    def left(self) -> list[Message]:
        """After :meth:`close`: messages that were taken, hold no slot, and were not handed over. Nobody else gets them."""
        calls = self._calls
        first = 0 if calls.number != calls.handed else calls.given
        return [message for message, _ in calls.loose[first:]]

    def give_first(self, messages: list[Message]) -> None:
        """Hand these out before anything else: what another source has :meth:`left`. Before the first call."""
        self._calls.loose = [(message, _nothing) for message in messages]

    def explain(self, *, brief: bool = False) -> str:
        """What this source is connected to, and what it could not reach and why; for messages to people.

        Args:
            brief: leave out streams in shared memory with which all is well, or that nobody has opened yet.
        """
        lines = [lane.explain() for lane in self._elsewhere]
        lines += [stream.explain() for stream in self._streams if not brief or stream.unattached()]
        for place, why in self._absent.items():
            if why:
                lines.append(f"{place.title}: not attached. {why}")
            elif not brief:
                lines.append(f"{place.title}: no publisher has opened it yet")
        if self._inbox is not None and self._inbox.rejected:
            lines.append(f"{self._inbox.rejected} messages at its inbox were no slot numbers")
        return "\n".join(lines)

    def close(self) -> None:
        """Receive no more. Arrays that were handed out stay valid. A call that waits in another thread raises StreamClosed."""
        if self._is_down.is_set():
            return
        self._unusable = "receive() after close()."
        calls = self._calls
        if calls.number != calls.handed and not calls.cut:  # a call runs: it notices, and takes everything down
            if self._thread == threading.get_ident():
                return  # by a signal's handler
            self._is_down.wait(_CLOSING_PATIENCE_S)
        self._take_down()

    def finish(self) -> None:
        """Close: the process is about to exit."""
        self.close()
        self._take_down()

    def in_child(self) -> None:
        """In a forked child: everything here is its parent's."""
        self._unusable = "A stream that was opened before a fork cannot be read after it: open it in the child."
        self._is_down = threading.Event()  # the parent's may have been in use
        self._is_down.set()

    def __repr__(self) -> str:
        state = "closed" if self._unusable else f"{len(self._absent)} not attached"
        return f"<Source of {len(self._streams)} streams in shared memory and {len(self._elsewhere)} over TCP, {state}>"

    # -- one call -----------------------------------------------------------------------------------------------

    def _check_alone(self) -> None:
        """The last call has not handed its message over. If it still runs, refuse this call and leave that one undisturbed."""
        if not self._calls.cut:
            raise BlendtorchError(
                "receive() was called while another call of it runs, in another thread or by a signal's handler. "
                "Open a source for each thread."
            )

    def _begin(self) -> None:
        calls = self._calls
        if calls.number != calls.handed and not self._unusable:  # the last call was cut short
            self._reconcile()
        elif calls.loose:  # the last call handed these over
            del calls.loose[: calls.given]
        calls.given = 0
        calls.cut = False
        calls.number += 1
        self._thread = threading.get_ident()
        if self._unusable:
            raise StreamClosed(self._unusable)
        if interrupts.kept:
            interrupts.raise_kept()
        if calls.unreadable:
            raise calls.unreadable.popleft()
        if time.monotonic() - self._looked_after > _LOOK_AFTER_S:  # also while some lane always has something
            self._look_after()

    def _reconcile(self) -> None:
        self._calls.settle()
        for stream in self._streams:
            stream.reconcile()

    def _take(self) -> Message | None:
        """The oldest message of the next lane that has one; first of all what a call that was cut short had taken."""
        calls = self._calls
        if calls.given < len(calls.loose):
            calls.given += 1
            return calls.loose[calls.given - 1][0]
        lanes, turn = self._lanes, self._turn
        for _ in lanes:
            turn += 1
            if turn >= len(lanes):
                turn = 0
            message = lanes[turn].take()
            if message is not None:
                self._turn = turn
                return message
        return None

    def _take_many(self, count: int) -> list[Message]:
        """Messages that are there, `count` at most, the oldest of each lane and about as many of each; none where consumers hold
        much already.
        """
        calls = self._calls
        messages = [message for message, _ in calls.loose[calls.given : calls.given + count]]
        calls.given += len(messages)
        lanes = self._lanes
        for remaining in range(len(lanes), 0, -1):
            if len(messages) >= count:
                return messages  # the next call goes on behind the last lane that was asked
            self._turn = turn = (self._turn + 1) % len(lanes)
            share = -(-(count - len(messages)) // remaining)
            messages += lanes[turn].take_many(share)
        self._turn += 1  # all were asked: another one is first next time
        return messages

    def _wait(self, until: float, *, spins: bool) -> Message | None:
        """The next message, or None if none comes `until` then. `spins`: look again for a moment before sleeping, if the last
        wait was short.
        """
        self._spin.begin()
        spins = spins and bool(self._streams)
        while (remaining_s := until - time.monotonic()) > 0:
            if self._unusable:
                raise StreamClosed(self._unusable)
            if self._calls.unreadable:
                raise self._calls.unreadable.popleft()
            if spins and self._spin.goes_on(naps=any(stream.is_shared() for stream in self._streams)):
                message = self._take()
            else:
                spins = False
                message = self._sleep(min(IDLE_S, remaining_s))
            if message is not None:
                self._spin.end()
                return message
        self._spin.end()
        self._look_after()
        return self._take()

    def _sleep(self, timeout_s: float) -> Message | None:
        """Say that this source sleeps, look once more, then sleep; the message found, if any.

        With a message, no more is looked for until the user is done with it. Whoever sleeps meanwhile is told of what is left:
        numbers may have come for more than this source takes now.
        """
        inbox = self._inbox
        if inbox is not None:
            self._clear_inbox(inbox)
        since_ns = time.monotonic_ns()
        for stream in self._streams:
            stream.say_asleep(since_ns)
        message = self._take() if self._streams else None  # sockets tell the poller of what came meanwhile
        if message is None:
            heard = self._poller.poll(math.ceil(timeout_s * 1000))
            for stream in self._streams:
                stream.say_asleep(0)
            if inbox is not None and heard:
                self._read_number(inbox)
            if not heard or time.monotonic() - self._looked_after > _LOOK_AFTER_S:  # numbers may come all the time
                self._look_after()
            message = self._take()
        else:
            for stream in self._streams:
                stream.say_asleep(0)
        if message is not None:
            for stream in self._streams:
                stream.pass_on()
        return message

    def _read_number(self, inbox: Inbox) -> None:
        """Read one number, and ask first the stream that it names. The next sleep forgets all others."""
        number = inbox.read()
        if number is not None:
            self._turn = self._turns.get(number.key, self._turn + 1) - 1

    def _clear_inbox(self, inbox: Inbox) -> None:
        """Forget the numbers of earlier sleeps, and count what was none."""
        inbox.clear()
        if inbox.rejected > self._rejected and self._streams:
            self._streams[0].reject(inbox.rejected - self._rejected)
            self._rejected = inbox.rejected

    # -- what can wait ------------------------------------------------------------------------------------------

    def _look_after(self) -> None:
        self._looked_after = time.monotonic()
        for stream in self._streams:
            if stream.is_superseded():
                self._leave(stream)
        self._attach()
        for stream in self._streams:
            stream.require_room()
            stream.look_after()

    def _leave(self, stream: Consumer) -> None:
        """Look for the stream that has come in place of this one. What an interrupt cut is done again: last, it is forgotten."""
        log.warning("%s was made anew. Reading goes on there.", stream.place.title)
        stream.close()
        self._absent[stream.place] = ""
        self._streams = [other for other in self._streams if other is not stream]
        self._line_up()

    def _line_up(self) -> None:
        """Put the streams, and then the other lanes, in the order in which they are asked."""
        self._lanes = [*self._streams, *self._elsewhere]
        self._turns = {stream.key: number for number, stream in enumerate(self._streams)}

    def _attach(self) -> None:
        """Join the streams that exist by now. A place counts as absent until all is done: what an interrupt cut is done again."""
        for place in list(self._absent):
            stream = next((stream for stream in self._streams if stream.place is place), None)
            if stream is None:
                try:
                    stream = self._join(place)
                    if self._inbox is not None:
                        self._inbox.bind(place, stream.key, stream.index)
                except OutOfSharedMemory as error:
                    raise OutOfSharedMemory(f"{place.title} cannot be read. {error}") from error
                except SegmentError as error:
                    self._absent[place] = "" if isinstance(error, SegmentMissing) else str(error)
                    continue
                self._streams.append(stream)
            self._line_up()
            leaving.join(stream)
            del self._absent[place]

    def _join(self, place: Place) -> Consumer:
        if self._newest is None:
            return Consumer(place, self._calls, own=self._own)
        return NewestConsumer(place, self._calls, self._newest, own=self._own)

    def _take_down(self) -> None:
        """Close every lane, and put back what a call that was cut short had not handed over."""
        if self._is_down.is_set():
            return
        if self._inbox is not None:
            self._inbox.close()  # first: its paths are ours only while the lanes hold their locks
        if self._calls.cut:
            self._reconcile()
        for error in self._calls.unreadable:
            log.error("%s", error)  # nobody asks any more
        for lane in self._lanes:
            lane.close()
        self._lanes, self._streams, self._elsewhere = [], [], []
        self._poller = zmq.Poller()
        self._absent.clear()
        leaving.leave(self)
        self._is_down.set()


def _nothing() -> None:
    pass
