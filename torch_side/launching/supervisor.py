"""The processes of a launch: started, watched, started again and ended by one thread.

Children are to die with the launcher, whatever becomes of it, so each has a guardian (:mod:`.guardian`), which asks the kernel
for a signal at its parent's death (``PR_SET_PDEATHSIG``). The kernel sends that when the *thread* that forked the guardian ends,
so one thread lives as long as the launch, starts every child, and meanwhile waits for their ends.

An instance that is started again takes over its streams (``Producer`` adopts what its predecessor left), so the predecessor must
be gone altogether, with everything that it started: it could still hold the port, or write into a slot.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from blendtorch_shm.errors import LaunchError
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.launch.notes import (
    INSTANCE_VARIABLE,
    LAUNCH_VARIABLE,
    RESTARTS_VARIABLE,
    SOFTWARE_WARNING,
    InstanceState,
    clear_notes,
    has_note,
    has_status,
    instance_path,
    is_software,
    is_stopped,
    log_tail,
    read_note,
    restore_note,
    write_status,
)
from blendtorch_shm.launch.sweep import processes_of, send
from blendtorch_shm.stream.control import activity
from blendtorch_shm.stream.place import SharedPlace

from .bound import BoundProcess
from .config import LaunchConfig
from .instance import Instance, describe_exit
from .logs import Logs
from .removed import has_open, is_whole

log = logging.getLogger("blendtorch.launch")

GRACE_S = 5.0
"""How long a process may take to end after SIGTERM before it is killed."""
_NEWS_S = 0.1
"""How often the notes of starting instances are looked for."""
_LEFTOVERS_S = 0.05
"""How often it is looked whether a killed instance's last process is gone."""
_MEND_S = 0.5
"""How often it is looked whether somebody has removed files of the launch."""
_LOOK_AT_END_S = 0.01
"""How often it is looked whether all has ended, at the end."""
_END_S = 4 * GRACE_S
"""How long the end of a launch may take."""
_LISTEN_S = 1.0
"""How often signs of life are looked for, or four times within the patience."""


_CLEANERS = "docs/removed_files.md says what removes such files, and how to keep it from doing so."


