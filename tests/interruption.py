"""Ctrl-C at each place of some code where Python looks for signals, one after the other.

CPython looks for them where a function begins, after calls of what is not written in Python, and where loops jump back, so
between a call of a Python function and the store of its result nothing can come. Not tried here: calls of C that call Python in
turn, such as those of classes, a second Ctrl-C, and Ctrl-C while the first one is being cleaned up after.
"""

from __future__ import annotations

import dis
import functools
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from types import CodeType, FrameType
from typing import Any

from .selection import stride_and_offset


def everywhere(
    run: Callable[[], object], files: Collection[str], *, without: Collection[str] = (), stride: int | None = None
) -> Iterator[str]:
    """Call `run` again and again; KeyboardInterrupt ends each call at a later place, until a call ends by itself.

    Args:
        run: what to interrupt. It must not catch the interrupt.
        files: paths of the source files with the places.
        without: names of functions in them that are left out.
        stride: how far apart the places are that are tried; 1: each. None: each in `make soak`, else every fifth one, from
            another one on each day (selection.py).

    Yields:
        after each interrupted call, where that was.
    """
    step, number = (stride, 0) if stride is not None else stride_and_offset()
    reached = 0
    place = ""
    last: dict[FrameType | None, str] = {}  # what each frame did last

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal reached, place
        code = frame.f_code
        if event == "call" and frame.f_back in last:
            last[frame.f_back] = "a call of Python"
        if code.co_filename not in files or code.co_name in without:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            done = last.get(frame, "RESUME")
            last[frame] = _names(code)[frame.f_lasti]
            looks = done.startswith("CALL") or done in ("RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE")  # 3.10's
            reached += looks
            if looks and reached > number:
                place = f"{code.co_name}, line {frame.f_lineno}, after {done}"
                raise KeyboardInterrupt
        return trace

    tracing = sys.gettrace()
    while True:
        reached = 0
        try:
            sys.settrace(trace)
            run()
            assert reached, "nowhere to interrupt: does what runs come from these files?"
            return
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracing)
            last.clear()  # frames hold what was in them
        yield place
        number += step


@functools.cache
def _names(code: CodeType) -> dict[int, str]:
    """Offsets of the instructions, and what they do."""
    return {instruction.offset: instruction.opname for instruction in dis.get_instructions(code)}


def runs_with_a_switch(first: Callable[[], object], second: Callable[[], object], at: int) -> bool:
    """Run `first`; before line number `at` of ours that it comes to, or at its end, run `second` whole.

    Returns:
        whether it has so many lines.
    """
    has_switched = _runs_until(first, at, second)
    if not has_switched:
        second()
    return has_switched


def runs_in_turn(
    first: Callable[[], object], second: Callable[[], object], between: Callable[[], object], at: int, back: int
) -> tuple[bool, bool]:
    """Run `first` and `second`, in a thread each: `first` to its line `at`, `second` to its line `back`, and both to their ends.
    At each switch `between` is called.

    Returns:
        whether they have so many lines.
    """
    paused, goes_on = threading.Event(), threading.Event()
    found: list[bool] = []
    errors: list[BaseException] = []

    def pause() -> None:
        paused.set()
        assert goes_on.wait(20)

    def run_second() -> None:
        try:
            found.append(_runs_until(second, back, pause))
        except BaseException as error:
            errors.append(error)
        paused.set()

    thread = threading.Thread(target=run_second)

    def switch() -> None:
        thread.start()
        assert paused.wait(20)
        between()

    has_switched = _runs_until(first, at, switch)
    if not has_switched:
        switch()
    between()
    goes_on.set()
    thread.join()
    between()
    for error in errors:
        raise error
    return has_switched, found[0]


def _runs_until(run: Callable[[], object], at: int, then: Callable[[], object]) -> bool:
    """Run `run`, and `then` before its line number `at` of ours; whether it has so many."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if "blendtorch_shm" not in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                sys.settrace(None)
                then()
                return None
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return lines >= at
