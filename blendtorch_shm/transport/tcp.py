"""TCP: whole messages, for consumers that do not share the producer's memory.

A consumer opens one connection per producer (DEALER to ROUTER). It greets, takes messages, and says which it has taken::

    consumer                                                        producer
    Hello(session, generation, room, taken)        ───────────►     knows the session, begins one, or refuses it
                       ◄───────────  stamp, header, payload         at most as many untaken ones as there is room for
    Taken(sequence, room)                          ───────────►     ends the lease of that slot
    Bye()                                          ───────────►     what was not taken is READY again
                       ◄───────────  END                            closed: what was sent is the consumer's

So a message stays the producer's until a consumer has it: what was on its way to one that died, that closed, or that the
network lost, is delivered again, here or elsewhere. And nothing is received twice: a consumer greets anew after each
interruption, counting *generations*, names what it has taken lately, and drops whatever was sent in an earlier generation, unless
that ended with END. It also knows what it has taken when a producer that was killed is followed by one that goes on with its
stream. There is one limit: if a consumer could not say any more that it took a message, because its connection broke or its
producer was killed at that moment, and somebody else asks for that message before it is back (:data:`_LOST_S`), both get it.

The producer's end is a consumer of its own ring (:class:`TcpForwarder`): it leases a slot when a consumer has room, sends from
the slot without a copy, and so competes fairly with the consumers that do share the memory. Its peers are unknown programs until
they have greeted properly; beyond loopback they are not even heard without the keys of the launch (CURVE, keys.py).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any

import msgspec
import numpy as np
import zmq
import zmq.utils.garbage  # now: it registers with atexit, and who publishes must be closed before

from ..errors import ConfigurationError, PortInUse, SegmentError, StreamClosed, WireError
from ..launch.address import Address, is_loopback
from ..launch.keys import ClientKeys, ServerKeys
from ..memory.layout import MAX_CONSUMERS, VERSION
from ..memory.segment import Segment
from ..message.wire import Message, decode
from ..process import interrupts, leaving
from ..stream.place import Place
from ..stream.reader import Claimed, Reader

log = logging.getLogger("blendtorch")

_LOST_S = 2.0
"""How long a producer waits for a consumer whose connection closed; then its messages go to others."""
_PROBE_FOR_S, _PROBE_EVERY_S = 1.0, 0.05
"""After a connection closed, ZeroMQ is asked for so long, and so often, whose it was: it says so before it knows itself."""
_CLOSING_PATIENCE_S = 5.0
"""How long a producer that closes waits for a message to be taken that is on its way to a consumer."""
_LAST_CHANCE_S = 120.0
"""How long it waits where messages are left that only consumers elsewhere may ever come for."""
_CONSUMERS_PATIENCE_S, _PRODUCERS_PATIENCE_S = 60, 120
"""The other host is gone when it acknowledges no packet for so long. The consumer drops the connection first: it knows then that
what it has not taken may go to others. (Not ZeroMQ's heartbeats: a large message on a slow link would look like silence.)
"""
_GREET_AGAIN_S = 5.0
"""A consumer that was refused asks again after so long."""
_WAIT_IN_SILENCE_S = 2.0
"""A producer that closes says after so long what it waits for."""
_MAX_MESSAGE_NBYTES = 2**33
_MAX_GREETING_NBYTES = 2**16
_MAX_QUEUE = 1024
_MAX_HEARD = 256
"""Greetings and the like that are heard before messages are sent again, so that nobody keeps a producer busy by talking."""
_STAMP = struct.Struct("<QQQ")
"""First frame of each message: the generation that it was sent in, its sequence number, and the key of its stream."""
_ENDS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
"""What ZeroMQ tells of connections that end, or that come to nothing."""
_PROBE = b""
"""A producer's question whether a consumer is still there; ZeroMQ answers it."""
_END = b"end"
_REFUSAL = b"refused: "
_ZAP_DOMAIN = b"blendtorch"


class Hello(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The first message of each connection.

    Attributes:
        version: of the wire format.
        session: random, the consumer's for as long as it lives.
        generation: counts the greetings of the session.
        room: messages that may be on their way, or wait at the consumer.
        stream: key of the stream that it has taken messages of; 0 for none.
        taken: sequence numbers of those taken last.
    """

    version: int
    session: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    generation: Annotated[int, msgspec.Meta(ge=0)]
    room: Annotated[int, msgspec.Meta(ge=1)]
    stream: int
    taken: list[int]


class Taken(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The consumer has taken a message.

    Attributes:
        sequence: its number.
        room: see :class:`Hello`; it may change.
    """

    sequence: int
    room: Annotated[int, msgspec.Meta(ge=1)]


class Bye(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The consumer takes no more."""


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Hello | Taken | Bye)


# -- the producer's end -----------------------------------------------------------------------------------------


@dataclass
class _Peer:
    """A consumer that has greeted."""

    session: bytes
    route: bytes
    generation: int
    room: int
    sent: dict[int, Claimed] = field(default_factory=dict)
    """By sequence number, in the order they were sent: what it has not taken yet."""
    unsent: deque[int] = field(default_factory=deque)
    """Of these, what has to be sent in this generation."""
    lost_at: float | None = None
    """When its connection was found closed."""


class TcpForwarder:
    """A consumer inside the producer's process that sends what it takes to consumers elsewhere.

    Its thread works also while the script renders, and sleeps while nobody is connected.

    Args:
        place: the stream to take messages from.
        address: ``tcp://`` endpoint to bind, with its keys if connections are to be authenticated.
        lingerms: extra milliseconds that closing may wait for consumers, connected or not.

    Raises:
        PortInUse: somebody else listens there.
        ConfigurationError: not an endpoint that can be bound, or one beyond loopback without keys.
    """

    def __init__(self, place: Place, address: Address, *, lingerms: int = 0) -> None:
        keys = address.keys if isinstance(address.keys, ServerKeys) else None
        if keys is None and not is_loopback(address):
            if not address.unauthenticated:
                raise ConfigurationError(
                    f"Publishing on {address} would let every program that reaches this host read from it. Start the script "
                    f"through BlenderLauncher, which makes keys, or say allow_unauthenticated=True."
                )
            log.warning(
                "%s is open to every program that reaches this host: connections are not authenticated.", address
            )
        self.authenticated = keys is not None
        self._address = address
        self._lingerms = lingerms
        self._peers: dict[bytes, _Peer] = {}  # by route
        self._returned: deque[Claimed] = deque()  # copies that somebody did not take
        self._complained: set[str] = set()
        self._closing = False
        self._patient = True
        self._told_what_is_left = False
        self._probe_until = self._probed_at = 0.0
        self._context = zmq.Context()
        self._context.rcvhwm = 0  # for the monitor, as a default: a full one stops ZeroMQ
        self._authenticator: Any = None
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.router_mandatory = 1  # a route that is gone is an error
        self._socket.rcvhwm = 1000
        self._socket.sndhwm = 0  # what is on its way is limited per consumer, in messages
        self._socket.linger = 0
        self._socket.maxmsgsize = _MAX_GREETING_NBYTES
        self._socket.handshake_ivl = 10_000
        _limit_silence(self._socket, _PRODUCERS_PATIENCE_S)
        self._monitor = self._socket.get_monitor_socket(_ENDS)
        try:
            if keys is not None:
                from zmq.auth.thread import ThreadAuthenticator  # here: it imports asyncio

                self._authenticator = ThreadAuthenticator(self._context, log=logging.getLogger("blendtorch.zap"))
                self._authenticator.start()
                self._authenticator.configure_curve_callback(_ZAP_DOMAIN.decode(), _OneKey(keys.client_public))
                self._socket.zap_domain = _ZAP_DOMAIN
                self._socket.zap_enforce_domain = 1
                keys.secure(self._socket)
            self._bind()
            self._reader = Reader(place, ends_with_process=False)
        except BaseException:
            self._shut()
            raise
        self._poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._reader.bell.fd):
            self._poller.register(source, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name=f"blendtorch {address}", daemon=True)
        self._thread.start()

    @property
    def index(self) -> int:
        """Which of the stream's consumers it is."""
        return self._reader.index

    def close(self, *, patient: bool = True) -> None:
        """If `patient`, wait until consumers have taken what there is, for as long as they do take it; then stop."""
        self._patient = patient
        self._closing = True
        self._reader.bell.ring()
        self._thread.join()

    def _bind(self) -> None:
        try:
            self._socket.bind(self._address)
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(
                    f"Cannot publish on {self._address}: another program listens there. Stop it, or choose another port "
                    f"(start_port= of BlenderLauncher)."
                ) from error
            raise ConfigurationError(
                f"Cannot publish on {str(self._address)!r}: {error}. Expected tcp://ADDRESS:PORT."
            ) from error

    def _shut(self, linger_ms: int = 0) -> None:
        self._socket.disable_monitor()
        for socket in (self._monitor, self._socket):
            socket.close(linger=linger_ms)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    # -- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        progress = 0.0  # when a consumer took something, while closing
        try:
            while True:
                waiting = self._send()
                if self._closing:
                    progress = progress or time.monotonic()
                    idle_s = time.monotonic() - progress
                    if self._is_done(idle_s):
                        break
                    if idle_s > _WAIT_IN_SILENCE_S:
                        self._say_what_is_left()
                if waiting:
                    self._reader.sleep(True)
                    self._send()  # what was committed before the producer saw that we sleep
                try:
                    taken = self._wait()
                finally:
                    self._reader.sleep(False)
                if taken:
                    progress = 0.0
                self._find_lost()
        except Exception:
            log.exception("Consumers elsewhere get nothing more from %s.", self._address)
        finally:
            for peer in list(self._peers.values()):
                if peer.lost_at is not None or not self._try_send(peer, [peer.route, _END]):
                    self._dismiss(peer)
            self._peers.clear()
            if self._returned:
                log.warning(
                    "%s closed: %d messages that were sent and not taken are lost.", self._address, len(self._returned)
                )
            if self._patient and self._address.twin is None and self._reader.has_ready(local=self.authenticated):
                log.warning("%s closed: messages that nobody came for are lost.", self._address)
            linger_s = _LAST_CHANCE_S if self._patient else _WAIT_IN_SILENCE_S
            self._shut(linger_ms=int(linger_s * 1000) + self._lingerms)
            self._reader.finish()  # what is sent is its consumers'

    def _is_done(self, idle_s: float) -> bool:
        """Whether closing need not wait any longer, `idle_s` seconds after a consumer took something."""
        patience_s = 0.0
        if not self._patient:
            return True
        if self._returned or self._reader.has_ready(local=self.authenticated):
            if self._peers or not is_loopback(self._address):
                patience_s = _LAST_CHANCE_S
        elif any(peer.sent for peer in self._peers.values()):
            patience_s = _CLOSING_PATIENCE_S
        else:
            return True
        return idle_s >= patience_s + self._lingerms / 1000

    def _say_what_is_left(self) -> None:
        if not self._told_what_is_left:
            self._told_what_is_left = True
            log.warning(
                "%s closes, and waits for up to %.0f s until its last messages are taken; %d consumers are connected.",
                self._address,
                _LAST_CHANCE_S + self._lingerms / 1000,
                len(self._peers),
            )

    def _wait(self) -> bool:
        """Sleep until there is something to do; whether a consumer took a message."""
        patience_ms = 100 if self._peers or self._closing else None  # lost ones, dead ones and probes need a look
        events = dict(self._poller.poll(patience_ms))
        if self._reader.bell.fd in events:
            self._reader.bell.clear()
        if self._monitor in events:
            self._hear_of_connections()
        if not events:
            self._reader.reclaim_dead()
        if self._socket not in events:
            return False
        taken = 0
        for _ in range(_MAX_HEARD):
            try:
                route, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            taken += self._hear(route, frames)
        return taken > 0

    def _hear(self, route: bytes, frames: list[bytes]) -> bool:
        """Do what a peer asks for; whether it took a message."""
        peer = self._peers.get(route)
        try:
            if len(frames) != 1:
                raise WireError(f"it sent {len(frames)} frames")
            said = _decoder.decode(frames[0])
            if isinstance(said, Hello):
                self._greet(route, said)
            elif peer is None:
                pass  # said to an earlier connection; the greeting that follows says it again
            elif isinstance(said, Taken):
                peer.room = min(said.room, _MAX_QUEUE)
                return peer.sent.pop(said.sequence, None) is not None
            else:
                self._dismiss(peer)
        except Exception as error:  # whatever a stranger may say
            self._complain(
                f"A program at {self._address} is not a consumer of this version of blendtorch-shm: {str(error)!r}."
            )
        return False

    def _greet(self, route: bytes, hello: Hello) -> None:
        if hello.version != VERSION:
            self._refuse(route, f"it speaks version {hello.version} of the wire format, this program {VERSION}")
        peer = next((peer for peer in self._peers.values() if peer.session == hello.session), None)
        if peer is not None and hello.generation <= peer.generation:
            return  # of an earlier connection, overtaken
        if peer is None:
            if len(self._peers) >= MAX_CONSUMERS:
                self._refuse(route, f"there are {MAX_CONSUMERS} consumers already")
            peer = _Peer(hello.session, route, 0, 0)
            self._reader.count_remote(len(self._peers) + 1)
        else:
            del self._peers[peer.route]
        if route in self._peers:  # another session of the same connection, which nobody of ours would begin
            self._dismiss(self._peers[route])
        self._peers[route] = peer
        peer.route, peer.generation, peer.lost_at = route, hello.generation, None
        peer.room = min(hello.room, _MAX_QUEUE)
        if hello.stream == self._reader.key:
            for sequence in hello.taken:
                peer.sent.pop(sequence, None)
        peer.unsent = deque(peer.sent)

    def _refuse(self, route: bytes, why: str) -> None:
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart([route, _REFUSAL + why.encode()], zmq.NOBLOCK)
        raise WireError(why)

    def _send(self) -> bool:
        """Send what there is to those who have room; whether one of them waits for more."""
        for peer in list(self._peers.values()):
            while peer.unsent and peer.lost_at is None:
                self._send_next(peer)
        # Of the slots, so that who takes nothing starves nobody.
        share = max(1, self._reader.leasable() // max(1, len(self._peers)))
        while True:
            room = [p for p in self._peers.values() if p.lost_at is None and len(p.sent) < min(p.room, share)]
            if not room:
                return False
            peer = min(room, key=lambda p: len(p.sent))  # of equals, the one that has waited longest
            claimed = self._take(copy=not peer.sent)  # a copy would die with this process, so only for who has nothing
            if claimed is None:
                return True
            self._peers[peer.route] = self._peers.pop(peer.route)
            peer.sent[claimed.sequence] = claimed
            peer.unsent.append(claimed.sequence)
            self._send_next(peer)

    def _send_next(self, peer: _Peer) -> None:
        claimed = peer.sent.get(peer.unsent[0])
        if claimed is not None:
            stamp = _STAMP.pack(peer.generation, claimed.sequence, self._reader.key)
            if not self._try_send(peer, [peer.route, stamp, claimed.header, claimed.payload]):
                return
        peer.unsent.popleft()

    def _try_send(self, peer: _Peer, frames: list[Any]) -> bool:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            return True
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            peer.lost_at = time.monotonic()
            return False

    def _take(self, copy: bool) -> Claimed | None:
        if self._returned:
            return self._returned.popleft()
        try:
            return self._reader.take(copy=copy, local=self.authenticated, lease=True)
        except SegmentError as error:
            self._complain(f"A message was not sent: {error}")
            return None

    def _find_lost(self) -> None:
        """See who is gone, and give the messages of those to others who do not come back."""
        now = time.monotonic()
        if now < self._probe_until and now - self._probed_at > _PROBE_EVERY_S:
            self._probed_at = now
            for peer in self._peers.values():
                if peer.lost_at is None:
                    self._try_send(peer, [peer.route, _PROBE])
        for peer in list(self._peers.values()):
            if peer.lost_at is not None and now - peer.lost_at > _LOST_S:
                self._dismiss(peer)

    def _dismiss(self, peer: _Peer) -> None:
        del self._peers[peer.route]
        self._reader.count_remote(len(self._peers))
        for claimed in peer.sent.values():
            if claimed.lease is not None:
                self._reader.give_back(claimed.lease)
            else:
                self._returned.append(claimed)

    def _hear_of_connections(self) -> None:
        while self._monitor.poll(0):
            event = _event(self._monitor)
            if event == zmq.EVENT_DISCONNECTED:  # of whom, it does not say
                self._probe_until = time.monotonic() + _PROBE_FOR_S
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._complain(f"A program that does not have the keys of this launch was refused at {self._address}.")
            else:
                self._complain(f"A program was refused at {self._address}: it does not speak as consumers here do.")

    def _complain(self, text: str) -> None:
        """Count, and log each text once."""
        self._reader.reject()
        if text not in self._complained and len(self._complained) < 16:
            self._complained.add(text)
            log.warning("%s Later ones are counted silently.", text)


def _event(monitor: zmq.Socket[bytes]) -> int:
    """The next event that ZeroMQ tells of, or 0. (Its own function for this is in a module that imports asyncio.)"""
    event, *address = monitor.recv_multipart()  # no address: Ctrl-C came in the middle, and the event is gone
    return int.from_bytes(event[:2], sys.byteorder) if address else 0


def _limit_silence(socket: zmq.Socket[bytes], patience_s: int) -> None:
    """Have the kernel close connections whose other host is gone."""
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = patience_s // 2
    socket.tcp_keepalive_intvl = patience_s // 8
    socket.tcp_keepalive_cnt = 4
    socket.tcp_maxrt = patience_s * 1000


class _OneKey:
    """The one client key that an authenticator accepts."""

    def __init__(self, client_public: str) -> None:
        self._key = client_public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether `key` (Z85) may connect."""
        return secrets.compare_digest(key, self._key)


# -- the consumer's end -----------------------------------------------------------------------------------------


class TcpSource:
    """Receives whole messages from any number of producers, fairly interleaved.

    Arrays lie in the buffers that ZeroMQ received them in, which malloc uses again.

    Args:
        addresses: ``tcp://`` endpoints to connect to, with the keys of those that have some; they need not exist yet.
        queue_size: messages that may queue up here, per producer.
        count: messages that will be taken in all: towards the end no more are asked for than that, for others wait for them.

    Attributes:
        poller: waits until :meth:`take` may have something. More may be registered.

    Raises:
        ConfigurationError: not an endpoint.
    """

    def __init__(self, addresses: Sequence[Address], *, queue_size: int = 10, count: int = 2**31) -> None:
        self._remaining = count
        self._queue_size = max(1, min(queue_size, _MAX_QUEUE))
        self._pid = os.getpid()
        self._context = zmq.Context(io_threads=min(4, len(addresses)))
        self._context.rcvhwm = 0  # for monitors, as a default: a full one stops ZeroMQ
        self._connections: deque[_Connection] = deque()
        self.poller = zmq.Poller()
        try:
            for address in addresses:
                connection = _Connection(self._context, address, self._queue_size)
                self._connections.append(connection)
                for socket in connection.sockets:
                    self.poller.register(socket, zmq.POLLIN)
        except BaseException as error:
            self._context.destroy(linger=0)
            if not isinstance(error, (zmq.ZMQError, ValueError)):
                raise
            raise ConfigurationError(
                f"{str(address)!r} is not an address: {error}. Expected tcp://ADDRESS:PORT, with an IPv4 address."
            ) from error
        leaving.join(self)

    def take(self) -> Message | None:
        """The next message of the next producer that has sent one, if any."""
        if os.getpid() != self._pid:
            raise StreamClosed("A stream that was opened before a fork cannot be read after it: open it in the child.")
        if not self._connections:
            raise StreamClosed("receive() after close().")
        interrupts.raise_kept()
        connections = self._connections
        room = max(1, min(self._queue_size, -(-self._remaining // max(1, len(connections)))))
        for _ in range(len(connections)):
            connections.rotate(-1)
            message = connections[-1].take(room)
            if message is not None:
                self._remaining -= 1
                return message
        return None

    def receive(self, timeout_s: float) -> Message | None:
        deadline = time.monotonic() + timeout_s
        while True:
            message = self.take()
            if message is not None:
                return message
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return None
            self.poller.poll(int(remaining_s * 1000) + 1)

    def receive_many(self, count: int, timeout_s: float) -> list[Message]:
        first = self.receive(timeout_s)
        return [] if first is None else [first, *self.take_many(count - 1)]

    def take_many(self, count: int) -> list[Message]:
        """Messages that are here, `count` at most."""
        return list(islice(iter(self.take, None), count))

    def finish(self) -> None:
        """Close: the process is about to exit."""
        self.close()

    def segments(self) -> list[Segment]:
        return []

    def explain(self) -> str:
        return "\n".join(connection.explain() for connection in self._connections)

    def close(self) -> None:
        """Give back what was received and not taken."""
        if os.getpid() != self._pid:
            return
        leaving.leave(self)
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self.poller = zmq.Poller()
        self._context.term()


_CONNECTED = "connected"
_REFUSED = (
    "refused: the two ends do not understand each other. Is it blendtorch-shm of the same version that listens there? "
    "Connections from other hosts need the keys in the launch information of the launch that runs there"
)


class _Connection:
    """The connection to one producer."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: Address, queue_size: int) -> None:
        self._address = address
        self._trusted = isinstance(address.keys, ClientKeys)
        self._room = queue_size
        self._refused_at = 0.0
        self._session = secrets.token_bytes(16)
        self._generation = 0
        self._taken: deque[int] = deque(maxlen=queue_size)  # sequence numbers
        self._taken_from = 0  # key of the stream that they are of
        self._kept: deque[list[zmq.Frame]] = deque()  # from a producer that closed, to be taken yet
        self._left: list[list[zmq.Frame]] = []  # from an earlier connection, perhaps to be kept
        self._state = "not reached yet"
        self._is_in_doubt = False
        self._rejected = 0
        self._socket = context.socket(zmq.DEALER)
        self._socket.rcvhwm = 0  # what is on its way is limited by queue_size
        self._socket.linger = 1000
        self._socket.maxmsgsize = _MAX_MESSAGE_NBYTES
        self._socket.reconnect_ivl = 50
        self._socket.reconnect_ivl_max = 1000
        _limit_silence(self._socket, _CONSUMERS_PATIENCE_S)
        if isinstance(address.keys, ClientKeys):
            address.keys.secure(self._socket)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | _ENDS)
        self.sockets = [self._socket, self._monitor]
        if not address.startswith("tcp://") or "[" in address:
            raise ValueError("not a TCP endpoint")
        self._socket.connect(address)

    def take(self, room: int) -> Message | None:
        """The next message, if it is here already.

        Args:
            room: messages that may queue up here.
        """
        self._room = room
        try:
            return self._take()
        except BaseException:  # Ctrl-C, perhaps with a message in hand, or in the middle of its frames
            self._is_in_doubt = True
            raise

    def _take(self) -> Message | None:
        if self._is_in_doubt:
            if not self._state.startswith("refused"):
                self._greet()  # the producer sends again what we do not say that we have taken
            self._is_in_doubt = False
        while True:
            if self._monitor.poll(0):
                self._hear_of_connection()
            if self._refused_at and time.monotonic() - self._refused_at > _GREET_AGAIN_S:
                self._greet()
            is_kept = bool(self._kept)
            frames = self._kept.popleft() if is_kept else self._next()
            if frames is None:
                return None
            try:
                message = self._open(frames, is_kept)
            except WireError as error:
                self._reject(error)
            else:
                if message is not None:
                    return message

    def _next(self) -> list[zmq.Frame] | None:
        """What was received next, if anything was; a message of another generation than the current one is skipped."""
        with contextlib.suppress(zmq.Again):
            while True:
                frames: list[zmq.Frame] = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
                if len(frames) == 1 and self._is_remark(frames[0].bytes):
                    continue
                if not _is_stamped(frames) or _STAMP.unpack(frames[0].buffer)[0] == self._generation:
                    return frames
        return None

    def _is_remark(self, text: bytes) -> bool:
        if text.startswith(_REFUSAL):
            self._refused_at = time.monotonic()
            self._state = text[:200].decode(errors="replace")
        return text in (_PROBE, _END) or text.startswith(_REFUSAL)

    def _open(self, frames: list[zmq.Frame], is_kept: bool) -> Message | None:
        """The message in these frames, now taken; None if it was taken before."""
        if not _is_stamped(frames):
            raise WireError(f"{len(frames)} frames are no message (is it blendtorch-shm that sends?).")
        _, sequence, stream = _STAMP.unpack(frames[0].buffer)
        if stream != self._taken_from:
            self._taken_from = stream
            self._taken.clear()
        if not is_kept:
            self._say(Taken(sequence, self._room))
        if sequence in self._taken:
            return None
        self._taken.append(sequence)
        return decode(frames[1].bytes, np.frombuffer(frames[2].buffer, np.uint8), trusted=self._trusted)

    def explain(self) -> str:
        rejected = f"; {self._rejected} messages were rejected" if self._rejected else ""
        return f"{self._address}: {self._state}{rejected}"

    def close(self) -> None:
        if self._state == _CONNECTED:
            self._say(Bye())
        self._socket.disable_monitor()
        for socket in self.sockets:  # not left to the context: the garbage collector may have taken its list of them
            socket.close()

    def _say(self, what: Hello | Taken | Bye) -> None:
        with contextlib.suppress(zmq.Again):  # not connected: the next greeting says it
            self._socket.send(_encode(what), zmq.NOBLOCK)

    def _hear_of_connection(self) -> None:
        while self._monitor.poll(0):
            event = _event(self._monitor)
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._greet()
            elif event == zmq.EVENT_DISCONNECTED:
                self._state = "the connection was lost" if self._state == _CONNECTED else _REFUSED
                self._keep_what_is_ours()
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._state = (
                    "refused: these are not the keys of the launch that runs there. Load its launch information"
                )
            elif event:
                self._state = _REFUSED

    def _greet(self) -> None:
        self._keep_what_is_ours()
        self._state = _CONNECTED
        self._refused_at = 0.0
        self._generation += 1
        taken = list(self._taken)
        self._say(Hello(VERSION, self._session, self._generation, self._room, self._taken_from, taken))

    def _keep_what_is_ours(self) -> None:
        """Of what an earlier connection left here: if that ended with END, it comes from nowhere else. The rest may."""
        with contextlib.suppress(zmq.Again):
            while True:
                frames: list[zmq.Frame] = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
                if len(frames) == 1 and frames[0].bytes == _END:
                    self._kept.extend(self._left)
                    self._left.clear()
                elif _is_stamped(frames) and _STAMP.unpack(frames[0].buffer)[0] == self._generation:
                    self._left.append(frames)
        self._left.clear()

    def _reject(self, error: WireError) -> None:
        self._rejected += 1
        if self._rejected == 1:
            log.error("A message from %s was dropped (later ones are counted silently): %s", self._address, error)


def _is_stamped(frames: list[zmq.Frame]) -> bool:
    return len(frames) == 3 and len(frames[0]) == _STAMP.size
