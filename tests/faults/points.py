"""Fault points: the moments at which a test lets a process kill or stop itself, and how they get into the code.

The code under test knows nothing of this. In the processes of a test, and only there, :func:`install` compiles the functions
that the table names once more, with a call of :func:`reach` in front of one line each. So a point is exact (between two stores),
costs nothing where it is not installed, and a line that has changed is an error here that says so.
"""

from __future__ import annotations

import importlib
import inspect
import signal
import textwrap
import threading
from collections.abc import Callable
from typing import Any, NamedTuple


class Point(NamedTuple):
    """One moment in the life of a stream.

    Args:
        name: as people say it.
        roles: who gets there: "producer", "consumer" (shared memory), "remote" (a consumer over TCP).
        function: ``module:qualified.name``.
        before: how the line starts in front of which the moment is.
        which: of how many such lines of the function it is which.
        tcp: whether there has to be a consumer over TCP.
        after: the point at which somebody has to be killed first.
        last: whether it is reached only when the stream ends.
        unreplaced: whether the dead are replaced so late that the living have to take back what they held.
    """

    name: str
    roles: tuple[str, ...]
    function: str
    before: str
    which: tuple[int, int] = (1, 1)
    tcp: bool = False
    after: str = ""
    last: bool = False
    unreplaced: bool = False


