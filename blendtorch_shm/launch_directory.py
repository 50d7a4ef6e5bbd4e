"""The directory of one launch, and the removal of everything that a launch left on this host.

``{base}/blendtorch-{launch}/`` (mode 0700) holds the launcher's lock, sockets, lock files, and per instance a log, a
status and two one-line notes of the instance itself. `launch` is 8 random hexadecimal characters; they are also in the
name of every POSIX shared-memory object of the launch and, as :data:`LAUNCH_VARIABLE`, in the environment of every process
that it started, so one number finds all that there is to clear away.

Who is alive is the kernel's business: the launcher holds a byte-range lock for its life, and whoever can take it knows that the
launcher is dead. Such a lock belongs to a process, so a process cannot test its own: it remembers its launches instead. The
lock is also lost when the process closes *any* descriptor of the file, so nothing else may open it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
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
from typing import Literal, cast

from .errors import LaunchError

LAUNCH_VARIABLE = "BLENDTORCH_LAUNCH"
"""Environment variable that marks every process of a launch, grandchildren too."""
STATUS_VARIABLE = "BLENDTORCH_STATUS"
"""Environment variable with the path of an instance's file ``instance-XX.renderer``: one line about what it renders with."""

MAX_SOCKET_NAME = 32
"""Longest name of a socket, so that the path of its ``ipc://`` socket fits (see :data:`_LONGEST_BASE`)."""

_LOCK = "launcher.lock"
_NAME = re.compile(r"\.?blendtorch-([0-9a-f]{8})")
_SHARED_MEMORY = "/dev/shm"
_LONGEST_BASE = 107 - len("/blendtorch-01234567/") - MAX_SOCKET_NAME - len("-12345.sock")
"""sockaddr_un leaves 107 bytes for the path of a socket."""
_ABANDONED_S = 60.0
"""A directory without a lock file is being made or removed; after this long, whoever did that is gone."""

State = Literal["starting", "running", "exited"]

_mine: set[str] = set()
"""Launches of this process, and of its parents if it was forked."""


@dataclass(frozen=True)
class InstanceReport:
    """What is known about one instance, for whoever waits for it.

    Args:
        btid: number of the instance.
        state: ``starting`` until its script begins, then ``running``, at last ``exited``.
        exit_code: of the process once it exited, negative for a signal.
        log_tail: the last lines of its standard output and error.
        renderer: what it renders with, in its own words; empty until it told.
    """

    btid: int
    state: State
    exit_code: int | None
    log_tail: str
    renderer: str


