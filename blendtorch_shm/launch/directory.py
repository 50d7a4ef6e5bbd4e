"""The directories of one launch, and the removal of everything that a launch left on this host.

``{base}/blendtorch-{launch}/`` (mode 0700) holds per instance a log, a status and two one-line notes of the instance itself.
``/dev/shm/blendtorch-{launch}/`` (mode 0700) holds what the two ends of a stream meet at, lock files and pipes: who
sees the rings, in another container perhaps, must see these too, and the beacon proves that one does. `launch` is 8 random
hexadecimal characters; they are also in the name of every POSIX shared-memory object of the launch and, as
:data:`LAUNCH_VARIABLE`, in the environment of every process that it started, so one number finds all that there is to
clear away.

Who is alive is the kernel's business: the launcher holds a byte-range lock in each directory for its life, and whoever can
take one knows that the launcher is dead. Such a lock belongs to a process, so a process cannot test its own: it remembers its
launches instead. The lock is also lost when the process closes *any* descriptor of the file, so nothing else may open it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from ..errors import LaunchError
from .address import SHARED_MEMORY, Twin, beacon_path, streams_path

LAUNCH_VARIABLE = "BLENDTORCH_LAUNCH"
"""Environment variable that marks every process of a launch, grandchildren too."""
STATUS_VARIABLE = "BLENDTORCH_STATUS"
"""Environment variable with the path of an instance's file ``instance-XX.renderer``: one line about what it renders with."""
RECYCLE_VARIABLE = "BLENDTORCH_RECYCLE_AFTER"
"""Environment variable with the number of messages after which an instance is to end, to be started afresh; 0: none."""
RESTARTS_VARIABLE = "BLENDTORCH_RESTARTS"
"""Environment variable that says how often an instance was started again."""

_LOCK = "launcher.lock"
_NAME = re.compile(r"\.?blendtorch-([0-9a-f]{8})")
_ABANDONED_S = 60.0
"""A directory under its unfinished name, or without a lock file, is being made or removed: for no longer than this."""

_ROOM_NBYTES = 2**16
"""For logs, at least, there must be in the directory of a launch that begins."""

State = Literal["starting", "running", "restarting", "exited"]

_mine: set[str] = set()
"""Launches of this process, and of its parents if it was forked."""


@dataclass(frozen=True)
class InstanceReport:
    """What is known about one instance, for whoever waits for it.

    Args:
        btid: number of the instance.
        state: ``starting`` until its script begins, then ``running``; ``restarting`` between its end and a new start; at last
            ``exited``.
        exit_code: of the process that exited last, negative for a signal.
        log_tail: the last lines of its standard output and error.
        renderer: what it renders with, in its own words; empty until it told.
        pid: of its process.
        restarts: how often it was started again.
    """

    btid: int
    state: State
    exit_code: int | None
    log_tail: str
    renderer: str
    pid: int
    restarts: int

    def is_stopped(self) -> bool:
        """Whether its process is stopped, by SIGSTOP or a debugger, so that nothing happens in it."""
        return self.state in ("starting", "running") and is_stopped(self.pid)


