"""What a launcher and its instances tell each other: environment variables, and small files in the launch directory.

All files of one instance begin with the same path, ``{directory}/instance-00``. The instance finds it in the environment variable
:data:`INSTANCE_VARIABLE`. The launcher writes the status (``.json``), and the instance's output goes to the log (``.log``). The
instance leaves a note when something is wrong with the scene (``.warnings``), when its script begins (``.started``), when it
knows what it renders with (``.renderer``), when it ends to be started afresh (``.recycled``) and when an exception ends it
(``.error``).

Standard library only: every instance imports this before its script runs, also one whose script imports nothing else of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

LAUNCH_VARIABLE = "BLENDTORCH_LAUNCH"
"""Environment variable that marks every process of a launch, grandchildren too."""
INSTANCE_VARIABLE = "BLENDTORCH_INSTANCE"
"""Environment variable with the path, without its ending, of an instance's files."""
RECYCLE_VARIABLE = "BLENDTORCH_RECYCLE_AFTER"
"""Environment variable with the number of messages after which an instance is to end, to be started afresh; 0: none."""
PATH_VARIABLE = "BLENDTORCH_PYTHONPATH"
"""Environment variable with the PYTHONPATH for the script in a Blender executable, whose own modules it is not to replace."""
RESTARTS_VARIABLE = "BLENDTORCH_RESTARTS"
"""Environment variable that says how often an instance was started again."""

InstanceState = Literal["starting", "running", "restarting", "exited"]
Note = Literal["started", "renderer", "recycled", "warnings", "error"]
"""What an instance can tell its launcher. ``started`` holds the path of Blender's own temporary directory, if there is one;
``warnings``, which comes before it, what is wrong with the scene, one line each; ``error`` the exception that ended the script,
and where in it that was raised.
"""

_MENDED_S = 2.0
"""How long a launcher may take to make its directory anew."""
_BLENDERS_FOLDER = re.compile(r"blender_[A-Za-z0-9]{6}")
"""What Blender calls the temporary directory that it makes for itself."""

SOFTWARE_WARNING = (
    "this is SOFTWARE rendering, on the processor, many times slower than a graphics card. If this machine has one, its driver "
    "is not in use: look at the driver, at the container's access to the card (--gpus all), at DISPLAY and LIBGL_ALWAYS_SOFTWARE."
)
"""Said once by the launcher, or by an instance that has none."""
_SOFTWARE_RENDERERS = ("llvmpipe", "softpipe", "swrast", "software")
NOISE = re.compile(r"EGL Error \(0x3009\): EGL_BAD_MATCH|libEGL warning: ")
"""Lines that are no reason for anything: Blender tries one kind of OpenGL context after the other, until one fits."""


def is_software(renderer: str) -> bool:
    """Whether what an instance renders with, in its own words, draws on the processor."""
    return any(word in renderer.lower() for word in _SOFTWARE_RENDERERS)


# -- in the instance ------------------------------------------------------------------------------------------------


def leave_note(note: Note, text: str) -> bool:
    """Leave a note for the launcher of this process.

    Args:
        note: which.
        text: what it says.

    Returns:
        False if this process has no launcher.

    Raises:
        OSError: the note cannot be written: the launch is over, or its disk is full.
    """
    instance = os.environ.get(INSTANCE_VARIABLE)
    if not instance:
        return False
    deadline = time.monotonic() + _MENDED_S
    while True:
        try:
            Path(f"{instance}.{note}").write_text(text, encoding="utf-8", errors="replace")
            return True
        except FileNotFoundError:  # somebody has removed the directory; the launcher makes it anew
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


# -- in the launcher, and in whoever waits for an instance ----------------------------------------------------------


@dataclass(frozen=True)
class _Status:
    """What ``instance-XX.json`` holds."""

    btid: int
    pid: int
    state: InstanceState
    exit_code: int | None
    restarts: int
    kept_log: str
    lost: Sequence[str] = ()


@dataclass(frozen=True)
class InstanceReport(_Status):
    """What is known about one instance, for whoever waits for it.

    Args:
        btid: number of the instance.
        state: ``starting`` until its script begins, then ``running``; ``restarting`` between its end and a new start; at last
            ``exited``.
        exit_code: of the process that exited last, negative for a signal.
        log_tail: the last lines of its standard output and error.
        renderer: what it renders with, in its own words; empty until it told.
        error: the exception that ended its script, and where that was raised; empty if none did.
        pid: of its process.
        restarts: how often it was started again.
        kept_log: where its log lies when the launch is over; empty as long as it has not failed.
        lost: sockets that it publishes on, and whose files somebody has removed, so that nobody can begin to read them until it
            is started again.
    """

    log_tail: str = ""
    renderer: str = ""
    error: str = ""

    def is_stopped(self) -> bool:
        """Whether its process is stopped, by SIGSTOP or a debugger, so that nothing happens in it."""
        return self.state in ("starting", "running") and is_stopped(self.pid)


