"""The end of a lease in one thread, and the end of its reader in another: every order of their lines, with one switch."""

from __future__ import annotations

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

from ..interruption import runs_with_a_switch


def closes(source: Source) -> None:
    source.close()


def finishes(source: Source) -> None:
    """As at the exit of a process."""
    for member in list(leaving._members):
        if member is source or member in source._streams:
            member.finish()


@pytest.mark.parametrize("ends", [closes, finishes])
@pytest.mark.parametrize("release_first", [True, False])
def test_a_lease_that_ends_while_its_reader_leaves_is_delivered_once(
    place: SharedPlace, ends: Callable[[Source], None], release_first: bool
) -> None:
    at, going = 0, True
    while going:
        at += 1
        with Producer(place, trusted=True) as sink:
            leaver = Source([place])
            sink.publish({"i": 0, "image": np.zeros(9000, np.uint8)})
            held = [leaver.receive(20)]
            assert held[0] is not None
            other: list[Source] = []
            found: list[int] = []

            def look(found: list[int] = found, other: list[Source] = other) -> None:
                """Somebody joins, in the leaver's place if that is free, and takes what is there."""
                other.append(Source([place]))
                while (message := other[-1].receive(0)) is not None:
                    found.append(message.fields["i"])

            def leave(leaver: Source = leaver, look: Callable[[], None] = look) -> None:
                ends(leaver)
                look()

            def release(held: list[Any] = held, look: Callable[[], None] = look) -> None:
                held.clear()
                look()

            steps = (held.clear, leave) if release_first else (lambda: ends(leaver), release)  # noqa: B023
            going = runs_with_a_switch(*steps, at)
            sink.publish({"i": 1, "image": np.zeros(9000, np.uint8)})
            look()
            assert found == [1], f"line {at}"
            del leaver
            for source in other:
                source.close()
            seen = inspect(place)
            assert (seen.count(State.LEASED), seen.count(State.READY), len(seen.consumers)) == (0, 0, 0), f"line {at}"
    assert at > 10
