"""Runs the steps of a model in every order, and says where a property does not hold, by the shortest way there.

A step that is private (see :class:`~.protocol.Step`) is taken together with the one before it: its place among the steps
of others makes no difference. Two states that differ only in which consumer is which are one.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from .protocol import PC, REL_PC, Broken, Protocol, Step


class Found(NamedTuple):
    """What an exploration in which every property holds has seen."""

    states: int
    steps: int
    seconds: float


class Violation(AssertionError):
    """A property does not hold; the message has the shortest trace."""


class _Process(NamedTuple):
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
    processes = _processes(model)
    moves = [(p.at, p.pc, p.steps, [p]) for p in processes]
    faults = [(at, step) for _, at, step in model.fault_steps()] if model.setting.faults else []
    faults_at, normal = model.faults, model.normal
    must_rest_well = not model.setting.idle_look
    initial = normal(model.initial())
    index = {initial: 0}
    states = [initial]
    parents = array("l", [-1])
    targets = array("l")  # of the steps of all states, one after the other
    ends = array("l")  # where those of each state end
    here = 0
    what = ""
    try:
        for here, state in enumerate(states):
            is_at_rest = True
            after = []
            for at, pc, steps, mover in moves:
                for step in steps[state[pc]]:
                    s = bytearray(state)
                    what = step.name
                    if step.take(s, at):
                        _take_private(s, mover, faults_at)
                        after.append(bytes(s))
                        is_at_rest &= step.by_user
            if state[faults_at]:
                for at, step in faults:
                    s = bytearray(state)
                    what = step.name
                    if step.take(s, at):
                        _take_private(s, processes, faults_at)
                        after.append(bytes(s))
            for following in map(normal, after):
                there = index.get(following)
                if there is None:
                    there = index[following] = len(states)
                    states.append(following)
                    parents.append(here)
                targets.append(there)
            ends.append(len(targets))
            if must_rest_well and is_at_rest:
                what = "everybody rests"
                model.check_rest(state)
    except Broken as broken:
        raise _violation(model, parents, states, here, f"{what}: {broken}") from None
    index.clear()
    stuck = _stuck(bytearray(map(model.is_done, states)), targets, ends)
    if stuck is not None:
        raise _violation(
            model, parents, states, stuck, "from here, no order of steps delivers everything and frees all slots"
        )
    return Found(len(states), len(targets), time.monotonic() - started)


def _take_private(s: bytearray, processes: list[_Process], faults_at: int) -> None:
    again = True
    while again:
        again = False
        for _, at, pc, steps, private in processes:
            while private[s[faults_at] == 0][s[pc]]:
                steps[s[pc]][0].take(s, at)
                again = True


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


def _processes(model: Protocol) -> list[_Process]:
    def process(who: str, at: int, pc: int, table: dict[int, list[Step]]) -> _Process:
        steps = [table[row] for row in range(len(table))]
        private = [any(step.is_private for step in row) for row in steps]
        quiet = [any(step.is_private or step.is_quiet for step in row) for row in steps]
        return _Process(who, at, at + pc, steps, [private, quiet])

    processes = [process(f"producer {i}", at, PC, model.producer_steps()) for at, i in model.stream.items()]
    for at, number in model.number.items():
        processes.append(process(f"consumer {number - 1}", at, PC, model.consumer_steps()))
        processes.append(process(f"consumer {number - 1}", at, REL_PC, model.release_steps()))
    return processes


def _violation(model: Protocol, parents: array[int], states: list[bytes], here: int, what: str) -> Violation:
    way = []
    while here >= 0:
        way.append(states[here])
        here = parents[here]
    lines = []
    actual = model.initial()
    for following in way[-2::-1]:
        line, actual = next((line, after) for line, after in _after(model, actual) if model.normal(after) == following)
        lines.append(line)
    return Violation("\n".join([what, f"after {len(lines)} steps:", *lines, model.describe(actual)]))


def _after(model: Protocol, state: bytes) -> Iterator[tuple[str, bytes]]:
    processes = _processes(model)
    moves = [(p.who, p.at, step, [p]) for p in processes for step in p.steps[state[p.pc]]]
    moves += [(who, at, step, processes) for who, at, step in model.fault_steps()]
    for who, at, step, movers in moves:
        s = bytearray(state)
        try:
            if step.take(s, at):
                _take_private(s, movers, model.faults)
                yield f"{who}: {step.name}", bytes(s)
        except Broken:
            continue
