"""Consecutive frames in one message: nothing is lost, nothing is copied that was rendered into place, and nothing is torn."""

import contextlib
import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendtorch_shm.errors import BlendtorchError, ConfigurationError, PublishError, StreamClosed
from blendtorch_shm.stream import clip
from blendtorch_shm.stream.clip import ClipSink
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.producer import Producer
from blendtorch_shm.transport.local import LocalStream

from ..interruption import runs_with_a_switch
from .conftest import Transport

PATIENCE_S = 20.0
SHAPE = (48, 64, 3)


def receive(source: Source) -> dict[str, Any]:
    message = source.receive(PATIENCE_S)
    assert message is not None, "no message arrived"
    return message.fields


def clips_over(transport: Transport, frames_per_clip: int, once: tuple[str, ...] = (), **kwargs: Any) -> ClipSink:
    sink = transport.open_sink(**kwargs)
    assert isinstance(sink, Producer)
    return ClipSink(sink, frames_per_clip, once=once)


def picture(i: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.full(shape, i % 251, np.uint8)


def where(array: np.ndarray) -> tuple[str, int]:
    """In which file's memory an array lies, and where in the file: the same memory may be mapped at several addresses."""
    address = int(array.__array_interface__["data"][0])
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, inode = line.split()[:5]
        start, end = (int(bound, 16) for bound in span.split("-"))
        if start <= address < end:
            return inode, int(offset, 16) + address - start
    raise AssertionError(f"nothing is mapped at {address}")


class Stream:
    """Clips within this process, so that the memory that a row was lent from and what is received can be compared."""

    def __init__(self, frames_per_clip: int, once: tuple[str, ...] = (), **kwargs: Any) -> None:
        stream = LocalStream(**kwargs)
        self.sink = ClipSink(stream.open_sink(), frames_per_clip, once=once)
        self.source = stream.open_source()

    def receive(self) -> dict[str, Any]:
        return receive(self.source)

    def lend(self, i: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
        """A picture that was rendered into its place."""
        row = self.sink.lend(shape, np.uint8)
        assert row is not None
        row[...] = picture(i, shape)
        return row

    def close(self) -> None:
        self.source.close()
        self.sink.close()


@pytest.fixture
def stream() -> Iterator[Callable[..., Stream]]:
    opened: list[Stream] = []

    def opens(frames_per_clip: int, **kwargs: Any) -> Stream:
        opened.append(Stream(frames_per_clip, **kwargs))
        return opened[-1]

    yield opens
    for each in opened:
        each.close()


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each copy of an array moves."""
    sizes: list[int] = []
    copyto = np.copyto

    def spy(target: np.ndarray, source: Any, **kwargs: Any) -> None:
        sizes.append(target.nbytes)
        copyto(target, source, **kwargs)

    monkeypatch.setattr("numpy.copyto", spy)
    return sizes


def test_consecutive_frames_arrive_as_one_message_and_the_rest_at_the_end(transport: Transport) -> None:
    source = transport.open_source()
    sink = clips_over(transport, 4, once=("btid",))
    sent = [sink.publish({"btid": 7, "image": picture(i), "i": i, "name": f"frame {i}"}) for i in range(10)]
    assert sent == [i % 4 == 3 for i in range(10)]
    received = [receive(source), receive(source)]
    assert source.receive(0.1) is None
    closing = threading.Thread(target=sink.close)  # over TCP it waits until the last message is taken
    closing.start()
    received.append(receive(source))
    closing.join()
    start = 0
    for item, length in zip(received, (4, 4, 2), strict=True):
        frames = range(start, start + length)
        assert item["btid"] == 7
        np.testing.assert_array_equal(item["image"], np.stack([picture(i) for i in frames]), strict=True)
        assert item["image"].flags.c_contiguous
        assert item["image"].flags.writeable
        np.testing.assert_array_equal(item["i"], np.arange(start, start + length), strict=True)
        assert item["name"] == [f"frame {i}" for i in frames]
        start += length


def test_a_row_that_was_rendered_into_is_what_arrives(stream: Callable[..., Stream], copied: list[int]) -> None:
    clips = stream(3)
    for i in range(3):  # the first clip teaches the sink
        clips.sink.publish({"image": picture(i), "i": i})
    clips.receive()
    copied.clear()
    for first in range(3, 30, 3):
        rows = []
        for i in range(first, first + 3):
            image = clips.lend(i)
            rows.append(where(image))
            clips.sink.publish({"image": image, "i": i})
            with pytest.raises(ValueError, match="read-only"):
                image[...] = 0
        item = clips.receive()
        assert [where(item["image"][t]) for t in range(3)] == rows
        np.testing.assert_array_equal(item["image"], np.stack([picture(i) for i in range(first, first + 3)]))
        del item
    assert copied == []


def test_a_row_goes_over_the_wire_from_where_it_was_rendered(transport: Transport, copied: list[int]) -> None:
    source, sink = transport.open_source(), clips_over(transport, 2)
    for i in range(2):
        sink.publish({"image": picture(i)})
    receive(source)
    copied.clear()
    for first in range(2, 20, 2):
        for i in range(first, first + 2):
            image = sink.lend(SHAPE, np.uint8)
            assert image is not None
            image[...] = i
            sink.publish({"image": image})
        np.testing.assert_array_equal(receive(source)["image"], np.stack([picture(first), picture(first + 1)]))
    assert copied == []


def test_an_array_from_elsewhere_is_copied_once(stream: Callable[..., Stream], copied: list[int]) -> None:
    clips = stream(4)
    for i in range(8):
        if i == 4:
            clips.receive()
            copied.clear()
        clips.sink.publish({"image": picture(i)})
    assert copied == 4 * [math.prod(SHAPE)]
    clips.receive()


def test_an_episode_can_end_in_the_middle_of_a_clip_without_a_copy(
    stream: Callable[..., Stream], copied: list[int]
) -> None:
    clips = stream(5)
    for i in range(5):
        clips.sink.publish({"image": picture(i)})
    clips.receive()
    copied.clear()
    for length in (1, 4, 2, 5):
        rows = []
        for i in range(length):
            image = clips.lend(i)
            rows.append(where(image))
            clips.sink.publish({"image": image})
        assert clips.sink.end_clip() == (length < 5)
        assert not clips.sink.end_clip()
        item = clips.receive()
        assert item["image"].shape == (length, *SHAPE)
        assert [where(row) for row in item["image"]] == rows
        np.testing.assert_array_equal(item["image"][:, 0, 0, 0], np.arange(length))
    assert copied == []


KINDS: list[tuple[tuple[int, ...], Any]] = [
    (SHAPE, np.uint8),
    ((40, 50), np.float32),
    (SHAPE, np.uint8),
    ((30, 1), float),
]


def test_several_arrays_of_a_frame_share_the_slot(stream: Callable[..., Stream], copied: list[int]) -> None:
    clips = stream(3)
    for start in range(0, 30, 3):
        in_slot = start > 0  # before the first clip there is no memory to lie in
        length = 3 if start % 2 == 0 else 2
        for i in range(start, start + length):
            lent = [clips.sink.lend(shape, dtype) for shape, dtype in KINDS]
            assert [array is not None for array in lent] == [in_slot, in_slot, in_slot, False]  # the last one is small
            left, depth, right, small = (
                np.empty(*kind) if array is None else array for array, kind in zip(lent, KINDS, strict=True)
            )
            left[...], depth[...], right[...], small[...] = i, i / 2, i + 100, i * 2
            clips.sink.publish({"left": left, "pose": {"depth": depth, "small": small}, "right": right})
        clips.sink.end_clip()
        if start == 0:
            copied.clear()
        item = clips.receive()
        for t, i in enumerate(range(start, start + length)):
            assert (item["left"][t] == i).all()
            assert (item["right"][t] == i + 100).all()
            assert (item["pose"]["depth"][t] == i / 2).all()
            assert (item["pose"]["small"][t] == i * 2).all()
    assert set(copied) == {30 * 8}


def numbers(*values: Any, dtype: Any = None) -> Any:
    return np.array(values, dtype)


RECORDS = np.array([(1, 2.5), (3, 4.5), (5, 6.5)], "i4,f8")
FIELDS: dict[str, tuple[list[Any], Any]] = {
    "integers": ([1, -2, 3], numbers(1, -2, 3, dtype=np.int64)),
    "floats": ([0.5, float("inf"), 2.0], numbers(0.5, np.inf, 2.0)),
    "booleans": ([True, False, True], numbers(True, False, True)),
    "numbers of several kinds": ([0, 1.5, True], numbers(0.0, 1.5, 1.0)),
    "complex numbers": ([1j, 2, 3.5], numbers(1j, 2, 3.5)),
    "large integers": ([2**62, 2**63 - 1, 0], numbers(2**62, 2**63 - 1, 0, dtype=np.int64)),
    "integers beyond all arrays": ([2**200, 1, 2], [2**200, 1, 2]),
    "integers beyond signed ones": ([2**63, 1, 2], [2**63, 1, 2]),
    "numpy scalars": ([np.float32(1.5), np.float32(2), np.float32(3)], numbers(1.5, 2, 3, dtype=np.float32)),
    "numpy booleans": ([np.bool_(True), np.bool_(False), True], numbers(True, False, True)),
    "mixed scalars": ([np.uint8(1), 2, np.int16(3)], numbers(1, 2, 3, dtype=np.int64)),
    "times": ([np.datetime64("2026-11-24", unit) for unit in "Dsm"], np.array(["2026-11-24"] * 3, "M8[s]")),
    "numpy strings": ([np.str_("a"), np.str_("bcd"), np.str_("")], numbers("a", "bcd", "")),
    "records": (list(RECORDS), RECORDS),
    "texts": (["a", "Würfel", ""], ["a", "Würfel", ""]),
    "bytes": ([b"a", b"\0", b""], [b"a", b"\0", b""]),
    "nothing": ([None, None, None], [None, None, None]),
    "numbers and nothing": ([None, 1, 2.5], [None, 1, 2.5]),
    "lists": ([[1, 2], [], ["a"]], [[1, 2], [], ["a"]]),
    "tuples": ([(1, 2), (3, 4), (5, 6)], [(1, 2), (3, 4), (5, 6)]),
    "empty dicts": ([{}, {}, {}], [{}, {}, {}]),
    "dicts with other keys": ([{1: 2}, {3: "a"}, {}], [{1: 2}, {3: "a"}, {}]),
    "lists of arrays": ([[np.arange(n)] for n in (1, 1000, 2)], [[np.arange(n)] for n in (1, 1000, 2)]),
}
SAME = {
    "small": np.arange(6, dtype=np.int16).reshape(2, 3),
    "large": np.arange(6000, dtype=">f4").reshape(200, 30),
    "without dimensions": np.array(1.5),
    "empty": np.empty((0, 4), np.float32),
    "columns first": np.asfortranarray(np.arange(3000.0).reshape(50, 60)),
    "steps": np.arange(9000, dtype=np.uint16).reshape(90, 100)[::3, ::-2],
    "records": np.zeros(300, [("xy", "<f4", (2,)), ("id", "<i8")]),
    "times": np.arange(1000).astype("M8[ms]"),
    "text": np.array(["a", "bcd"] * 500),
    "booleans": np.arange(5000) % 3 == 0,
}
FIELDS |= {f"arrays, {name}": ([array] * 3, np.array([array] * 3, array.dtype)) for name, array in SAME.items()}


def test_fields_become_arrays_or_lists(transport: Transport) -> None:
    sink, source = clips_over(transport, 3), transport.open_source()
    for _ in range(2):
        for i in range(3):
            frame = {name: values[i] for name, (values, _) in FIELDS.items()}
            sink.publish({"before": 1} | frame | {"deep": {"er": frame}})
        fields = receive(source)
        assert list(fields) == ["before", *FIELDS, "deep"]
        for name, (values, expected) in FIELDS.items():
            for received in (fields[name], fields["deep"]["er"][name]):
                assert type(received) is type(expected), name
                if isinstance(expected, np.ndarray):
                    assert received.dtype == expected.dtype, name
                    np.testing.assert_array_equal(received, expected, name, strict=True)
                    assert received.flags.c_contiguous
                    assert received.flags.writeable
                else:
                    np.testing.assert_equal(received, expected)
                    assert [type(value) for value in received] == [type(value) for value in values]


def test_arrays_that_only_pickle_can_carry_become_lists(stream: Callable[..., Stream]) -> None:
    clips = stream(2)
    masked = np.ma.masked_array([1, 2], [True, False])
    for i in range(2):
        clips.sink.publish({"objects": np.array([i, "a"], object), "masked": masked})
    item = clips.receive()
    assert [array.tolist() for array in item["objects"]] == [[0, "a"], [1, "a"]]
    assert [array.mask.tolist() for array in item["masked"]] == [[True, False]] * 2


IMAGE = np.zeros((60, 60), np.uint8)
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a field more": ({"a": 1}, {"a": 1, "b": 2}),
    "a field less": ({"a": 1, "b": 2}, {"a": 1}),
    "another field": ({"a": 1}, {"b": 1}),
    "a field more in a dict": ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}),
    "another shape": ({"a": IMAGE}, {"a": IMAGE[1:]}),
    "another dtype": ({"a": IMAGE}, {"a": IMAGE.astype(np.int8)}),
    "another number of boxes": ({"a": np.zeros((2, 4))}, {"a": np.zeros((3, 4))}),
    "no array any more": ({"a": IMAGE}, {"a": None}),
    "an array at last": ({"a": None}, {"a": IMAGE}),
    "a value that a clip has once": ({"a": 1, "once": 3}, {"a": 1, "once": 4}),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_frame_that_differs_begins_another_clip_and_none_is_lost(stream: Callable[..., Stream], name: str) -> None:
    clips = stream(4, once=("once",))
    one, other = DIFFERENCES[name]
    frames = [one, one, one, one, one, one, other, other, other, one, other]
    sent = [clips.sink.publish({"i": i} | frame) for i, frame in enumerate(frames)]
    assert [i for i, is_sent in enumerate(sent) if is_sent] == [3, 6, 9, 10]
    clips.sink.close()
    received = [clips.receive() for _ in range(5)]
    assert [item["i"].tolist() for item in received] == [[0, 1, 2, 3], [4, 5], [6, 7, 8], [9], [10]]
    for item in received:
        assert item.keys() == {"i"} | frames[item["i"][0]].keys()


def test_what_is_changed_after_publish_arrives_as_it_was(transport: Transport) -> None:
    sink, source = clips_over(transport, 3), transport.open_source()
    image, names, state = picture(0), ["a"], {"deep": [np.zeros(2000)], "more": {1: [0]}}
    for i in range(3):
        image[...] = i
        names[0] = f"name {i}"
        state["deep"][0][...] = i  # type: ignore[index]
        state["more"][1][0] = i  # type: ignore[index]
        sink.publish({"image": image, "names": names, "state": state})
    fields = receive(source)
    assert fields["image"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert fields["names"] == [["name 0"], ["name 1"], ["name 2"]]
    assert fields["state"]["more"] == [{1: [0]}, {1: [1]}, {1: [2]}]
    assert [arrays[0][0] for arrays in fields["state"]["deep"]] == [0, 1, 2]


class Custom:
    def __init__(self, value: int) -> None:
        self.value = value


def test_a_frame_that_cannot_be_sent_is_an_error_at_once_and_the_others_go_on(transport: Transport) -> None:
    sink, source = clips_over(transport, 3), transport.open_source()
    endless: dict[str, Any] = {}
    endless["again"] = endless
    for i in range(3):
        for key, bad in {"callback": lambda: None, "text": "\ud800", "endless": endless}.items():
            with pytest.raises(PublishError):
                sink.publish({"i": 99, "image": picture(99), key: bad})
        sink.publish({"i": i, "image": picture(i)})
    fields = receive(source)
    assert fields["i"].tolist() == [0, 1, 2]
    assert fields["image"][:, 0, 0, 0].tolist() == [0, 1, 2]
    if transport.trusted:
        for i in range(3):
            sink.publish({"object": Custom(i)})
        assert [received.value for received in receive(source)["object"]] == [0, 1, 2]
    else:
        with pytest.raises(PublishError, match=r"publish\(object=\.\.\.\).*Custom"):
            sink.publish({"object": Custom(0)})


class TestKeeping:
    """A row that was lent is never written to behind its holder's back, whatever becomes of the clip."""

    def test_a_picture_that_is_kept_and_published_differently(self, stream: Callable[..., Stream]) -> None:
        clips = stream(4, num_slots=6)
        kept = []
        for i in range(48):
            raw = clips.sink.lend(SHAPE, np.uint8)
            raw = np.empty(SHAPE, np.uint8) if raw is None else raw
            raw[...] = picture(i)
            kept.append(raw)
            clips.sink.publish({"image": raw // 2})
            if i % 4 == 3:
                np.testing.assert_array_equal(
                    clips.receive()["image"][:, 0, 0, 0], [j // 2 for j in range(i - 3, i + 1)]
                )
        for i, raw in enumerate(kept):
            np.testing.assert_array_equal(raw, picture(i))

    @pytest.mark.parametrize("view", ["upside down", "a part", "flat"])
    def test_a_view_of_a_picture_that_is_kept(self, stream: Callable[..., Stream], view: str) -> None:
        clips = stream(3, num_slots=6)
        take = {"upside down": lambda a: a[::-1], "a part": lambda a: a[3:5], "flat": lambda a: a.reshape(-1)}[view]
        kept = []
        for i in range(30):
            row = clips.sink.lend(SHAPE, np.uint8)
            row = np.empty(SHAPE, np.uint8) if row is None else row
            row[...] = picture(i)
            kept.append(take(row))
            del row
            clips.sink.publish({"image": picture(i + 100), "view": kept[-1]})
            if i % 3 == 2:
                fields = clips.receive()
                assert fields["image"][:, 0, 0, 0].tolist() == [i + 98, i + 99, i + 100]
                np.testing.assert_array_equal(fields["view"], np.stack([take(picture(j)) for j in (i - 2, i - 1, i)]))
        for i, seen in enumerate(kept):
            assert (seen == i).all()

    def test_published_pictures_that_are_kept(self, stream: Callable[..., Stream]) -> None:
        clips = stream(4, num_slots=6)
        kept = []
        for i in range(40):
            row = clips.sink.lend(SHAPE, np.uint8)
            row = np.empty(SHAPE, np.uint8) if row is None else row
            row[...] = picture(i)
            kept.append(row)
            clips.sink.publish({"image": row})
            if i % 4 == 3:
                assert clips.receive()["image"][:, 0, 0, 0].tolist() == [i - 3, i - 2, i - 1, i]
        for i, row in enumerate(kept):
            np.testing.assert_array_equal(row, picture(i))

    def test_a_picture_that_was_begun_when_the_clip_ended(self, stream: Callable[..., Stream]) -> None:
        clips = stream(4)
        for i in range(4):
            clips.sink.publish({"image": picture(i)})
        clips.receive()
        clips.sink.publish({"image": picture(4)})
        early = clips.lend(5)
        clips.sink.end_clip()
        assert clips.receive()["image"].shape == (1, *SHAPE)
        np.testing.assert_array_equal(early, picture(5))
        clips.sink.publish({"image": early})
        clips.sink.end_clip()
        np.testing.assert_array_equal(clips.receive()["image"], picture(5)[None])

    def test_pictures_that_are_published_as_each_other(self, stream: Callable[..., Stream]) -> None:
        clips = stream(3)
        for i in range(3):
            clips.sink.publish({"left": picture(i), "right": picture(i + 100)})
        clips.receive()
        for i in range(3, 6):
            lent = [clips.sink.lend(SHAPE, np.uint8) for _ in range(2)]
            one, two = (np.empty(SHAPE, np.uint8) if row is None else row for row in lent)
            one[...], two[...] = i, i + 100
            left, right = (one, two) if i == 3 else (two, one)
            clips.sink.publish({"left": left, "right": right, "again": left})
            assert (one == i).all()
            assert (two == i + 100).all()
        fields = clips.receive()
        assert fields["left"][:, 0, 0, 0].tolist() == [3, 104, 105]
        assert fields["again"][:, 0, 0, 0].tolist() == [3, 104, 105]
        assert fields["right"][:, 0, 0, 0].tolist() == [103, 4, 5]

    def test_a_picture_that_nobody_published_makes_room_for_the_next(self, stream: Callable[..., Stream]) -> None:
        clips = stream(2)
        for i in range(2):
            clips.sink.publish({"image": picture(i)})
        clips.receive()
        first = where(clips.lend(77))
        second = clips.lend(2)
        assert where(second) == first
        assert clips.sink.lend(SHAPE, np.uint8) is None  # the row is in use
        clips.sink.publish({"image": second})
        clips.sink.publish({"image": picture(3)})
        assert clips.receive()["image"][:, 0, 0, 0].tolist() == [2, 3]


@pytest.mark.parametrize("num_slots", [4, 6])
def test_keeping_every_clip_and_every_row_does_not_stop_the_stream(transport: Transport, num_slots: int) -> None:
    sink = clips_over(transport, 3, send_hwm=2, num_slots=num_slots)
    source = transport.open_source()
    rows = []

    def run() -> None:
        for i in range(50):
            row = sink.lend(SHAPE, np.uint8)
            image = np.empty(SHAPE, np.uint8) if row is None else row
            image[...] = picture(i)
            rows.append(image)
            sink.publish({"image": image, "i": i})
        sink.close()

    thread = threading.Thread(target=run)
    thread.start()
    kept = [receive(source) for _ in range(17)]
    thread.join(PATIENCE_S)
    assert np.concatenate([item["i"] for item in kept]).tolist() == list(range(50))
    for item in kept:
        np.testing.assert_array_equal(item["image"][:, 0, 0, 0], item["i"])
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row, picture(i))


def test_closing_sends_what_was_begun_without_waiting_for_room(transport: Transport) -> None:
    sink = clips_over(transport, 3, send_hwm=2)
    for i in range(8):  # two clips wait, more may not
        sink.publish({"i": i, "image": picture(i)})
    sink.close()
    with pytest.raises(StreamClosed):
        sink.publish({"i": 8})
    assert not sink.end_clip()
    assert sink.lend(SHAPE, np.uint8) is None
    if transport.name in ("shared", "local"):  # over TCP, a producer that nobody is connected to does not wait
        source = transport.open_source()
        assert np.concatenate([receive(source)["i"] for _ in range(3)]).tolist() == list(range(8))


def test_closing_ends_a_publish_that_waits(stream: Callable[..., Stream]) -> None:
    clips = stream(2, send_hwm=2)
    outcome: list[type[BaseException]] = []

    def run() -> None:
        try:
            while True:
                clips.sink.publish({"image": picture(0)})
        except StreamClosed as error:
            outcome.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    clips.sink.close()
    thread.join(PATIENCE_S)
    assert outcome == [StreamClosed]
    assert [len(clips.receive()["image"]) for _ in range(3)] == [2, 2, 2]  # the one that waited, too


def test_an_interrupt_loses_no_frame_but_the_one_that_it_interrupts(
    stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = stream(3)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for i in range(9):
        with monkeypatch.context() as patch:
            patch.setattr("numpy.copyto", interrupt)
            with pytest.raises(KeyboardInterrupt):
                clips.sink.publish({"i": 99, "name": ["lost"], "image": picture(99)})
        clips.sink.publish({"i": i, "name": [i], "image": picture(i)})
        if i % 3 == 2:
            item = clips.receive()
            assert item["i"].tolist() == [i - 2, i - 1, i]
            assert item["name"] == [[i - 2], [i - 1], [i]]
            assert item["image"][:, 0, 0, 0].tolist() == [i - 2, i - 1, i]


class Enough(Exception):
    pass


def test_what_a_signal_handler_raises_while_a_clip_waits_for_room_loses_no_frame(stream: Callable[..., Stream]) -> None:
    def enough(*_: object) -> None:
        raise Enough

    clips = stream(2, send_hwm=2)
    before = signal.signal(signal.SIGUSR1, enough)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    i = 0
    try:
        with pytest.raises(Enough):
            while True:
                i += 1
                clips.sink.publish({"i": i})
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert i == 6
    received = [clips.receive()["i"]]
    clips.sink.publish({"i": 7})
    clips.sink.close()
    received += [clips.receive()["i"] for _ in range(3)]
    assert np.concatenate(received).tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("complete", [0, 1])
def test_a_signal_handler_may_close_in_the_middle_of_a_frame(
    stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch, complete: int
) -> None:
    clips = stream(3)
    for i in range(complete):
        clips.sink.publish({"i": i, "image": picture(i)})
    copyto = np.copyto

    def close(*args: Any) -> None:
        monkeypatch.setattr("numpy.copyto", copyto)
        clips.sink.close()
        copyto(*args)

    monkeypatch.setattr("numpy.copyto", close)
    with pytest.raises(StreamClosed):
        clips.sink.publish({"i": complete, "image": picture(complete)})
    if complete == 0:
        assert clips.source.receive(0.1) is None
        return
    item = clips.receive()
    assert item["i"].tolist() == [0]
    np.testing.assert_array_equal(item["image"], picture(0)[None])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_that_closes_sends_nothing(stream: Callable[..., Stream]) -> None:
    clips = stream(2)
    clips.sink.publish({"i": 0})
    child = os.fork()
    if child == 0:
        try:
            clips.sink.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    clips.sink.publish({"i": 1})
    assert clips.receive()["i"].tolist() == [0, 1]


def test_slots_of_clips_come_back(stream: Callable[..., Stream]) -> None:
    clips = stream(4, num_slots=4, send_hwm=2)
    for i in range(100):
        image = clips.lend(i) if i >= 4 else picture(i)
        clips.sink.publish({"image": image})
        if i % 7 == 6:
            clips.sink.end_clip()
        while (message := clips.source.receive(0)) is not None:
            assert len(message.fields["image"]) <= 4
            del message


def test_limits_follow_from_the_length_of_a_clip_unless_they_are_given() -> None:
    assert clip.limits(1) == (10, 14)
    assert clip.limits(4) == (3, 7)
    assert clip.limits(16) == (2, 6)
    assert clip.limits(16, 10) == (10, 14)
    assert clip.limits(16, 3, 20) == (3, 20)
    for wrong in (0, 2.5, True, "16"):
        with pytest.raises(ConfigurationError, match="frames_per_clip"):
            clip.limits(wrong)  # type: ignore[arg-type]


FRAMES = st.fixed_dictionaries(
    {},
    optional={
        "image": st.sampled_from([(50, 60), (50, 61)]),
        "more": st.just((50, 60)),
        "small": st.sampled_from([(3,), (0, 2)]),
        "name": st.just(None),
    },
)
STEPS = st.lists(
    st.tuples(FRAMES, st.sampled_from(["lent", "elsewhere", "kept"]), st.sampled_from(4 * [False] + [True])),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(frames_per_clip=st.integers(1, 5), steps=STEPS)
def test_clips_are_what_a_plain_list_would_be(
    frames_per_clip: int, steps: list[tuple[dict[str, Any], str, bool]]
) -> None:
    clips = Stream(frames_per_clip, send_hwm=100, num_slots=120)
    expected: list[list[dict[str, Any]]] = []
    kept: list[tuple[np.ndarray, int]] = []
    ended = True
    for i, (kinds, how, end) in enumerate(steps):
        frame: dict[str, Any] = {"i": i}
        for key, shape in kinds.items():
            if shape is None:
                frame[key] = str(i)
                continue
            array = None if how == "elsewhere" else clips.sink.lend(shape, np.uint8)
            array = np.empty(shape, np.uint8) if array is None else array
            array[...] = i
            if how == "kept":
                kept.append((array, i))
                array = array.copy()
            frame[key] = array
        shapes = {key: np.shape(value) for key, value in frame.items()}
        if (
            ended
            or len(expected[-1]) == frames_per_clip
            or shapes != {k: np.shape(v) for k, v in expected[-1][0].items()}
        ):
            expected.append([])
        expected[-1].append(frame)
        clips.sink.publish(frame)
        ended = end
        if end:
            clips.sink.end_clip()
    clips.sink.close()
    for frames in expected:
        item = clips.receive()
        assert list(item) == list(frames[0])
        for key, received in item.items():
            wanted = [frame[key] for frame in frames]
            np.testing.assert_equal(received, wanted if key == "name" else np.stack(wanted))
    assert clips.source.receive(0) is None
    for array, i in kept:
        assert (array == i).all()
    clips.close()


def test_a_clip_ends_early_although_a_row_that_was_lent_for_it_was_not_used(stream: Callable[..., Stream]) -> None:
    clips = stream(4)
    for i in range(4):
        clips.sink.publish({"image": picture(i)})
    del i
    clips.receive()
    row = clips.sink.lend(SHAPE, np.uint8)
    assert row is not None
    larger = np.ones((4 * SHAPE[0], *SHAPE[1:]), np.uint8)
    clips.sink.publish({"larger": larger})  # does not fit into the slot, in which the row is
    del row
    clips.sink.publish({"larger": larger})
    clips.sink.end_clip()
    np.testing.assert_array_equal(clips.receive()["larger"], np.stack([larger, larger]))


def test_a_publish_in_the_middle_of_another_one_is_an_error_or_right(transport: Transport) -> None:
    """By a signal's handler or a finalizer, before each line of ours."""
    if transport.name != "local":
        pytest.skip("the same code everywhere")
    sink, source = clips_over(transport, 2), transport.open_source()
    numbers = itertools.count()
    accepted: list[int] = []

    def publish() -> None:
        i = next(numbers)
        lent = sink.lend(SHAPE, np.uint8)
        image = np.empty(SHAPE, np.uint8) if lent is None else lent
        image[:] = i % 251
        sink.publish({"i": i, "image": image, "other": picture(i), "pose": {"i": i}})
        accepted.append(i)

    def nested() -> None:
        with contextlib.suppress(BlendtorchError):
            publish()
        with contextlib.suppress(BlendtorchError):
            sink.end_clip()

    at, going, received = 0, True, []
    while going:
        at += 1
        going = runs_with_a_switch(publish, nested, at)
        if not going or at % 5 == 0:
            sink.end_clip()
        while (message := source.receive(0)) is not None:
            clip = message.fields
            frames = zip(clip["i"], clip["image"], clip["other"], clip["pose"]["i"], strict=True)
            for i, image, other, inner in frames:
                assert (image == i % 251).all()
                assert (other == i % 251).all()
                assert inner == i
                received.append(int(i))
    assert at > 50
    assert sorted(received) == sorted(accepted)
