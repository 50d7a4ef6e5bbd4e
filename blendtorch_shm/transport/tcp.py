"""TCP: the whole message travels, as two frames: header and payload."""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Sequence

import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from ..errors import ConfigurationError, PortInUse, SegmentError, WireError
from ..place import Place
from ..reader import Claimed, Reader
from ..wire import Message, decode

log = logging.getLogger("blendtorch")

_POLL_MS = 100
_CLOSING_PATIENCE_S = 5.0


class TcpForwarder:
    """A consumer inside the producer's process that sends what it takes to a TCP receiver.

    It takes a message only when a receiver has room for it, so that local and remote receivers compete fairly; it sends from the
    slot, whose lease ends when ZeroMQ has let go of the bytes. Its thread works also while the script renders.

    Args:
        place: the stream to take messages from.
        endpoint: ``tcp://`` endpoint to bind.
        send_hwm: messages that may be on their way to one receiver.
        lingerms: extra milliseconds that closing may spend on sending.

    Raises:
        PortInUse: somebody else listens there.
        ConfigurationError: not an endpoint that can be bound.
    """

    def __init__(self, place: Place, endpoint: str, *, send_hwm: int = 10, lingerms: int = 0) -> None:
        self._lingerms = lingerms
        self._wake = threading.Event()
        self._closing = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.sndhwm = max(1, send_hwm)
        self._socket.immediate = 1
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._receivers = 0
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(
                    f"Cannot publish on {endpoint}: another program listens there. Stop it, or choose another port "
                    f"(start_port= of BlenderLauncher)."
                ) from error
            raise ConfigurationError(
                f"Cannot publish on {endpoint!r}: {error}. Expected tcp://ADDRESS:PORT."
            ) from error
        self._reader = Reader(place)
        self._thread = threading.Thread(target=self._run, name=f"blendtorch {endpoint}", daemon=True)
        self._thread.start()

    def announce(self) -> None:
        self._wake.set()

    def close(self) -> None:
        """Hand over what receivers that are connected still take, for a few seconds at most, and stop."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        give_up = 0.0
        taken: Claimed | None = None  # the one message in our hands
        try:
            while True:
                if self._closing:
                    give_up = give_up or time.monotonic() + _CLOSING_PATIENCE_S + self._lingerms / 1000
                    if time.monotonic() > give_up:
                        break
                if not self._socket.poll(_POLL_MS, zmq.POLLOUT):  # nobody connected, or nobody with room
                    if self._closing and not self._lingerms and not self._count_receivers():
                        break
                    continue
                self._wake.clear()
                taken = taken or self._take()
                if taken is None:
                    if self._closing:
                        break
                    self._reader.sleep(True)
                    taken = self._take()
                    if taken is None:
                        self._wake.wait(_POLL_MS / 1000)
                    self._reader.sleep(False)
                    continue
                with contextlib.suppress(zmq.Again):  # its receiver has just gone: keep it for the next
                    self._socket.send_multipart(taken, zmq.NOBLOCK, copy=False)
                    taken = None
        finally:
            del taken
            self._reader.close()
            self._socket.disable_monitor()
            self._context.destroy(linger=int(_CLOSING_PATIENCE_S * 1000) + self._lingerms)

    def _count_receivers(self) -> int:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self._receivers += 1 if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else -1
        return self._receivers

    def _take(self) -> Claimed | None:
        try:
            return self._reader.take(copy=False, local=False)
        except SegmentError as error:
            log.error("A message was not sent: %s", error)
            return None


class TcpSource:
    """Receives whole messages from any number of producers, fairly interleaved.

    Args:
        endpoints: ``tcp://`` endpoints to connect to; they need not exist yet.
        queue_size: messages that may queue up here, per producer.

    Raises:
        ConfigurationError: not an endpoint.
    """

    def __init__(self, endpoints: Sequence[str], *, queue_size: int = 10) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.PULL)
        self.socket.rcvhwm = max(1, queue_size)
        self.socket.linger = 0
        self.socket.reconnect_ivl = 50
        self.socket.reconnect_ivl_max = 1000
        self.rejected = 0
        self._endpoints = list(endpoints)
        try:
            for endpoint in endpoints:
                self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigurationError(
                f"{endpoint!r} is not an address: {error}. Expected tcp://ADDRESS:PORT."
            ) from error

    def receive(self, timeout_s: float) -> Message | None:
        deadline = time.monotonic() + timeout_s
        while True:
            if not self.socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                return None
            frames = self.socket.recv_multipart(copy=False)
            try:
                if len(frames) != 2:
                    raise WireError(f"A message of {len(frames)} frames instead of 2 (is the sender blendtorch-shm?).")
                payload = np.frombuffer(frames[1].buffer, np.uint8)
                return decode(frames[0].bytes, payload, trusted=False)
            except WireError as error:
                self.rejected += 1
                if self.rejected == 1:
                    log.error("A message was dropped (later ones are counted silently): %s", error)

    def explain(self) -> str:
        return f"listening to {', '.join(self._endpoints)}; {self.rejected} messages rejected"

    def close(self) -> None:
        self._context.destroy(linger=0)
