"""A channel: messages both ways between an instance and one trainer.

A trainer may have the ends of several in one object, to wait for all of them at once. A channel is two streams of one address.
The instance binds, the trainer connects. On one host either end publishes into a ring of its own, and only slot numbers travel;
:meth:`~..launch.address.Twin.back` names the stream of the way back. Elsewhere, one TCP connection carries both directions: the
trainer's lane posts what the instance's inlet receives (see tcp/protocol.py).

Whatever either end has sent stays until the other one takes it. So a message that was sent to an instance that dies reaches its
successor, and an instance that starts later finds what waits for it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy.typing as npt

from ..closing import Closable
from ..errors import BlendtorchError, ConfigurationError, StreamClosed, StreamTimeout
from ..launch.address import Address, Twin, check_endpoint
from ..launch.keys import ClientKeys
from ..memory.ring import Bytes
from ..message.dtypes import Array
from ..message.wire import Encoder, Message
from ..process import descriptors, forks, leaving
from ..stream.consumer import Consumer
from ..stream.lease import Calls
from ..stream.merge import Source
from ..stream.place import PrivatePlace, SharedPlace
from ..stream.producer import AFTER_FORK, Producer, ProducerAlive
from ..stream.stats import stats
from ..wording import counted
from .tcp import Demand, TcpForwarder, TcpLane
from .tcp.protocol import ANOTHER_TRAINER, LOST_S, new_post

log = logging.getLogger("blendtorch.channel")
_T = TypeVar("_T")

_SEND_HWM = 10
"""Messages that may wait at the other end before :meth:`Channel.send` waits."""
_DESCRIPTORS = 64
_LOOK_EVERY_S = 0.25
"""Who waits for a message looks around this often."""
_SERVE_EVERY_S = 0.02
"""What was posted and is not received yet is looked after this often, whatever the program does meanwhile."""
_LAST_POSTS_S = 5.0
"""How long closing waits until an instance elsewhere has received what was posted."""


class _Out(Protocol):
    """The way to the other end."""

    def send(self, fields: Mapping[str, Any], timeout_s: float, meanwhile: Callable[[], object] | None) -> None:
        """Send a message, or raise StreamTimeout, or whatever `meanwhile` raises, which is called while there is no room."""

    def supersede(self, fields: Mapping[str, Any]) -> bool:
        """See :meth:`Channel.supersede`."""

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array | None:
        """See :class:`~..stream.producer.Sink`."""

    def note_waited(self, seconds: float) -> None:
        """So long nothing came from the other end."""

    def close(self, *, patient: bool = True) -> None:
        """Send no more. What was sent is still delivered."""


class Channel(Closable):
    """One end of a channel, or of several; see :func:`bind_channel` and :func:`connect_channels`.

    One thread may send while another one receives.

    Args:
        outs: the ways to the other ends.
        source: the way from there.
        turns: of those who use `outs` or `source`, where they use the same connections.
        btid: number of the instance; None at the trainer's end. Part of each message.
        timeout_s: patience for room.
    """

    def __init__(
        self, outs: Sequence[_Out], source: Source, turns: _Turns | None, *, btid: int | None, timeout_s: float
    ) -> None:
        self.btid = btid
        self._outs = outs
        self.source = source
        """What comes from the other ends."""
        self._turns = turns
        self._timeout_s = timeout_s
        self._next = secrets.randbits(31)
        self._numbers = threading.Lock()
        forks.register(self)

    def send(self, fields: Mapping[str, Any], meanwhile: Callable[[], object] | None = None, *, to: int = 0) -> int:
        """Send a message; waits while ten that were sent before have not been taken.

        Args:
            fields: as for ``DataPublisher.publish``. ``btid`` and ``btmid`` are added.
            meanwhile: called several times a second while there is no room; may raise.
            to: to which of the other ends.

        Returns:
            number of the message, which stands in it as ``btmid``.

        Raises:
            StreamTimeout: there was no room for longer than the patience.
            PublishError: a value cannot be sent; names its key. Nothing was sent.
            StreamClosed: this end was closed.
        """
        with self._numbers:
            number, self._next = self._next, (self._next + 1) % 2**32
        self._outs[to].send({"btid": self.btid, "btmid": number, **fields}, self._timeout_s, meanwhile)
        return number

    def supersede(self, fields: Mapping[str, Any], *, to: int = 0) -> bool:
        """Send a message in place of those that were sent before and not taken. Does not wait for the other end.

        Args:
            fields: as for :meth:`send`; ``btmid`` is not added.
            to: to which of the other ends.

        Returns:
            whether it was sent. False: try again later. A message is on its way to an instance elsewhere, or no slot is free.

        Raises:
            PublishError, StreamClosed: as for :meth:`send`.
        """
        return self._outs[to].supersede({"btid": self.btid, **fields})

    def receive(self, timeout_s: float, meanwhile: Callable[[], object] | None = None) -> dict[str, Any] | None:
        """The next message, or None after `timeout_s` without one.

        Args:
            timeout_s: patience; 0: only look; infinite: for as long as it takes.
            meanwhile: called four times a second while nothing comes; may raise.

        Raises:
            UnreadableMessage: the next one cannot be opened here, and is lost.
            StreamClosed: this end was closed.
        """
        started = now = time.monotonic()
        until = started + timeout_s
        while True:
            patience_s = min(_LOOK_EVERY_S, max(0.0, until - now))
            if self._turns is None:
                message = self.source.receive(patience_s)
            else:
                message = self._receive_in_turns(self._turns, patience_s)
            if message is not None:
                return message.fields
            before, now = now, time.monotonic()
            self._outs[0].note_waited(now - before)
            if now >= until:
                return None
            if meanwhile is not None:
                meanwhile()

    def _receive_in_turns(self, turns: _Turns, patience_s: float) -> Message | None:
        """Receive, and let a thread that sends have the connection in between."""
        until = time.monotonic() + patience_s
        while True:
            wait_s = min(_SERVE_EVERY_S, max(0.0, until - time.monotonic()))
            message = turns.take(functools.partial(self.source.receive, wait_s, held=True), waits=True)
            if message is not None:
                self.source.hand_over()  # here: Ctrl-C could come where the turn ends
                return message
            if time.monotonic() >= until:
                return None

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array | None:
        """An uninitialised C-contiguous array that the next :meth:`send` sends without a copy, if there is room for one."""
        return self._outs[0].lend(shape, dtype)

    def explain(self) -> str:
        """What this end is connected to, for messages to people."""
        return self.source.explain()

    def close(self, *, patient: bool = True) -> None:
        """Close this end. What was sent is still delivered; arrays that were received stay valid.

        Args:
            patient: wait for an other end elsewhere that takes its last messages only now.
        """
        try:
            with contextlib.ExitStack() as all_of_them:  # whatever one of them raises
                for out in self._outs:
                    all_of_them.callback(out.close, patient=patient)
        finally:
            if self._turns is None or self._turns.is_inside():
                self.source.close()
            else:
                self._turns.take(self.source.close)
            leaving.leave(self)

    def finish(self) -> None:
        """Close: the process is about to exit."""
        self.close(patient=getattr(sys, "last_type", None) is not KeyboardInterrupt)

    def in_child(self) -> None:
        """In a forked child: it is its parent's."""
        self._numbers = threading.Lock()

    def __repr__(self) -> str:
        return f"<Channel {self.source!r}>"


