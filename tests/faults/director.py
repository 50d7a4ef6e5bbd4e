"""Plays rounds: producers and consumers that are killed, stopped and replaced, until all that was published has been received.

The director imports everything and opens nothing, so a process that it forks is at work after some milliseconds. Where
a round needs it, some processes are started afresh instead. Its last line on standard output is what happened, as JSON::

    python tests/faults/director.py points                 # one round per fault point
    python tests/faults/director.py chance --kills 200     # at random, until that many were killed
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import actors
import numpy as np
import points
from actors import Part
from judge import Life, judge, judge_removed
from ledger import RECORD, Board, Ledger, What, records

from blendtorch_shm.launch.address import SHARED_MEMORY, Twin
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.launch.sweep import sweep
from blendtorch_shm.stream.control import RECLAIM_EVERY_S
from blendtorch_shm.stream.place import SharedPlace

PATIENCE_S = 30.0
"""A round in which nothing at all happened for so long has come to a standstill."""
NUM_SLOTS = 64
"""So many that nobody is handed copies, which die with whoever has them."""
_LATE_S = 3 * RECLAIM_EVERY_S
_FIRST_PORT, _LAST_PORT = 20000, 32000  # below those that the kernel hands out, which a client may get in between
_prctl = ctypes.CDLL(None).prctl


@dataclass
class Settings:
    """What a round is like.

    Args:
        seed: of everything.
        streams: producers at a time.
        consumers: that share the memory.
        remotes: that do not.
        kills: how many processes have to be killed, by the director or at a fault point, before it ends.
        point: arm this one, always; the round ends when it has been reached. Otherwise points are armed at random.
        signal: what happens at `point`.
        pace_s: average time between two deeds of the director.
        fresh: probability that a process is started afresh instead of forked.
        num_slots: of a ring.
        late: probability that a dead consumer is replaced only when the living have taken back what it held.
        forks: probability that a process forks a child after a call.
        beside: probability that a deed is one beside the round: another launch begins, and dies, and somebody sweeps.
        removals: probability that a deed is to remove a file of a stream, and to kill its producer.
    """

    seed: int
    streams: int = 1
    consumers: int = 2
    remotes: int = 0
    kills: int = 40
    point: str | None = None
    signal: int = signal.SIGKILL
    pace_s: float = 0.02
    fresh: float = 0.0
    num_slots: int = NUM_SLOTS
    late: float = 0.0
    forks: float = 0.0
    beside: float = 0.0
    removals: float = 0.0


@dataclass
class Process(Life):
    """A life that the director can end."""

    pid: int = 0
    stopped_until: float | None = None
    doomed: bool = False
    """The director has sent SIGKILL."""
    popen: subprocess.Popen[bytes] | None = None


@dataclass
class Outcome:
    """What happened in one or more rounds."""

    rounds: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    figures: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cpu_s: float = 0.0

    def add(self, other: Outcome) -> None:
        """Sum up."""
        self.rounds += other.rounds
        for name in ("kills", "stops", "reached", "figures"):
            getattr(self, name).update(getattr(other, name))
        self.wrong += other.wrong
        self.seconds += other.seconds

    def report(self) -> dict[str, Any]:
        """For JSON."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


class Standstill(Exception):
    """The round does not go on. Says where everyone stands."""