class LaunchDirectory:
    """The directories of a launch that this process owns: named here, made by :meth:`create`.

    Who is to remove them can be told before there is anything, so that a signal's exception finds it told wherever it hits.

    Attributes:
        path: of logs and states.
        streams: path of locks and bells.
        launch: identifier of the launch.

    Raises:
        LaunchError: no directory for logs can be written.
    """

    def __init__(self) -> None:
        base = _base()
        self._nonce = secrets.token_hex(16)
        self._pid = os.getpid()
        self._directories: list[str] = []
        """Those made, and perhaps the one that is being made."""
        self._lock_fds: list[int] = []
        while True:
            self.launch = secrets.token_hex(4)
            self.path, self.streams = f"{base}/blendtorch-{self.launch}", streams_path(self.launch)
            if not os.path.lexists(self.path) and not os.path.lexists(self.streams):
                break

    def create(self) -> LaunchDirectory:
        """Make the directories, with their locks held from the first moment that others can see them.

        Returns:
            itself.

        Raises:
            LaunchError: a directory cannot be made, for example on a full disk. Nothing of it is left then.
        """
        _mine.add(self.launch)
        try:
            both = os.path.realpath(self.streams), os.path.realpath(self.path)
            for directory in dict.fromkeys(both):  # they may be the same
                self._directories.append(directory)
                self._lock_fds.append(_make_locked(directory))
            Path(beacon_path(self.launch)).write_text(self._nonce)
            room = Path(self.path, "room")
            room.write_bytes(bytes(_ROOM_NBYTES))  # to try is the only way to know: there are quotas, too
            room.unlink()
        except BaseException as error:
            self.remove()
            if isinstance(error, OSError):
                raise LaunchError(
                    f"Cannot make directories for the launch in {SHARED_MEMORY} and {os.path.dirname(self.path)}: {error}. "
                    f"Make room there, or set XDG_RUNTIME_DIR or TMPDIR to another directory for the logs."
                ) from error
            raise
        return self

    def twin(self, name: str, btid: int) -> Twin:
        """Where the socket `name` of instance `btid` lives."""
        return Twin(self.path, self.launch, self._nonce, name, btid)

    def remove(self) -> None:
        """Remove the directories, as far as they were made, and every shared-memory object of the launch.

        In any process but the owner, do nothing.
        """
        if self.launch not in _mine or os.getpid() != self._pid:
            return
        while self._lock_fds:  # first: to look into directories takes descriptors, of which there may be no more
            os.close(self._lock_fds.pop())
        _remove(self.path, self.launch)
        for directory in self._directories:
            shutil.rmtree(_unfinished(directory), ignore_errors=True)
            shutil.rmtree(directory, ignore_errors=True)
        _mine.discard(self.launch)


def _unfinished(path: str) -> str:
    """The name of the directory `path` until it is locked."""
    parent, name = os.path.split(path)
    return f"{parent}/.{name}"


