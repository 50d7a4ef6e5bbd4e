"""How much of the long tests a run does: a part that changes from day to day, or all of it.

The fault points and the sweeps of Ctrl-C over all places of some code take longer than everything else together. So each run
does a part: every second fault point, every fifth place. Which part depends on the turn, which is the number of the day, so
all have had their turn after five days. ``make soak`` does all of them, with more kills and more frames.

``BLENDTORCH_TESTS=all`` asks for all, ``BLENDTORCH_TESTS=20421`` for the part of that turn, which the head of pytest's
output names.
"""

import os
import time
from collections.abc import Sequence
from typing import TypeVar

VARIABLE = "BLENDTORCH_TESTS"
STRIDE = 5
"""Of the places where Ctrl-C could hit, each run tries one in so many."""

_T = TypeVar("_T")

# In the environment, so that all processes of a run agree, also at midnight.
_asked = os.environ.setdefault(VARIABLE, str(int(time.time() // 86400)))
ALL = _asked == "all"
TURN = 0 if ALL else int(_asked)


def part_of(everything: Sequence[_T], parts: int) -> list[_T]:
    """One item in `parts`, another one at each turn; all of them where all are asked for."""
    return list(everything if ALL else everything[TURN % parts :: parts])


def is_due(number: int) -> bool:
    """Whether a test that takes long is in this run: one that has this number is at one turn in :data:`STRIDE`."""
    return ALL or number == TURN % STRIDE


def stride_and_offset() -> tuple[int, int]:
    """Which places a sweep tries: those whose number is ``offset + n * stride``."""
    return (1, 0) if ALL else (STRIDE, TURN % STRIDE)


def described() -> str:
    """For the head of the output."""
    if ALL:
        return f"long tests: all of them ({VARIABLE}=all)"
    return f"long tests: the part of turn {TURN} ({VARIABLE}={TURN} repeats it, {VARIABLE}=all does all)"
