"""Recordings: files that the items of a stream are written to while training goes on, and that are read at random later.

A recording is one tar archive per worker, ``{prefix}_{worker:02d}.tar``. How an item looks in it stands at the top of
:mod:`torch_side.recorded_item`. Around the items are two members more, which WebDataset skips by their names:

- ``__recording__`` comes first, and says which recording the file is a part of.
- ``__index__`` comes last: a ``.npy`` of uint64, first and end byte of each item, and at the end where this member itself begins.
  A file without it (its writer was killed, or still writes) is read from header to header instead.

An item ends with a checksum of its bytes, and so does the first member. Zeros stand there in recordings of earlier versions, and
in those that another program packed anew: they are read without a check.

An item is one ``pwritev`` from the memory where its arrays lie, and what is written is never written again. So after
``kill -9`` the items that are whole are those that were saved, and arrays that a reader has mapped do not change.

Who writes a file holds a lock on it (``flock``), which the kernel gives up with the process. A recording replaces an older one of
the same prefix, all of its files at once, and nothing that is locked or that is not a recording.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import glob
import io
import logging
import mmap
import operator
import os
import pickle
import re
import stat
import sys
import tarfile
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from blendtorch_shm.errors import ConfigurationError, RecordingError, RecordingNotFound
from blendtorch_shm.process import forks, interrupts
from blendtorch_shm.process.descriptors import opened

from . import old_recordings
from .recorded_item import (
    BAD_ITEM,
    BLOCK,
    CHECKSUM_NBYTES,
    KEY_DIGITS,
    READ_NBYTES,
    Bytes,
    checksum,
    has_checksum,
    item_members,
    npy_header,
    padded,
    parse_header,
    read_item,
    read_npy,
)

log = logging.getLogger("blendtorch")

FORMAT = 1
_MARK, _INDEX = "__recording__", "__index__"
_END = bytes(2 * BLOCK)
"""Of a tar archive."""
_MARK_NBYTES = 2 * BLOCK
_MAX_ITEMS = 10**KEY_DIGITS
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_PATIENCE_S = 1.0
_SLOW_S = 2.0
"""Who records is told once if an item takes so long to write: meanwhile nothing else is said of it."""
_ITEMS_OF_WINDOW = 200
"""Each may leave pages of its neighbours in memory: with a page that is touched, the kernel maps up to 64 KiB around it."""

Ranges = npt.NDArray[np.uint64]


class Mark(msgspec.Struct):
    """Content of the first member of a file.

    Attributes:
        recording: one for all files of a recording, and only for them.
        format: of the file, :data:`FORMAT`.
    """

    recording: str
    format: int = FORMAT


class FileRecorder:
    """Writes items to a file.

    What was saved is in the file when :meth:`save` returns, whatever happens to this process. Closing adds an index, so that
    a large file is opened faster.

    Args:
        outpath: file to write; missing folders are made. A recording that is there already is replaced.
        max_messages: items after that many are not saved.
        update_header: has no effect; programs written for blendtorch pass it.

    Raises:
        ConfigurationError: on entering: the file cannot be written, is no recording, or somebody else just writes it.
    """

    def __init__(
        self,
        outpath: str | os.PathLike[str] = "blendtorch.mpkl",
        max_messages: int = 100000,
        update_header: int = 10000,
    ) -> None:
        self.path = os.path.abspath(outpath)
        self.outpath = Path(outpath)
        self.update_header = update_header
        self.max_messages: int = min(max_messages, _MAX_ITEMS)
        self._file: io.FileIO | None = None
        self._generation = -1
        self._ranges = array.array("Q")
        self._end = 0
        """Of the last item that counts. One that was written behind it does so with a store here, which no interrupt divides."""
        self._mtime = int(time.time())
        self._lock = threading.RLock()
        self._is_saving = False

    @staticmethod
    def filename(prefix: str | os.PathLike[str], worker_idx: int) -> str:
        """The file of a worker, ``{prefix}_{worker_idx:02d}.tar``."""
        return f"{os.fspath(prefix)}_{worker_idx:02d}.tar"

    def __enter__(self) -> FileRecorder:
        make_folder_of(self.path)
        try:
            file = _open_for(uuid.uuid4().hex, self.path)
            assert file is not None  # nobody else is of this recording
            self._begin(file)
        except OSError as error:
            raise ConfigurationError(f"{self.path} cannot be written: {error.strerror}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    def for_worker(cls, prefix: str, recording: str, worker: int, num_workers: int) -> FileRecorder:
        """One that goes on with the file that this worker wrote before for the same recording, if there is one.

        Where another iteration still writes that file, it is the next one that no worker of this iteration uses.

        Raises:
            ConfigurationError: a file of this prefix is no recording, or one that is just being written.
            OSError: the file cannot be opened, or begun.
        """
        number = worker
        while (file := _open_for(recording, cls.filename(prefix, number))) is None:
            number += num_workers
        recorder = cls(cls.filename(prefix, number), max_messages=sys.maxsize)
        recorder._begin(file)
        try:
            _remove_other_recordings(prefix, recording)
        except BaseException:
            recorder.close()
            raise
        return recorder

    def _begin(self, file: io.FileIO) -> None:
        """Write behind what is in the file already."""
        self._file, self._generation = file, forks.generation
        try:
            ranges, _ = find_items(file.fileno(), self.path)
            self._ranges = array.array("Q", ranges.tobytes())
            self._end = int(ranges[-1, 1]) if len(ranges) else _MARK_NBYTES
            os.ftruncate(file.fileno(), self._end)
        except BaseException:
            self._file = None
            file.close()
            raise

    def __len__(self) -> int:
        """How many items are in the file."""
        written = len(self._ranges) // 2
        return (
            written - 1 if written and self._ranges[-1] > self._end else written
        )  # less one that does not count (yet)

    @property
    def num_messages(self) -> int:
        """How many items are in the file."""
        return len(self)

    @property
    def capacity(self) -> int:
        """How many items will be in the file at most."""
        return self.max_messages

    def save(self, data: Mapping[str, Any] | bytes, is_pickled: bool = False) -> None:
        """Append an item. Its arrays are written from where they lie.

        Args:
            data: the item, or its pickle.
            is_pickled: whether `data` is a pickle, which is read first.

        Raises:
            RecordingError: the file cannot be written any more and was closed, the items so far being safe; or the item has a
                value that cannot be recorded.
        """
        self.save_and(_do_nothing, data, is_pickled)

    def save_and(
        self, hand_over: Callable[[], None], data: Mapping[str, Any] | bytes, is_pickled: bool = False
    ) -> None:
        """:meth:`save`, and call `hand_over` right before the item counts as saved. No interrupt comes between the two.

        Args:
            hand_over: written in Python, and its last step is a store. It is not called where nothing is saved.
            data, is_pickled: as for :meth:`save`.
        """
        self._require_open()  # before the lock, which a thread of a parent may have held when this process was forked
        with self._lock:
            if self._is_saving:
                raise RecordingError(
                    f"save() to {self.path} was called in the middle of another save(), by a signal's handler or an object's "
                    f"finalizer (__del__). Set a flag there, and save from the program's loop."
                )
            self._require_open()
            self._is_saving = True
            try:
                self._save(hand_over, data, is_pickled)
            finally:
                self._is_saving = False

    def _require_open(self) -> None:
        if self._file is None or forks.generation != self._generation:
            raise RecordingError(f"Nothing can be saved to {self.path}: it is not open in this process.")

    def _save(self, hand_over: Callable[[], None], data: Mapping[str, Any] | bytes, is_pickled: bool) -> None:
        assert self._file is not None
        self._forget_what_was_cut_short()
        count = len(self)
        if count >= self.max_messages:
            return
        fields = pickle.loads(data) if is_pickled else data  # type: ignore[arg-type]
        buffers, nbytes = self._members(count, fields)  # type: ignore[arg-type]
        try:
            _write(self._file.fileno(), buffers, self._end)
        except OSError as error:
            if not interrupts.is_systems(error):
                raise
            self._close()
            raise RecordingError(self._why_it_stops(error, count)) from error
        end = self._end + nbytes
        self._ranges.extend((self._end, end))
        hand_over()
        self._end = end
        if count + 1 == self.max_messages:
            log.warning("%s has its %d items (max_messages); later ones are not saved.", self.path, count + 1)

    def _members(self, count: int, fields: Mapping[str, Any]) -> tuple[list[Any], int]:
        try:
            return item_members(count, fields, self._mtime)
        except RecordingError:
            raise
        except Exception as error:
            try:
                item_members(count, fields, self._mtime)
            except Exception as again:
                raise RecordingError(f"An item has a value that cannot be recorded to {self.path}: {again}") from again
            raise error  # a signal's handler raised it

    def _forget_what_was_cut_short(self) -> None:
        """An item that was written, and did not come to count before an interrupt."""
        if self._ranges and self._ranges[-1] > self._end:
            del self._ranges[-2:]

    def _why_it_stops(self, error: OSError, count: int) -> str:
        remedy = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = " Make room, or record to another disk."
        return (
            f"Recording to {self.path} stops after {count} items, {self._end / 1e6:.1f} MB: {error.strerror}.{remedy}"
        )

    def close(self) -> None:
        """Complete the file. Only the process that opened it does.

        Raises:
            OSError: the file system admits only now that it could not write something.
        """
        if forks.generation != self._generation:
            self._close()  # without the lock, which a thread of the parent may have held
        else:
            with self._lock:
                self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        fd = file.fileno()
        try:
            if forks.generation != self._generation:
                return
            self._forget_what_was_cut_short()
            with contextlib.suppress(OSError):  # it will be read without an index, or with half of one
                os.ftruncate(fd, self._end)
                try:
                    _write(fd, _index_member(self._ranges, self._end, self._mtime), self._end)
                except OSError:  # no room
                    os.ftruncate(fd, self._end)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_UN)  # a forked child may have the file open still
        finally:
            file.close()


class WorkerRecorder:
    """What one iteration of a dataset records. Opens its file with the first item, and stops at the first error.

    Args:
        prefix: absolute, see :meth:`FileRecorder.filename`.
        recording: see :attr:`Mark.recording`.
        worker: number of this worker.
        num_workers: at least 1.
    """

    def __init__(self, prefix: str, recording: str, worker: int, num_workers: int) -> None:
        self._arguments = (prefix, recording, worker, num_workers)
        self._recorder: FileRecorder | None = None
        self._has_stopped = self._was_slow = False

    def save(self, fields: Mapping[str, Any], hand_over: Callable[[], None]) -> None:
        """Append an item and call `hand_over`, see :meth:`FileRecorder.save_and`; or say in the log why recording stops here."""
        if self._has_stopped:
            return
        try:
            if self._recorder is None:
                self._recorder = FileRecorder.for_worker(*self._arguments)
            start = time.monotonic()
            self._recorder.save_and(hand_over, fields)
            took_s = time.monotonic() - start
            if took_s > _SLOW_S and not self._was_slow:
                self._was_slow = True
                log.warning(
                    "Training waits for the disk of a recording: writing one item to %s took %.1f s.",
                    self._recorder.path,
                    took_s,
                )
        except (RecordingError, ConfigurationError, OSError) as error:
            if isinstance(error, OSError) and not interrupts.is_systems(error):
                raise
            self._has_stopped = True
            why = str(error)
            if isinstance(error, OSError):
                why = f"Recording to {FileRecorder.filename(self._arguments[0], self._arguments[2])} does not begin: {error}."
            log.error("%s Training goes on, and what has been recorded replays.", why)

    def close(self) -> None:
        """Complete the file. An item that is saved afterwards goes on with it."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            try:
                recorder.close()
            except OSError as error:
                log.error("%s may lack its last items: %s.", recorder.path, error.strerror)


