"""What dead launches left on this host, and its removal: processes, shared memory, directories.

A folder is removed only if it proves to be ours and its launcher proves to be dead. Both proofs are its lock file
(:mod:`.directory`): it says that it belongs to this very directory of this launch, and nobody holds its lock. A launch has two
directories, and one lock that is held means that it lives. A lock that is missing proves nothing. What is in doubt stays, and
the caller is told why:

=====================================================================  ========================================================
a folder of that name without our lock file, or with another's         stays; not mentioned unless its mode is 0700
a folder of another user, a link, a file                               stays; not mentioned: it is not ours
a launch whose lock file was removed                                   its other directory's lock decides; this directory stays
a copy or a backup of a launch's directory                             stays: the lock file names another directory
a launch that is just being made, or removed                           stays; mentioned after :data:`_UNFINISHED_S` seconds
a launch on another host, or from before this host was restarted       stays: its lock says nothing about a process there
a launch of an older version, which marked nothing                     stays; not mentioned while it lives
a launch in another container                                          the lock tells, wherever the file can be seen
the launch that this process belongs to                                stays: removing it would kill this process
=====================================================================  ========================================================

A sweep takes no lock, so it disturbs nobody who is just making one, and any number of sweeps may run at once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import stat
import time
from dataclasses import dataclass, field
from enum import Enum

from ..memory.locks import is_locked
from ..process.descriptors import held
from .address import SHARED_MEMORY
from .directory import LOCK_FILE, LOOK, MARKER, base_directories, boot_id, remove_launch
from .notes import INSTANCE_VARIABLE, LAUNCH_VARIABLE

log = logging.getLogger("blendtorch.launch")

_NAME = re.compile(r"blendtorch-([0-9a-f]{8})|\.blendtorch-([0-9a-f]{8})(?:-[0-9a-f]{32})?")
"""Of a launch's directories, and of unfinished ones; those of older versions have no nonce."""
_UNFINISHED_S = 60.0
"""A directory without a marker is being made or removed: for no longer than this."""
_KILL_S = 5.0
"""How long killed processes may take to be gone."""


@dataclass(frozen=True)
class Swept:
    """What :func:`sweep` did.

    Args:
        removed: the launches that were removed.
        left: path -> why it was left, for what may be, but is not proven to be, of a dead launch.
    """

    removed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def sweep() -> Swept:
    """Clear away what this user's dead launches left on this host.

    Example:
        >>> sweep().removed
        ['7d6e622c']
    """
    swept = Swept()
    for launch, paths in sorted(_find().items()):
        found = {path: _examine(path, launch) for path in paths}
        if any(verdict is _Verdict.ALIVE for verdict, _ in found.values()):
            continue
        swept.left.update({path: why for path, (verdict, why) in found.items() if verdict is _Verdict.DOUBTFUL})
        dead = [path for path, (verdict, _) in found.items() if verdict is _Verdict.DEAD]
        if not dead:
            continue
        if os.environ.get(LAUNCH_VARIABLE) == launch:
            swept.left.update(dict.fromkeys(dead, "its launcher is dead, but this process belongs to the launch"))
            continue
        _kill_processes(launch)
        remove_launch(launch, dead)
        still_there = [path for path in dead if os.path.lexists(path)]
        swept.left.update(dict.fromkeys(still_there, "its launcher is dead, but it cannot be removed"))
        swept.removed.append(launch)
    return swept


def sweep_and_warn() -> None:
    """Do as :func:`sweep` does, and log what was left, once per process."""
    for path, why in sweep().left.items():
        _warn(path, why)


@functools.cache
def _warn(path: str, why: str) -> None:
    log.warning("%s may be what a dead launch left, and stays: %s. Remove it if you do not need it.", path, why)


def processes_of(launch: str, instance: str | None = None) -> list[int]:
    """Process ids of all living processes of a launch, whatever session, group or parent they gave themselves.

    Args:
        launch: identifier of the launch.
        instance: only those of the instance that was given this path (see ``notes.INSTANCE_VARIABLE``).
    """
    marks = _marks(launch, instance)
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _has(marks, int(name))]


