"""What instances print: in files of bounded size, on the terminal if that was asked for, and kept where a launch failed.

An instance, and whatever it starts, writes to its log through descriptors of its own, not through a pipe to the launcher. So it
never waits for a launcher that is busy or stopped, and a launcher that dies takes nothing of the log along. Hence nobody
can give it another file. The file is opened to append; when it is too long, its end is copied to a file beside it
(``instance-00.log.1``), and it is emptied: the next line is its first. Only what is written in the microseconds
between the last read and that is lost. A file that somebody removes is written on, without a name: what comes there is moved to a
new one in the same way.

The logs lie in the launch directory, which goes with the launch, or where the user wants them. When an instance fails, the
end of its log is copied to the user's cache folder at once, and the error names that copy.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from blendtorch_shm.errors import LaunchError
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.launch.notes import NOISE, log_path, previous_log_path, read_log

from .config import LaunchConfig

_MB = 10**6
_LOOK_EVERY_S, _FOLLOW_EVERY_S = 1.0, 0.1
"""How often it is looked whether a log is too long, and whether there is something to show."""
_SHOWN_NBYTES = 2**16
"""Of one instance's log at a time; what is beyond is left out on the terminal."""
_KEPT_NBYTES = 5 * _MB
"""Of the log of an instance that failed: home directories have quotas, and launches hundreds of instances."""
_KEPT_LAUNCHES = 5
_FOLDER = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")


