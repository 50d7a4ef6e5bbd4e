"""What another process may write is checked before it is believed."""

import functools
import pickle
import struct
import sys
import weakref
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as npst

from blendtorch_shm.errors import PublishError, WireError
from blendtorch_shm.memory.layout import VERSION
from blendtorch_shm.message.wire import Decoder, Encoder


def travel(fields: dict[str, Any], *, trusted: bool = True) -> dict[str, Any]:
    """Encode and decode, as a transport would."""
    return carry(Encoder(trusted=trusted), Decoder(trusted=trusted), fields)


def carry(encoder: Encoder, decoder: Decoder, fields: dict[str, Any]) -> dict[str, Any]:
    """The same from and to those who may remember the message before."""
    parts = encoder.take_apart(fields)
    payload = np.zeros(parts.nbytes, np.uint8)
    parts.copy_into(payload)
    header = parts.header()
    assert len(header) == parts.header_nbytes
    return decoder.decode(header, payload)


def decode(header: bytes, payload: np.ndarray[Any, Any], *, trusted: bool) -> dict[str, Any]:
    return Decoder(trusted=trusted).decode(header, payload)


def header_of(specs: list[Any], offsets: list[int], fields: dict[str, Any], version: int = VERSION) -> bytes:
    """A header by hand."""
    encoded = msgspec.msgpack.encode(specs)
    prefix = struct.pack("<II", version, len(encoded))
    return prefix + encoded + struct.pack(f"<{len(offsets)}Q", *offsets) + msgspec.msgpack.encode(fields)


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
    large = np.zeros((40, 30, 3), np.uint8)
    fields = {"a": large, "b": [np.arange(5), (1, "x"), np.zeros(300)], "c": 5, "d": np.arange(3)}
    parts = Encoder(trusted=False).take_apart(fields)
    header = bytearray(parts.header())
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    payload = np.zeros(parts.nbytes, np.uint8)
    decoder = Decoder(trusted=False)
    if data.draw(st.booleans()):
        decoder.decode(parts.header(), payload)
    try:
        fields = decoder.decode(bytes(header), payload)
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
        ("|u1", [10], 2**64 - 5),
        ("|u1", [10], 2**63),
    ],
)
def test_an_array_that_cannot_be_is_an_error(dtype: str, shape: list[Any], offset: int) -> None:
    for key in ("a", None):
        header = header_of([[key, dtype, shape, True]], [offset], {"a": None})
        with pytest.raises(WireError):
            decode(header, np.zeros(100, np.uint8), trusted=True)


@pytest.mark.parametrize("stands_there", [10**11, None, "text", [1], bytes(9), bytes(11)])
def test_a_small_array_without_bytes_is_an_error_and_costs_no_memory(stands_there: Any) -> None:
    header = header_of([["a", "|u1", [10], False]], [], {"a": stands_there})
    with pytest.raises(WireError):
        decode(header, np.zeros(0, np.uint8), trusted=False)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle from an untrusted connection was executed",)


def test_a_pickle_from_an_untrusted_connection_is_not_executed() -> None:
    bomb = msgspec.msgpack.Ext(6, pickle.dumps(Bomb()))
    deep = msgspec.msgpack.Ext(3, msgspec.msgpack.encode([bomb]))
    for value in (bomb, [bomb], {"x": bomb}, deep):
        header = header_of([], [], {"a": value})
        with pytest.raises(WireError, match="pickle"):
            decode(header, np.zeros(0, np.uint8), trusted=False)


