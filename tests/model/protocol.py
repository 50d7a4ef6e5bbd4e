"""The protocol of a stream as a model: each store, lock, number and sleep is one step.

``explore.py`` takes the steps in every order. To compare the model with the code, read :meth:`Protocol.producer_steps`,
:meth:`Protocol.consumer_steps` and :meth:`Protocol.release_steps`: where a process is, the name of each step that it may
take next, and the method that takes it. A method has its guard first (``return False``: not possible now), then its effect.
``s`` is the state, one byte per field; ``p`` or ``c`` is where the block of this producer or consumer begins.

What one step holds together, and why no order of steps is lost by that:

* What nobody else sees is taken with the step before or after it: the call, the choice of a READY slot from what a look has
  seen, the end of a poll. A claim's lock and its check, too: nobody else moves a READY slot that is locked, and a slot that
  is not READY yet fails the check of its generation if it is locked later.
* A slot's generation is one bit per consumer: whether there was a commit since this consumer read it. A sequence number is
  an age, the order among the messages that lie in slots. `published` is the note UNCOUNTED on the one message that it may
  not count yet.
* `asleep` is a rank (1 sleeps longest), and what a producer has told is a bit that the next sleep clears: the code compares
  times.
* An inbox is one bit per stream: a consumer reads all numbers at once, and a number only names the stream to ask first.
* Spinning is a look that comes later. FLAG_AGAIN only counts. A consumer that finds a slot locked looks again without it.

Not in the model: TCP, clips, a second ring, copies where consumers hold too much, joining and leaving, a full inbox (that is
a number withheld). All see stores in the order in which they are made. x86-64 may delay a store behind later loads of the same
thread until its next system call or locked instruction: `asleep` and `waiting` are each followed by a look, so there the
model promises more than a processor without a fence, and the looks every 50 ms and 0.1 s heal the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import partial
from typing import NamedTuple

from blendtorch_shm.memory.states import State

FREE, LOANED, READY, LEASED = (int(state) for state in State)
FOR_A_SLOT = 255
_OTHER = bytes([0, 2, 1, *range(3, 256)])  # consumer 1 for 2


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
    WHO_SLEEPS = auto()
    PUSH = auto()
    ADOPT = auto()
    RECOVER = auto()
    ABORT_RECORD = auto()
    ABORT = auto()
    RECLAIM = auto()
    RECLAIM_READY = auto()
    RECLAIM_OWNER = auto()
    RECLAIM_UNLOCK = auto()
    DONE = auto()


class C(IntEnum):
    """What a consumer does next."""

    USER = 0
    LOOK = auto()
    LOCK = auto()
    MISSED = auto()
    OWNER = auto()
    LEASED = auto()
    UNLOCK = auto()
    WAITING = auto()
    RING = auto()
    SLEEP = auto()
    POLL = auto()
    AWAKE = auto()
    READ = auto()
    PASS = auto()
    PASS_PUSH = auto()
    HAND_OVER = auto()
    RECLAIM = auto()
    RECLAIM_READY = auto()
    RECLAIM_OWNER = auto()
    RECLAIM_UNLOCK = auto()
    RECONCILE = auto()
    SETTLE = auto()
    SETTLE_RING = auto()
    DEAD = auto()


class R(IntEnum):
    """What a consumer's thread does next in which the last view of a message dies."""

    NONE = 0
    FREE = auto()
    WAITING = auto()
    RING = auto()
    CUT = auto()


FIRST, AFTER_SLEEP_STORE, AFTER_POLL, IDLE = 1, 2, 3, 4  # phases of `receive`
DELIVERED, UNCOUNTED, OVERTAKEN = (
    1,
    2,
    4,
)  # notes on the message in a slot; UNCOUNTED: `published` does not count it yet
NOT_LEASED, MADE, HELD = 0, 1, 2  # a consumer's own table of leases

# A producer's block. The first five are its own memory, the others the stream's control segment and the bell.
PC, WAIT_FOR, SLOT, TARGET, AGAIN, WAITING, BELL, LEFT, ASLEEP = range(9)
# A consumer's block (PC = 0, as above).
PHASE, AT, TURN, HAS, INBOX, CUT, REL_PC, REL_SLOT, REL_STALE, HEAD, CHANGED, TRIED = range(1, 13)


