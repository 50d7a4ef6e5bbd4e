"""Leases of the dead: whoever finds that a lease's owner is dead makes the message READY again."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..memory.layout import MAX_CONSUMERS
from ..memory.locks import Locks, consumer_lock, slot_lock
from ..memory.ring import Ring
from ..memory.states import State


def reclaim_dead(rings: Iterable[Ring], locks: Locks) -> int:
    """Make what dead consumers had leased READY again.

    Returns:
        the number of messages.
    """
    return sum(reclaim(ring, locks, lambda owner: not locks.is_held(consumer_lock(owner - 1))) for ring in rings)


def reclaim(ring: Ring, locks: Locks, is_dead: Callable[[int], bool]) -> int:
    """Make the leases of those owners READY again who are dead (a lease's owner is a consumer's number plus one).

    Returns:
        the number of messages.
    """
    reclaimed = 0
    for slot, state in enumerate(ring.states()):
        owner = ring.owner[slot]
        if state != State.LEASED or not 1 <= owner <= MAX_CONSUMERS or not is_dead(owner):
            continue
        number = slot_lock(ring.number, slot)
        if locks.try_lock(number):
            try:
                reclaimed += is_dead(owner) and ring.reclaim(slot, owner)
            finally:
                locks.unlock(number)
    return reclaimed