class LaunchDirectory:
    """The directory of a launch that this process owns. Make it with :meth:`create`."""

    def __init__(self, path: str, launch: str, lock_fd: int) -> None:
        self.path = path
        self.launch = launch
        self._lock_fd = lock_fd
        self._pid = os.getpid()

    @classmethod
    def create(cls) -> LaunchDirectory:
        """A new directory with its lock held from the first moment that others can see it.

        Raises:
            LaunchError: no directory can be made, for example on a full disk.
        """
        base = _base()
        while True:
            launch = secrets.token_hex(4)
            making, path = f"{base}/.blendtorch-{launch}", f"{base}/blendtorch-{launch}"
            _mine.add(launch)
            try:
                os.mkdir(making, 0o700)
                lock_fd = os.open(f"{making}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.rename(making, path)
                except BaseException:
                    os.close(lock_fd)
                    raise
            except (FileExistsError, FileNotFoundError, BlockingIOError) as error:
                _mine.discard(launch)  # the name exists, or a sweep caught the directory unlocked
                if not os.path.isdir(base):
                    raise LaunchError(f"The directory {base} for sockets and logs went away.") from error
            except OSError as error:
                _mine.discard(launch)
                shutil.rmtree(making, ignore_errors=True)
                raise LaunchError(
                    f"Cannot make a directory for sockets and logs in {base}: {error.strerror}. "
                    f"Make room there, or set XDG_RUNTIME_DIR or TMPDIR to another directory."
                ) from error
            else:
                return cls(path, launch, lock_fd)

    def remove(self) -> None:
        """Remove the directory and every shared-memory object of the launch. In any process but the owner, do nothing."""
        if self._lock_fd < 0 or os.getpid() != self._pid:
            return
        _remove(self.path, self.launch)
        os.close(self._lock_fd)
        self._lock_fd = -1
        _mine.discard(self.launch)


def sweep() -> list[str]:
    """Clear away what this user's dead launches left: processes, directories, shared memory.

    Returns:
        the launches that were removed.
    """
    removed = []
    for base in {os.path.realpath(b) for b in _candidates()}:
        with contextlib.suppress(OSError), os.scandir(base) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match and match[1] not in _mine and _sweep_one(entry.path, match[1]):
                    removed.append(match[1])
    return removed


def processes_of(launch: str) -> list[int]:
    """Process ids of all living processes of a launch, whatever session, group or parent they gave themselves."""
    mark = f"{LAUNCH_VARIABLE}={launch}".encode()
    pids = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    pids.append(int(name))
    return pids


def log_path(directory: str, btid: int) -> str:
    """Where the instance's standard output and error go."""
    return f"{directory}/instance-{btid:02d}.log"


def started_path(directory: str, btid: int) -> str:
    """The file that the instance makes when its script begins; it holds Blender's own temporary directory, if any."""
    return f"{directory}/instance-{btid:02d}.started"


def renderer_path(directory: str, btid: int) -> str:
    """The file in which the instance says what it renders with."""
    return f"{directory}/instance-{btid:02d}.renderer"


def write_status(directory: str, btid: int, pid: int, state: State, exit_code: int | None) -> None:
    """Replace the status of an instance, atomically: a reader sees the old or the new one."""
    path = f"{directory}/instance-{btid:02d}.json"
    Path(f"{path}.new").write_text(json.dumps({"btid": btid, "pid": pid, "state": state, "exit_code": exit_code}))
    os.replace(f"{path}.new", path)


def instance_reports(directory: str) -> list[InstanceReport]:
    """What the launch knows about its instances, in the order of their numbers; empty once the launch is over."""
    reports = []
    for path in Path(directory).glob("instance-*.json"):
        try:
            status = json.loads(path.read_text())
            btid, state, exit_code = int(status["btid"]), cast(State, status["state"]), status["exit_code"]
        except (OSError, ValueError, KeyError, TypeError):  # removed meanwhile, or not ours
            continue
        reports.append(
            InstanceReport(btid, state, exit_code, log_tail(directory, btid), read_note(renderer_path(directory, btid)))
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
    """The first directory that can be written and whose path is short enough for a socket's."""
    tried = []
    for base in (os.path.abspath(b) for b in _candidates()):
        if not (os.path.isdir(base) and os.access(base, os.W_OK | os.X_OK)):
            tried.append(f"{base} cannot be written")
        elif len(os.fsencode(base)) > _LONGEST_BASE:
            tried.append(f"{base} is longer than {_LONGEST_BASE} bytes, too long for the path of a socket")
        else:
            return base
    raise LaunchError(f"No directory for sockets and logs: {'; '.join(tried)}. Set TMPDIR to a short, writable path.")


def _sweep_one(path: str, launch: str) -> bool:
    """Remove the directory if it is this user's and nobody holds its lock."""
    try:
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        lock_fd = os.open(f"{path}/{_LOCK}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        if time.time() - status.st_mtime < _ABANDONED_S:
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


def _remove(path: str, launch: str) -> None:
    for note in Path(path).glob("instance-*.started"):
        scratch = read_note(str(note)).rstrip("/")
        if os.path.basename(scratch).startswith("blender_"):  # Blender leaves it behind when it is terminated
            shutil.rmtree(scratch, ignore_errors=True)
    for name in os.listdir(_SHARED_MEMORY):
        if name.startswith((f"bt-{launch}", f"sem.bt-{launch}")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{_SHARED_MEMORY}/{name}")
    shutil.rmtree(path, ignore_errors=True)
