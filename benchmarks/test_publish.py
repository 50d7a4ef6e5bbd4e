"""What publishing costs the producer, when the picture was rendered into the slot and when it has to be copied there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from blendtorch_shm.launch.address import Address
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.producer import Sink
from blendtorch_shm.transport import open_sink, open_source

from .conftest import Row
from .receivers import Shape, name
from .test_frames import SHAPES


@pytest.fixture
def ends() -> Iterator[tuple[Sink, Source]]:
    directory = LaunchDirectory().create()
    address = Address("tcp://127.0.0.1:*", directory.twin("DATA", 0))
    sink, source = open_sink(address), open_source([address])
    yield sink, source
    source.close()
    sink.close()
    directory.remove()


@pytest.mark.parametrize("how", ["copied", "rendered into the slot", "the same, for a consumer that sleeps"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_publish(row: Row, ends: tuple[Sink, Source], shape: Shape, how: str) -> None:
    sink, source = ends
    row.named("publishing", name(shape), how)
    sink.publish({"image": np.zeros(shape, np.uint8)})
    elsewhere = np.zeros(shape, np.uint8)

    def prepare() -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the previous message away, and render the next picture."""
        assert source.receive(10) is not None
        if "sleeps" in how:
            assert source._inbox is not None
            source._inbox.read()
            source._streams[0].say_asleep(time.monotonic_ns())
        image = elsewhere if how == "copied" else sink.lend(shape, np.uint8)
        assert image is not None
        image[...] = 1
        return (image,), {}

    def publish(image: np.ndarray[Any, Any]) -> None:
        sink.publish({"btid": 0, "image": image, "frameid": 1})

    row.benchmark.pedantic(publish, setup=prepare, rounds=20 if row.short else 200)
    if row.benchmark.stats is not None:
        row.note(median_us=row.benchmark.stats.stats.median * 1e6)
    message = source.receive(10)
    assert message is not None
    assert (message.fields["image"] == 1).all()
