"""Benchmarks compare within one run: rows of one group against each other. `--short` proves that they work, in a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--short", action="store_true", help="few rounds of few frames")


@dataclass
class Stream:
    """Times how fast messages come out of a stream that runs already."""

    benchmark: Any
    short: bool

    def measure(self, receive: Callable[[], dict[str, Any]], frame_nbytes: int, seconds: float = 0.4) -> None:
        """Receive for several rounds and note frames/s, GB/s and this process's CPU time per frame.

        Args:
            receive: returns the next message; its ``frameid`` must count up by one.
            frame_nbytes: size of its picture in bytes.
            seconds: aimed-at length of a round.
        """
        expected = int(receive()["frameid"])

        def receive_next() -> None:
            nonlocal expected
            expected += 1
            message = receive()
            if message["frameid"] != expected:
                raise AssertionError(f"frame {message['frameid']} instead of {expected}")

        self._measure(receive_next, 1, frame_nbytes, seconds)

    def measure_batches(
        self,
        receive: Callable[[], dict[str, Any]],
        size: int,
        frame_nbytes: int,
        copying_s: Callable[[], float] | None = None,
    ) -> None:
        """The same for batches.

        Args:
            receive: returns the next batch; no ``frameid`` may come twice.
            size: frames of a batch.
            frame_nbytes: size of one picture in bytes.
            copying_s: CPU time spent with copying frames so far, if it is to be told from the rest.
        """
        seen: set[int] = set()
        received = 0

        def receive_next() -> None:
            nonlocal received
            received += size
            seen.update(receive()["frameid"].tolist())
            if len(seen) != received:
                raise AssertionError(f"{len(seen)} different frames among {received}")

        self._measure(receive_next, size, frame_nbytes, 1.0, copying_s)

    def _measure(
        self,
        receive: Callable[[], None],
        frames: int,
        frame_nbytes: int,
        seconds: float,
        copying_s: Callable[[], float] | None = None,
    ) -> None:
        start = time.perf_counter()
        warm_up = max(5, (20 if self.short else 100) // frames)
        for _ in range(warm_up):
            receive()
        per_round = max(5, int(warm_up * (0.05 if self.short else seconds) / (time.perf_counter() - start)))
        cpu_s: list[float] = []
        copied_s: list[float] = []

        def run() -> None:
            began = time.process_time()
            copied = copying_s() if copying_s else 0.0
            for _ in range(per_round):
                receive()
            cpu_s.append(time.process_time() - began)
            copied_s.append(copying_s() - copied if copying_s else 0.0)

        self.benchmark.pedantic(run, rounds=2 if self.short else 9)
        if self.benchmark.stats is None:  # --benchmark-disable
            return
        fps = frames * per_round / self.benchmark.stats.stats.median

        def us_per_frame(seconds: list[float]) -> float:
            return round(sorted(seconds)[len(seconds) // 2] / per_round / frames * 1e6, 1)

        self.benchmark.extra_info.update(
            frames_per_s=round(fps, 1),
            gb_per_s=round(fps * frame_nbytes / 1e9, 2),
            cpu_us_per_frame=us_per_frame(cpu_s),
        )
        if copying_s:
            beside_s = [cpu - copied for cpu, copied in zip(cpu_s, copied_s, strict=True)]
            self.benchmark.extra_info["beside_copies_us_per_frame"] = us_per_frame(beside_s)


@pytest.fixture
def stream(benchmark: Any, request: pytest.FixtureRequest) -> Stream:
    return Stream(benchmark, request.config.getoption("--short"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Frames per second, and how many times the first row of its group each row is."""
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in getattr(session, "benchmarks", []) if "frames_per_s" in b.extra_info]
    if not rows:
        return
    terminalreporter.section("frames")
    terminalreporter.write_line(f"{'':<44}{'frames/s':>10}{'GB/s':>8}{'CPU us/frame':>14}{'ratio':>8}   beside copies")
    base: dict[str, float] = {}
    for row in rows:
        info = row.extra_info
        ratio = info["frames_per_s"] / base.setdefault(row.group, info["frames_per_s"])
        how = (
            row.name.removeprefix("test_").replace(f"[{row.group}", "[").replace(f"-{row.group}", "").replace("[]", "")
        )
        name = f"{row.group}  {how}"
        terminalreporter.write_line(
            f"{name:<44}{info['frames_per_s']:>10}{info['gb_per_s']:>8}{info['cpu_us_per_frame']:>14}{ratio:>8.1f}"
            f"{info.get('beside_copies_us_per_frame', ''):>16}"
        )
