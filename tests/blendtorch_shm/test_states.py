"""The slot's state machine, as a table and as rings live it."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blendtorch_shm.errors import SegmentError
from blendtorch_shm.memory import layout
from blendtorch_shm.memory.layout import FLAG_AGAIN
from blendtorch_shm.memory.ring import Ring
from blendtorch_shm.memory.segment import private
from blendtorch_shm.memory.states import TRANSITIONS, Event, State

NUM_SLOTS = 5
OWNERS = [1, 2, 3]


def make_ring(num_slots: int = NUM_SLOTS) -> Ring:
    memory = private(layout.ring_nbytes(num_slots, layout.PAGE))
    return Ring.format(memory, key=7, number=0, num_slots=num_slots, slot_nbytes=layout.PAGE)


def test_every_state_is_left_and_reached() -> None:
    assert {before for before, _ in TRANSITIONS} == set(State) == set(TRANSITIONS.values())


def test_every_event_happens_in_exactly_one_state() -> None:
    events = [event for _, event in TRANSITIONS]
    assert sorted(events) == sorted(Event)


def loan(ring: Ring, slot: int) -> bool:
    """Loan this very slot; whether that was possible."""
    loaned = []
    while (found := ring.loan()) is not None:
        loaned.append(found)
    for other in loaned:
        if other != slot:
            ring.abort(other)
    return slot in loaned


def apply(ring: Ring, event: Event, slot: int) -> bool:
    """Let `event` happen to `slot`; whether it did."""
    if event == Event.LOAN:
        return loan(ring, slot)
    if event == Event.ABORT:
        ring.abort(slot)
        return True
    if event == Event.COMMIT:
        ring.commit(slot, 0, 0, b"")
        return True
    if event == Event.CLAIM:
        return ring.claim(slot, 1)
    if event == Event.RELEASE:
        return ring.release(slot, ring.generation[slot], 1)
    return ring.reclaim(slot, 1)


PATH_TO = {State.FREE: [], State.LOANED: [Event.LOAN]}
PATH_TO[State.READY] = [*PATH_TO[State.LOANED], Event.COMMIT]
PATH_TO[State.LEASED] = [*PATH_TO[State.READY], Event.CLAIM]


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_a_ring_makes_the_steps_of_the_table_and_no_other(state: State, event: Event) -> None:
    ring = make_ring()
    for step in PATH_TO[state]:
        assert apply(ring, step, 2)
    assert ring.info(2).state == state
    if (state, event) in TRANSITIONS:
        assert apply(ring, event, 2)
        assert ring.info(2).state == TRANSITIONS[state, event]
    elif event in (Event.ABORT, Event.COMMIT):
        with pytest.raises(SegmentError, match=f"is {state.name}: {event.name} is not possible"):
            apply(ring, event, 2)
        assert ring.info(2).state == state
    else:
        assert not apply(ring, event, 2)
        assert ring.info(2).state == state
    assert ring.states()[:2] == ring.states()[3:4] * 2 == bytes(2)


class RingAgainstModel(RuleBasedStateMachine):
    """A ring, and what a plain dict says should be in it. What consumers know of it may be stale."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = make_ring()
        self.states = dict.fromkeys(range(NUM_SLOTS), State.FREE)
        self.generations = dict.fromkeys(range(NUM_SLOTS), 0)
        self.content: dict[int, bytes] = {}
        self.owner: dict[int, int] = {}
        self.again: set[int] = set()  # slots whose message somebody had before
        self.published: list[bytes] = []
        self.finished: list[bytes] = []
        self.sequence = 0

    def slots(self, state: State) -> list[int]:
        return [slot for slot, found in self.states.items() if found == state]

    @rule()
    def loan(self) -> None:
        free = self.slots(State.FREE)
        assert self.ring.has_free() == bool(free)
        slot = self.ring.loan()
        assert slot == (min(free) if free else None)
        if slot is not None:
            self.states[slot] = State.LOANED

    @precondition(lambda self: self.slots(State.LOANED))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.slots(State.LOANED)))
        self.ring.abort(slot)
        self.states[slot] = State.FREE

    @precondition(lambda self: self.slots(State.LOANED))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.slots(State.LOANED)))
        header = f"message {self.sequence}".encode()
        self.ring.commit(slot, self.sequence, 0, header)
        self.states[slot] = State.READY
        self.generations[slot] += 1
        assert self.ring.generation[slot] == self.generations[slot]
        self.content[slot] = header
        self.again.discard(slot)
        self.published.append(header)
        self.sequence += 1

    @rule(slot=st.integers(0, NUM_SLOTS - 1), owner=st.sampled_from(OWNERS))
    def claim_any_slot(self, slot: int, owner: int) -> None:
        due = self.states[slot] == State.READY
        assert self.ring.claim(slot, owner) == due
        if due:
            found, nbytes, _, _, flags = self.ring.message(slot)
            assert (found, nbytes, flags) == (self.content[slot], 0, FLAG_AGAIN if slot in self.again else 0)
            self.states[slot] = State.LEASED
            self.owner[slot] = owner

    @precondition(lambda self: self.slots(State.READY))
    @rule(owner=st.sampled_from(OWNERS))
    def claim_the_oldest(self, owner: int) -> None:
        slot = self.ring.ready()[0]
        assert self.content[slot] == min(
            (self.content[s] for s in self.slots(State.READY)), key=lambda header: int(header.split()[1])
        )
        assert self.ring.claim(slot, owner)
        self.states[slot] = State.LEASED
        self.owner[slot] = owner

    @precondition(lambda self: self.slots(State.LEASED))
    @rule(data=st.data(), owner=st.sampled_from(OWNERS))
    def release(self, data: st.DataObject, owner: int) -> None:
        slot = data.draw(st.sampled_from(self.slots(State.LEASED)))
        due = self.owner[slot] == owner
        assert self.ring.release(slot, self.generations[slot], owner) == due
        if due:
            self.states[slot] = State.FREE
            self.finished.append(self.content.pop(slot))

    @rule(owner=st.sampled_from(OWNERS))
    def owner_dies_and_its_leases_are_reclaimed(self, owner: int) -> None:
        for slot in range(NUM_SLOTS):
            due = self.states[slot] == State.LEASED and self.owner[slot] == owner
            assert self.ring.reclaim(slot, owner) == due
            if due:
                self.states[slot] = State.READY
                self.again.add(slot)

    @invariant()
    def the_ring_is_as_the_model_says(self) -> None:
        assert self.ring.states() == bytes(self.states[slot] for slot in range(NUM_SLOTS))
        for state in State:
            assert self.ring.count(state) == len(self.slots(state))
        assert sorted(self.ring.ready()) == self.slots(State.READY)

    @invariant()
    def every_message_is_in_a_slot_or_finished_once(self) -> None:
        assert sorted(self.finished + list(self.content.values())) == sorted(self.published)
        assert self.ring.next_sequence() <= self.sequence


RingAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRingAgainstModel = RingAgainstModel.TestCase
