"""Reading the items of a recorded file, in any order."""

from __future__ import annotations

import errno
import operator
import os
import stat
import weakref
from types import TracebackType
from typing import Any

import numpy as np

from blendtorch_shm.errors import ConfigurationError, RecordingError, RecordingNotFound

from . import old
from .archive import MARK_NBYTES, Ranges, find_items, has_checksums, read, read_index
from .item import BAD_ITEM, CHECKSUM_NBYTES, KEY_DIGITS, READ_NBYTES, Bytes, checksum, read_item
from .mapped import Window, populate

_ITEMS_OF_WINDOW = 200
"""Each may leave pages of its neighbours in memory: with a page that is touched, the kernel maps up to 64 KiB around it."""


class FileReader:
    """Reads the items of a recorded file at random.

    Large arrays are not copied: they lie in a private mapping of the file, which goes with the last of them. They are
    writable, and what is written there reaches neither the file nor the same item when it is asked for again. Arrays up to
    2 KiB are copies, as they are in a stream.

    Args:
        path: of the file. It may be incomplete, or still be written; what is in it now is what this reader has.
        allow_pickle: whether objects may be read that only pickle could carry, and files of blendtorch (``.btr``), which are
            pickles altogether. Such a file can run any program: do so only if you trust whoever made it.
        verify: whether to compare each item with its checksum when it is read. That reads the whole item; without it, arrays that
            nobody looks at are never read, and damage goes unnoticed.

    Attributes:
        has_checksums: whether the file has them.

    Raises:
        RecordingNotFound: there is no such file.
        ConfigurationError: it cannot be opened.
        RecordingError: it is not a recording, or one of blendtorch's and `allow_pickle` is not set.
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_pickle: bool = False, verify: bool = True) -> None:
        self.path = os.path.abspath(path)
        self._allow_pickle = allow_pickle
        self._verify = verify
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for
            self._close = weakref.finalize(self, os.close, self._fd)
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise RecordingError(f"{self.path} is not a recording: it is no ordinary file.")
            self._is_old = old.is_old(self._fd)
            if self._is_old and not allow_pickle:
                raise old.not_trusted([self.path], self.path)
            if self._is_old:
                self._ranges, has_index = old.find_items(self._fd, self.path), False
            else:
                self._ranges, has_index = find_items(self._fd, self.path)
            self.has_checksums = not self._is_old and has_checksums(self._fd, self._ranges)
            self._is_numbered = self.has_checksums and has_index
            self._window: Window | None = None
        except OSError as error:
            kind = RecordingNotFound if isinstance(error, FileNotFoundError) else ConfigurationError
            raise kind(f"The recording {self.path} cannot be read: {error.strerror}.") from error

    @property
    def offsets(self) -> Ranges:
        """(n,) uint64, where in the file each item begins."""
        return self._ranges[:, 0].copy()

    @staticmethod
    def read_offsets(fname: str | os.PathLike[str], *, allow_pickle: bool = False) -> Ranges:
        """The `offsets` of a file."""
        with FileReader(fname, allow_pickle=allow_pickle) as reader:
            return reader.offsets

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An item as it was saved.

        Raises:
            IndexError: there is no such item.
            RecordingError: its bytes are not those that were written, or make no sense, or contain a pickle and `allow_pickle`
                is not set.
        """
        index, start, end = self._find(index)
        if self._is_old:
            try:
                fields: dict[str, Any] = old.read_item(self._fd, index, read(self._fd, start, end - start))
                return fields
            except Exception as error:
                raise RecordingError(f"Item {index} of {self.path} cannot be read: {error!r}") from error
        try:
            part = _Part(self, index, start, end - start)
            if self._verify and self.has_checksums:
                part.verify()
            return read_item(part, allow_pickle=self._allow_pickle)
        except (RecordingError, OSError, *BAD_ITEM) as error:
            raise RecordingError(f"Item {index} of {self.path} cannot be read: {error}") from error

    def _find(self, index: int) -> tuple[int, int, int]:
        """Its number, counted from the beginning, and its first and end byte."""
        index = operator.index(index)  # it may be a tensor, and two of the same value are not the same key of a dict
        count = len(self._ranges)
        if not -count <= index < count:
            raise IndexError(f"item {index} of {count}")
        if not self._close.alive:
            raise RecordingError(f"{self.path} has been closed.")
        start, end = self._ranges[index].tolist()
        return index % count, start, end

    def verify_item(self, index: int) -> None:
        """Compare an item with its checksum, and make nothing of it.

        Raises:
            IndexError: there is no such item.
            RecordingError: it differs, or cannot be read.
        """
        index, start, end = self._find(index)
        try:
            _Part(self, index, start, end - start).verify()
        except (OSError, *BAD_ITEM) as error:
            raise RecordingError(f"Item {index} of {self.path} cannot be read: {error}") from error

    def damage_around_items(self) -> list[str]:
        """What is not as a recorder leaves a file that it has closed, apart from the items."""
        found = []
        mark = os.pread(self._fd, MARK_NBYTES, 0)
        if self.has_checksums and checksum(mark[:-CHECKSUM_NBYTES]) != mark[-CHECKSUM_NBYTES:]:
            found.append(f"{self.path} is damaged in its first {MARK_NBYTES} bytes, which come before its items.")
        size = os.fstat(self._fd).st_size
        if read_index(self._fd, size) is None:
            end = int(self._ranges[-1, 1]) if len(self._ranges) else MARK_NBYTES
            found.append(
                f"{self.path} has no index that fits it: its end is missing or damaged, or its writer was killed or still "
                f"writes. Its {len(self)} whole items end at byte {end}, the file at byte {size}."
            )
        return found

    def _window_for(self, index: int) -> Window:
        """A mapping in which nobody has had this item yet."""
        mine = object()
        window = self._window
        if window is None or len(window.given) >= _ITEMS_OF_WINDOW or window.given.setdefault(index, mine) is not mine:
            window = Window(self._fd, int(self._ranges[-1, 1]))
            window.given[index] = mine
            self._window = window
        return window

    def close(self) -> None:
        """Read no more. Arrays that were handed out stay valid."""
        self._close()
        self._window = None

    def __enter__(self) -> FileReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        return _reopen, (self.path, self._allow_pickle, self._verify)