class Logs:
    """The logs of the instances of one launch.

    Errors come from :meth:`create` and :meth:`open` alone. A full disk must not end a launch, nor hide why it ended.

    Args:
        directory: of the launch.
        config: has ``log_dir``, ``max_log_mb`` and ``follow``.
        show: is given each line that an instance prints, if ``follow``.

    Example::

        logs = Logs(directory, config, print)
        logs.create()
        fd = logs.open(btid=0)
    """

    def __init__(self, directory: LaunchDirectory, config: LaunchConfig, show: Callable[[str], None]) -> None:
        self._directory = directory.path
        self._name = f"{time.strftime('%Y%m%d-%H%M%S')}-{directory.launch}"  # names sort by time
        self._home = None if config.log_dir is None else Path(config.log_dir, self._name)
        self._half_nbytes = None if config.max_log_mb is None else int(config.max_log_mb * _MB / 2)
        self._show = show if config.follow else None
        self._is_one = config.num_instances == 1
        self._files: dict[int, int] = {}  # descriptors of the logs that are written now
        self._shown_nbytes: dict[int, int] = {}  # of the log as it is
        self._begun: dict[int, bytes] = {}  # the line whose end is not there yet

    @property
    def folder(self) -> str:
        """Where the logs are."""
        return self._directory if self._home is None else str(self._home)

    @property
    def look_every_s(self) -> float | None:
        """How often to call :meth:`look`. None: not at all."""
        if self._show is not None:
            return _FOLLOW_EVERY_S
        return None if self._half_nbytes is None else _LOOK_EVERY_S

    def create(self) -> None:
        """Make the folder that the user wants, if one is wanted.

        Raises:
            LaunchError: it cannot be made.
        """
        if self._home is None:
            return
        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise LaunchError(
                f"log_dir={str(self._home.parent)!r} cannot be used: {error.strerror}. Choose a folder that can be written."
            ) from error

    def open(self, btid: int) -> int:
        """A descriptor for all that an instance prints. The caller closes it.

        Raises:
            OSError: the file cannot be made.
        """
        fd = os.open(self._linked(btid), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._close(btid)
        self._files[btid] = os.dup(fd)
        return fd

    def close(self) -> None:
        """Look at no log any more."""
        for btid in list(self._files):
            self._close(btid)

    def _close(self, btid: int) -> None:
        fd = self._files.pop(btid, -1)
        if fd >= 0:
            os.close(fd)

    def _linked(self, btid: int) -> str:
        """The path of a log in the launch directory, where readers look for it; a link, if the user wants it elsewhere."""
        path = log_path(self._directory, btid)
        if self._home is not None:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.path.lexists(path):
                os.symlink(self._home / os.path.basename(path), path)
        return path

    def _mend(self, btid: int) -> None:
        """If somebody has removed a log that is still written, move what is written there to a new file of its name."""
        fd = self._files.get(btid, -1)
        if fd < 0:
            return
        path = self._linked(btid)
        status = os.fstat(fd)
        if status.st_nlink == 0 and status.st_size:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab") as log:
                log.write(os.pread(fd, status.st_size, 0))
            os.ftruncate(fd, 0)

    def look(self, btid: int) -> None:
        """Show what an instance has printed since the last look, and shorten its log if it is too long."""
        with contextlib.suppress(OSError):
            self._mend(btid)
            path = os.path.realpath(log_path(self._directory, btid))
            if self._show is not None:
                self._follow(btid, path)
            if self._half_nbytes is not None and os.stat(path).st_size > self._half_nbytes:
                shorten(path, self._half_nbytes)
                self._shown_nbytes[btid] = 0

    def end(self, btid: int) -> None:
        """An instance has ended: show the rest of what it has printed."""
        self.look(btid)
        if rest := self._begun.pop(btid, b""):
            self._show_line(btid, rest)

    def keep(self, btid: int) -> str:
        """See to it that the log of an instance outlives the launch.

        Returns:
            where it lies then, for an error; where it lies until then, and why, if it cannot be kept.
        """
        path = log_path(self._directory, btid)
        if self._home is not None:
            return str(self._home / os.path.basename(path))
        try:
            folder = cache_folder() / "logs"
            kept = folder / self._name / os.path.basename(path)
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                with _new_file(f"{kept}.new") as file:
                    file.write(read_log(self._directory, btid, _KEPT_NBYTES))
                os.replace(f"{kept}.new", kept)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(f"{kept}.new")
                with contextlib.suppress(OSError):
                    os.rmdir(kept.parent)  # unless the logs of others are there
                raise
        except OSError as error:
            return f"{path} (which goes with the launch, for a copy cannot be kept: {error})"
        _keep_the_last(folder, self._name)
        return str(kept)

    def _follow(self, btid: int, path: str) -> None:
        with open(path, "rb") as log:
            size = log.seek(0, os.SEEK_END)
            start = min(size, self._shown_nbytes.get(btid, 0))
            left_out = max(0, size - start - _SHOWN_NBYTES)
            log.seek(start + left_out)
            text = log.read(size - start - left_out)
        self._shown_nbytes[btid] = size
        if left_out:
            self._show_line(btid, self._begun.pop(btid, b"") + b"... (%d bytes are in its log only)" % left_out)
        *lines, rest = (self._begun.pop(btid, b"") + text).split(b"\n")
        for line in lines:
            self._show_line(btid, line)
        if len(rest) > _SHOWN_NBYTES:
            self._show_line(btid, rest)
        elif rest:
            self._begun[btid] = rest

    def _show_line(self, btid: int, line: bytes) -> None:
        if self._show is not None:
            text = line.decode("utf-8", "replace").rstrip("\r")
            if NOISE.search(text):
                return
            self._show(text if self._is_one else f"[{btid}] {text}")


def cache_folder() -> Path:
    """Our folder in the user's cache folder. It need not exist.

    Raises:
        OSError: this user has no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        # An empty HOME would be the root directory.
        base = os.path.expanduser("~/.cache") if os.environ.get("HOME", "~") else ""
    if not os.path.isabs(base):
        raise OSError("there is no home directory, and XDG_CACHE_HOME is not set")
    return Path(base, "blendtorch-shm")


def shorten(path: str, keep_nbytes: int) -> None:
    """Empty a file that others append to, and put its end into a file beside it.

    Args:
        path: of the file.
        keep_nbytes: how much of it is kept, about.

    Raises:
        OSError: the file is gone.
    """
    with open(path, "r+b", buffering=0) as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - keep_nbytes))
        end = log.read(2 * keep_nbytes)  # whoever writes faster than this reads is not followed for ever
        log.truncate(0)  # before the end is put elsewhere: that makes room on a disk that is full
    with contextlib.suppress(OSError), _new_file(previous_log_path(path)) as previous:
        previous.write(end)


def _new_file(path: str) -> IO[bytes]:
    """A file that this user alone can read. What was there is replaced."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    return open(os.open(path, flags, 0o600), "wb")


def _keep_the_last(folder: Path, own: str) -> None:
    """Remove what was kept of launches other than `own` and the last ones before."""
    with contextlib.suppress(OSError):
        others = sorted(name for name in os.listdir(folder) if _FOLDER.fullmatch(name) and name != own)
        for name in others[: 1 - _KEPT_LAUNCHES]:
            shutil.rmtree(folder / name, ignore_errors=True)