def _make_locked(path: str) -> int:
    """Make the directory `path`, and hold its lock from the first moment that others can see it."""
    os.mkdir(_unfinished(path), 0o700)
    lock_fd = os.open(f"{_unfinished(path)}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(_unfinished(path), path)
    except BaseException:
        os.close(lock_fd)
        raise
    return lock_fd


def sweep() -> list[str]:
    """Clear away what this user's dead launches left: processes, directories, shared memory.

    Returns:
        the launches that were removed.
    """
    removed: dict[str, None] = {}
    for base in {os.path.realpath(b) for b in [*_candidates(), SHARED_MEMORY]}:
        with contextlib.suppress(OSError), os.scandir(base) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match and match[1] not in _mine and _sweep_one(entry.path, match[1]):
                    removed[match[1]] = None
    return list(removed)


def processes_of(launch: str, status_path: str | None = None) -> list[int]:
    """Process ids of all living processes of a launch, whatever session, group or parent they gave themselves.

    Args:
        launch: identifier of the launch.
        status_path: only those of the instance that was given this path (see :data:`STATUS_VARIABLE`).
    """
    marks = {f"{LAUNCH_VARIABLE}={launch}".encode()}
    if status_path is not None:
        marks.add(f"{STATUS_VARIABLE}={status_path}".encode())
    pids = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if marks.issubset(file.read().split(b"\0")):
                    pids.append(int(name))
    return pids


def is_stopped(pid: int) -> bool:
    """Whether the process is one that SIGSTOP, or a debugger, has stopped."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "Tt"


def log_path(directory: str, btid: int) -> str:
    """Where the instance's standard output and error go."""
    return f"{directory}/instance-{btid:02d}.log"


def started_path(directory: str, btid: int) -> str:
    """The file that the instance makes when its script begins; it holds Blender's own temporary directory, if any."""
    return f"{directory}/instance-{btid:02d}.started"


def renderer_path(directory: str, btid: int) -> str:
    """The file in which the instance says what it renders with."""
    return f"{directory}/instance-{btid:02d}.renderer"


def recycled_path(directory: str, btid: int) -> str:
    """The file that an instance makes when it ends because of :data:`RECYCLE_VARIABLE`."""
    return f"{directory}/instance-{btid:02d}.recycled"


def forget_run(directory: str, btid: int) -> None:
    """Remove the notes of an instance that has ended, and what its Blender left, so that it can be started again."""
    _remove_scratch(started_path(directory, btid))
    for note in (started_path, renderer_path, recycled_path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(note(directory, btid))


class _Status(msgspec.Struct):
    """What ``instance-XX.json`` holds."""

    btid: int
    pid: int
    state: State
    exit_code: int | None
    restarts: int


_decode_status = msgspec.json.Decoder(_Status).decode


def write_status(
    directory: str, btid: int, pid: int, state: State, exit_code: int | None, *, restarts: int = 0
) -> None:
    """Replace the status of an instance, atomically: a reader sees the old or the new one."""
    path = f"{directory}/instance-{btid:02d}.json"
    Path(f"{path}.new").write_bytes(msgspec.json.encode(_Status(btid, pid, state, exit_code, restarts)))
    os.replace(f"{path}.new", path)


def instance_reports(directory: str) -> list[InstanceReport]:
    """What the launch knows about its instances, in the order of their numbers; empty once the launch is over."""
    reports = []
    for path in Path(directory).glob("instance-*.json"):
        try:
            status = _decode_status(path.read_bytes())
        except (OSError, ValueError, msgspec.MsgspecError, RecursionError):  # removed meanwhile, or not ours
            continue
        btid, renderer = status.btid, read_note(renderer_path(directory, status.btid))
        reports.append(
            InstanceReport(
                btid, status.state, status.exit_code, log_tail(directory, btid), renderer, status.pid, status.restarts
            )
        )
    return sorted(reports, key=lambda report: report.btid)


def log_tail(directory: str, btid: int, lines: int = 20, nbytes: int = 8192) -> str:
    """The last lines of an instance's log."""
    try:
        with open(log_path(directory, btid), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - nbytes))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def read_note(path: str) -> str:
    """The text of a one-line file, empty if there is none (yet)."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _candidates() -> list[str]:
    """Directories in which launches live, best first."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return [*([runtime] if runtime else []), tempfile.gettempdir(), "/tmp"]


def _base() -> str:
    """The first directory that can be written."""
    candidates = [os.path.abspath(base) for base in _candidates()]
    for base in candidates:
        if os.path.isdir(base) and os.access(base, os.W_OK | os.X_OK):
            return base
    raise LaunchError(
        f"No directory for logs: {', '.join(candidates)} cannot be written. Set TMPDIR to a writable one."
    )


def _sweep_one(path: str, launch: str) -> bool:
    """Remove the directory if it is this user's and nobody holds its lock."""
    try:
        status = os.lstat(path)
    except OSError:
        return False  # removed meanwhile
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return False
    is_young = time.time() - status.st_mtime < _ABANDONED_S
    if os.path.basename(path).startswith(".") and is_young:
        return False
    try:
        lock_fd = os.open(f"{path}/{_LOCK}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        if is_young:
            return False
        _remove(path, launch)
        return True
    except OSError:
        return False
    try:
        fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        deadline = time.monotonic() + 5.0
        while (pids := processes_of(launch)) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        _remove(path, launch)
        return True
    except OSError:
        return False  # alive, or another sweep is at it
    finally:
        os.close(lock_fd)


def _remove_scratch(started_note: str) -> None:
    """Remove the temporary directory that a Blender leaves behind when it is terminated."""
    scratch = read_note(started_note).rstrip("/")
    if os.path.basename(scratch).startswith("blender_"):
        shutil.rmtree(scratch, ignore_errors=True)


def _remove(path: str, launch: str) -> None:
    """Remove one directory of a launch, and what the launch has elsewhere: shared memory, Blender's temporary directories."""
    for note in Path(path).glob("instance-*.started"):
        _remove_scratch(str(note))
    for name in os.listdir(SHARED_MEMORY):
        if name.startswith(f"bt-{launch}"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{SHARED_MEMORY}/{name}")
    shutil.rmtree(path, ignore_errors=True)
