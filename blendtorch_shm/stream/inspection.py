"""A stream as it is at one moment, seen from outside: for tests, and for whoever has to find out why it stands still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..memory.layout import MAX_CONSUMERS
from ..memory.locks import PRODUCER_LOCK, consumer_lock, slot_lock
from ..memory.ring import SlotInfo
from ..memory.states import State
from .control import Control
from .place import Place
from .rings import Rings


@dataclass(frozen=True)
class RingInspection:
    """One ring.

    Attributes:
        number: which.
        slot_nbytes: size of each slot.
        slots: what each holds.
        locked: slots that somebody is just claiming or reclaiming.
    """

    number: int
    slot_nbytes: int
    slots: Sequence[SlotInfo]
    locked: Sequence[int]

    def count(self, state: State) -> int:
        """How many slots are in `state`."""
        return sum(slot.state == state for slot in self.slots)


@dataclass(frozen=True)
class Inspection:
    """One stream.

    Attributes:
        published: messages committed so far.
        waiting: what the producer waits for, see :class:`~.control.Control`; 0: it does not.
        asleep: numbers of the consumers that sleep, and since when (CLOCK_MONOTONIC, ns).
        has_producer: whether its producer is alive.
        consumers: numbers of the consumers that are alive.
        rings: those that exist, oldest first.
    """

    published: int
    waiting: int
    asleep: dict[int, int]
    has_producer: bool
    consumers: Sequence[int]
    rings: Sequence[RingInspection]

    def count(self, state: State) -> int:
        """How many slots of all rings are in `state`."""
        return sum(ring.count(state) for ring in self.rings)


def inspect(place: Place) -> Inspection:
    """Look at the stream at `place`. Nobody in it notices.

    Raises:
        SegmentError: there is none.

    Example::

        >>> inspect(SharedPlace(address.twin)).count(State.READY)
        3
    """
    control = Control.attach(place)
    with place.open_locks() as locks:
        rings = [
            RingInspection(
                ring.number,
                ring.slot_nbytes,
                [ring.info(slot) for slot in range(ring.num_slots)],
                [slot for slot in range(ring.num_slots) if locks.is_held(slot_lock(ring.number, slot))],
            )
            for ring in Rings(place, control).now()
        ]
        return Inspection(
            control.published,
            control.waiting,
            {consumer: since_ns for consumer, since_ns in enumerate(control.asleep) if since_ns},
            locks.is_held(PRODUCER_LOCK),
            [consumer for consumer in range(MAX_CONSUMERS) if locks.is_held(consumer_lock(consumer))],
            rings,
        )
