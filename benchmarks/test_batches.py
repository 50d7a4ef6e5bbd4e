"""Batches in the training process: blendtorch's way, our dataset under the same DataLoader, a DataLoader alone, the FrameLoader.

What the FrameLoader's CPU does beside the copy of each frame is told from it by the thread's own clock.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from torch_side import batch_memory

from . import receivers
from .conftest import Row
from .receivers import Receiver, Shape, name
from .test_frames import MIDDLE, unless, way

BATCH, WORKERS = 8, 4
SHAPES = [(64, 64, 3), MIDDLE, (1080, 1920, 4)]
DATA_LOADERS = [receivers.data_loader_pickle, receivers.data_loader_ring, receivers.data_loader_ring_pooled]


def measure(row: Row, receiver: Receiver, shape: Shape, batch_size: int, workers: int, **options: Any) -> None:
    if receiver is not receivers.frame_loader:
        with receiver(shape, batch_size, workers, **options) as receive:
            row.time_batches(receive, batch_size, math.prod(shape))
        return
    copying_s = 0.0

    def copy(to: np.ndarray[Any, Any], array: np.ndarray[Any, Any]) -> None:
        nonlocal copying_s
        began = time.thread_time()
        np.copyto(to, array)
        copying_s += time.thread_time() - began

    with pytest.MonkeyPatch.context() as patch, receiver(shape, batch_size, **options) as receive:
        patch.setattr(batch_memory, "copy_frame", copy)
        row.time_batches(receive, batch_size, math.prod(shape), lambda: copying_s)


@pytest.mark.parametrize("receiver", [*DATA_LOADERS, receivers.data_loader_alone, receivers.frame_loader], ids=way)
@pytest.mark.parametrize("shape", [unless(shape, MIDDLE, name(shape)) for shape in SHAPES])
def test_batches_by_size(row: Row, shape: Shape, receiver: Receiver) -> None:
    measure(row.named("frame size, batches of 8", name(shape), way(receiver)), receiver, shape, BATCH, WORKERS)


@pytest.mark.parametrize("receiver", [*DATA_LOADERS, receivers.data_loader_alone], ids=way)
@pytest.mark.parametrize("workers", [unless(count, 0) for count in (0, 1, 2, 4)])
def test_workers(row: Row, workers: int, receiver: Receiver) -> None:
    measure(row.named("workers", str(workers), way(receiver)), receiver, MIDDLE, BATCH, workers)


@pytest.mark.parametrize("receiver", [*DATA_LOADERS, receivers.frame_loader], ids=way)
@pytest.mark.parametrize("batch_size", [unless(size, 32) for size in (1, 8, 32)])
def test_batch_size(row: Row, batch_size: int, receiver: Receiver) -> None:
    measure(row.named("batch size", str(batch_size), way(receiver)), receiver, MIDDLE, batch_size, WORKERS)


@pytest.mark.parametrize("receiver", [*DATA_LOADERS, receivers.frame_loader], ids=way)
@pytest.mark.parametrize("producers", [unless(count, None) for count in (1, 2, 4)])
def test_batches_by_producers(row: Row, producers: int, receiver: Receiver) -> None:
    row.named("producers, batches of 8", str(producers), way(receiver))
    measure(row, receiver, MIDDLE, BATCH, WORKERS, producers=producers)