@pytest.fixture
def in_main(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class and a function as the script that runs defines them."""

    class Pose:
        pass

    def adjust() -> None:
        pass

    for found in (Pose, adjust):
        found.__module__, found.__qualname__ = "__main__", found.__name__
        monkeypatch.setattr(sys.modules["__main__"], found.__name__, found, raising=False)
    return SimpleNamespace(Pose=Pose, adjust=adjust)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("Pose", lambda main: main.Pose()),
        ("Pose", lambda main: main.Pose),
        ("Pose", lambda main: {"deep": [{main.Pose()}]}),
        ("Pose", lambda main: ("__main__", {"__main__": {1}}, np.array([None, main.Pose()]))),
        ("adjust", lambda main: main.adjust),
        ("adjust", lambda main: functools.partial(print, main.adjust)),
    ],
)
def test_what_only_the_script_defines_is_an_error_that_names_it(
    in_main: Any, name: str, make: Callable[[Any], Any]
) -> None:
    with pytest.raises(PublishError, match=rf"publish\(pose=\.\.\.\).*'{name}' is defined in the script.*a module"):
        Encoder(trusted=True).take_apart({"ok": 1, "pose": make(in_main)})


def test_the_name_of_the_script_is_a_text_like_any_other(in_main: Any) -> None:
    fields = {"a": {"__main__", "Pose"}, "b": Path("__main__"), "c": {"__main__", 1, Path("Pose")}}
    assert travel(fields) == fields


def test_an_object_that_cannot_be_made_here_is_an_error_that_names_its_field_and_what_is_missing() -> None:
    fields = {"i": 1, "image": np.zeros(5000), "meta": {"deep": [np.zeros(5000), (Missing("no_such_module"),)]}}
    parts = Encoder(trusted=True).take_apart(fields)
    with pytest.raises(WireError, match=r"Field 'meta'.*the module 'no_such_module'.*pip install no_such_module"):
        decode(parts.header(), np.zeros(parts.nbytes, np.uint8), trusted=True)


class Missing:
    """Needs a module where it is unpickled."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.module,)


def test_another_version_is_an_error_that_says_so() -> None:
    with pytest.raises(WireError, match=f"wire format 99, this program understands {VERSION}.*same version"):
        decode(header_of([], [], {}, version=99), np.zeros(0, np.uint8), trusted=True)


def test_small_arrays_do_not_keep_the_payload() -> None:
    fields = {"image": np.zeros(5000, np.uint8), "label": np.arange(4), "list": [np.arange(3.0)]}
    parts = Encoder(trusted=True).take_apart(fields)
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
            Encoder(trusted=False).take_apart({key: value})


def test_a_header_is_byte_for_byte_as_documented() -> None:
    fields = {"image": np.zeros((50, 60), "<f4"), "xy": np.array([1, 2], "<i2"), "frame": 3}
    parts = Encoder(trusted=False).take_apart(fields)
    parts.place({}, 100)
    assert parts.header() == (
        b"\x06\0\0\0" + b"\x1b\0\0\0"
        b"\x92" + b"\x94\xa5image\xa3<f4\x92\x32\x3c\xc3" + b"\x94\xa2xy\xa3<i2\x91\x02\xc2"
        b"\x80\0\0\0\0\0\0\0"
        b"\x83" + b"\xa5image\xc0" + b"\xa2xy\xc4\x04\1\0\2\0" + b"\xa5frame\x03"
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=2), values, max_size=3), min_size=2, max_size=5), st.data())
def test_messages_of_one_form_and_of_others_follow_each_other(
    messages: list[dict[str, Any]], data: st.DataObject
) -> None:
    encoder, decoder = Encoder(trusted=True), Decoder(trusted=True)
    for _ in range(8):
        fields = data.draw(st.sampled_from(messages))
        np.testing.assert_equal(carry(encoder, decoder, fields), fields)


def test_values_change_from_message_to_message_of_one_form() -> None:
    encoder, decoder = Encoder(trusted=True), Decoder(trusted=True)
    kept = []
    for i in range(3):
        fields = {"image": np.full(5000, i, np.uint8), "deep": [np.full(300, i / 2)], "label": np.array([i]), "i": i}
        kept.append((carry(encoder, decoder, fields), fields))
    for received, fields in kept:
        np.testing.assert_equal(received, fields)


