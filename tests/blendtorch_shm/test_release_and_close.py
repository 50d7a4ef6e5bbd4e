"""A lease ends in one thread, and its reader leaves in another: they take turns, and somebody else looks at each turn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from blendtorch_shm.memory.states import State
from blendtorch_shm.process import leaving
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer

from ..interruption import runs_in_turn
from ..selection import stride_and_offset


def closes(source: Source) -> None:
    source.close()


def finishes(source: Source) -> None:
    """As at the exit of a process."""
    for member in list(leaving._members):
        if member is source or member in source._streams:
            member.finish()


class Stream:
    """One reader that holds one message, and others that join, in its place if that is free, and take what is there."""

    def __init__(self, place: SharedPlace) -> None:
        self.place = place
        self.sink = Producer(place, trusted=True)
        self.leaver = Source([place])
        self.sink.publish({"i": 0, "image": np.zeros(9000, np.uint8)})
        self.held: list[Any] = [self.leaver.receive(20)]
        assert self.held[0] is not None
        self.others: list[Source] = []
        self.found: list[int] = []

    def look(self) -> None:
        self.others.append(Source([self.place]))
        while (message := self.others[-1].receive(0)) is not None:
            self.found.append(message.fields["i"])

    def check(self, where: object) -> None:
        """Nobody got the first message again, and nothing is in use."""
        self.sink.publish({"i": 1, "image": np.zeros(9000, np.uint8)})
        self.look()
        assert self.found == [1], where
        for source in self.others:
            source.close()
        seen = inspect(self.place)
        assert (seen.count(State.LEASED), seen.count(State.READY), len(seen.consumers)) == (0, 0, 0), where
        self.sink.close()


@pytest.mark.parametrize("ends", [closes, finishes])
@pytest.mark.parametrize("release_first", [True, False])
def test_a_lease_that_ends_while_its_reader_leaves_is_delivered_once(
    place: SharedPlace, ends: Callable[[Source], None], release_first: bool
) -> None:
    stride, offset = stride_and_offset()

    def runs(at: int, back: int) -> tuple[bool, bool]:
        stream = Stream(place)
        steps = [stream.held.clear, functools.partial(ends, stream.leaver)]
        first, second = steps if release_first else reversed(steps)
        has = runs_in_turn(first, second, stream.look, at, back)
        stream.check(f"lines {at} and {back}")
        return has

    at = 1
    while True:
        back = 1 + (at + offset) % stride
        while runs(at, back)[1]:
            back += stride
        if not runs(at, 1)[0]:
            break
        at += 1
    assert at > 10
