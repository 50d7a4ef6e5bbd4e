"""The directories of one launch, and the lock in each that proves that its launcher lives.

``{base}/blendtorch-{launch}/`` holds the logs, statuses and notes of the instances (:mod:`.notes`).
``/dev/shm/blendtorch-{launch}/`` holds what the two ends of a stream meet at, lock files and pipes: who sees the rings, in
another container perhaps, must see these too, and the beacon proves that one does. `launch` is 8 random hexadecimal
characters. They are also in the name of every POSIX shared-memory object of the launch and, as ``BLENDTORCH_LAUNCH``, in the
environment of every process that it started, so one number finds all that there is to clear away.

Both directories have mode 0700, and each contains a file ``launcher.lock``. The launcher holds its lock for life. Once it has
the lock, it writes into the file which directory of which launch this is (:data:`MARKER`). So whoever reads that, and then finds
the lock free, knows that the directory is ours and that its launcher is dead. :mod:`.sweep` removes such directories only.

The lock belongs to an open file description (``F_OFD_SETLK``): the kernel drops it when the launcher dies, however it dies, and
opening and closing the file elsewhere in the process drops nothing. A forked child shares the description, so it closes its copy.

Somebody may remove them while the launch lives: what cleans up by age, the end of a login, the user. The launcher looks again and
again, and makes anew what is missing (:meth:`LaunchDirectory.mend`). A new lock file is locked before it gets its name, and
the lock of the one before is kept, too: whoever opened that one earlier must not find it free. So that nothing is removed by age,
the launcher touches all files now and then, and holds a shared ``flock`` on the directories, which systemd-tmpfiles respects.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from ..errors import LaunchError
from ..memory import limits
from ..memory.locks import SETLK, is_locked, lock_request
from ..process import forks
from ..process.descriptors import close_all, held, open_into, opened
from .address import SHARED_MEMORY, Address, Twin, beacon_path, describe, readers_path, streams_path
from .notes import remove_blenders_folder

LOCK_FILE = "launcher.lock"
LOOK = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""How to open one that may be anybody's, and anything."""
MARKER = re.compile(
    r"blendtorch launch (?P<launch>[0-9a-f]{8}) (?P<nonce>[0-9a-f]{32}), directory (?P<inode>[0-9]+), boot (?P<boot>\S+)\n"
)
"""What the lock file says. Only the directory with this inode is the launch's: a copy has another one."""

_TOUCH_EVERY_S = 3600.0
"""What cleans up by age counts in days."""
_ROOM_NBYTES = 2**16
"""For logs, at least, there must be in the directory of a launch that begins."""