class Round:
    """One stream or several, from the first process to the last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.chance = random.Random(settings.seed)
        self.folder = tempfile.mkdtemp(prefix="bt-faults-")
        self.launch = LaunchDirectory().create()
        self.twins = [asdict(self.launch.twin("DATA", i)) for i in range(settings.streams)]
        self.endpoints = [f"tcp://127.0.0.1:{free_port()}" for _ in range(settings.streams)]
        self.board = Board(f"{self.folder}/board")
        self.ledger = Ledger(f"{self.folder}/ledger", 0)
        self.living: dict[int, Process] = {}  # by pid
        self.lives: dict[int, Life] = {}  # by actor
        self.outcome = Outcome(rounds=1)
        self.finishing: set[str] = set()
        self.missing: list[float] = []  # when a consumer is to be replaced that died
        self.seen = 0  # records of the ledger
        self.began = self.moved = time.monotonic()

    def play(self) -> Outcome:
        """The whole round."""
        start = time.monotonic()
        settings = self.settings
        try:
            for stream in range(settings.streams):
                self.start("producer", stream)
            for role, count in (("consumer", settings.consumers), ("remote", settings.remotes)):
                for _ in range(count):
                    self.start(role)
            while not self._is_enough():
                self._attend(self.chance.expovariate(1 / settings.pace_s))
                self._do_something()
            if settings.removals:
                self._see_that_readers_follow()
            for role in ("producer", "consumer", "remote"):
                self.finishing.add(role)
                self.board.order(role)
                self._go_on()
                while any(process.role == role for process in self.living.values()):
                    self._attend(0.02)
            drainer = self.start("drainer")
            while drainer.pid in self.living:
                self._attend(0.02)
            drained = json.loads(Path(self.folder, "drained").read_text())
            written = records(f"{self.folder}/ledger")
            if settings.removals:
                figures, wrong = judge_removed(written, self.lives, drained)
            else:
                figures, wrong = judge(
                    written,
                    self.lives,
                    drained,
                    queue_size=actors.QUEUE_SIZE,
                    alone=settings.consumers == 1 and not settings.remotes,
                )
            self.outcome.figures.update(figures)
            self.outcome.figures["rings"] += sum(stream["rings"] for stream in drained)
            self.outcome.wrong += [f"seed {settings.seed}: {text}" for text in wrong]
        except Standstill as standstill:
            self.outcome.wrong.append(f"seed {settings.seed}: standstill: {standstill}")
        finally:
            self._end()
        self.outcome.wrong += [f"seed {settings.seed}: {text}" for text in self._left()]
        if self.outcome.wrong:
            log = Path(self.folder, "log").read_text(errors="replace")[-6000:]
            self.outcome.wrong.append(f"{settings}\n{log}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.outcome.seconds = time.monotonic() - start
        return self.outcome

    # -- processes ----------------------------------------------------------------------------------------------

    def start(self, role: str, stream: int = 0) -> Process:
        """A new process of that role."""
        chance, settings = self.chance, self.settings
        part = Part(
            actor=len(self.lives) + 1,
            role=role,
            seed=chance.randrange(2**31),
            stream=stream,
            folder=self.folder,
            twins=self.twins,
            endpoints=self.endpoints,
            arm={} if role == "drainer" or role in self.finishing else self._arm(role),
            num_slots=settings.num_slots,
            keep=chance.choice([0, 0, 0, 1, 2]) if settings.late < 1 else 2,
            growth=0.2 if settings.point is not None else 0.02,
            forks=settings.forks,
        )
        process = Process(part.actor, role, stream)
        if chance.random() < settings.fresh:
            with open(f"{self.folder}/log", "ab") as log:
                process.popen = subprocess.Popen(
                    [sys.executable, actors.__file__, json.dumps(asdict(part))],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=end_with_parent,
                )
            process.pid = process.popen.pid
        else:
            process.pid = self._fork(part)
        self.lives[process.actor] = self.living[process.pid] = process
        return process

    def _fork(self, part: Part) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        try:
            end_with_parent()
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            log = os.open(f"{self.folder}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
        finally:
            actors.leave(part)
        return 0

    def _arm(self, role: str) -> dict[str, tuple[int, int]]:
        settings, chance = self.settings, self.chance
        if settings.point is not None:
            point, reached = points.BY_NAME[settings.point], self.outcome.reached
            if point.after and not reached[point.after] and role in points.BY_NAME[point.after].roles:
                return {point.after: (2, signal.SIGKILL)}
            if reached[point.name] or role not in point.roles:
                return {}
            at_once = point.after or point.last or point.unreplaced
            return {point.name: (1 if at_once else chance.choice([1, 1, 2, 3]), settings.signal)}
        if chance.random() < 0.35:
            return {}
        # Those that have been reached least come first.
        fit = [p for p in points.POINTS if role in p.roles and (settings.remotes or not p.tcp)]
        chance.shuffle(fit)
        fit.sort(key=lambda p: self.outcome.reached[p.name] + REACHED[p.name])
        number = signal.SIGKILL if chance.random() < 0.8 else signal.SIGSTOP
        return {point.name: (chance.choice([1, 2, 3, 10]), number) for point in fit[: chance.choice([1, 3, 8])]}

    # -- events -------------------------------------------------------------------------------------------------

    def _attend(self, timeout_s: float) -> None:
        """Wait for something to happen to a process, but not for longer than that; replace who died."""
        signal.sigtimedwait({signal.SIGCHLD}, min(timeout_s, 0.2))
        self._reap()
        now = time.monotonic()
        for process in list(self.living.values()):
            if process.stopped_until is not None and process.stopped_until < now:
                process.stopped_until = None
                os.kill(process.pid, signal.SIGCONT)
        if "consumer" in self.finishing:
            self.missing.clear()
        while self.missing and self.missing[0] < now:
            del self.missing[0]
            self.start("consumer")
        count = os.path.getsize(f"{self.folder}/ledger") // RECORD.itemsize
        if count != self.seen:
            self._read_faults(count)
            self.moved = now
        elif now - self.moved > PATIENCE_S:
            raise Standstill(self._explain())

    def _read_faults(self, count: int) -> None:
        with open(f"{self.folder}/ledger", "rb") as file:
            file.seek(self.seen * RECORD.itemsize)
            data = file.read((count - self.seen) * RECORD.itemsize)
        self.seen = count
        if (What.FAULT.to_bytes(8, "little")) in data:
            rows = np.frombuffer(data, RECORD)
            for row in rows[rows["what"] == What.FAULT]:
                self.outcome.reached[points.POINTS[row["number"]].name] += 1

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process = self.living.get(pid)
            if process is None:
                continue
            if os.WIFSTOPPED(status):
                if process.stopped_until is None:  # at a fault point
                    self.outcome.stops["at a fault point"] += 1
                    process.stopped_until = time.monotonic() + self.chance.uniform(0.005, 0.15)
                continue
            del self.living[pid]
            if process.popen is not None:
                process.popen.returncode = 0  # it has been waited for
            # SIGTERM kills, too, who has not yet prepared for it.
            process.killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGTERM)
            self.ledger.died(process.actor)
            if process.killed:
                self.outcome.kills[f"{process.role} {'at random' if process.doomed else 'at a fault point'}"] += 1
            elif status:
                raise Standstill(f"{process.role} {process.actor} ended with status {status}. {self._explain()}")
            again = process.killed if process.role in self.finishing else process.role != "drainer"
            if process.killed and process.role == "consumer" and self.chance.random() < self.settings.late:
                self.missing.append(time.monotonic() + _LATE_S)
            elif again and (process.role == "producer" or process.role not in self.finishing):
                self.start(process.role, process.stream)

    def _do_something(self) -> None:
        """Kill, stop, interrupt or send away somebody; or do something beside."""
        if self.chance.random() < self.settings.beside:
            self._launch_beside()
        # Late in a round no more: the drainer needs a stream that is whole.
        is_late = sum(self.outcome.kills.values()) > 0.7 * self.settings.kills
        if not is_late and self.chance.random() < self.settings.removals:
            self._remove_file(self.chance.randrange(self.settings.streams))
        choice = self.chance.random()
        targets = [process for process in self.living.values() if not process.doomed]
        if not targets:
            return
        process = self.chance.choice(targets)
        if self.settings.point is not None:  # it is what matters; the rest brings about that it is reached
            point = points.BY_NAME[self.settings.point]
            disturb = not point.after and not point.last
            if point.unreplaced:  # a consumer at a time, while it holds something
                disturb = process.role == "consumer" and not self.missing
            choice = 0.0 if disturb and choice < 0.08 else 0.85 if disturb and choice < 0.16 else 1.0
        if choice < 0.45:
            process.doomed = True
            os.kill(process.pid, signal.SIGKILL)
        elif choice < 0.8 and process.stopped_until is None:
            self.outcome.stops["at random"] += 1
            process.stopped_until = time.monotonic() + self.chance.uniform(0.005, 0.15)
            os.kill(process.pid, signal.SIGSTOP)
        elif choice < 0.9 and process.role != "producer":
            os.kill(process.pid, signal.SIGTERM)
        if self.settings.point is None and not process.doomed:
            for _ in range(self.chance.choice([0, 1, 1, 5])):
                self.outcome.figures["interrupts"] += 1
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(0.0005)

    def _launch_beside(self) -> None:
        """Another launch begins, sweeps after those before it, and is killed; its files stay."""
        self.outcome.figures["launches beside"] += 1
        pid = os.fork()
        if pid == 0:
            try:
                sweep()
                other = LaunchDirectory().create()
                with SharedPlace(other.twin("DATA", 0)).open_locks(create=True):
                    os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        os.waitpid(pid, 0)

    def _remove_file(self, stream: int) -> None:
        """Remove a stream's lock file or control segment, and kill its producer: the next one begins the stream anew."""
        place = SharedPlace(Twin(**self.twins[stream]))
        path = self.chance.choice([place.twin.lock_path, f"{SHARED_MEMORY}{place.name}"])
        self.ledger.write(What.REMOVED, stream, number=len(self.lives))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        for process in self.living.values():
            if process.role == "producer" and process.stream == stream:
                process.doomed = True
                os.kill(process.pid, signal.SIGKILL)

    def _see_that_readers_follow(self) -> None:
        """Begin all streams anew once more, and wait until one who read the old ones has a message of each new one."""
        self._go_on()
        for stream in range(self.settings.streams):
            self._remove_file(stream)
        last = len(self.lives)
        missing = set(range(self.settings.streams))
        deadline = time.monotonic() + PATIENCE_S
        while missing and any(p.role == "consumer" and p.actor <= last for p in self.living.values()):
            self._attend(0.02)
            rows = records(f"{self.folder}/ledger")
            new = rows[(rows["what"] == What.READ) & (rows["actor"] <= last) & (rows["producer"] > last)]
            missing -= set(new["stream"].tolist())
            if time.monotonic() > deadline:
                raise Standstill(f"no reader of streams {sorted(missing)} has followed. {self._explain()}")

    def _is_enough(self) -> bool:
        if self.settings.point is not None:
            point = points.BY_NAME[self.settings.point]
            # So long that only a point which cannot be reached is given up, however busy the machine is.
            late = time.monotonic() - self.began > (0.2 if point.last else 100.0)
            return late or self.outcome.reached[point.name] > 0
        return sum(self.outcome.kills.values()) >= self.settings.kills

    def _go_on(self) -> None:
        for process in self.living.values():
            process.stopped_until = None
            os.kill(process.pid, signal.SIGCONT)

    # -- the end ------------------------------------------------------------------------------------------------

    def _explain(self) -> str:
        """Where everyone stands."""
        self._go_on()
        for process in self.living.values():
            os.kill(process.pid, signal.SIGUSR2)
        told = f"{self.folder}/told"
        pid = os.fork()
        if pid == 0:
            try:
                Path(told).write_text(actors.explain_all(Part(0, "", 0, 0, self.folder, self.twins, self.endpoints)))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        who = ", ".join(f"{p.role} {p.actor} (process {p.pid})" for p in self.living.values())
        return f"living: {who}\n{Path(told).read_text()}"

    def _end(self) -> None:
        for process in list(self.living.values()):
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
        self.ledger.close()

    def _left(self) -> list[str]:
        """What is there although everybody is gone, except for what the launch removes."""
        left = []
        found = map(os.stat, Path(self.launch.streams).glob("DATA-*.lock"))
        files = {f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}" for file in found}
        sweep()
        for line in Path("/proc/locks").read_text().splitlines():
            if "->" not in line and line.split()[5] in files:
                left.append(f"a lock is left: {line}")
        with contextlib.suppress(ChildProcessError):
            left.append(f"a process is left: {os.waitpid(-1, os.WNOHANG)}")
        self.launch.remove()
        names = [name for name in os.listdir("/dev/shm") if self.launch.launch in name]
        return [*left, *(f"shared memory is left: {name}" for name in names)]


