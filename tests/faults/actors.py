"""What the processes of a round do: publish, take, drain; and what users do to the library meanwhile.

They write to the arrays that they were given and to those that they have published, are interrupted in the middle of calls
(:class:`Interrupts`), and fork children that use what is their parent's (:class:`Children`).

Each is told all that it needs by a :class:`Part`, so that it may be forked from a warm parent or started afresh alike::

    python tests/faults/actors.py '{"actor": 7, "role": "producer", ...}'
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import random
import signal
import sys
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import points
from ledger import Board, Ledger, What

from blendtorch_shm.errors import SegmentError, StreamClosed
from blendtorch_shm.launch.address import Address, Twin
from blendtorch_shm.memory.states import State
from blendtorch_shm.message.wire import Message
from blendtorch_shm.stream.control import Control
from blendtorch_shm.stream.inspection import Inspection, inspect
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.rings import Rings
from blendtorch_shm.transport import open_sink, open_source

QUEUE_SIZE = 3
"""Messages on their way to a remote consumer."""
SEND_HWM = 8
_LARGEST_NBYTES = 100_000


@dataclasses.dataclass
class Part:
    """What one process is to do.

    Args:
        actor: its number, of which there is no second in the round.
        role: "producer", "consumer", "remote" or "drainer".
        seed: of all that it does at random.
        stream: which of the streams it publishes to; consumers take from all.
        folder: where the ledger and the board are.
        twins: of the streams.
        endpoints: of the streams, for those who are remote.
        arm: fault point -> (at which visit, the signal).
        num_slots: of a ring.
        keep: messages that a consumer holds on to.
        growth: probability that a message is larger than all before.
        forks: probability that a call is followed by a fork.
    """

    actor: int
    role: str
    seed: int
    stream: int
    folder: str
    twins: list[dict[str, Any]]
    endpoints: list[str]
    arm: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    num_slots: int = 16
    keep: int = 0
    growth: float = 0.02
    forks: float = 0.0

    def places(self) -> list[SharedPlace]:
        """Where the streams live."""
        return [SharedPlace(Twin(**twin)) for twin in self.twins]

    def address(self, stream: int) -> Address:
        """Of a stream, for those who share its memory."""
        return Address(self.endpoints[stream], Twin(**self.twins[stream]))


def play(part: Part) -> None:
    """Be the process that `part` describes. Leaves in good order, or does not return."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # the director asks where everyone stands
    ledger = Ledger(f"{part.folder}/ledger", part.actor)
    points.arm(part.arm, lambda number: ledger.write(What.FAULT, number=number))
    board = Board(f"{part.folder}/board")
    {"producer": _produce, "consumer": _consume, "remote": _consume, "drainer": _drain}[part.role](part, ledger, board)


class Interrupted(BaseException):
    """As KeyboardInterrupt, and nobody else's."""


class Interrupts:
    """SIGUSR1 raises :class:`Interrupted` wherever a call of the library is that may be interrupted.

    No signal is looked for between the return of such a call and the next line, so what was handed over is not lost.
    """

    def __init__(self) -> None:
        self.may_come = False
        signal.signal(signal.SIGUSR1, self._raise)

    def _raise(self, _: int, frame: FrameType | None) -> None:
        # At a fault point stands a call that is not in the code: a signal could not come there.
        if self.may_come and (frame is None or frame.f_code is not points.reach.__code__):
            self.may_come = False
            raise Interrupted

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """What is in here may be cut short where :attr:`may_come` is set."""
        try:
            yield
        except Interrupted:
            pass
        finally:
            self.may_come = False


class Children:
    """Forked children: they end at once, or sleep with copies of all that their parent has, or try to use it."""

    def __init__(self, part: Part, ledger: Ledger) -> None:
        self._chance = random.Random(part.seed + 1)
        self._probability = part.forks
        self._ledger = ledger

    def sometimes(self, use: Callable[[], object], scribble: Callable[[], object]) -> None:
        """Fork one now and then. To `use` what is its parent's must be an error there; what it writes, nobody else may see."""
        if self._chance.random() >= self._probability:
            return
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._check(ended[1])
        kind = self._chance.random()
        if os.fork():
            return
        status = 1
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
            points.disarm()
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            scribble()
            if kind < 0.4:
                time.sleep(kind)
            elif kind < 0.8:
                with contextlib.suppress(StreamClosed):
                    use()
                    os._exit(status)
            status = 0
        finally:
            os._exit(status)

    def _check(self, status: int) -> None:
        self._ledger.write(What.FORKED)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            self._ledger.write(What.MISUSED)


