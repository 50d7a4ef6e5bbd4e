"""What each process writes down before anything else can happen to it, and what the director tells all of them.

A record is one ``write`` of 40 bytes to a file opened with ``O_APPEND``. So it survives its writer, and the order of the records
is the order of what happened.
"""

from __future__ import annotations

import mmap
import os
import struct
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt


class What(IntEnum):
    """What happened."""

    WILL_PUBLISH = 1  # message `number` of `actor`
    PUBLISHED = 2  # publish returned
    TAKEN = 3  # `actor` has message `sequence` of `stream`
    READ = 4  # and it is message `number` of `producer`, intact
    DROPPED = 5  # `actor` let go of it
    BROKEN = 6  # it was not intact
    FAULT = 7  # `actor` is about to be hit at point `number`
    DIED = 8  # the director knows that `actor` is dead
    FORKED = 9  # a child of `actor` has ended
    MISUSED = 10  # and could use what is its parent's, or ended with an error
    REMOVED = 11  # the director removes files of `stream`; actors to `number` have begun


RECORD = np.dtype(
    [("what", "<u8"), ("actor", "<u4"), ("stream", "<u4"), ("sequence", "<u8"), ("producer", "<u8"), ("number", "<u8")]
)
_PACK = struct.Struct("<QIIQQQ")


class Ledger:
    """Appends records, in the name of one process.

    Args:
        path: of the file that all write to.
        actor: number of this process.
    """

    def __init__(self, path: str, actor: int) -> None:
        self.actor = actor
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, what: What, stream: int = 0, sequence: int = 0, producer: int = 0, number: int = 0) -> None:
        """Append one record."""
        os.write(self._fd, _PACK.pack(what, self.actor, stream, sequence, producer, number))

    def died(self, actor: int) -> None:
        """Write down that another process has died."""
        os.write(self._fd, _PACK.pack(What.DIED, actor, 0, 0, 0, 0))

    def close(self) -> None:
        """Write no more."""
        os.close(self._fd)


def records(path: str) -> npt.NDArray[np.void]:
    """Everything that was written down so far."""
    data = Path(path).read_bytes()
    return np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)


class Board:
    """A page that all processes of a round see: what the director wants of them."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, mmap.PAGESIZE)
        self._page = mmap.mmap(fd, mmap.PAGESIZE)
        os.close(fd)

    def order(self, role: str) -> None:
        """Have everybody of that role finish."""
        self._page[ord(role[0])] = 1

    def is_over(self, role: str) -> bool:
        """Whether those of that role are to finish."""
        return self._page[ord(role[0])] == 1
