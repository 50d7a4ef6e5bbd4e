"""Bytes from another process are understood or refused: no other error, no crash, and no more memory than they are worth."""

import logging
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings

from blendtorch_shm.errors import ConfigurationError, SegmentError, WireError
from blendtorch_shm.launch.address import Twin, beacon_path, streams_path
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.launch.keys import ClientKeys
from blendtorch_shm.memory.layout import ASLEEP_OFFSET
from blendtorch_shm.message.dtypes import dtype_name, dtype_of
from blendtorch_shm.message.wire import Decoder
from blendtorch_shm.stream.consumer import Consumer
from blendtorch_shm.stream.control import Control
from blendtorch_shm.stream.place import PrivatePlace
from blendtorch_shm.stream.producer import Producer
from blendtorch_shm.stream.rings import Rings

from .targets import TARGETS, forged_header

CONSTANT_NBYTES = 4_000_000
TIMES = 500
"""An empty list is one byte of msgpack, and about a hundred of Python's memory; a field of a dtype takes more."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("blendtorch")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(level)


def peak_nbytes(run: Any, *args: Any) -> int:
    """Memory that `run` takes meanwhile."""
    tracemalloc.start()
    try:
        run(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_and_known_bad_ones_are_understood_or_refused(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_inputs_that_are_nearly_right_are_understood_or_refused(name: str, data: st.DataObject) -> None:
    target = TARGETS[name]
    mutated = data.draw(st.sampled_from(target.seeds))
    random = Random(data.draw(st.integers(0, 2**32)))
    for _ in range(data.draw(st.integers(1, 5))):
        mutated = target.mutate(mutated, random)
    assert peak_nbytes(target.run, mutated) <= CONSTANT_NBYTES + TIMES * len(mutated)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=300))
def test_random_bytes_are_understood_or_refused(name: str, data: bytes) -> None:
    assert peak_nbytes(TARGETS[name].run, data) <= CONSTANT_NBYTES


def decode(header: bytes, payload_nbytes: int) -> dict[str, Any]:
    return Decoder(trusted=False).decode(header, np.zeros(payload_nbytes, np.uint8))


@pytest.mark.parametrize(
    ("specs", "offsets", "fields"),
    [
        ([[None, "<f8", [12_500], True]] * 1000, [1] * 1000, {}),
        ([["a", "|u1", [100_000], True]] * 1000, [0] * 1000, {}),
        ([["", "|u1", [100_000], False]] * 1000, [], {"": bytes(100_000)}),
        ([["a", "|u1", [2**63 - 1] * 100_000, True]], [0], {}),
        ([["a", "[" + "1+" * 100_000 + "1]", [1], True]], [0], {}),
    ],
    ids=["unaligned copies", "overlapping", "one small array many times", "many dimensions", "a long dtype"],
)
def test_a_message_cannot_ask_for_more_memory_than_it_has_bytes(
    specs: list[Any], offsets: list[int], fields: dict[str, Any]
) -> None:
    data = forged_header(specs, offsets, fields)

    def refuse() -> None:
        with pytest.raises(WireError):
            decode(data, 100_008)

    assert peak_nbytes(refuse) < 20_000_000  # it is tried twice


def test_the_number_of_an_array_that_is_not_there_is_refused() -> None:
    reference = msgspec.msgpack.Ext(1, b"\0")
    key = msgspec.msgpack.Ext(5, msgspec.msgpack.encode([[reference, 0]]))
    deep = [[None, "|u1", [4], True]]
    field = [["b", "|u1", [4], True]]
    for specs, value in ([], reference), ([], [[reference]]), (deep, key), (field, reference):
        with pytest.raises(WireError):
            decode(forged_header(specs, [0] * len(specs), {"a": value}), 100)
    for number in (1, -1):
        with pytest.raises(WireError):
            decode(forged_header(deep, [0], {"a": msgspec.msgpack.Ext(1, msgspec.msgpack.encode(number))}), 100)


@pytest.mark.parametrize(
    "name",
    [
        "S0",
        "|V0",
        "<U0",
        '[["a","<f8",[0]]]',
        "V4294967297",
        "S99999999999",
        "M8[0s]",
        "M8[4294967296s]",
        "[('a', '<f4')]",
    ],
)
def test_a_dtype_with_a_number_that_numpy_cannot_take_does_not_travel(name: str) -> None:
    with pytest.raises(WireError):
        dtype_of(name)


def test_what_describes_a_dtype_is_never_more_than_a_reader_takes() -> None:
    assert dtype_name(np.dtype([(f"field {i}", "<f4") for i in range(1000)])) == ""
    assert dtype_name(np.dtype("V0")) == ""
    assert dtype_of(dtype_name(np.dtype([(f"field {i}", "<f4") for i in range(300)]))).itemsize == 1200


def test_a_text_beyond_unicode_is_refused() -> None:
    scalar = msgspec.msgpack.Ext(4, msgspec.msgpack.encode(["<U1", b"\xff\xff\xff\xff"]))
    with pytest.raises(WireError):
        decode(forged_header([], [], {"a": scalar}), 0)


def test_a_key_that_says_too_large_a_number_is_no_key() -> None:
    with pytest.raises(ConfigurationError, match="Z85"):
        ClientKeys("#" * 40, "#" * 40, "#" * 40)


@pytest.mark.parametrize("directory", ["/tmp/a\0b", "/tmp/\ud800"])
def test_a_path_that_cannot_be_is_refused(directory: str) -> None:
    with pytest.raises(ConfigurationError, match="directory"):
        Twin(directory, "00000000", "", "DATA", 0)


def test_a_pipe_in_place_of_a_beacon_is_not_waited_for() -> None:
    directory = LaunchDirectory().create()
    try:
        os.unlink(beacon_path(directory.launch))
        os.mkfifo(beacon_path(directory.launch))
        assert Path(streams_path(directory.launch)).is_dir()
        assert not directory.twin("DATA", 0).is_here()
    finally:
        directory.remove()


@pytest.fixture
def place() -> Iterator[PrivatePlace]:
    place = PrivatePlace()
    producer = Producer(place, trusted=True)
    producer.publish({"image": np.arange(9000)})
    yield place
    producer.close()


@pytest.mark.parametrize(("first", "following"), [(0, 2**64 - 1), (2**64 - 1, 0), (2**63, 2**64 - 1)])
def test_a_stream_that_claims_countless_rings_is_looked_through_quickly(
    place: PrivatePlace, first: int, following: int
) -> None:
    control = Control.attach(place)
    control.first_ring, control.next_ring = first, following
    consumer = Consumer(place)
    assert (consumer.take() is None) == (first > 0)
    consumer.close()


def test_a_ring_under_another_number_is_refused(place: PrivatePlace) -> None:
    place.create(".1", len(place.attach(".0").view)).view[:] = place.attach(".0").view
    control = Control.attach(place)
    control.next_ring = 2
    assert [ring.number for ring in Rings(place, control).now()] == [0]


def test_states_and_counters_that_cannot_be_are_survived(place: PrivatePlace) -> None:
    control = Control.attach(place)
    (ring,) = Rings(place, control).now()
    control.segment.view[ASLEEP_OFFSET:] = b"\xff" * (control.segment.nbytes - ASLEEP_OFFSET)
    ring._states[1:] = b"\7" * (ring.num_slots - 1)
    with pytest.raises(SegmentError, match="7 is not a valid State"):
        ring.info(1)
    consumer = Consumer(place)
    assert "1 hold messages" in consumer.explain()
    message = consumer.take()
    assert message is not None
    assert (message.fields["image"] == np.arange(9000)).all()
    del message
    consumer.close()
