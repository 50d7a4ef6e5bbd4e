"""The receiving end of each way: what a training process would write to get messages that way, and nothing more.

Each is a context manager that starts the producers (producer.py) and yields a function that returns the next message.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import multiprocessing
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import zmq
from torch.utils import data

from torch_side import BlenderLauncher, FrameLoader, RemoteIterableDataset, pooled_collate

from . import producer

Shape = tuple[int, ...]
Receive = Callable[[], dict[str, Any]]
Receiver = Callable[..., contextlib.AbstractContextManager[Receive]]

ENDLESS = 10**9
children_pids: set[int] = set()
"""Producers that are no launcher's."""
PATIENCE_S = 60


def name(shape: Shape) -> str:
    return "x".join(map(str, shape))


def launch(
    way: str,
    shape: Shape,
    *,
    fields: int = 1,
    interval_s: float = 0.0,
    asked: str = "",
    producers: int = 1,
    bind_addr: str = "127.0.0.1",
    allow_unauthenticated: bool = False,
) -> BlenderLauncher:
    arguments = [way, *map(str, shape), "--fields", str(fields), "--interval", str(interval_s), "--asked", asked]
    return BlenderLauncher(
        "",
        Path(producer.__file__),
        producers,
        ["DATA"],
        bind_addr=bind_addr,
        allow_unauthenticated=allow_unauthenticated,
        instance_args=[arguments] * producers,
        blender="python",
        progress=False,
    )


def pull(context: zmq.Context[zmq.Socket[bytes]], endpoints: list[str]) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, producer.AHEAD)
    socket.setsockopt(zmq.RCVTIMEO, PATIENCE_S * 1000)
    for endpoint in endpoints:
        socket.connect(endpoint)
    return socket


@contextlib.contextmanager
def pulled(way: str, shape: Shape, prefix: str = "", **options: Any) -> Iterator[zmq.Socket[bytes]]:
    """A socket at which messages of producers of that way arrive."""
    with (
        launch(way, shape, **options) as launcher,
        zmq.Context() as context,
        pull(context, [prefix + str(a) for a in launcher.launch_info.addresses["DATA"]]) as socket,
    ):
        yield socket


@contextlib.contextmanager
def pickle_over_tcp(shape: Shape, **options: Any) -> Iterator[Receive]:
    """blendtorch's way."""
    with pulled("pickle", shape, **options) as socket:
        yield socket.recv_pyobj


@contextlib.contextmanager
def parts_over_ipc(shape: Shape, **options: Any) -> Iterator[Receive]:
    """Pickle protocol 5, the pictures out of band."""
    with pulled("parts", shape, "ipc://@", **options) as socket:

        def receive() -> dict[str, Any]:
            head, *buffers = socket.recv_multipart(copy=False)
            message: dict[str, Any] = pickle.loads(head.buffer, buffers=[part.buffer for part in buffers])
            return message

        yield receive


@contextlib.contextmanager
def memcpy_and_hop(shape: Shape, **options: Any) -> Iterator[Receive]:
    """What must be: the producer copies a picture, and sends a small message over ZeroMQ's ipc."""
    with pulled("hop", shape, "ipc://@", **options) as socket:

        def receive() -> dict[str, Any]:
            frameid, sent_ns = np.frombuffer(socket.recv(), producer.STAMP)[0].tolist()
            return {"frameid": frameid, "sent_ns": sent_ns}

        yield receive


@contextlib.contextmanager
def torch_queue(shape: Shape, **options: Any) -> Iterator[Receive]:
    """Each frame in shared memory of its own, whose file descriptor goes through the queue."""
    # Spawned: a forked child would wait for OpenMP's threads, which it lacks.
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue(producer.AHEAD)
    with child(context, put_tensors, queue, shape, options):
        yield lambda: queue.get(timeout=PATIENCE_S)


def put_tensors(queue: Any, shape: Shape, options: dict[str, Any]) -> None:
    queue.cancel_join_thread()
    for message in producer.messages(shape, **options):
        message["image"] = torch.from_numpy(message["image"]).share_memory_()  # this is the copy
        queue.put(message)


