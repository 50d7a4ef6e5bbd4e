"""Ctrl-C at every single place of some code, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any, Literal


def everywhere(
    run: Callable[[], object], files: Collection[str], *, per: Literal["line", "opcode"], without: Collection[str] = ()
) -> Iterator[int]:
    """Call `run` again and again; each call ends by KeyboardInterrupt at the next place, until one ends by itself.

    Args:
        run: what to interrupt. It must not catch the interrupt.
        files: paths of the source files with the places.
        per: whether a place is a line or an instruction.
        without: names of functions in them that are left out.

    Yields:
        after each interrupted call, which place it was in.
    """
    reached = 0
    number = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal reached
        if frame.f_code.co_filename not in files or frame.f_code.co_name in without:
            return None
        frame.f_trace_opcodes = per == "opcode"
        reached += event == per
        if reached > number:
            raise KeyboardInterrupt
        return trace

    tracing = sys.gettrace()
    while True:
        reached = 0
        try:
            sys.settrace(trace)
            run()
        except KeyboardInterrupt:
            sys.settrace(tracing)
            yield number
            number += 1
        else:
            return
        finally:
            sys.settrace(tracing)
