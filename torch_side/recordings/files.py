"""The files of a recording: how they are named, and whose they are.

Who writes a file holds a lock on it (``flock``), which the kernel gives up with the process. A recording replaces an older one of
the same prefix, all of its files at once, and nothing that is locked or that is not a recording.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import io
import logging
import os
import re
import stat
import tempfile
import time

from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.process.descriptors import opened

from .archive import read_mark, recording_at, write_mark

log = logging.getLogger("blendtorch")

_PATIENCE_S = 1.0


def file_of(prefix: str | os.PathLike[str], worker: int) -> str:
    """The file of a worker, ``{prefix}_{worker:02d}.tar``."""
    return f"{os.fspath(prefix)}_{worker:02d}.tar"


def absolute(prefix: str | os.PathLike[str]) -> str:
    """`prefix` as of the working directory. Unlike :func:`os.path.abspath`, it leaves a slash at the end, which counts here."""
    return os.path.join(os.getcwd(), prefix)


def files_of(prefix: str, extension: str = ".tar") -> list[str]:
    """The files of a recording, in the order of their workers. Those of blendtorch have the extension :data:`.old.EXTENSION`."""
    numbered = []
    for path in glob.glob(f"{glob.escape(prefix)}_*{extension}"):
        if number := re.fullmatch(rf"_(\d{{2,}}){re.escape(extension)}", path[len(prefix) :]):
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
            os.stat(file_of(prefix, 0))  # such a name can be
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
            mark = read_mark(fd)
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


def open_for(recording: str, path: str) -> io.FileIO | None:
    """The locked file at `path`, of this recording: what it had written there, or a new one. None if it is writing there."""
    while True:
        file = _lock(path, recording, os.O_CREAT)
        if file is None:
            return None
        try:
            mark = read_mark(file.fileno())
            if mark is None:
                try:
                    write_mark(file.fileno(), recording)
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


def remove_other_recordings(prefix: str, recording: str) -> None:
    """All files of the prefix that belong to another recording; else a replay would mix the two."""
    removed = []
    for path in files_of(prefix):
        try:
            if recording_at(path) == recording:
                continue  # without a lock: whoever goes on with it must not find it locked
            file = _lock(path, recording)
        except FileNotFoundError:
            continue
        if file is not None:
            try:
                if read_mark(file.fileno()) is not None:
                    os.unlink(path)
                    removed.append(path)
            finally:
                file.close()
    _say_replaced(removed)


def _say_replaced(paths: list[str]) -> None:
    if paths:
        log.warning("A new recording has begun; of an older one, these files were removed: %s.", ", ".join(paths))
