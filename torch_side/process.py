"""The processes of a launch: started, watched and ended by one thread.

Children are to die with the launcher, whatever becomes of it, so each asks the kernel for a signal at its parent's death
(``PR_SET_PDEATHSIG``). The kernel sends that when the *thread* that forked the child ends, so one thread lives as long as the
launch, starts every child, and meanwhile waits for their ends. The request is made in a tiny Python program that then
becomes the child: code between fork and exec is not safe in a process with threads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from blendtorch_shm.errors import LaunchError
from blendtorch_shm.launch_directory import (
    LaunchDirectory,
    State,
    log_path,
    log_tail,
    processes_of,
    read_note,
    renderer_path,
    started_path,
    write_status,
)

_log = logging.getLogger("blendtorch")

GRACE_S = 5.0
"""How long a process may take to end after SIGTERM before it is killed."""
_NEWS_S = 0.1
"""How often the notes of starting instances are looked for."""

_BECOME = """
import ctypes, os, signal, sys
parent, number = int(sys.argv[1]), int(sys.argv[2])
for s in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ): signal.signal(s, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
ctypes.CDLL(None).prctl(1, number, 0, 0, 0)
if os.getppid() != parent: os.kill(os.getpid(), signal.SIGKILL)
try: os.execvp(sys.argv[3], sys.argv[3:])
except OSError as error: sys.exit(f"Cannot run {sys.argv[3]}: {error.strerror}")
"""


def start_bound(
    command: Sequence[str], *, death_signal: signal.Signals = signal.SIGKILL, **options: Any
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, bound to the life of the calling thread.

    Args:
        command: the program and its arguments.
        death_signal: what the kernel sends to the child when this thread ends.
        options: further arguments of ``subprocess.Popen``.
    """
    become = [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), str(int(death_signal))]
    return subprocess.Popen([*become, *command], stdin=subprocess.DEVNULL, start_new_session=True, **options)


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ""
    if -code == signal.SIGKILL:
        hint = ", which is also what the kernel sends when memory runs out"
    return f"killed by {name}{hint}"


@dataclass(eq=False)
class Instance:
    """One instance: what to run, and what became of it."""

    btid: int
    command: list[str]
    env: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    started_at: float = 0.0
    state: State = "starting"
    exit_code: int | None = None
    renderer: str = ""
    obituary: str = ""
    """How it ended: exit code, age, and the tail of its log."""

    def has_exited(self) -> bool:
        """Whether its process is gone, and its obituary written."""
        return self.state == "exited"


