"""Batches of eight in the training process: blendtorch's way, our dataset under the same DataLoader, and the FrameLoader.

With four workers, as blendtorch's examples have it. What the CPU does beside the copy of each frame is told from it by the
thread's own clock.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from torch.utils import data

from torch_side import FrameLoader, RemoteIterableDataset, batch_memory

from .conftest import Stream
from .test_throughput import launch, name

BATCH, WORKERS = 8, 4
SHAPES = [(64, 64, 3), (480, 640, 3), (1080, 1920, 4)]
ENDLESS = 10**9


class PickledMessages(data.IterableDataset[Any]):
    """As blendtorch 0.4 receives them."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __iter__(self) -> Iterator[Any]:
        with zmq.Context() as context, context.socket(zmq.PULL) as socket:
            socket.setsockopt(zmq.RCVHWM, 10)
            socket.setsockopt(zmq.RCVTIMEO, 60_000)
            socket.connect(self._address)
            while True:
                yield socket.recv_pyobj()


def data_loader(dataset: data.IterableDataset[Any]) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises against more workers than cores
        return iter(data.DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS))


def data_loader_pickle_over_tcp(stream: Stream, shape: tuple[int, ...]) -> None:
    with launch("pickle", shape) as launcher:
        batches = data_loader(PickledMessages(str(launcher.launch_info.addresses["DATA"][0])))
        stream.measure_batches(batches.__next__, BATCH, math.prod(shape))


def data_loader_ring(stream: Stream, shape: tuple[int, ...]) -> None:
    with launch("ring", shape) as launcher:
        batches = data_loader(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=ENDLESS))
        stream.measure_batches(batches.__next__, BATCH, math.prod(shape))


def frame_loader(stream: Stream, shape: tuple[int, ...]) -> None:
    copying_s = 0.0

    def copy(row: np.ndarray[Any, Any], array: np.ndarray[Any, Any]) -> None:
        nonlocal copying_s
        began = time.thread_time()
        np.copyto(row, array)
        copying_s += time.thread_time() - began

    with pytest.MonkeyPatch.context() as patch, launch("ring", shape) as launcher:
        patch.setattr(batch_memory, "copy_frame", copy)
        batches = iter(FrameLoader(launcher.launch_info.addresses["DATA"], BATCH, copy_threads=1))
        stream.measure_batches(batches.__next__, BATCH, math.prod(shape), lambda: copying_s)
        del batches


# One after the other for each size: ratios are for the same minute.
@pytest.mark.parametrize(
    "how", [data_loader_pickle_over_tcp, data_loader_ring, frame_loader], ids=lambda how: how.__name__
)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_batches(stream: Stream, shape: tuple[int, ...], how: Callable[[Stream, tuple[int, ...]], None]) -> None:
    stream.benchmark.group = name(shape)
    how(stream, shape)
