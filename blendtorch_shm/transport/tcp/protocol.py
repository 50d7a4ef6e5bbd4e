"""The protocol between a producer and the consumers that do not share its memory, without I/O.

Theory of operation
-------------------
A consumer opens one connection per producer (DEALER to ROUTER). It greets, takes messages, and says which it has taken::

    consumer                                                        producer
    Hello(session, generation, room, taken, launch) ──────────►     knows the session, begins one, or refuses it
                       ◄───────────  stamp, header, payload         at most as many untaken ones as there is room for
    Taken(sequence, room)                          ───────────►     releases the slot of that message
    Room(room)                                     ───────────►     may send more, or less, than was said last
    Bye()                                          ───────────►     gives back what was not taken: it is READY again
                       ◄───────────  END                            closes: what was sent is the consumer's

So a message stays the producer's until a consumer has it. What was on its way to a consumer that died, that closed, or that the
network lost, is delivered again, here or elsewhere.

Nothing is received twice. A consumer greets after each interruption, and counts its greetings: that is the *generation*. Each
message carries the generation in which it was sent. A greeting names what the consumer has taken lately; all else that the
producer sent to it and that is not taken, the producer sends again in the new generation. The consumer drops what was sent in an
earlier generation, unless END followed: then nobody sends it again, and the consumer keeps it. Sequence numbers tell what a
consumer has taken already, even when a producer that was killed is followed by one that goes on with its stream.

A consumer belongs to one launch, and takes nothing of another one that has the same port later. It knows its launch from its
address; or, where somebody typed that by hand, from the first message: the stamp names it. An instance that is started again is
of the same launch. Scripts that no launcher started are of none (0), and may follow each other.

A channel has a way back on the same connection: what a trainer *posts* to an instance::

    trainer                                                         instance
    post: sequence, header, payload                ───────────►     keeps it for the script
                       ◄───────────  RECEIVED, sequence             the script has taken it

A post stays the trainer's until it was received. After each greeting, all that was not is posted again; the instance tells by
session and sequence number what it has already (:class:`Posts`, :class:`Inbound`). What comes before a greeting is not heard. A
post is one frame, so that no interrupt cuts it in two. A channel has one trainer at a time: another one's greeting is refused
while that one is PRESENT, and takes the place of one that is LOST.

A consumer that wants the newest message alone says so when it greets. It has no room while it wants nothing, and room for one
when it does: then the producer sends the newest READY message, and skips those that are older. So nothing grows old on its way.

There is one limit. A consumer may be unable to say that it took a message, because its connection broke or its producer was
killed at that moment. If another consumer asks for that message before the first one is back (:data:`LOST_S`), both get it.

The producer's end: a :class:`Peer` for each consumer
-----------------------------------------------------
=========  ==============  ==============  =========  ==========  ===========  ============  ===========
state      newer Hello     older Hello     Taken      Bye         unreachable  LOST_S later  route reused
=========  ==============  ==============  =========  ==========  ===========  ============  ===========
UNKNOWN    PRESENT         --              --         --          --           --            --
PRESENT    PRESENT, again  --              release    UNKNOWN, b  LOST         --            UNKNOWN, b
LOST       PRESENT, again  --              release    UNKNOWN, b  --           UNKNOWN, b    UNKNOWN, b
=========  ==============  ==============  =========  ==========  ===========  ============  ===========

*again*: release what the greeting says was taken, send the rest again. *b*: give back what was sent and not taken. *--*: nothing
happens. A Hello of another version, of another launch, or one too many, is refused and changes nothing.

The consumer's end: a :class:`ConsumerSession`
----------------------------------------------
=========  ============  ============  =======  ==================  =========
state      handshake     disconnected  refused  GREET_AGAIN_S later  message
=========  ============  ============  =======  ==================  =========
UNREACHED  CONNECTED, g  REFUSED       REFUSED  --                  CONNECTED
CONNECTED  CONNECTED, g  LOST          REFUSED  --                  CONNECTED
LOST       CONNECTED, g  REFUSED       REFUSED  --                  CONNECTED
REFUSED    CONNECTED, g  REFUSED       REFUSED  CONNECTED, g        CONNECTED
=========  ============  ============  =======  ==================  =========

*g*: greet. A connection that ends before its handshake was refused by whoever listens there.

Interrupts (Ctrl-C) may cut any call on a :class:`ConsumerSession` short. Nothing here undoes half a call: each method stores what
matters in one step and may be repeated, and :meth:`ConsumerSession.resume` greets again. (A producer's session lives in a thread,
where no signal's handler runs.)
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from ...errors import WireError
from ...memory.layout import MAX_CONSUMERS, VERSION
from ...memory.ring import Bytes
from ...stream.lease import Claimed

LOST_S = 2.0
"""How long a producer waits for a consumer whose connection closed; then its messages go to others."""
PROBE_FOR_S, PROBE_EVERY_S = 1.0, 0.05
"""After a connection closed, each consumer is sent a probe, so often and for so long: sending fails where it was whose it was."""
GREET_AGAIN_S = 5.0
"""A consumer that was refused asks again after so long."""
MAX_QUEUE = 1024
"""Most messages on their way to one consumer."""

_REMEMBERED = 16
"""Of so many messages that it has taken, a consumer that wants the newest tells a producer that it greets again."""

STAMP = struct.Struct("<QQQQ")
"""First frame of each message: the generation that it was sent in, its sequence number, the key of its stream, and its launch."""
PROBE = b""
"""A producer's question whether a consumer's connection still exists; ZeroMQ answers it. Consumers ignore it."""
END = b"end"
"""The producer's last word to a consumer: it closed."""
REFUSAL = b"refused: "
"""What a refusal begins with; the reason follows."""
RECEIVED = b"received"
"""What begins a remark that a post was received; its sequence number follows."""
SEQUENCE = struct.Struct("<Q")
_POST = b"post"
_POST_HEAD = struct.Struct("<4sIQ")
"""What begins a post: these four letters, the size of its header in bytes, and its sequence number. The header follows, then the
payload. No greeting begins with the letters, for MessagePack takes them for a number.
"""
MAX_POSTS = 10
"""Most posts of one trainer that were not received."""