def bind_channel(address: Address, *, btid: int | None, timeout_s: float, lingerms: int = 0) -> Channel:
    """An instance's end.

    Args:
        address: where to listen, with its twin if it has one.
        btid: number of the instance.
        timeout_s: patience for room.
        lingerms: extra milliseconds that closing may wait for a trainer elsewhere.

    Raises:
        PortInUse, OutOfDescriptors, SegmentError, ConfigurationError: as for :func:`~..transport.open_sink`.
    """
    descriptors.require(_DESCRIPTORS, f"a channel on {address}")
    place = SharedPlace(address.twin) if address.twin is not None else PrivatePlace(str(address))
    trusted = address.twin is not None or address.keys is not None
    producer = Producer(place, send_hwm=_SEND_HWM, trusted=trusted)
    try:
        forwarder = TcpForwarder(place, address, lingerms=lingerms, is_channel=True)
        producer.forwarder = forwarder
        assert forwarder.inlet is not None
        back = [] if address.twin is None else [SharedPlace(address.twin.back())]
        source = Source(back, [forwarder.inlet], forwarder.inlet.calls)
    except BaseException:
        producer.close(patient=False)
        raise
    return Channel([_ToRing(producer)], source, None, btid=btid, timeout_s=timeout_s)


def connect_channels(
    addresses: Sequence[Address], *, btid: int | None = None, timeout_s: float, lingerms: int = 0
) -> Channel:
    """A trainer's ends of the channels of some instances. These need not exist yet.

    Args:
        addresses: of the instances.
        btid: part of each message that is sent.
        timeout_s: patience for room.
        lingerms: extra milliseconds that closing may wait until an instance elsewhere has received what was sent.

    Raises:
        ConfigurationError: not an endpoint; or another trainer of this host is connected.
        OutOfDescriptors, SegmentError: as for :func:`~..transport.open_source`.
    """
    for address in addresses:
        check_endpoint(address)
    descriptors.require(_DESCRIPTORS * len(addresses), f"channels to {counted(len(addresses), 'instance')}")
    remote = [address for address in addresses if address.twin is None]
    turns = _Turns() if remote else None
    demand = Demand(len(remote), queue_size=_SEND_HWM) if remote else None
    calls = Calls()
    lanes: list[TcpLane] = []
    outs: list[_Out] = []
    try:
        for address in addresses:
            if address.twin is not None:
                outs.append(_ToRing(_producer_of_way_back(address, address.twin)))
            else:
                assert demand is not None
                assert turns is not None
                lanes.append(TcpLane(address, demand, calls))
                trusted = isinstance(address.keys, ClientKeys)
                outs.append(_ToLane(lanes[-1], turns, trusted=trusted, last_posts_s=_LAST_POSTS_S + lingerms / 1000))
        source = Source([SharedPlace(a.twin) for a in addresses if a.twin is not None], lanes, calls)
    except BaseException as error:
        for out in outs:
            out.close(patient=False)
        if demand is not None:
            # To end a context waits for all its sockets, and an interrupt may have left one half made.
            demand.is_abandoned = not isinstance(error, ConfigurationError)
            for lane in lanes:
                lane.close()
            demand.close()
        raise
    channel = Channel(outs, source, turns, btid=btid, timeout_s=timeout_s)
    if turns is not None:
        leaving.join(channel)
        leaving.leave(source)  # which the channel closes, after the last posts
    return channel


