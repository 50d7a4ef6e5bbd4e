"""What both ends ask of ZeroMQ beside messages: to be told of connections, and to close those whose other host is gone."""

from __future__ import annotations

import itertools
import sys

import zmq

_numbers = itertools.count()
_POLLIN = int(zmq.POLLIN)  # a plain int: this is the hot path

CONNECTION_ENDS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
"""Events of connections that end, or that come to nothing."""
MAX_MESSAGE_NBYTES = 2**33
"""ZeroMQ ends the connection of who sends more."""


def monitor(socket: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """A socket that tells of those `events` on `socket`; read it with :func:`next_event`.

    Not pyzmq's ``get_monitor_socket``: ZeroMQ stops when a monitor is full, and that one has a limit.
    """
    endpoint = f"inproc://monitor-{next(_numbers)}"
    socket.monitor(endpoint, events)
    listener: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR)
    listener.rcvhwm = 0
    listener.linger = 0
    listener.connect(endpoint)
    return listener


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether something was received.

    Not pyzmq's ``Socket.poll``, which makes a poller for each call and asks the kernel twice.
    """
    return int(socket.getsockopt(zmq.EVENTS)) & _POLLIN != 0


def next_event(listener: zmq.Socket[bytes]) -> int:
    """The next event that a :func:`monitor` tells of, or 0 if an interrupt cut it in two.

    Not pyzmq's ``recv_monitor_message``: its module imports asyncio.
    """
    event, *address = listener.recv_multipart()
    return int.from_bytes(event[:2], sys.byteorder) if address else 0


def stop_monitor(socket: zmq.Socket[bytes]) -> None:
    """Have ZeroMQ tell of `socket` no more. Before both sockets are closed."""
    socket.monitor(None, 0)


def limit_silence(socket: zmq.Socket[bytes], patience_s: int) -> None:
    """Have the kernel close connections whose other host acknowledges no packet for `patience_s` seconds.

    Not ZeroMQ's heartbeats: a large message on a slow link would look like silence.
    """
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = patience_s // 2
    socket.tcp_keepalive_intvl = patience_s // 8
    socket.tcp_keepalive_cnt = 4
    socket.tcp_maxrt = patience_s * 1000
