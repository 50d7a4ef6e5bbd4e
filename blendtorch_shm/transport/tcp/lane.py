"""The consumer's end of TCP: one connection to one producer. What is said, and when, is in protocol.py."""

from __future__ import annotations

import functools
import logging
import secrets
import time

import zmq

from ...closing import Closable
from ...errors import ConfigurationError, WireError
from ...launch.address import Address, check_endpoint
from ...launch.keys import ClientKeys
from ...memory.ring import Bytes
from ...message.wire import Decoder, Message
from ...stream.lease import Calls
from ...stream.newest import Newest
from .frames import Frames
from .protocol import (
    MAX_POSTS,
    MAX_QUEUE,
    WRONG_KEYS,
    Arrived,
    ConsumerSession,
    ConsumerState,
    Hello,
    NewestSession,
    Said,
    encode,
)
from .sockets import CONNECTION_ENDS, MAX_MESSAGE_NBYTES, limit_silence, monitor, next_event, readable, stop_monitor

log = logging.getLogger("blendtorch.tcp")

_PATIENCE_S = 60
"""The other host is gone when it acknowledges no packet for so long. A consumer drops the connection before the producer does: it
knows then that what it has not taken may go to others.
"""
_LINGER_MS = 1000


class Demand(Closable):
    """What the lanes of one source share: a ZeroMQ context, and how many messages the source will still take. Towards the end its
    lanes ask for no more than that, so that other consumers get theirs.

    Args:
        num_lanes: how many lanes there will be.
        queue_size: messages that may queue up here, per producer.
        count: messages that will be taken in all.

    Attributes:
        context: of the lanes' sockets.
        remaining: messages that will still be taken.
        lanes: how many lanes share this demand.
        is_abandoned: leave the context to the garbage collector.

    Example::

        demand = Demand(len(addresses), count=1000)
        lanes = [TcpLane(address, demand, calls) for address in addresses]
    """

    def __init__(self, num_lanes: int = 1, *, queue_size: int = 10, count: int = 2**31) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=max(1, min(4, num_lanes)))
        self.queue_size = max(1, min(queue_size, MAX_QUEUE))
        self.remaining = count
        self.lanes = 0
        self.is_abandoned = False

    def close(self) -> None:
        """End the context, if no lane is left. What the lanes said last is sent still."""
        if self.lanes == 0 and not self.is_abandoned:
            self.context.term()

    def __repr__(self) -> str:
        return f"<Demand of {self.lanes} lanes, {self.remaining} messages>"

    @property
    def room(self) -> int:
        """Messages that may be on their way to each lane."""
        return max(1, min(self.queue_size, -(-self.remaining // max(1, self.lanes))))


class TcpLane(Closable):
    """One lane of a source: the messages of one producer elsewhere. One thread at a time may use it.

    Arrays lie in the buffers that ZeroMQ received them in, and stay valid after :meth:`close`.

    Args:
        address: ``tcp://`` endpoint to connect to, with its keys if it has some; it need not exist yet.
        demand: shared by all lanes of the source.
        calls: those of the source, in which it notes what it takes.
        newest: as for :class:`~...stream.merge.Source`.

    Attributes:
        sockets: one of them is readable when :meth:`take` may have something, for a ``zmq.Poller``.

    Raises:
        ConfigurationError: not an endpoint.

    Example::

        with TcpLane(Address("tcp://10.0.0.2:11000"), Demand(), Calls()) as lane:
            while (message := lane.take()) is None:
                zmq.select(lane.sockets, [], [])
    """

    def __init__(self, address: Address, demand: Demand, calls: Calls, newest: Newest | None = None) -> None:
        self._address = address
        self._demand = demand
        self._calls = calls
        self._is_trusted = isinstance(address.keys, ClientKeys)
        self._decoder = Decoder(trusted=self._is_trusted)
        session, launch = secrets.token_bytes(16), int(address.launch or "0", 16)
        self._session = (
            ConsumerSession(session, demand.queue_size, launch, has_keys=self._is_trusted)
            if newest is None
            else NewestSession(session, newest, launch, has_keys=self._is_trusted)
        )
        self._frames = Frames()
        self._rejected = 0
        self._is_inside = False  # a call; if the next one finds that, an interrupt cut it short
        self._closed = False
        self.sockets: list[zmq.Socket[bytes]] = []
        try:
            self._socket = demand.context.socket(zmq.DEALER)
            self.sockets.append(self._socket)
            self._socket.rcvhwm = 0  # what is on its way is limited by the room that the session says
            self._socket.linger = _LINGER_MS
            self._socket.maxmsgsize = MAX_MESSAGE_NBYTES
            self._socket.reconnect_ivl = 50
            self._socket.reconnect_ivl_max = 1000
            limit_silence(self._socket, _PATIENCE_S)
            if isinstance(address.keys, ClientKeys):
                address.keys.secure(self._socket)
            self._monitor = monitor(self._socket, zmq.EVENT_HANDSHAKE_SUCCEEDED | CONNECTION_ENDS)
            self.sockets.append(self._monitor)
            self._connect()
        except BaseException:
            for socket in self.sockets:
                socket.close(linger=0)
            raise
        demand.lanes += 1

    def _connect(self) -> None:
        check_endpoint(self._address)
        try:
            self._socket.connect(self._address)
        except zmq.ZMQError as error:
            raise ConfigurationError(f"{str(self._address)!r} is not an address: {error}.") from error

    def take(self) -> Message | None:
        """The next message, if it is here already and can be opened; what cannot is noted, see :class:`~...stream.lease.Calls`.
        What raised in the last call, such as Ctrl-C, cost no message.
        """
        self._frames.free()
        if self._is_inside:
            self._drain()
            self._say(self._session.resume())
        self._is_inside = True
        self._session.room = self._demand.room
        self._listen()
        message = self._open_next()
        self._is_inside = False
        return message

    def take_many(self, count: int) -> list[Message]:
        """The messages that are here already, `count` at most."""
        messages: list[Message] = []
        while len(messages) < count and (message := self.take()) is not None:
            messages.append(message)
        return messages

    def post(self, post: Bytes) -> bool:
        """Send a message back, a :func:`~.protocol.new_post`, if this is a channel's lane. It is kept until the other end has it.

        False: as many as may wait do. Then, and as long as :meth:`has_posts`, call :meth:`serve` until it is taken.
        """
        self.serve()
        if len(self._session.posts) >= MAX_POSTS:
            return False
        self._is_inside = True
        self._session.posts.add(post)
        if self._session.state is ConsumerState.CONNECTED:  # else the greeting is followed by all posts
            self._send(post)
        self._is_inside = False
        return True

    def replace_posts(self, post: Bytes) -> bool:
        """As :meth:`post`, in place of all that were not received. False: one of these is on its way."""
        self.serve()
        if self.has_posts() and self._session.state is ConsumerState.CONNECTED:
            return False
        self._session.posts.forget()
        return self.post(post)

    def has_posts(self) -> bool:
        """Whether something was posted that the other end has not received."""
        return len(self._session.posts) > 0

    def serve(self) -> None:
        """Hear what the other end says, and greet if that is due. Messages that come stay for :meth:`take`."""
        if self._is_inside:
            self._drain()
            self._say(self._session.resume())
        self._is_inside = True
        self._listen()
        while (frames := self._read()) is not None:
            problem = self._session.receive(frames, time.monotonic())
            if problem is not None:
                self._reject(problem.why)
        self._is_inside = False

    def is_closed(self) -> bool:
        """Whether it takes no more, although an interrupt may have cut :meth:`close` short."""
        return self._closed or self._socket.closed

    def is_answered(self) -> bool:
        """Whether anybody has ever answered there, be it with a refusal."""
        return self._session.state is not ConsumerState.UNREACHED

    def explain(self) -> str:
        """The state of the connection in one line, for messages to people."""
        rejected = f"; {self._rejected} messages were rejected" if self._rejected else ""
        return f"{self._address}: {self._session.explain()}{rejected}"

    def close(self) -> None:
        """Take no more: what was received and not taken goes to others."""
        if self._closed:
            return
        if not self._socket.closed:
            self._say(self._session.bye())
            stop_monitor(self._socket)
        for socket in self.sockets:  # not left to the context: the garbage collector may have taken its list of them
            socket.close()
        self._closed = True
        self._frames.close()
        self._demand.lanes -= 1
        self._demand.close()

    def __repr__(self) -> str:
        return f"<TcpLane {self.explain()}{', closed' if self._closed else ''}>"

    # -- between the session and the sockets --------------------------------------------------------------------

    def _open_next(self) -> Message | None:
        while True:
            step = self._session.next()
            if isinstance(step, Arrived):
                try:
                    message = Message(step.sequence, self._decoder.decode(step.header, step.payload))
                except WireError as error:
                    self._accept(step)  # else it would come again, for ever
                    if self._is_trusted:
                        self._rejected += 1
                        self._calls.note_unreadable(self._address, error)
                        return None
                    self._reject(str(error))  # of a stranger, perhaps
                    continue
                self._calls.note(message, functools.partial(self._accept, step))
                self._demand.remaining -= 1
                return message
            if step is not None:
                self._say(step)
            else:
                frames = self._read()
                if frames is None:
                    return None
                problem = self._session.receive(frames, time.monotonic())
                if problem is not None:
                    self._reject(problem.why)

    def _accept(self, arrived: Arrived) -> None:
        self._say(self._session.accept(arrived))

    def _listen(self) -> None:
        """Hear of the connection, and greet if that is due."""
        while readable(self._monitor):
            event = next_event(self._monitor)
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._drain()
                self._say(self._session.connected())
            elif event == zmq.EVENT_DISCONNECTED:
                self._drain()
                self._session.disconnected()
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._session.refused(WRONG_KEYS)
            elif event:
                self._session.refused()
        self._say(self._session.time_passed(time.monotonic()))

    def _drain(self) -> None:
        """Tell the session what else was received. What makes no sense is not counted: it may be the rest of a message of which
        an interrupt cost the beginning.
        """
        while (frames := self._read()) is not None:
            self._session.receive(frames, time.monotonic())

    def _read(self) -> list[bytes | Bytes] | None:
        """The frames of what was received next, the third as an array in ZeroMQ's memory; None if nothing was."""
        try:
            frames: list[bytes | Bytes] = [self._socket.recv(zmq.NOBLOCK)]
        except zmq.Again:
            return None
        while self._socket.getsockopt(zmq.RCVMORE):
            if len(frames) == 2:
                frames.append(self._frames.array(self._socket.recv(copy=False)))
            else:
                frames.append(self._socket.recv())
        return frames

    def _say(self, said: Said | None) -> None:
        if said is None:
            return
        self._send(encode(said))
        if isinstance(said, Hello):
            for post in self._session.posts.waiting():
                self._send(post)

    def _send(self, frame: bytes | Bytes) -> None:
        """Messages of one frame: an interrupt sends the whole of it, or nothing."""
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError:  # not connected: the next greeting says it. Or closed, and it was said
            pass

    def _reject(self, why: str) -> None:
        self._rejected += 1
        if self._rejected == 1:
            log.error("A message from %s was dropped (later ones are counted silently): %s", self._address, why)
