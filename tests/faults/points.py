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
        before: how the line starts in front of which the moment is; the only such line of the function.
        tcp: whether there has to be a consumer over TCP.
        after: the point at which somebody has to be killed first.
        last: whether it is reached only when the stream ends.
    """

    name: str
    roles: tuple[str, ...]
    function: str
    before: str
    tcp: bool = False
    after: str = ""
    last: bool = False


def _table() -> list[Point]:
    producer, consumer, remote, both = ("producer",), ("consumer",), ("remote",), ("consumer", "producer")
    writer, reader, sink, stream = (f"blendtorch_shm.stream.{name}" for name in ("writer", "reader", "sink", "control"))
    ring, segment = (f"blendtorch_shm.memory.{name}" for name in ("ring", "segment"))
    wire, tcp = "blendtorch_shm.message.wire", "blendtorch_shm.transport.tcp"
    publish, commit, open_ring = f"{sink}:RingSink._publish", f"{ring}:Ring.commit", f"{writer}:Writer._open_ring"
    create, retire = f"{writer}:Writer._create_or_adopt", f"{writer}:Writer._retire_rings"
    claim, take, opens = (f"{reader}:Reader.{name}" for name in ("_claim", "_take", "_open"))
    return [
        # A producer starts.
        Point("the producer's lock is taken", producer, f"{writer}:Writer.__init__", "self._bell = place.open_bell"),
        Point("a segment exists and is empty", producer, f"{segment}:create", "os.posix_fallocate("),
        Point("the control segment is zeroed", producer, create, "control.words[KEY] ="),
        Point(
            "the control segment lacks its magic",
            producer,
            create,
            'control.words[word(layout.STREAM_HEADER, "magic")]',
        ),
        Point("the control segment is made", producer, create, "control.words[EPOCH] += 1"),
        Point("rings are adopted, loans are not void yet", producer, f"{writer}:Writer.recover", "ring.abort_all()"),
        Point(
            "a loan is void, its slot not free yet",
            producer,
            f"{ring}:Ring.abort",
            "self._move(slot, Event.ABORT)",
            after="the sequence number is stored",
        ),
        Point(
            "all is adopted, nobody has heard of it yet",
            producer,
            "blendtorch_shm.transport:open_sink",
            "forwarder = TcpForwarder(",
            after="the sequence number is stored",
        ),
        # A producer publishes.
        Point("a slot is found, not loaned yet", producer, f"{ring}:Ring.loan", "self._move(slot, Event.LOAN)"),
        Point("a slot is loaned", producer, publish, "for i in lent:"),
        Point("arrays are being copied", producer, f"{wire}:copy_arrays", "np.copyto("),
        Point("the header is in the slot", producer, commit, "generation = self._generation[slot] + 1"),
        Point("the generation is stored", producer, commit, "self._sequence[slot] ="),
        Point("the sequence number is stored", producer, commit, "self._owner[slot] ="),
        Point("the record is written, the slot not READY yet", producer, commit, "self._move(slot, Event.COMMIT)"),
        Point("the slot is READY, not published yet", producer, f"{writer}:Writer.commit", "words[PUBLISHED] ="),
        Point("the message is published", producer, f"{writer}:Writer.commit", "words[LAST_NS] ="),
        Point("the message is committed, nobody is woken yet", producer, publish, "writer.wake_a_consumer("),
        Point("the producer waits", producer, f"{writer}:Writer._wait", "self._bell.wait("),
        # A producer opens a ring and removes one.
        Point("a ring is needed", producer, open_ring, "num_slots = self.num_slots"),
        Point("a ring's memory is there", producer, open_ring, "self._rings.append("),
        Point(
            "a ring lacks its magic",
            producer,
            f"{ring}:Ring.format",
            'segment.words[word(layout.RING_HEADER, "magic")]',
        ),
        Point("a ring is made, consumers not told yet", producer, open_ring, "self._words[NEXT_RING] ="),
        Point("a ring is open", producer, open_ring, "self._retire_rings()"),
        Point("an old ring is unlinked", producer, retire, "self._rings.remove(ring)"),
        Point("an old ring is removed, consumers not told yet", producer, retire, "self._words[FIRST_RING] ="),
        # A producer leaves.
        Point("the producer closes", producer, f"{writer}:Writer.close", "self._words[CLOSED] = 1", last=True),
        Point(
            "the producer has closed",
            producer,
            f"{writer}:Writer.close",
            "self._locks.unlock(PRODUCER_LOCK)",
            last=True,
        ),
        # A consumer joins; a producer's forwarder does, too.
        Point("a member's lock is taken", both, f"{reader}:Reader._join", "if self._take_over("),
        Point("a pipe is made, not open yet", both, "blendtorch_shm.stream.bell:open_bell", "fd = os.open("),
        Point("a member has no bell yet", both, f"{reader}:Reader.__init__", "self.bell = place.open_bell"),
        Point(
            "a dead member's leases are taken over", both, f"{reader}:Reader._join", "self.sleepers.say(index, False)"
        ),
        Point(
            "a consumer has joined", both, f"{reader}:Reader.__init__", 'self._words[consumer_word(self._index, "pid")]'
        ),
        # A consumer takes a message.
        Point("a consumer sleeps", consumer, "blendtorch_shm.stream.source:RingSource._take_or_sleep", "heard ="),
        Point("a slot is locked, not claimed yet", both, claim, "generation = ring.generation("),
        Point("a slot may be claimed", both, f"{ring}:Ring.claim", "self._owner[slot] = owner"),
        Point("a claim's owner is stored", both, f"{ring}:Ring.claim", "self._move(slot, Event.CLAIM)"),
        Point("a slot is LEASED, still locked", both, f"{ring}:Ring.claim", "return True"),
        Point("one of some slots is claimed, the next one not yet", both, claim, "claims.append("),
        Point("slots are claimed, the producer not woken yet", both, take, "wake_below ="),
        Point("a slot is claimed and unlocked", both, opens, "header, payload_nbytes, flags ="),
        Point("a lease is made, not registered yet", both, opens, "self._leases[id(lease)] ="),
        Point("a lease is registered", both, opens, "if flags & FLAG_AGAIN:"),
        Point("a message is being used", consumer, "actors:_consume", "held.append("),
        # A consumer is done with it.
        Point("a lease ends", both, f"{reader}:Reader.end", "_, ring, slot, generation = lease.terms"),
        Point("a slot may be released", both, f"{ring}:Ring.release", "self._move(slot, Event.RELEASE)"),
        Point("a slot is released", both, f"{reader}:Reader._release", "self._released.add(1)"),
        Point("a consumer leaves", both, f"{reader}:Reader._leave", "self._locks.unlock(", last=True),
        # Somebody takes back what a dead consumer held.
        Point("a dead owner's slot is locked", both, f"{stream}:reclaim", "reclaimed +="),
        Point("a slot may be reclaimed", both, f"{ring}:Ring.reclaim", "self._flags[slot] |="),
        Point("a reclaimed slot is flagged", both, f"{ring}:Ring.reclaim", "self._move(slot, Event.RECLAIM)"),
        Point(
            "a slot is READY again, owner not forgotten yet",
            both,
            f"{ring}:Ring.reclaim",
            "self._owner[slot] = 0",
        ),
        Point("a slot is reclaimed, still locked", both, f"{ring}:Ring.reclaim", "return True"),
        # A message goes over TCP.
        Point("the forwarder has claimed", producer, f"{tcp}:TcpForwarder._send", "self._peers[peer.route] = ", True),
        Point("the forwarder has sent", producer, f"{tcp}:TcpForwarder._send_next", "peer.unsent.popleft()", True),
        Point(
            "the forwarder hears that it was taken",
            producer,
            f"{tcp}:TcpForwarder._hear",
            "return peer.sent.pop(",
            True,
        ),
        Point(
            "the forwarder gives back",
            producer,
            f"{tcp}:TcpForwarder._dismiss",
            "self._reader.give_back(",
            tcp=True,
            after="a message is here, not acknowledged yet",
        ),
        Point("a message is here, not acknowledged yet", remote, f"{tcp}:_Connection._open", "if not is_kept", True),
        Point("a remote consumer greets", remote, f"{tcp}:_Connection._greet", "self._say(Hello(", True),
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
        LookupError: a line that the table names is not there, or is there twice.
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
        lines = textwrap.dedent(inspect.getsource(function)).splitlines()
        for point in points:
            found = [i for i, line in enumerate(lines) if line.strip().startswith(point.before)]
            if len(found) != 1:
                raise LookupError(
                    f"{name} has {len(found)} lines that start with {point.before!r}, the point {point.name!r} needs one."
                )
            line = lines[found[0]]
            indent = line[: len(line) - len(line.lstrip())]
            lines.insert(found[0], f"{indent}reach({point.name!r})")
        module.__dict__.setdefault("reach", reach)
        made: dict[str, Any] = {}
        # As the modules themselves are compiled: their annotations are not evaluated.
        flags = annotations.compiler_flag
        code = compile("\n".join(lines), f"<{name} with fault points>", "exec", flags, dont_inherit=True)
        exec(code, module.__dict__, made)
        again = made[function.__name__]
        function.__code__ = getattr(again, "__func__", again).__code__
