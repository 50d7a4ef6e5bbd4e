"""One producer, one consumer, no workers: blendtorch's way against the ring, in one run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import zmq

from torch_side import BlenderLauncher, RemoteIterableDataset

from .conftest import Stream

PRODUCER = Path(__file__).parent / "producer.py"
SHAPES = [(64, 64, 3), (480, 640, 3), (1080, 1920, 4), (2160, 3840, 4)]


def launch(how: str, shape: tuple[int, ...]) -> BlenderLauncher:
    arguments = [how, *map(str, shape)]
    return BlenderLauncher("", PRODUCER, 1, ["DATA"], instance_args=[arguments], blender="python", progress=False)


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
def test_ring(stream: Stream, shape: tuple[int, ...]) -> None:
    stream.benchmark.group = name(shape)
    with launch("ring", shape) as launcher:
        messages = iter(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=10**9))

        stream.measure(messages.__next__, math.prod(shape))
        del messages
