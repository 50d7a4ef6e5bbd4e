"""What both halves of a stream share: the control segment, the rings, and how the leases of the dead are found.

A stream is one socket of one instance. Its producer (writer.py) fills slots, consumers (reader.py) lease them. Both see it
through a :class:`~blendtorch_shm.stream.place.Place`: shared memory, or the memory of one process.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from ..errors import SegmentError
from ..memory import layout
from ..memory.layout import (
    ASLEEP_OFFSET,
    CONTROL_NBYTES,
    FLAG_LOCAL_ONLY,
    MAX_CONSUMERS,
    MAX_RINGS_AT_ONCE,
    STREAM_MAGIC,
    word,
)
from ..memory.locks import PRODUCER_LOCK, Locks, consumer_lock, slot_lock
from ..memory.ring import Ring, check_header
from ..memory.segment import Segment
from ..memory.states import State
from .bell import Bell
from .place import Place

RESERVE = 3
"""Slots per ring that consumers leave to the producer: at more leases than the rest, messages are handed out as copies."""
SPIN_S = 0.0005
"""See :class:`Spin`. Longer than a frame of 480×640×3 takes from one side to the other and the answer back, so that who asks for
one at a time may spin, too; and too short for any renderer's pace.
"""
FOR_A_SLOT = layout.MAX_SLOTS
"""What stands in the stream's word `waiting` while the producer waits for a FREE slot, and not for fewer READY ones."""
RECLAIM_EVERY_S = 0.5
"""How often whoever has nothing better to do looks for leases of dead consumers."""

MAGIC = word(layout.STREAM_HEADER, "magic")
LAYOUT_VERSION = word(layout.STREAM_HEADER, "version")
KEY = word(layout.STREAM_HEADER, "key")
EPOCH = word(layout.STREAM_HEADER, "epoch")
FIRST_RING = word(layout.STREAM_HEADER, "first_ring")
NEXT_RING = word(layout.STREAM_HEADER, "next_ring")
WAITING = word(layout.STREAM_HEADER, "waiting")
CLOSED = word(layout.STREAM_HEADER, "closed")
PUBLISHED = word(layout.STREAM_HEADER, "published")
STALLED_NS = word(layout.STREAM_HEADER, "stalled_ns")
RECLAIMED = word(layout.STREAM_HEADER, "reclaimed")
LAST_NS = word(layout.STREAM_HEADER, "last_published_ns")


