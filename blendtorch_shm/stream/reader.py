"""A consumer's half of a stream: claim a message, lease its slot for as long as its arrays live, release it.

The slot table is the truth, and :meth:`Reader.take` looks nowhere else: the oldest READY message is next. Bells only wake
those who wait. So one that rings for somebody who just died costs a moment and no message, and the messages of a dead producer
are found as well as those of a living one.

A lease is a weak reference to the array that all arrays of the message are built on. When the last view of it has gone, in
whatever thread, the slot is FREE again. A process that dies holds its leases no longer, as the kernel says by way of
its member lock, and whoever notices makes them READY again (:func:`reclaim_dead`).
"""

from __future__ import annotations

import itertools
import logging
import operator
import os
import time
import weakref
from typing import NamedTuple

from ..errors import SegmentError, StreamClosed
from ..memory.layout import FLAG_AGAIN, FLAG_LOCAL_ONLY, MAX_CONSUMERS, consumer_word
from ..memory.locks import PRODUCER_LOCK, consumer_lock, slot_lock
from ..memory.ring import Bytes, Ring
from ..memory.segment import Segment
from ..memory.states import State
from ..process import interrupts, leaving
from .control import (
    FIRST_RING,
    FOR_A_SLOT,
    KEY,
    NEXT_RING,
    RECLAIM_EVERY_S,
    RESERVE,
    WAITING,
    Sleepers,
    attach_control,
    attach_rings,
    explain,
    reclaim,
    reclaim_dead,
)
from .place import Place

log = logging.getLogger("blendtorch")


class Lease(weakref.ref[Bytes]):
    """Ends when the array that it refers to has gone. Works from any thread, and takes no lock that could be held."""

    __slots__ = ("terms",)
    terms: tuple[Reader, Ring, int, int]
    """Whose it is, and which ring, slot and generation it is about."""


class Claimed(NamedTuple):
    """A message that this process alone has."""

    header: bytes
    payload: Bytes
    """(n,) uint8. Either the slot itself, leased until the last view of this array has gone, or a copy."""
    sequence: int
    """Number of the message within its stream."""
    lease: Lease | None
    """None if the payload is a copy."""


def _lease_ended(lease: Lease) -> None:
    try:
        lease.terms[0].end(lease)
    except BaseException:  # Ctrl-C
        lease.terms[0].end_later(lease)
        raise


interrupts.keep_of(_lease_ended)


class Counter:
    """A word in shared memory that only this process writes. Threads may lose a count to each other."""

    __slots__ = ("_at", "_words")

    def __init__(self, words: memoryview, at: int) -> None:
        self._words = words
        self._at = at

    def add(self, n: int) -> None:
        """Count `n` more; whatever stood there, it stays a word."""
        self._words[self._at] = (self._words[self._at] + n) % 2**64


def _neighbours(slots: list[int]) -> list[list[int]]:
    """`slots`, in their order, in pieces of which each counts up by one."""
    pieces = itertools.groupby(enumerate(slots), key=lambda entry: entry[1] - entry[0])
    return [[slot for _, slot in piece] for _, piece in pieces]