class Protocol:
    """The steps of all processes, over states that are bytes.

    Args:
        setting: how many of everything.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        n, m = setting.streams, setting.consumers
        self.count = n * setting.slots  # slots altogether
        # Slots: five fields each, those of all slots one after the other.
        self.state, self.age, self.owner, self.lock, self.notes = (i * self.count for i in range(5))
        self.faults = 5 * self.count
        self.told = ASLEEP + m  # who was told in this sleep: 1 by the producer, 2 by the other consumer
        producer_nbytes = self.told + m
        self.producers = [self.faults + 1 + i * producer_nbytes for i in range(n)]
        self.lease = TRIED + 1
        self.consumer_nbytes = self.lease + self.count
        first = self.faults + 1 + n * producer_nbytes
        self.consumers = [first + i * self.consumer_nbytes for i in range(m)]
        self.number = {at: i + 1 for i, at in enumerate(self.consumers)}  # what stands as an owner and at a lock
        self.stream = {at: i for i, at in enumerate(self.producers)}
        self.nbytes = first + m * self.consumer_nbytes

    def initial(self) -> bytes:
        """Everything is FREE, and every consumer is in its user's code."""
        s = bytearray(self.nbytes)
        s[self.faults] = self.setting.faults
        for p in self.producers:
            s[p + LEFT] = self.setting.messages
        return bytes(s)

    def is_done(self, s: bytes) -> bool:
        """Whether every message was delivered and every slot is FREE and unlocked."""
        return (
            not any(s[self.state : self.state + self.count])
            and not any(s[self.lock : self.lock + self.count])
            and all(s[p + PC] == P.DONE for p in self.producers)
            and not any(s[c + REL_PC] for c in self.consumers)
        )

    def check_rest(self, s: bytes) -> None:
        """What must hold where only users could do something: nobody sleeps over what it could have."""
        for p, stream in self.stream.items():
            ready = self._states(s, stream).count(READY)
            for i, c in enumerate(self.consumers):
                if ready and s[c + PC] == C.POLL:
                    raise Broken(f"consumer {i} sleeps while {ready} slots of stream {stream} are READY")
            if s[p + PC] == P.WAIT_BELL:
                below = s[p + WAIT_FOR]
                if below == FOR_A_SLOT:
                    if FREE in self._states(s, stream):
                        raise Broken(f"producer {stream} waits for a slot while one is FREE")
                elif ready < below:
                    raise Broken(f"producer {stream} waits until fewer than {below} slots are READY, and {ready} are")

    def normal(self, s: bytes) -> bytes:
        """The one of two states that stands for both where they differ only in which consumer is which."""
        if self.setting.consumers != 2:
            return s
        n, (a, b) = self.count, self.consumers
        if s[a:b] < s[b:]:
            return s
        t = bytearray(s)
        t[a:b], t[b:] = s[b:], s[a:b]
        t[2 * n : 4 * n] = s[2 * n : 4 * n].translate(_OTHER)  # owners and locks
        for p in self.producers:
            t[p + TARGET] = _OTHER[s[p + TARGET]]
            t[p + ASLEEP], t[p + ASLEEP + 1] = s[p + ASLEEP + 1], s[p + ASLEEP]
            t[p + self.told], t[p + self.told + 1] = s[p + self.told + 1], s[p + self.told]
        return min(s, bytes(t)) if s[a:b] == s[b:] else bytes(t)

    def describe(self, s: bytes) -> str:
        """One line for people."""
        slots = ", ".join(
            f"{State(s[self.state + i]).name} age={s[self.age + i]} notes={s[self.notes + i]} "
            f"owner={s[self.owner + i]} lock={s[self.lock + i]}"
            for i in range(self.count)
        )
        producers = "; ".join(
            f"{P(s[p]).name} waiting={s[p + WAITING]} bell={s[p + BELL]} asleep={list(s[p + ASLEEP : p + self.told])}"
            for p in self.producers
        )
        consumers = "; ".join(
            f"{C(s[c]).name} has={s[c + HAS]} inbox={s[c + INBOX]} cut={s[c + CUT]} release={R(s[c + REL_PC]).name} "
            f"leases={list(s[c + self.lease : c + self.consumer_nbytes])}"
            for c in self.consumers
        )
        return f"slots: {slots}\nproducers: {producers}\nconsumers: {consumers}"

    # -- reading ------------------------------------------------------------------------------------------------

    def _slots(self, stream: int) -> range:
        return range(stream * self.setting.slots, (stream + 1) * self.setting.slots)

    def _states(self, s: bytes | bytearray, stream: int) -> bytes | bytearray:
        at = self.state + stream * self.setting.slots
        return s[at : at + self.setting.slots]

    def _leases(self, s: bytes | bytearray, c: int) -> bytes | bytearray:
        return s[c + self.lease : c + self.lease + self.count]

    def _is_dead(self, s: bytearray, owner: int) -> bool:
        """Whether nobody holds the member's byte."""
        return owner > 0 and s[self.consumers[owner - 1] + PC] == C.DEAD

    def _anyone_dead(self, s: bytearray) -> bool:
        return any(s[c + PC] == C.DEAD for c in self.consumers)

    # -- the producer: publish ----------------------------------------------------------------------------------

    def room(self, s: bytearray, p: int) -> bool:
        if not s[p + LEFT]:
            s[p + PC] = P.DONE
            return True
        if self._states(s, self.stream[p]).count(READY) < self.setting.max_ready:
            return self.loan(s, p)
        else:
            s[p + PC], s[p + WAIT_FOR] = P.WAIT, (self.setting.max_ready + 1) // 2
        return True

    def _enough(self, s: bytearray, p: int) -> bool:
        states = self._states(s, self.stream[p])
        return FREE in states if s[p + WAIT_FOR] == FOR_A_SLOT else states.count(READY) < self.setting.max_ready

    def wait(self, s: bytearray, p: int) -> bool:
        s[p + WAITING] = s[p + WAIT_FOR]
        s[p + PC] = P.WAIT_LOOK
        return True

    def wait_look(self, s: bytearray, p: int) -> bool:
        if self._enough(s, p):
            return self._waited(s, p)
        s[p + PC] = P.WAIT_BELL
        return True

    def _waited(self, s: bytearray, p: int) -> bool:
        s[p + WAITING] = s[p + WAIT_FOR] = 0
        s[p + PC] = P.LOAN
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

    def loan(self, s: bytearray, p: int) -> bool:
        slot = self._states(s, self.stream[p]).find(FREE)
        if slot < 0:
            s[p + PC], s[p + WAIT_FOR] = P.WAIT, FOR_A_SLOT
        else:
            slot += self._slots(self.stream[p])[0]
            s[self.state + slot] = LOANED
            s[p + PC], s[p + SLOT] = P.RECORD, slot
        return True

    def record(self, s: bytearray, p: int) -> bool:
        s[self.notes + s[p + SLOT]] = UNCOUNTED  # a sequence number that is not below `published`
        s[p + PC] = P.COMMIT
        return True

    def commit(self, s: bytearray, p: int) -> bool:
        slot, stream = s[p + SLOT], self.stream[p]
        for other in self._slots(stream):
            if s[self.state + other] != LOANED and s[self.notes + other] & UNCOUNTED:
                raise Broken(f"slot {slot} gets the sequence number that slot {other} has or had")
        s[self.state + slot] = READY
        s[self.age + slot] = 1 + max(s[self.age + other] for other in self._slots(stream))
        for c in self.consumers:  # the slot has another generation than this consumer knows
            if s[c + HEAD] == slot + 1:
                s[c + CHANGED] = 1
            if s[c + REL_PC] and s[c + REL_SLOT] == slot:
                s[c + REL_STALE] = 1
        s[p + LEFT] -= 1
        s[p + PC] = P.PUBLISHED
        return True

    def published(self, s: bytearray, p: int) -> bool:
        s[self.notes + s[p + SLOT]] &= ~UNCOUNTED
        s[p + SLOT] = 0
        s[p + PC] = P.WHO_SLEEPS
        return True

    def who_sleeps(self, s: bytearray, p: int) -> bool:
        target = self._longest_sleeper(s, p, told_by=1)
        if target:
            s[p + self.told + target - 1] |= 1
            s[p + PC], s[p + TARGET] = P.PUSH, target
        else:
            self._told(s, p)
        return True

    def _longest_sleeper(self, s: bytearray, p: int, told_by: int) -> int:
        """Number of the consumer that sleeps longest and was not told yet, or 0."""
        found = 0
        for i in range(self.setting.consumers):
            rank = s[p + ASLEEP + i]
            if rank and not s[p + self.told + i] & told_by and (not found or rank < s[p + ASLEEP + found - 1]):
                found = i + 1
        return found

    def push(self, s: bytearray, p: int) -> bool:
        self._push(s, s[p + TARGET], self.stream[p])
        s[p + TARGET] = 0
        self._told(s, p)
        return True

    def push_withheld(self, s: bytearray, p: int) -> bool:
        if not self._fault(s, "numbers"):
            return False
        s[p + TARGET] = 0
        self._told(s, p)
        return True

    def _push(self, s: bytearray, target: int, stream: int) -> None:
        c = self.consumers[target - 1]
        if s[c + PC] != C.DEAD:
            s[c + INBOX] |= 1 << stream

    def _told(self, s: bytearray, p: int) -> None:
        s[p + PC] = P.WAIT_LOOK if s[p + AGAIN] else P.ROOM
        s[p + AGAIN] = 0

    # -- the producer: recover ----------------------------------------------------------------------------------

    def adopt(self, s: bytearray, p: int) -> bool:
        s[p + WAITING] = 0
        s[p + PC] = P.RECOVER
        return True

    def recover(self, s: bytearray, p: int) -> bool:
        """Counts the message of which there is a trace: in a slot in any state but LOANED."""
        for slot in self._slots(self.stream[p]):
            if self._is_trace(s[self.state + slot]):
                s[self.notes + slot] &= ~UNCOUNTED
        s[p + PC] = P.ABORT_RECORD
        return True

    def _is_trace(self, state: int) -> bool:
        return state != LOANED

    def abort_record(self, s: bytearray, p: int) -> bool:
        slot = self._states(s, self.stream[p]).find(LOANED)
        if slot < 0:
            s[p + PC] = P.ROOM
        else:
            slot += self._slots(self.stream[p])[0]
            s[self.notes + slot] = 0
            s[p + PC], s[p + SLOT] = P.ABORT, slot
        return True

    def abort(self, s: bytearray, p: int) -> bool:
        s[self.state + s[p + SLOT]] = FREE
        s[p + PC], s[p + SLOT] = P.ABORT_RECORD, 0
        return True

    # -- a consumer: receive ------------------------------------------------------------------------------------

    def receive(self, s: bytearray, c: int) -> bool:
        if not self.setting.threads and (s[c + REL_PC] not in (R.NONE, R.CUT) or HELD in self._leases(s, c)):
            return False
        s[c + PHASE] = FIRST
        if not s[c + CUT]:
            return self.look(s, c)
        s[c + PC] = C.RECONCILE
        return True

    def look(self, s: bytearray, c: int) -> bool:
        """Finds the oldest READY slot of the stream that it has not tried to lock since it began with this stream."""
        stream = s[c + TURN]
        states, tried = self._states(s, stream), s[c + TRIED]
        first = self._slots(stream)[0]
        found = [
            (s[self.age + first + i], first + i) for i, x in enumerate(states) if x == READY and not tried >> i & 1
        ]
        if found:
            s[c + HEAD] = min(found)[1] + 1
            s[c + PC] = C.LOCK
        else:
            self._next_stream(s, c)
        return True

    def _next_stream(self, s: bytearray, c: int) -> None:
        s[c + AT] += 1
        s[c + TURN] = (s[c + TURN] + 1) % self.setting.streams
        s[c + TRIED] = 0
        if s[c + AT] < self.setting.streams:
            s[c + PC] = C.LOOK
        else:
            s[c + AT] = 0
            s[c + PC] = C.POLL if s[c + PHASE] == AFTER_SLEEP_STORE else C.SLEEP

    def claim_lock(self, s: bytearray, c: int) -> bool:
        slot = s[c + HEAD] - 1
        if s[self.lock + slot]:  # somebody claims it, or looks again
            s[c + TRIED] |= 1 << slot % self.setting.slots
            s[c + HEAD] = s[c + CHANGED] = 0
            s[c + PC] = C.LOOK
        else:
            s[self.lock + slot] = self.number[c]
            s[c + PC] = C.OWNER if s[self.state + slot] == READY and not s[c + CHANGED] else C.MISSED
        return True

    def claim_missed(self, s: bytearray, c: int) -> bool:
        """Unlocks a slot that has changed since the look, and looks again: whoever found it locked depends on that."""
        s[self.lock + s[c + HEAD] - 1] = 0
        s[c + HEAD] = s[c + CHANGED] = s[c + TRIED] = 0
        s[c + PC] = C.LOOK
        return True

    def claim_owner(self, s: bytearray, c: int) -> bool:
        s[self.owner + s[c + HEAD] - 1] = self.number[c]
        s[c + PC] = C.LEASED
        return True

    def claim_leased(self, s: bytearray, c: int) -> bool:
        slot = s[c + HEAD] - 1
        if s[self.state + slot] != READY:
            raise Broken(f"slot {slot} is claimed and not READY")
        s[self.state + slot] = LEASED
        s[c + PC] = C.UNLOCK
        return True

    def claim_unlock(self, s: bytearray, c: int) -> bool:
        slot = s[c + HEAD] - 1
        s[self.lock + slot] = 0
        s[c + HEAD] = s[c + CHANGED] = s[c + TRIED] = s[c + AT] = 0
        s[c + TURN] = (s[c + TURN] + 1) % self.setting.streams
        s[c + HAS] = slot + 1
        s[c + PC] = C.WAITING
        return True

    def claim_waiting(self, s: bytearray, c: int) -> bool:
        """Makes the lease, which nobody else sees, and asks whether the producer waits for room."""
        slot = s[c + HAS] - 1
        s[c + self.lease + slot] = MADE
        stream = slot // self.setting.slots
        below = s[self.producers[stream] + WAITING]
        if 0 < below < FOR_A_SLOT and self._states(s, stream).count(READY) < below:
            s[c + PC] = C.RING
        else:
            self._taken(s, c)
        return True

    def claim_ring(self, s: bytearray, c: int) -> bool:
        s[self.producers[(s[c + HAS] - 1) // self.setting.slots] + BELL] = 1
        self._taken(s, c)
        return True

    def _taken(self, s: bytearray, c: int) -> None:
        s[c + PC] = {FIRST: C.HAND_OVER, AFTER_SLEEP_STORE: C.AWAKE, AFTER_POLL: C.PASS}[s[c + PHASE]]

    def hand_over(self, s: bytearray, c: int) -> bool:
        """The message is the user's, and the call has ended: one step, for no signal is looked at in between."""
        slot = s[c + HAS] - 1
        if s[self.notes + slot] & DELIVERED:
            raise Broken(f"the message in slot {slot} is delivered twice")
        if s[self.notes + slot] & OVERTAKEN and self.setting.consumers == 1:
            raise Broken(f"the message in slot {slot} is delivered after a later one")
        for other in self._slots(slot // self.setting.slots) if self.setting.consumers == 1 else ():
            if 0 < s[self.age + other] < s[self.age + slot]:
                s[self.notes + other] |= OVERTAKEN
        s[self.notes + slot] |= DELIVERED
        s[c + self.lease + slot] = HELD
        s[c + PC], s[c + HAS], s[c + PHASE] = C.USER, 0, 0
        return True

    # -- a consumer: sleep --------------------------------------------------------------------------------------

    def sleep(self, s: bytearray, c: int) -> bool:
        p, i = self.producers[s[c + AT]], self.number[c] - 1
        others = [p + ASLEEP + k for k in range(self.setting.consumers) if k != i]
        own = s[p + ASLEEP + i]  # not 0 after an interrupt
        for at in others:
            if s[at] > own > 0:
                s[at] -= 1
        s[p + ASLEEP + i] = 1 + sum(s[at] > 0 for at in others)
        s[p + self.told + i] = 0  # another sleep
        s[c + AT] += 1
        if s[c + AT] == self.setting.streams:
            s[c + PC], s[c + AT], s[c + PHASE] = C.LOOK, 0, AFTER_SLEEP_STORE
        return True

    def timed_out(self, s: bytearray, c: int) -> bool:
        """`receive` returns None after its time."""
        if s[c + PHASE] != AFTER_POLL or s[c + AT]:
            return False
        s[c + PC], s[c + PHASE] = C.USER, 0
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
        p, i = self.producers[s[c + AT]], self.number[c] - 1
        own = s[p + ASLEEP + i]
        for at in range(p + ASLEEP, p + ASLEEP + self.setting.consumers):
            if s[at] > own:
                s[at] -= 1
        s[p + ASLEEP + i] = s[p + self.told + i] = 0
        s[c + PC] = C.AWAKE
        s[c + AT] += 1
        if s[c + AT] == self.setting.streams:
            s[c + AT] = 0
            if s[c + PHASE] == IDLE:
                s[c + PC] = C.RECLAIM if self._anyone_dead(s) else C.LOOK
                s[c + PHASE] = IDLE if self._anyone_dead(s) else AFTER_POLL
            else:
                s[c + PC] = C.PASS if s[c + HAS] else C.READ
        return True

    def read(self, s: bytearray, c: int) -> bool:
        """Reads all numbers; the stream that one names is asked first."""
        named = (s[c + INBOX] & -s[c + INBOX]).bit_length() - 1
        s[c + TURN] = named
        s[c + INBOX] = 0
        s[c + PC] = C.LOOK
        return True

    def pass_on(self, s: bytearray, c: int) -> bool:
        p = self.producers[s[c + AT]]
        if READY in self._states(s, s[c + AT]):
            target = self._longest_sleeper(s, p, told_by=2)
            if target and target != self.number[c]:
                s[p + self.told + target - 1] |= 2
                s[c + PC] = C.PASS_PUSH
                return True
        self._passed(s, c)
        return True

    def pass_push(self, s: bytearray, c: int) -> bool:
        (target,) = (i for at, i in self.number.items() if at != c)
        self._push(s, target, s[c + AT])
        self._passed(s, c)
        return True

    def pass_withheld(self, s: bytearray, c: int) -> bool:
        if not self._fault(s, "numbers"):
            return False
        self._passed(s, c)
        return True

    def _passed(self, s: bytearray, c: int) -> None:
        s[c + AT] += 1
        if s[c + AT] < self.setting.streams:
            s[c + PC] = C.PASS
        else:
            s[c + PC], s[c + AT] = C.HAND_OVER, 0

    # -- a consumer: the lease's end, in any thread -------------------------------------------------------------

    def views_die(self, s: bytearray, c: int, slot: int) -> bool:
        if s[c + REL_PC] or s[c + self.lease + slot] != HELD or not self._threads(s, c):
            return False
        s[c + self.lease + slot] = NOT_LEASED
        s[c + REL_PC], s[c + REL_SLOT], s[c + REL_STALE] = R.FREE, slot, 0
        return True

    def _threads(self, s: bytearray, c: int) -> bool:
        return self.setting.threads or s[c + PC] == C.USER

    def release_free(self, s: bytearray, c: int) -> bool:
        self._release(s, c)
        s[c + REL_PC] = R.WAITING
        return True

    def _release(self, s: bytearray, c: int) -> None:
        slot = s[c + REL_SLOT]
        if self._may_release(s, c, slot):
            self._free(s, slot)

    def _free(self, s: bytearray, slot: int) -> None:
        if not s[self.notes + slot] & DELIVERED:
            raise Broken(f"the message in slot {slot} is freed and was not delivered")
        if any(s[c + self.lease + slot] == HELD for c in self.consumers):
            raise Broken(f"slot {slot} is freed while a user has its message")
        s[self.state + slot] = FREE
        s[self.owner + slot] = 0
        s[self.notes + slot] &= UNCOUNTED
        for other in self._slots(slot // self.setting.slots):
            if s[self.age + other] > s[self.age + slot]:
                s[self.age + other] -= 1
        s[self.age + slot] = 0

    def _may_release(self, s: bytearray, c: int, slot: int) -> bool:
        return s[self.state + slot] == LEASED and s[self.owner + slot] == self.number[c] and not s[c + REL_STALE]

    def release_waiting(self, s: bytearray, c: int) -> bool:
        waits = s[self.producers[s[c + REL_SLOT] // self.setting.slots] + WAITING] == FOR_A_SLOT
        if waits:
            s[c + REL_PC] = R.RING
        else:
            self._released(s, c)
        return True

    def release_ring(self, s: bytearray, c: int) -> bool:
        s[self.producers[s[c + REL_SLOT] // self.setting.slots] + BELL] = 1
        self._released(s, c)
        return True

    def _released(self, s: bytearray, c: int) -> None:
        s[c + REL_PC] = s[c + REL_SLOT] = s[c + REL_STALE] = 0

    # -- reclaim: of a dead owner's leases (a consumer that idles, a producer that waits), of one's own ----------

    def _lock_dead(self, s: bytearray, number: int, slots: range) -> int:
        """Locks the lowest slot that a dead consumer has leased; -1: there is none whose lock is free."""
        for slot in slots:
            if s[self.state + slot] == LEASED and self._is_dead(s, s[self.owner + slot]) and not s[self.lock + slot]:
                s[self.lock + slot] = number
                return slot
        return -1

    def reclaim_lock(self, s: bytearray, c: int) -> bool:
        slot = self._lock_dead(s, self.number[c], range(self.count))
        if slot < 0:
            s[c + PC], s[c + PHASE] = C.LOOK, AFTER_POLL
        else:
            s[c + PC], s[c + HAS] = C.RECLAIM_READY, slot + 1
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
        s[c + PC] = C.RECLAIM if s[c + PHASE] == IDLE else C.SETTLE
        return True

    def producer_reclaim_lock(self, s: bytearray, p: int) -> bool:
        slot = self._lock_dead(s, 255, self._slots(self.stream[p]))
        if slot < 0:
            s[p + PC] = P.WHO_SLEEPS if s[p + AGAIN] else P.WAIT_LOOK
        else:
            s[p + PC], s[p + SLOT] = P.RECLAIM_READY, slot
        return True

    def producer_reclaim_ready(self, s: bytearray, p: int) -> bool:
        s[self.state + s[p + SLOT]] = READY
        s[p + PC] = P.RECLAIM_OWNER
        return True

    def producer_reclaim_owner(self, s: bytearray, p: int) -> bool:
        s[self.owner + s[p + SLOT]] = 0
        s[p + PC] = P.RECLAIM_UNLOCK
        return True

    def producer_reclaim_unlock(self, s: bytearray, p: int) -> bool:
        s[self.lock + s[p + SLOT]] = 0
        s[p + PC], s[p + SLOT], s[p + AGAIN] = P.RECLAIM, 0, 1
        return True

    # -- a consumer after an interrupt --------------------------------------------------------------------------

    def reconcile(self, s: bytearray, c: int) -> bool:
        """Unlocks what it has locked."""
        for slot in range(self.count):
            if s[self.lock + slot] == self.number[c]:
                s[self.lock + slot] = 0
        s[c + PC] = C.SETTLE
        return True

    def settle(self, s: bytearray, c: int) -> bool:
        """Ends the lease whose end was cut; puts back each slot that is leased to it and was not handed over."""
        if s[c + REL_PC] == R.CUT:
            self._release(s, c)
            s[c + PC] = C.SETTLE_RING
            return True
        for slot in range(self.count):
            is_mine = s[self.state + slot] == LEASED and s[self.owner + slot] == self.number[c]
            if is_mine and not s[c + self.lease + slot] and not self._is_being_released(s, c, slot):
                if s[self.lock + slot]:
                    return False  # somebody looks whether we are dead
                s[self.lock + slot] = self.number[c]
                s[c + PC], s[c + HAS] = C.RECLAIM_READY, slot + 1
                return True
        return self._settled(s, c)

    def _settled(self, s: bytearray, c: int) -> bool:
        s[c + PC], s[c + CUT] = C.LOOK, 0
        return True

    def _is_being_released(self, s: bytearray, c: int, slot: int) -> bool:
        return s[c + REL_PC] == R.FREE and s[c + REL_SLOT] == slot

    def settle_ring(self, s: bytearray, c: int) -> bool:
        p = self.producers[s[c + REL_SLOT] // self.setting.slots]
        if s[p + WAITING] == FOR_A_SLOT:
            s[p + BELL] = 1
        self._released(s, c)
        s[c + PC] = C.SETTLE
        return True

    # -- faults -------------------------------------------------------------------------------------------------

    def _fault(self, s: bytearray, kind: str) -> bool:
        if not s[self.faults] or kind not in self.setting.kinds:
            return False
        s[self.faults] -= 1
        return True

    def producer_dies(self, s: bytearray, p: int) -> bool:
        """The kernel frees its locks; a successor adopts the stream at some time."""
        if s[p + PC] == P.DONE or not self._fault(s, "producer dies"):
            return False
        self._unlock_all(s, 255)
        for i in range(self.setting.consumers):
            s[p + self.told + i] &= 2
        s[p + WAIT_FOR] = s[p + SLOT] = s[p + TARGET] = s[p + AGAIN] = 0
        s[p + PC] = P.ADOPT
        return True

    def producer_interrupted(self, s: bytearray, p: int) -> bool:
        """Its next call finds the mark. Its locks stay."""
        if s[p + PC] in (P.DONE, P.ROOM) or not self._fault(s, "producer interrupted"):
            return False
        s[p + WAIT_FOR] = s[p + SLOT] = s[p + TARGET] = s[p + AGAIN] = 0
        s[p + PC] = P.RECOVER
        return True

    def consumer_dies(self, s: bytearray, c: int) -> bool:
        """The kernel frees its locks. What its user held may be delivered again. The last consumer lives."""
        if (
            sum(s[at + PC] != C.DEAD for at in self.consumers) < 2
            or s[c + PC] == C.DEAD
            or not self._fault(s, "consumer dies")
        ):
            return False
        number = self.number[c]
        self._unlock_all(s, number)
        for slot in range(self.count):
            if s[self.state + slot] == LEASED and s[self.owner + slot] == number:
                s[self.notes + slot] &= ~DELIVERED
            elif s[self.state + slot] == READY and s[self.owner + slot] == number:
                s[self.owner + slot] = 0  # nobody reads it
        s[c : c + self.consumer_nbytes] = bytes(self.consumer_nbytes)
        s[c + PC] = C.DEAD
        return True

    def _unlock_all(self, s: bytearray, holder: int) -> None:
        for slot in range(self.count):
            if s[self.lock + slot] == holder:
                s[self.lock + slot] = 0

    def consumer_interrupted(self, s: bytearray, c: int) -> bool:
        """`receive` ends anywhere. The lease of a message that was not handed over ends without a release."""
        if s[c + PC] in (C.USER, C.DEAD) or not self._fault(s, "consumer interrupted"):
            return False
        for slot in range(self.count):
            if s[c + self.lease + slot] == MADE:
                s[c + self.lease + slot] = NOT_LEASED
        s[c + HEAD] = s[c + CHANGED] = s[c + TRIED] = 0
        s[c + PC], s[c + PHASE], s[c + AT], s[c + HAS], s[c + CUT] = C.USER, 0, 0, 0, 1
        return True

    def release_interrupted(self, s: bytearray, c: int) -> bool:
        if s[c + REL_PC] in (R.NONE, R.CUT) or not self._fault(s, "consumer interrupted"):
            return False
        s[c + CUT] = 1
        if s[c + REL_PC] == R.RING:
            self._released(s, c)
        else:
            s[c + REL_PC] = R.CUT
        return True

    def number_forged(self, s: bytearray, c: int, stream: int) -> bool:
        """Somebody sends a number that was sent before, or never."""
        if s[c + PC] == C.DEAD or s[c + INBOX] >> stream & 1 or not self._fault(s, "numbers"):
            return False
        s[c + INBOX] |= 1 << stream
        return True

    # -- the table ----------------------------------------------------------------------------------------------

    def producer_steps(self) -> dict[int, list[Step]]:
        """What a producer may do, by where it is."""
        return {
            P.ROOM: [Step("wait_for_room: look, loan: store LOANED if there is room", self.room)],
            P.WAIT: [Step("wait: store waiting", self.wait)],
            P.WAIT_LOOK: [Step("wait: look again, store waiting = 0 if enough", self.wait_look)],
            P.WAIT_BELL: [Step("wait: bell", self.wait_bell), Step("wait: 0.1 s passed", self.wait_idle)],
            P.LOAN: [Step("loan: store LOANED", self.loan)],
            P.RECORD: [Step("commit: store sequence, owner = 0", self.record, is_private=True)],
            P.COMMIT: [Step("commit: store READY", self.commit)],
            P.PUBLISHED: [Step("publish: store published", self.published, is_quiet=True)],
            P.WHO_SLEEPS: [Step("tell: look who sleeps", self.who_sleeps)],
            P.PUSH: [Step("tell: push a number", self.push), Step("tell: push a number, withheld", self.push_withheld)],
            P.ADOPT: [Step("adopt: store waiting = 0", self.adopt)],
            P.RECOVER: [Step("recover: store published", self.recover)],
            P.ABORT_RECORD: [Step("abort: store no sequence", self.abort_record)],
            P.ABORT: [Step("abort: store FREE", self.abort)],
            P.RECLAIM: [Step("reclaim: lock", self.producer_reclaim_lock)],
            P.RECLAIM_READY: [Step("reclaim: store READY", self.producer_reclaim_ready)],
            P.RECLAIM_OWNER: [Step("reclaim: store owner = 0", self.producer_reclaim_owner, is_private=True)],
            P.RECLAIM_UNLOCK: [Step("reclaim: unlock", self.producer_reclaim_unlock)],
            P.DONE: [],
        }

    def consumer_steps(self) -> dict[int, list[Step]]:
        """What a consumer may do, by where it is."""
        return {
            C.USER: [Step("receive: call, take: look", self.receive, by_user=True)],
            C.LOOK: [Step("take: look", self.look)],
            C.LOCK: [Step("claim: lock and check", self.claim_lock)],
            C.MISSED: [Step("claim: unlock what has changed, look again", self.claim_missed)],
            C.OWNER: [Step("claim: store owner", self.claim_owner, is_private=True)],
            C.LEASED: [Step("claim: store LEASED", self.claim_leased)],
            C.UNLOCK: [Step("claim: unlock", self.claim_unlock)],
            C.WAITING: [Step("claim: does the producer wait?", self.claim_waiting)],
            C.RING: [Step("claim: ring", self.claim_ring)],
            C.SLEEP: [Step("sleep: store asleep = now", self.sleep), Step("receive: time is up", self.timed_out)],
            C.POLL: [
                Step("sleep: poll wakes, store asleep = 0", self.poll),
                Step("sleep: 50 ms passed, store asleep = 0", self.poll_idle),
            ],
            C.AWAKE: [Step("sleep: store asleep = 0 (next stream, or has a message)", self.awake)],
            C.READ: [Step("sleep: read numbers", self.read)],
            C.PASS: [Step("pass on: look", self.pass_on)],
            C.PASS_PUSH: [
                Step("pass on: push a number", self.pass_push),
                Step("pass on: push, withheld", self.pass_withheld),
            ],
            C.HAND_OVER: [Step("receive: hand over", self.hand_over, is_quiet=True)],
            C.RECLAIM: [Step("reclaim: lock", self.reclaim_lock)],
            C.RECLAIM_READY: [Step("reclaim: store READY", self.reclaim_ready)],
            C.RECLAIM_OWNER: [Step("reclaim: store owner = 0", self.reclaim_owner, is_private=True)],
            C.RECLAIM_UNLOCK: [Step("reclaim: unlock", self.reclaim_unlock)],
            C.RECONCILE: [Step("reconcile: unlock", self.reconcile)],
            C.SETTLE: [Step("reconcile: end or put back a lease", self.settle)],
            C.SETTLE_RING: [Step("reconcile: ring", self.settle_ring)],
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
            R.CUT: [],
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
