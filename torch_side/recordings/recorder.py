"""Writing items to a file."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import io
import logging
import os
import pickle
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from blendtorch_shm.errors import ConfigurationError, RecordingError
from blendtorch_shm.process import forks, interrupts

from .archive import MARK_NBYTES, find_items, index_member, write
from .files import file_of, make_folder_of, open_for, remove_other_recordings
from .item import KEY_DIGITS, item_members

log = logging.getLogger("blendtorch")

_MAX_ITEMS = 10**KEY_DIGITS
_SLOW_S = 2.0
"""Who records is told once if an item takes so long to write: meanwhile nothing else is said of it."""


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
        return file_of(prefix, worker_idx)

    def __enter__(self) -> FileRecorder:
        make_folder_of(self.path)
        try:
            file = open_for(uuid.uuid4().hex, self.path)
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
        while (file := open_for(recording, file_of(prefix, number))) is None:
            number += num_workers
        recorder = cls(file_of(prefix, number), max_messages=sys.maxsize)
        recorder._begin(file)
        try:
            remove_other_recordings(prefix, recording)
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
            self._end = int(ranges[-1, 1]) if len(ranges) else MARK_NBYTES
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
            write(self._file.fileno(), buffers, self._end)
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
                    write(fd, index_member(self._ranges, self._end, self._mtime), self._end)
                except OSError:  # no room
                    os.ftruncate(fd, self._end)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_UN)  # a forked child may have the file open still
        finally:
            file.close()


class WorkerRecorder:
    """What one iteration of a dataset records. Opens its file with the first item, and stops at the first error.

    Args:
        prefix: absolute, see :func:`~.files.file_of`.
        recording: see :attr:`~.archive.Mark.recording`.
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
                why = f"Recording to {file_of(self._arguments[0], self._arguments[2])} does not begin: {error}."
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
