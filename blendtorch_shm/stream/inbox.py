"""Slot numbers over ZeroMQ PUSH: how a consumer that sleeps hears of a READY slot.

A consumer that finds nothing to take sleeps at its *inbox*, a PULL socket. Whoever has a READY slot for it pushes the slot's
number there, a :class:`~..message.token.Token` of 24 bytes. A number wakes, and says where to look first. It gives no ownership:
the slot table alone says who has what, so a number that is lost, late, repeated or forged costs time and never a message.

The sockets' files lie in the launch's directory in /dev/shm, so they reach wherever the shared memory reaches; within one process
they are ``inproc://``. Frames never travel here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable

import zmq

from ..closing import Closable
from ..errors import OutOfDescriptors
from ..message.token import Token, unpack
from ..process import forks
from .place import Place

log = logging.getLogger("blendtorch.stream")

_MOST_AT_ONCE = 256
"""Numbers that are read before the consumer goes on, so that nobody keeps it busy by sending."""
_MOST_WAITING = 64
"""Numbers that may wait on either side: each is for one sleep, so more than a few are of no use."""
_LARGEST_NBYTES = 256
"""ZeroMQ ends the connection of who sends more. A number has fewer, but what ZeroMQ says first on each connection counts, too."""


class _Context:
    """The ZeroMQ context of this process for slot numbers, made for its first socket.

    It stays until the process ends: to end a context waits for all its sockets, and an interrupt may have left one half made.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        forks.register(self)

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """A new socket."""
        with self._lock:
            if self._context is None:
                self._context = zmq.Context(io_threads=1)
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = _MOST_WAITING
        socket.maxmsgsize = _LARGEST_NBYTES
        return socket

    def start(self) -> None:
        """Have its threads run, if they do not yet: ZeroMQ ends a process that has no file descriptors left for them."""
        if self._context is None:
            self.socket(zmq.PUSH).close()

    def in_child(self) -> None:
        """A forked child cannot use its parent's context; it makes one of its own."""
        self._lock = threading.Lock()
        self._context = None


_context = _Context()


class Inbox(Closable):
    """Where one source hears of slots while it sleeps, for all its streams. Used by one thread at a time.

    Attributes:
        socket: the PULL, for a poller.
        rejected: how much arrived that was no number of a slot of these streams.

    Example::

        with Inbox() as inbox:
            inbox.bind(place, consumer.key, consumer.index)
            inbox.socket.poll(1000)
            token = inbox.read()
    """

    def __init__(self) -> None:
        try:
            self.socket = _context.socket(zmq.PULL)
        except zmq.ZMQError as error:  # ZeroMQ has a limit of its own
            raise OutOfDescriptors(
                f"Too many readers in this process: ZeroMQ has no socket left for another one ({error}). Each iterator of a "
                f"dataset is a reader, and each has a connection to others that it shares a stream with. Close some, or read "
                f"in several processes."
            ) from error
        self.rejected = 0
        self._bound: set[str] = set()
        self._keys: set[int] = set()  # of those streams

    def bind(self, place: Place, key: int, consumer: int) -> None:
        """Hear of the slots of the stream with this key. Where no socket can be made, the consumer hears nothing, and looks by
        itself.

        The caller holds the consumer's lock: a second binder takes a path over silently.
        """
        endpoint = place.inbox(consumer)
        self._keys.add(key)
        if endpoint not in self._bound:
            try:
                self.socket.bind(endpoint)
                self._bound.add(endpoint)
            except zmq.ZMQError as error:
                log.warning(
                    "Cannot make the inbox %s: %s. Messages arrive all the same, up to 50 ms later.", endpoint, error
                )

    def read(self) -> Token | None:
        """The next number that is here; None if there is none, or something else."""
        try:
            token = unpack(self.socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None
        if token is None or token.key not in self._keys or self.socket.getsockopt(zmq.RCVMORE):
            self.rejected += 1
            return None
        return token

    def clear(self) -> None:
        """Forget the numbers that are here: they are of an earlier sleep."""
        for _ in range(_MOST_AT_ONCE):
            if not int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            self.read()

    def close(self) -> None:
        """Hear no more. The consumers that it was bound for still hold their locks."""
        if self.socket.closed:
            return
        for endpoint in self._bound:
            if endpoint.startswith("ipc://"):
                with contextlib.suppress(OSError):  # removed, or something else in its place
                    os.unlink(endpoint.removeprefix("ipc://"))
            else:  # now: a socket that is closed keeps its name for a moment, and the next consumer could not have it
                with contextlib.suppress(zmq.ZMQError):  # an interrupted close has done it
                    self.socket.unbind(endpoint)
        self.socket.close()
        self._bound.clear()

    def __repr__(self) -> str:
        return (
            f"<Inbox of {len(self._keys)} streams, {self.rejected} rejected{', closed' if self.socket.closed else ''}>"
        )


class Outbox(Closable):
    """Sends slot numbers to the inboxes of a stream's consumers: one PUSH for each. Used by one thread at a time.

    One PUSH for all of them would deal the numbers out in turn, to busy consumers as well.

    Example::

        with Outbox(place) as outbox:
            outbox.push(consumer, pack(control.key, ring.number, slot, ring.sequence[slot]))
    """

    def __init__(self, place: Place) -> None:
        _context.start()  # now, while there are descriptors for that: see process/descriptors.py
        self._place = place
        self._sockets: dict[int, zmq.Socket[bytes]] = {}

    def push(self, consumer: int, number: bytes) -> bool:
        """Send a slot number to a consumer without waiting; False if that is not possible now: it looks by itself later."""
        try:
            socket = self._sockets.get(consumer) or self._connect(consumer)
            socket.send(number, zmq.DONTWAIT)
            return True
        except zmq.ZMQError:  # a full queue, no inbox any more, or too many files: connect anew next time
            if consumer in self._sockets:
                self._sockets.pop(consumer).close()
            return False

    def _connect(self, consumer: int) -> zmq.Socket[bytes]:
        socket = self._sockets[consumer] = _context.socket(zmq.PUSH)
        socket.reconnect_ivl = 20
        socket.reconnect_ivl_max = 500
        socket.connect(self._place.inbox(consumer))
        return socket

    def forget(self, is_gone: Callable[[int], bool]) -> None:
        """Close the connections to those consumers who are gone."""
        for consumer in [consumer for consumer in self._sockets if is_gone(consumer)]:
            self._sockets.pop(consumer).close()

    def close(self) -> None:
        """Send no more."""
        self.forget(lambda consumer: True)

    def __repr__(self) -> str:
        return f"<Outbox of {self._place.name}, connected to {sorted(self._sockets)}>"