def test_the_form_of_the_last_message_excuses_no_other_error() -> None:
    decoder = Decoder(trusted=False)
    specs = [["a", "|u1", [90], True], [None, "|u1", [5], True], ["s", "|u1", [3], False]]
    reference = msgspec.msgpack.Ext(1, b"\0")
    good = {"a": None, "s": b"123", "x": reference}
    payload = np.arange(100, dtype=np.uint8)
    first = decoder.decode(header_of(specs, [0, 90], good), payload)
    assert [first["a"][-1], first["s"][-1], first["x"][-1]] == [89, ord("3"), 94]
    valid = header_of(specs, [0, 90], good)
    for wrong, size in (
        (header_of(specs, [11, 90], good), 100),
        (header_of(specs, [0, 96], good), 100),
        (header_of(specs, [2**64 - 1, 90], good), 100),
        (header_of(specs, [0], good), 100),
        (header_of(specs, [0, 90], good), 94),
        (header_of(specs, [0, 90], good | {"s": b"12"}), 100),
        (header_of(specs, [0, 90], good | {"s": None}), 100),
        (header_of(specs, [0, 90], good | {"x": msgspec.msgpack.Ext(1, b"\1")}), 100),
        (header_of(specs, [0, 90], good | {"x": msgspec.msgpack.Ext(6, pickle.dumps(Bomb()))}), 100),
        (header_of(specs, [0, 90], good, version=VERSION + 1), 100),
        (valid[:-1], 100),
        (valid + b"\0", 100),
        (header_of([], [], {"x": reference}), 100),
    ):
        with pytest.raises(WireError):
            decoder.decode(wrong, payload[:size])
    again = decoder.decode(valid, payload)
    np.testing.assert_equal(again, first)


def test_arrays_that_lie_in_place_are_not_copied_and_the_others_lie_behind_them() -> None:
    payload = np.zeros(20_000, np.uint8)
    lent = payload[128:5128]
    lent[:] = 7
    parts = Encoder(trusted=True).take_apart(
        {"a": np.full(3000, 1, np.uint8), "b": lent, "c": [np.full(4000, 2, np.uint8)]}
    )
    parts.place({1: 128}, 5128)
    assert parts.offsets == [5184, 128, 8192]
    assert parts.nbytes == 8192 + 4000
    lent[:] = 8  # as nobody may, but now it shows
    parts.copy_into(payload)
    received = Decoder(trusted=True).decode(parts.header(), payload[: parts.nbytes])
    np.testing.assert_equal(
        received, {"a": np.full(3000, 1, np.uint8), "b": np.full(5000, 8, np.uint8), "c": [np.full(4000, 2, np.uint8)]}
    )
    assert np.shares_memory(received["b"], payload)


def test_an_array_that_is_not_aligned_is_copied() -> None:
    payload = np.zeros(100, np.uint8)
    payload[3:11] = np.array([2.5]).view(np.uint8)
    for key, fields in (("a", {"a": None}), (None, {"a": msgspec.msgpack.Ext(1, b"\0")})):
        array = decode(header_of([[key, "<f8", [1], True]], [3], fields), payload, trusted=False)["a"]
        assert array.tolist() == [2.5]
        assert array.flags.aligned
        assert not np.shares_memory(array, payload)


def test_a_decoder_keeps_no_array() -> None:
    payload = np.zeros(10_000, np.uint8)
    root = weakref.ref(payload)
    parts = Encoder(trusted=True).take_apart({"a": np.zeros(3000, np.uint8), "b": [np.zeros(400)]})
    decoder = Decoder(trusted=True)
    fields = decoder.decode(parts.header(), payload)
    del payload
    assert root() is not None
    del fields
    assert root() is None


def test_a_text_that_is_no_unicode_is_a_publish_error() -> None:
    for fields in ({"a": "\ud800"}, {"\ud800": 1}, {"\ud800": np.zeros(3)}, {"a": ("\ud800",)}, {"a": {1: "\ud800"}}):
        with pytest.raises(PublishError, match="cannot be sent"):
            Encoder(trusted=True).take_apart(fields)
