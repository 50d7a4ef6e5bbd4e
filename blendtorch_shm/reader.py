"""A consumer's half of a stream: claim a message, lease its slot for as long as its arrays live, release it.

The slot table is the truth. An announcement says where to look; if it is lost (ZeroMQ drops what sits in a dead
peer's queue), :meth:`Reader.take_oldest` finds the READY slot; if it is repeated, its claim fails. So nobody ever re-sends
anything, and the frames of a dead producer are found as well as those of a living one.

A lease is a weak reference to the array that all arrays of the message are built on. When the last view of it has gone, in
whatever thread, the slot is FREE again. A process that dies holds its leases no longer, as the kernel says by way of
its member lock, and whoever notices makes them READY again (:func:`reclaim_dead`).
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing.util
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from . import layout
from .errors import SegmentError
from .layout import CONTROL_NBYTES, FLAG_LOCAL_ONLY, MAX_CONSUMERS, STREAM_MAGIC, consumer_word, word
from .locks import PRODUCER_LOCK, Locks, consumer_lock, slot_lock
from .place import Place
from .ring import Bytes, Ring, check_header
from .segment import Segment
from .states import State
from .wire import Announcement

log = logging.getLogger("blendtorch")

RESERVE = 3
"""Slots per ring that consumers leave to the producer: at more leases than the rest, messages are handed out as copies."""
_RECLAIM_EVERY_S = 0.5

_MAGIC = word(layout.STREAM_HEADER, "magic")
_VERSION = word(layout.STREAM_HEADER, "version")
_KEY = word(layout.STREAM_HEADER, "key")
_FIRST_RING = word(layout.STREAM_HEADER, "first_ring")
_NEXT_RING = word(layout.STREAM_HEADER, "next_ring")
_WAITING = word(layout.STREAM_HEADER, "waiting")
_PUBLISHED = word(layout.STREAM_HEADER, "published")
_LAST_NS = word(layout.STREAM_HEADER, "last_published_ns")


class Claimed(NamedTuple):
    """A message that this process alone has."""

    header: bytes
    payload: Bytes
    """(n,) uint8. Either the slot itself, leased until the last view of this array has gone, or a copy."""


class Lease(weakref.ref[Bytes]):
    """Ends when the array that it refers to has gone. Works from any thread, and takes no lock that could be held."""

    __slots__ = ("terms",)
    terms: tuple[Reader, Ring, int, int]
    """Whose it is, and which ring, slot and generation it is about."""


def _lease_ended(lease: Lease) -> None:
    lease.terms[0].end(lease)


class Counter:
    """A word in shared memory that only this process writes."""

    __slots__ = ("_at", "_words")

    def __init__(self, words: memoryview, at: int) -> None:
        self._words = words
        self._at = at

    def add(self, n: int) -> None:
        """Count `n` more."""
        self._words[self._at] += n


class Reader:
    """One consumer's membership in a stream.

    Args:
        place: where the stream lives.

    Raises:
        SegmentError: the stream does not exist (yet), or has :data:`~blendtorch_shm.layout.MAX_CONSUMERS` consumers.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._control = attach_control(place)
        self._words = self._control.words
        self.key = self._words[_KEY]
        self._room = place.open_room(create=False)
        self._rings: dict[int, Ring] = {}
        self._leases: dict[int, Lease] = {}
        self._pid = os.getpid()
        self._closing = False
        self._last_reclaim = 0.0
        self._hoarding = False
        self._locks = place.open_locks()
        try:
            self._index = self._join()
        except BaseException:
            self._locks.close()
            raise
        self._words[consumer_word(self._index, "pid")] = self._pid
        self._delivered, self._released, self._copied, self._rejected, self._reclaimed = (
            Counter(self._words, consumer_word(self._index, name))
            for name in ("delivered", "released", "copied", "rejected", "reclaimed")
        )
        _register(self)

    def _join(self) -> int:
        for index in range(MAX_CONSUMERS):
            if self._locks.try_lock(consumer_lock(index)):
                owner = index + 1  # what a dead member of the same number still held
                for ring in self._all_rings():
                    _reclaim(ring, self._locks, lambda found, owner=owner: found == owner)  # type: ignore[misc]
                return index
        raise SegmentError(f"{self.place.name} has {MAX_CONSUMERS} consumer processes already, which is the limit.")

    # -- taking messages ----------------------------------------------------------------------------------------

    def take(self, announced: Announcement) -> Claimed | None:
        """The announced message, or None if somebody else has it (had it), or there is no room to lend it out."""
        ring = self._ring(announced.ring)
        if ring is None or announced.slot >= ring.num_slots:
            return None
        return self._take(ring, announced.slot, announced.generation)

    def take_oldest(self, *, copy: bool = True, local: bool = True) -> Claimed | None:
        """The oldest READY message of the stream, announced or not; None if there is none.

        Args:
            copy: whether a copy will do when too many slots are leased; otherwise such messages stay READY.
            local: whether messages may be taken that must not leave this host.
        """
        self._reclaim_now_and_then()
        found = [(ring.sequence(slot), ring, slot) for ring in self._all_rings() for slot in ring.ready()]
        for _, ring, slot in sorted(found, key=lambda entry: entry[0]):
            if not copy and ring.count(State.LEASED) >= ring.num_slots - RESERVE:
                return None
            if not local and ring.info(slot).flags & FLAG_LOCAL_ONLY:
                continue
            claimed = self._take(ring, slot, ring.generation(slot))
            if claimed is not None:
                return claimed
        return None

    def _take(self, ring: Ring, slot: int, generation: int) -> Claimed | None:
        number = slot_lock(ring.number, slot)
        owner = self._index + 1
        if not self._locks.try_lock(number):
            return None  # somebody is claiming it right now; if he dies over it, it is still READY
        try:
            if not ring.claim(slot, generation, owner):
                return None
        finally:
            self._locks.unlock(number)
        self._delivered.add(1)
        try:
            header, payload_nbytes, _ = ring.message(slot)
        except SegmentError:
            self._release(ring, slot, generation)
            raise
        root = ring.bytes_of(slot)
        payload = root[:payload_nbytes]
        if payload_nbytes == 0 or ring.count(State.LEASED) > ring.num_slots - RESERVE:
            payload = payload.copy()
            self._release(ring, slot, generation)
            if payload_nbytes:
                self._copied.add(1)
                self._say_hoarding(ring)
        else:
            lease = Lease(root, _lease_ended)
            lease.terms = (self, ring, slot, generation)
            self._leases[id(lease)] = lease
        return Claimed(header, payload)

    def reject(self) -> None:
        """Count a message or announcement that made no sense."""
        self._rejected.add(1)

    # -- ending leases ------------------------------------------------------------------------------------------

    def end(self, lease: Lease) -> None:
        """Release the slot of `lease`; only the process that made the lease does."""
        if os.getpid() != self._pid or self._leases.pop(id(lease), None) is None:
            return
        _, ring, slot, generation = lease.terms
        self._release(ring, slot, generation)
        if self._closing and not self._leases:
            self._leave()

    def _release(self, ring: Ring, slot: int, generation: int) -> None:
        if ring.release(slot, generation, self._index + 1):
            self._released.add(1)
        if self._words[_WAITING]:
            self._room.release()

    def close(self) -> None:
        """Take no more messages. Arrays that are still alive stay valid, and the membership lasts as long as they do."""
        if not self._closing and os.getpid() == self._pid:
            self._closing = True
            if not self._leases:
                self._leave()

    def finish(self) -> None:
        """Close, and end all leases at once: the process is about to exit in good order."""
        self._closing = True
        for lease in list(self._leases.values()):
            self.end(lease)
        self._leave()

    def _leave(self) -> None:
        if self in _readers:
            _readers.discard(self)
            self._locks.unlock(consumer_lock(self._index))
            self._locks.close()
            self._rings.clear()

    def explain(self) -> str:
        """The state of the stream in one line, for error messages."""
        published = self._words[_PUBLISHED]
        ago = f", the last one {(time.monotonic_ns() - self._words[_LAST_NS]) / 1e9:.1f} s ago" if published else ""
        states = [ring.states() for ring in self._all_rings()]
        ready, leased = (sum(s.count(state) for s in states) for state in (State.READY, State.LEASED))
        alive = "alive" if self._locks.is_held(PRODUCER_LOCK) else "gone"
        return (
            f"{self.place.name}: producer {alive}, {published} messages published{ago}; "
            f"{ready} of {sum(map(len, states))} slots hold messages that nobody has taken, {leased} are in use by consumers"
        )

    # -- rings --------------------------------------------------------------------------------------------------

    def _ring(self, number: int) -> Ring | None:
        ring = self._rings.get(number)
        if ring is None and number < self._words[_NEXT_RING]:
            try:
                ring = self._rings[number] = Ring.attach(self.place.attach(f".{number}"), self.key)
            except SegmentError:
                return None  # removed meanwhile: all its messages have been consumed
            self._forget_rings()
        return ring

    def _all_rings(self) -> Iterator[Ring]:
        for number in range(self._words[_FIRST_RING], self._words[_NEXT_RING]):
            ring = self._ring(number)
            if ring is not None:
                yield ring

    def _forget_rings(self) -> None:
        for number in [n for n in self._rings if n < self._words[_FIRST_RING]]:
            del self._rings[number]  # unmapped with its last lease

    def _reclaim_now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._last_reclaim > _RECLAIM_EVERY_S:
            self._last_reclaim = now
            reclaimed = reclaim_dead(self._all_rings(), self._locks)
            if reclaimed:
                self._reclaimed.add(reclaimed)
                log.warning("Took back %d messages that a dead consumer of %s had held.", reclaimed, self.place.name)

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