class Spin:
    """Lets who waits, for a message or for room, look again and again for a moment before it sleeps, if its last wait was no
    longer than that moment (:data:`SPIN_S`): who slept finds its CPU halted and its caches cold. Where waits are long, nobody
    spins.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._last_wait_s = math.inf

    def begin(self) -> None:
        """A wait begins."""
        self._began = time.monotonic()

    def goes_on(self) -> bool:
        """Whether to look once more; others had the CPU meanwhile."""
        if self._last_wait_s >= SPIN_S or time.monotonic() - self._began >= SPIN_S:
            return False
        os.sched_yield()
        return True

    def end(self) -> None:
        """The wait is over."""
        self._last_wait_s = time.monotonic() - self._began


def attach_control(place: Place) -> Segment:
    """The control segment of the stream at `place`.

    Raises:
        SegmentError: there is none, or it is of another version.
    """
    control = place.attach("")
    if control.nbytes < CONTROL_NBYTES:
        raise SegmentError(f"{control.name} has {control.nbytes} bytes, a control segment has {CONTROL_NBYTES}.")
    check_header(control, control.words[MAGIC], STREAM_MAGIC, control.words[LAYOUT_VERSION])
    return control


class Sleepers:
    """The consumers of a stream that wait for their bells, and how they are woken.

    Args:
        place: where the stream lives.
        control: its control segment.
    """

    def __init__(self, place: Place, control: Segment) -> None:
        self._place = place
        self._asleep = control.view[ASLEEP_OFFSET : ASLEEP_OFFSET + MAX_CONSUMERS]  # one byte each, 1 while it sleeps
        self._bells: dict[int, Bell] = {}
        self._woken = -1  # who was woken last

    def say(self, index: int, asleep: bool) -> None:
        """What a consumer says of itself: whether it waits to be woken. It must look once more after saying that it does."""
        self._asleep[index] = asleep

    def anyone(self) -> bool:
        """Whether a consumer sleeps."""
        return 1 in self._asleep.tobytes()

    def wake_one(self, companion: int | None = None) -> None:
        """Wake a consumer that sleeps, if one does, each in its turn.

        Args:
            companion: number of the consumer that lives in the producer's process, if it has one and asks. It has to wait for
                Python's lock before it does anything, so it is woken beside another one and not in its stead.
        """
        asleep = self._asleep.tobytes()
        if 1 not in asleep:
            return
        if companion is not None and asleep[companion]:
            self._wake(companion)
            asleep = asleep[:companion] + b"\0" + asleep[companion + 1 :]
        first = self._woken + 1
        in_turn = asleep[first:] + asleep[:first]
        at = in_turn.find(1)
        while at >= 0:
            index = (first + at) % MAX_CONSUMERS
            if self._wake(index):
                self._woken = index
                return
            at = in_turn.find(1, at + 1)

    def _wake(self, index: int) -> bool:
        """Ring for a consumer; False if that was done already, and it has not run since: it may be stopped, or dead."""
        bell = self._bells.get(index)
        if bell is None:
            try:
                bell = self._bells[index] = self._place.open_bell(consumer_lock(index))
            except SegmentError:  # no more files may be opened: it looks by itself a little later
                return False
        if bell.is_rung():
            return False
        bell.ring()
        return True

    def forget_dead(self, locks: Locks) -> None:
        """Ring no more for consumers that died in their sleep."""
        for index, is_asleep in enumerate(self._asleep.tobytes()):
            if is_asleep and not locks.is_held(consumer_lock(index)):
                self._asleep[index] = 0

    def forget_bells(self) -> None:
        """Close them."""
        self._bells.clear()


def attach_rings(place: Place, control: Segment, known: dict[int, Ring]) -> Iterator[Ring]:
    """The rings of the stream that exist, oldest first.

    Args:
        place: where they are.
        control: the stream's control segment.
        known: by number, those attached before; brought up to date.
    """
    first, following = control.words[FIRST_RING], control.words[NEXT_RING]
    following = min(following, first + MAX_RINGS_AT_ONCE)
    for number in [n for n in known if n < first]:
        del known[number]  # unmapped with its last lease
    for number in range(first, following):
        ring = known.get(number)
        if ring is None:
            with contextlib.suppress(SegmentError):  # removed meanwhile: all its messages have been consumed
                ring = known[number] = Ring.attach(place.attach(f".{number}"), control.words[KEY], number)
        if ring is not None:
            yield ring


def reclaim_dead(rings: Iterable[Ring], locks: Locks) -> int:
    """Make what dead consumers had leased READY again.

    Returns:
        the number of messages.
    """
    return sum(reclaim(ring, locks, lambda owner: not locks.is_held(consumer_lock(owner - 1))) for ring in rings)


def reclaim(ring: Ring, locks: Locks, is_dead: Callable[[int], bool]) -> int:
    """Make the leases of those owners READY again who are dead (a lease's owner is a consumer's number plus one)."""
    reclaimed = 0
    for slot, state in enumerate(ring.states()):
        owner = ring.owner(slot)
        if state != State.LEASED or not 1 <= owner <= MAX_CONSUMERS or not is_dead(owner):
            continue
        number = slot_lock(ring.number, slot)
        if locks.try_lock(number):
            try:
                reclaimed += is_dead(owner) and ring.reclaim(slot, owner)
            finally:
                locks.unlock(number)
    return reclaimed


class Activity(NamedTuple):
    """What a stream's producer has done so far. It stays the same while the producer hangs, and only then: one that waits
    for room says so again and again, in `stalled_ns`.
    """

    published: int
    """Messages."""
    stalled_ns: int
    """Time spent waiting for room."""
    last_published_ns: int
    """When the last message was published, or the last frame of a clip, CLOCK_MONOTONIC; 0: none was."""

    @classmethod
    def of(cls, control: Segment) -> Activity:
        """That of the stream with this control segment."""
        return cls(*(control.words[at] for at in (PUBLISHED, STALLED_NS, LAST_NS)))

    def silence_s(self) -> float | None:
        """Seconds since the last message or frame of a clip, or None if there was none."""
        return (time.monotonic_ns() - self.last_published_ns) / 1e9 if self.last_published_ns else None


def activity(place: Place) -> Activity | None:
    """What the producer of the stream at `place` has done so far, or None if there is no such stream (yet)."""
    try:
        return Activity.of(attach_control(place))
    except SegmentError:
        return None


def producer_state(control: Segment, locks: Locks) -> Literal["alive", "finished", "gone"]:
    """Whether the stream has a producer: one that lives, that closed it in good order, or that died."""
    return "finished" if control.words[CLOSED] else "alive" if locks.is_held(PRODUCER_LOCK) else "gone"


def explain(place: Place, control: Segment, rings: Iterable[Ring], locks: Locks) -> str:
    """The state of a stream in one line, for messages to people."""
    seen = Activity.of(control)
    silence_s = seen.silence_s()
    slots = [(ring, slot, state) for ring in rings for slot, state in enumerate(ring.states())]
    ready = [(ring, slot) for ring, slot, state in slots if state == State.READY]
    leased = sum(state == State.LEASED for _, _, state in slots)
    pickled = sum(bool(ring.flags(slot) & FLAG_LOCAL_ONLY) for ring, slot in ready)
    state = producer_state(control, locks)
    producer = "has finished" if state == "finished" else f"is {state}"
    last = "" if silence_s is None else f", the last one {silence_s:.1f} s ago"
    return (
        f"{place.name}: its producer {producer} and has published {seen.published} messages{last}; of {len(slots)} slots, "
        f"{len(ready)} hold messages that nobody has taken"
        f"{f' ({pickled} of them contain pickles, which only consumers on this host may take)' if pickled else ''} "
        f"and {leased} are in use by consumers"
    )
