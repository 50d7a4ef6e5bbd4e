"""A consumer's half of a stream: claim a message, lease its slot for as long as its arrays live, release it.

The slot table is the truth, and a consumer looks nowhere else: the oldest READY message is next. Numbers of slots only wake who
sleeps. So a number sent to a consumer that just died costs a moment and no message, and the messages of a dead producer are
found as well as those of a living one.

A process that dies holds its leases no longer, as the kernel says by way of its member lock, and whoever notices makes them READY
again (reclaim.py).
"""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import time
import weakref
from collections.abc import Generator, Iterator

from ..closing import Closable
from ..errors import OutOfSharedMemory, SegmentError, WireError
from ..memory.layout import FLAG_AGAIN, FLAG_LOCAL_ONLY, FOR_A_SLOT, RESERVE, STREAM_HEADER, word
from ..memory.locks import slot_lock
from ..memory.ring import Bytes, Ring
from ..memory.segment import Segment
from ..memory.states import State
from ..message.wire import Decoder, Message
from ..process import forks, interrupts, leaving
from .control import RECLAIM_EVERY_S, Control
from .lease import Calls, Claimed, Lease
from .membership import Membership
from .place import Place
from .reclaim import reclaim_dead
from .rings import Rings
from .waiting import Sleepers

log = logging.getLogger("blendtorch.stream")

_SHARED_FOR = 64
"""A stream counts as shared for so many messages after one that another consumer took."""

_LEASED, _READY = State.LEASED, State.READY
_WAITING = word(STREAM_HEADER, "waiting")


_of_this_process: weakref.WeakSet[Consumer] = weakref.WeakSet()
"""Whoever looks after one consumer mends all: one that is closed, or whose source is gone, is never called again."""


