"""Benchmarks compare within one run: the rows of one table against each other. `--short` proves that they work, in a minute."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from tabulate import tabulate

from blendtorch_shm.errors import BlenderNotFound
from torch_side.finder import find_runtime

Measured = Callable[[], dict[str, Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--short", action="store_true", help="few rounds of few frames, of few sizes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: not part of --short")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--short"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


class Row:
    """One way in one table: measures, and keeps the figures where pytest-benchmark keeps them.

    Rows of the same table and `x` are compared, with the first of them.
    """

    def __init__(self, benchmark: Any, short: bool) -> None:
        self.benchmark = benchmark
        self.short = short

    def named(self, table: str, x: str, way: str) -> Row:
        self.benchmark.group = f"{table}: {x}"
        self.benchmark.extra_info.update(table=table, x=x, way=way.replace("_", " "))
        return self

    def note(self, **figures: Any) -> None:
        self.benchmark.extra_info.update(figures)

    def time_messages(self, receive: Measured, nbytes: int, seconds: float = 0.4) -> None:
        """Receive for several rounds; the ``frameid`` of each producer must count up by one.

        Args:
            receive: returns the next message.
            nbytes: size of its pictures.
            seconds: aimed-at length of a round.
        """
        expected: dict[Any, int] = {}

        def receive_next() -> None:
            message = receive()
            btid, frameid = message.get("btid"), int(message["frameid"])
            if expected.setdefault(btid, frameid) != frameid:
                raise AssertionError(f"frame {frameid} instead of {expected[btid]} of instance {btid}")
            expected[btid] += 1

        self._time(receive_next, 1, nbytes, seconds)

    def time_batches(
        self, receive: Measured, size: int, nbytes: int, copying_s: Callable[[], float] | None = None
    ) -> None:
        """The same for batches, in which no frame may come twice.

        Args:
            receive: returns the next batch.
            size: frames of a batch.
            nbytes: size of the pictures of one frame.
            copying_s: CPU time spent with copying frames so far, if it is to be told from the rest.
        """
        seen: set[Any] = set()
        received = 0

        def receive_next() -> None:
            nonlocal received
            received += size
            batch = receive()
            frameids = batch["frameid"].tolist()
            seen.update(zip(batch["btid"].tolist(), frameids, strict=True) if "btid" in batch else frameids)
            if len(seen) != received:
                raise AssertionError(f"{len(seen)} different frames among {received}")

        self._time(receive_next, size, nbytes, 0.6, copying_s)

    def time_steps(self, step: Callable[[], Any], shape: tuple[int, ...]) -> None:
        """Step for several rounds; each observation is another one than the one before, and whole.

        Args:
            step: returns the observations.
            shape: of these.
        """
        last = None
        for _ in range(20):  # starting up
            observations = step()
            ends = set(observations.flat[:: observations.size - 1].tolist())
            if observations.shape != shape or len(ends) != 1 or ends == last:
                raise AssertionError(f"Observations {observations.shape} of {shape}: {ends} after {last}.")
            last = ends
            del observations
        per_round = 0
        start = time.perf_counter()
        while per_round < 5 or time.perf_counter() - start < (0.05 if self.short else 0.4):
            step()
            per_round += 1
        before = time.process_time()

        def run() -> None:
            for _ in range(per_round):
                step()

        self.benchmark.pedantic(run, rounds=2 if self.short else 9)
        if self.benchmark.stats is None:  # --benchmark-disable
            return
        rounds = len(self.benchmark.stats.stats.data)
        self.note(
            steps_per_s=per_round / self.benchmark.stats.stats.median,
            spread=self.benchmark.stats.stats.iqr / self.benchmark.stats.stats.median,
            trainer_us=(time.process_time() - before) / rounds / per_round * 1e6,
        )

    def _time(
        self,
        receive: Callable[[], None],
        frames: int,
        nbytes: int,
        seconds: float,
        copying_s: Callable[[], float] | None = None,
    ) -> None:
        for _ in range(10):  # starting up, and what had queued up meanwhile
            receive()
        per_round = 0
        start = time.perf_counter()
        while per_round < 3 or time.perf_counter() - start < (0.05 if self.short else seconds):
            receive()
            per_round += 1
        sides = Sides()
        before = sides.cpu_s()
        beside_s: list[float] = []

        def run() -> None:
            began = time.process_time() - (copying_s() if copying_s else 0.0)
            for _ in range(per_round):
                receive()
            beside_s.append(time.process_time() - (copying_s() if copying_s else 0.0) - began)

        self.benchmark.pedantic(run, rounds=2 if self.short else 9)
        if self.benchmark.stats is None:  # --benchmark-disable
            return
        spent = [now - then for now, then in zip(sides.cpu_s(), before, strict=True)]
        trainer_mb, producers_mb = sides.memory_mb()
        fps = frames * per_round / self.benchmark.stats.stats.median
        count = frames * per_round * len(beside_s)
        self.note(
            frames_per_s=fps,
            spread=self.benchmark.stats.stats.iqr / self.benchmark.stats.stats.median,
            gb_per_s=fps * nbytes / 1e9,
            trainer_us=spent[0] / count * 1e6,
            producer_us=spent[1] / count * 1e6,
            trainer_mb=trainer_mb,
            producers_mb=producers_mb,
        )
        if copying_s:
            self.note(beside_copies_us=statistics.median(beside_s) / per_round / frames * 1e6)


class Sides:
    """The processes of both sides: this one with a DataLoader's workers, and the producers."""

    def __init__(self) -> None:
        this = psutil.Process()
        children = [child for child in this.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
        self._producers = [child for child in children if _is_producer(child)]
        self._trainer = [this, *(child for child in children if child not in self._producers)]

    def cpu_s(self) -> tuple[float, float]:
        """Of all threads of these processes, ZeroMQ's included, also of those that have ended."""
        trainer, producers = (sum(_cpu_s(process.pid) for process in side) for side in (self._trainer, self._producers))
        return trainer, producers

    def memory_mb(self) -> tuple[float, float]:
        """Resident memory in MB; what several processes share counts once."""
        trainer, producers = (
            sum(process.memory_full_info().pss for process in side) / 1e6 for side in (self._trainer, self._producers)
        )
        return trainer, producers


def _cpu_s(pid: int) -> float:
    """By the process's own clock, as Linux numbers it (clock_getcpuclockid): to the nanosecond, where /proc counts in 10 ms."""
    return time.clock_gettime(~pid << 3 | 2)


def _is_producer(process: psutil.Process) -> bool:
    from .receivers import children_pids

    return process.pid in children_pids or any("producer.py" in argument for argument in process.cmdline())


@pytest.fixture
def a_blender() -> None:
    """There is one, which the launcher will find."""
    try:
        find_runtime(None, None)
    except BlenderNotFound as error:
        pytest.skip(str(error))


@pytest.fixture
def row(benchmark: Any, request: pytest.FixtureRequest) -> Row:
    return Row(benchmark, request.config.getoption("--short"))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    from .report import versions

    output_json["is_short"] = config.getoption("--short")
    output_json["packages"] = versions("torch", "numpy", "pyzmq", "iceoryx2", "spdl-core")
    output_json["load"] = [round(load, 1) for load in os.getloadavg()]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    from .report import tables

    session = getattr(config, "_benchmarksession", None)
    for title, header, lines in tables([b.extra_info for b in getattr(session, "benchmarks", [])]):
        terminalreporter.section(title)
        terminalreporter.write_line(tabulate(lines, header, disable_numparse=True, stralign="right"))