class Supervisor:
    """Starts processes, watches them, and ends them all.

    Args:
        directory: the launch directory, where status files go.
        logs: where what instances print goes.
        tell: called with one line of news at a time, from the supervisor's thread.
        config: says what becomes of an instance that ends or hangs.
    """

    def __init__(
        self, directory: LaunchDirectory, logs: Logs, tell: Callable[[str], None], config: LaunchConfig
    ) -> None:
        self.instances: list[Instance] = []
        self.processes: list[BoundProcess] = []
        """The current process of each instance, or its last."""
        self._config = config
        self._directory = directory
        self._logs = logs
        self._tell = tell
        self._ending = False
        self._is_patient = True
        self._end_by = math.inf
        self._warned: set[str] = set()
        self._mended_at = time.monotonic()
        self._changed = threading.Condition()
        self._orders: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="blendtorch-supervisor", daemon=True)

    def begin(self) -> None:
        """Start the supervisor's thread. Before this, see to it that :meth:`stop` is called at the end.

        Raises:
            LaunchError: this process may not have another thread.
        """
        try:
            self._thread.start()
        except RuntimeError as error:
            raise LaunchError(
                f"Cannot start the thread that watches over the instances ({error}). This process is at a limit: look at "
                f"'ulimit -a' for its memory (-v, -d) and its processes (-u), and at the container's limit of processes."
            ) from error

    def call(self, order: Callable[[], Any]) -> Any:
        """Run `order` in the supervisor's thread, so that what it starts is bound to the launch, and return its result.

        Raises:
            LaunchError: the launch is over.
        """
        future: Future[Any] = Future()
        self._orders.append((order, future))
        self._wake()
        while not wait([future], _LISTEN_S).done and self._thread.is_alive():
            pass
        if not future.done():
            raise LaunchError("The launch is over: nothing can be started any more.")
        return future.result()

    def start(self, instances: Sequence[Instance]) -> None:
        """Start instances.

        Raises:
            LaunchError: the system refused to make a process.
        """
        for instance in instances:
            self.call(partial(self._start, instance))

    def keep_logs(self) -> list[str]:
        """See to it that the logs of all instances outlive the launch.

        Returns:
            where they lie then.
        """
        return [self._logs.keep(instance.btid) for instance in self.instances]

    def wait(self) -> None:
        """Wait until every instance has ended, and is not started again."""
        with self._changed:
            self._changed.wait_for(lambda: all(i.has_exited() for i in self.instances))

    def dead(self) -> list[Instance]:
        """The instances that have ended for good, noticed or not yet noticed by the thread."""
        with self._changed:
            for instance, process in zip(self.instances, self.processes, strict=True):
                if instance.state in ("starting", "running") and process.poll() is not None:
                    self._wake()
                    self._changed.wait_for(partial(_is_noticed, instance, process), GRACE_S)
            return [i for i in self.instances if i.has_exited()]

    def stop(self) -> None:
        """End every process of the launch: SIGTERM, up to :data:`GRACE_S` seconds of patience, then SIGKILL.

        The supervisor's thread does it, which no interrupt reaches. A second Ctrl-C ends the patience, and nothing else. Calling
        this again goes on where it was interrupted.
        """
        self._ending = True
        self._end_by = min(self._end_by, time.monotonic() + _END_S)
        self._wake()
        interrupt: BaseException | None = None
        while self._thread.is_alive() and (remaining_s := self._end_by - time.monotonic()) > 0:
            try:
                self._thread.join(remaining_s)
            except Exception as error:  # of a signal handler, such as torch's for a worker that died
                log.debug("While the launch ended: %r", error)
            except BaseException as error:
                interrupt = error
                self._is_patient = False
                self._wake()
        if self._thread.is_alive() and self._end_by > 0:
            log.error("Launch %s has not ended within %.0f s.", self._directory.launch, _END_S)
            self._end_by = 0.0  # said once
        self._waker.close()
        if interrupt is not None:
            raise interrupt

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is full, and wakes anyway; or the thread has ended
            self._waker.send(b"x", socket.MSG_NOSIGNAL)

    # -- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._ending:
                self._take_turn(self._patience())
            self._end_all(signal.SIGTERM)
            if alive := self._end_all(signal.SIGKILL):
                log.error("Processes %s of launch %s do not end, even when killed.", alive, self._directory.launch)
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.close()
            self._look_around()
            self._logs.close()
            self._selector.close()
            self._woken.close()

    def _take_turn(self, patience_s: float) -> None:
        """Wait for something to do, and do it."""
        for key, _ in self._selector.select(patience_s):
            if key.fileobj is self._woken:
                self._woken.recv(4096)
        while self._orders:
            _obey(*self._orders.popleft())
        self._look_around()

    def _end_all(self, number: signal.Signals) -> set[int]:
        """Send a signal once to every process of the launch, also those that come up meanwhile, and wait for their ends.

        Returns:
            the process ids of those that are still there.
        """
        told: set[int] = set()
        deadline = time.monotonic() + GRACE_S
        while alive := self._tell_each(number, told):
            if time.monotonic() > deadline or (number == signal.SIGTERM and not self._is_patient):
                break
            self._take_turn(_LOOK_AT_END_S)
        return alive

    def _tell_each(self, number: signal.Signals, told: set[int]) -> set[int]:
        """Send a signal to every process of the launch that was not `told`; all that are there."""
        launch = self._directory.launch
        processes = [process for process in list(self.processes) if not process.is_over()]
        leaders = {process.pid for process in processes if process.poll() is None}
        alive = leaders | set(processes_of(launch))
        for pid in alive - told:
            told.add(pid)
            for each in (number, signal.SIGCONT):  # a stopped process would not notice
                if pid in leaders:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(pid, each)
                else:
                    send(each, pid, launch)
        if number == signal.SIGKILL:
            for process in processes:
                process.end_all()
            alive |= {process.pid for process in processes}
        return alive

    def _patience(self) -> float:
        """Seconds until there may be something to do that nothing wakes us for."""
        waits = [_MEND_S]
        if self.instances and self._logs.look_every_s is not None:
            waits.append(self._logs.look_every_s)
        for instance in self.instances:
            if instance.state == "restarting":
                waits.append(max(0.0, instance.due_at - time.monotonic()))
            elif instance.state != "exited":
                if not instance.renderer:
                    waits.append(_NEWS_S)
                if self._config.stall_timeout is not None:
                    waits.append(self._listening_period_s(self._config.stall_timeout))
        return min(waits)

    def _start(self, instance: Instance) -> None:
        try:
            command = instance.command(instance.restarts)
            log_fd = self._open_log(instance)
            try:
                if instance.restarts:
                    mark = f"---- blendtorch: restart {instance.restarts} of instance {instance.btid} ----\n"
                    with contextlib.suppress(OSError):  # a full disk must not end the launch
                        os.write(log_fd, mark.encode())
                env = {**instance.env, RESTARTS_VARIABLE: str(instance.restarts)}
                marks = {name: env.pop(name) for name in (LAUNCH_VARIABLE, INSTANCE_VARIABLE) if name in env}
                process = BoundProcess(command, env=env, marks=marks, stdout=log_fd, stderr=log_fd)
            finally:
                os.close(log_fd)
        except OSError as error:
            raise LaunchError(f"Cannot start instance {instance.btid}: {error}.") from error
        with self._changed:
            if instance.process is None:
                self.instances.append(instance)
                self.processes.append(process)
            else:
                self.processes[self.instances.index(instance)] = process
            instance.process = process
            instance.started_at = instance.listened_at = time.monotonic()
            instance.silent_s = 0.0
            instance.stuck = instance.renderer = ""
            instance.said, instance.opened, instance.lost = {}, set(), ()
            self._move(instance, "starting")
        self._selector.register(process, selectors.EVENT_READ)

    def _open_log(self, instance: Instance) -> int:
        """A descriptor for all that an instance prints. It is started again also where there is no place for that any more."""
        try:
            return self._logs.open(instance.btid)
        except OSError as error:
            if not instance.restarts:
                raise
            self._warn(f"what instance {instance.btid} prints is lost from now on: its log cannot be made ({error}).")
            return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

    def _mend_directory(self) -> bool:
        """Make anew what somebody has removed of the launch's directory; whether nothing of it is missing then."""
        try:
            for path in self._directory.mend():
                self._warn(f"{path} was removed although the launch runs, and is made anew. {_CLEANERS}")
        except OSError as error:
            self._warn(
                f"Files of this launch were removed although it runs, and cannot be made anew: {error}. {_CLEANERS}"
            )
            return False
        return True

    def _mend(self) -> None:
        """Make anew what somebody has removed of the launch, and find out what cannot be made anew."""
        self._mended_at = time.monotonic()
        is_mended = self._mend_directory()
        for instance in self.instances:
            lost: list[str] = []
            if instance.state in ("starting", "running") and instance.process is not None:
                lost = self._lost(instance, instance.process.pid)
                for note, text in instance.said.items():
                    with contextlib.suppress(OSError):
                        restore_note(self._directory.path, instance.btid, note, text)
            if lost and lost != instance.lost:
                self._warn(
                    f"The shared memory of {' and '.join(map(repr, lost))} of instance {instance.btid} was removed although "
                    f"it publishes there. Who reads already reads on; nobody else can, until the instance is started again. "
                    f"{_CLEANERS}"
                )
            if lost != instance.lost or (is_mended and not has_status(self._directory.path, instance.btid)):
                instance.lost = lost
                self._write_status(instance)

    @staticmethod
    def _lost(instance: Instance, pid: int) -> list[str]:
        """The sockets that an instance publishes on, and whose files somebody has removed."""
        lost = []
        for twin in instance.streams:
            if is_whole(twin):
                instance.opened.add(twin.name)
            elif twin.name in instance.opened or has_open(twin, pid):  # or removed before anybody looked
                lost.append(twin.name)
        return lost

    def _look_around(self) -> None:
        if not self._ending and time.monotonic() - self._mended_at >= _MEND_S:
            self._mend()
        for instance in self.instances:
            self._logs.look(instance.btid)  # also of one that has ended: what it started may go on
            if instance.state == "restarting":
                self._start_again(instance)
            elif instance.state != "exited" and instance.process is not None:
                code = instance.process.poll()
                self._read_notes(instance)
                if code is not None:
                    self._selector.unregister(instance.process)
                    instance.process.hear_no_more()
                    self._bury(instance, instance.process, code)
                elif self._config.stall_timeout is not None and not instance.stuck:
                    self._listen(instance, self._config.stall_timeout)

    def _read_notes(self, instance: Instance) -> None:
        """See whether the instance said that its script began, and what it renders with."""
        directory, btid = self._directory.path, instance.btid
        if instance.state == "starting" and has_note(directory, btid, "started"):
            instance.said |= {note: read_note(directory, btid, note) for note in ("warnings", "started")}
            self._move(instance, "running")
            self._tell(f"instance {btid} runs its script, after {time.monotonic() - instance.started_at:.1f} s")
            for warning in instance.said["warnings"].splitlines():
                self._warn(warning)
        if not instance.renderer:
            instance.renderer = read_note(directory, btid, "renderer")
            if instance.renderer:
                instance.said["renderer"] = instance.renderer
                self._tell(f"instance {btid} renders with {instance.renderer}")
                if is_software(instance.renderer):
                    self._warn(SOFTWARE_WARNING)

    def _warn(self, warning: str) -> None:
        """Say once what may hold for each instance, and for each of its starts."""
        if warning in self._warned:
            return
        self._warned.add(warning)
        if self._config.progress:
            self._tell(f"WARNING: {warning}")
        else:
            log.warning("%s", warning)

    @staticmethod
    def _listening_period_s(patience_s: float) -> float:
        return min(_LISTEN_S, patience_s / 4)

    def _listen(self, instance: Instance, patience_s: float) -> None:
        """Kill an instance that has given no sign of life for too long: it may hang in a driver, or be stopped.

        Only time in which this thread was there to listen counts: all may have been frozen together.
        """
        now = time.monotonic()
        signs = instance.state, [activity(SharedPlace(twin)) for twin in instance.streams]
        if signs == instance.signs:
            instance.silent_s += min(now - instance.listened_at, 2 * self._listening_period_s(patience_s))
        else:
            instance.signs, instance.silent_s = signs, 0.0
        instance.listened_at = now
        process = instance.process
        if instance.silent_s > patience_s and process is not None and process.poll() is None:
            stopped = ", stopped by a signal (SIGSTOP)" if is_stopped(process.pid) else ""
            instance.stuck = (
                f"it was stuck{stopped}: no message for {instance.silent_s:.1f} s although there was room "
                f"(stall_timeout={patience_s:g})"
            )
            self._tell(f"instance {instance.btid} is killed: {instance.stuck}")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _bury(self, instance: Instance, process: BoundProcess, code: int) -> None:
        """Note how an instance ended, and decide whether it is started again."""
        age_s = time.monotonic() - instance.started_at
        how = f"{describe_exit(code)}, for {instance.stuck}" if instance.stuck else describe_exit(code)
        if process.is_unguarded:
            how = "killed, because its guardian, the process that watches over it, was killed"
            self._kill_leftovers(instance)
        instance.exit_code = code
        pause_s, fate = None, ""
        if not self._ending:
            is_recycled = self._config.recycle_after is not None and has_note(
                self._directory.path, instance.btid, "recycled"
            )
            pause_s, fate = instance.decide(self._config, code, age_s, is_recycled=is_recycled)
            self._mend_directory()  # or the end of its log would be lost
        self._logs.end(instance.btid)
        headline = f"Instance {instance.btid} ended after {age_s:.1f} s: {how}.{fate}"
        failed = code not in (0, -signal.SIGTERM, -signal.SIGINT) and not self._ending
        if failed:
            instance.kept_log = self._logs.keep(instance.btid)
        where = f", {instance.kept_log}" if failed else ""  # an error names what is there afterwards, too
        tail = log_tail(self._directory.path, instance.btid)
        quoted = "\n".join(f"    {line}" for line in tail.splitlines()) or "    (it is empty)"
        instance.obituary = f"{headline} The end of its log{where}:\n{quoted}"
        if not self._ending:  # told first: whoever waits for the end may close everything, this thread included
            if code == 0:
                self._tell(f"instance {instance.btid} is done, after {age_s:.1f} s.{fate}".removesuffix("."))
            elif self._config.follow:  # then its log was shown
                log.error("%s The end of its log is above%s.", headline, where)
            else:
                log.error("%s", instance.obituary)
        if pause_s is None:
            self._move(instance, "exited")
        else:
            instance.due_at = time.monotonic() + pause_s
            self._move(instance, "restarting")

    def _start_again(self, instance: Instance) -> None:
        """Start an instance again once it is time, and once nothing of the last time lives."""
        if self._ending:
            self._move(instance, "exited")
            return
        now = time.monotonic()
        leftovers = self._kill_leftovers(instance)
        if instance.process is not None and not instance.process.is_over():
            instance.process.end_all()
            leftovers.append(instance.process.pid)
        if leftovers:
            instance.due_at = max(instance.due_at, now + _LEFTOVERS_S)
        if now < instance.due_at:
            return
        self._mend()
        clear_notes(self._directory.path, instance.btid)
        instance.restarts += 1
        instance.published_before = instance.published()
        try:
            self._start(instance)
        except LaunchError as error:
            pause_s, fate = instance.decide(self._config, 1, 0.0)
            instance.obituary = f"{error}{fate}"
            log.error("%s", instance.obituary)
            instance.due_at = time.monotonic() + (pause_s or 0.0)
            if pause_s is None:
                instance.exit_code = 1  # whatever its last process said: it should run, and does not
                self._move(instance, "exited")

    def _kill_leftovers(self, instance: Instance) -> list[int]:
        """Kill what still lives of an instance; which processes that was."""
        whose = self._directory.launch, instance_path(self._directory.path, instance.btid)
        leftovers = processes_of(*whose)
        for pid in leftovers:
            send(signal.SIGKILL, pid, *whose)
        return leftovers

    def _move(self, instance: Instance, state: InstanceState) -> None:
        with self._changed:
            instance.state = state
            self._write_status(instance)
            self._changed.notify_all()

    def _write_status(self, instance: Instance) -> None:
        pid = instance.process.pid if instance.process is not None else 0
        try:
            code, restarts = instance.exit_code, instance.restarts
            write_status(
                self._directory.path,
                instance.btid,
                pid,
                instance.state,
                code,
                restarts=restarts,
                kept_log=instance.kept_log,
                lost=instance.lost,
            )
        except FileNotFoundError:  # somebody has removed the directory: it is made anew, and then this is written
            self._mended_at = -math.inf
        except OSError as error:  # a full disk must not end the launch
            log.error("Cannot note the state of instance %d in %s: %s", instance.btid, self._directory.path, error)


def _obey(order: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(order())
    except BaseException as error:
        future.set_exception(error)


def _is_noticed(instance: Instance, process: BoundProcess) -> bool:
    """Whether the supervisor's thread knows that `process` has ended."""
    return instance.state in ("restarting", "exited") or instance.process is not process