class _Part:
    """An item in the file of a reader, as a :class:`~.item.Source`."""

    def __init__(self, reader: FileReader, index: int, start: int, nbytes: int) -> None:
        self._reader = reader
        self._index = index
        self._start = start
        self.nbytes = nbytes
        self._verified: bytearray | Bytes | None = None

    def verify(self) -> None:
        """Compare the item with its checksum. What is read of it from now on comes from the memory that was looked at.

        Raises:
            ValueError: it differs, or the file ends before.
            OSError: the disk does not give its bytes.
        """
        piece = self.mapped() if self.nbytes > READ_NBYTES else None
        content = piece if piece is not None and populate(piece) else self._read(0, self.nbytes)
        view = memoryview(content)
        if checksum(view[:-CHECKSUM_NBYTES]) != view[-CHECKSUM_NBYTES:]:
            raise ValueError(
                f"bytes {self._start} to {self._start + self.nbytes} of the file do not have the checksum that was written "
                f"with them, so they were changed since. Other items can be read. Copy the file again from where it is whole, or "
                f"leave this item out."
            )
        number = b"%0*d" % (KEY_DIGITS, self._index)
        if self._reader._is_numbered and bytes(view[:KEY_DIGITS]) != number:
            raise ValueError(
                f"bytes {self._start} to {self._start + self.nbytes} of the file are another item, so they were moved or copied "
                f"there since. Other items can be read. Copy the file again from where it is whole, or leave this item out."
            )
        self._verified = content

    def read(self, start: int, nbytes: int) -> bytearray:
        content = self._verified
        if content is None:
            return self._read(start, nbytes)
        if type(content) is bytearray and nbytes == len(content):
            return content
        return bytearray(memoryview(content)[start : start + nbytes])

    def mapped(self) -> Bytes:
        if self._verified is not None:
            return np.frombuffer(self._verified, np.uint8)
        try:
            return self._reader._window_for(self._index).piece(self._start, self.nbytes)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
        return np.frombuffer(self._read(0, self.nbytes), np.uint8)  # this process may not map as much

    def _read(self, start: int, nbytes: int) -> bytearray:
        return read(self._reader._fd, self._start + start, nbytes)


def _reopen(path: str, allow_pickle: bool, verify: bool) -> FileReader:
    return FileReader(path, allow_pickle=allow_pickle, verify=verify)
