"""Protocols with one planted mistake each, which the model has to find: a model that cannot fail proves nothing."""

from __future__ import annotations

from .protocol import (
    AFTER_POLL,
    AFTER_SLEEP_STORE,
    CUT,
    HAS,
    HELD,
    INBOX,
    LIST,
    PC,
    PHASE,
    READY,
    REL_PC,
    TARGET,
    C,
    P,
    Protocol,
    R,
    Setting,
    Step,
)

FAULTLESS = Setting(messages=2, idle_look=False)


class Mistake(Protocol):
    """A protocol that is wrong in one thing.

    Attributes:
        setting_to_fail: a small setting in which the model finds it.
        finds: what it says then.
    """

    setting_to_fail = FAULTLESS
    finds = ""

    def __init__(self) -> None:
        super().__init__(self.setting_to_fail)


class OwnerStoredAfterLeased(Mistake):
    """A consumer that dies in between leaves a lease that nobody can reclaim."""

    setting_to_fail = Setting(messages=1, faults=1, kinds=("consumer dies",))
    finds = "no order of steps"

    def claim_lock(self, s: bytearray, c: int) -> bool:
        super().claim_lock(s, c)
        if s[c + PC] == C.OWNER:
            s[c + PC] = C.LEASED
        return True

    def claim_leased(self, s: bytearray, c: int) -> bool:
        super().claim_leased(s, c)
        s[c + PC] = C.OWNER
        return True

    def claim_owner(self, s: bytearray, c: int) -> bool:
        super().claim_owner(s, c)
        s[c + PC] = C.UNLOCK
        return True

    def consumer_steps(self) -> dict[int, list[Step]]:
        return super().consumer_steps() | {C.OWNER: [Step("claim: store owner", self.claim_owner)]}


class LeavesBeforeItsLeaseHasEnded(Mistake):
    """The slot is taken for one that a dead consumer holds, and its message comes again."""

    setting_to_fail = Setting(messages=1, slots=2, max_ready=1, threads=True, faults=1, kinds=("consumer leaves",))
    finds = "delivered twice"

    def leave(self, s: bytearray, c: int) -> bool:
        if self._has_lease(s, c, HELD):
            return False
        self._be_gone(s, c)
        return True


class PutsNothingBackWhenItCloses(Mistake):
    """What an interrupted call had taken is leased by nobody who could let go of it."""

    setting_to_fail = Setting(messages=1, faults=2, kinds=("consumer leaves", "consumer interrupted"), idle_look=True)
    finds = "is freed and was not delivered|no order of steps|delivered twice"

    def close(self, s: bytearray, c: int) -> bool:
        if not super().close(s, c):
            return False
        s[c + PC], s[c + CUT] = C.CLOSING, 0
        return True

    def leave(self, s: bytearray, c: int) -> bool:
        if any(self._may_release(s, c, slot) for slot in range(self.count)):
            return False
        return super().leave(s, c)


class NoLookAfterSayingAsleep(Mistake):
    """A message that came between the look and the store of `asleep` wakes nobody."""

    finds = "sleeps while"

    def sleep(self, s: bytearray, c: int) -> bool:
        super().sleep(s, c)
        s[c + PC] = C.POLL
        return True


class TellsBeforeReady(Mistake):
    """Who is told looks, finds nothing, and sleeps again."""

    finds = "sleeps while"

    def record(self, s: bytearray, p: int) -> bool:
        super().record(s, p)
        s[p + PC] = P.TELL
        return True

    def _told(self, s: bytearray, p: int) -> None:
        s[p + PC], s[p + TARGET] = P.COMMIT, 0

    def published(self, s: bytearray, p: int) -> bool:
        super().published(s, p)
        s[p + PC] = P.ROOM
        return True


class ClaimsWithoutLock(Mistake):
    """Two consumers claim one slot."""

    finds = "is claimed and not READY"

    def claim_lock(self, s: bytearray, c: int) -> bool:
        s[c + PC] = C.OWNER if s[self.state + s[c + LIST] - 1] == READY else C.MISSED
        return True


