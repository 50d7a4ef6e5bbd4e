"""A program between the launcher and an instance. It says how the instance ended, and ends what the instance leaves behind.

::

    python -I -S guardian.py LAUNCHER SOCKET SIGNAL [NAME=VALUE ...] -- COMMAND ...

The launching program may ignore SIGCHLD, or wait for children that are not its own: then it never learns how an instance ended.
The guardian is the instance's parent, so nothing of that matters. Through `SOCKET`, a descriptor, it tells the launcher which
process the instance is (``pid 12``) and how it ended (``ended 0``, negative for a signal). It lets go of the instance's process
id only when it ends itself, so that no signal to the instance ever reaches another process.

What the instance starts may empty its environment, begin a session and lose its parent. Then it becomes a child of the guardian
(``PR_SET_CHILD_SUBREAPER``). To end everything, the guardian kills its children until it has none. Nobody else can be hit: a
child keeps its process id until its parent has waited for it.

SIGTERM makes the guardian end everything, and then itself. The kernel sends it when the launcher's thread has ended. Should the
guardian itself be killed, the kernel sends `SIGNAL` to the instance. `NAME=VALUE` is for the environment of the instance alone:
by those variables a launch's processes are found and ended, and the guardian must not end before them.

Standard library only, and nothing of ours: it is to start fast.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from typing import NoReturn

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
_AWAITED = {signal.SIGTERM, signal.SIGCHLD}
_GRACE_S = 5.0
"""How long the instance may take to end after `SIGNAL`."""
_prctl = ctypes.CDLL(None).prctl


def main() -> None:
    """Start the instance, and stay until everything is to end."""
    launcher, socket, death_signal = map(int, sys.argv[1:4])
    at = sys.argv.index("--")
    environment, command = dict(pair.split("=", 1) for pair in sys.argv[4:at]), sys.argv[at + 1 :]
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would be so here, too, and in the instance
    _prctl(_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    _prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.getppid() != launcher:
        return
    os.set_inheritable(socket, False)
    guardian = os.getpid()
    instance = os.fork()
    if instance == 0:
        _become(command, {**os.environ, **environment}, death_signal, guardian, socket)
    _close_all_but(socket)
    has_told = False
    while True:
        if not has_told and (end := os.waitid(os.P_PID, instance, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            _tell_end(socket, end)
            has_told = True
        for orphan in _children(guardian) - {instance}:
            os.waitpid(orphan, os.WNOHANG)
        if signal.sigwait(_AWAITED) == signal.SIGTERM:
            break
    if not has_told:
        _tell_end(socket, _end(instance, death_signal))
    while _kill_all(_children(guardian)):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _become(command: list[str], environment: dict[str, str], death_signal: int, guardian: int, socket: int) -> NoReturn:
    """In the child: turn into the instance. An ignored SIGHUP stays ignored, for that is what nohup is for."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _prctl(_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != guardian:
        os.kill(os.getpid(), signal.SIGKILL)
    _tell(socket, f"pid {os.getpid()}\n")  # only now: whoever knows it may send a signal to its process group
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(2, f"Cannot run {command[0]}: {error.strerror}\n".encode(errors="replace"))
        os._exit(1)


def _end(instance: int, death_signal: int) -> os.waitid_result | None:
    """End the instance: by what it is to be sent when its guardian dies, and by SIGKILL if that takes too long."""
    os.kill(instance, death_signal)
    deadline = time.monotonic() + _GRACE_S
    while (end := os.waitid(os.P_PID, instance, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is None:
        if time.monotonic() > deadline:
            os.kill(instance, signal.SIGKILL)
        signal.sigtimedwait([signal.SIGCHLD], 0.1)
    return end


def _close_all_but(socket: int) -> None:
    """Whoever waits for the end of a pipe that the instance was given waits for the instance, not for its guardian."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in (2, socket):
            with contextlib.suppress(OSError):
                os.close(fd)


def _tell(socket: int, news: str) -> None:
    with contextlib.suppress(OSError):  # the launcher is gone
        os.write(socket, news.encode())


def _tell_end(socket: int, end: os.waitid_result | None) -> None:
    if end is not None:
        _tell(socket, f"ended {end.si_status if end.si_code == os.CLD_EXITED else -end.si_status}\n")


def _children(parent: int) -> set[int]:
    """The children of a process, those that have ended and that it has not waited for included.

    (``/proc/self/task/*/children`` may leave some out while others end.)
    """
    children = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                if int(file.read().rpartition(b")")[2].split()[1]) == parent:
                    children.add(int(name))
    return children


def _kill_all(children: set[int]) -> int:
    """Kill children; how many could be killed. One that another user runs by now stays."""
    killed = 0
    for child in children:
        with contextlib.suppress(PermissionError):
            os.kill(child, signal.SIGKILL)
            killed += 1
    return killed


if __name__ == "__main__":
    main()