REACHED: Counter[str] = Counter()
"""How often each fault point was reached in all rounds of this process."""


def free_port() -> int:
    """A port that nobody uses now, and that nobody gets by accident."""
    while True:
        port = secrets.choice(range(_FIRST_PORT, _LAST_PORT))  # whatever the seed: another director may be at work
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def end_with_parent() -> None:
    """For a child: be killed when the parent dies."""
    _prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def at_points(names: list[str]) -> dict[str, Any]:
    """A round for each fault point: somebody is killed there, and somebody is stopped there."""
    results = {}
    for number, name in enumerate(names):
        outcome = Outcome()
        for kind in (signal.SIGKILL, signal.SIGSTOP):
            point = points.BY_NAME[name]
            settings = Settings(seed=number, point=name, signal=kind, consumers=2)
            if point.tcp:
                settings.remotes = settings.consumers = 1
            elif point.unreplaced:
                settings.late = 1.0
                settings.consumers = 3 if "consumer" in point.roles else 1  # else the producer has nothing to wait for
            outcome.add(Round(settings).play())
        print(f"{name}: {outcome.seconds:.1f} s", file=sys.stderr, flush=True)
        if outcome.reached[name] < 2:
            outcome.wrong.append(f"reached {outcome.reached[name]} times, not once to kill and once to stop")
        results[name] = outcome.report()
    return results