class LaunchDirectory:
    """The directories of a launch that this process owns: named here, made by :meth:`create`.

    Register :meth:`remove` before calling :meth:`create`: Ctrl-C may come at any point.

    Attributes:
        path: of logs, statuses and notes.
        streams: path of locks and bells.
        launch: identifier of the launch.

    Raises:
        LaunchError: no directory for logs can be written.

    Example:
        >>> with contextlib.ExitStack() as cleanup:
        ...     directory = LaunchDirectory()
        ...     cleanup.callback(directory.remove)
        ...     directory.create()
    """

    def __init__(self) -> None:
        base = _base()
        self._nonce = secrets.token_hex(16)
        self._generation = forks.generation
        self._touched = time.monotonic()
        self._is_removed = False
        while True:
            self.launch = secrets.token_hex(4)
            self.path, self.streams = f"{base}/blendtorch-{self.launch}", streams_path(self.launch)
            if not os.path.lexists(self.path) and not os.path.lexists(self.streams):
                break
        both = dict.fromkeys(map(os.path.realpath, (self.streams, self.path)))  # they may be the same
        self._directories = [_LockedDirectory(path, self.launch, self._nonce) for path in both]

    def __repr__(self) -> str:
        return f"LaunchDirectory(launch={self.launch!r}, path={self.path!r})"

    def create(self) -> LaunchDirectory:
        """Make the directories. Their locks are held from the first moment that they can be found under their names.

        Returns:
            itself.

        Raises:
            LaunchError: a directory cannot be made, for example on a full disk. Nothing of it is left then.
        """
        try:
            for directory in self._directories:
                directory.mend()
            self._mend_beacon()
            room = Path(self.path, "room")
            room.write_bytes(bytes(_ROOM_NBYTES))  # to try is the only way to know: there are quotas, too
            room.unlink()
        except OSError as error:
            self.remove()
            limit = limits.short_of_file_size(_ROOM_NBYTES)
            remedy = "Make room there, or set XDG_RUNTIME_DIR or TMPDIR to another directory for the logs"
            raise LaunchError(
                f"Cannot make directories for the launch in {SHARED_MEMORY} and {os.path.dirname(self.path)}: "
                f"{limit or f'{error}. {remedy}'}."
            ) from error
        return self

    def mend(self) -> list[str]:
        """Make anew what somebody has removed of the directories, their lock files and the beacon; and now and then touch
        all that is there.

        Returns:
            the paths of what was missing.

        Raises:
            OSError: something is missing, and cannot be made.
        """
        if self._is_removed or forks.generation != self._generation:
            return []
        made = [path for directory in self._directories if (path := directory.mend())]
        if self._mend_beacon():
            made.append(beacon_path(self.launch))
        if time.monotonic() - self._touched > _TOUCH_EVERY_S:
            self._touched = time.monotonic()
            self.touch()
        return made

    def _mend_beacon(self) -> bool:
        """Make the beacon if there is none; whether there was none."""
        path = beacon_path(self.launch)
        if os.path.lexists(path):
            return False
        new = Path(f"{path}.new")
        new.write_text(self._nonce)
        os.rename(new, path)
        return True

    def touch(self) -> None:
        """Give all that the launch has on this host today's time stamps."""
        for path in [
            *(path for directory in self._directories for path in directory.contents()),
            *(f"{SHARED_MEMORY}/{name}" for name in os.listdir(SHARED_MEMORY) if name.startswith(f"bt-{self.launch}-")),
        ]:
            with contextlib.suppress(OSError):
                os.utime(path, follow_symlinks=False)

    def twin(self, name: str, btid: int) -> Twin:
        """Where the socket `name` of instance `btid` lives."""
        return Twin(self.path, self.launch, self._nonce, name, btid)

    def tell_readers(self, addresses: Iterable[Address]) -> None:
        """Say how to read from these, for readers of this user who were told an endpoint alone (see :func:`.address.find`)."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with io.BufferedWriter(opened(os.open, readers_path(self.launch), flags, 0o600)) as file:
            file.write(json.dumps(describe(addresses)).encode())

    def remove(self) -> None:
        """Remove the directories, as far as they were made, and every shared-memory object of the launch.

        In any process but the owner, do nothing.
        """
        if forks.generation != self._generation:
            return
        self._is_removed = True
        for directory in self._directories:
            directory.unlock()  # first: to look into directories takes descriptors, of which there may be no more
        remove_launch(self.launch, [path for directory in self._directories for path in directory.paths()])


class _LockedDirectory:
    """One directory of a launch, with the lock that the launcher holds for life."""

    def __init__(self, path: str, launch: str, nonce: str) -> None:
        parent, name = os.path.split(path)
        self._path = path
        self._unfinished = f"{parent}/.{name}-{nonce}"  # until it is locked; nobody else has this name
        self._owner = f"{launch} {nonce}"
        self._inode: int | None = None
        self._locks: list[io.FileIO] = []  # the last one is that of the file that is there
        self._undisturbed: list[int] = []  # the directory itself, with a flock on it
        forks.register(self)

    def mend(self) -> str:
        """Make the directory, or its lock file, if it is not there; the path of what was not there, else nothing.

        Raises:
            OSError: it cannot be made, or somebody else's has its name.
        """
        if not self._is_there():
            self._make()
            return self._path
        lock = f"{self._path}/{LOCK_FILE}"
        try:
            if os.lstat(lock).st_ino == os.fstat(self._locks[-1].fileno()).st_ino:
                return ""
        except FileNotFoundError:
            pass
        made = self._new_lock(f"{lock}.new")
        os.rename(f"{lock}.new", lock)
        self._locks.append(made)
        return lock

    def _is_there(self) -> bool:
        try:
            return os.lstat(self._path).st_ino == self._inode
        except FileNotFoundError:
            return False

    def _make(self) -> None:
        """Make the directory under its unfinished name, lock and mark it, and give it its name."""
        shutil.rmtree(self._unfinished, ignore_errors=True)  # what an earlier attempt left
        os.mkdir(self._unfinished, 0o700)
        try:
            self._inode = os.stat(self._unfinished).st_ino
            lock = self._new_lock(f"{self._unfinished}/{LOCK_FILE}")
            os.rename(self._unfinished, self._path)
        except OSError:
            self._inode = None
            raise
        self._locks.append(lock)
        self._ask_not_to_be_cleaned()

    def _new_lock(self, path: str) -> io.FileIO:
        """A lock file that is locked and says whose it is."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        lock = io.FileIO(path, "x")  # closes itself, if Ctrl-C comes here
        fcntl.fcntl(lock, SETLK, lock_request(0, 0))
        lock.write(f"blendtorch launch {self._owner}, directory {self._inode}, boot {boot_id()}\n".encode())
        return lock

    def _ask_not_to_be_cleaned(self) -> None:
        """systemd-tmpfiles passes over a directory with somebody's flock on it. (And as long as it is open, no other directory
        can have its inode.)
        """
        with contextlib.suppress(OSError):  # no descriptor left, or not on this file system
            close_all(self._undisturbed)
            open_into(self._undisturbed, self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._undisturbed[0], fcntl.LOCK_SH | fcntl.LOCK_NB)

    def unlock(self) -> None:
        """Let go of the locks; in a forked child, of the copies alone."""
        for lock in self._locks:
            lock.close()
        close_all(self._undisturbed)

    def in_child(self) -> None:
        """A forked child closes its copy of the lock at once, or a dead parent would look alive."""
        self.unlock()

    def paths(self) -> list[str]:
        """Where the directory may be found. Somebody else's that has its name is not among them."""
        with contextlib.suppress(OSError):
            if self._is_there():
                return [self._unfinished, self._path]
        return [self._unfinished]

    def contents(self) -> list[str]:
        """The directory, and what is in it."""
        path = self.paths()[-1]
        return [path, *(f"{at}/{name}" for at, folders, files in os.walk(path) for name in (*folders, *files))]