def _producer_of_way_back(address: Address, twin: Twin) -> Producer:
    taken = ConfigurationError(
        f"Cannot connect to {address}: {ANOTHER_TRAINER}. Close that one first; or name another socket for this one "
        f"(named_sockets)."
    )
    try:
        producer = Producer(SharedPlace(twin.back()), send_hwm=_SEND_HWM, trusted=True)
    except ProducerAlive as error:
        raise taken from error
    until = time.monotonic() + 2 * LOST_S
    while any(consumer.alive and consumer.remote for stream in stats(address) for consumer in stream.consumers):
        if time.monotonic() > until:  # before, it may be one that has died
            producer.close(patient=False)
            raise taken
        time.sleep(0.01)
    return producer


class _Turns:
    """Whose turn it is to use a connection: one thread's at a time. Who waits there goes behind those who do not."""

    def __init__(self) -> None:
        self._next = threading.Lock()
        self._now = threading.Lock()
        self._inside: set[int] = set()
        """The threads that are in a call."""
        forks.register(self)

    def take(self, call: Callable[[], _T], *, waits: bool = False) -> _T:
        """What `call` returns, which nobody disturbs.

        Args:
            call: uses the connection.
            waits: whether it waits for something, again and again.

        Raises:
            BlendtorchError: called by a signal's handler in the middle of another call.
        """
        me = threading.get_ident()
        if self.is_inside():
            raise BlendtorchError(
                "A channel was used in the middle of another call of it, by a signal's handler. Set a flag there, and use the "
                "channel from the program's loop."
            )
        try:
            self._inside.add(me)
            with self._next:
                if not waits:
                    with self._now:
                        return call()
            with self._now:
                return call()
        finally:
            self._inside.discard(me)

    def is_inside(self) -> bool:
        """Whether this thread is in a call: a signal's handler asks."""
        return threading.get_ident() in self._inside

    def in_child(self) -> None:
        """In a forked child: a thread of the parent may have had its turn."""
        self._next, self._now = threading.Lock(), threading.Lock()
        self._inside.clear()


