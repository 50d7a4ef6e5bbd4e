"""One producer, one consumer, no workers: blendtorch's way against the ring and our own TCP, in one run."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq

from blendtorch_shm.address import Address
from torch_side import BlenderLauncher, RemoteIterableDataset

from .conftest import Stream

PRODUCER = Path(__file__).parent / "producer.py"
SHAPES = [(64, 64, 3), (480, 640, 3), (1080, 1920, 4), (2160, 3840, 4)]


def launch(how: str, shape: tuple[int, ...], bind_addr: str = "127.0.0.1") -> BlenderLauncher:
    arguments = [how, *map(str, shape)]
    return BlenderLauncher(
        "", PRODUCER, 1, ["DATA"], bind_addr=bind_addr, instance_args=[arguments], blender="python", progress=False
    )


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_pickle_over_tcp(stream: Stream, shape: tuple[int, ...]) -> None:
    stream.benchmark.group = name(shape)
    with launch("pickle", shape) as launcher, zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.setsockopt(zmq.RCVHWM, 10)
        socket.setsockopt(zmq.RCVTIMEO, 60_000)
        socket.connect(str(launcher.launch_info.addresses["DATA"][0]))
        stream.measure(socket.recv_pyobj, math.prod(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_parts_over_ipc(stream: Stream, shape: tuple[int, ...]) -> None:
    """Pickle protocol 5 with the picture out of band."""
    stream.benchmark.group = name(shape)
    with launch("parts", shape) as launcher, zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.setsockopt(zmq.RCVHWM, 10)
        socket.setsockopt(zmq.RCVTIMEO, 60_000)
        socket.connect("ipc://@" + str(launcher.launch_info.addresses["DATA"][0]))

        def receive() -> dict[str, Any]:
            head, *buffers = socket.recv_multipart(copy=False)
            message: dict[str, Any] = pickle.loads(head.buffer, buffers=[part.buffer for part in buffers])
            return message

        stream.measure(receive, math.prod(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_ring(stream: Stream, shape: tuple[int, ...]) -> None:
    stream.benchmark.group = name(shape)
    with launch("ring", shape) as launcher:
        measure(stream, launcher.launch_info.addresses["DATA"], shape)


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("keys", [False, True], ids=["plain", "with_keys"])
def test_tcp(stream: Stream, shape: tuple[int, ...], keys: bool) -> None:
    """What a reader on another host does, over this host's own network."""
    stream.benchmark.group = name(shape)
    with launch("ring", shape, "primaryip" if keys else "127.0.0.1") as launcher:
        addresses = [Address(a, keys=a.keys) for a in launcher.launch_info.addresses["DATA"]]
        measure(stream, addresses, shape)


def measure(stream: Stream, addresses: Sequence[str], shape: tuple[int, ...]) -> None:
    messages = iter(RemoteIterableDataset(addresses, max_items=10**9))
    stream.measure(messages.__next__, math.prod(shape))
    del messages