def _do_nothing() -> None:
    pass


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
            self._is_old = old_recordings.is_old(self._fd)
            if self._is_old and not allow_pickle:
                raise old_recordings.not_trusted([self.path], self.path)
            if self._is_old:
                self._ranges, has_index = old_recordings.find_items(self._fd, self.path), False
            else:
                self._ranges, has_index = find_items(self._fd, self.path)
            self.has_checksums = not self._is_old and _has_checksums(self._fd, self._ranges)
            self._is_numbered = self.has_checksums and has_index
            self._window: _Window | None = None
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
                fields: dict[str, Any] = old_recordings.read_item(self._fd, index, _read(self._fd, start, end - start))
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
        mark = os.pread(self._fd, _MARK_NBYTES, 0)
        if self.has_checksums and checksum(mark[:-CHECKSUM_NBYTES]) != mark[-CHECKSUM_NBYTES:]:
            found.append(f"{self.path} is damaged in its first {_MARK_NBYTES} bytes, which come before its items.")
        size = os.fstat(self._fd).st_size
        if _read_index(self._fd, size) is None:
            end = int(self._ranges[-1, 1]) if len(self._ranges) else _MARK_NBYTES
            found.append(
                f"{self.path} has no index that fits it: its end is missing or damaged, or its writer was killed or still "
                f"writes. Its {len(self)} whole items end at byte {end}, the file at byte {size}."
            )
        return found

    def _window_for(self, index: int) -> _Window:
        """A mapping in which nobody has had this item yet."""
        mine = object()
        window = self._window
        if window is None or len(window.given) >= _ITEMS_OF_WINDOW or window.given.setdefault(index, mine) is not mine:
            window = _Window(self._fd, int(self._ranges[-1, 1]))
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
    """An item in the file of a reader, as a :class:`~torch_side.recorded_item.Source`."""

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
        content = piece if piece is not None and _populate(piece) else self._read(0, self.nbytes)
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
        return _read(self._reader._fd, self._start + start, nbytes)


