"""The producer's half of a stream: loan a slot, fill it, commit it, wait for room."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ConfigurationError, OutOfSharedMemory, SegmentError, StreamClosed
from ..memory import layout, segment
from ..memory.layout import MAX_SLOTS, PAGE, STREAM_MAGIC, VERSION, align, ring_nbytes, word
from ..memory.locks import PRODUCER_LOCK
from ..memory.ring import Bytes, Ring
from ..memory.segment import Segment
from ..memory.states import State
from ..process import interrupts
from .control import (
    CLOSED,
    EPOCH,
    FIRST_RING,
    FOR_A_SLOT,
    KEY,
    LAST_NS,
    NEXT_RING,
    PUBLISHED,
    RECLAIM_EVERY_S,
    RECLAIMED,
    RESERVE,
    STALLED_NS,
    WAITING,
    Sleepers,
    Spin,
    attach_control,
    attach_rings,
    explain,
    reclaim_dead,
)
from .place import Place

log = logging.getLogger("blendtorch")

MIN_SLOTS = RESERVE + 1
_SLOW_WAIT_S = 0.1  # a waiting producer looks at the table at least this often
_EXPLAIN_EVERY_S = 30.0


class Pin(weakref.ref[Bytes]):
    """Knows until when arrays that a producer was lent are alive; their slot is not loaned again before."""

    __slots__ = ("ring", "slot")
    ring: Ring
    slot: int


def _unpin(pin: Pin) -> None:
    if pin.ring.pins.get(pin.slot) is pin:
        del pin.ring.pins[pin.slot]


interrupts.keep_of(_unpin)


@dataclass
class Loan:
    """A LOANED slot in the producer's hands."""

    ring: Ring
    slot: int
    pin: Pin | None = None
    used: int = 0
    """Bytes at its start that lent arrays occupy."""

    def root(self) -> Bytes | None:
        """The array that all lent arrays are built on, while any of them is alive."""
        return None if self.pin is None else self.pin()

    def lend(self, nbytes: int) -> tuple[Bytes, int] | None:
        """Room for `nbytes` more: the root array and the offset in it; None if there is not so much."""
        root = self.root()
        if root is None:  # what was lent before is gone
            self.used = 0
            root = self.ring.bytes_of(self.slot)
        offset = align(self.used)
        if offset + nbytes > self.ring.slot_nbytes:
            return None
        if self.root() is not root:
            self.pin = Pin(root, _unpin)
            self.pin.ring, self.pin.slot = self.ring, self.slot
            self.ring.pins[self.slot] = self.pin
        self.used = offset + nbytes
        return root, offset


