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
from collections.abc import Iterable
from pathlib import Path

from ..errors import LaunchError
from ..memory.locks import SETLK, is_locked, lock_request
from ..process import forks
from .address import SHARED_MEMORY, Address, Twin, beacon_path, describe, readers_path, streams_path
from .notes import remove_blenders_folder

LOCK_FILE = "launcher.lock"
MARKER = re.compile(
    r"blendtorch launch (?P<launch>[0-9a-f]{8}) (?P<nonce>[0-9a-f]{32}), directory (?P<inode>[0-9]+), boot (?P<boot>\S+)\n"
)
"""What the lock file says. Only the directory with this inode is the launch's: a copy has another one."""

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
        self._pid = os.getpid()
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
                directory.create()
            Path(beacon_path(self.launch)).write_text(self._nonce)
            room = Path(self.path, "room")
            room.write_bytes(bytes(_ROOM_NBYTES))  # to try is the only way to know: there are quotas, too
            room.unlink()
        except OSError as error:
            self.remove()
            raise LaunchError(
                f"Cannot make directories for the launch in {SHARED_MEMORY} and {os.path.dirname(self.path)}: {error}. "
                f"Make room there, or set XDG_RUNTIME_DIR or TMPDIR to another directory for the logs."
            ) from error
        return self

    def twin(self, name: str, btid: int) -> Twin:
        """Where the socket `name` of instance `btid` lives."""
        return Twin(self.path, self.launch, self._nonce, name, btid)

    def tell_readers(self, addresses: Iterable[Address]) -> None:
        """Say how to read from these, for readers of this user who were told an endpoint alone (see :func:`.address.find`)."""
        fd = os.open(readers_path(self.launch), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(describe(addresses), file)

    def remove(self) -> None:
        """Remove the directories, as far as they were made, and every shared-memory object of the launch.

        In any process but the owner, do nothing.
        """
        if os.getpid() != self._pid:
            return
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
        self._lock: io.FileIO | None = None
        forks.register(self)

    def create(self) -> None:
        """Make the directory under its unfinished name, lock and mark it, and give it its name."""
        os.mkdir(self._unfinished, 0o700)
        self._inode = os.stat(self._unfinished).st_ino
        self._lock = io.FileIO(f"{self._unfinished}/{LOCK_FILE}", "x")  # closes itself, if Ctrl-C comes here
        fcntl.fcntl(self._lock, SETLK, lock_request(0, 0))
        self._lock.write(f"blendtorch launch {self._owner}, directory {self._inode}, boot {boot_id()}\n".encode())
        os.rename(self._unfinished, self._path)

    def unlock(self) -> None:
        """Let go of the lock; in a forked child, of the copy alone."""
        if self._lock is not None:
            self._lock.close()

    def in_child(self) -> None:
        """A forked child closes its copy of the lock at once, or a dead parent would look alive."""
        self.unlock()

    def paths(self) -> list[str]:
        """Where the directory may be found. Somebody else's that has its name is not among them."""
        try:
            is_ours = os.lstat(self._path).st_ino == self._inode
        except OSError:
            is_ours = False
        return [self._unfinished, self._path] if is_ours else [self._unfinished]


def boot_id() -> str:
    """What names this kernel's current run: a lock says nothing about processes of another one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def is_abandoned(launch: str) -> bool:
    """Whether a launch has left its directory in this shared memory because its launcher, and so its instances, were killed."""
    try:
        fd = os.open(f"{streams_path(launch)}/{LOCK_FILE}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not is_locked(fd, 0, 0)
    except OSError:
        return False
    finally:
        os.close(fd)


def base_directories() -> list[str]:
    """Directories in which launches keep their logs, best first."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return [os.path.abspath(base) for base in [*([runtime] if runtime else []), tempfile.gettempdir(), "/tmp"]]


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