@contextlib.contextmanager
def spdl_arena(shape: Shape, **options: Any) -> Iterator[Receive]:
    """SPDL's pool of shared segments, which its pipelines send arrays through; its descriptors through a queue."""
    arenas = pytest.importorskip("spdl.pipeline._arena")
    try:
        pickle.Pickler(io.BytesIO()).persistent_id = lambda _: None  # type: ignore[method-assign]
    except AttributeError as error:  # Python 3.13.0
        pytest.skip(f"SPDL sets what cannot be set in this Python: {error}")
    pool = arenas.SharedMemorySegmentPool(segment_size=math.prod(shape) + 4096, count=producer.AHEAD)
    queue: Any = multiprocessing.Queue(producer.AHEAD)
    with child(multiprocessing, offload, queue, arenas._Arena(pool), shape, options):
        arena = arenas._Arena(pool)
        try:
            yield lambda: arena.restore(queue.get(timeout=PATIENCE_S))
        finally:
            pool.close()  # while there is a producer to be woken: without one, it would wait for that for ever
            pool.unlink()


def offload(queue: Any, arena: Any, shape: Shape, options: dict[str, Any]) -> None:
    for message in producer.messages(shape, **options):
        queue.put(arena.offload(message))


@contextlib.contextmanager
def child(context: Any, target: Callable[..., None], *args: Any) -> Iterator[None]:
    process = context.Process(target=end_in_order, args=(target, *args), daemon=True)
    process.start()
    assert process.pid is not None
    children_pids.add(process.pid)
    try:
        yield
    finally:
        process.terminate()
        process.join(PATIENCE_S)
        process.kill()
        children_pids.discard(process.pid)


def end_in_order(target: Callable[..., None], *args: Any) -> None:
    """Between two statements: torch, killed while it makes shared memory, leaves it behind."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    target(*args)


@contextlib.contextmanager
def iceoryx2(shape: Shape, **options: Any) -> Iterator[Receive]:
    """Waits for events; the picture is an array over the sample, which goes back with the next message."""
    iox = pytest.importorskip("iceoryx2")
    with launch("iceoryx2", shape, **options) as launcher:
        _node, samples, events, connected = producer.iceoryx2_services(str(launcher.launch_info.addresses["DATA"][0]))
        subscriber = samples.subscriber_builder().buffer_size(producer.AHEAD).create()
        listener = events.listener_builder().create()
        answerer = connected.notifier_builder().create()
        patience = iox.Duration.from_secs(PATIENCE_S)
        held: Any = None

        def receive() -> dict[str, Any]:
            nonlocal held
            frameid = producer.NOT_COUNTED
            while frameid == producer.NOT_COUNTED:
                held = None  # by reference counting, what Python holds of the sample before
                while (sample := subscriber.receive()) is None:
                    began = time.monotonic()
                    if not listener.timed_wait(patience) and time.monotonic() - began >= PATIENCE_S:
                        raise TimeoutError(f"iceoryx2: nothing in {PATIENCE_S} s")
                held = sample
                memory = np.frombuffer(sample.payload().as_memory_view(), np.uint8)
                stamp = memory[: producer.STAMP.itemsize].view(producer.STAMP)[0]
                frameid = int(stamp["frameid"])
                if frameid == producer.NOT_COUNTED:
                    answerer.notify()
            image = memory[producer.STAMP.itemsize :].reshape(shape)
            return {"image": image, "frameid": frameid, "sent_ns": int(stamp["sent_ns"])}

        yield receive
        held = None


@contextlib.contextmanager
def ring(shape: Shape, **options: Any) -> Iterator[Receive]:
    with launch("ring", shape, **options) as launcher:
        yield from _dataset(launcher.launch_info.addresses["DATA"])


@contextlib.contextmanager
def tcp(shape: Shape, **options: Any) -> Iterator[Receive]:
    """What a reader on another host does, over this host's own network."""
    with launch("ring", shape, **options, allow_unauthenticated=True) as launcher:
        yield from _dataset([a.elsewhere() for a in launcher.launch_info.addresses["DATA"]])


