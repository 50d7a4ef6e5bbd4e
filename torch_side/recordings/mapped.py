"""The items of a file in memory, mapped once for many of them."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import numpy as np

from .item import Bytes

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap, _madvise = _libc.mmap, _libc.munmap, _libc.madvise
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value
_MADV_POPULATE_READ = 22  # Linux 5.14, <linux/mman.h>
_MAP_NORESERVE = 0x4000  # Linux; the mmap module has it from Python 3.13 on


def populate(piece: Bytes) -> bool:
    """Map the pages of an item now, in one system call. Then bytes that the disk does not give are no crash. False if that
    cannot be: those of a file that was cut off, or on a kernel before Linux 5.14.
    """
    start = piece.ctypes.data
    first = start - start % mmap.PAGESIZE
    return bool(_madvise(first, start + len(piece) - first, _MADV_POPULATE_READ) == 0)


class Window:
    """The beginning of a file in memory, private and writable, for as long as the reader or a piece of it needs it.

    A mapping for each item would cost more than all the rest of reading it. So items share one, and each is handed out once in
    it: what is written into an item stays there, on whole pages until its end, and on pages that it shares with its
    neighbours until the end of the window. mmap.mmap would not do, because it keeps a file descriptor for each mapping.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._nbytes = 0
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
        address = _mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._address, self._nbytes = address, nbytes
        self.given: dict[int, object] = {}
        """Items that somebody has, or had, and for each of them who."""

    def piece(self, start: int, nbytes: int) -> Bytes:
        """(nbytes,) uint8."""
        piece = _Piece.from_address(self._address + start)
        piece.window = self
        piece.nbytes = nbytes
        return np.ndarray((nbytes,), np.uint8, piece)

    def __del__(self, munmap: Any = _munmap) -> None:
        if self._nbytes:
            munmap(self._address, self._nbytes)


class _Piece(ctypes.Array[ctypes.c_uint8]):
    """What an item's arrays are built on. With the last of them, the pages that it has for itself go.

    As a ctypes type must have a length, it has one that no file exceeds.
    """

    _type_ = ctypes.c_uint8
    _length_ = 2**47
    window: Window
    nbytes = 0

    def __del__(
        self,
        madvise: Any = _madvise,
        addressof: Any = ctypes.addressof,
        page: int = mmap.PAGESIZE,
        how: int = mmap.MADV_DONTNEED,
    ) -> None:
        start = addressof(self)
        first = start + -start % page
        end = start + self.nbytes
        if end - end % page > first:
            madvise(first, end - end % page - first, how)