def picture(producer: int, number: int, nbytes: int) -> np.ndarray:
    """Pixels that nobody else has."""
    return np.full(nbytes // 4, (producer * 1_000_003 + number) & 0xFFFFFFFF, np.uint32)


def _produce(part: Part, ledger: Ledger, board: Board) -> None:
    chance = random.Random(part.seed)
    sink = open_sink(part.address(part.stream), send_hwm=SEND_HWM, num_slots=part.num_slots)
    interrupts, children = Interrupts(), Children(part, ledger)
    largest = 6000
    number = 0
    while not board.is_over("producer"):
        if chance.random() < part.growth and largest < _LARGEST_NBYTES:
            largest = int(largest * chance.uniform(1.2, 2.0))
        first, second = (picture(part.actor, number, chance.randrange(3000, largest)) for _ in range(2))
        check = zlib.crc32(second, zlib.crc32(first))
        late, lent = second, None
        if chance.random() < 0.3:
            with interrupts.caught():
                interrupts.may_come = True
                lent = sink.lend(first.shape, first.dtype)
                interrupts.may_come = False
            if lent is not None:
                late = lent[::-1]
                lent[...] = first
                first = lent
        fields = {"first": first, "second": second, "who": (part.stream, part.actor, number), "check": check}
        children.sometimes(lambda fields=fields: sink.publish(fields), lambda late=late: late.fill(7))
        ledger.write(What.WILL_PUBLISH, number=number)
        with interrupts.caught():
            interrupts.may_come = True
            sink.publish(fields)
            interrupts.may_come = False
            ledger.write(What.PUBLISHED, number=number)
        late.fill(9)  # too late for who gets the message
        number += 1
        del lent, late, first, fields
    sink.close()


def _read(message: Message, ledger: Ledger) -> int:
    """Verify a message and write down which it is; the stream it is of."""
    fields = message.fields
    stream, producer, number = fields["who"]
    first, second = fields["first"], fields["second"]
    value = picture(producer, number, 4)[0]
    intact = bool((first == value).all() and (second == value).all())
    intact = intact and zlib.crc32(second, zlib.crc32(first)) == fields["check"]
    ledger.write(What.READ if intact else What.BROKEN, stream, message.sequence, producer, number)
    first[number % len(first) :] = 5  # nobody who gets it again may see that
    second[-1:] = 6
    return int(stream)


def _consume(part: Part, ledger: Ledger, board: Board) -> None:
    if part.role == "remote":
        source = open_source([Address(endpoint) for endpoint in part.endpoints], queue_size=QUEUE_SIZE)
    else:
        source = open_source([part.address(stream) for stream in range(len(part.twins))])
    held: deque[tuple[int, int, Message]] = deque()
    leaving: list[int] = []
    interrupts, children = Interrupts(), Children(part, ledger)
    signal.signal(signal.SIGTERM, lambda *_: leaving.append(1))
    while not leaving and not board.is_over(part.role):
        messages: list[Message] = []
        with interrupts.caught():
            if part.role == "remote" or part.seed % 3:  # a remote one may take one message along when it dies
                interrupts.may_come = True
                message = source.receive(0.05)
                interrupts.may_come = False
                messages = [] if message is None else [message]
                del message
            else:
                interrupts.may_come = True
                messages = source.receive_many(4, 0.05)
                interrupts.may_come = False
        children.sometimes(lambda: source.receive(0.0), lambda m=messages: [x.fields["first"].fill(8) for x in m])
        keep = part.keep if messages else max(0, len(held) - 1)
        for message in messages:
            ledger.write(What.TAKEN, message.fields["who"][0], message.sequence)
        while messages:
            message = messages.pop(0)
            held.append((_read(message, ledger), message.sequence, message))
            del message
        while len(held) > keep:
            stream, sequence = held.popleft()[:2]  # with this its lease ends
            ledger.write(What.DROPPED, stream, sequence)
    if part.role == "remote" or part.seed % 2:  # who shares the memory may leave it to the end of the process
        source.close()


def _drain(part: Part, ledger: Ledger, board: Board) -> None:
    """Take what is left, when all others are gone; then say what the streams look like."""
    source = open_source([part.address(stream) for stream in range(len(part.twins))])
    deadline = time.monotonic() + 20
    places = part.places()
    while True:
        message = source.receive(0.02)
        if message is not None:
            ledger.write(What.TAKEN, message.fields["who"][0], message.sequence)
            _read(message, ledger)
            del message
            continue
        if not any(_not_free(inspect(place)) for place in places) or time.monotonic() > deadline:
            break
    source.close()
    with open(f"{part.folder}/drained", "w", encoding="utf-8") as file:
        json.dump([_left_of(place) for place in places], file)


def _left_of(place: SharedPlace) -> dict[str, Any]:
    """What a stream looks like when all are gone."""
    seen, control = inspect(place), Control.attach(place)
    held = [*(["the producer"] if seen.has_producer else []), *(f"consumer {index}" for index in seen.consumers)]
    held += [f"slot {slot} of ring {ring.number}" for ring in seen.rings for slot in ring.locked]
    expected = {place.name, *(f"{place.name}.{number}" for number in range(control.first_ring, control.next_ring))}
    there = {f"/{name}" for name in os.listdir("/dev/shm") if f"/{name}.".startswith(f"{place.name}.")}
    return {
        "published": seen.published,
        "rings": control.next_ring,
        "not free": _not_free(seen),
        "held locks": held,
        "surplus segments": sorted(there - expected),
    }


def _not_free(seen: Inspection) -> list[str]:
    return [str(slot) for ring in seen.rings for slot in ring.slots if slot.state != State.FREE]


def explain_all(part: Part) -> str:
    """The state of all streams, for people."""
    lines = []
    for place in part.places():
        try:
            seen, control = inspect(place), Control.attach(place)
        except SegmentError as error:
            lines.append(str(error))
            continue
        with place.open_locks() as locks:
            lines.append(control.explain(place.name, Rings(place, control).now(), locks))
        lines.append(
            f"  consumers {list(seen.consumers)}, asleep {seen.asleep} (now {time.monotonic_ns()}), waiting {seen.waiting}"
        )
        for ring in seen.rings:
            lines.append(
                f"  ring {ring.number}: {bytes(slot.state for slot in ring.slots).hex()}, locked {ring.locked}"
            )
        lines += [f"    {slot}" for slot in _not_free(seen)]
    return "\n".join(lines)


def leave(part: Part) -> None:
    """Play, and end this process as Python would; for a forked child."""
    code = 1
    try:
        play(part)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    os._exit(code)


if __name__ == "__main__":
    import actors  # this module again, under the name by which its fault points are found

    points.install()
    actors.play(actors.Part(**json.loads(sys.argv[1])))
