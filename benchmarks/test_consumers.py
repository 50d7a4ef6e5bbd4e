"""Several consumers of one stream: four as fast as they may be, and one that is busy with each frame beside one that waits."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from . import consumers
from .conftest import Row, Sides
from .consumers import Consumers, Received
from .receivers import Shape, name
from .test_frames import MIDDLE, unless

BUSY_S = 0.1
INTERVAL_S = 0.005
SETTLE_S = 0.3
"""Until there is nothing left of what queued up while the consumers started."""


def way(receiver: consumers.Receiver) -> str:
    return receiver.__name__


def measure(row: Row, running: Consumers, seconds: float) -> tuple[list[Received], list[int]]:
    """Let consumers receive for nine rounds of so many seconds; the CPU time of both sides is noted per frame of all rounds.

    Returns:
        what each consumer received; when each round began and the last one ended, in ns.
    """
    time.sleep(SETTLE_S)
    sides = Sides()
    before = sides.cpu_s()
    edges = [time.monotonic_ns()]

    def run() -> None:
        time.sleep(seconds)
        edges.append(time.monotonic_ns())

    row.benchmark.pedantic(run, rounds=2 if row.short else 9)
    trainer_s, producer_s = np.subtract(sides.cpu_s(), before)
    received = running.finish()
    count = sum(int(in_rounds(one, edges).sum()) for one in received)
    row.note(trainer_us=float(trainer_s / count * 1e6), producer_us=float(producer_s / count * 1e6))
    return received, edges


def in_rounds(received: Received, edges: list[int]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return (edges[0] <= received.received_ns) & (received.received_ns < edges[-1])


@pytest.mark.parametrize("receiver", [consumers.pickle_over_tcp, consumers.ring], ids=way)
@pytest.mark.parametrize("shape", [unless(shape, MIDDLE, name(shape)) for shape in ((64, 64, 3), MIDDLE)])
def test_four_consumers(row: Row, shape: Shape, receiver: consumers.Receiver) -> None:
    row.named("four consumers", name(shape), way(receiver))
    with receiver(shape, [0.0] * 4) as running:
        received, edges = measure(row, running, 0.1 if row.short else 0.4)
    counts = np.histogram(np.concatenate([one.received_ns for one in received]), edges)[0]
    low, fps, high = (float(rate) for rate in np.percentile(counts / np.diff(edges) * 1e9, [25, 50, 75]))
    row.note(frames_per_s=fps, spread=(high - low) / fps, gb_per_s=fps * math.prod(shape) / 1e9)


@pytest.mark.parametrize("receiver", [consumers.pickle_over_tcp, consumers.ring], ids=way)
def test_busy_and_idle(row: Row, receiver: consumers.Receiver) -> None:
    """The idle consumer's latency, while the other one is busy."""
    row.named("one busy and one idle consumer", "200 frames/s", way(receiver))
    with receiver(MIDDLE, [BUSY_S, 0.0], interval_s=INTERVAL_S) as running:
        (busy, idle), edges = measure(row, running, 0.2 if row.short else 0.8)
    assert in_rounds(busy, edges).any()
    waited_us = (idle.received_ns - idle.sent_ns)[in_rounds(idle, edges)] / 1e3
    p50, p99 = (float(percentile) for percentile in np.percentile(waited_us, [50, 99]))
    row.note(p50_us=p50, p99_us=p99)
