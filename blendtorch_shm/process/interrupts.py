"""What a signal's handler raises where Python prints it and forgets it: while something is being freed.

Callbacks of weak references, and ``__del__``, run in the middle of any statement of a training loop, once per message, and pyzmq
looks for signals whenever it frees a frame, so Ctrl-C hits one sooner or later. It may do so before a callback's first statement,
hence no ``try`` in there can hold it: only ``sys.unraisablehook`` sees it. It is kept, and the next call that may raises it.

Elsewhere Ctrl-C is raised where CPython looks for signals: where a function begins, after calls of what is not written in Python,
and where loops jump back. So what must be undone is told to whoever undoes it before it is done, and undoing what was not done,
or was undone, does no harm. ``tests/interruption.py`` tries each place.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

# The extension names what it was in by a text, and prints twice: first, through sys.excepthook, where in itself it was.
_FREEING_A_FRAME = "zmq.backend.cython._zmq.Frame.__dealloc__"
_PYZMQ = "zmq/backend/cython/"

_interrupted: list[Any] = [_FREEING_A_FRAME]
_kept: list[BaseException] = []
_next_unraisable_hook = sys.unraisablehook
_next_hook = sys.excepthook


def keep_of(callback: Callable[..., None]) -> None:
    """Keep what is raised in this callback."""
    _interrupted.append(callback)


def raise_kept() -> None:
    """Raise what was kept, if anything was, in the main thread, which is the one that signals interrupt."""
    if _kept and threading.current_thread() is threading.main_thread():
        raise _kept.pop()


def _unraisable_hook(unraisable: Any) -> None:
    value, place = unraisable.exc_value, unraisable.object
    # By identity: what else is freed may compare as it likes. But pyzmq's text is a new one each time.
    if value is not None and any(place is i or (type(place) is str and place == i) for i in _interrupted):
        _kept.append(value)
    else:
        _next_unraisable_hook(unraisable)


def _hook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
    # What ends a program was raised in the program, not in an extension with nothing around it.
    if traceback is None or not traceback.tb_frame.f_code.co_filename.startswith(_PYZMQ):
        _next_hook(kind, value, traceback)


sys.unraisablehook = _unraisable_hook
sys.excepthook = _hook