class Reader:
    """One consumer's membership in a stream.

    Args:
        place: where the stream lives.
        ends_with_process: whether leases end when the process exits in good order; otherwise whoever made the reader keeps it
            until it has called :meth:`finish`.

    Attributes:
        bell: by it, the producer wakes this consumer.
        sleepers: the consumers of the stream that sleep.

    Raises:
        SegmentError: the stream does not exist (yet), or has :data:`~blendtorch_shm.memory.layout.MAX_CONSUMERS` consumers.
    """

    def __init__(self, place: Place, *, ends_with_process: bool = True) -> None:
        self.place = place
        self._control = attach_control(place)
        self._words = self._control.words
        self.key = self._words[KEY]
        self.sleepers = Sleepers(place, self._control)
        self._rings: dict[int, Ring] = {}
        self._attached: list[Ring] = []
        self._span = (0, 0)  # first_ring and next_ring when those were attached
        self._leases: dict[int, Lease] = {}
        self._pid = os.getpid()
        self._closing = False
        self._last_reclaim = 0.0
        self._hoarding = False
        self._producers_bell = place.open_bell(PRODUCER_LOCK)
        self._locks = place.open_locks()
        self._index = -1
        self._has_left = False
        self._taken_back = 0
        try:
            self._join()
            self.bell = place.open_bell(consumer_lock(self._index))
            if ends_with_process:
                leaving.join(self)
            self._words[consumer_word(self._index, "pid")] = self._pid
            self._delivered, self._released, self._copied, self._rejected, self._reclaimed, self._redelivered = (
                Counter(self._words, consumer_word(self._index, name))
                for name in ("delivered", "released", "copied", "rejected", "reclaimed", "redelivered")
            )
            self._reclaimed.add(self._taken_back)
            self.count_remote(0)
            self.reclaim_dead()  # first of all, so that who replaces a dead consumer gets what that one held in its order
        except BaseException:
            self._leave()
            raise

    def _join(self) -> None:
        for index in range(MAX_CONSUMERS):
            if self._locks.try_lock(consumer_lock(index)):
                self._index = index
                if self._take_over(index + 1):
                    self.sleepers.say(index, False)
                    return
                self._locks.unlock(consumer_lock(index))
                self._index = -1
        raise SegmentError(f"{self.place.name} has {MAX_CONSUMERS} consumer processes already, which is the limit.")

    def _take_over(self, owner: int) -> bool:
        """Reclaim what a dead member of the same number still held; False if somebody is just doing it."""
        for ring in self._all_rings():
            self._taken_back += reclaim(ring, self._locks, lambda found: found == owner)
        return not any(
            state == State.LEASED and ring.owner(slot) == owner
            for ring in self._all_rings()
            for slot, state in enumerate(ring.states())
        )

    @property
    def index(self) -> int:
        """Which of the stream's consumers this is."""
        return self._index

    # -- taking messages ----------------------------------------------------------------------------------------

    def take(self, *, copy: bool = True, local: bool = True, lease: bool = False) -> Claimed | None:
        """The oldest READY message of the stream, or None if there is none.

        Args:
            copy: whether a copy will do where too many slots are leased; otherwise such messages stay READY.
            local: whether messages may be taken that must not leave this host.
            lease: whether a message that has no payload should be leased as well, so that it can be given back.

        Raises:
            StreamClosed: called in a forked child; a child needs a reader of its own.
        """
        for ring, slots in self._ready():
            for slot in slots:
                if not local and ring.flags(slot) & FLAG_LOCAL_ONLY:
                    continue
                if not copy and ring.count(State.LEASED) >= ring.num_slots - RESERVE:
                    return None
                for claimed in self._take(ring, [slot], lease):
                    if isinstance(claimed, SegmentError):
                        raise claimed
                    return claimed
        return None

    def take_many(self, count: int) -> list[Claimed | SegmentError]:
        """READY messages of a ring, the oldest of the stream, `count` at most; an error stands for one that makes no sense. None
        is a copy, and of the slots that consumers may hold, a third stays free: there may be others, who shall not have to copy.
        """
        ready = self._ready()
        if not ready:
            return []
        ring, slots = ready[0]
        room = (ring.num_slots - RESERVE) * 2 // 3 - ring.count(State.LEASED)
        taken: list[Claimed | SegmentError] = []
        for run in _neighbours(slots[: max(0, min(count, room))]):
            taken += self._take(ring, run) or [claimed for slot in run for claimed in self._take(ring, [slot])]
        return taken

    def _ready(self) -> list[tuple[Ring, list[int]]]:
        """Where the READY messages lie, the oldest first: some slots of a ring, then some of another one."""
        if os.getpid() != self._pid:
            raise StreamClosed("A stream that was opened before a fork cannot be read after it: open it in the child.")
        interrupts.raise_kept()
        rings = self._all_rings()
        found = [(ring, slots) for ring in rings if (slots := ring.ready())]
        if len(found) < 2:
            return found
        in_order = sorted((ring.sequence(slot), i, slot) for i, (ring, slots) in enumerate(found) for slot in slots)
        runs = itertools.groupby(in_order, key=operator.itemgetter(1))
        return [(found[i][0], [slot for _, _, slot in run]) for i, run in runs]

    def _take(self, ring: Ring, slots: list[int], always_lease: bool = False) -> list[Claimed | SegmentError]:
        """The messages in those of `slots`, which are neighbours, that are still READY; an error for each that makes no sense."""
        taken: list[Claimed | SegmentError] = []
        claims: list[tuple[int, int]] = []  # slots and generations
        try:
            self._claim(ring, slots, claims)
            wake_below = self._words[WAITING]
            if 0 < wake_below < FOR_A_SLOT and ring.count(State.READY) < wake_below:
                self._producers_bell.ring()
            claims.reverse()
            # No try inside: an interrupt at the jump back to one would not run our finally (CPython 3.13).
            while claims:
                taken.append(self._open(ring, *claims[-1], always_lease))
                claims.pop()
        finally:
            for slot, generation in claims:  # Ctrl-C
                if all(lease.terms[1:] != (ring, slot, generation) for lease in self._leases.values()):
                    self._put_back(ring, slot)
        return taken

    def _claim(self, ring: Ring, slots: list[int], claims: list[tuple[int, int]]) -> None:
        """Lease those of `slots` that are READY, and add them and their generations to `claims`. None, if somebody is just
        claiming one of them; if he dies over it, it is still READY.
        """
        owner = self._index + 1
        number, count = slot_lock(ring.number, slots[0]), len(slots)
        if not self._locks.try_lock(number, count):
            return
        try:
            for slot in slots:
                generation = ring.generation(slot)
                claims.append((slot, generation))  # first: Ctrl-C may come in between
                if not ring.claim(slot, generation, owner):
                    claims.pop()
        finally:
            try:
                self._locks.unlock(number, count)
            except BaseException:  # Ctrl-C
                self._locks.unlock(number, count)
                raise

    def _open(self, ring: Ring, slot: int, generation: int, always_lease: bool) -> Claimed | SegmentError:
        """The message in a slot that was just claimed, or why it makes no sense."""
        try:
            header, payload_nbytes, flags = ring.message(slot)
        except SegmentError as error:
            self._delivered.add(1)
            self._release(ring, slot, generation)
            return error.with_traceback(None)  # which has us, and so would keep what was taken
        sequence = ring.sequence(slot)
        root = ring.bytes_of(slot)
        payload = root[:payload_nbytes]
        hoarding = ring.count(State.LEASED) > ring.num_slots - RESERVE
        lease: Lease | None = None
        if (payload_nbytes or always_lease) and not hoarding:
            lease = Lease(root, _lease_ended)
            lease.terms = (self, ring, slot, generation)
            self._leases[id(lease)] = lease
        else:
            payload = payload.copy()
        self._delivered.add(1)
        if flags & FLAG_AGAIN:
            self._redelivered.add(1)
        if lease is None:
            self._release(ring, slot, generation)
            if hoarding and payload_nbytes:
                self._copied.add(1)
                self._say_hoarding(ring)
        return Claimed(header, payload, sequence, lease)

    def leasable(self) -> int:
        """How many messages consumers may hold altogether, without copies."""
        return max((ring.num_slots - RESERVE for ring in self._all_rings()), default=1)

    def has_ready(self, *, local: bool = True) -> bool:
        """Whether :meth:`take` would find a message."""
        return any(
            local or not ring.flags(slot) & FLAG_LOCAL_ONLY for ring in self._all_rings() for slot in ring.ready()
        )

    def pass_on(self) -> None:
        """If there is a message for a consumer that sleeps, wake one."""
        if self.sleepers.anyone() and self.has_ready():
            self.sleepers.wake_one()
            self.sleepers.forget_bells()  # not often needed, and a descriptor each

    def sleep(self, asleep: bool) -> None:
        """Say whether this consumer waits for :attr:`bell`; look once more after saying so."""
        self.sleepers.say(self._index, asleep)

    def reject(self) -> None:
        """Count a message that made no sense."""
        self._rejected.add(1)

    def count_remote(self, consumers: int) -> None:
        """Say how many consumers elsewhere this one sends to."""
        self._words[consumer_word(self._index, "remote")] = consumers

    # -- ending leases ------------------------------------------------------------------------------------------

    def end(self, lease: Lease) -> None:
        """Release the slot of `lease`; only the process that made the lease does."""
        if os.getpid() != self._pid or self._leases.pop(id(lease), None) is None:
            return
        _, ring, slot, generation = lease.terms
        self._release(ring, slot, generation)
        if self._closing and not self._leases:
            self._leave()

    def end_later(self, lease: Lease) -> None:
        """Note that :meth:`end` was interrupted."""
        if os.getpid() == self._pid:
            self._leases[id(lease)] = lease

    def give_back(self, lease: Lease) -> None:
        """End a lease whose message was not used: it is READY again, for any consumer."""
        if self._leases.pop(id(lease), None) is None:
            return
        _, ring, slot, _ = lease.terms
        if self._put_back(ring, slot):
            self._delivered.add(-1)

    def _put_back(self, ring: Ring, slot: int) -> bool:
        """Make a slot that this consumer has leased READY again; whether it was one."""
        number = slot_lock(ring.number, slot)
        while not self._locks.try_lock(number):  # somebody looks whether we are dead
            time.sleep(0.001)
        try:
            return ring.reclaim(slot, self._index + 1)
        finally:
            self._locks.unlock(number)

    def _release(self, ring: Ring, slot: int, generation: int) -> None:
        if ring.release(slot, generation, self._index + 1):
            self._released.add(1)
        if self._words[WAITING] == FOR_A_SLOT:
            self._producers_bell.ring()

    def close(self) -> None:
        """Take no more messages. Arrays that are still alive stay valid, and the membership lasts as long as they do."""
        if not self._has_left and os.getpid() == self._pid:
            self._closing = True
            self.sleep(False)
            if not self._leases:
                self._leave()

    def finish(self) -> None:
        """Close, and end all leases at once: the process is about to exit in good order."""
        self._closing = True
        for lease in list(self._leases.values()):
            self.end(lease)
        self._leave()

    def _leave(self) -> None:
        if not self._has_left:
            self._has_left = True  # first: the last lease may end in another thread meanwhile
            leaving.leave(self)
            if self._index >= 0:
                self._locks.unlock(consumer_lock(self._index))
            self._locks.close()
            self._rings.clear()
            self._attached = []

    def reclaim_dead(self) -> None:
        """Now and then, make what dead consumers held READY again. For when there is nothing to take."""
        now = time.monotonic()
        if now - self._last_reclaim > RECLAIM_EVERY_S:
            self._last_reclaim = now
            for lease in list(self._leases.values()):
                if lease() is None:  # Ctrl-C hit the call that should have ended it
                    self.end(lease)
            self.sleepers.forget_dead(self._locks)
            reclaimed = reclaim_dead(self._all_rings(), self._locks)
            if reclaimed:
                self._reclaimed.add(reclaimed)
                log.warning("Took back %d messages that a dead consumer of %s had held.", reclaimed, self.place.name)

    def segments(self) -> list[Segment]:
        """The memory of the stream's rings."""
        return [ring.segment for ring in self._all_rings()]

    def explain(self) -> str:
        """The state of the stream in one line, for messages to people."""
        return explain(self.place, self._control, self._all_rings(), self._locks)

    def _all_rings(self) -> list[Ring]:
        words = self._words
        span = (words[FIRST_RING], words[NEXT_RING])
        if span != self._span:
            self._attached = list(attach_rings(self.place, self._control, self._rings))
            if len(self._attached) == span[1] - span[0]:  # else try again: not every failure means that it was removed
                self._span = span
        return self._attached

    def _say_hoarding(self, ring: Ring) -> None:
        if not self._hoarding:
            self._hoarding = True
            log.warning(
                "%d of %d slots of %s are held by consumers; further messages arrive as copies until some are "
                "released. Streaming goes on; to avoid the copies keep fewer items at a time, or raise send_hwm.",
                ring.count(State.LEASED),
                ring.num_slots,
                self.place.name,
            )
