"""The life of a slot: every state, every event, every legal step. No I/O here; nothing else decides a state.

::

                 loan                commit                 claim
        FREE ───────────► LOANED ───────────► READY ───────────────────► LEASED
         ▲                  │                   ▲                         │  │
         │      abort       │                   │   reclaim (unfinished)  │  │
         ├──────────────────┘                   └─────────────────────────┘  │
         │                              release                              │
         └───────────────────────────────────────────────────────────────────┘

Who may cause what:

* *loan*, *abort*, *commit*: the stream's one producer.
* *claim*: any consumer, under the slot's kernel-owned lock, so that it happens once per generation.
* *release*: the consumer that owns the lease, when its last view of the slot is gone.
* *reclaim*: whoever proved that the owner is dead, or the owner itself, for a message that it has not used (over TCP: whose
  consumer left); under the slot's lock. The message is READY again for somebody else.

So each step has exactly one possible writer at a time, which is what lets a plain byte in shared memory carry the state:
Python has no compare-and-swap.
"""

from __future__ import annotations

from enum import IntEnum


class State(IntEnum):
    """What a slot is; stored as one byte per slot."""

    FREE = 0
    LOANED = 1
    READY = 2
    LEASED = 3


class Event(IntEnum):
    """What can happen to a slot."""

    LOAN = 0
    ABORT = 1
    COMMIT = 2
    CLAIM = 3
    RELEASE = 4
    RECLAIM = 5


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.FREE, Event.LOAN): State.LOANED,
    (State.LOANED, Event.ABORT): State.FREE,
    (State.LOANED, Event.COMMIT): State.READY,
    (State.READY, Event.CLAIM): State.LEASED,
    (State.LEASED, Event.RELEASE): State.FREE,
    (State.LEASED, Event.RECLAIM): State.READY,
}
"""The whole machine: (state, event) -> next state. What is not listed cannot happen."""

_steps = {event: (int(before), int(after)) for (before, event), after in TRANSITIONS.items()}
assert len(_steps) == len(TRANSITIONS)  # no event starts in two states
SOURCE = [_steps[event][0] for event in Event]
TARGET = [_steps[event][1] for event in Event]
"""By event. Each starts in one state and ends in one, so a transition is one comparison and one store."""
