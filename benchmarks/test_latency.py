"""How long a frame is on its way, one at a time, and how long it takes until there is a first batch."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import zmq

from . import receivers
from .conftest import Row, Sides
from .receivers import Receiver
from .test_frames import MIDDLE, WAYS, unless, way

INTERVALS_S = {"60 frames/s": 1 / 60, "200 frames/s": 1 / 200}
ASKED = "ipc://@blendtorch-shm-benchmark"


@pytest.mark.parametrize("receiver", [receivers.memcpy_and_hop, *WAYS], ids=way)
@pytest.mark.parametrize("pace", ["one by one", *(unless(pace, None) for pace in INTERVALS_S)])
def test_latency(row: Row, pace: str, receiver: Receiver) -> None:
    """From before publishing until the frame is here."""
    row.named("latency", pace, way(receiver))
    options: dict[str, Any] = {"interval_s": INTERVALS_S[pace]} if pace in INTERVALS_S else {"asked": ASKED}
    with zmq.Context() as context, context.socket(zmq.PUSH) as questions, receiver(MIDDLE, **options) as receive:
        questions.bind(ASKED)

        def receive_one() -> float:
            if "asked" in options:
                questions.send(b"")
            message = receive()
            return (time.monotonic_ns() - message["sent_ns"]) / 1e3

        for _ in range(30):  # what had queued up
            receive_one()
        samples: list[float] = []
        count, rounds = (50, 1) if row.short else (200 if pace == "60 frames/s" else 500, 3)
        sides = Sides()
        before = sides.cpu_s()
        row.benchmark.pedantic(lambda: samples.extend(receive_one() for _ in range(count)), rounds=rounds)
        trainer_us, producer_us = (
            (now - then) / len(samples) * 1e6 for now, then in zip(sides.cpu_s(), before, strict=True)
        )
    percentiles = statistics.quantiles(samples, n=100)
    row.note(p50_us=percentiles[49], p99_us=percentiles[98], trainer_us=trainer_us, producer_us=producer_us)


@pytest.mark.parametrize(
    "receiver", [receivers.data_loader_pickle, receivers.data_loader_ring, receivers.frame_loader], ids=way
)
def test_first_batch(row: Row, receiver: Receiver) -> None:
    def run() -> None:
        arguments = () if receiver is receivers.frame_loader else (4,)
        with receiver(MIDDLE, 8, *arguments, producers=2) as receive:
            assert len(receive()["frameid"]) == 8
            times.append(time.perf_counter() - began[-1])

    began: list[float] = []
    times: list[float] = []
    row.named("time to first batch", "two instances", way(receiver))
    row.benchmark.pedantic(run, setup=lambda: began.append(time.perf_counter()), rounds=1 if row.short else 5)
    row.note(first_batch_s=statistics.median(times))
