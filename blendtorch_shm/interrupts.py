"""What a signal's handler raises where Python would print it and forget it: in the callback of a weak reference.

Such callbacks run in the middle of any statement of a training loop, once per message, so a Ctrl-C hits one sooner or later. It
is kept, and raised by the next call that may raise.
"""

from __future__ import annotations

import threading

_kept: list[BaseException] = []


def keep(error: BaseException) -> None:
    """Have `error` raised by the next :func:`raise_kept` of the main thread, which is the one that signals interrupt."""
    _kept.append(error)


def raise_kept() -> None:
    """Raise what was kept, if anything was."""
    if _kept and threading.current_thread() is threading.main_thread():
        raise _kept.pop()
