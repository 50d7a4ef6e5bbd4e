"""What a signal's handler raises where Python prints it and forgets it: in the callback of a weak reference.

Such callbacks run in the middle of any statement of a training loop, once per message, so Ctrl-C hits one sooner or later. It may
do so before the callback's first statement, hence no ``try`` in there can hold it: only ``sys.unraisablehook`` sees it. It is
kept, and raised by the next call that may raise.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

_callbacks: list[Callable[..., None]] = []
_kept: list[BaseException] = []
_next_hook = sys.unraisablehook


def keep_of(callback: Callable[..., None]) -> None:
    """Keep what is raised in this callback."""
    _callbacks.append(callback)


def raise_kept() -> None:
    """Raise what was kept, if anything was, in the main thread, which is the one that signals interrupt."""
    if _kept and threading.current_thread() is threading.main_thread():
        raise _kept.pop()


def _hook(unraisable: Any) -> None:
    if unraisable.exc_value is not None and any(unraisable.object is callback for callback in _callbacks):
        _kept.append(unraisable.exc_value)
    else:
        _next_hook(unraisable)


sys.unraisablehook = _hook
