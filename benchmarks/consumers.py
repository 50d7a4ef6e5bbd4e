"""Several consumers of one producer's stream, each a process of its own, as programs that train are.

Each notes which frames it received and when, and compares some of the pictures; :meth:`Consumers.finish` checks the rest.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils import data

from torch_side import RemoteIterableDataset

from . import producer
from .receivers import ENDLESS, PATIENCE_S, PickledMessages, Shape, launch

COMPARE_EVERY = 64
"""So many frames of a consumer: few enough to notice a wrong picture, enough not to be what is measured."""
GRACE_NS = 100_000_000
"""For frames that one consumer passes over because another one is just about to take them."""


class Received:
    """What one consumer received, in its order: numbers of frames, and when each was sent and received, in ns."""

    def __init__(self, frameids: bytes, sent_ns: bytes, received_ns: bytes) -> None:
        self.frameids, self.sent_ns, self.received_ns = (
            np.frombuffer(values, np.int64) for values in (frameids, sent_ns, received_ns)
        )


class Consumers:
    """Running; :meth:`finish` ends them."""

    def __init__(self, processes: list[Any], pipes: list[Any], last_ns: Any) -> None:
        self._processes = processes
        self._pipes = pipes
        self._last_ns = last_ns

    def finish(self) -> list[Received]:
        """What each received. Every frame sent until now must have reached exactly one of them, in whatever order."""
        end_ns = time.monotonic_ns()
        self._last_ns.value = end_ns + GRACE_NS
        all_received = []
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if not pipe.poll(PATIENCE_S):
                raise TimeoutError(f"A consumer has not ended in {PATIENCE_S} s.")
            try:
                all_received.append(Received(*pipe.recv()))
            except EOFError:
                raise RuntimeError("A consumer has failed; its traceback is on stderr.") from None
            process.join(PATIENCE_S)
        frameids = np.concatenate([received.frameids for received in all_received])
        sent_ns = np.concatenate([received.sent_ns for received in all_received])
        count = int(frameids[sent_ns > end_ns].min())  # this frame was the first one after the end
        different = np.unique(frameids)
        if len(different) != len(frameids) or not np.array_equal(different[:count], np.arange(count)):
            missing = np.setdiff1d(np.arange(count), different)
            raise AssertionError(
                f"Of {count} frames, {len(missing)} are missing; {len(frameids) - len(different)} came twice."
            )
        return all_received


@contextlib.contextmanager
def ring(shape: Shape, held_s: list[float], **options: Any) -> Iterator[Consumers]:
    """Tensors in the ring's slots.

    Args:
        shape: of a picture.
        held_s: of each consumer, how long it keeps a frame before it asks for the next.
        **options: of the producer.
    """
    with launch("ring", shape, **options) as launcher:
        dataset = RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=ENDLESS)
        with consumers(dataset, shape, held_s) as started:
            yield started


@contextlib.contextmanager
def pickle_over_tcp(shape: Shape, held_s: list[float], **options: Any) -> Iterator[Consumers]:
    """blendtorch's way."""
    with launch("pickle", shape, **options) as launcher:
        dataset = PickledMessages([str(a) for a in launcher.launch_info.addresses["DATA"]])
        with consumers(dataset, shape, held_s) as started:
            yield started


Receiver = Callable[..., contextlib.AbstractContextManager[Consumers]]


@contextlib.contextmanager
def consumers(dataset: data.IterableDataset[Any], shape: Shape, held_s: list[float]) -> Iterator[Consumers]:
    """Each has its first frame, and they are let go together."""
    context = multiprocessing.get_context("fork")  # as DataLoaders do; none has to import torch again
    last_ns = context.RawValue("q", 2**62)
    have_first = context.Barrier(len(held_s) + 1)
    pipes, processes = [], []
    try:
        for held in held_s:
            here, there = context.Pipe(duplex=False)
            arguments = (dataset, shape, held, have_first, last_ns, there)
            process = context.Process(target=consume, args=arguments, daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        have_first.wait(PATIENCE_S)
        yield Consumers(processes, pipes, last_ns)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(PATIENCE_S)
            process.kill()


def consume(
    dataset: data.IterableDataset[Any], shape: Shape, held_s: float, have_first: Any, last_ns: Any, pipe: Any
) -> None:
    """Receive until there comes a frame that was sent after `last_ns`."""
    expected = next(producer.messages(shape))["image"]
    frameids, sent, received = array("q"), array("q"), array("q")
    for item in dataset:
        now_ns = time.monotonic_ns()
        frameid, sent_ns = item["frameid"], item["sent_ns"]
        if len(frameids) % COMPARE_EVERY == 0:
            expected.flat[0] = frameid % 251
            if not np.array_equal(np.asarray(item["image"]), expected):
                raise AssertionError(f"Frame {frameid} is another picture than was sent.")
        frameids.append(frameid)
        sent.append(sent_ns)
        received.append(now_ns)
        if len(frameids) == 1:
            have_first.wait(PATIENCE_S)
        if sent_ns > last_ns.value:
            break
        if held_s:
            time.sleep(held_s)
    pipe.send([values.tobytes() for values in (frameids, sent, received)])
