"""Shared memory: the payload stays where it is, only a wake-up, an empty message, crosses an ``ipc://`` socket."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import zmq

from ..address import Twin
from ..errors import SegmentError
from ..place import SharedPlace
from ..source import RingSource

_HWM = 64
"""Announcements that queue up on either side; one is enough to wake a sleeper."""


class PushAnnouncer:
    """Pushes announcements to the consumers that are connected; with none connected, they find the messages themselves.

    Args:
        endpoint: ``ipc://`` endpoint to bind.
    """

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.linger = 0
        self._socket.sndhwm = _HWM
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise SegmentError(f"Cannot announce messages on {endpoint}: {error}. Is its launch over?") from error

    def announce(self) -> None:
        with contextlib.suppress(zmq.Again):
            self._socket.send(b"", zmq.NOBLOCK)

    def close(self, *, patient: bool = True) -> None:
        self._socket.close()
        self._context.term()


class PullInbox:
    """Announcements of any number of streams, fairly interleaved.

    Args:
        endpoints: ``ipc://`` endpoints to connect to; they need not exist yet.
        also: further sockets at which there may be something to receive: :meth:`hear` returns, and does not touch them.
    """

    def __init__(self, endpoints: Sequence[str], also: Sequence[zmq.Socket[bytes]] = ()) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.PULL)
        self.socket.rcvhwm = _HWM
        self.socket.linger = 0
        self.socket.reconnect_ivl = 20
        self.socket.reconnect_ivl_max = 200
        for endpoint in endpoints:
            self.socket.connect(endpoint)
        self._polled = [(socket, zmq.POLLIN) for socket in (self.socket, *also)]

    def hear(self, timeout_s: float) -> bool:
        # Not recv with a timeout: that starts anew with each signal that arrives.
        if not zmq.zmq_poll(self._polled, math.ceil(timeout_s * 1000)):
            return False
        with contextlib.suppress(zmq.Again):
            self.socket.recv(zmq.NOBLOCK)
        return True

    def close(self) -> None:
        self.socket.close()  # not left to the context: the garbage collector may have taken its list of sockets
        self._context.term()


def shared_source(twins: Sequence[Twin], also: Sequence[zmq.Socket[bytes]] = ()) -> RingSource:
    """A source of the shared-memory streams `twins`; for `also` see :class:`PullInbox`."""
    return RingSource([SharedPlace(t) for t in twins], PullInbox([t.endpoint for t in twins], also))