# -- what a consumer says ---------------------------------------------------------------------------------------


class Hello(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The first message of each connection.

    Attributes:
        version: of the wire format.
        session: random, the consumer's for as long as it lives.
        generation: counts the greetings of the session.
        room: messages that may be on their way, or wait at the consumer.
        stream: key of the stream that it has taken messages of; 0 for none.
        taken: sequence numbers of those taken last.
        launch: that it belongs to; 0: to none (yet).
        newest: it wants the newest message alone.
    """

    version: int
    session: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    generation: Annotated[int, msgspec.Meta(ge=0)]
    room: Annotated[int, msgspec.Meta(ge=0)]
    stream: int
    taken: list[int]
    launch: int
    newest: bool = False


class Taken(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The consumer has taken a message.

    Attributes:
        sequence: its number.
        room: see :class:`Hello`; it may change.
    """

    sequence: int
    room: Annotated[int, msgspec.Meta(ge=0)]


class Room(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The consumer has room for so many messages now.

    Attributes:
        room: see :class:`Hello`.
    """

    room: Annotated[int, msgspec.Meta(ge=0)]


class Bye(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """The consumer takes no more."""


Said = Hello | Taken | Room | Bye


class _AnyHello(msgspec.Struct, array_like=True, frozen=True, tag="Hello"):
    """A greeting of whatever version: they have this much in common. The session tells it from noise, which gets no answer."""

    version: int
    session: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


encode = msgspec.msgpack.Encoder().encode
"""What a consumer says, as bytes."""
_decoder = msgspec.msgpack.Decoder(Said)
_any_hello_decoder = msgspec.msgpack.Decoder(_AnyHello)


def parse(frames: Sequence[bytes]) -> Said | _AnyHello:
    """What a consumer said. A greeting of another version is an ``_AnyHello``.

    Raises:
        WireError: it is nothing that a consumer says.
    """
    if len(frames) != 1:
        raise WireError(f"it sent {len(frames)} frames")
    try:
        said: Said | _AnyHello = _decoder.decode(frames[0])
    except Exception as error:  # whatever a stranger may say
        try:
            said = _any_hello_decoder.decode(frames[0])
        except Exception:
            raise WireError(str(error)) from error
        if said.version == VERSION:
            raise WireError(str(error)) from error
    return said


# -- the producer's end -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """Send `message` to `route` behind the frame `stamp`. If that route is gone, tell :meth:`ProducerSession.unreachable`."""

    route: bytes
    stamp: bytes
    message: Claimed


@dataclass(frozen=True)
class Tell:
    """Send one frame, a :data:`PROBE`, :data:`END` or :data:`REFUSAL`, to `route`. If that is gone: as for :class:`Send`."""

    route: bytes
    remark: bytes


@dataclass(frozen=True)
class Reject:
    """Something that was received makes no sense; count it."""

    why: str


@dataclass(frozen=True)
class Release:
    """A consumer has taken `message`: its slot is FREE."""

    message: Claimed


@dataclass(frozen=True)
class GiveBack:
    """`message` was sent and not taken: it is READY again."""

    message: Claimed


@dataclass
class Peer:
    """A consumer that has greeted."""

    session: bytes
    route: bytes
    generation: int
    room: int
    sent: dict[int, Claimed] = field(default_factory=dict)
    """By sequence number, in the order they were sent: what it has not taken yet."""
    must_send_again: bool = False
    """It greeted: all of `sent` is to be sent in this generation."""
    newest: bool = False
    """It wants the newest message alone."""
    lost_at: float | None = None
    """When its route was found gone: it is LOST, not PRESENT."""


@dataclass(frozen=True)
class Deliver:
    """A trainer has posted a message."""

    session: bytes
    sequence: int
    header: bytes
    payload: memoryview


Action = Send | Tell | Reject | Release | GiveBack | Deliver


class ProducerSession:
    """All consumers of one producer.

    Each method is an event. It returns the actions that the caller performs, in their order.

    Args:
        stream: key of the producer's stream.
        launch: that it belongs to; 0: to none.
        is_channel: whether consumers may post, too. Then there is one at a time.
        is_taken: whether a trainer that shares the producer's memory is that one; asked when another one greets.
    """

    def __init__(
        self, stream: int, launch: int = 0, *, is_channel: bool = False, is_taken: Callable[[], bool] = lambda: False
    ) -> None:
        self._stream = stream
        self._launch = launch
        self._is_channel = is_channel
        self._is_taken = is_taken
        self._peers: dict[bytes, Peer] = {}  # by route; who waits longest for a message is first
        self._probe_until = self._probed_at = 0.0

    @property
    def peers(self) -> Sequence[Peer]:
        """The consumers that have greeted and not left, also those that are lost and may come back."""
        return list(self._peers.values())

    # -- what consumers say

    def hear(self, route: bytes, frames: Sequence[bytes]) -> list[Action]:
        """A message came from the connection `route`."""
        if self._is_channel and len(frames) == 1 and frames[0].startswith(_POST):
            peer = self._peers.get(route)  # None: it is posted again after the greeting
            return [] if peer is None else [_open_post(peer.session, frames[0])]
        try:
            said = parse(frames)
        except WireError as error:
            return [Reject(str(error))]
        if isinstance(said, _AnyHello) or (isinstance(said, Hello) and said.version != VERSION):
            why = (
                f"the consumer speaks version {said.version} of the wire format, the producer version {VERSION}: "
                f"use the same version of blendtorch-shm on both sides"
            )
            return self._refuse(route, why)
        if isinstance(said, Hello):
            return self._hear_hello(route, said)
        peer = self._peers.get(route)
        if peer is None:
            return []  # said to an earlier connection; the greeting that follows says it again
        if isinstance(said, Taken):
            peer.room = min(said.room, MAX_QUEUE)
            return self._release(peer, [said.sequence])
        if isinstance(said, Room):
            peer.room = min(said.room, MAX_QUEUE)
            return []
        return self._dismiss(peer)

    def _refuse(self, route: bytes, why: str) -> list[Action]:
        return [Tell(route, REFUSAL + why.encode()), Reject(why)]

    def _hear_hello(self, route: bytes, hello: Hello) -> list[Action]:
        peer = next((peer for peer in self._peers.values() if peer.session == hello.session), None)
        if peer is not None and hello.generation <= peer.generation:
            return []  # of an earlier connection, overtaken
        if hello.launch not in (0, self._launch):
            why = (
                f"{_name(self._launch)} is there now, and this reader belongs to {_name(hello.launch)}. "
                f"Read from the new one with its own addresses, in a new dataset"
            )
            return self._refuse(route, why)
        actions: list[Action] = []
        if peer is None and self._is_channel:
            if self._is_taken() or any(other.lost_at is None for other in self._peers.values()):
                return self._refuse(route, f"{ANOTHER_TRAINER}. This one may connect when that one closes")
            actions += self._dismiss_lost(float("inf"))
        if peer is None and len(self._peers) >= MAX_CONSUMERS:
            return self._refuse(route, f"there are {MAX_CONSUMERS} consumers already")
        if peer is None:
            peer = Peer(hello.session, route, hello.generation, 0)
        else:
            del self._peers[peer.route]
        if route in self._peers:  # another session of the same connection, which none of our consumers would begin
            actions += self._dismiss(self._peers[route])
        self._peers[route] = peer
        peer.route, peer.generation, peer.room = route, hello.generation, min(hello.room, MAX_QUEUE)
        peer.newest, peer.lost_at = hello.newest, None
        if hello.stream == self._stream:
            actions += self._release(peer, hello.taken)
        peer.must_send_again = True
        return actions

    def say_received(self, session: bytes, sequence: int) -> list[Action]:
        """The script has taken what a trainer posted. If that cannot be told now, it posts again, and is told then."""
        remark = RECEIVED + SEQUENCE.pack(sequence)
        return [Tell(peer.route, remark) for peer in self._peers.values() if peer.session == session]

    # -- messages for them

    def send_again(self) -> list[Action]:
        """There is time to send: what those who greeted since have not taken. Before anything new."""
        actions: list[Action] = []
        for peer in self._peers.values():
            if peer.must_send_again and peer.lost_at is None:
                peer.must_send_again = False
                actions += [self._send(peer, message) for message in peer.sent.values()]
        return actions

    def hungriest(self, share: int) -> Peer | None:
        """Who gets the next message: of those that are present and have room, the one with the fewest messages on their way; of
        equals, the one that has waited longest.

        Args:
            share: messages that one consumer may hold.
        """
        with_room = [
            peer for peer in self._peers.values() if peer.lost_at is None and len(peer.sent) < min(peer.room, share)
        ]
        return min(with_room, key=lambda peer: len(peer.sent), default=None)

    def assign(self, peer: Peer, message: Claimed) -> list[Action]:
        """The producer has a message for the :meth:`hungriest`."""
        self._peers[peer.route] = self._peers.pop(peer.route)  # it has waited longest no more
        peer.sent[message.sequence] = message
        return [] if peer.must_send_again else [self._send(peer, message)]

    def _send(self, peer: Peer, message: Claimed) -> Send:
        return Send(peer.route, STAMP.pack(peer.generation, message.sequence, self._stream, self._launch), message)

    # -- who is gone

    def connection_ended(self, now: float) -> None:
        """A connection ended; ZeroMQ does not say whose it was."""
        self._probe_until = now + PROBE_FOR_S

    def unreachable(self, route: bytes, now: float) -> None:
        """Something could not be sent: this route is gone."""
        peer = self._peers.get(route)
        if peer is not None and peer.lost_at is None:
            peer.lost_at = now

    def time_passed(self, now: float) -> list[Action]:
        """Look for those who are gone, and give the messages of those to others who did not come back."""
        actions = self._dismiss_lost(now - LOST_S)
        if now < self._probe_until and now - self._probed_at > PROBE_EVERY_S:
            self._probed_at = now
            actions += self._tell_all(PROBE)
        return actions

    def end(self) -> list[Action]:
        """The producer closes. After these actions, :meth:`dismiss_unreachable`."""
        return [*self.send_again(), *self._tell_all(END)]

    def dismiss_unreachable(self) -> list[Action]:
        """The producer has closed: whoever could not be told gets nothing more. What the others were sent is theirs."""
        return self._dismiss_lost(float("inf"))

    def _tell_all(self, remark: bytes) -> list[Action]:
        return [Tell(peer.route, remark) for peer in self._peers.values() if peer.lost_at is None]

    def _dismiss_lost(self, before: float) -> list[Action]:
        lost = [peer for peer in self._peers.values() if peer.lost_at is not None and peer.lost_at < before]
        return [action for peer in lost for action in self._dismiss(peer)]

    def _dismiss(self, peer: Peer) -> list[Action]:
        del self._peers[peer.route]
        return [GiveBack(message) for message in peer.sent.values()]

    def _release(self, peer: Peer, sequences: Sequence[int]) -> list[Action]:
        return [Release(peer.sent.pop(sequence)) for sequence in sequences if sequence in peer.sent]


class Inbound:
    """What was posted to an instance: tells what is new from what was posted again. Each session's posts come in order."""

    def __init__(self) -> None:
        self._newest: dict[bytes, int] = {}
        self._received: dict[bytes, int] = {}

    def is_new(self, post: Deliver) -> bool:
        """Whether this has not come before. It has from now on."""
        if post.sequence <= self._newest.get(post.session, -1):
            return False
        self._newest[post.session] = post.sequence
        return True

    def received(self, session: bytes, sequence: int) -> None:
        """The script has taken it."""
        self._received[session] = sequence

    def was_received(self, post: Deliver) -> bool:
        """Whether the script has taken it: then its trainer has not heard that."""
        return post.sequence <= self._received.get(post.session, -1)


def new_post(header: bytes, nbytes: int) -> tuple[Bytes, Bytes]:
    """A post for :meth:`Posts.add`, and the part of it that `nbytes` of payload are to be written to."""
    start = _POST_HEAD.size + len(header)
    post = np.empty(start + nbytes, np.uint8)
    _POST_HEAD.pack_into(post, 0, _POST, len(header), 0)
    post[_POST_HEAD.size : start] = np.frombuffer(header, np.uint8)
    return post, post[start:]


def _open_post(session: bytes, post: bytes) -> Deliver | Reject:
    if len(post) < _POST_HEAD.size:
        return Reject("a post is too short")
    _, header_nbytes, sequence = _POST_HEAD.unpack_from(post)
    start = _POST_HEAD.size + header_nbytes
    if len(post) < start:
        return Reject(f"a post of {len(post)} bytes says that its header alone has {header_nbytes}")
    return Deliver(session, sequence, post[_POST_HEAD.size : start], memoryview(post)[start:])


class Posts:
    """What a trainer has posted, and does not know to be received.

    Each is kept until it is: the instance may be started again meanwhile.
    """

    def __init__(self) -> None:
        self._next = 0
        self._waiting: dict[int, Bytes] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, post: Bytes) -> None:
        """Keep a :func:`new_post` until it is received. It gets a sequence number."""
        sequence, self._next = self._next, self._next + 1
        SEQUENCE.pack_into(post, _POST_HEAD.size - SEQUENCE.size, sequence)
        self._waiting[sequence] = post

    def received(self, sequence: int) -> None:
        """It was; or it makes no sense, and does no harm."""
        self._waiting.pop(sequence, None)

    def forget(self) -> None:
        """Post none of them again."""
        self._waiting.clear()

    def waiting(self) -> list[Bytes]:
        """All of them, the oldest first."""
        return list(self._waiting.values())


def _name(launch: int) -> str:
    return f"launch {launch:08x}" if launch else "a script that no launcher started"


# -- the consumer's end -----------------------------------------------------------------------------------------


class ConsumerState(enum.Enum):
    """What a consumer knows of its producer; the value is what it says to people."""

    UNREACHED = "not reached yet"
    CONNECTED = "connected"
    LOST = "the connection was lost"
    REFUSED = "refused"


NOT_UNDERSTOOD = (
    "the two ends do not understand each other. Is it blendtorch-shm of the same version that listens there? The instances of a "
    "launch serve those who have its keys: take the addresses from launch_info, or from LaunchInfo.load_json of its file. An "
    "address that was typed by hand, tcp://ADDRESS:PORT, will do for the user who launched, on the same host, in a dataset "
    "that is made while the launch runs"
)
ANOTHER_TRAINER = "another trainer is connected to this channel, which has two ends"
NOT_OF_THIS_LAUNCH = (
    "what listens there now does not have the keys of this launch: another launch, or another program, has that port. Read from "
    "the launch that runs now, with its own addresses: from launch_info, or from LaunchInfo.load_json of its file"
)
WRONG_KEYS = "these are not the keys of the launch that runs there. Load its launch information"


class Arrived(NamedTuple):
    """A message that was received. Decode it, then :meth:`~ConsumerSession.accept` it, even if it made no sense."""

    generation: int
    sequence: int
    stream: int
    header: bytes
    payload: Bytes


class ConsumerSession:
    """One consumer's dealings with one producer.

    What a method returns beside messages is to be said to the producer. If that is not connected, nothing is lost: the next
    greeting says it.

    Args:
        session: 16 random bytes.
        room: messages that may be on their way, or wait here.
        launch: that it belongs to; 0: that of the first message.
        has_keys: whether it knows the keys of that launch.

    Attributes:
        room: may be changed; the next :class:`Taken` or :class:`Hello` says it.
        state: what is known of the producer.
        posts: what was posted to it, if this is a channel, and not received yet. After each :class:`Hello`, it is posted again.
    """

    _wants_newest = False

    def __init__(self, session: bytes, room: int, launch: int = 0, *, has_keys: bool = False) -> None:
        self.room = room
        self._launch = launch
        self._no_handshake = NOT_OF_THIS_LAUNCH if has_keys else NOT_UNDERSTOOD
        self.state = ConsumerState.UNREACHED
        self._why_refused = ""
        self._refused_at: float | None = None  # by the producer itself, on a connection that still exists
        self._session = session
        self._generation = 0
        self._ended_generation = -1  # what was sent up to this one is ours: END followed
        self._arrived: deque[Arrived] = deque()
        self._taken: deque[int] = deque(maxlen=room)  # sequence numbers
        self._taken_from = 0  # key of the stream that they are of
        self.posts = Posts()

    def explain(self) -> str:
        """What is known of the producer, for people."""
        return f"refused: {self._why_refused}" if self.state is ConsumerState.REFUSED else self.state.value

    # -- the connection. Before each of these events, everything that was received must have been told.

    def connected(self) -> Hello:
        """The connection is made."""
        self._drop()
        return self._greet_anew()

    def disconnected(self) -> None:
        """The connection has ended, or came to nothing."""
        self._refused_at = None  # the next connection begins with a greeting anyway
        if not self._why_refused:
            self._why_refused = self._no_handshake
        self.state = ConsumerState.LOST if self.state is ConsumerState.CONNECTED else ConsumerState.REFUSED
        self._drop()

    def refused(self, why: str = "") -> None:
        """There was no connection, because of `why`, or because the two ends do not understand each other."""
        self._why_refused = why or self._no_handshake
        self.state = ConsumerState.REFUSED

    def time_passed(self, now: float) -> Hello | None:
        """Greet again, if the producer refused some time ago."""
        if self._refused_at is None or now - self._refused_at <= GREET_AGAIN_S:
            return None
        return self._greet_anew()

    def resume(self) -> Hello:
        """An interrupt cut a call short, with a message in hand perhaps, or in the middle of its frames: greet again. The
        producer sends again what is not said to be taken. Until it does, what is here is not dropped: END may follow.
        """
        return self._greet()

    def bye(self) -> Bye | None:
        """The consumer closes."""
        return Bye() if self.state is ConsumerState.CONNECTED else None

    def _greet_anew(self) -> Hello:
        self._why_refused = ""
        self.state = ConsumerState.CONNECTED
        return self._greet()

    def _greet(self) -> Hello:
        self._generation += 1
        self._refused_at = None
        return Hello(
            VERSION,
            self._session,
            self._generation,
            self.room,
            self._taken_from,
            list(self._taken),
            self._launch,
            self._wants_newest,
        )

    # -- messages

    def receive(self, frames: Sequence[bytes | Bytes], now: float) -> Reject | None:
        """Something came: a remark of one frame, or a message of three, the last of which is an array."""
        first = frames[0]
        if len(frames) == 1 and isinstance(first, bytes):
            return self._hear(first, now)
        if len(frames) != 3 or len(first) != STAMP.size:
            return Reject(f"{len(frames)} frames are no message (is it blendtorch-shm that sends?).")
        _, header, payload = frames
        assert isinstance(header, bytes)
        assert not isinstance(payload, bytes)
        generation, sequence, stream, launch = STAMP.unpack(first)
        if launch != (self._launch or launch):
            return Reject(f"It is of {_name(launch)}, and this reader belongs to {_name(self._launch)}.")
        arrived = Arrived(generation, sequence, stream, header, payload)
        if self._ended_generation < arrived.generation <= self._generation:
            self._launch = launch
            if self._arrived and self._arrived[-1].generation < arrived.generation:
                self._drop()  # the producer has heard a newer greeting, and sends those again
            if arrived.generation == self._generation:
                self.state = ConsumerState.CONNECTED
            self._arrived.append(arrived)
        return None

    def _hear(self, remark: bytes, now: float) -> Reject | None:
        if remark == END:
            if self._arrived:
                self._ended_generation = self._arrived[-1].generation
        elif remark.startswith(RECEIVED) and len(remark) == len(RECEIVED) + SEQUENCE.size:
            self.posts.received(*SEQUENCE.unpack(remark[len(RECEIVED) :]))
        elif remark.startswith(REFUSAL):
            self._refused_at = now
            self.refused(remark[len(REFUSAL) : 200].decode(errors="replace"))
        elif remark != PROBE:
            return Reject("1 frame is no message (is it blendtorch-shm that sends?).")
        return None

    def next(self) -> Arrived | Taken | Room | None:
        """The next message that may be taken; what to say first, if it was taken before; None if there is none."""
        while self._arrived:
            arrived = self._arrived[0]
            if not self._is_ours(arrived) and arrived.generation != self._generation:
                return None
            if arrived.stream != self._taken_from or arrived.sequence not in self._taken:
                return arrived
            say = self.accept(arrived)  # again: the producer cannot know
            if say is not None:
                return say
        return None

    def accept(self, arrived: Arrived) -> Taken | None:
        """The consumer has taken this message, or has seen that it makes no sense. Saying so twice does no harm."""
        if arrived.stream != self._taken_from:
            self._taken, self._taken_from = deque(maxlen=self._taken.maxlen), arrived.stream
        if arrived.sequence not in self._taken:
            self._taken.append(arrived.sequence)
        if self._arrived and self._arrived[0] is arrived:
            self._arrived.popleft()
        return None if self._is_ours(arrived) else Taken(arrived.sequence, self.room)

    def _is_ours(self, arrived: Arrived) -> bool:
        """Whether nobody sends it again: its producer has closed."""
        return arrived.generation <= self._ended_generation

    def _drop(self) -> None:
        """Of what an earlier connection left here, keep what is ours. The producer sends the rest again."""
        self._arrived = deque(arrived for arrived in self._arrived if self._is_ours(arrived))


class NewestSession(ConsumerSession):
    """Of a consumer that wants the newest message alone. It asks for one when it is wanted, and not before.

    Args:
        session, launch, has_keys: as for :class:`ConsumerSession`.
        newest: what its reader was given last, by key of the stream.
    """

    _wants_newest = True

    def __init__(self, session: bytes, newest: dict[int, int], launch: int = 0, *, has_keys: bool = False) -> None:
        self._newest = newest
        self._asks = False
        super().__init__(session, _REMEMBERED, launch, has_keys=has_keys)

    @property
    def room(self) -> int:
        """1 while it asks."""
        return int(self._asks)

    @room.setter
    def room(self, room: int) -> None:
        pass  # whatever others would have room for

    def next(self) -> Arrived | Taken | Room | None:
        """The next message that may be taken; what to say first; None if none is here, and it was asked for."""
        step = super().next()
        if isinstance(step, Arrived) and step.sequence <= self._newest.get(step.stream, -1):
            return self.accept(step) or self.next()  # somebody else had it, and gave it back
        if step is None and not self._asks and not self._arrived:
            self._asks = True
            return Room(1)
        return step

    def accept(self, arrived: Arrived) -> Taken | None:
        """As for every consumer; and it asks no more."""
        self._asks = False
        taken = super().accept(arrived)
        self._newest[arrived.stream] = max(arrived.sequence, self._newest.get(arrived.stream, -1))
        return taken
