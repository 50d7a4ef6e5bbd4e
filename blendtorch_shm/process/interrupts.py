"""Interrupts that hit a callback of a weak reference, where Python can only print what a signal's handler raises.

Such callbacks run once per message, in the middle of any statement of a training loop, so Ctrl-C hits one sooner or later. A
callback of ours catches what is raised in it and keeps it here; the next call of the library in the main thread, which is the
only one that signals interrupt, raises it.
"""

from __future__ import annotations

import threading

kept: list[BaseException] = []
"""What is kept; empty nearly always, so that a look costs nothing."""


def keep(error: BaseException) -> None:
    """Keep what a signal's handler raised in a callback, until :func:`raise_kept`."""
    kept.append(error)


def is_systems(error: OSError) -> bool:
    """Whether the system refused something. A signal's handler may raise an OSError, too, such as ``TimeoutError()``."""
    return error.errno is not None


def raise_kept() -> None:
    """Raise what was kept, if anything was and this is the main thread."""
    if kept and threading.current_thread() is threading.main_thread():
        raise kept.pop()
