"""A ring: slots of one size in one segment, and the only code that changes a slot's state.

The state bytes lie side by side, so looking for a slot is one copy and one ``bytes.find``. A producer takes the *lowest*
free slot. Since frames are mostly released in the order in which they were made, this keeps re-using the few slots that
were freed last, which are still in the caches (at 4K, 13 GB/s against 9 for going round); the order of frames is that of
their sequence numbers and never that of slots.

Nothing here waits, and nothing here knows about processes beyond the owner number in a lease. :meth:`Ring.try_claim` takes the
slot's lock itself, by one bare pair of system calls; for the other steps that need it, the caller holds it.
"""

from __future__ import annotations

import fcntl
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SegmentError, SegmentMissing
from . import layout
from .layout import CACHE_LINE, FLAG_AGAIN, MAX_RINGS, MAX_SLOTS, RING_MAGIC, VERSION, align, ring_nbytes, word
from .locks import SETLK, lock_request, slot_lock, unlock_request
from .own_pages import OwnPages, Window, address_of, page_faults
from .segment import Segment
from .states import SOURCE, TARGET, Event, State

Bytes = npt.NDArray[np.uint8]

_READY, _LEASED, _FREE = int(State.READY), int(State.LEASED), int(State.FREE)  # plain ints: this is the hot path
_NO_SEQUENCE = 2**64 - 1  # of a slot whose message never was
_IS_UNUSED = bytes(state != State.LEASED for state in range(256))
_RECORD_WORDS = layout.SLOT_RECORD.itemsize // 8


@dataclass(frozen=True)
class SlotInfo:
    """What a slot holds, as its record says; a look that claims nothing."""

    slot: int
    state: State
    generation: int
    sequence: int
    owner: int
    payload_nbytes: int
    header_nbytes: int
    flags: int


