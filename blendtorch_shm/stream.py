"""What both halves of a stream share: the control segment, the rings, and how the leases of the dead are found.

A stream is one socket of one instance. Its producer (writer.py) fills slots, consumers (reader.py) lease them. Both see it
through a :class:`~blendtorch_shm.place.Place`: shared memory, or the memory of one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from . import layout
from .errors import SegmentError
from .layout import ASLEEP_OFFSET, CONTROL_NBYTES, FLAG_LOCAL_ONLY, MAX_CONSUMERS, STREAM_MAGIC, word
from .locks import PRODUCER_LOCK, Locks, consumer_lock, slot_lock
from .place import Place
from .ring import Ring, check_header
from .segment import Segment
from .states import State

RESERVE = 3
"""Slots per ring that consumers leave to the producer: at more leases than the rest, messages are handed out as copies."""
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


def asleep_bytes(control: Segment) -> memoryview:
    """One byte per consumer, 1 while it waits for an announcement."""
    return control.view[ASLEEP_OFFSET : ASLEEP_OFFSET + MAX_CONSUMERS]


def attach_rings(place: Place, control: Segment, known: dict[int, Ring]) -> Iterator[Ring]:
    """The rings of the stream that exist, oldest first.

    Args:
        place: where they are.
        control: the stream's control segment.
        known: by number, those attached before; brought up to date.
    """
    first, following = control.words[FIRST_RING], control.words[NEXT_RING]
    for number in [n for n in known if n < first]:
        del known[number]  # unmapped with its last lease
    for number in range(first, following):
        ring = known.get(number)
        if ring is None:
            with contextlib.suppress(SegmentError):  # removed meanwhile: all its messages have been consumed
                ring = known[number] = Ring.attach(place.attach(f".{number}"), control.words[KEY])
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


def explain(place: Place, control: Segment, rings: Iterable[Ring], locks: Locks) -> str:
    """The state of a stream in one line, for messages to people."""
    published = control.words[PUBLISHED]
    slots = [ring.info(slot) for ring in rings for slot in range(ring.num_slots)]
    ready = [slot for slot in slots if slot.state == State.READY]
    leased = sum(slot.state == State.LEASED for slot in slots)
    pickled = sum(bool(slot.flags & FLAG_LOCAL_ONLY) for slot in ready)
    producer = "has finished" if control.words[CLOSED] else "is alive" if locks.is_held(PRODUCER_LOCK) else "is gone"
    return (
        f"{place.name}: its producer {producer} and has published {published} messages; of {len(slots)} slots, "
        f"{len(ready)} hold messages that nobody has taken"
        f"{f' ({pickled} of them contain pickles, which only consumers on this host may take)' if pickled else ''} "
        f"and {leased} are in use by consumers"
    )