def by_chance(kills: int, seconds: float, seed: int, num_slots: int) -> Outcome:
    """Rounds of all kinds, until there were so many kills, or for so long."""
    total = Outcome()
    start = time.monotonic()
    kinds: list[dict[str, Any]] = [
        dict(streams=1, consumers=3, remotes=0),
        dict(streams=2, consumers=2, remotes=1),
        dict(streams=1, consumers=1, remotes=0),
        dict(streams=2, consumers=3, remotes=0, fresh=0.05, late=0.2),
        dict(streams=1, consumers=1, remotes=2),
        dict(streams=2, consumers=3, remotes=0, removals=0.05),
    ]
    while sum(total.kills.values()) < kills and time.monotonic() - start < seconds and not total.wrong:
        outcome = Round(
            Settings(
                seed=seed,
                kills=40,
                pace_s=[0.01, 0.02, 0.06][seed // len(kinds) % 3],
                num_slots=num_slots,
                forks=0.05,
                beside=0.1,
                **kinds[seed % len(kinds)],
            )
        ).play()
        REACHED.update(outcome.reached)
        total.add(outcome)
        seed += 1
        print(f"{sum(total.kills.values())} kills, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["points", "chance"])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-slots", type=int, default=NUM_SLOTS)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # of those who do not expect it yet
    points.install()
    if arguments.what == "points":
        result: Any = at_points(arguments.only or [point.name for point in points.POINTS])
    else:
        result = by_chance(arguments.kills, arguments.seconds, arguments.seed, arguments.num_slots).report()
        times = os.times()
        result["cpu_s"] = times.user + times.system + times.children_user + times.children_system
    print(json.dumps(result))


if __name__ == "__main__":
    main()