def attach_control(place: Place) -> Segment:
    """The control segment of the stream at `place`.

    Raises:
        SegmentError: there is none, or it is of another version.
    """
    control = place.attach("")
    if control.nbytes < CONTROL_NBYTES:
        raise SegmentError(f"{control.name} has {control.nbytes} bytes, a control segment has {CONTROL_NBYTES}.")
    check_header(control, control.words[_MAGIC], STREAM_MAGIC, control.words[_VERSION])
    return control


def attach_rings(place: Place, control: Segment, key: int) -> Iterator[Ring]:
    """The rings of the stream that still exist, oldest first."""
    for number in range(control.words[_FIRST_RING], control.words[_NEXT_RING]):
        try:
            yield Ring.attach(place.attach(f".{number}"), key)
        except SegmentError:
            continue


def reclaim_dead(rings: Iterable[Ring], locks: Locks) -> int:
    """Make what dead consumers had leased READY again.

    Returns:
        the number of messages.
    """
    return sum(_reclaim(ring, locks, lambda owner: not locks.is_held(consumer_lock(owner - 1))) for ring in rings)


def _reclaim(ring: Ring, locks: Locks, is_dead: Callable[[int], bool]) -> int:
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


# -- leaving in good order ----------------------------------------------------------------------------------------

_readers: set[Reader] = set()  # strong: a reader must outlive its leases, whatever the user drops
_registered_pid = 0


def _register(reader: Reader) -> None:
    """Have the reader's leases end when this process exits, so that nobody takes them for those of a dead one."""
    global _registered_pid
    if _registered_pid != os.getpid():
        _registered_pid = os.getpid()
        _readers.clear()
        atexit.register(_finish_all)
        multiprocessing.util.Finalize(None, _finish_all, exitpriority=0)  # children of multiprocessing run no atexit
    _readers.add(reader)


def _finish_all() -> None:
    for reader in list(_readers):
        if reader._pid == os.getpid():
            reader.finish()
