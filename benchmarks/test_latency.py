"""How long a frame is on its way, one at a time, and how long it takes until there is a first batch."""

from __future__ import annotations

import statistics
import threading
import time

import numpy as np
import pytest
import zmq

from . import receivers
from .conftest import Row
from .receivers import Receiver
from .test_frames import MIDDLE, way

INTERVAL_S = 0.005


@pytest.mark.parametrize(
    "receiver",
    [
        None,
        receivers.pickle_over_tcp,
        receivers.parts_over_ipc,
        receivers.torch_queue,
        receivers.spdl_arena,
        receivers.iceoryx2,
        receivers.ring,
    ],
    ids=lambda receiver: "limit" if receiver is None else receiver.__name__,
)
def test_latency(row: Row, receiver: Receiver | None) -> None:
    count = 50 if row.short else 1000
    row.named("latency", "200 frames/s", "memcpy and one ipc hop" if receiver is None else way(receiver))
    if receiver is None:
        samples = row.benchmark.pedantic(lambda: copies_and_hops(count), rounds=1)
    else:
        with receiver(MIDDLE, interval_s=INTERVAL_S) as receive:
            for _ in range(30):  # what had queued up
                receive()

            def run() -> list[float]:
                taken = []
                for _ in range(count):
                    message = receive()
                    taken.append((time.monotonic_ns() - message["sent_ns"]) / 1e3)
                return taken

            samples = row.benchmark.pedantic(run, rounds=1)
    percentiles = statistics.quantiles(samples, n=100)
    row.note(p50_us=percentiles[49], p99_us=percentiles[98])


def copies_and_hops(count: int) -> list[float]:
    """Microseconds for each copy of a picture into eight slots in turn, and the hop of an empty message to a waiting thread."""
    image, slots = np.zeros(MIDDLE, np.uint8), np.ones((8, *MIDDLE), np.uint8)
    samples = []
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.bind("ipc://@blendtorch-shm-benchmark")
        arrived: list[int] = []

        def listen() -> None:
            with context.socket(zmq.PULL) as pull:
                pull.connect("ipc://@blendtorch-shm-benchmark")
                for _ in range(count):
                    pull.recv()
                    arrived.append(time.monotonic_ns())

        listener = threading.Thread(target=listen)
        listener.start()
        sent = []
        for i in range(count):
            time.sleep(INTERVAL_S)
            sent.append(time.monotonic_ns())
            np.copyto(slots[i % len(slots)], image)
            push.send(b"")
        listener.join()
        samples = [(there - here) / 1e3 for here, there in zip(sent, arrived, strict=True)]
    return samples


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
