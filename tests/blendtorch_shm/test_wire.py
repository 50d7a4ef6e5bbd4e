"""What another process may write is checked before it is believed."""

import pickle
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as npst

from blendtorch_shm.errors import PublishError, WireError
from blendtorch_shm.memory.layout import VERSION
from blendtorch_shm.message.wire import copy_arrays, decode, encode_header, take_apart


def travel(fields: dict[str, Any], *, trusted: bool = True) -> dict[str, Any]:
    """Encode and decode, as a transport would."""
    parts = take_apart(fields, trusted=trusted)
    payload = np.zeros(parts.nbytes, np.uint8)
    copy_arrays(parts, payload)
    message = decode(encode_header(3, parts), payload, trusted=trusted)
    assert message.sequence == 3
    return message.fields


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
arrays = npst.arrays(
    npst.scalar_dtypes(),
    npst.array_shapes(min_dims=0, max_dims=3, max_side=20),
)
values = st.recursive(
    plain | arrays,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=8), values, max_size=5))
def test_whatever_is_published_arrives_the_same(fields: dict[str, Any]) -> None:
    np.testing.assert_equal(travel(fields), fields)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_an_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data, np.zeros(100, np.uint8), trusted=False)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_header_is_an_error_or_a_message_within_its_bytes(data: st.DataObject) -> None:
    parts = take_apart({"a": np.zeros((40, 30, 3), np.uint8), "b": [np.arange(5), (1, "x")], "c": 5}, trusted=False)
    header = bytearray(encode_header(0, parts))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    payload = np.zeros(parts.nbytes, np.uint8)
    try:
        fields = decode(bytes(header), payload, trusted=False).fields
    except WireError:
        return
    for value in fields.values():
        if isinstance(value, np.ndarray) and value.nbytes > 2048:
            assert np.shares_memory(value, payload) or value.nbytes <= parts.nbytes


@pytest.mark.parametrize(
    ("dtype", "shape", "offset"),
    [
        ("|u1", [10, 11], 0),
        ("|u1", [10], 91),
        ("|u1", [-1, 10], 0),
        ("|u1", [2**62, 2**62], 0),
        ("|u1", [2**40], 0),
        ("|O", [1], 0),
        ("<f9", [1], 0),
        ("[('a', '|u1')]", [1], 0),
        ('[["a","|O"]]', [1], 0),
        ("__import__('os')", [1], 0),
        ("[" * 1000, [1], 0),
        ("|u1", [1] * 100, 0),
        ("<f8", [1.5], 0),
        ("|u1", [10], -5),
    ],
)
def test_an_array_that_cannot_be_is_an_error(dtype: str, shape: list[Any], offset: int) -> None:
    header = msgspec.msgpack.encode([VERSION, 0, [["a", dtype, shape, offset]], {"a": None}])
    with pytest.raises(WireError):
        decode(header, np.zeros(100, np.uint8), trusted=True)


@pytest.mark.parametrize("stands_there", [10**11, None, "text", [1]])
def test_a_small_array_without_bytes_is_an_error_and_costs_no_memory(stands_there: Any) -> None:
    header = msgspec.msgpack.encode([VERSION, 0, [["a", "|u1", [10], -1]], {"a": stands_there}])
    with pytest.raises(WireError):
        decode(header, np.zeros(0, np.uint8), trusted=False)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle from an untrusted connection was executed",)


def test_a_pickle_from_an_untrusted_connection_is_not_executed() -> None:
    bomb = msgspec.msgpack.Ext(6, pickle.dumps(Bomb()))
    deep = msgspec.msgpack.Ext(3, msgspec.msgpack.encode([bomb]))
    for value in (bomb, [bomb], {"x": bomb}, deep):
        header = msgspec.msgpack.encode([VERSION, 0, [], {"a": value}])
        with pytest.raises(WireError, match="pickle"):
            decode(header, np.zeros(0, np.uint8), trusted=False)


def test_another_version_is_an_error_that_says_so() -> None:
    with pytest.raises(WireError, match="same version"):
        decode(msgspec.msgpack.encode([99, 0, [], {}]), np.zeros(0, np.uint8), trusted=True)


def test_small_arrays_do_not_keep_the_payload() -> None:
    fields = {"image": np.zeros(5000, np.uint8), "label": np.arange(4), "list": [np.arange(3.0)]}
    parts = take_apart(fields, trusted=True)
    assert [array.nbytes for array in parts.large] == [5000]
    np.testing.assert_equal(travel(fields), fields)


def test_object_arrays_and_masked_arrays_need_trust() -> None:
    masked = np.ma.masked_array([1, 2], [True, False])
    fields = {"objects": np.array([{"a": 1}, None]), "masked": masked}
    received = travel(fields)
    assert received["objects"][0] == {"a": 1}
    assert received["masked"].mask.tolist() == [True, False]
    for key, value in fields.items():
        with pytest.raises(PublishError, match=key):
            take_apart({key: value}, trusted=False)
