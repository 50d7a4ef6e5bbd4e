"""Single messages, to one consumer without workers: every way, for each size of picture, number of producers and of arrays."""

from __future__ import annotations

import math

import pytest

from . import receivers
from .conftest import Row
from .receivers import Receiver, Shape, name

MIDDLE = (480, 640, 3)
SHAPES = [(64, 64, 3), MIDDLE, (1080, 1920, 4), (2160, 3840, 4)]
WAYS = [
    receivers.pickle_over_tcp,
    receivers.parts_over_ipc,
    receivers.torch_queue,
    receivers.spdl_arena,
    receivers.iceoryx2,
    receivers.ring,
]


def way(receiver: Receiver) -> str:
    return receiver.__name__


def unless(value: object, short: object, text: str | None = None) -> object:
    """A parameter that only the long suite has, unless it is `short`."""
    return pytest.param(value, id=text or str(value), marks=[] if value == short else pytest.mark.long)


# One way after the other for each size: ratios are for the same minute.
@pytest.mark.parametrize("receiver", [*WAYS, receivers.tcp, receivers.tcp_with_keys, receivers.memcpy], ids=way)
@pytest.mark.parametrize("shape", [unless(shape, MIDDLE, name(shape)) for shape in SHAPES])
def test_size(row: Row, shape: Shape, receiver: Receiver) -> None:
    with receiver(shape) as receive:
        row.named("frame size", name(shape), way(receiver)).time_messages(receive, math.prod(shape))


@pytest.mark.parametrize("receiver", [receivers.pickle_over_tcp, receivers.ring], ids=way)
@pytest.mark.parametrize("producers", [unless(count, 4) for count in (1, 2, 4)])
def test_producers(row: Row, producers: int, receiver: Receiver) -> None:
    with receiver(MIDDLE, producers=producers) as receive:
        row.named("producers", str(producers), way(receiver)).time_messages(receive, math.prod(MIDDLE))


@pytest.mark.parametrize("receiver", [receivers.pickle_over_tcp, receivers.parts_over_ipc, receivers.ring], ids=way)
@pytest.mark.parametrize("fields", [unless(count, 8) for count in (1, 2, 4, 8)])
def test_fields(row: Row, fields: int, receiver: Receiver) -> None:
    with receiver(MIDDLE, fields=fields) as receive:
        row.named("fields", str(fields), way(receiver)).time_messages(receive, math.prod(MIDDLE))