class Writer:
    """The producer's half of a stream.

    Args:
        place: where the stream lives.
        max_ready: messages that may wait unclaimed before the producer stalls.
        num_slots: slots per ring; default `max_ready` + 6, so that consumers can hold a few frames each meanwhile.

    Attributes:
        companion: number of the consumer that lives in this process, if one does.

    Raises:
        SegmentError: another living process is the producer of this stream.
        OutOfSharedMemory: no room for the control segment.
    """

    def __init__(self, place: Place, *, max_ready: int = 10, num_slots: int | None = None) -> None:
        self.place = place
        self.max_ready = max(1, max_ready)
        if not 0 < self.max_ready + (num_slots or 0) <= MAX_SLOTS - 6:
            raise ConfigurationError(
                f"send_hwm={max_ready}, num_slots={num_slots}: a ring has {MAX_SLOTS} slots at most."
            )
        self.num_slots = max(MIN_SLOTS, self.max_ready + 6 if num_slots is None else num_slots)
        self.max_ready = min(self.max_ready, self.num_slots - 1)
        self._locks = place.open_locks()
        self._closed = self._stopping = False
        self._spin = Spin()
        self.companion: int | None = None
        if not self._locks.try_lock(PRODUCER_LOCK):
            self._locks.close()
            raise SegmentError(
                f"Another living process publishes as {place.name}. One instance owns a socket: give each publisher "
                f"a socket name of its own (named_sockets), or close the first."
            )
        try:
            self._bell = place.open_bell(PRODUCER_LOCK)
            self._control = self._create_or_adopt()
            self._words = self._control.words
            self.key = self._words[KEY]
            self._sleepers = Sleepers(place, self._control)
            self._adopt_rings()
        except BaseException:
            self._locks.unlock(PRODUCER_LOCK)
            self._locks.close()
            raise

    def _create_or_adopt(self) -> Segment:
        try:
            control = attach_control(self.place)
        except SegmentError:  # none yet, or one that its creator never finished
            self.place.unlink("")
            control = self.place.create("", layout.CONTROL_NBYTES)
            control.words[KEY] = segment.random_key()
            control.words[word(layout.STREAM_HEADER, "version")] = VERSION
            control.words[word(layout.STREAM_HEADER, "magic")] = STREAM_MAGIC
        control.words[EPOCH] += 1
        control.words[CLOSED] = control.words[WAITING] = 0
        return control

    def _adopt_rings(self) -> None:
        """The rings of an earlier producer, whose READY messages stay for the consumers.

        It may have died anywhere: a ring that was removed is no longer looked for, and one that was not finished is removed.
        """
        self._rings = list(attach_rings(self.place, self._control, {}))  # the last one is current; earlier ones drain
        self.place.unlink(f".{self._words[NEXT_RING]}")
        self.recover()
        if self._rings:
            self._words[FIRST_RING] = self._rings[0].number
            self.max_ready = min(self.max_ready, self._rings[-1].num_slots - 1)

    def recover(self) -> None:
        """After an end or an interrupt anywhere: abort all loans, and count a message that is READY as published."""
        for ring in self._rings:
            self._words[PUBLISHED] = max(self._words[PUBLISHED], ring.next_sequence())
            ring.abort_all()

    @property
    def published(self) -> int:
        """Messages committed so far: the next sequence number."""
        return self._words[PUBLISHED]

    def has_room(self) -> bool:
        """Whether a message may be committed now: fewer than `max_ready` wait to be claimed."""
        ready = 0
        for ring in self._rings:
            ready += ring.count(State.READY)
        return ready < self.max_ready

    def try_loan(self, nbytes: int) -> Loan | None:
        """A slot with room for `nbytes`, if the current ring's slots are large enough and one is free now."""
        if not self._rings or nbytes > self._rings[-1].slot_nbytes:
            return None
        ring = self._rings[-1]
        slot = ring.loan()
        return None if slot is None else Loan(ring, slot)

    def can_lend(self) -> bool:
        """Whether a script may be lent one more slot: what it keeps must not starve the stream."""
        return bool(self._rings) and len(self._rings[-1].pins) < RESERVE - 1

    def loan(self, nbytes: int) -> Loan:
        """A slot with room for `nbytes`, waiting for one as long as it takes; opens a larger ring if needed.

        Raises:
            OutOfSharedMemory: a larger ring is needed, and does not fit into shared memory.
            StreamClosed: closed meanwhile.
        """
        while (loan := self.try_loan(nbytes)) is None:
            if not self._rings or nbytes > self._rings[-1].slot_nbytes:
                self._open_ring(nbytes)
            else:
                self._wait(self._rings[-1].has_free, wake_below=FOR_A_SLOT)
        return loan

    def wait_for_room(self) -> None:
        """Return when :meth:`has_room`."""
        interrupts.raise_kept()
        if not self.has_room():
            self._wait(self.has_room, wake_below=(self.max_ready + 1) // 2)

    def wait_for_slot(self, patience_s: float = math.inf) -> None:
        """Return when a slot is free, or after `patience_s`."""
        if self._rings and not self._rings[-1].has_free():
            self._wait(self._rings[-1].has_free, wake_below=FOR_A_SLOT, patience_s=patience_s)

    def commit(self, loan: Loan, payload_nbytes: int, header: bytes, flags: int) -> None:
        """Make the loan's message READY, under the sequence number :attr:`published`."""
        words = self._words
        sequence = words[PUBLISHED]
        loan.ring.commit(loan.slot, sequence, payload_nbytes, header, flags)
        words[PUBLISHED] = sequence + 1
        words[LAST_NS] = time.monotonic_ns()
        if len(self._rings) > 1:
            self._retire_rings()

    def show_life(self) -> None:
        """Let those who watch the stream know that its producer gets on with a message."""
        self._words[LAST_NS] = time.monotonic_ns()

    def wake_a_consumer(self) -> None:
        """If consumers sleep, wake one, and :attr:`companion`."""
        self._sleepers.wake_one(self.companion)

    def stop_waiting(self) -> None:
        """Let whatever waits for room in another thread raise StreamClosed, now and from now on."""
        self._stopping = True
        self._bell.ring()

    def close(self) -> None:
        """Stop publishing. READY messages stay for the consumers; the launcher removes the memory."""
        if self._closed:
            return
        self._closed = True
        self.recover()
        self._words[CLOSED] = 1
        self._locks.unlock(PRODUCER_LOCK)
        self._locks.close()
        self._sleepers.forget_bells()

    def _open_ring(self, nbytes: int) -> None:
        """Slots for messages of `nbytes` from now on; by half larger at least, so that slowly growing messages open few rings."""
        slot_nbytes = align(nbytes + nbytes // 16, PAGE)
        if self._rings:
            slot_nbytes = max(slot_nbytes, align(self._rings[-1].slot_nbytes * 3 // 2, PAGE))
        number = self._words[NEXT_RING]
        num_slots = self.num_slots
        self.place.unlink(f".{number}")  # Ctrl-C came when it was nearly made
        while True:
            try:
                memory = self.place.create(f".{number}", ring_nbytes(num_slots, slot_nbytes))
                break
            except OutOfSharedMemory as error:
                if num_slots == MIN_SLOTS:
                    raise
                num_slots = max(MIN_SLOTS, num_slots // 2)
                log.warning("%s Trying with %d slots, which lets the producer run less far ahead.", error, num_slots)
        self._rings.append(Ring.format(memory, self.key, number, num_slots, slot_nbytes))
        self.max_ready = min(self.max_ready, num_slots - 1)
        self._words[NEXT_RING] = number + 1
        self._retire_rings()

    def _retire_rings(self) -> None:
        """Remove earlier rings whose messages have all been consumed."""
        for ring in self._rings[:-1]:
            if ring.count(State.FREE) == ring.num_slots:
                self.place.unlink(f".{ring.number}")
                self._rings.remove(ring)
        self._words[FIRST_RING] = self._rings[0].number

    def _wait(self, enough: Callable[[], bool], wake_below: int, patience_s: float = math.inf) -> None:
        """Return when `enough`, or after `patience_s`. Consumers wake us when they leave fewer than `wake_below` messages
        READY: not for each one that they take, which would cost two switches between processes a message, but in time to have
        some more ready.
        """
        words = self._words
        start = reclaimed = explained = counted = time.monotonic()
        self._spin.begin()
        try:
            while not enough():
                self._check_open()
                if self._spin.goes_on():
                    continue
                words[WAITING] = wake_below
                if enough():
                    break
                self._bell.wait(_SLOW_WAIT_S)
                self._check_open()
                now = time.monotonic()
                words[STALLED_NS] += int((now - counted) * 1e9)  # as it goes: by this, who watches knows that we live
                counted = now
                if now - start > patience_s:
                    break
                if now - reclaimed > RECLAIM_EVERY_S:
                    reclaimed = now
                    words[RECLAIMED] += reclaim_dead(self._rings, self._locks)
                if now - explained > _EXPLAIN_EVERY_S:
                    explained = now
                    log.warning("Publishing has waited for room for %.0f s. %s.", now - start, self.explain())
        finally:
            words[WAITING] = 0
            words[STALLED_NS] += int((time.monotonic() - counted) * 1e9)
            self._spin.end()

    def _check_open(self) -> None:
        if self._stopping:
            raise StreamClosed(f"{self.place.name} was closed while publishing waited for room.")

    def explain(self) -> str:
        """The state of the stream in one line, for messages to people."""
        return explain(self.place, self._control, self._rings, self._locks)