class Supervisor:
    """Starts processes, watches them, and ends them all.

    Args:
        directory: the launch directory, where logs and status files go.
        tell: called with one line of news at a time, from the supervisor's thread.
    """

    def __init__(self, directory: LaunchDirectory, tell: Callable[[str], None]) -> None:
        self.instances: list[Instance] = []
        self._directory = directory
        self._tell = tell
        self._ending = False
        self._software_told = False
        self._changed = threading.Condition()
        self._orders: deque[tuple[Callable[[], Any], Future[Any]] | None] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="blendtorch-supervisor", daemon=True)
        self._thread.start()

    def call(self, order: Callable[[], Any]) -> Any:
        """Run `order` in the supervisor's thread, so that what it starts is bound to the launch, and return its result."""
        future: Future[Any] = Future()
        self._orders.append((order, future))
        self._wake()
        return future.result()

    def start(self, instances: Sequence[Instance]) -> None:
        """Start instances.

        Raises:
            LaunchError: the system refused to make a process.
        """
        for instance in instances:
            self.call(partial(self._start, instance))

    def wait(self) -> None:
        """Wait until every instance has ended."""
        with self._changed:
            self._changed.wait_for(lambda: all(i.has_exited() for i in self.instances))

    def dead(self) -> list[Instance]:
        """The instances that have ended, noticed or not yet noticed by the thread."""
        with self._changed:
            for instance in self.instances:
                if instance.process is not None and instance.process.poll() is not None and instance.state != "exited":
                    self._wake()
                    self._changed.wait_for(instance.has_exited, GRACE_S)
            return [i for i in self.instances if i.has_exited()]

    def stop(self) -> None:
        """End every process of the launch: SIGTERM, up to :data:`GRACE_S` seconds of patience, then SIGKILL.

        A second Ctrl-C ends the patience, and nothing else.
        """
        self._ending = True
        try:
            self._end_all(signal.SIGTERM)
        finally:
            if alive := self._end_all(signal.SIGKILL):
                _log.error("Processes %s of launch %s do not end, even when killed.", alive, self._directory.launch)
            self._orders.append(None)
            self._wake()
            self._thread.join(GRACE_S)

    def _end_all(self, number: signal.Signals) -> set[int]:
        """Send a signal once to every process of the launch, also those that come up meanwhile, and wait for their ends.

        Returns:
            the process ids of those that are still there.
        """
        told: set[int] = set()
        deadline = time.monotonic() + GRACE_S
        while True:
            processes = [i.process for i in self.instances if i.process is not None]
            leaders = {p.pid for p in processes if p.poll() is None}
            alive = leaders | set(processes_of(self._directory.launch))
            for pid in alive - told:
                send = os.killpg if pid in leaders else os.kill
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    send(pid, number)
                    send(pid, signal.SIGCONT)  # a stopped process would not notice
            told |= alive
            if not alive or time.monotonic() > deadline:
                return alive
            with contextlib.suppress(Exception):  # of a signal handler, such as torch's for a worker that died
                time.sleep(0.01)

    def _wake(self) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(BlockingIOError):  # full: it wakes anyway
                os.write(self._wake_write, b"x")

    # -- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select(self._patience()):
                    if key.fd == self._wake_read:
                        os.read(self._wake_read, 4096)
                while self._orders:
                    order = self._orders.popleft()
                    if order is None:
                        return
                    _obey(*order)
                self._look_around()
        finally:
            self._look_around()
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _patience(self) -> float | None:
        """Seconds until there may be news that wakes nobody: notes, and ends that no pidfd tells of."""
        alive = [i for i in self.instances if i.state != "exited"]
        return _NEWS_S if any(i.pidfd < 0 or not i.renderer for i in alive) else None

    def _start(self, instance: Instance) -> None:
        directory = self._directory.path
        try:
            log_fd = os.open(
                log_path(directory, instance.btid), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
            )
            try:
                instance.started_at = time.monotonic()
                instance.process = start_bound(instance.command, env=instance.env, stdout=log_fd, stderr=log_fd)
                instance.process.args = instance.command
            finally:
                os.close(log_fd)
            with self._changed:
                self.instances.append(instance)
            self._write_status(instance)
        except OSError as error:
            raise LaunchError(f"Cannot start instance {instance.btid} ({instance.command[0]}): {error}.") from error
        with contextlib.suppress(OSError):  # a kernel without pidfd, or no descriptor left: polled instead
            instance.pidfd = os.pidfd_open(instance.process.pid)
            self._selector.register(instance.pidfd, selectors.EVENT_READ)

    def _look_around(self) -> None:
        for instance in self.instances:
            if instance.state == "exited" or instance.process is None:
                continue
            ended = instance.process.poll() is not None
            self._read_notes(instance)
            if ended:
                self._bury(instance)

    def _read_notes(self, instance: Instance) -> None:
        """See whether the instance said that its script began, and what it renders with."""
        directory, btid = self._directory.path, instance.btid
        if instance.state == "starting" and os.path.exists(started_path(directory, btid)):
            instance.state = "running"
            self._write_status(instance)
            self._tell(f"instance {btid} runs its script, after {time.monotonic() - instance.started_at:.1f} s")
        if not instance.renderer:
            instance.renderer = read_note(renderer_path(directory, btid))
            if instance.renderer:
                self._tell(f"instance {btid} renders with {instance.renderer}")
                if _is_software(instance.renderer) and not self._software_told:
                    self._software_told = True
                    self._tell(
                        "WARNING: this is SOFTWARE rendering, on the processor, many times slower than a graphics card. "
                        "If this machine has one, its driver is not in use (in a container: --gpus all)."
                    )

    def _bury(self, instance: Instance) -> None:
        process = instance.process
        code = process.returncode if process is not None else 0
        age_s = time.monotonic() - instance.started_at
        if instance.pidfd >= 0:
            self._selector.unregister(instance.pidfd)
            os.close(instance.pidfd)
            instance.pidfd = -1
        tail = log_tail(self._directory.path, instance.btid)
        quoted = "\n".join(f"    {line}" for line in tail.splitlines()) or "    (it is empty)"
        instance.obituary = (
            f"Instance {instance.btid} ended after {age_s:.1f} s: {describe_exit(code)}. The end of its log, "
            f"{log_path(self._directory.path, instance.btid)}:\n{quoted}"
        )
        with self._changed:
            instance.exit_code = code
            instance.state = "exited"
            self._write_status(instance)
            self._changed.notify_all()
        if not self._ending:
            if code == 0:
                self._tell(f"instance {instance.btid} is done, after {age_s:.1f} s")
            else:
                _log.error("%s", instance.obituary)

    def _write_status(self, instance: Instance) -> None:
        pid = instance.process.pid if instance.process is not None else 0
        try:
            write_status(self._directory.path, instance.btid, pid, instance.state, instance.exit_code)
        except OSError as error:  # a full disk must not end the launch
            _log.error("Cannot note the state of instance %d in %s: %s", instance.btid, self._directory.path, error)


def _obey(order: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(order())
    except BaseException as error:
        future.set_exception(error)


def _is_software(renderer: str) -> bool:
    return any(word in renderer.lower() for word in ("llvmpipe", "softpipe", "swrast", "software"))