def send(number: int, pid: int, launch: str, instance: str | None = None) -> None:
    """Send a signal to a process that :func:`processes_of` found, unless its process id is another's by now."""
    fd = -1
    with contextlib.suppress(OSError):  # a kernel without them, or no descriptor left
        fd = os.pidfd_open(pid)
    try:
        if _has(_marks(launch, instance), pid):  # so `fd` is that process
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if fd >= 0:
                    signal.pidfd_send_signal(fd, number)
                else:
                    os.kill(pid, number)
    finally:
        if fd >= 0:
            os.close(fd)


def _marks(launch: str, instance: str | None) -> set[bytes]:
    marks = {f"{LAUNCH_VARIABLE}={launch}".encode()}
    if instance is not None:
        marks.add(f"{INSTANCE_VARIABLE}={instance}".encode())
    return marks


def _has(marks: set[bytes], pid: int) -> bool:
    """Whether a process has these variables in its environment."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return marks.issubset(file.read().split(b"\0"))
    return False


def _kill_processes(launch: str) -> None:
    """Kill every process of a launch, and wait until they are gone."""
    deadline = time.monotonic() + _KILL_S
    while (pids := processes_of(launch)) and time.monotonic() < deadline:
        for pid in pids:
            send(signal.SIGKILL, pid, launch)
        time.sleep(0.01)


def _find() -> dict[str, list[str]]:
    """What is called like a launch's directory, wherever they are made: launch -> paths."""
    found: dict[str, list[str]] = {}
    for base in sorted({os.path.realpath(base) for base in [*base_directories(), SHARED_MEMORY]}):
        with contextlib.suppress(OSError):
            for name in os.listdir(base):
                if match := _NAME.fullmatch(name):
                    found.setdefault(match[1] or match[2], []).append(f"{base}/{name}")
    return found


class _Verdict(Enum):
    """What can be said about a folder that is called like a launch's directory."""

    NOT_OURS = "somebody else's, or so young that it may be in the making"
    ALIVE = "its lock is held"
    DEAD = "ours, and its lock is free"
    DOUBTFUL = "perhaps ours"


def _examine(path: str, launch: str) -> tuple[_Verdict, str]:
    """What a folder is, and why there is doubt."""
    try:
        folder = os.lstat(path)
    except OSError:
        return _Verdict.NOT_OURS, ""  # removed meanwhile
    if not stat.S_ISDIR(folder.st_mode) or folder.st_uid != os.geteuid():
        return _Verdict.NOT_OURS, ""
    is_private = folder.st_mode & 0o777 == 0o700
    is_young = time.time() - folder.st_mtime < _UNFINISHED_S
    try:
        with held(f"{path}/{LOCK_FILE}", LOOK) as fd:
            try:
                # First: who wrote it had the lock before.
                marker = MARKER.fullmatch(os.read(fd, 1024).decode(errors="replace"))
                if is_locked(fd, 0, 0):
                    return _Verdict.ALIVE, ""
            except OSError as error:
                why = f"its {LOCK_FILE} is not a file whose lock can be looked at ({error.strerror})"
                return _Verdict.DOUBTFUL, why
    except FileNotFoundError:
        if is_young or not is_private:
            return _Verdict.NOT_OURS, ""
        return _Verdict.DOUBTFUL, f"it has no {LOCK_FILE}"
    except OSError as error:
        return _Verdict.DOUBTFUL, f"its {LOCK_FILE} cannot be opened ({error.strerror})"
    if marker is None:
        if is_young:
            return _Verdict.NOT_OURS, ""
        return (
            _Verdict.DOUBTFUL,
            f"its {LOCK_FILE} does not say whose it is (older versions of blendtorch-shm wrote nothing)",
        )
    if not is_private:
        return _Verdict.DOUBTFUL, f"its mode is {folder.st_mode & 0o777:o}, and that of a launch's directory 700"
    if marker["launch"] != launch or int(marker["inode"]) != folder.st_ino:
        return _Verdict.DOUBTFUL, "it is a copy of the directory that the launch made"
    if marker["boot"] != boot_id():
        return _Verdict.DOUBTFUL, "it was made on another host, or before this one was restarted"
    return _Verdict.DEAD, ""
