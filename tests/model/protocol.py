"""The protocol of a stream as a model: each store, lock, number and sleep is one step.

``compiled.py`` takes the steps in every order. To compare the model with the code, read :meth:`Protocol.producer_steps`,
:meth:`Protocol.consumer_steps` and :meth:`Protocol.release_steps`: where a process is, the name of each step that it may
take next, and the method that takes it. A method has its guard first (``return False``: not possible now), then its effect.
``s`` is the state, one byte per field; ``p`` or ``c`` is where the block of this producer or consumer begins.

What one step holds together, and why no order of steps is lost by that:

* What nobody else sees is taken with the step before or after it: the call, the choice of a READY slot from what a look has
  seen, the end of a poll. A claim's lock and its check, too: nobody else moves a READY slot that is locked.
* A slot's generation is whether there was a commit since a lease's end began. A sequence number is an age, the order among
  the messages that lie in slots. `published` is the note UNCOUNTED on the one message that it may not count yet.
* A producer loans any FREE slot, not the lowest: slots are alike then, and states that differ only in which one is which are one.
* `asleep` is a rank (1 sleeps longest), and what somebody has told is a bit that the next sleep clears: the code compares
  times.
* An inbox is one bit per stream: a number only names the stream to ask first. One that comes while its consumer is not about
  to sleep is not noted, since the next sleep begins with forgetting it.
* Spinning and naps are looks that come later. FLAG_AGAIN only counts.
* Looking after is left out where there is nothing to look after. A consumer that takes back what a dead one held passes it
  on to a third one; the model leaves that to the look every 50 ms.
* To close is one step, with the store of `asleep`. The lease's end that was interrupted in a consumer that has closed is
  found by another consumer of its process, as soon as that looks.

Not in the model: TCP, clips, a second ring, copies where consumers hold too much, many messages in one call, joining,
sources that are gone without being closed, a full inbox (that is a number withheld). All see stores in the order in
which they are made. x86-64 may delay a store behind later loads of the same thread until its next system call or locked
instruction: `asleep` and `waiting` are each followed by a look, so there the model promises more than a processor without a
fence, and the looks every 50 ms and 0.1 s heal the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import partial
from typing import NamedTuple

from blendtorch_shm.memory.states import State

FREE, LOANED, READY, LEASED = (int(state) for state in State)
FOR_A_SLOT = 7  # more than slots that can be READY


class Broken(Exception):
    """A property does not hold."""


class Step(NamedTuple):
    """One step of one process."""

    name: str
    take: Callable[[bytearray, int], bool]
    """Changes the state; False, and no change, if the step cannot happen now."""
    is_private: bool = False
    """Whether nobody else can tell if it has happened, and a death or interrupt leaves the same before it and after it."""
    is_quiet: bool = False
    """Whether it is private where nobody can die or be interrupted any more."""
    by_user: bool = False
    """Whether the user decides: nobody may depend on it ever happening."""


@dataclass(frozen=True)
class Setting:
    """How much there is to explore."""

    streams: int = 1
    consumers: int = 2
    slots: int = 3
    """Of each stream."""
    messages: int = 4
    """Of each stream."""
    max_ready: int = 2
    faults: int = 0
    """How many of `kinds` may happen, altogether."""
    kinds: tuple[str, ...] = (
        "producer dies",
        "producer interrupted",
        "consumer dies",
        "consumer interrupted",
        "numbers",
    )
    threads: bool = False
    """Whether leases end in another thread beside `receive`; otherwise a user drops each message before it asks for the next."""
    idle_look: bool = True
    """Whether consumers look every 50 ms and a waiting producer every 0.1 s. These may come at any time: machines are slow."""


class P(IntEnum):
    """What a producer does next."""

    ROOM = 0
    WAIT = auto()
    WAIT_LOOK = auto()
    WAIT_BELL = auto()
    LOAN = auto()
    RECORD = auto()
    COMMIT = auto()
    PUBLISHED = auto()
    TELL = auto()
    PUSH = auto()
    RECOVER_WAITING = auto()
    RECOVER = auto()
    ABORT_RECORD = auto()
    ABORT = auto()
    PASS = auto()
    RECLAIM = auto()
    RECLAIM_READY = auto()
    RECLAIM_OWNER = auto()
    RECLAIM_UNLOCK = auto()
    DONE = auto()


class C(IntEnum):
    """What a consumer does next."""

    USER = 0
    LOOK = auto()
    LOOK_ALL = auto()
    LOCK = auto()
    MISSED = auto()
    OWNER = auto()
    LEASED = auto()
    UNLOCK = auto()
    TELL = auto()
    TELL_PUSH = auto()
    WAITING = auto()
    RING = auto()
    CLEAR = auto()
    SLEEP = auto()
    POLL = auto()
    AWAKE = auto()
    READ = auto()
    PASS = auto()
    PASS_PUSH = auto()
    HAND_OVER = auto()
    MEND = auto()
    MEND_RING = auto()
    RECLAIM = auto()
    RECLAIM_READY = auto()
    RECLAIM_OWNER = auto()
    RECLAIM_UNLOCK = auto()
    RECONCILE = auto()
    SETTLE = auto()
    CLOSING = auto()
    DEAD = auto()


class R(IntEnum):
    """What a consumer's thread does next in which the last view of a message dies."""

    NONE = 0
    FREE = auto()
    WAITING = auto()
    RING = auto()


# Phases of `receive`; 0 outside of it, and while it makes good what an interrupt left.
FIRST, AFTER_SLEEP_STORE, AFTER_POLL, IDLE, LAST = 1, 2, 3, 4, 5
# How a claim goes: `_claim_oldest` has taken over; it has locked a slot in vain since its look; somebody is to be told of that.
ALL, IN_VAIN, TELLS = 1, 2, 4
# Notes on the message in a slot. UNCOUNTED: `published` does not count it yet.
DELIVERED, UNCOUNTED, OVERTAKEN = 1, 2, 4
# What `CUT` says: its last call was cut short; and it is closing, and puts back what that call had taken.
CUT_CALL, CUT_AND_CLOSING = 1, 2
# A consumer's own table of leases. CUT_SHORT: the lease's end was interrupted.
NOT_LEASED, MADE, HELD, CUT_SHORT = 0, 1, 2, 3

# A producer's block. The first five are its own memory, the others the stream's control segment and the bell.
PC, WAIT_FOR, SLOT, TARGET, AGAIN, WAITING, BELL, LEFT, ASLEEP = range(9)
# A consumer's block (PC = 0, as above).
PHASE, AT, TURN, HAS, INBOX, CUT, REL_PC, REL_SLOT, REL_STALE, WHOM, CLAIM, LIST = range(1, 13)