class DoesNotLookAgainAfterAMiss(Mistake):
    """Who found the slot locked meanwhile sleeps, and who locked it in vain goes away."""

    finds = "sleeps while"

    def claim_missed(self, s: bytearray, c: int) -> bool:
        s[self.lock + s[c + LIST] - 1] = 0
        self._end_claim(s, c)
        self._next_stream(s, c)
        return True


class ReleasesAnyGeneration(Mistake):
    """A release that an interrupt cut after its store is repeated when the slot has another message."""

    setting_to_fail = Setting(messages=2, slots=1, max_ready=1, threads=True, faults=1, kinds=("consumer interrupted",))
    finds = "is freed"

    def _new_generation(self, s: bytearray, slot: int) -> None:
        pass

    def release_interrupted(self, s: bytearray, c: int) -> bool:
        if s[c + REL_PC] != R.WAITING or not self._fault(s, "consumer interrupted"):
            return False
        s[c + REL_PC] = R.FREE
        return True


class ReleasesWhatWasNotHandedOver(Mistake):
    """An interrupt between the lease's making and the return drops the message, and the lease's end frees the slot."""

    setting_to_fail = Setting(messages=1, faults=1, kinds=("consumer interrupted",))
    finds = "is freed and was not delivered"

    def _drop(self, s: bytearray, c: int, slot: int) -> None:
        super()._drop(s, c, slot)
        self._free(s, slot)


class KeepsALeaseWhoseEndWasCut(Mistake):
    """The next call takes the slot for one that was not handed over, and puts it back."""

    setting_to_fail = Setting(messages=1, faults=1, kinds=("consumer interrupted",))
    finds = "is delivered twice"

    def _note_cut_end(self, s: bytearray, c: int, slot: int) -> None:
        pass


class NobodyMends(Mistake):
    """A lease whose end was cut does not end."""

    setting_to_fail = Setting(messages=1, faults=1, kinds=("consumer interrupted",))
    finds = "no order of steps"

    def _is_something_to_look_after(self, s: bytearray, c: int) -> bool:
        return self._anyone_dead(s)


class PutsBackNothingAfterAnInterrupt(Mistake):
    """What a call had claimed that did not return stays LEASED."""

    setting_to_fail = Setting(messages=1, faults=1, kinds=("consumer interrupted",))
    finds = "no order of steps"

    def settle(self, s: bytearray, c: int) -> bool:
        return self._settled(s, c)


class KeepsItsLockAfterAnInterrupt(Mistake):
    """Nobody else can claim the slot. The slot is never FREE and unlocked again."""

    setting_to_fail = Setting(messages=1, faults=1, kinds=("consumer interrupted",))
    finds = "no order of steps"

    def reconcile(self, s: bytearray, c: int) -> bool:
        s[c + PC] = C.SETTLE
        return True


class RecoverCountsNothing(Mistake):
    """A producer that dies between READY and `published` leaves a number that its successor gives again."""

    setting_to_fail = Setting(messages=2, faults=1, kinds=("producer dies",))
    finds = "gets the sequence number"

    def _is_trace(self, state: int) -> bool:
        return False


class RecoverCountsReadyOnly(RecoverCountsNothing):
    """A consumer may have the message by then, or have released it."""

    def _is_trace(self, state: int) -> bool:
        return state == READY


class RecoverAbortsNothing(Mistake):
    """The slot stays LOANED."""

    setting_to_fail = Setting(messages=1, faults=1, kinds=("producer interrupted",))
    finds = "no order of steps"

    def recover(self, s: bytearray, p: int) -> bool:
        super().recover(s, p)
        s[p + PC] = P.PASS
        return True


class NumberNotPassedOn(Mistake):
    """A consumer that was told by two producers takes one message, and leaves the other while somebody sleeps."""

    setting_to_fail = Setting(streams=2, messages=1, slots=1, max_ready=1, idle_look=False)
    finds = "sleeps while"

    def _taken(self, s: bytearray, c: int) -> None:
        super()._taken(s, c)
        if s[c + PC] == C.PASS:
            s[c + PC] = C.HAND_OVER

    def awake(self, s: bytearray, c: int) -> bool:
        super().awake(s, c)
        if s[c + PC] == C.PASS:
            s[c + PC] = C.HAND_OVER
        return True