class Ring:
    """The slots of one ring segment. Make it with :meth:`format` or :meth:`attach`.

    Attributes:
        segment: that it lies in.
        number: which ring of the stream it is.
        num_slots, slot_nbytes: how many slots it has, and of what size.
        generation: of each slot, how often it was committed. This and the next three are shared memory, to be read only.
        sequence: of each slot, the number of its message in the stream.
        owner: of each slot, who leases it, 0 for nobody.
        flags: of each slot, those of its message.
        pins: slots into which this process still holds arrays that it was lent (producer only).

    Example::

        ring = Ring.attach(place.attach(".0"), control.key, 0)
        for slot in ring.ready():
            print(ring.sequence[slot], ring.info(slot))
    """

    def __init__(self, segment: Segment, number: int, num_slots: int, slot_nbytes: int) -> None:
        self.segment = segment
        self.number = number
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        self._states = segment.view[layout.STATES_OFFSET : layout.STATES_OFFSET + num_slots]
        first_word = layout.records_offset(num_slots) // 8
        records = segment.words[first_word : first_word + num_slots * _RECORD_WORDS]
        self.generation, self.sequence, self.owner, self._payload_nbytes, self._header_nbytes, self.flags = (
            records[word(layout.SLOT_RECORD, field) :: _RECORD_WORDS]  # of all slots
            for field in ("generation", "sequence", "owner", "payload_nbytes", "header_nbytes", "flags")
        )
        first = layout.slots_offset(num_slots)
        self._starts = range(first, first + num_slots * slot_nbytes, slot_nbytes)
        self._own = segment.own
        self._slots = [segment.view[start : start + slot_nbytes] for start in self._starts]
        own_view = segment.view if self._own is None else self._own.view
        self._writable = [own_view[start : start + slot_nbytes] for start in self._starts]
        self._faulted = bytearray(num_slots)
        self._page_faults = 0
        """How many this process had had when it asked last."""
        self._was_unused = bytearray(num_slots)
        """Of each slot, whether it was LEASED neither then, nor to this process since: one answer does for a round of slots."""
        self._clean_at, self._clean_nbytes = [-1] * num_slots, [0] * num_slots
        """Of each slot, how many page faults there had been when its own pages showed what is shared, and how many bytes."""
        self._requests: list[tuple[bytes, bytes] | None] = [None] * num_slots  # to lock and unlock each slot
        self.pins: dict[int, weakref.ref[Any]] = {}

    @staticmethod
    def format(segment: Segment, key: int, number: int, num_slots: int, slot_nbytes: int) -> Ring:
        """Write the header of a new ring into a zeroed `segment`; all slots are FREE."""
        if not 1 <= num_slots <= MAX_SLOTS or slot_nbytes % layout.PAGE or slot_nbytes <= 0:
            raise ValueError(f"a ring of {num_slots} slots of {slot_nbytes} bytes is not possible")
        header = dict(version=VERSION, key=key, number=number, num_slots=num_slots, slot_nbytes=slot_nbytes)
        for field, value in header.items():
            segment.words[word(layout.RING_HEADER, field)] = value
        segment.words[word(layout.RING_HEADER, "magic")] = RING_MAGIC  # last: a half-written header is no ring
        return Ring(segment, number, num_slots, slot_nbytes)

    @staticmethod
    def attach(segment: Segment, key: int, number: int) -> Ring:
        """Ring `number` of the stream `key`, which another process formatted.

        Raises:
            SegmentError: it is not a ring of this stream and version, or smaller than its header says.
        """
        check_header(segment, RING_MAGIC)
        found_key, found_number, num_slots, slot_nbytes = (
            segment.words[word(layout.RING_HEADER, field)] for field in ("key", "number", "num_slots", "slot_nbytes")
        )
        if (found_key, found_number) != (key, number):
            raise SegmentError(f"{segment.name} is not ring {number} of this stream.")
        if number >= MAX_RINGS or not 1 <= num_slots <= MAX_SLOTS or slot_nbytes == 0 or slot_nbytes % layout.PAGE:
            raise SegmentError(
                f"{segment.name} claims to be ring {number}, {num_slots} slots of {slot_nbytes} bytes, which cannot be."
            )
        if ring_nbytes(num_slots, slot_nbytes) > segment.nbytes:
            raise SegmentError(
                f"{segment.name} has {segment.nbytes} bytes, but its header claims {num_slots} slots of {slot_nbytes} bytes."
            )
        return Ring(segment, number, num_slots, slot_nbytes)

    # -- looking ------------------------------------------------------------------------------------------------

    def count(self, state: State) -> int:
        """How many slots are in `state`."""
        return self._states.tobytes().count(state)

    def states(self) -> bytes:
        """A copy of the state bytes."""
        return self._states.tobytes()

    def ready(self) -> list[int]:
        """The READY slots, oldest message first."""
        states = self._states.tobytes()
        slots = []
        slot = states.find(_READY)
        while slot >= 0:
            slots.append(slot)
            slot = states.find(_READY, slot + 1)
        if len(slots) > 1:
            slots.sort(key=self.sequence.__getitem__)
        return slots

    def oldest_ready(self) -> int:
        """The READY slot with the oldest message, or -1."""
        states = self._states.tobytes()
        oldest = states.find(_READY)
        if oldest >= 0:
            slot = states.find(_READY, oldest + 1)
            if slot >= 0:
                sequence = self.sequence
                lowest = sequence[oldest]
                while slot >= 0:
                    if sequence[slot] < lowest:
                        oldest, lowest = slot, sequence[slot]
                    slot = states.find(_READY, slot + 1)
        return oldest

    def next_sequence(self) -> int:
        """One more than the largest sequence number committed here of which there is a trace."""
        following = 0
        for slot, state in enumerate(self.states()):
            if state != State.LOANED and self.generation[slot] and self.sequence[slot] != _NO_SEQUENCE:
                following = max(following, self.sequence[slot] + 1)
        return following

    def info(self, slot: int) -> SlotInfo:
        """The record of `slot`.

        Raises:
            SegmentError: it is in no state that exists.
        """
        return SlotInfo(
            slot,
            self._state(slot),
            self.generation[slot],
            self.sequence[slot],
            self.owner[slot],
            self._payload_nbytes[slot],
            self._header_nbytes[slot],
            self.flags[slot],
        )

    def message(self, slot: int) -> tuple[bytes, int, int, int, int]:
        """Header bytes, size of the arrays in bytes, generation, sequence number and flags of the message in `slot`.

        Raises:
            SegmentError: the record points outside the slot.
        """
        payload_nbytes, header_nbytes = self._payload_nbytes[slot], self._header_nbytes[slot]
        header_at = -(-payload_nbytes // CACHE_LINE) * CACHE_LINE
        if header_at + header_nbytes > self.slot_nbytes:
            raise SegmentError(
                f"Slot {slot} of {self.segment.name} claims {payload_nbytes} + {header_nbytes} bytes and has {self.slot_nbytes}."
            )
        header = self._slots[slot][header_at : header_at + header_nbytes].tobytes()
        return header, payload_nbytes, self.generation[slot], self.sequence[slot], self.flags[slot]

    def memory(self, slot: int) -> memoryview:
        """The bytes of `slot`, shared and writable; mapped as a whole at first use."""
        if not self._faulted[slot]:
            self._faulted[slot] = 1
            self.segment.prefault(self._starts[slot], self.slot_nbytes)
        return self._slots[slot]

    def payload(self, slot: int, nbytes: int) -> Bytes:
        """The arrays of the message in `slot`, of `nbytes`, for who may write there."""
        own = self._own
        if own is None or nbytes == 0:
            return np.frombuffer(self.memory(slot), np.uint8, nbytes)
        if self._was_unused[slot]:
            self._was_unused[slot] = 0
        else:
            # Before the question: what is used then does not count.
            was_unused = self._states.tobytes().translate(_IS_UNUSED)
            self._page_faults = page_faults()
            self._was_unused = bytearray(was_unused)
        if self._clean_at[slot] != self._page_faults or self._clean_nbytes[slot] < nbytes:
            self._renew(own, slot, nbytes)
        return np.frombuffer(self._writable[slot], np.uint8, nbytes)

    def _renew(self, own: OwnPages, slot: int, nbytes: int) -> None:
        """See to it that the own pages of `slot` show what is shared."""
        start = self._starts[slot]
        if not self._faulted[slot]:
            self._faulted[slot] = 1
            own.prefault(start, self.slot_nbytes)
        tells = own.renew(start, nbytes)
        self._clean_nbytes[slot] = nbytes
        self._clean_at[slot] = self._page_faults if tells else -1

    def keep(self, slot: int, nbytes: int) -> None:
        """Copy the pages of the message in `slot`, so that its arrays stay as they are when the slot is used again. Without own
        pages, do nothing.
        """
        if self._own is not None and nbytes:
            self._clean_at[slot] = -1
            self._own.keep(self._starts[slot], nbytes)

    def window(self, slot: int) -> Window:
        """The bytes of `slot` at an address of their own, for arrays that a script is lent.

        Raises:
            OSError: the process may not map so much, or has no file descriptor left.
        """
        start = self._starts[slot]
        return Window(self.segment, start, self.slot_nbytes, address_of(self.segment.view) + start)

    def pinned(self) -> int:
        """How many slots this process still holds arrays in. Forgets the others; called by the producer, in a call of its own."""
        for slot, pin in list(self.pins.items()):
            if pin() is None:
                self.pins.pop(slot, None)
        return len(self.pins)

    def has_free(self) -> bool:
        """Whether :meth:`loan` would find a slot."""
        return self._find_free() is not None

    # -- the producer's steps -----------------------------------------------------------------------------------

    def loan(self) -> int | None:
        """Take the lowest FREE slot that this process has no lent arrays in, or None."""
        slot = self._find_free()
        if slot is not None:
            self._move(slot, Event.LOAN)
        return slot

    def _find_free(self) -> int | None:
        states = self._states.tobytes()
        slot = states.find(_FREE)
        while (pin := self.pins.get(slot)) is not None and pin() is not None:
            slot = states.find(_FREE, slot + 1)
        return None if slot < 0 else slot

    def abort(self, slot: int) -> None:
        """Give back a loaned slot unused; what a commit that was cut short has left in its record counts for nothing."""
        self.sequence[slot] = _NO_SEQUENCE
        self._move(slot, Event.ABORT)

    def abort_all(self) -> None:
        """Give back every loaned slot."""
        for slot, state in enumerate(self.states()):
            if state == State.LOANED:
                self.abort(slot)

    def commit(self, slot: int, sequence: int, payload_nbytes: int, header: bytes, flags: int = 0) -> None:
        """Store the message header behind the arrays, and make the slot READY."""
        header_at = align(payload_nbytes)
        self._slots[slot][header_at : header_at + len(header)] = header
        self.generation[slot] += 1
        self.sequence[slot] = sequence
        self.owner[slot] = 0
        self._payload_nbytes[slot] = payload_nbytes
        self._header_nbytes[slot] = len(header)
        self.flags[slot] = flags
        self._move(slot, Event.COMMIT)

    # -- the consumers' steps -----------------------------------------------------------------------------------

    def try_claim(self, slot: int, owner: int, fd: int) -> bool | None:
        """Lease the READY slot to `owner` under its lock.

        After False, look again: the slot may be READY by now, and other consumers passed it over while this held its lock.

        An interrupt may leave the slot locked, and LEASED: see :meth:`~blendtorch_shm.stream.consumer.Consumer.reconcile`.

        Args:
            slot: its number.
            owner: of the lease: number of the consumer, plus one.
            fd: the owner's description of the lock file.

        Returns:
            True; False if the slot was not READY any more; None if somebody else has its lock.
        """
        lock, unlock = self._requests[slot] or self._make_requests(slot)
        try:
            fcntl.fcntl(fd, SETLK, lock)
        except (BlockingIOError, PermissionError):
            return None
        claimed = self.claim(slot, owner)
        fcntl.fcntl(fd, SETLK, unlock)
        return claimed

    def _make_requests(self, slot: int) -> tuple[bytes, bytes]:
        number = slot_lock(self.number, slot)
        requests = self._requests[slot] = lock_request(number), unlock_request(number)
        return requests

    def claim(self, slot: int, owner: int) -> bool:
        """Lease the slot to `owner` if it is READY. The caller holds the slot's lock."""
        if self._states[slot] != _READY:
            return False
        self.owner[slot] = owner
        self._states[slot] = _LEASED
        return True

    def release(self, slot: int, generation: int, owner: int) -> bool:
        """End `owner`'s lease. False if the lease is no longer its own."""
        if self._states[slot] != _LEASED or self.generation[slot] != generation or self.owner[slot] != owner:
            return False
        self._states[slot] = _FREE
        return True

    def reclaim(self, slot: int, owner: int) -> bool:
        """Make READY again what `owner` leased and has not finished. The caller holds the slot's lock, and is `owner`, or knows
        that it is dead.
        """
        if self._states[slot] != _LEASED or self.owner[slot] != owner:
            return False
        self.flags[slot] |= FLAG_AGAIN
        self._move(slot, Event.RECLAIM)
        self.owner[slot] = 0  # last: if we die before the line above, the lease must still name its dead owner
        return True

    def __repr__(self) -> str:
        return f"<Ring {self.number} of {self.num_slots} slots of {self.slot_nbytes} bytes, {self.count(State.READY)} READY>"

    def _move(self, slot: int, event: Event) -> None:
        if self._states[slot] != SOURCE[event]:
            state = self._state(slot)
            raise SegmentError(f"Slot {slot} of ring {self.number} is {state.name}: {event.name} is not possible.")
        self._states[slot] = TARGET[event]

    def _state(self, slot: int) -> State:
        try:
            return State(self._states[slot])
        except ValueError as error:
            raise SegmentError(f"Slot {slot} of ring {self.number}: {error}.") from None


def check_header(segment: Segment, magic: int) -> None:
    """Refuse a segment that is something else or of another version. The headers of rings and streams begin alike."""
    if segment.nbytes < layout.PAGE or segment.words[word(layout.RING_HEADER, "magic")] != magic:
        raise SegmentMissing(
            f"{segment.name} of {segment.nbytes} bytes is not what its name says (or its creator has not finished)."
        )
    version = segment.words[word(layout.RING_HEADER, "version")]
    if version != VERSION:
        raise SegmentError(
            f"{segment.name} has memory layout {version}, this program understands {VERSION}: "
            f"use the same version of blendtorch-shm on both sides."
        )