class _ToRing:
    """To the other end of this host, by a ring; or, from an instance, by its forwarder to wherever the trainer is."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._skipper: Consumer | None = None
        """Takes back what :meth:`supersede` sends another message in place of."""
        self._is_superseding = False  # also left behind by a call that was cut short
        self.lend = producer.lend
        self.note_waited = producer.note_waited

    def send(self, fields: Mapping[str, Any], timeout_s: float, meanwhile: Callable[[], object] | None) -> None:
        if not self._producer.gets_room(timeout_s, meanwhile):
            raise StreamTimeout(
                f"A message could not be sent for {timeout_s:.1f} s: the other end takes none of those that wait. "
                f"{self._producer.explain()}."
            )
        self._producer.publish(fields)

    def supersede(self, fields: Mapping[str, Any]) -> bool:
        if self._skipper is None:
            self._skipper = Consumer(self._producer.place)
        if self._is_superseding:
            self._skipper.reconcile()
        self._is_superseding = True
        self._skipper.look_after()  # slots of an other end that was killed
        has_room = self._producer.has_room()
        if has_room:
            self._producer.publish(fields)
            self._skipper.skip_all_but_the_last()
        self._is_superseding = False
        return has_room

    def close(self, *, patient: bool = True) -> None:
        try:
            if self._skipper is not None:
                self._skipper.close()
        finally:
            self._producer.close(patient=patient)


class _ToLane:
    """To an instance elsewhere, on the connection that its messages come by.

    What was posted must arrive although the program does not call this channel for a while, so a thread looks after it.
    """

    def __init__(self, lane: TcpLane, turns: _Turns, *, trusted: bool, last_posts_s: float) -> None:
        self._lane = lane
        self._turns = turns
        self._encoder = Encoder(trusted=trusted)
        self._last_posts_s = last_posts_s
        self._closed = self._is_copy = False
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None
        forks.register(self)

    def send(self, fields: Mapping[str, Any], timeout_s: float, meanwhile: Callable[[], object] | None) -> None:
        looked = time.monotonic()
        until = looked + timeout_s
        post = self._new_post(fields)
        while not self._turns.take(functools.partial(self._post, post)):
            now = time.monotonic()
            if now >= until:
                raise StreamTimeout(
                    f"A message could not be sent for {timeout_s:.1f} s: the other end takes none of those that wait. "
                    f"{self._lane.explain()}."
                )
            if meanwhile is not None and now - looked > _LOOK_EVERY_S:
                looked = now
                meanwhile()
            time.sleep(_SERVE_EVERY_S / 10)
        self._have_posts_served()

    def supersede(self, fields: Mapping[str, Any]) -> bool:
        was_sent = self._turns.take(functools.partial(self._replace_posts, self._new_post(fields)))
        self._have_posts_served()
        return was_sent

    def _new_post(self, fields: Mapping[str, Any]) -> Bytes:
        parts = self._encoder.take_apart(fields)
        post, payload = new_post(parts.header(), parts.nbytes)
        parts.copy_into(payload)
        return post

    def _have_posts_served(self) -> None:
        if self._lane.has_posts():
            self._wanted.set()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._serve, name="blendtorch channel", daemon=True)
                self._thread.start()

    def _post(self, post: Bytes) -> bool:
        self._check_open()
        return self._lane.post(post)

    def _replace_posts(self, post: Bytes) -> bool:
        self._check_open()
        return self._lane.replace_posts(post)

    def _check_open(self) -> None:
        if self._is_over():
            raise StreamClosed(AFTER_FORK if self._is_copy else "send() after close().")

    def _serve(self) -> None:
        while not self._is_over():
            self._turns.take(self._look_after_posts)
            self._wanted.wait()
            time.sleep(_SERVE_EVERY_S)

    def _look_after_posts(self) -> None:
        if not self._is_over():
            self._lane.serve()
            if not self._lane.has_posts():
                self._wanted.clear()

    def _is_over(self) -> bool:
        return self._closed or self._lane.is_closed()  # the latter alone where an interrupt cut close() short

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array | None:
        return None

    def note_waited(self, seconds: float) -> None:
        pass

    def close(self, *, patient: bool = True) -> None:
        until = time.monotonic() + (self._last_posts_s if patient else 0)
        try:
            while not self._turns.is_inside() and not self._turns.take(functools.partial(self._is_done, until)):
                time.sleep(_SERVE_EVERY_S / 10)
        finally:  # also when Ctrl-C ends its patience, or a signal's handler closes it
            self._closed = True
            self._wanted.set()

    def _is_done(self, until: float) -> bool:
        """Whether it is closed, now: nobody waits for it, or `until` has passed."""
        if not self._is_over():
            self._lane.serve()
            if self._lane.has_posts():
                if time.monotonic() < until:
                    return False
                log.warning("A channel closed before its last messages were received. %s", self._lane.explain())
            self._closed = True  # in this turn: nobody posts after it
        return True

    def in_child(self) -> None:
        """In a forked child: the connection is its parent's."""
        self._closed = self._is_copy = True
        self._wanted = threading.Event()  # the parent's may have been in use