class WokenOneDoesNotPassOn(NumberNotPassedOn):
    """The producer told only the one that was waking up, and that one takes one message of two."""

    setting_to_fail = FAULTLESS


class AwakeStoredAfterPassingOn(Mistake):
    """A message that comes in between is left to the one that seems to be waking up, and that one does not look again."""

    finds = "sleeps while"

    def poll(self, s: bytearray, c: int) -> bool:
        if not s[c + INBOX]:
            return False
        s[c + PC], s[c + PHASE] = C.READ, AFTER_POLL
        return True

    def _next_stream(self, s: bytearray, c: int) -> None:
        super()._next_stream(s, c)
        if s[c + PC] == C.CLEAR and s[c + PHASE] == AFTER_POLL:
            s[c + PC] = C.AWAKE

    def _taken(self, s: bytearray, c: int) -> None:
        s[c + PC] = C.PASS if s[c + PHASE] in (AFTER_POLL, AFTER_SLEEP_STORE) else C.HAND_OVER

    def _passed(self, s: bytearray, c: int) -> None:
        super()._passed(s, c)
        if s[c + PC] == C.HAND_OVER:
            s[c + PC] = C.AWAKE

    def awake(self, s: bytearray, c: int) -> bool:
        super().awake(s, c)
        s[c + PC] = C.HAND_OVER if s[c + HAS] else C.CLEAR
        return True


class ProducerDoesNotLookAgain(Mistake):
    """The last claim came before the store of `waiting`, and nobody rings."""

    setting_to_fail = Setting(messages=3, slots=2, max_ready=1, idle_look=False)
    finds = "waits"

    def wait(self, s: bytearray, p: int) -> bool:
        super().wait(s, p)
        s[p + PC] = P.WAIT_BELL
        return True


class ReleaseDoesNotRing(Mistake):
    """The producer waits for a slot, and one is FREE."""

    setting_to_fail = Setting(messages=2, slots=1, max_ready=1, idle_look=False)
    finds = "waits for a slot"

    def release_waiting(self, s: bytearray, c: int) -> bool:
        self._released(s, c)
        return True


class ClaimDoesNotRing(Mistake):
    """The producer waits for room, and there is some."""

    setting_to_fail = Setting(messages=3, slots=2, max_ready=1, idle_look=False)
    finds = "waits until"

    def claim_ring(self, s: bytearray, c: int) -> bool:
        self._taken(s, c)
        return True


class OwnerClearedBeforeReady(Mistake):
    """Who dies over reclaiming a dead consumer's lease leaves one without an owner."""

    setting_to_fail = Setting(
        messages=1, slots=1, max_ready=1, faults=2, kinds=("consumer dies", "consumer interrupted")
    )
    finds = "no order of steps"

    def reclaim_lock(self, s: bytearray, c: int) -> bool:
        super().reclaim_lock(s, c)
        if s[c + PC] == C.RECLAIM_READY:
            s[c + PC] = C.RECLAIM_OWNER
        return True

    def reclaim_owner(self, s: bytearray, c: int) -> bool:
        super().reclaim_owner(s, c)
        s[c + PC] = C.RECLAIM_READY
        return True

    def reclaim_ready(self, s: bytearray, c: int) -> bool:
        super().reclaim_ready(s, c)
        s[c + PC] = C.RECLAIM_UNLOCK
        return True

    def settle(self, s: bytearray, c: int) -> bool:
        took = super().settle(s, c)
        if s[c + PC] == C.RECLAIM_READY:
            s[c + PC] = C.RECLAIM_OWNER
        return took

    def consumer_steps(self) -> dict[int, list[Step]]:
        return super().consumer_steps() | {C.RECLAIM_OWNER: [Step("reclaim: store owner = 0", self.reclaim_owner)]}


MISTAKES = [
    each for each in vars().copy().values() if isinstance(each, type) and issubclass(each, Mistake) and each.finds
]