class Protocol:
    """The steps of all processes, over states that are bytes.

    Args:
        setting: how many of everything.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        n, m = setting.streams, setting.consumers
        self.count = n * setting.slots  # slots altogether
        self.slots = [range(i * setting.slots, (i + 1) * setting.slots) for i in range(n)]  # of each stream
        # Slots: five fields each, those of all slots one after the other.
        self.state, self.age, self.owner, self.lock, self.notes = (i * self.count for i in range(5))
        self.faults = 5 * self.count
        self.told = ASLEEP + m  # who was told in this sleep: bit 0 by the producer, bit k by consumer number k
        self.producer_nbytes = self.told + m
        self.producers = [self.faults + 1 + i * self.producer_nbytes for i in range(n)]
        self.lease = LIST + setting.slots
        self.consumer_nbytes = self.lease + self.count
        first = self.faults + 1 + n * self.producer_nbytes
        self.consumers = [first + i * self.consumer_nbytes for i in range(m)]
        # What stands as an owner and at a lock.
        self.number = {at: i + 1 for i, at in enumerate(self.consumers)}
        self.producer_number = m + 1
        self.stream = {at: i for i, at in enumerate(self.producers)}
        self.nbytes = first + m * self.consumer_nbytes

    def largest(self) -> bytes:
        """The largest value that each field may have."""
        m, count, slots = self.setting.consumers, self.count, self.setting.slots
        of_slots = [3] * count + [slots] * count + [m] * count + [m + 1] * count + [7] * count
        of_producer = [len(P), FOR_A_SLOT, count, m, 1, FOR_A_SLOT, 1, self.setting.messages] + [m] * m + [2 << m] * m
        streams = self.setting.streams
        of_consumer = [len(C), LAST, streams, streams, count, (1 << streams) - 1, 2, len(R), count, 1, m, 7]
        of_consumer += [count] * slots + [CUT_SHORT] * count
        return bytes([*of_slots, self.setting.faults, *of_producer * streams, *of_consumer * m])

    def initial(self) -> bytes:
        """Everything is FREE, and every consumer is in its user's code."""
        s = bytearray(self.nbytes)
        s[self.faults] = self.setting.faults
        for p in self.producers:
            s[p + LEFT] = self.setting.messages
        return bytes(s)

    def is_done(self, s: bytearray) -> bool:
        """Whether every message was delivered and every slot is FREE and unlocked."""
        return (
            all(s[self.state + slot] == FREE and not s[self.lock + slot] for slot in range(self.count))
            and all(s[p + PC] == P.DONE for p in self.producers)
            and not any(s[c + REL_PC] for c in self.consumers)
        )

    def check_rest(self, s: bytearray) -> None:
        """What must hold where only users could do something: nobody sleeps over what it could have."""
        for p in self.producers:
            ready = self._count(s, self.stream[p], READY)
            if ready and any(s[c + PC] == C.POLL for c in self.consumers):
                raise Broken(f"somebody sleeps while {ready} slots of stream {self.stream[p]} are READY")
            if s[p + PC] == P.WAIT_BELL:
                if s[p + WAIT_FOR] == FOR_A_SLOT:
                    if self._find(s, self.stream[p], FREE) >= 0:
                        raise Broken(f"producer {self.stream[p]} waits for a slot while one is FREE")
                elif ready < s[p + WAIT_FOR]:
                    raise Broken(f"producer {self.stream[p]} waits until few slots are READY, and {ready} are")

    def normalise(self, s: bytearray) -> None:
        """Puts slots and consumers in an order: states that differ only in which one is which are one."""
        self._sort_slots(s)
        for end in range(self.setting.consumers - 1, 0, -1):
            for i in range(end):
                if self._is_after_next(s, i):
                    self._swap_with_next(s, i)
        self._sort_slots(s)  # as consumers are in order now

    def _sort_slots(self, s: bytearray) -> None:
        for stream in range(self.setting.streams):
            for end in range((stream + 1) * self.setting.slots - 1, stream * self.setting.slots, -1):
                for slot in range(stream * self.setting.slots, end):
                    if self._is_slot_after_next(s, slot):
                        self._swap_slot_with_next(s, slot)

    def _is_slot_after_next(self, s: bytearray, slot: int) -> bool:
        for at in range(slot, self.faults, self.count):
            if s[at] != s[at + 1]:
                return s[at] > s[at + 1]
        for c in self.consumers:
            for at in range(c + LIST, c + self.lease):
                if s[at] == slot + 1 or s[at] == slot + 2:
                    return s[at] == slot + 2
            if s[c + self.lease + slot] != s[c + self.lease + slot + 1]:
                return s[c + self.lease + slot] > s[c + self.lease + slot + 1]
            if s[c + REL_SLOT] == slot + 1 or s[c + REL_SLOT] == slot + 2:
                return s[c + REL_SLOT] == slot + 2
        return False

    def _swap_slot_with_next(self, s: bytearray, slot: int) -> None:
        for at in range(slot, self.faults, self.count):
            s[at], s[at + 1] = s[at + 1], s[at]
        for p in self.producers:
            s[p + SLOT] = self._other(s[p + SLOT], slot + 1)
        for c in self.consumers:
            at = c + self.lease + slot
            s[at], s[at + 1] = s[at + 1], s[at]
            s[c + HAS] = self._other(s[c + HAS], slot + 1)
            s[c + REL_SLOT] = self._other(s[c + REL_SLOT], slot + 1)
            for at in range(c + LIST, c + self.lease):
                s[at] = self._other(s[at], slot + 1)

    def _is_after_next(self, s: bytearray, i: int) -> bool:
        a, b = self.consumers[i], self.consumers[i + 1]
        for k in range(self.consumer_nbytes):
            if s[a + k] != s[b + k]:
                return s[a + k] > s[b + k]
        for p in self.producers:
            if s[p + ASLEEP + i] != s[p + ASLEEP + i + 1]:
                return s[p + ASLEEP + i] > s[p + ASLEEP + i + 1]
        return False

    def _swap_with_next(self, s: bytearray, i: int) -> None:
        a, b = self.consumers[i], self.consumers[i + 1]
        for k in range(self.consumer_nbytes):
            s[a + k], s[b + k] = s[b + k], s[a + k]
        for at in range(self.owner, self.notes):  # owners and locks
            s[at] = self._other(s[at], i + 1)
        for c in self.consumers:
            s[c + WHOM] = self._other(s[c + WHOM], i + 1)
        for p in self.producers:
            s[p + TARGET] = self._other(s[p + TARGET], i + 1)
            at = p + ASLEEP + i
            s[at], s[at + 1] = s[at + 1], s[at]
            at = p + self.told + i
            s[at], s[at + 1] = s[at + 1], s[at]
            for at in range(p + self.told, p + self.producer_nbytes):
                if (s[at] >> i + 1 ^ s[at] >> i + 2) & 1:
                    s[at] ^= 3 << i + 1

    def _other(self, number: int, one: int) -> int:
        """`number`, with `one` and the next one exchanged."""
        return one + 1 if number == one else one if number == one + 1 else number

    def describe(self, s: bytes) -> str:
        """One line for people."""
        slots = ", ".join(
            f"{State(s[self.state + i]).name} age={s[self.age + i]} notes={s[self.notes + i]} "
            f"owner={s[self.owner + i]} lock={s[self.lock + i]}"
            for i in range(self.count)
        )
        producers = "; ".join(
            f"{P(s[p]).name} waiting={s[p + WAITING]} bell={s[p + BELL]} asleep={list(s[p + ASLEEP : p + self.told])} "
            f"told={list(s[p + self.told : p + self.producer_nbytes])}"
            for p in self.producers
        )
        consumers = "; ".join(
            f"{C(s[c]).name} has={s[c + HAS]} inbox={s[c + INBOX]} cut={s[c + CUT]} release={R(s[c + REL_PC]).name} "
            f"leases={list(s[c + self.lease : c + self.consumer_nbytes])}"
            for c in self.consumers
        )
        return f"slots: {slots}\nproducers: {producers}\nconsumers: {consumers}"

    # -- reading ------------------------------------------------------------------------------------------------

    def _count(self, s: bytearray, stream: int, state: int) -> int:
        return sum(s[self.state + slot] == state for slot in self.slots[stream])

    def _find(self, s: bytearray, stream: int, state: int) -> int:
        """The lowest slot in that state, or -1."""
        for slot in self.slots[stream]:
            if s[self.state + slot] == state:
                return slot
        return -1

    def _is_dead(self, s: bytearray, number: int) -> bool:
        """Whether nobody holds that consumer's byte."""
        return any(s[c + PC] == C.DEAD and self.number[c] == number for c in self.consumers)

    def _anyone_dead(self, s: bytearray) -> bool:
        return any(s[c + PC] == C.DEAD for c in self.consumers)

    def _has_lease(self, s: bytearray, c: int, kind: int) -> bool:
        return any(s[c + self.lease + slot] == kind for slot in range(self.count))

    # -- who sleeps, and who is told: waiting.py ------------------------------------------------------------------

    def _say_asleep(self, s: bytearray, p: int, i: int) -> None:
        """Consumer `i` begins a sleep of which nobody was told yet."""
        self._say_awake(s, p, i)  # its word is not 0 after an interrupt
        s[p + ASLEEP + i] = 1 + sum(s[p + ASLEEP + k] > 0 for k in range(self.setting.consumers))

    def _say_awake(self, s: bytearray, p: int, i: int) -> None:
        rank = s[p + ASLEEP + i]
        if rank:
            for at in range(p + ASLEEP, p + ASLEEP + self.setting.consumers):
                if s[at] > rank:
                    s[at] -= 1
        s[p + ASLEEP + i] = 0
        self._forget_told(s, p, i)

    def _forget_told(self, s: bytearray, p: int, i: int) -> None:
        s[p + self.told + i] = 0

    def _longest_sleeper(self, s: bytearray, p: int, teller: int) -> int:
        """Number of the consumer that sleeps longest and was not told yet by this teller, or 0."""
        found = 0
        for i in range(self.setting.consumers):
            rank = s[p + ASLEEP + i]
            if rank and not s[p + self.told + i] & teller and (not found or rank < s[p + ASLEEP + found - 1]):
                found = i + 1
        return found

    def _tell(self, s: bytearray, p: int, teller: int) -> int:
        """Whom it tells, noted as told; or 0."""
        target = self._longest_sleeper(s, p, teller)
        if target:
            s[p + self.told + target - 1] |= teller
        return target

    def _push(self, s: bytearray, target: int, stream: int) -> None:
        c = self.consumers[target - 1]
        if self._listens(s, c):
            s[c + INBOX] |= 1 << stream

    def _listens(self, s: bytearray, c: int) -> bool:
        """Whether it may read what comes now. Otherwise its next sleep begins with forgetting it."""
        return s[c + PHASE] == AFTER_SLEEP_STORE or s[c + PC] == C.SLEEP or s[c + PC] == C.READ

    def _forget_dead(self, s: bytearray, p: int) -> None:
        for c in self.consumers:
            if s[c + PC] == C.DEAD:
                self._say_awake(s, p, self.number[c] - 1)

    # -- the producer: publish ----------------------------------------------------------------------------------

    def room(self, s: bytearray, p: int, slot: int) -> bool:
        """One step with the loan: nobody else makes a slot READY, or takes one that is FREE."""
        return s[p + LEFT] > 0 and self._has_room(s, p) and self.loan(s, p, slot)

    def no_room(self, s: bytearray, p: int) -> bool:
        if not s[p + LEFT]:
            s[p + PC] = P.DONE
        elif not self._has_room(s, p):
            s[p + PC], s[p + WAIT_FOR] = P.WAIT, (self.setting.max_ready + 1) // 2
        else:
            return self.loan_none(s, p)
        return True

    def _has_room(self, s: bytearray, p: int) -> bool:
        return self._count(s, self.stream[p], READY) < self.setting.max_ready

    def _enough(self, s: bytearray, p: int) -> bool:
        if s[p + WAIT_FOR] == FOR_A_SLOT:
            return self._find(s, self.stream[p], FREE) >= 0
        return self._has_room(s, p)

    def wait(self, s: bytearray, p: int) -> bool:
        s[p + WAITING] = s[p + WAIT_FOR]
        s[p + PC] = P.WAIT_LOOK
        return True

    def wait_look(self, s: bytearray, p: int) -> bool:
        if self._enough(s, p):
            s[p + WAITING] = s[p + WAIT_FOR] = 0
            s[p + PC] = P.LOAN
        else:
            s[p + PC] = P.WAIT_BELL
        return True

    def wait_bell(self, s: bytearray, p: int) -> bool:
        if not s[p + BELL]:
            return False
        s[p + BELL] = 0
        s[p + PC] = P.WAIT_LOOK
        return True

    def wait_idle(self, s: bytearray, p: int) -> bool:
        if not self.setting.idle_look:
            return False
        s[p + PC] = P.RECLAIM if self._anyone_dead(s) else P.WAIT_LOOK
        return True

    def loan(self, s: bytearray, p: int, slot: int) -> bool:
        if s[self.state + slot] != FREE:
            return False
        s[self.state + slot] = LOANED
        s[p + PC], s[p + SLOT] = P.RECORD, slot + 1
        return True

    def loan_none(self, s: bytearray, p: int) -> bool:
        if self._find(s, self.stream[p], FREE) >= 0:
            return False
        s[p + PC], s[p + WAIT_FOR] = P.WAIT, FOR_A_SLOT
        return True

    def record(self, s: bytearray, p: int) -> bool:
        s[self.notes + s[p + SLOT] - 1] = UNCOUNTED  # a sequence number that is not below `published`
        s[p + PC] = P.COMMIT
        return True

    def commit(self, s: bytearray, p: int) -> bool:
        slot, newest = s[p + SLOT] - 1, 0
        for other in self.slots[self.stream[p]]:
            if s[self.state + other] != LOANED and s[self.notes + other] & UNCOUNTED:
                raise Broken(f"slot {slot} gets the sequence number that slot {other} has or had")
            if s[self.age + other] > newest:
                newest = s[self.age + other]
        s[self.state + slot] = READY
        s[self.age + slot] = 1 + newest
        self._new_generation(s, slot)
        s[p + LEFT] -= 1
        s[p + PC] = P.PUBLISHED
        return True

    def _new_generation(self, s: bytearray, slot: int) -> None:
        """A lease's end that has begun does not end another message's lease."""
        for c in self.consumers:
            if s[c + REL_SLOT] == slot + 1:
                s[c + REL_STALE] = 1
            if s[c + self.lease + slot] == CUT_SHORT:
                s[c + self.lease + slot] = NOT_LEASED

    def published(self, s: bytearray, p: int) -> bool:
        s[self.notes + s[p + SLOT] - 1] &= ~UNCOUNTED
        s[p + SLOT] = 0
        s[p + PC] = P.TELL
        return True

    def tell(self, s: bytearray, p: int) -> bool:
        s[p + TARGET] = self._tell(s, p, 1)
        if s[p + TARGET]:
            s[p + PC] = P.PUSH
        else:
            self._told(s, p)
        return True

    def push(self, s: bytearray, p: int) -> bool:
        self._push(s, s[p + TARGET], self.stream[p])
        self._told(s, p)
        return True

    def push_withheld(self, s: bytearray, p: int) -> bool:
        if not self._fault(s, "numbers"):
            return False
        self._told(s, p)
        return True

    def _told(self, s: bytearray, p: int) -> None:
        s[p + PC] = P.WAIT_LOOK if s[p + AGAIN] else P.ROOM
        s[p + TARGET] = s[p + AGAIN] = 0

    # -- the producer: recover ----------------------------------------------------------------------------------

    def recover_waiting(self, s: bytearray, p: int) -> bool:
        s[p + WAITING] = 0
        s[p + PC] = P.RECOVER
        return True

    def recover(self, s: bytearray, p: int) -> bool:
        """Unlocks what it was reclaiming; counts the message of which there is a trace: in a slot in any state but LOANED."""
        for slot in self.slots[self.stream[p]]:
            if s[self.lock + slot] == self.producer_number:
                s[self.lock + slot] = 0
            if self._is_trace(s[self.state + slot]):
                s[self.notes + slot] &= ~UNCOUNTED
        s[p + PC] = P.ABORT_RECORD
        return True

    def _is_trace(self, state: int) -> bool:
        return state != LOANED

    def abort_record(self, s: bytearray, p: int) -> bool:
        slot = self._find(s, self.stream[p], LOANED)
        if slot < 0:
            s[p + PC] = P.PASS
        else:
            s[self.notes + slot] = 0
            s[p + PC], s[p + SLOT] = P.ABORT, slot + 1
        return True

    def abort(self, s: bytearray, p: int) -> bool:
        s[self.state + s[p + SLOT] - 1] = FREE
        s[p + PC], s[p + SLOT] = P.ABORT_RECORD, 0
        return True

    def producer_pass_on(self, s: bytearray, p: int) -> bool:
        if self._find(s, self.stream[p], READY) >= 0:
            return self.tell(s, p)
        self._told(s, p)
        return True

    # -- a consumer: receive ------------------------------------------------------------------------------------

    def _may_call(self, s: bytearray, c: int) -> bool:
        return self.setting.threads or (s[c + REL_PC] == R.NONE and not self._has_lease(s, c, HELD))

    def receive(self, s: bytearray, c: int) -> bool:
        if not self._may_call(s, c):
            return False
        if s[c + CUT]:
            s[c + PC] = C.RECONCILE
            return True
        s[c + PHASE] = FIRST
        return self.look(s, c)

    def receive_look_after(self, s: bytearray, c: int) -> bool:
        """Its last look for dead consumers and cut ends of leases is a while ago."""
        if not self._may_call(s, c) or s[c + CUT] or not self._is_something_to_look_after(s, c):
            return False
        s[c + PC], s[c + PHASE] = C.MEND, FIRST
        return True

    def look(self, s: bytearray, c: int) -> bool:
        """Finds the oldest READY slot of the stream."""
        s[c + LIST] = self._oldest(s, s[c + TURN], 0) + 1
        if s[c + LIST]:
            s[c + PC] = C.LOCK
        else:
            self._next_stream(s, c)
        return True

    def _oldest(self, s: bytearray, stream: int, after: int) -> int:
        """The oldest of the READY slots that are younger than `after`, or -1."""
        oldest = -1
        for slot in self.slots[stream]:
            age = s[self.age + slot]
            if s[self.state + slot] == READY and age > after and (oldest < 0 or age < s[self.age + oldest]):
                oldest = slot
        return oldest

    def look_all(self, s: bytearray, c: int) -> bool:
        """Lists the READY slots of the stream, oldest message first."""
        age = 0
        for k in range(self.setting.slots):
            slot = self._oldest(s, s[c + TURN], age)
            s[c + LIST + k] = slot + 1
            age = s[self.age + slot] if slot >= 0 else 255
        s[c + CLAIM] &= ~IN_VAIN
        if s[c + LIST]:
            s[c + PC] = C.LOCK
        else:
            self._next_stream(s, c)
        return True

    def _next_stream(self, s: bytearray, c: int) -> None:
        s[c + AT] += 1
        s[c + TURN] = (s[c + TURN] + 1) % self.setting.streams
        s[c + CLAIM] = 0
        if s[c + AT] < self.setting.streams:
            s[c + PC] = C.LOOK
            return
        s[c + AT] = 0
        if s[c + PHASE] == AFTER_SLEEP_STORE:
            s[c + PC] = C.POLL
        elif s[c + PHASE] == LAST:
            s[c + PC], s[c + PHASE] = C.USER, 0
        else:
            s[c + PC] = C.CLEAR

    def claim_lock(self, s: bytearray, c: int) -> bool:
        slot = s[c + LIST] - 1
        if s[self.lock + slot]:  # somebody claims it, or holds it in vain
            self._next_slot(s, c)
        else:
            s[self.lock + slot] = self.number[c]
            s[c + PC] = C.OWNER if s[self.state + slot] == READY else C.MISSED
        return True

    def _next_slot(self, s: bytearray, c: int) -> None:
        """Goes on with the next slot of the list, and lists again if there is none and it has locked one in vain."""
        for k in range(self.setting.slots - 1):
            s[c + LIST + k] = s[c + LIST + k + 1]
        s[c + LIST + self.setting.slots - 1] = 0
        if not s[c + CLAIM] & ALL:
            s[c + CLAIM] |= ALL
            s[c + PC] = C.LOOK_ALL
        elif s[c + LIST]:
            s[c + PC] = C.LOCK
        elif s[c + CLAIM] & IN_VAIN:
            s[c + PC] = C.LOOK_ALL
        else:
            self._next_stream(s, c)

    def claim_missed(self, s: bytearray, c: int) -> bool:
        """Unlocks a slot that is not READY any more. Whoever found it locked depends on a look after this, and on being told."""
        s[self.lock + s[c + LIST] - 1] = 0
        s[c + CLAIM] |= IN_VAIN | TELLS
        self._next_slot(s, c)
        return True

    def claim_owner(self, s: bytearray, c: int) -> bool:
        s[self.owner + s[c + LIST] - 1] = self.number[c]
        s[c + PC] = C.LEASED
        return True

    def claim_leased(self, s: bytearray, c: int) -> bool:
        slot = s[c + LIST] - 1
        if s[self.state + slot] != READY:
            raise Broken(f"slot {slot} is claimed and not READY")
        s[self.state + slot] = LEASED
        s[c + PC] = C.UNLOCK
        return True

    def claim_unlock(self, s: bytearray, c: int) -> bool:
        slot = s[c + LIST] - 1
        s[self.lock + slot] = 0
        s[c + PC] = C.TELL if s[c + CLAIM] & TELLS else C.WAITING
        s[c + TURN] = (s[c + TURN] + 1) % self.setting.streams
        s[c + HAS], s[c + AT] = slot + 1, 0
        self._end_claim(s, c)
        return True

    def _end_claim(self, s: bytearray, c: int) -> None:
        s[c + CLAIM] = 0
        for k in range(self.setting.slots):
            s[c + LIST + k] = 0

    def claim_waiting(self, s: bytearray, c: int) -> bool:
        """Makes the lease, which nobody else sees, and asks whether the producer waits for room."""
        slot = s[c + HAS] - 1
        s[c + self.lease + slot] = MADE
        stream = slot // self.setting.slots
        below = s[self.producers[stream] + WAITING]
        if 0 < below < FOR_A_SLOT and self._count(s, stream, READY) < below:
            s[c + PC] = C.RING
        else:
            self._taken(s, c)
        return True

    def claim_ring(self, s: bytearray, c: int) -> bool:
        s[self.producers[(s[c + HAS] - 1) // self.setting.slots] + BELL] = 1
        self._taken(s, c)
        return True

    def _taken(self, s: bytearray, c: int) -> None:
        if s[c + PHASE] == AFTER_SLEEP_STORE:
            s[c + PC] = C.AWAKE
        elif s[c + PHASE] == AFTER_POLL:
            s[c + PC] = C.PASS
        else:
            s[c + PC] = C.HAND_OVER

    def hand_over(self, s: bytearray, c: int) -> bool:
        """The message is the user's, and the call has ended: one step, for no signal is looked at in between."""
        slot = s[c + HAS] - 1
        if s[self.notes + slot] & DELIVERED:
            raise Broken(f"the message in slot {slot} is delivered twice")
        if self.setting.consumers == 1:
            if s[self.notes + slot] & OVERTAKEN:
                raise Broken(f"the message in slot {slot} is delivered after a later one")
            for other in self.slots[slot // self.setting.slots]:
                if 0 < s[self.age + other] < s[self.age + slot]:
                    s[self.notes + other] |= OVERTAKEN
        s[self.notes + slot] |= DELIVERED
        s[c + self.lease + slot] = HELD
        s[c + PC], s[c + HAS], s[c + PHASE] = C.USER, 0, 0
        return True

    # -- a consumer: sleep --------------------------------------------------------------------------------------

    def clear(self, s: bytearray, c: int) -> bool:
        s[c + INBOX] = 0
        s[c + PC] = C.SLEEP
        return True

    def timed_out(self, s: bytearray, c: int) -> bool:
        """`receive` looks once more after its time, and returns None then."""
        if s[c + PHASE] != AFTER_POLL:
            return False
        s[c + PHASE] = LAST
        s[c + PC] = C.MEND if self._is_something_to_look_after(s, c) else C.LOOK
        return True

    def sleep(self, s: bytearray, c: int) -> bool:
        self._say_asleep(s, self.producers[s[c + AT]], self.number[c] - 1)
        s[c + AT] += 1
        if s[c + AT] == self.setting.streams:
            s[c + PC], s[c + AT], s[c + PHASE] = C.LOOK, 0, AFTER_SLEEP_STORE
        return True

    def poll(self, s: bytearray, c: int) -> bool:
        if not s[c + INBOX]:
            return False
        s[c + PHASE] = AFTER_POLL
        return self.awake(s, c)

    def poll_idle(self, s: bytearray, c: int) -> bool:
        if not self.setting.idle_look or s[c + INBOX]:
            return False
        s[c + PHASE] = IDLE
        return self.awake(s, c)

    def awake(self, s: bytearray, c: int) -> bool:
        self._say_awake(s, self.producers[s[c + AT]], self.number[c] - 1)
        s[c + PC] = C.AWAKE
        s[c + AT] += 1
        if s[c + AT] == self.setting.streams:
            s[c + AT] = 0
            if s[c + PHASE] == IDLE:
                s[c + PHASE] = AFTER_POLL
                s[c + PC] = C.MEND if self._is_something_to_look_after(s, c) else C.LOOK
            else:
                s[c + PC] = C.PASS if s[c + HAS] else C.READ
            if s[c + PC] != C.READ:
                s[c + INBOX] = 0  # the next sleep would
        return True

    def read(self, s: bytearray, c: int, stream: int) -> bool:
        """Reads one number. The stream that it names is asked first."""
        if not s[c + INBOX] >> stream & 1:
            return False
        s[c + TURN], s[c + INBOX] = stream, 0
        s[c + PC] = C.LOOK
        return True

    def pass_on(self, s: bytearray, c: int) -> bool:
        if self._find(s, s[c + AT], READY) >= 0:
            s[c + WHOM] = self._tell(s, self.producers[s[c + AT]], 1 << self.number[c])
        if s[c + WHOM]:
            s[c + PC] = C.PASS_PUSH
        else:
            self._passed(s, c)
        return True

    def pass_push(self, s: bytearray, c: int) -> bool:
        self._push(s, s[c + WHOM], s[c + AT])
        self._passed(s, c)
        return True

    def pass_withheld(self, s: bytearray, c: int) -> bool:
        if not self._fault(s, "numbers"):
            return False
        self._passed(s, c)
        return True

    def _passed(self, s: bytearray, c: int) -> None:
        s[c + WHOM] = 0
        if s[c + PC] == C.TELL or s[c + PC] == C.TELL_PUSH:
            s[c + PC], s[c + AT] = C.WAITING, 0
            return
        s[c + AT] += 1
        if s[c + AT] < self.setting.streams:
            s[c + PC] = C.PASS
        else:
            s[c + PC], s[c + AT] = C.HAND_OVER, 0

    def claim_tell(self, s: bytearray, c: int) -> bool:
        """It held a lock in vain: tells of what it leaves READY. Where it just said that it sleeps, it may tell itself."""
        s[c + AT] = (s[c + HAS] - 1) // self.setting.slots
        self.pass_on(s, c)
        if s[c + WHOM]:
            s[c + PC] = C.TELL_PUSH
        return True

    # -- a consumer: the lease's end, in any thread -------------------------------------------------------------

    def views_die(self, s: bytearray, c: int, slot: int) -> bool:
        if s[c + REL_PC] or s[c + self.lease + slot] != HELD:
            return False
        if not (self.setting.threads or s[c + PC] == C.USER or s[c + PC] == C.CLOSING):
            return False
        s[c + self.lease + slot] = NOT_LEASED
        s[c + REL_PC], s[c + REL_SLOT], s[c + REL_STALE] = R.FREE, slot + 1, 0
        return True

    def release_free(self, s: bytearray, c: int) -> bool:
        slot = s[c + REL_SLOT] - 1
        if self._may_release(s, c, slot) and not s[c + REL_STALE]:
            self._free(s, slot)
        s[c + REL_PC] = R.WAITING
        return True

    def _may_release(self, s: bytearray, c: int, slot: int) -> bool:
        return s[self.state + slot] == LEASED and s[self.owner + slot] == self.number[c]

    def _free(self, s: bytearray, slot: int) -> None:
        if not s[self.notes + slot] & DELIVERED:
            raise Broken(f"the message in slot {slot} is freed and was not delivered")
        if any(s[c + self.lease + slot] == HELD for c in self.consumers):
            raise Broken(f"slot {slot} is freed while a user has its message")
        s[self.state + slot] = FREE
        s[self.owner + slot] = 0
        s[self.notes + slot] &= UNCOUNTED
        for other in self.slots[slot // self.setting.slots]:
            if s[self.age + other] > s[self.age + slot]:
                s[self.age + other] -= 1
        s[self.age + slot] = 0

    def _waits_for_slot(self, s: bytearray, slot: int) -> bool:
        return s[self.producers[slot // self.setting.slots] + WAITING] == FOR_A_SLOT

    def release_waiting(self, s: bytearray, c: int) -> bool:
        if self._waits_for_slot(s, s[c + REL_SLOT] - 1):
            s[c + REL_PC] = R.RING
        else:
            self._released(s, c)
        return True

    def release_ring(self, s: bytearray, c: int) -> bool:
        s[self.producers[(s[c + REL_SLOT] - 1) // self.setting.slots] + BELL] = 1
        self._released(s, c)
        return True

    def _released(self, s: bytearray, c: int) -> None:
        s[c + REL_PC] = s[c + REL_SLOT] = s[c + REL_STALE] = 0

    # -- looking after: the cut ends of one's own leases, and the leases of the dead -----------------------------

    def _is_something_to_look_after(self, s: bytearray, c: int) -> bool:
        return self._anyone_dead(s) or self._has_lease(s, c, CUT_SHORT)

    def mend(self, s: bytearray, c: int) -> bool:
        """Ends a lease whose end was cut."""
        for slot in range(self.count):
            if s[c + self.lease + slot] == CUT_SHORT:
                if self._may_release(s, c, slot):
                    self._free(s, slot)
                s[c + PC], s[c + HAS] = C.MEND_RING, slot + 1
                return True
        if s[c + PC] == C.CLOSING:
            return False
        for p in self.producers:
            self._forget_dead(s, p)
        s[c + PC] = C.RECLAIM
        return True

    def mend_ring(self, s: bytearray, c: int) -> bool:
        slot = s[c + HAS] - 1
        if self._waits_for_slot(s, slot):
            s[self.producers[slot // self.setting.slots] + BELL] = 1
        s[c + self.lease + slot] = NOT_LEASED
        s[c + PC], s[c + HAS] = C.MEND if s[c + PHASE] else C.CLOSING, 0
        return True

    def _is_of_dead(self, s: bytearray, slot: int) -> bool:
        """Whether a dead consumer has leased the slot, and its lock is free."""
        return s[self.state + slot] == LEASED and not s[self.lock + slot] and self._is_dead(s, s[self.owner + slot])

    def reclaim_lock(self, s: bytearray, c: int) -> bool:
        for slot in range(self.count):
            if self._is_of_dead(s, slot):
                s[self.lock + slot] = self.number[c]
                s[c + PC], s[c + HAS] = C.RECLAIM_READY, slot + 1
                return True
        s[c + PC] = C.LOOK
        return True

    def reclaim_ready(self, s: bytearray, c: int) -> bool:
        s[self.state + s[c + HAS] - 1] = READY
        s[c + PC] = C.RECLAIM_OWNER
        return True

    def reclaim_owner(self, s: bytearray, c: int) -> bool:
        s[self.owner + s[c + HAS] - 1] = 0
        s[c + PC] = C.RECLAIM_UNLOCK
        return True

    def reclaim_unlock(self, s: bytearray, c: int) -> bool:
        s[self.lock + s[c + HAS] - 1] = 0
        s[c + HAS] = 0
        s[c + PC] = C.RECLAIM if s[c + PHASE] else C.SETTLE
        return True

    def producer_reclaim_lock(self, s: bytearray, p: int) -> bool:
        self._forget_dead(s, p)
        for slot in self.slots[self.stream[p]]:
            if self._is_of_dead(s, slot):
                s[self.lock + slot] = self.producer_number
                s[p + PC], s[p + SLOT] = P.RECLAIM_READY, slot + 1
                return True
        s[p + PC] = P.PASS if s[p + AGAIN] else P.WAIT_LOOK
        return True

    def producer_reclaim_ready(self, s: bytearray, p: int) -> bool:
        s[self.state + s[p + SLOT] - 1] = READY
        s[p + PC] = P.RECLAIM_OWNER
        return True

    def producer_reclaim_owner(self, s: bytearray, p: int) -> bool:
        s[self.owner + s[p + SLOT] - 1] = 0
        s[p + PC] = P.RECLAIM_UNLOCK
        return True

    def producer_reclaim_unlock(self, s: bytearray, p: int) -> bool:
        s[self.lock + s[p + SLOT] - 1] = 0
        s[p + PC], s[p + SLOT], s[p + AGAIN] = P.RECLAIM, 0, 1
        return True

    # -- a consumer after an interrupt --------------------------------------------------------------------------

    def reconcile(self, s: bytearray, c: int) -> bool:
        """Unlocks what it has locked."""
        self._unlock_all(s, self.number[c])
        s[c + PC] = C.SETTLE
        return True

    def settle(self, s: bytearray, c: int) -> bool:
        """Puts back each slot that is leased to it and was not handed over. Last, it says that it does not sleep."""
        for slot in range(self.count):
            if self._may_release(s, c, slot) and not s[c + self.lease + slot] and not self._is_ending(s, c, slot):
                if s[self.lock + slot]:
                    return False  # somebody looks whether we are dead
                s[self.lock + slot] = self.number[c]
                s[c + PC], s[c + HAS] = C.RECLAIM_READY, slot + 1
                return True
        return self._settled(s, c)

    def _settled(self, s: bytearray, c: int) -> bool:
        for p in self.producers:
            self._say_awake(s, p, self.number[c] - 1)
        if s[c + CUT] == CUT_AND_CLOSING:
            s[c + PC] = C.CLOSING
        else:
            s[c + PC], s[c + PHASE] = C.LOOK, FIRST
        s[c + CUT] = 0
        return True

    def _is_ending(self, s: bytearray, c: int, slot: int) -> bool:
        return s[c + REL_PC] == R.FREE and s[c + REL_SLOT] == slot + 1 and not s[c + REL_STALE]

    # -- a consumer that closes, and leaves when its last lease has ended -----------------------------------------

    def close(self, s: bytearray, c: int) -> bool:
        """Its user may hold messages still. The last consumer stays."""
        if sum(self._stays(s, other) for other in self.consumers) < 2 or not self._fault(s, "consumer leaves"):
            return False
        for p in self.producers:
            self._say_awake(s, p, self.number[c] - 1)
        if s[c + CUT]:
            s[c + PC], s[c + CUT] = C.RECONCILE, CUT_AND_CLOSING
        else:
            s[c + PC] = C.CLOSING
        return True

    def _stays(self, s: bytearray, c: int) -> bool:
        return s[c + PC] != C.DEAD and s[c + PC] != C.CLOSING and s[c + CUT] != CUT_AND_CLOSING

    def leave(self, s: bytearray, c: int) -> bool:
        """The last lease has ended, in whichever thread: its slot is FREE, and the producer was told. Nobody holds its byte."""
        if s[c + REL_PC] or any(s[c + self.lease + slot] > 0 for slot in range(self.count)):
            return False
        self._be_gone(s, c)
        return True

    # -- faults -------------------------------------------------------------------------------------------------

    def _fault(self, s: bytearray, kind: str) -> bool:
        if not s[self.faults] or kind not in self.setting.kinds:
            return False
        s[self.faults] -= 1
        return True

    def producer_dies(self, s: bytearray, p: int) -> bool:
        """The kernel frees its locks; a successor adopts the stream at some time, and was not told what this one told."""
        if s[p + PC] == P.DONE or not self._fault(s, "producer dies"):
            return False
        for slot in self.slots[self.stream[p]]:
            if s[self.lock + slot] == self.producer_number:
                s[self.lock + slot] = 0
        for i in range(self.setting.consumers):
            s[p + self.told + i] &= ~1
        self._forget_call(s, p)
        return True

    def producer_interrupted(self, s: bytearray, p: int) -> bool:
        """Its next call finds the mark. Its locks stay."""
        if s[p + PC] == P.DONE or s[p + PC] == P.ROOM or not self._fault(s, "producer interrupted"):
            return False
        if s[p + TARGET]:  # nothing was pushed, so nothing was noted
            s[p + self.told + s[p + TARGET] - 1] &= ~1
        self._forget_call(s, p)
        return True

    def _forget_call(self, s: bytearray, p: int) -> None:
        s[p + WAIT_FOR] = s[p + SLOT] = s[p + TARGET] = s[p + AGAIN] = 0
        s[p + PC] = P.RECOVER_WAITING

    def consumer_dies(self, s: bytearray, c: int) -> bool:
        """The kernel frees its locks. What its user held may be delivered again. The last consumer lives."""
        if s[c + PC] == C.DEAD or sum(self._stays(s, other) for other in self.consumers) < 1 + self._stays(s, c):
            return False
        if not self._fault(s, "consumer dies"):
            return False
        for slot in range(self.count):
            if s[self.state + slot] == LEASED and s[self.owner + slot] == self.number[c]:
                s[self.notes + slot] &= ~DELIVERED
        self._be_gone(s, c)
        return True

    def _be_gone(self, s: bytearray, c: int) -> None:
        number = self.number[c]
        self._unlock_all(s, number)
        for slot in range(self.count):
            if s[self.state + slot] == READY and s[self.owner + slot] == number:
                s[self.owner + slot] = 0  # nobody reads it
        for p in self.producers:
            for i in range(self.setting.consumers):
                s[p + self.told + i] &= ~(1 << number)
        for at in range(c, c + self.consumer_nbytes):
            s[at] = 0
        s[c + PC] = C.DEAD

    def _unlock_all(self, s: bytearray, holder: int) -> None:
        for slot in range(self.count):
            if s[self.lock + slot] == holder:
                s[self.lock + slot] = 0

    def consumer_interrupted(self, s: bytearray, c: int) -> bool:
        """`receive` ends anywhere. The lease of a message that was not handed over ends without a release."""
        if s[c + PC] == C.USER or not self._stays(s, c) or not self._fault(s, "consumer interrupted"):
            return False
        for slot in range(self.count):
            if s[c + self.lease + slot] == MADE:
                self._drop(s, c, slot)
        if s[c + WHOM]:  # nothing was pushed, so nothing was noted
            s[self.producers[s[c + AT]] + self.told + s[c + WHOM] - 1] &= ~(1 << self.number[c])
        self._end_claim(s, c)
        s[c + PHASE] = s[c + AT] = s[c + HAS] = s[c + WHOM] = s[c + INBOX] = 0
        s[c + PC], s[c + CUT] = C.USER, CUT_CALL
        return True

    def _drop(self, s: bytearray, c: int, slot: int) -> None:
        s[c + self.lease + slot] = NOT_LEASED

    def release_interrupted(self, s: bytearray, c: int) -> bool:
        """The error is kept, and cuts the next call short. The lease's end is found by who looks after."""
        if s[c + REL_PC] == R.NONE or not self._fault(s, "consumer interrupted"):
            return False
        if not s[c + REL_STALE]:
            self._note_cut_end(s, c, s[c + REL_SLOT] - 1)
        if self._stays(s, c):
            s[c + CUT] = CUT_CALL
        self._released(s, c)
        return True

    def _note_cut_end(self, s: bytearray, c: int, slot: int) -> None:
        s[c + self.lease + slot] = CUT_SHORT

    def number_forged(self, s: bytearray, c: int, stream: int) -> bool:
        """Somebody sends a number that was sent before, or never."""
        if not self._listens(s, c) or s[c + INBOX] >> stream & 1 or not self._fault(s, "numbers"):
            return False
        s[c + INBOX] |= 1 << stream
        return True

    # -- the table ----------------------------------------------------------------------------------------------

    def producer_steps(self, stream: int = 0) -> dict[int, list[Step]]:
        """What the producer of a stream may do, by where it is."""
        slots = self.slots[stream]
        return {
            P.ROOM: [
                *(
                    Step(f"wait_for_room: look, loan: store LOANED, slot {i}", partial(self.room, slot=i))
                    for i in slots
                ),
                Step("wait_for_room: look, no room", self.no_room),
            ],
            P.WAIT: [Step("wait: store waiting", self.wait)],
            P.WAIT_LOOK: [Step("wait: look again, store waiting = 0 if enough", self.wait_look)],
            P.WAIT_BELL: [Step("wait: bell", self.wait_bell), Step("wait: 0.1 s passed", self.wait_idle)],
            P.LOAN: [
                *(Step(f"loan: store LOANED, slot {i}", partial(self.loan, slot=i)) for i in slots),
                Step("loan: no slot is FREE", self.loan_none),
            ],
            P.RECORD: [Step("commit: store sequence, owner = 0", self.record, is_private=True)],
            P.COMMIT: [Step("commit: store READY", self.commit)],
            P.PUBLISHED: [Step("publish: store published", self.published, is_quiet=True)],
            P.TELL: [
                Step("tell: look who sleeps", self.tell),
            ],
            P.PUSH: [Step("tell: push a number", self.push), Step("tell: push a number, withheld", self.push_withheld)],
            P.RECOVER_WAITING: [Step("recover: store waiting = 0", self.recover_waiting)],
            P.RECOVER: [Step("recover: unlock, store published", self.recover)],
            P.ABORT_RECORD: [Step("abort: store no sequence", self.abort_record)],
            P.ABORT: [Step("abort: store FREE", self.abort)],
            P.PASS: [
                Step("pass on: look", self.producer_pass_on),
            ],
            P.RECLAIM: [Step("reclaim: forget who died asleep, lock", self.producer_reclaim_lock)],
            P.RECLAIM_READY: [Step("reclaim: store READY", self.producer_reclaim_ready)],
            P.RECLAIM_OWNER: [Step("reclaim: store owner = 0", self.producer_reclaim_owner, is_private=True)],
            P.RECLAIM_UNLOCK: [Step("reclaim: unlock", self.producer_reclaim_unlock)],
            P.DONE: [],
        }

    def consumer_steps(self) -> dict[int, list[Step]]:
        """What a consumer may do, by where it is."""
        one_stream = self.setting.streams == 1
        return {
            C.USER: [
                Step("receive: call, take: look", self.receive, by_user=True),
                Step("receive: call, look after", self.receive_look_after, by_user=True),
                Step("close", self.close, by_user=True),
            ],
            C.LOOK: [Step("take: look", self.look)],
            C.LOOK_ALL: [Step("claim oldest: look", self.look_all)],
            C.LOCK: [Step("claim: lock and check", self.claim_lock)],
            C.MISSED: [Step("claim: unlock what has changed", self.claim_missed)],
            C.OWNER: [Step("claim: store owner", self.claim_owner, is_private=True)],
            C.LEASED: [Step("claim: store LEASED", self.claim_leased)],
            C.UNLOCK: [Step("claim: unlock", self.claim_unlock)],
            C.TELL: [
                Step("claim oldest: pass on: look", self.claim_tell),
            ],
            C.TELL_PUSH: [
                Step("claim oldest: pass on: push a number", self.pass_push),
                Step("claim oldest: pass on: push, withheld", self.pass_withheld),
            ],
            C.WAITING: [Step("claim: does the producer wait?", self.claim_waiting)],
            C.RING: [Step("claim: ring", self.claim_ring)],
            C.CLEAR: [Step("sleep: clear the inbox", self.clear), Step("receive: time is up", self.timed_out)],
            C.SLEEP: [Step("sleep: store asleep = now", self.sleep)],
            C.POLL: [
                Step("sleep: poll wakes, store asleep = 0", self.poll),
                Step("sleep: 50 ms passed, store asleep = 0", self.poll_idle),
            ],
            C.AWAKE: [Step("sleep: store asleep = 0 (next stream, or has a message)", self.awake)],
            C.READ: [
                Step(f"sleep: read a number of stream {i}", partial(self.read, stream=i), is_private=one_stream)
                for i in range(self.setting.streams)
            ],
            C.PASS: [
                Step("pass on: look", self.pass_on),
            ],
            C.PASS_PUSH: [
                Step("pass on: push a number", self.pass_push),
                Step("pass on: push, withheld", self.pass_withheld),
            ],
            C.HAND_OVER: [Step("receive: hand over", self.hand_over, is_quiet=True)],
            C.MEND: [Step("mend: store FREE, or forget who died asleep", self.mend)],
            C.MEND_RING: [Step("mend: ring if the producer waits", self.mend_ring)],
            C.RECLAIM: [Step("reclaim: lock", self.reclaim_lock)],
            C.RECLAIM_READY: [Step("reclaim: store READY", self.reclaim_ready)],
            C.RECLAIM_OWNER: [Step("reclaim: store owner = 0", self.reclaim_owner, is_private=True)],
            C.RECLAIM_UNLOCK: [Step("reclaim: unlock", self.reclaim_unlock)],
            C.RECONCILE: [Step("reconcile: unlock", self.reconcile)],
            C.SETTLE: [Step("reconcile: put back a lease, or store asleep = 0", self.settle)],
            C.CLOSING: [Step("leave", self.leave), Step("mend: store FREE", self.mend)],
            C.DEAD: [],
        }

    def release_steps(self) -> dict[int, list[Step]]:
        """What a consumer's thread may do in which a lease ends, by where it is."""
        return {
            R.NONE: [
                Step(f"lease: the last view of slot {slot} dies", partial(self.views_die, slot=slot), by_user=True)
                for slot in range(self.count)
            ],
            R.FREE: [Step("release: store FREE", self.release_free, is_quiet=True)],
            R.WAITING: [Step("release: does the producer wait?", self.release_waiting)],
            R.RING: [Step("release: ring", self.release_ring)],
        }

    def fault_steps(self) -> list[tuple[str, int, Step]]:
        """Who, where its block is, and what may happen to it at any time."""
        steps = []
        for at, i in self.stream.items():
            steps += [
                (f"producer {i}", at, Step("DIES", self.producer_dies)),
                (f"producer {i}", at, Step("INTERRUPTED", self.producer_interrupted)),
            ]
        for at, i in self.number.items():
            steps += [
                (f"consumer {i - 1}", at, Step("DIES", self.consumer_dies)),
                (f"consumer {i - 1}", at, Step("INTERRUPTED", self.consumer_interrupted)),
                (f"consumer {i - 1}", at, Step("INTERRUPTED in a lease's end", self.release_interrupted)),
            ]
            for stream in range(self.setting.streams):
                forged = partial(self.number_forged, stream=stream)
                steps.append((f"consumer {i - 1}", at, Step(f"FORGED number of stream {stream}", forged)))
        return steps
