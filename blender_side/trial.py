"""Trying out in a forked child what may crash the process instead of raising an error."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import warnings
from collections.abc import Callable

_PATIENCE_S = 60
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


def run(function: Callable[[], object]) -> tuple[int, str]:
    """Call a function in a copy of this process, which then is gone.

    Args:
        function: must not need another thread of this process.

    Returns:
        0 if it returned, 1 if it raised, the negative number of the signal that ended it; and what it printed.
    """
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child touches no lock of another thread
        child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            for number in _CRASHES:
                signal.signal(number, signal.SIG_DFL)  # Blender has handlers that tell the user
            os.dup2(writable, 1)
            os.dup2(writable, 2)
            function()
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writable)
    said = b""
    while select.select([readable], [], [], _PATIENCE_S)[0]:
        chunk = os.read(readable, 65536)
        if not chunk:
            break
        said += chunk
    else:
        os.kill(child, signal.SIGKILL)
    os.close(readable)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode(errors="replace")
