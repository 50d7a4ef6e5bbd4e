"""What the processes of a round do: publish, take, drain.

Each is told all that it needs by a :class:`Part`, so that it may be forked from a warm parent or started afresh alike::

    python tests/faults/actors.py '{"actor": 7, "role": "producer", ...}'
"""

from __future__ import annotations

import atexit
import contextlib
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
from typing import Any

import numpy as np
import points
from ledger import Board, Ledger, What

from blendtorch_shm.errors import SegmentError
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


def picture(producer: int, number: int, nbytes: int) -> np.ndarray:
    """Pixels that nobody else has."""
    return np.full(nbytes // 4, (producer * 1_000_003 + number) & 0xFFFFFFFF, np.uint32)


def _produce(part: Part, ledger: Ledger, board: Board) -> None:
    chance = random.Random(part.seed)
    sink = open_sink(part.address(part.stream), send_hwm=SEND_HWM, num_slots=part.num_slots)
    largest = 6000
    number = 0
    while not board.is_over("producer"):
        if chance.random() < part.growth and largest < _LARGEST_NBYTES:
            largest = int(largest * chance.uniform(1.2, 2.0))
        first, second = (picture(part.actor, number, chance.randrange(3000, largest)) for _ in range(2))
        check = zlib.crc32(second, zlib.crc32(first))
        if chance.random() < 0.3:
            lent = sink.lend(first.shape, first.dtype)
            if lent is not None:
                lent[...] = first
                first = lent
        ledger.write(What.WILL_PUBLISH, number=number)
        sink.publish({"first": first, "second": second, "who": (part.stream, part.actor, number), "check": check})
        ledger.write(What.PUBLISHED, number=number)
        number += 1
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
    return int(stream)


def _consume(part: Part, ledger: Ledger, board: Board) -> None:
    if part.role == "remote":
        source = open_source([Address(endpoint) for endpoint in part.endpoints], queue_size=QUEUE_SIZE)
    else:
        source = open_source([part.address(stream) for stream in range(len(part.twins))])
    held: deque[tuple[int, int, Message]] = deque()
    leaving: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: leaving.append(1))
    while not leaving and not board.is_over(part.role):
        if part.role == "remote" or part.seed % 3:  # a remote one may take one message along when it dies
            message = source.receive(0.05)
            messages = [] if message is None else [message]
            del message
        else:
            messages = source.receive_many(4, 0.05)
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