class Consumer(Closable):
    """One consumer of one stream, from joining until its last lease has ended.

    It is one *lane* of a :class:`~.merge.Source`; over TCP, the producer's forwarder is a consumer, too.

    Args:
        place: where the stream lives.
        calls: those of the source that this is a lane of, so that messages of a call that was cut short are put back. None:
            whoever made the consumer ends or gives back the leases itself.
        own: arrays lie in pages of our own, so that whoever gets a message after us gets it as it was published, whatever we
            wrote to it in place.
        forwards: whether this is the producer's forwarder, whose place at the stream is kept for it.

    Attributes:
        place: where the stream lives.
        key: of the stream; its slot numbers carry it.
        index: which of the stream's consumers this is.
        sleepers: the consumers of the stream that sleep.

    Raises:
        SegmentError: the stream does not exist (yet), is of another version, or has as many consumers as it can have.

    Example::

        with Consumer(place) as consumer:
            while (message := consumer.take()) is not None:
                print(message.fields)
    """

    def __init__(self, place: Place, calls: Calls | None = None, *, own: bool = False, forwards: bool = False) -> None:
        self.place = place
        self._calls = calls if calls is not None else Calls()
        self._control = Control.attach(place)
        self._words = self._control.words
        self.key: int = self._control.key
        self._rings = Rings(place, self._control, own=own)
        self._bell = place.open_bell()
        self._decoder = Decoder(trusted=True)
        self._leases: dict[int, Lease] = {}  # by id
        self._closing = self._hoarding = False
        self._last_reclaim = 0.0
        self._last_sequence, self._shared_until = -1, 0
        self.sleepers = Sleepers(place, self._control)
        self._member = Membership(place, self._control, self._rings, forwards=forwards)
        self.index = self._member.index
        forks.register(self)
        forks.before(self)
        _of_this_process.add(self)
        self.reclaim_dead()  # first of all, so that who replaces a dead consumer gets what that one held in its order

    # -- taking messages ----------------------------------------------------------------------------------------

    def take(self) -> Message | None:
        """The oldest READY message of the stream, or None if there is none, or if it cannot be opened: then it was noted."""
        ring, slot = None, -1
        for candidate in self._rings.now():
            oldest = candidate.oldest_ready()
            if oldest >= 0 and (ring is None or candidate.sequence[oldest] < ring.sequence[slot]):
                ring, slot = candidate, oldest
        if ring is None:
            return None
        member = self._member
        claimed = ring.try_claim(slot, member.owner, member.locks.fd)
        if not claimed:
            found = self._claim_oldest(tells=claimed is False)
            if found is None:
                return None
            ring, slot = found
        if self._words[_WAITING]:
            self._wake_producer_if_few(ring)
        message = self._open(ring, slot)
        if message is not None:
            if message.sequence != self._last_sequence + 1:
                self._shared_until = message.sequence + _SHARED_FOR
            self._last_sequence = message.sequence
        return message

    def take_many(self, count: int) -> list[Message]:
        """The oldest READY messages of the stream that lie in one ring, `count` at most. None of them is a copy: a third of the
        slots that consumers may hold is left to other consumers, so that these need not copy either.
        """
        ready = self._ready()
        if not ready:
            return []
        ring, slots = ready[0]
        room = (ring.num_slots - RESERVE) * 2 // 3 - ring.count(_LEASED)
        messages = []
        for run in _neighbours(slots[: max(0, min(count, room))]):
            claimed = self._claim_run(ring, run)
            if len(claimed) < len(run):
                self.pass_on()  # whoever looked while the others were locked in vain passed them over
            self._wake_producer_if_few(ring)
            for slot in claimed:
                message = self._open(ring, slot)
                if message is not None:
                    messages.append(message)
        return messages

    def claim(self, *, copy: bool = True, local: bool = True, newest: bool = False) -> Claimed | None:
        """The oldest READY message as bytes, or None if there is none; for who sends it on.

        Args:
            copy: whether a copy will do where too many slots are leased; otherwise such messages stay READY.
            local: whether messages may be taken that must not leave this host.
            newest: take the newest one instead, and skip those that are older.

        Raises:
            SegmentError: the slot's record makes no sense; its message is counted and dropped.
        """
        found = self._claim_oldest(copy=copy, local=local, newest=newest)
        if found is None:
            return None
        if newest:
            self.skip(found[0].sequence[found[1]] - 1, local=local)
        self._wake_producer_if_few(found[0])
        header, payload, sequence, lease, generation = self._open_raw(*found, always_lease=True)
        if lease is None:
            self._release(*found, generation)
        return Claimed(header, payload, sequence, lease)

    def _ready(self) -> list[tuple[Ring, list[int]]]:
        """Where the READY messages lie, the oldest first: some slots of a ring, then some of another one."""
        found = [(ring, slots) for ring in self._rings.now() if (slots := ring.ready())]
        if len(found) < 2:
            return found
        in_order = sorted((ring.sequence[slot], i, slot) for i, (ring, slots) in enumerate(found) for slot in slots)
        runs = itertools.groupby(in_order, key=operator.itemgetter(1))
        return [(found[i][0], [slot for _, _, slot in run]) for i, run in runs]

    def _claim_oldest(
        self, *, copy: bool = True, local: bool = True, tells: bool = False, newest: bool = False
    ) -> tuple[Ring, int] | None:
        """Claim the oldest message, or the newest, that nobody else is just claiming; see :meth:`claim`. None if there is none.

        If it locks a slot that is not READY any more, it looks again before it gives up, and tells a sleeper of what it leaves
        READY: while it held that lock, another consumer may have passed the slot over. `tells`: the caller has held such a lock.
        """
        member = self._member
        in_vain = True
        while in_vain:
            in_vain = False
            ready = self._ready()
            if newest:
                ready = [(ring, slots[::-1]) for ring, slots in reversed(ready)]
            for ring, slots in ready:
                for slot in slots:
                    if not local and ring.flags[slot] & FLAG_LOCAL_ONLY:
                        continue
                    if not copy and ring.count(_LEASED) >= ring.num_slots - RESERVE:
                        return None
                    claimed = ring.try_claim(slot, member.owner, member.locks.fd)
                    if claimed:
                        if tells:
                            self.pass_on()
                        return ring, slot
                    if claimed is False:
                        in_vain = tells = True
        return None

    def skip_all_but_the_last(self) -> None:
        """Release all READY messages unread, but for the one that was published last."""
        self.skip(self._control.published - 2)

    def skip(self, up_to: int, *, local: bool = True) -> None:
        """Release the READY messages up to that sequence number unread, but for those that others are just claiming.

        Args:
            up_to: the number of the last one.
            local: as for :meth:`claim`.
        """
        for ring, slots in self._ready():
            older = [slot for slot in slots if ring.sequence[slot] <= up_to]
            if not local:
                older = [slot for slot in older if not ring.flags[slot] & FLAG_LOCAL_ONLY]
            for run in _neighbours(older):
                claimed = self._claim_run(ring, run)
                if len(claimed) < len(run):
                    self.pass_on()  # as in take_many
                for slot in claimed:
                    self._drop(ring, slot)

    def _drop(self, ring: Ring, slot: int) -> None:
        """Release a slot that was just claimed, unread."""
        self._member.delivered.add(1)
        self._member.skipped.add(1)
        self._release(ring, slot, ring.generation[slot])

    def count_skipped(self, count: int) -> None:
        """Count messages that this consumer has received and dropped unread."""
        self._member.skipped.add(count)

    def _claim_run(self, ring: Ring, slots: list[int]) -> list[int]:
        """Claim neighbouring slots under one lock, or one by one if somebody is at one of them; those that were READY still."""
        owner, locks = self._member.owner, self._member.locks
        number, count = slot_lock(ring.number, slots[0]), len(slots)
        if count == 1 or not locks.try_lock(number, count):
            return [slot for slot in slots if ring.try_claim(slot, owner, locks.fd)]
        claimed = [slot for slot in slots if ring.claim(slot, owner)]
        locks.unlock(number, count)
        return claimed

    def _wake_producer_if_few(self, ring: Ring) -> None:
        wake_below = self._control.waiting
        if 0 < wake_below < FOR_A_SLOT and ring.count(_READY) < wake_below:
            self._bell.ring()

    def _open(self, ring: Ring, slot: int) -> Message | None:
        """The message in a slot that was just claimed; None if it cannot be opened: it is noted, and the slot is FREE again."""
        try:
            header, payload, sequence, lease, generation = self._open_raw(ring, slot)
            try:
                message = Message(sequence, self._decoder.decode(header, payload))
            except WireError:
                if lease is None:
                    self._release(ring, slot, generation)
                else:
                    self.end(lease)
                raise
            if lease is None:
                self._calls.note(message, functools.partial(self._release, ring, slot, generation))
            return message
        except (SegmentError, WireError) as error:
            self.reject()
            self._calls.note_unreadable(self.place.title, error)
            return None

    def _open_raw(
        self, ring: Ring, slot: int, *, always_lease: bool = False
    ) -> tuple[bytes, Bytes, int, Lease | None, int]:
        """What a :class:`Claimed` has, of the message in a slot that was just claimed, and the slot's generation.

        Without a lease, the caller releases the slot.

        Args:
            ring, slot: where it is.
            always_lease: whether a message without arrays is leased as well, so that it can be given back.

        Raises:
            SegmentError: the record makes no sense; the slot is released.
        """
        member = self._member
        member.delivered.add(1)
        try:
            header, payload_nbytes, generation, sequence, flags = ring.message(slot)
        except SegmentError:
            self._release(ring, slot, ring.generation[slot])
            raise
        payload = ring.payload(slot, payload_nbytes)
        if flags & FLAG_AGAIN:
            member.redelivered.add(1)
        hoarding = ring.count(_LEASED) > ring.num_slots - RESERVE
        if (payload_nbytes or always_lease) and not hoarding:
            callback = self._on_end_of_lease()
            next(callback)
            lease = Lease(payload, callback.send)
            lease.ring, lease.slot, lease.generation, lease.call = ring, slot, generation, self._calls.number
            self._leases[id(lease)] = lease
            return header, payload, sequence, lease, generation
        if hoarding and payload_nbytes:
            member.copied.add(1)
            self._say_hoarding(ring)
        return header, payload.copy(), sequence, None, generation

    def reject(self, count: int = 1) -> None:
        """Count what made no sense."""
        self._member.rejected.add(count)

    def _say_hoarding(self, ring: Ring) -> None:
        if not self._hoarding:
            self._hoarding = True
            log.warning(
                "%d of %d slots of %s are held by consumers; further messages arrive as copies until some are "
                "released. Streaming goes on; to avoid the copies keep fewer items at a time, or raise send_hwm.",
                ring.count(_LEASED),
                ring.num_slots,
                self.place.name,
            )

    # -- waiting ------------------------------------------------------------------------------------------------

    def say_asleep(self, since_ns: int) -> None:
        """Write since when this consumer sleeps; 0: it is awake. It must look once more after it said that it sleeps."""
        self._control.asleep[self.index] = since_ns

    def is_shared(self) -> bool:
        """Whether other consumers take messages of this stream, too, or sleep because there are none."""
        return self._last_sequence < self._shared_until or self.sleepers.anyone()

    def pass_on(self) -> None:
        """If a READY message is left and another consumer sleeps, send that one its number."""
        self.sleepers.pass_on(self._rings.now())

    def leasable(self) -> int:
        """How many messages consumers may hold altogether, without copies."""
        return max((ring.num_slots - RESERVE for ring in self._rings.now()), default=1)

    def has_ready(self, *, local: bool = True) -> bool:
        """Whether :meth:`claim` would find a message."""
        return any(
            local or not ring.flags[slot] & FLAG_LOCAL_ONLY for ring in self._rings.now() for slot in ring.ready()
        )

    def delivered(self) -> int:
        """How many messages of the stream have been received, by this consumer and all others."""
        return self._control.delivered()

    def require_room(self) -> None:
        """See whether this process could map all memory of the stream. Otherwise its messages would never be seen here.

        Raises:
            OutOfSharedMemory: it could not.
        """
        if self._rings.no_room:
            raise OutOfSharedMemory(f"{self.place.title} cannot be read. {self._rings.no_room}")

    def unattached(self) -> str:
        """Why not all memory of the stream could be attached; "" if it could."""
        return self._rings.unattached

    def count_remote(self, consumers: int) -> None:
        """Say how many consumers elsewhere this one sends to."""
        self._member.count_remote(consumers)

    def say_unreachable(self, unreachable: bool) -> None:
        """Say whether consumers elsewhere cannot reach this one, which would send to them."""
        self._control.unreachable = int(unreachable)

    # -- ending leases ------------------------------------------------------------------------------------------

    def end(self, lease: Lease) -> None:
        """End a lease: its slot is FREE again."""
        if id(lease) not in self._leases:
            return
        self._release(lease.ring, lease.slot, lease.generation)
        self._leases.pop(id(lease), None)  # after: a lease whose end was interrupted must be found again
        if self._closing and not self._leases:
            self._leave()

    def give_back(self, lease: Lease) -> None:
        """End a lease whose message was not used: it is READY again, for any consumer."""
        if self._leases.pop(id(lease), None) is not None:
            self._put_back(lease.ring, lease.slot)

    def _on_end_of_lease(self) -> Generator[None, Lease, None]:
        """What happens when the last view of a message has gone: a callback, in any thread and in the middle of any statement.

        A generator that waits inside its ``try``: Python looks for signals where a function begins, and what a handler raises
        in a callback's first instruction would be printed and lost.
        """
        try:
            lease = yield
            if lease.call <= self._calls.handed:  # else its call was cut short, and `reconcile` puts it back
                self.end(lease)
        except GeneratorExit:  # the lease was ended otherwise
            return
        except BaseException as error:  # of a signal's handler, or Ctrl-C
            interrupts.keep(error)
        yield  # to return would be an error here

    def _release(self, ring: Ring, slot: int, generation: int) -> None:
        if ring.release(slot, generation, self._member.owner):
            self._member.released.add(1)
        if self._words[_WAITING] == FOR_A_SLOT:
            self._bell.ring()

    def _put_back(self, ring: Ring, slot: int) -> None:
        """Make a slot that this consumer has leased READY again."""
        locks, number = self._member.locks, slot_lock(ring.number, slot)
        while not locks.try_lock(number):  # somebody looks whether we are dead
            time.sleep(0.001)
        if ring.reclaim(slot, self._member.owner):
            self._member.delivered.add(-1)
        locks.unlock(number)

    def reconcile(self) -> None:
        """After a call that was cut short: unlock all slots, and put back what it claimed and did not hand over.

        What is LEASED to this consumer and has no lease of an earlier call was claimed by the one that was cut short.
        """
        if self._member.has_left():
            return
        handed = self._calls.handed
        self._member.locks.unlock_slots()
        leases = {key: lease for key, lease in list(self._leases.items()) if lease.call <= handed}
        good = {(lease.ring.number, lease.slot, lease.generation) for lease in leases.values()}
        self._calls.settle()
        for ring in self._rings.now():
            for slot, state in enumerate(ring.states()):
                is_mine = state == _LEASED and ring.owner[slot] == self._member.owner
                if is_mine and (ring.number, slot, ring.generation[slot]) not in good:
                    self._put_back(ring, slot)
        self._leases = leases
        self.say_asleep(0)

    def close(self) -> None:
        """Take no more messages. Arrays that are still alive stay valid, and the membership lasts as long as they do."""
        self._closing = True
        self.mend()

    def finish(self) -> None:
        """Close, and end all leases at once: the process is about to exit in good order. Arrays that are alive become copies.

        A message of a call that never returned stays LEASED: as that of a dead owner, it is made READY again.
        """
        self._closing = True
        self._keep_arrays()
        for lease in list(self._leases.values()):
            if lease.call <= self._calls.handed:
                self.end(lease)
        self._leave()

    def _leave(self) -> None:
        leaving.leave(self)
        self._member.leave()
        self._rings.forget()

    def _keep_arrays(self) -> None:
        """Arrays that are alive become copies: they stay as they are when others get their slots."""
        for lease in list(self._leases.values()):
            payload = lease()
            if payload is not None:
                lease.ring.keep(lease.slot, payload.nbytes)

    def before_fork(self) -> None:
        """A child has no leases, and those of its parent may end before it does."""
        self._keep_arrays()

    def in_child(self) -> None:
        """In a forked child: the leases are its parent's."""
        self._leases = {}
        self._closing = True

    # -- what can wait ------------------------------------------------------------------------------------------

    def look_after(self) -> None:
        """Now and then: reclaim what dead consumers held, and tell a sleeper of it."""
        if time.monotonic() - self._last_reclaim > RECLAIM_EVERY_S:
            self.sleepers.forget_dead(self._member.locks)
            if self.reclaim_dead():
                self.pass_on()

    def reclaim_dead(self) -> int:
        """Make what dead consumers held READY again; how many messages that were."""
        self._last_reclaim = time.monotonic()
        for consumer in list(_of_this_process):
            consumer.mend()
        reclaimed = reclaim_dead(self._rings.now(), self._member.locks)
        if reclaimed:
            self._member.reclaimed.add(reclaimed)
            log.warning("Took back %d messages that a dead consumer of %s had held.", reclaimed, self.place.name)
        return reclaimed

    def mend(self) -> None:
        """Make good what an interrupt left that no later call will find: a source that is gone without having closed this
        consumer, leases whose arrays are gone and whose callback was cut short at its first instruction, and a close that was cut
        short.
        """
        if self._member.has_left():
            return
        source = self._calls.source
        if source is not None and source() is None and not self._closing:
            self.reconcile()
            self._closing = True
        for lease in list(self._leases.values()):
            if lease() is None and lease.call <= self._calls.handed:
                self.end(lease)
        if self._closing and not self._member.has_left():
            self.say_asleep(0)
            self.sleepers.close()
            if not self._leases:
                self._leave()

    def segments(self) -> list[Segment]:
        """The memory of the stream's rings."""
        return [ring.segment for ring in self._rings.now()]

    def is_superseded(self) -> bool:
        """Whether the stream was made anew, and nothing is left in this one."""
        return not self.place.is_current(self._control.segment) and not self.has_ready()

    def explain(self) -> str:
        """The state of the stream in one line, for messages to people."""
        state = self._control.explain(self.place.title, self._rings.now(), self._member.locks)
        why = self.unattached()
        return state + (f"; not all of its memory could be attached: {why}" if why else "")

    def __repr__(self) -> str:
        return f"<Consumer {self.index} of {self.place.name}, {len(self._leases)} leases>"


def _neighbours(slots: list[int]) -> Iterator[list[int]]:
    """`slots`, in their order, in pieces of which each counts up by one."""
    for _, piece in itertools.groupby(enumerate(slots), key=lambda entry: entry[1] - entry[0]):
        yield [slot for _, slot in piece]
