"""Where a consumer gets messages: the protocol, and the implementation over rings."""

from __future__ import annotations

import logging
import math
import select
import time
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import SegmentError, StreamClosed, WireError
from ..memory.segment import Segment
from ..message.wire import Message, decode
from .control import Spin
from .place import Place
from .reader import Reader

log = logging.getLogger("blendtorch")

IDLE_S = 0.05
"""A source that hears nothing looks at the slot tables itself this often."""
LOOK_AFTER_S = 0.5
"""A source that is busy looks for new streams and dead consumers this often."""


class Source(Protocol):
    """Hands out messages: each to one source only, those of one producer in order where it has one source."""

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None after `timeout_s` seconds without one.

        Raises:
            StreamClosed: it was closed, perhaps by another thread meanwhile.
        """

    def receive_many(self, count: int, timeout_s: float) -> list[Message]:
        """The next messages, `count` at most, without waiting for more than the first; none after `timeout_s` seconds."""

    def segments(self) -> list[Segment]:
        """The shared memory that messages lie in now, for who makes it known to a device."""

    def explain(self) -> str:
        """What this source is connected to, and what it could not reach and why; for error messages."""

    def close(self) -> None:
        """Receive no more. Arrays that were handed out stay valid."""


class Poller(Protocol):
    """``select.poll``, or ``zmq.Poller``, which does the same for sockets, too, and shares the value of ``POLLIN``."""

    def register(self, fd: int, flags: int) -> None:
        """Wait for this file descriptor, too."""

    def poll(self, timeout: int, /) -> Sequence[tuple[Any, int]]:
        """Wait for `timeout` milliseconds at most; what is ready."""


class RingSource:
    """A source over the rings of any number of streams, some of which may not exist yet.

    It looks at the slot tables first, one stream after the other, and takes the oldest message of the first that has one. Only
    when there is nothing, after a :class:`~.control.Spin` if one message is wanted, does it ask to be woken, and it
    sleeps not for long: what somebody else was woken for, and did not live to take, is rung for no more.

    Args:
        places: where the streams live.
        poller: where to sleep, if there is more to wait for than the bells of these streams.
    """

    def __init__(self, places: Sequence[Place], poller: Poller | None = None) -> None:
        self._absent: dict[Place, str] = dict.fromkeys(places, "not looked for yet")  # and why
        self._readers: list[Reader] = []
        self._turn = 0
        self._spin = Spin()
        self._poller: Poller = select.poll() if poller is None else poller
        self._closed = False
        self._complained: set[str] = set()
        self._looked_after = time.monotonic()
        try:
            self._attach()
        except BaseException:  # Ctrl-C
            self.close()
            raise

    def receive(self, timeout_s: float) -> Message | None:
        message = self.take()
        if message is None:
            until = time.monotonic() + timeout_s
            self._spin.begin()
            # Where somebody sleeps, the producer has to ring anyway.
            while time.monotonic() < until and not self._anyone_asleep() and self._spin.goes_on():
                message = self.take()
                if message is not None:
                    break
            else:
                message = self._wait(until)
            self._spin.end()
        return message

    def receive_many(self, count: int, timeout_s: float) -> list[Message]:
        messages = self.take_many(count)
        if messages:
            return messages
        first = self._wait(time.monotonic() + timeout_s)  # no spinning: who wants many is a thread beside others
        return [] if first is None else [first, *self.take_many(count - 1)]

    def _anyone_asleep(self) -> bool:
        return any(reader.sleepers.anyone() for reader in self._readers)

    def _wait(self, until: float) -> Message | None:
        while (remaining_s := until - time.monotonic()) > 0:
            message = self.take_or_sleep(min(IDLE_S, remaining_s))
            if message is not None:
                return message
        self._look_after()
        return self.take()

    def close(self) -> None:
        self._closed = True
        for reader in self._readers:
            reader.close()
        self._readers = []
        self._poller = select.poll()  # the other one still knows their descriptors
        self._absent.clear()

    def segments(self) -> list[Segment]:
        return [segment for reader in self._readers for segment in reader.segments()]

    def explain(self) -> str:
        lines = [reader.explain() for reader in self._readers]
        lines += [f"{place.name}: not attached. {why}" for place, why in self._absent.items()]
        return "\n".join(lines)

    def take(self) -> Message | None:
        """The oldest message of the next stream that has one."""
        self._check_open()
        self._look_after_if_due()
        for _ in self._readers:
            reader = self._next_reader()
            try:
                claimed = reader.take()
                if claimed is not None:
                    return decode(claimed.header, claimed.payload, trusted=True)
            except (WireError, SegmentError) as error:
                self._reject(reader, error)
        return None

    def take_many(self, count: int) -> list[Message]:
        """Messages that are there, `count` at most, the oldest of each stream and about as many of each; none where consumers
        hold much already.
        """
        self._check_open()
        self._look_after_if_due()
        messages: list[Message] = []
        for remaining in range(len(self._readers), 0, -1):
            if len(messages) == count:
                return messages  # the next call goes on behind the last stream that was asked
            reader = self._next_reader()
            try:
                taken = reader.take_many(-(-(count - len(messages)) // remaining))
            except SegmentError as error:
                self._reject(reader, error)
                continue
            for claimed in taken:
                if isinstance(claimed, SegmentError):  # the others are good
                    self._reject(reader, claimed)
                    continue
                try:
                    messages.append(decode(claimed.header, claimed.payload, trusted=True))
                except WireError as error:
                    self._reject(reader, error)
        self._turn += 1  # all were asked: somebody else is first next time
        return messages

    def _next_reader(self) -> Reader:
        self._turn = (self._turn + 1) % len(self._readers)
        return self._readers[self._turn]

    def take_or_sleep(self, timeout_s: float) -> Message | None:
        """Ask to be woken, look once more, then sleep; the message found, if any.

        With a message, no more is looked for until the user is done with it. So if somebody rang for another one meanwhile, of
        this stream or of the next, the ring is passed on.
        """
        message = self._take_or_sleep(timeout_s)
        if message is not None:
            for reader in self._readers:
                reader.pass_on()
        return message

    def _take_or_sleep(self, timeout_s: float) -> Message | None:
        for reader in self._readers:
            reader.sleep(True)
        try:
            message = self.take()
            if message is not None:
                return message
            heard = self._poller.poll(math.ceil(timeout_s * 1000))
            rung = {ready for ready, _ in heard}
            for reader in self._readers:
                if reader.bell.fd in rung:
                    reader.bell.clear()
        finally:
            for reader in self._readers:
                reader.sleep(False)
        if not heard:
            self._look_after()
        return self.take()

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosed("receive() after close().")

    def _look_after_if_due(self) -> None:
        """Also while some stream always has something."""
        if time.monotonic() - self._looked_after > LOOK_AFTER_S:
            self._look_after()

    def _look_after(self) -> None:
        """What can wait: streams that are new, consumers that died."""
        self._looked_after = time.monotonic()
        self._attach()
        for reader in self._readers:
            reader.reclaim_dead()

    def _attach(self) -> None:
        for place in list(self._absent):
            try:
                reader = Reader(place)
            except SegmentError as error:
                self._absent[place] = str(error)
                continue
            try:
                self._poller.register(reader.bell.fd, select.POLLIN)
                self._readers += [reader]  # no call, hence no signal before the next line
                del self._absent[place]
            except BaseException:  # Ctrl-C
                reader.close()
                raise

    def _reject(self, reader: Reader, error: Exception) -> None:
        reader.reject()
        if reader.place.name not in self._complained:
            self._complained.add(reader.place.name)
            log.error("A message was dropped (later ones of the same origin are counted silently): %s", error)