def _table() -> list[Point]:
    ours, consumers, remotes, members = ("producer",), ("consumer",), ("remote",), ("consumer", "producer")
    stream, memory = "blendtorch_shm.stream", "blendtorch_shm.memory"
    producer, consumer, source = f"{stream}.producer:Producer", f"{stream}.consumer:Consumer", f"{stream}.merge:Source"
    sleepers, membership = f"{stream}.waiting:Sleepers", f"{stream}.membership:Membership"
    inbox, outbox = f"{stream}.inbox:Inbox", f"{stream}.inbox:Outbox"
    forwarder, lane = (f"blendtorch_shm.transport.tcp.{name}" for name in ("forwarder:TcpForwarder", "lane:TcpLane"))
    protocol = "blendtorch_shm.transport.tcp.protocol"
    control, ring = f"{stream}.control:Control", f"{memory}.ring:Ring"
    commit, publish, wait = f"{ring}.commit", f"{producer}._commit", f"{producer}._wait"
    open_ring, retire, sleep = f"{producer}._open_ring", f"{producer}._retire_rings", f"{source}._sleep"
    return [
        # A producer starts.
        Point("the producer's lock is taken", ours, f"{producer}.__init__", "self._bell = place.open_bell"),
        Point("a segment exists and is empty", ours, f"{memory}.segment:create", "os.posix_fallocate("),
        Point(
            "the control segment is zeroed",
            ours,
            f"{control}.create",
            "control.key = secrets.randbits(64)",
        ),
        Point(
            "the control segment lacks its magic",
            ours,
            f"{control}.create",
            'memory.words[word(layout.STREAM_HEADER, "magic")]',
        ),
        Point("the control segment is made", ours, f"{producer}._adopt_or_create", "control.epoch += 1"),
        Point("an epoch has begun", ours, f"{producer}._adopt_or_create", "control.closed = 0"),
        Point("rings are adopted", ours, f"{producer}._adopt_rings", "self.place.unlink("),
        Point(
            "what is READY is published, loans are not void yet",
            ours,
            f"{producer}._recover",
            "ring.abort_all()",
        ),
        Point(
            "a loan is void, its slot not FREE yet",
            ours,
            f"{ring}.abort",
            "self._move(slot, Event.ABORT)",
            after="the sequence number is stored",
        ),
        Point(
            "all is adopted, nobody has heard of it yet",
            ours,
            "blendtorch_shm.transport:open_sink",
            "sink.forwarder = TcpForwarder(",
            after="the sequence number is stored",
        ),
        # A producer publishes.
        Point("a slot is found, not loaned yet", ours, f"{ring}.loan", "self._move(slot, Event.LOAN)"),
        Point("a slot is loaned", ours, f"{producer}.publish", "for i in in_place:"),
        Point("arrays are being copied", ours, "blendtorch_shm.message.wire:Parts.copy_into", "np.copyto("),
        Point("the header is in the slot", ours, commit, "self.generation[slot] += 1"),
        Point("the generation is stored", ours, commit, "self.sequence[slot] ="),
        Point("the sequence number is stored", ours, commit, "self.owner[slot] ="),
        Point("the record is written, the slot not READY yet", ours, commit, "self._move(slot, Event.COMMIT)"),
        Point("the slot is READY, not published yet", ours, publish, "control.published = sequence + 1"),
        Point("the message is published", ours, publish, "control.last_published_ns ="),
        Point("the message is committed, nobody is told yet", ours, publish, "if self._sleepers.anyone():"),
        Point("a sleeper is to be told", ours, publish, "self._sleepers.tell("),
        Point("the message is out, its call not over yet", ours, f"{producer}.publish", "self._is_in_call = False"),
        # A producer waits.
        Point("the producer is to wait", ours, wait, "control.waiting = wake_below"),
        Point("the producer has said that it waits, not looked yet", ours, wait, "if enough():"),
        Point("the producer waits", ours, wait, "self._bell.wait("),
        Point("the producer has waited, and not said so yet", ours, wait, "control.waiting = 0"),
        # A producer opens a ring and removes one.
        Point("a ring is needed", ours, open_ring, "num_slots = self.num_slots"),
        Point("a ring's memory is there", ours, open_ring, "ring = Ring.format("),
        Point("a ring lacks its magic", ours, f"{ring}.format", 'segment.words[word(layout.RING_HEADER, "magic")]'),
        Point("a ring is made, consumers not told yet", ours, open_ring, "self._control.next_ring ="),
        Point("a ring is open", ours, open_ring, "self._retire_rings()"),
        Point("an old ring is unlinked", ours, retire, "self._rings.remove(ring)"),
        Point("an old ring is removed, consumers not told yet", ours, retire, "self._control.first_ring ="),
        # A producer leaves.
        Point("the producer closes", ours, f"{producer}.close", "self._control.closed = 1", last=True),
        Point("the producer has closed", ours, f"{producer}.close", "self._sleepers.close()", last=True),
        # A consumer joins; a producer's forwarder does, too.
        Point("a pipe is made, not open yet", members, f"{stream}.bell:open_bell", "file = opened(os.open"),
        Point("a consumer has no bell yet", members, f"{consumer}.__init__", "self._bell = place.open_bell"),
        Point("a member's lock is taken", members, f"{membership}._join", "taken_back = self._take_over("),
        Point(
            "a dead member's leases are taken over", members, f"{membership}._join", "self._control.asleep[index] = 0"
        ),
        Point(
            "a consumer has joined",
            members,
            f"{membership}.__init__",
            'control.words[consumer_word(self.index, "pid")]',
        ),
        Point("a consumer has no inbox yet", consumers, f"{inbox}.bind", "self.socket.bind(endpoint)"),
        Point("an inbox is bound", consumers, f"{inbox}.bind", "self._bound.add(endpoint)"),
        # A consumer sleeps.
        Point("a consumer is to sleep", consumers, sleep, "stream.say_asleep(since_ns)"),
        Point("a consumer has said that it sleeps, not looked yet", consumers, sleep, "message = self._take()", (1, 2)),
        Point("a consumer sleeps", consumers, sleep, "heard ="),
        Point("a consumer has slept, and not said so yet", consumers, sleep, "stream.say_asleep(0)", (1, 2)),
        Point("a consumer is awake, its inbox not read yet", consumers, sleep, "if inbox is not None and heard:"),
        Point("a number is read, not used yet", consumers, f"{source}._read_number", "if number is not None:"),
        Point("a consumer is awake, and has not looked yet", consumers, sleep, "message = self._take()", (2, 2)),
        Point("a consumer that was to sleep found a message", consumers, sleep, "stream.say_asleep(0)", (2, 2)),
        Point("what is left is to be passed on", consumers, sleep, "stream.pass_on()"),
        Point("a message that is left is passed on", members, f"{sleepers}.pass_on", "self.tell(ring, slot)"),
        # Somebody tells a sleeper.
        Point("a connection to an inbox is made", members, f"{outbox}._connect", "socket.connect("),
        Point("a number is about to be pushed", members, f"{sleepers}.tell", "if self._outbox.push("),
        Point("a number is pushed", members, f"{sleepers}.tell", "self._told[consumer] ="),
        # A consumer takes a message.
        Point("a slot is locked, not claimed yet", members, f"{ring}.try_claim", "claimed = self.claim("),
        Point("a slot may be claimed", members, f"{ring}.claim", "self.owner[slot] = owner"),
        Point("a claim's owner is stored", members, f"{ring}.claim", "self._states[slot] = _LEASED"),
        Point("a slot is LEASED, still locked", members, f"{ring}.claim", "return True"),
        Point("a slot is claimed and unlocked", members, f"{ring}.try_claim", "return claimed"),
        Point("some slots are locked, none claimed yet", consumers, f"{consumer}._claim_run", "claimed = [slot"),
        Point("some slots are claimed, all still locked", consumers, f"{consumer}._claim_run", "locks.unlock("),
        Point(
            "slots are claimed, the producer not woken yet",
            members,
            f"{consumer}._wake_producer_if_few",
            "wake_below =",
        ),
        Point(
            "the message is not looked at yet",
            members,
            f"{consumer}._open_raw",
            "header, payload_nbytes, generation, sequence, flags =",
        ),
        Point("a lease is made, not registered yet", members, f"{consumer}._open_raw", "self._leases[id(lease)] ="),
        Point(
            "a lease is registered",
            members,
            f"{consumer}._open_raw",
            "return header, payload, sequence, lease",
        ),
        Point(
            "a message is claimed, not handed over yet",
            consumers,
            f"{source}.receive",
            "calls.handed = calls.number",
        ),
        Point(
            "some messages are claimed, not handed over yet",
            consumers,
            f"{source}.receive_many",
            "calls.handed = calls.number",
        ),
        Point("a message is being used", consumers, "actors:_consume", "held.append("),
        # A consumer is done with it.
        Point("a lease ends", members, f"{consumer}.end", "self._release("),
        Point("a slot may be released", members, f"{ring}.release", "self._states[slot] = _FREE"),
        Point("a slot is released, not counted yet", members, f"{consumer}._release", "self._member.released.add(1)"),
        Point(
            "a slot is released, the producer not woken yet",
            members,
            f"{consumer}._release",
            "if self._words[_WAITING] == FOR_A_SLOT:",
        ),
        Point("a lease has ended, and is not forgotten yet", members, f"{consumer}.end", "self._leases.pop("),
        Point("an inbox is to be closed", consumers, f"{inbox}.close", "for endpoint in", last=True),
        Point("a consumer leaves", members, f"{consumer}._leave", "self._member.leave()", last=True),
        Point("a consumer has left", members, f"{consumer}._leave", "self._rings.forget()", last=True),
        # Somebody takes back what a dead consumer held.
        Point(
            "a dead sleeper is to be forgotten", members, f"{sleepers}.forget_dead", "self._asleep[", unreplaced=True
        ),
        Point("a dead owner's slot is locked", members, f"{stream}.reclaim:reclaim", "reclaimed +=", unreplaced=True),
        Point("a slot may be reclaimed", members, f"{ring}.reclaim", "self.flags[slot] |=", unreplaced=True),
        Point(
            "a reclaimed slot is flagged",
            members,
            f"{ring}.reclaim",
            "self._move(slot, Event.RECLAIM)",
            unreplaced=True,
        ),
        Point(
            "a slot is READY again, owner not forgotten yet",
            members,
            f"{ring}.reclaim",
            "self.owner[slot] = 0",
            unreplaced=True,
        ),
        Point("a slot is reclaimed, still locked", members, f"{ring}.reclaim", "return True", unreplaced=True),
        Point(
            "a living consumer has reclaimed, a sleeper is not told yet",
            consumers,
            f"{consumer}.look_after",
            "self.pass_on()",
            unreplaced=True,
        ),
        Point(
            "the producer has reclaimed, a sleeper is not told yet",
            ours,
            f"{producer}._look_after",
            "self._sleepers.pass_on(",
            unreplaced=True,
        ),
        # A message goes over TCP.
        Point("the forwarder has claimed", ours, f"{forwarder}._send", "self._perform(self._session.assign(", tcp=True),
        Point(
            "the forwarder has assigned, not sent yet",
            ours,
            f"{protocol}:ProducerSession.assign",
            "return []",
            tcp=True,
        ),
        Point(
            "the forwarder has sent or given back",
            ours,
            f"{forwarder}._perform",
            "self._consumer.count_remote(",
            tcp=True,
        ),
        Point(
            "the forwarder hears that it was taken", ours, f"{protocol}:ProducerSession._release", "return [", tcp=True
        ),
        Point("the forwarder has heard that it was taken", ours, f"{forwarder}._hear", "self._perform(", tcp=True),
        Point(
            "the forwarder gives back",
            ours,
            f"{forwarder}._perform",
            "self._consumer.give_back(",
            tcp=True,
            after="a message is here, not acknowledged yet",
        ),
        Point(
            "what the forwarder gave back is not passed on yet",
            ours,
            f"{forwarder}._perform",
            "self._consumer.pass_on()",
            tcp=True,
            after="a message is here, not acknowledged yet",
        ),
        Point("a message is here, not acknowledged yet", remotes, f"{lane}._accept", "self._say(", tcp=True),
        Point(
            "a message is acknowledged, not handed over yet",
            remotes,
            f"{lane}._open_next",
            "self._demand.remaining",
            tcp=True,
        ),
        Point("a remote consumer greets", remotes, f"{lane}._listen", "self._say(self._session.connected())", tcp=True),
        Point("a remote consumer says good-bye", remotes, f"{lane}.close", "self._say(", tcp=True, last=True),
    ]