def _reopen(path: str, allow_pickle: bool, verify: bool) -> FileReader:
    return FileReader(path, allow_pickle=allow_pickle, verify=verify)


def absolute(prefix: str | os.PathLike[str]) -> str:
    """`prefix` as of the working directory. Unlike :func:`os.path.abspath`, it leaves a slash at the end, which counts here."""
    return os.path.join(os.getcwd(), prefix)


def files_of(prefix: str) -> list[str]:
    """The files of a recording, in the order of their workers."""
    numbered = []
    for path in glob.glob(f"{glob.escape(prefix)}_*.tar"):
        number = re.fullmatch(r"_(\d{2,})\.tar", path[len(prefix) :])
        if number:
            numbered.append((int(number[1]), path))
    return [path for _, path in sorted(numbered)]


def check_prefix(prefix: str, recording: str) -> None:
    """Find out now whether recording will be possible. Missing folders are made.

    Raises:
        ConfigurationError: it will not be.
    """
    folder = make_folder_of(prefix)
    try:
        with tempfile.TemporaryFile(dir=folder), contextlib.suppress(FileNotFoundError):
            os.stat(FileRecorder.filename(prefix, 0))  # such a name can be
    except OSError as error:
        raise ConfigurationError(f"Nothing can be recorded to {prefix}_00.tar: {error.strerror}: {folder}.") from error
    for path in files_of(prefix):
        try:
            file = _lock(path, recording)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigurationError(f"Nothing can be recorded to {path}: {error.strerror}.") from error
        if file is not None:
            file.close()


