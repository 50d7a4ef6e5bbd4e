"""The producer's bell: how a producer that waits for room is woken.

A bell is a pipe with a name, beside the lock file of its stream; in a stream within one process, an eventfd. To ring it is one
system call. It may happen in any thread and in the middle of any statement, where the last view of a message dies, which no
ZeroMQ socket would allow. Whoever opens the pipe first makes it; both ends hold it open for reading and writing, so to ring for a
producer that has gone is no error. A bell says nothing: what there is to do stands in shared memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import select
import stat
import sys

from ..errors import SegmentError
from ..memory.layout import PAGE
from ..process.descriptors import opened

_SIGNAL = (1).to_bytes(8, sys.byteorder)  # what an eventfd counts; a pipe takes anything


class Bell:
    """One end of a bell.

    The descriptor is closed in ``__del__``, not by a method: another thread may ring while this one closes the stream, and must
    not write into another file that got the same number.

    Example::

        bell = open_bell(twin.bell_path)
        bell.ring()  # elsewhere: bell.wait(timeout_s=0.1)

    Args:
        file: readable once the bell was rung, until that is cleared; does not block. Closed by this object.

    Attributes:
        fd: its descriptor.
    """

    _file: io.FileIO | None = None  # of one whose making was interrupted

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.fd = file.fileno()

    def ring(self) -> None:
        """Wake who waits, now or the next time. Ringing twice does no harm."""
        try:
            os.write(self.fd, _SIGNAL)
        except BlockingIOError:  # it was rung so often already
            pass

    def clear(self) -> None:
        """Let it be silent until it is rung again."""
        try:
            os.read(self.fd, PAGE)
        except BlockingIOError:  # another thread of this member was faster
            pass

    def wait(self, timeout_s: float) -> None:
        """Sleep until it is rung, or for `timeout_s` seconds, and clear it."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        if poller.poll(timeout_s * 1000):
            self.clear()

    def __repr__(self) -> str:
        return f"<Bell, fd {self.fd}>"

    def __del__(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # somebody closed all files, as before an exec
                self._file.close()


def open_bell(path: str) -> Bell:
    """The bell at `path`, made if there is none.

    Raises:
        SegmentError: it cannot be opened, or something else is there.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        file = opened(os.open, path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise SegmentError.cannot_open("pipe", path, error) from error
    bell = Bell(file)
    status = os.fstat(bell.fd)
    if not stat.S_ISFIFO(status.st_mode) or status.st_uid != os.geteuid():
        raise SegmentError(f"{path} is not a pipe of this user.")
    with contextlib.suppress(OSError):  # else it is larger than need be
        fcntl.fcntl(bell.fd, fcntl.F_SETPIPE_SZ, PAGE)
    return bell


def private_bell() -> Bell:
    """A bell that only this process knows.

    Raises:
        SegmentError: this process has too many files open.
    """
    try:
        return Bell(opened(os.eventfd, 0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    except OSError as error:
        raise SegmentError(f"Cannot make an eventfd: {error.strerror}.") from error