@contextlib.contextmanager
def tcp_with_keys(shape: Shape, **options: Any) -> Iterator[Receive]:
    """The same with CURVE, as it is unless somebody asks for something else."""
    with launch("ring", shape, **options, bind_addr="primaryip") as launcher:
        yield from _dataset([a.elsewhere() for a in launcher.launch_info.addresses["DATA"]])


def _dataset(addresses: Any) -> Iterator[Receive]:
    messages = iter(RemoteIterableDataset(addresses, max_items=ENDLESS))
    yield messages.__next__
    messages.close()  # type: ignore[attr-defined]


@contextlib.contextmanager
def memcpy(shape: Shape) -> Iterator[Receive]:
    """The limit of the machine: one thread copies a picture into eight slots in turn, and nobody is told."""
    image = np.zeros(shape, np.uint8)
    slots = np.ones((8, *shape), np.uint8)
    frameid = 0

    def copy() -> dict[str, Any]:
        nonlocal frameid
        frameid += 1
        np.copyto(slots[frameid % len(slots)], image)
        return {"frameid": frameid}

    yield copy


# -- batches -----------------------------------------------------------------------------------------------------------


class PickledMessages(data.IterableDataset[Any]):
    """As blendtorch 0.4 receives them."""

    def __init__(self, addresses: list[str]) -> None:
        self._addresses = addresses

    def __iter__(self) -> Iterator[Any]:
        with zmq.Context() as context, pull(context, self._addresses) as socket:
            while True:
                yield socket.recv_pyobj()


class ReadyTensors(data.IterableDataset[Any]):
    """The limit of a DataLoader: the same frame again and again, there already."""

    def __init__(self, shape: Shape) -> None:
        self._image = torch.zeros(shape, dtype=torch.uint8)

    def __iter__(self) -> Iterator[Any]:
        worker = data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for frameid in itertools.count(first, step):
            yield {"image": self._image, "frameid": frameid}


def data_loader(dataset: data.IterableDataset[Any], batch_size: int, workers: int, **options: Any) -> Receive:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises against more workers than cores
        return iter(data.DataLoader(dataset, batch_size=batch_size, num_workers=workers, **options)).__next__


@contextlib.contextmanager
def data_loader_pickle(shape: Shape, batch_size: int, workers: int, **options: Any) -> Iterator[Receive]:
    """blendtorch's way."""
    with launch("pickle", shape, **options) as launcher:
        addresses = [str(a) for a in launcher.launch_info.addresses["DATA"]]
        yield data_loader(PickledMessages(addresses), batch_size, workers)


@contextlib.contextmanager
def data_loader_ring(
    shape: Shape, batch_size: int, workers: int, collate_fn: Any = None, **options: Any
) -> Iterator[Receive]:
    with launch("ring", shape, **options) as launcher:
        dataset = RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=ENDLESS)
        yield data_loader(dataset, batch_size, workers, collate_fn=collate_fn)


def data_loader_ring_pooled(
    shape: Shape, batch_size: int, workers: int, **options: Any
) -> contextlib.AbstractContextManager[Receive]:
    return data_loader_ring(shape, batch_size, workers, pooled_collate, **options)


@contextlib.contextmanager
def data_loader_alone(shape: Shape, batch_size: int, workers: int) -> Iterator[Receive]:
    yield data_loader(ReadyTensors(shape), batch_size, workers)


@contextlib.contextmanager
def frame_loader(shape: Shape, batch_size: int, **options: Any) -> Iterator[Receive]:
    """With one thread that copies, so that its CPU time can be told from the rest."""
    with launch("ring", shape, **options) as launcher:
        batches = iter(FrameLoader(launcher.launch_info.addresses["DATA"], batch_size, copy_threads=1))
        yield batches.__next__
        batches.close()  # type: ignore[attr-defined]
