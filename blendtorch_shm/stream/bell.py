"""Bells: how who sleeps is woken.

A bell is a pipe with a name, beside the lock file of its stream; in a stream within one process, an eventfd. To ring it is one
system call, and the kernel has who sleeps run at once. Whoever opens a pipe first makes it, both ends hold it open for reading
and writing, so that to ring for somebody who has gone is no error, and it goes with its directory. A bell has nothing to say:
what there is to do stands in shared memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import sys
from collections.abc import Callable

from ..errors import SegmentError
from ..memory.layout import PAGE
from ..process import interrupts

_SIGNAL = (1).to_bytes(8, sys.byteorder)  # what an eventfd counts; a pipe takes anything


class Bell:
    """One end of a bell.

    Its descriptor is closed in `__del__`, against the rule: a lease may end, and ring for the producer, in any thread while
    another one closes the stream, and must not find another file under that number.

    Args:
        fd: readable once the bell was rung, until that is cleared; does not block. Closed by this object.
    """

    fd = -1  # of one that Ctrl-C came in the making of: that has an end, too

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def ring(self) -> None:
        """Wake who waits, now or the next time. Ringing twice does no harm."""
        try:
            os.write(self.fd, _SIGNAL)
        except BlockingIOError:  # it was rung so often already
            pass

    def is_rung(self) -> bool:
        """Whether it was rung and not cleared since: who waits for it has not run yet."""
        return self._poll(0)

    def clear(self) -> None:
        """Let it be silent until it is rung again."""
        try:
            os.read(self.fd, PAGE)
        except BlockingIOError:
            pass

    def wait(self, timeout_s: float) -> None:
        """Sleep until it is rung, or for `timeout_s` seconds, and clear it."""
        if self._poll(timeout_s * 1000):
            self.clear()

    def _poll(self, timeout_ms: float) -> bool:
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        return bool(poller.poll(timeout_ms))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone before
        with contextlib.suppress(OSError):  # somebody closed all files, as before an exec
            close(self.fd)


interrupts.keep_of(Bell.__del__)


def open_bell(path: str) -> Bell:
    """The bell at `path`, made if there is none.

    Raises:
        SegmentError: it cannot be opened, or something else is there.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise SegmentError.cannot_open("pipe", path, error) from error
    bell = Bell(fd)
    status = os.fstat(fd)
    if not stat.S_ISFIFO(status.st_mode) or status.st_uid != os.geteuid():
        raise SegmentError(f"{path} is not a pipe of this user.")
    with contextlib.suppress(OSError):  # else it is larger than need be
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PAGE)
    return bell


def private_bell() -> Bell:
    """A bell that only this process knows.

    Raises:
        SegmentError: this process has too many files open.
    """
    try:
        return Bell(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    except OSError as error:
        raise SegmentError(f"Cannot make an eventfd: {error.strerror}.") from error