def boot_id() -> str:
    """What names this kernel's current run: a lock says nothing about processes of another one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def is_abandoned(launch: str) -> bool:
    """Whether a launch has left its directory in this shared memory because its launcher, and so its instances, were killed."""
    try:
        with held(f"{streams_path(launch)}/{LOCK_FILE}", LOOK) as fd:
            return not is_locked(fd, 0, 0)
    except OSError:
        return False


def base_directories() -> list[str]:
    """Directories in which launches keep their logs, best first."""
    bases = [runtime] if (runtime := os.environ.get("XDG_RUNTIME_DIR")) else []
    with contextlib.suppress(FileNotFoundError):  # it has tried to write a file everywhere
        bases.append(tempfile.gettempdir())
    return [os.path.abspath(base) for base in [*bases, "/tmp"]]


def _base() -> str:
    """The first directory that can be written, and whose path is UTF-8: the path travels as JSON."""
    candidates = base_directories()
    for base in candidates:
        is_utf8 = base.encode(errors="replace").decode() == base
        if is_utf8 and os.path.isdir(base) and os.access(base, os.W_OK | os.X_OK):
            return base
    raise LaunchError(
        f"No directory for logs: {', '.join(candidates)} cannot be written (or the path is no UTF-8). "
        f"Set TMPDIR to a writable one."
    )


def remove_launch(launch: str, directories: Iterable[str]) -> None:
    """Remove what a launch has on this host: Blender's temporary directories, shared memory, its directories.

    A directory's lock file goes last: as long as anything else is left, it can be proved whose that is.
    """
    for directory in directories:
        for note in Path(directory).glob("instance-*.started"):
            remove_blenders_folder(str(note))
    for name in os.listdir(SHARED_MEMORY):
        if name.startswith(f"bt-{launch}-"):
            with contextlib.suppress(OSError):  # also another user's file, which only has such a name
                os.unlink(f"{SHARED_MEMORY}/{name}")
    for directory in directories:
        with contextlib.suppress(OSError):
            for name in os.listdir(directory):
                if name != LOCK_FILE:
                    _remove(f"{directory}/{name}")
        shutil.rmtree(directory, ignore_errors=True)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