def make_folder_of(path: str) -> str:
    """Make the folder that `path` is to be in, and return it."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"The folder {folder} cannot be made: {error.strerror}.") from error
    return folder


# -- whose file it is -------------------------------------------------------------------------------------------


def _lock(path: str, recording: str, flags: int = 0) -> io.FileIO | None:
    """Open and lock a file that may be replaced, or gone on with. None if this very recording writes to it just now.

    Raises:
        ConfigurationError: it is no recording, or one that somebody else is writing.
        OSError: it cannot be opened.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        file: io.FileIO | None = opened(os.open, path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
        assert file is not None
        fd = file.fileno()
        try:
            is_locked = _try_lock(fd)
            mark = _read_mark(fd)
            if is_locked and _is_at(fd, path):
                status = os.fstat(fd)
                if mark is None and (status.st_size or not stat.S_ISREG(status.st_mode)):
                    raise ConfigurationError(
                        f"{path} exists and is not a recording, so it is not overwritten. Remove it, or record elsewhere."
                    )
                found, file = file, None
                return found
            if not is_locked and mark is not None and mark.recording == recording:
                return None
            if not is_locked and time.monotonic() > deadline:
                raise ConfigurationError(
                    f"{path} is just being written by another recording. Wait for its end, or record elsewhere."
                )
        finally:
            if file is not None:
                file.close()
        time.sleep(0.001)  # somebody begins it, removes it or only looks at it


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _open_for(recording: str, path: str) -> io.FileIO | None:
    """The locked file at `path`, of this recording: what it had written there, or a new one. None if it is writing there."""
    while True:
        file = _lock(path, recording, os.O_CREAT)
        if file is None:
            return None
        try:
            mark = _read_mark(file.fileno())
            if mark is None:
                try:
                    _write_mark(file.fileno(), recording)
                except OSError:
                    os.unlink(path)
                    raise
                return file
            if mark.recording == recording:
                return file
            os.unlink(path)  # and not emptied: somebody may have it mapped
            _say_replaced([path])
        except BaseException:
            file.close()
            raise
        file.close()


def _remove_other_recordings(prefix: str, recording: str) -> None:
    """All files of the prefix that belong to another recording; else a replay would mix the two."""
    removed = []
    for path in files_of(prefix):
        try:
            if _recording_at(path) == recording:
                continue  # without a lock: whoever goes on with it must not find it locked
            file = _lock(path, recording)
        except FileNotFoundError:
            continue
        if file is not None:
            try:
                if _read_mark(file.fileno()) is not None:
                    os.unlink(path)
                    removed.append(path)
            finally:
                file.close()
    _say_replaced(removed)


def _say_replaced(paths: list[str]) -> None:
    if paths:
        log.warning("A new recording has begun; of an older one, these files were removed: %s.", ", ".join(paths))


def _write_mark(fd: int, recording: str) -> None:
    text = msgspec.json.encode(Mark(recording))
    content = _header(_MARK, len(text), int(time.time())) + text + bytes(-len(text) % BLOCK - CHECKSUM_NBYTES)
    _write(fd, [content + checksum(content)], 0)


def _has_checksums(fd: int, ranges: Ranges) -> bool:
    """Whether the mark, the first item or the last one ends with a checksum. A recording has them everywhere or nowhere, but
    damage may have wiped some.
    """
    ends = [_MARK_NBYTES, *ranges[[0, -1], 1].tolist()] if len(ranges) else [_MARK_NBYTES]
    return any(any(os.pread(fd, CHECKSUM_NBYTES, end - CHECKSUM_NBYTES)) for end in ends)


def _recording_at(path: str) -> str | None:
    with opened(os.open, path, os.O_RDONLY | os.O_CLOEXEC) as file:
        mark = _read_mark(file.fileno())
    return None if mark is None else mark.recording


def _read_mark(fd: int) -> Mark | None:
    """None if the file does not begin as one of ours."""
    data = os.pread(fd, _MARK_NBYTES, 0)
    try:
        name, nbytes = parse_header(data[:BLOCK])
        mark = msgspec.json.decode(data[BLOCK : BLOCK + nbytes], type=Mark)
    except BAD_ITEM:
        return None
    return mark if name == _MARK and nbytes <= BLOCK else None


# -- the file ---------------------------------------------------------------------------------------------------


def find_items(fd: int, path: str) -> tuple[Ranges, bool]:
    """(n, 2) uint64, first and end byte of each item that is whole; and whether the index says so, and not a search.

    Raises:
        RecordingError: this is not a recording.
        OSError: it cannot be read.
    """
    size = os.fstat(fd).st_size
    mark = _read_mark(fd)
    if mark is None:
        if size == 0:  # killed before it had written anything
            return np.zeros((0, 2), np.uint64), False
        raise RecordingError(f"{path} is not a recording: it does not begin with a tar member {_MARK}.")
    if mark.format != FORMAT:
        raise RecordingError(
            f"{path} was recorded in format {mark.format}, and this version of blendtorch-shm reads format {FORMAT}. "
            f"Its arrays are .npy files in a tar archive."
        )
    ranges = _read_index(fd, size)
    return (_scan(fd, size, path), False) if ranges is None else (ranges, True)


def _index_member(ranges: array.array[int], at: int, mtime: int) -> list[bytes]:
    """Ends with a block's end, so that its last number is found from the end of the file."""
    words = np.append(np.array(ranges, "<u8"), np.array([at], "<u8"))
    description = f"{{'descr': '<u8', 'fortran_order': False, 'shape': ({len(words)},), }}"
    head = npy_header(description, BLOCK, words.nbytes)
    return [_header(_INDEX, len(head) + words.nbytes, mtime), head, words.tobytes(), _END]


def _read_index(fd: int, size: int) -> Ranges | None:
    """What `_index_member` said; None if it is not there, or does not fit this file (somebody edited it)."""
    end = size - len(_END)
    if end < _MARK_NBYTES:
        return None
    try:
        at = int.from_bytes(_read(fd, end - 8, 8), "little")
        if at > end - BLOCK:
            return None
        name, nbytes = parse_header(_read(fd, at, BLOCK))
        if name != _INDEX or at + BLOCK + nbytes != end:
            return None
        content = _read(fd, at + BLOCK, nbytes)
        words = read_npy(content, 0, nbytes, content)
    except BAD_ITEM:
        return None
    if words.dtype != np.dtype("<u8") or words.ndim != 1 or len(words) % 2 != 1:
        return None
    starts, ends = np.append(words[:-1:2], words[-1]), np.append(np.array([_MARK_NBYTES], "<u8"), words[1::2])
    fits = words[-1] == at and (starts == ends).all() and (starts[1:] > starts[:-1]).all()
    return words[:-1].reshape(-1, 2) if fits else None


def _scan(fd: int, size: int, path: str) -> Ranges:
    """Find the items by going from header to header."""
    ranges = array.array("Q")
    at, start, key = _MARK_NBYTES, 0, ""
    while at + BLOCK <= size:
        block = os.pread(fd, BLOCK, at)
        try:
            name, nbytes = parse_header(block)
            if not has_checksum(block):
                raise ValueError("its checksum is another")
        except ValueError as error:
            if block.strip(b"\0"):
                log.warning(
                    "%s is damaged at byte %d (%s); %d items before that can be read.",
                    path,
                    at,
                    error,
                    len(ranges) // 2,
                )
            break
        its_key, _, rest = name.partition(".")
        if its_key != key:
            if key:
                log.warning("%s is damaged at byte %d: item %s has no end there, and is left out.", path, at, key)
            start, key = at, its_key
        at += BLOCK + padded(nbytes)
        if at > size:
            break
        if rest == "json":
            ranges.extend((start, at))
            key = ""
    return np.frombuffer(ranges.tobytes(), np.uint64).reshape(-1, 2)


def _header(name: str, nbytes: int, mtime: int) -> bytes:
    """The block before a member that is no part of an item."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = nbytes, mtime, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def _write(fd: int, buffers: list[Any], at: int) -> None:
    """All of the buffers, one after the other."""
    while buffers:
        written = os.pwritev(fd, buffers[:_IOV_MAX], at)
        at += written
        for done, buffer in enumerate(buffers):  # noqa: B007
            nbytes = len(buffer)
            if written < nbytes:
                break
            written -= nbytes
        else:
            return
        buffers = [memoryview(buffers[done])[written:], *buffers[done + 1 :]]


def _read(fd: int, at: int, nbytes: int) -> bytearray:
    """Exactly those bytes.

    Raises:
        ValueError: the file ends before.
    """
    data = bytearray(nbytes)
    done = 0
    while done < nbytes:
        got = os.preadv(fd, [memoryview(data)[done:] if done else data], at + done)
        if not got:
            raise ValueError("the file ends before that")
        done += got
    return data


_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap, _madvise = _libc.mmap, _libc.munmap, _libc.madvise
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value
_MADV_POPULATE_READ = 22  # Linux 5.14, <linux/mman.h>
_MAP_NORESERVE = 0x4000  # Linux; the mmap module has it from Python 3.13 on


def _populate(piece: Bytes) -> bool:
    """Map the pages of an item now, in one system call. Then bytes that the disk does not give are no crash. False if that
    cannot be: those of a file that was cut off, or on a kernel before Linux 5.14.
    """
    start = piece.ctypes.data
    first = start - start % mmap.PAGESIZE
    return bool(_madvise(first, start + len(piece) - first, _MADV_POPULATE_READ) == 0)


class _Window:
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
    window: _Window
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
