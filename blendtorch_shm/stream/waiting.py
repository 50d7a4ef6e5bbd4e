"""Waiting for a message or for room: who sleeps, who is told, and when to look again instead of sleeping.

A consumer that finds nothing writes since when it sleeps into its word of the control segment, looks once more, and polls its
inbox. Whoever makes a slot READY does so first, and then tells the consumer that has slept longest and was not told yet. Each
sleep has another time, so one look at the words says who was told already. A consumer that is behind never sleeps and costs no
wake-up; then nothing is sent at all.

Nobody depends on being told: a consumer that sleeps looks by itself every :data:`IDLE_S`, so what was sent to somebody who
died, or who is stopped, is found by another one a little later.
"""

from __future__ import annotations

import math
import os
import time

from ..memory.layout import MAX_CONSUMERS
from ..memory.locks import Locks, consumer_lock
from ..memory.ring import Ring
from ..message.token import pack
from .control import Control
from .inbox import Outbox
from .place import Place

IDLE_S = 0.05
"""A consumer that hears nothing looks at the slot tables itself this often."""
SPIN_S = 0.0005
"""See :class:`Spin`. Longer than a frame of 480×640×3 takes from one side to the other and the answer back, so that who asks for
one at a time may spin, too; and too short for any renderer's pace.
"""
NAPS_S = 0.003
"""As :data:`SPIN_S`, where consumers share a stream."""
_NAP_S = 0.0005
"""Some messages queue up meanwhile, and who wakes takes them one after the other. Four consumers at full speed, each sleeping
until it was told, cost the producer 90 us of CPU per message of 480×640×3 and the consumers 80; napping, 65 and 45.
"""
_LONGEST_PAUSE = 64
"""So trials cost less than 8 us of CPU a wait, where all waits are long."""
_NOBODY = bytes(8 * MAX_CONSUMERS)


class Spin:
    """Lets who waits look again and again for a moment before it sleeps, if its last wait was no longer than that moment: to
    sleep costs a wake-up, and who slept finds its CPU halted and its caches cold. Where waits are long, nobody spins.

    But for a trial now and then: where two wait for each other in turn, the wake-ups alone may make each wait a long one. The
    first trial comes after one long wait, and each that was in vain doubles the number of waits until the next.

    Between two looks it yields the CPU; or it naps, where other consumers share the stream and would all compete for the CPU.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._last_wait_s = math.inf
        self._pause = self._long_waits = 1  # between two trials; those that are left until the next

    def begin(self) -> None:
        """A wait begins."""
        self._began = time.monotonic()

    def goes_on(self, *, naps: bool = False) -> bool:
        """Whether to look once more; others had the CPU meanwhile."""
        longest_s = NAPS_S if naps else SPIN_S
        is_trial = self._long_waits == 0 and not naps
        if (self._last_wait_s >= longest_s and not is_trial) or time.monotonic() - self._began >= longest_s:
            return False
        if naps:
            time.sleep(_NAP_S)
        else:
            os.sched_yield()
        return True

    def end(self) -> None:
        """The wait is over."""
        self._last_wait_s = time.monotonic() - self._began
        if self._last_wait_s < SPIN_S:
            self._pause = self._long_waits = 1
        elif self._long_waits > 0:
            self._long_waits -= 1
        else:
            self._long_waits = self._pause = min(2 * self._pause, _LONGEST_PAUSE)


class Sleepers:
    """The consumers of a stream that sleep, as one member sees them.

    Args:
        place: where the stream lives.
        control: its control segment.
    """

    def __init__(self, place: Place, control: Control) -> None:
        self._key = control.key
        self._asleep = control.asleep
        self._outbox = Outbox(place)
        self._told: dict[int, int] = {}  # consumer -> of which sleep it was told

    def anyone(self) -> bool:
        """Whether a consumer sleeps."""
        return self._asleep.tobytes() != _NOBODY

    def _now(self) -> list[tuple[int, int]]:
        """Since when each consumer sleeps that does, and its number; of a copy, since the words change meanwhile."""
        words = self._asleep.tobytes().rstrip(b"\0")  # most numbers are never used
        since_ns = memoryview(words.ljust(-(-len(words) // 8) * 8, b"\0")).cast("Q")
        return [(since, consumer) for consumer, since in enumerate(since_ns) if since]

    def tell(self, ring: Ring, slot: int) -> None:
        """Send the number of a READY slot to the consumer that has slept longest and was not told yet, if there is one."""
        for since_ns, consumer in sorted(self._now()):
            if self._told.get(consumer) != since_ns:
                number = pack(self._key, ring.number, slot, ring.sequence[slot])
                if self._outbox.push(consumer, number):
                    self._told[consumer] = since_ns
                    return

    def pass_on(self, rings: list[Ring]) -> None:
        """If a READY slot is left and somebody sleeps, tell one of the sleepers."""
        if self.anyone():
            for ring in rings:
                slot = ring.oldest_ready()
                if slot >= 0:
                    self.tell(ring, slot)
                    return

    def forget_dead(self, locks: Locks) -> None:
        """Tell no more those consumers that died in their sleep, and close the connections to those who have gone."""
        for _, consumer in self._now():
            if not locks.is_held(consumer_lock(consumer)):
                self._asleep[consumer] = 0
        self._outbox.forget(lambda consumer: not locks.is_held(consumer_lock(consumer)))

    def close(self) -> None:
        """Close all connections."""
        self._outbox.close()