def instance_path(directory: str, btid: int) -> str:
    """The path of an instance's files, without their endings."""
    return f"{directory}/instance-{btid:02d}"


def log_path(directory: str, btid: int) -> str:
    """The file that holds the instance's standard output and error."""
    return f"{instance_path(directory, btid)}.log"


def previous_log_path(path: str) -> str:
    """The file beside a log that holds what was moved out of it when it was too long."""
    return f"{path}.1"


def note_path(directory: str, btid: int, note: Note) -> str:
    """The file that holds a note of the instance."""
    return f"{instance_path(directory, btid)}.{note}"


def read_note(directory: str, btid: int, note: Note) -> str:
    """The text of a note of the instance, empty if there is none (yet)."""
    return _text(note_path(directory, btid, note))


def restore_note(directory: str, btid: int, note: Note, text: str) -> None:
    """Write a note again that somebody has removed."""
    with contextlib.suppress(FileExistsError), open(note_path(directory, btid, note), "x", encoding="utf-8") as file:
        file.write(text)


def has_note(directory: str, btid: int, note: Note) -> bool:
    """Whether the instance has left the note."""
    return os.path.exists(note_path(directory, btid, note))


def clear_notes(directory: str, btid: int) -> None:
    """Remove the notes of an instance that has ended, and the temporary directory of its Blender, before it is started again."""
    remove_blenders_folder(note_path(directory, btid, "started"))
    for note in get_args(Note):
        with contextlib.suppress(OSError):  # it, or its directory, is not there
            os.unlink(note_path(directory, btid, note))


def remove_blenders_folder(started_note: str) -> None:
    """Remove the temporary directory that a Blender leaves behind when it is killed; the path of the note tells which.

    Blender names the user's own temporary directory if it could not make one for itself: that one stays.
    """
    folder = _text(started_note).rstrip("/")
    if not _BLENDERS_FOLDER.fullmatch(os.path.basename(folder)):
        return
    with contextlib.suppress(OSError):
        status = os.lstat(folder)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and status.st_mode & 0o777 == 0o700:
            shutil.rmtree(folder, ignore_errors=True)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _read_status(path: Path) -> _Status | None:
    """The status in a file; None if the file was removed meanwhile, or is not one of ours."""
    try:
        status = _Status(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    numbers = [status.btid, status.pid, status.restarts, 0 if status.exit_code is None else status.exit_code]
    fits = all(type(number) is int for number in numbers) and status.state in get_args(InstanceState)
    fits = fits and type(status.kept_log) is str and isinstance(status.lost, (list, tuple))
    fits = fits and all(type(name) is str for name in status.lost)
    return status if fits else None


def write_status(
    directory: str,
    btid: int,
    pid: int,
    state: InstanceState,
    exit_code: int | None,
    *,
    restarts: int = 0,
    kept_log: str = "",
    lost: Sequence[str] = (),
) -> None:
    """Replace the status of an instance, atomically: a reader sees the old or the new one."""
    path = f"{instance_path(directory, btid)}.json"
    Path(f"{path}.new").write_text(
        json.dumps(asdict(_Status(btid, pid, state, exit_code, restarts, kept_log, list(lost))))
    )
    os.replace(f"{path}.new", path)


def has_status(directory: str, btid: int) -> bool:
    """Whether the status of an instance is there."""
    return os.path.exists(f"{instance_path(directory, btid)}.json")


def instance_reports(directory: str) -> list[InstanceReport]:
    """What the launch knows about its instances, in the order of their numbers; empty once the launch is over."""
    statuses = [status for path in Path(directory).glob("instance-*.json") if (status := _read_status(path))]
    return [
        InstanceReport(
            **vars(status),
            log_tail=log_tail(directory, status.btid),
            renderer=read_note(directory, status.btid, "renderer"),
            error=read_note(directory, status.btid, "error"),
        )
        for status in sorted(statuses, key=lambda status: status.btid)
    ]


def log_tail(directory: str, btid: int, lines: int = 20, nbytes: int = 8192) -> str:
    """The last lines of an instance's log, without those that mean nothing (:data:`NOISE`)."""
    text = read_log(directory, btid, nbytes).decode("utf-8", "replace").rstrip()
    return "\n".join([line for line in text.splitlines() if not NOISE.search(line)][-lines:])


def read_log(directory: str, btid: int, nbytes: int) -> bytes:
    """The end of an instance's log, what was moved out of it included. Empty if there is none."""
    path = os.path.realpath(log_path(directory, btid))
    text = b""
    for part in (path, previous_log_path(path)):
        try:
            with open(part, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - nbytes + len(text)))
                text = file.read(nbytes - len(text)) + text
        except OSError:
            continue
    return text


def is_stopped(pid: int) -> bool:
    """Whether the process is one that SIGSTOP, or a debugger, has stopped."""
    return state_of(pid) in ("T", "t")


def state_of(pid: int) -> str:
    """What the kernel says that a process does, one letter: ``T`` is stopped, ``D`` waits for a disk; "" if there is none.

    https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return status.rpartition(")")[2].split()[0]