POINTS = _table()
BY_NAME = {point.name: point for point in POINTS}

_armed: dict[str, tuple[int, int]] = {}
_on_fault: Callable[[int], None]


def arm(points: dict[str, tuple[int, int]], on_fault: Callable[[int], None]) -> None:
    """Let this process meet its fate.

    Args:
        points: name -> (at which visit, the signal).
        on_fault: told the number of the point, right before.
    """
    global _on_fault
    _armed.update(points)
    _on_fault = on_fault


def disarm() -> None:
    """Nothing more happens to this process."""
    _armed.clear()


def reach(name: str) -> None:
    """Called at each point of a process in which points are installed."""
    if name not in _armed:
        return
    visits, number = _armed[name]
    if visits > 1:
        _armed[name] = visits - 1, number
        return
    _armed.clear()
    _on_fault(POINTS.index(BY_NAME[name]))
    # To this very thread: another one might be chosen for a SIGSTOP, and this one go on for a moment.
    signal.pthread_kill(threading.get_ident(), number)


def install() -> None:
    """Put all points into this process and those that it forks.

    Raises:
        LookupError: a line that the table names is not there, or not as often as it says.
    """
    functions: dict[str, list[Point]] = {}
    for point in POINTS:
        functions.setdefault(point.function, []).append(point)
    for name, points in functions.items():
        module_name, _, qualified = name.partition(":")
        module = importlib.import_module(module_name)
        function: Any = module
        for part in qualified.split("."):
            function = getattr(function, part)
        function = getattr(function, "__func__", function)
        lines = textwrap.dedent(inspect.getsource(function)).splitlines()
        for point in points:
            found = [i for i, line in enumerate(lines) if line.strip().startswith(point.before)]
            which, count = point.which
            if len(found) != count:
                raise LookupError(
                    f"{name} has {len(found)} lines that start with {point.before!r}, the point {point.name!r} needs {count}."
                )
            at = found[which - 1]
            indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
            lines.insert(at, f"{indent}reach({point.name!r})")
        module.__dict__.setdefault("reach", reach)
        made: dict[str, Any] = {}
        # As the modules themselves are compiled: their annotations are not evaluated.
        flags = annotations.compiler_flag
        code = compile("\n".join(lines), f"<{name} with fault points>", "exec", flags, dont_inherit=True)
        exec(code, module.__dict__, made)
        again = made[function.__name__]
        function.__code__ = getattr(again, "__func__", again).__code__
