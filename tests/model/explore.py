"""Runs the steps of a model in every order, and says where a property does not hold, by the shortest way there.

A step that is private (see :class:`~.protocol.Step`) is taken together with the one before it: its place among the steps
of others makes no difference. Two states that differ only in which consumer is which are one.

This explores in Python: 10 000 states a second. ``compiled.py`` does the same in C, a hundred times as fast.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from .protocol import PC, REL_PC, Broken, Protocol, Step


class Found(NamedTuple):
    """What an exploration in which every property holds has seen."""

    states: int
    steps: int
    seconds: float


class Violation(AssertionError):
    """A property does not hold; the message has the shortest trace."""


class Process(NamedTuple):
    """A producer, a consumer, or a consumer's thread in which leases end."""

    who: str
    at: int
    """Where its block is."""
    pc: int
    """Where it stands what it does next."""
    steps: list[list[Step]]
    """By what stands there."""
    private: list[list[bool]]
    """Whether the only step is private: while faults are possible, and when none is any more."""


def explore(model: Protocol) -> Found:
    """Visit every state that can be reached.

    Raises:
        Violation: a property of the model does not hold.
    """
    started = time.monotonic()
    initial = model.initial()
    index = {initial: 0}
    states = [initial]
    parents = array("l", [-1])
    targets = array("l")  # of the steps of all states, one after the other
    ends = array("l")  # where those of each state end
    processes, faults = processes_of(model), faults_of(model)
    for here, state in enumerate(states):
        try:
            for _, after in _after(model, state, processes, faults):
                model.normalise(after)
                following = bytes(after)
                there = index.get(following)
                if there is None:
                    there = index[following] = len(states)
                    states.append(following)
                    parents.append(here)
                targets.append(there)
        except Broken:
            raise violation(model, _way(states, parents, here), broken_at(model, state)) from None
        ends.append(len(targets))
    index.clear()
    stuck = _stuck(bytearray(model.is_done(bytearray(state)) for state in states), targets, ends)
    if stuck is not None:
        raise violation(model, _way(states, parents, stuck))
    return Found(len(states), len(targets), time.monotonic() - started)


def processes_of(model: Protocol) -> list[Process]:
    """All that takes steps."""

    def process(who: str, at: int, pc: int, table: dict[int, list[Step]]) -> Process:
        steps = [table[row] for row in range(len(table))]
        private = [any(step.is_private for step in row) for row in steps]
        quiet = [any(step.is_private or step.is_quiet for step in row) for row in steps]
        return Process(who, at, at + pc, steps, [private, quiet])

    processes = [process(f"producer {i}", at, PC, model.producer_steps(i)) for at, i in model.stream.items()]
    for at, number in model.number.items():
        processes.append(process(f"consumer {number - 1}", at, PC, model.consumer_steps()))
        processes.append(process(f"consumer {number - 1}", at, REL_PC, model.release_steps()))
    return processes


def faults_of(model: Protocol) -> list[tuple[str, int, Step]]:
    """What may go wrong: with whom, where its block is."""
    return model.fault_steps() if model.setting.faults else []


def _after(
    model: Protocol, state: bytes, processes: list[Process], faults: list[tuple[str, int, Step]]
) -> Iterator[tuple[str, bytearray]]:
    """All steps from a state, and what each leads to.

    Raises:
        Broken: by a step, or because everybody rests here and should not.
    """
    is_at_rest = True
    for process in processes:
        for step in process.steps[state[process.pc]]:
            s = bytearray(state)
            if _take(model, s, process.at, step, [process]):
                is_at_rest &= step.by_user
                yield f"{process.who}: {step.name}", s
    if state[model.faults]:
        for who, at, step in faults:
            s = bytearray(state)
            if _take(model, s, at, step, processes):
                yield f"{who}: {step.name}", s
    if is_at_rest and not model.setting.idle_look:
        try:
            model.check_rest(bytearray(state))
        except Broken as broken:
            raise Broken(f"everybody rests: {broken}") from None


def _take(model: Protocol, s: bytearray, at: int, step: Step, processes: list[Process]) -> bool:
    """A step, and what is private then."""
    try:
        if not step.take(s, at):
            return False
        again = True
        while again:
            again = False
            for process in processes:
                while process.private[s[model.faults] == 0][s[process.pc]]:
                    process.steps[s[process.pc]][0].take(s, process.at)
                    again = True
        return True
    except Broken as broken:
        raise Broken(f"{step.name}: {broken}") from None


def _stuck(good: bytearray, targets: array[int], ends: array[int]) -> int | None:
    """The first state from which no good one can be reached."""
    changed = True
    while changed:
        changed = False
        for here in range(len(good) - 1, -1, -1):
            if not good[here]:
                for there in targets[ends[here - 1] if here else 0 : ends[here]]:
                    if good[there]:
                        good[here] = changed = True
                        break
    here = good.find(0)
    return None if here < 0 else here


def _way(states: list[bytes], parents: array[int], here: int) -> list[bytes]:
    way = []
    while here >= 0:
        way.append(states[here])
        here = parents[here]
    return way[::-1]


def broken_at(model: Protocol, state: bytes) -> str:
    """Which property does not hold in a step from that state, or if everybody rests there."""
    try:
        for _ in _after(model, state, processes_of(model), faults_of(model)):
            pass
    except Broken as broken:
        return str(broken)
    raise RuntimeError(f"every property holds in {model.describe(state)}")


def violation(model: Protocol, way: list[bytes], what: str = "") -> Violation:
    """The error that shows the way to a state in which a property does not hold; no good end can be reached if not said."""
    what = what or "from here, no order of steps delivers everything and frees all slots"
    lines = []
    actual = model.initial()  # the way has the same states with slots and consumers in another order
    for before, following in pairwise(way):
        found = _step_to(model, actual, following)
        if found is None:  # two were so alike that the order is another one
            lines.append("(slots or consumers are renumbered)")
            found = _step_to(model, before, following)
        assert found is not None
        line, actual = found
        lines.append(line)
    return Violation("\n".join([what, f"after {len(way) - 1} steps:", *lines, model.describe(actual)]))


def _step_to(model: Protocol, state: bytes, following: bytes) -> tuple[str, bytes] | None:
    """The step that leads there, slots and consumers put in order; and to what."""
    try:
        for line, after in _after(model, state, processes_of(model), faults_of(model)):
            actual = bytes(after)
            model.normalise(after)
            if after == following:
                return line, actual
    except Broken:  # on another way from the last state but one
        pass
    return None
