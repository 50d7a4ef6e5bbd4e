"""What every transport does alike."""

import os
import re
import signal
import threading
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import zmq.sugar.socket

from blendtorch_shm.errors import BlendtorchError, PublishError, StreamClosed, UnreadableMessage
from blendtorch_shm.memory.own_pages import address_of
from blendtorch_shm.memory.states import State
from blendtorch_shm.message.wire import Message
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.merge import Source

from ..interruption import everywhere
from .conftest import SOURCES, Transport

PATIENCE_S = 20.0


def receive(source: Source) -> dict[str, Any]:
    message = source.receive(PATIENCE_S)
    assert message is not None, "no message arrived"
    return message.fields


def picture(i: int, shape: tuple[int, ...] = (48, 64, 3)) -> np.ndarray:
    return np.full(shape, i % 256, np.uint8)


def numbers_until(last: int, source: Source) -> list[int]:
    """Of the messages up to that one, whose pictures show them."""
    numbers: list[int] = []
    while not numbers or numbers[-1] != last:
        message = receive(source)
        numbers.append(message["i"])
        np.testing.assert_array_equal(message["image"], picture(numbers[-1]))
    return numbers


def publish_in_background(transport: Transport, count: int, **kwargs: Any) -> threading.Thread:
    sink = transport.open_sink(**kwargs)

    def run() -> None:
        for i in range(count):
            sink.publish({"image": picture(i), "i": i})

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_messages_arrive_in_order_and_once(transport: Transport) -> None:
    producer = publish_in_background(transport, 100)
    source = transport.open_source()
    received = [receive(source) for _ in range(100)]
    producer.join()
    assert [item["i"] for item in received] == list(range(100))
    for i, item in enumerate(received):
        np.testing.assert_array_equal(item["image"], picture(i))
    assert source.receive(0.1) is None


def test_sequence_numbers_are_unbroken(transport: Transport) -> None:
    producer = publish_in_background(transport, 30)
    source = transport.open_source()
    sequences = []
    for _ in range(30):
        message = source.receive(PATIENCE_S)
        assert isinstance(message, Message)
        sequences.append(message.sequence)
    producer.join()
    assert sequences == list(range(30))


def test_many_messages_are_taken_at_once_in_order_and_no_more_than_asked_for(transport: Transport) -> None:
    producer = publish_in_background(transport, 60)
    source = transport.open_source()
    received: list[int] = []
    while len(received) < 60:
        wanted = 1 + len(received) % 5
        messages = source.receive_many(wanted, PATIENCE_S)
        assert 1 <= len(messages) <= wanted
        for message in messages:
            np.testing.assert_array_equal(message.fields["image"], picture(message.fields["i"]))
            received.append(message.fields["i"])
    producer.join()
    assert received == list(range(60))
    assert source.receive_many(4, 0.05) == []


def test_of_many_messages_no_more_are_leased_at_once_than_leave_some_to_others(transport: Transport) -> None:
    """Of 11 slots, consumers may lease 8; who takes many stops at two thirds of them, and goes on when some are released."""
    sink, source = transport.open_sink(send_hwm=10, num_slots=11), transport.open_source()
    for i in range(10):
        sink.publish({"image": picture(i), "i": i})
    held = source.receive_many(9, PATIENCE_S)
    if transport.name in ("shared", "local"):
        assert len(held) == 5
    received = [message.fields["i"] for message in held]
    one = source.receive_many(1, PATIENCE_S)  # but who asks for one gets it
    assert len(one) == 1
    held += one
    received.append(one[0].fields["i"])
    for message in held:
        np.testing.assert_array_equal(message.fields["image"], picture(message.fields["i"]))
    del held, one, message
    while len(received) < 10:
        received += [message.fields["i"] for message in source.receive_many(10, PATIENCE_S)]
    assert received == list(range(10))


def test_a_source_names_the_memory_that_its_messages_lie_in(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    sink.publish({"image": np.zeros(2**16, np.uint8)})  # so large that it is not copied
    image = receive(source)["image"]
    address = image.ctypes.data
    ranges = [
        range(start, start + segment.nbytes)
        for segment in source.segments()
        for start in [address_of((segment.own or segment).view)]
    ]
    assert any(address in found for found in ranges) == (transport.name in ("shared", "local"))


VALUES: dict[str, Any] = {
    "int": -5,
    "largest": 2**63 - 1,
    "huge": 2**200,
    "float": 0.1,
    "inf": float("inf"),
    "str": "Würfel",
    "bytes": b"\0\1",
    "none": None,
    "bool": True,
    "empty_list": [],
    "list": [1, "a", [2.5, None]],
    "tuple": (1, (2, "b"), []),
    "dict": {"a": {"b": [1, 2]}, "c": (3,)},
    "int_keys": {1: "one", (2, 3): "pair"},
}


def test_plain_values_arrive_as_they_were_published(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    sink.publish(VALUES)
    fields = receive(source)
    assert fields == VALUES
    assert list(fields) == list(VALUES)
    assert {k: type(v) for k, v in fields.items()} == {k: type(v) for k, v in VALUES.items()}


SCALARS = [np.float32(1.5), np.int64(-3), np.bool_(True), np.complex128(1j), np.str_("x"), np.datetime64("2026-11-24")]


@pytest.mark.parametrize("value", SCALARS)
def test_numpy_scalars_keep_their_type(transport: Transport, value: np.generic) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    sink.publish({"value": value})
    received = receive(source)["value"]
    assert received == value
    assert type(received) is type(value)


ARRAYS = {
    "small": np.arange(16.0).reshape(8, 2),
    "large": np.arange(3000, dtype=np.int32).reshape(30, 100),
    "scalar": np.array(3.5),
    "empty": np.empty((0, 3), np.float32),
    "fortran": np.asfortranarray(np.arange(3000.0).reshape(50, 60)),
    "strided": np.arange(9000, dtype=np.uint16).reshape(90, 100)[::3, ::-2],
    "bool": np.arange(5000) % 3 == 0,
    "complex": np.arange(900) * 1j,
    "text": np.array(["a", "bcd"] * 500),
    "big_endian": np.arange(2000, dtype=">f8"),
    "records": np.zeros(300, [("xy", "<f4", (2,)), ("id", "<i8")]),
    "times": np.arange(1000).astype("M8[ms]"),
    "half": np.arange(3000, dtype=np.float16),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_arrive_with_values_shape_and_dtype_and_writable(transport: Transport, name: str) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    sink.publish({"before": 1, "array": ARRAYS[name], "nested": {"deep": [(ARRAYS[name],)]}})
    fields = receive(source)
    for received in (fields["array"], fields["nested"]["deep"][0][0]):
        assert type(received) is np.ndarray
        assert received.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(received, ARRAYS[name], strict=True)
        assert received.flags.writeable
        assert received.flags.aligned
        assert received.flags.c_contiguous


def test_fields_may_come_go_and_change_size_from_message_to_message(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    messages = [
        {"a": picture(0)},
        {},
        {"b": picture(1, (200, 200, 4)), "a": picture(2)},
        {"c": "only text"},
        {"a": picture(3, (500, 400, 4)), "meshes": [{"v": np.ones((n, 3), np.float32)} for n in (1, 1000, 3)]},
        {"a": picture(4, (10, 10))},
    ]
    for message in messages:
        sink.publish(message)
    for message in messages:
        np.testing.assert_equal(receive(source), message)


def test_a_producer_that_is_ahead_waits_for_room(transport: Transport) -> None:
    producer = publish_in_background(transport, 60, send_hwm=3)
    producer.join(0.3)
    assert producer.is_alive()
    source = transport.open_source()
    assert [receive(source)["i"] for _ in range(60)] == list(range(60))
    producer.join(PATIENCE_S)
    assert not producer.is_alive()


def test_several_receivers_share_the_messages(transport: Transport) -> None:
    """Each leaves with a third: whoever is slow finds his, and what was sent to one who has left is the others'."""
    producer = publish_in_background(transport, 60)
    received: list[list[int]] = [[], [], []]

    def take_a_third(source: Source, numbers: list[int]) -> None:
        numbers += [receive(source)["i"] for _ in range(20)]
        source.close()

    threads = [threading.Thread(target=take_a_third, args=(transport.open_source(), numbers)) for numbers in received]
    for thread in threads:
        thread.start()
    for thread in [*threads, producer]:
        thread.join(PATIENCE_S)
    assert [len(numbers) for numbers in received] == [20, 20, 20]
    assert sorted(i for numbers in received for i in numbers) == list(range(60))


def test_keeping_every_item_does_not_stop_the_stream(transport: Transport) -> None:
    producer = publish_in_background(transport, 100, send_hwm=5, num_slots=8)
    source = transport.open_source()
    kept = [receive(source) for _ in range(100)]
    producer.join()
    for i, item in enumerate(kept):
        np.testing.assert_array_equal(item["image"], picture(i))


def test_what_was_published_before_closing_still_arrives(transport: Transport) -> None:
    source = transport.open_source()
    sink = transport.open_sink()
    sink.publish({"i": 0, "image": picture(0)})
    assert receive(source)["i"] == 0  # connected by now
    for i in range(1, 4):
        sink.publish({"i": i, "image": picture(i)})
    sink.close()
    assert [receive(source)["i"] for _ in range(3)] == [1, 2, 3]


def test_arrays_outlive_their_source(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    sink.publish({"image": picture(7)})
    image = receive(source)["image"]
    source.close()
    for i in range(5):
        sink.publish({"image": picture(i)})
    np.testing.assert_array_equal(image, picture(7))


def test_closing_wakes_a_publish_that_waits_for_room(transport: Transport) -> None:
    sink = transport.open_sink(send_hwm=2)
    outcome: list[type[BaseException]] = []

    def publish_for_ever() -> None:
        try:
            while True:
                sink.publish({"image": picture(0)})
        except StreamClosed as error:
            outcome.append(type(error))

    thread = threading.Thread(target=publish_for_ever)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    sink.close()
    thread.join(PATIENCE_S)
    assert outcome == [StreamClosed]


def test_all_that_was_published_arrives_at_a_slow_receiver_after_closing(transport: Transport) -> None:
    source = transport.open_source()
    sink = transport.open_sink(send_hwm=3)
    sink.publish({"i": 0, "image": picture(0, (480, 640, 3))})
    assert receive(source)["i"] == 0
    received: list[int] = []

    def run() -> None:
        while len(received) < 40:
            received.append(receive(source)["i"])

    thread = threading.Thread(target=run)
    thread.start()
    for i in range(1, 41):
        sink.publish({"i": i, "image": picture(i, (480, 640, 3))})
    sink.close()
    thread.join(PATIENCE_S)
    assert received == list(range(1, 41))


def test_a_source_that_is_there_before_the_sink_gets_every_message_in_order(transport: Transport) -> None:
    for _ in range(5):
        source = transport.open_source()
        sink = transport.open_sink()
        assert source.receive(0) is None
        for i in range(8):
            sink.publish({"i": i})
        assert [receive(source)["i"] for _ in range(8)] == list(range(8))
        source.close()
        sink.close()


def test_receiving_after_close_is_an_error(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    sink.publish({"i": 1})
    assert receive(source) == {"i": 1}
    source.close()
    with pytest.raises(StreamClosed, match=r"receive\(\) after close\(\)"):
        source.receive(PATIENCE_S)
    with pytest.raises(StreamClosed, match=r"receive\(\) after close\(\)"):
        source.receive_many(2, PATIENCE_S)


def test_what_one_receiver_has_is_not_delivered_again_when_another_one_closes(transport: Transport) -> None:
    sink = transport.open_sink()
    first, second = transport.open_source(), transport.open_source()
    sink.publish({"i": 0, "image": picture(0)})
    held = first.receive(PATIENCE_S)
    assert held is not None
    second.close()
    sink.publish({"i": 1, "image": picture(1)})
    third = transport.open_source()  # takes the place of the second one
    found = [m.fields["i"] for _ in range(5) for source in (third, first) if (m := source.receive(0.1)) is not None]
    assert found == [1]


def test_publishing_after_close_is_an_error(transport: Transport) -> None:
    sink = transport.open_sink()
    sink.close()
    with pytest.raises(StreamClosed):
        sink.publish({"i": 1})


class Custom:
    def __init__(self, value: int) -> None:
        self.value = value


def test_any_picklable_object_travels_where_the_connection_is_trusted_and_is_an_error_elsewhere(
    transport: Transport,
) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    if transport.trusted:
        sink.publish({"meta": {"deep": Custom(3)}, "set": {1, 2}})
        fields = receive(source)
        assert fields["meta"]["deep"].value == 3
        assert fields["set"] == {1, 2}
    else:
        with pytest.raises(PublishError, match=r"publish\(meta=\.\.\.\).*Custom"):
            sink.publish({"ok": 1, "meta": {"deep": Custom(3)}})
        sink.publish({"i": 1})
        assert receive(source) == {"i": 1}


class Missing:
    """Needs a module that is not here when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, ("no_such_module",)


@pytest.mark.parametrize("many", [False, True])
def test_a_message_that_cannot_be_opened_raises_in_its_place_and_costs_itself_alone(
    transport: Transport, many: bool
) -> None:
    if not transport.trusted:
        pytest.skip("objects do not travel here; what makes no sense is counted, see test_tcp.py")
    sink, source = transport.open_sink(), transport.open_source()
    for _ in range(10):  # more messages than there are slots
        for i in range(4):
            sink.publish({"i": i, "image": picture(i), "pose": Missing() if i == 2 else None})
        outcomes: list[Any] = []
        while len(outcomes) < 4:
            try:
                messages = source.receive_many(4, PATIENCE_S) if many else [source.receive(PATIENCE_S)]
                outcomes += [message.fields["i"] for message in messages if message is not None]
            except UnreadableMessage as error:
                words = "(DATA of instance 0|tcp://127.0.0.1:|private).*Field 'pose'.*'no_such_module'"
                outcomes.append("unreadable" if re.search(words, str(error)) else error)
        assert sorted(outcomes, key=str) == [0, 1, 3, "unreadable"]
        assert many or outcomes == [0, 1, "unreadable", 3]


def test_an_object_that_cannot_be_pickled_is_an_error_that_names_its_key(transport: Transport) -> None:
    sink = transport.open_sink()
    with pytest.raises(PublishError, match=r"publish\(callback="):
        sink.publish({"callback": lambda: None})


def test_a_message_that_contains_itself_is_an_error(transport: Transport) -> None:
    sink = transport.open_sink()
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(PublishError, match="nested"):
        sink.publish({"endless": endless})


def test_a_lent_array_arrives_without_a_copy_on_the_producers_side(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    sink.publish({"image": picture(0)})
    assert receive(source)["image"][0, 0, 0] == 0
    for i in range(1, 40):
        lent = sink.lend((48, 64, 3), np.uint8)
        assert lent is not None
        lent[...] = i
        sink.publish({"image": lent, "i": i})
        with pytest.raises(ValueError, match="read-only"):
            lent[...] = 0
        fields = receive(source)
        np.testing.assert_array_equal(fields["image"], picture(i))


@pytest.mark.filterwarnings("ignore:Setting the strides:DeprecationWarning")
def test_a_lent_array_whose_strides_were_changed_arrives_as_it_looks(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    sink.publish({"image": picture(0)})
    receive(source)
    lent = sink.lend((48, 64), np.uint8)
    assert lent is not None
    lent[...] = np.arange(48 * 64).reshape(48, 64) % 251
    lent.strides = (1, 48)
    expected = lent.copy()
    sink.publish({"image": lent})
    np.testing.assert_array_equal(receive(source)["image"], expected)


def test_a_view_of_a_lent_array_and_several_lent_arrays_arrive_right(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    for i in range(10):
        left, right = (sink.lend((48, 64, 3), np.uint8) for _ in range(2))
        left = np.empty((48, 64, 3), np.uint8) if left is None else left
        right = np.empty((48, 64, 3), np.uint8) if right is None else right
        left[...] = i
        right[...] = i + 100
        message = {"left": left[10:30], "mirrored": right[:, ::-1], "right": right, "whole": left, "other": picture(i)}
        sink.publish(message)
        fields = receive(source)
        np.testing.assert_equal(fields, message)


def test_a_lent_array_that_is_not_published_can_be_kept(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    sink.publish({"image": picture(0)})
    receive(source)
    kept = []
    for i in range(1, 30):
        raw = sink.lend((48, 64, 3), np.uint8)
        if raw is None:
            raw = np.empty((48, 64, 3), np.uint8)
        raw[...] = i
        kept.append(raw)
        sink.publish({"image": raw // 2, "i": i})
        np.testing.assert_array_equal(receive(source)["image"], picture(i) // 2)
    for i, raw in enumerate(kept, 1):
        np.testing.assert_array_equal(raw, picture(i))


def test_a_lent_array_that_was_published_is_not_overwritten_while_it_is_kept(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    sink.publish({"image": picture(0)})
    receive(source)
    kept = []
    for i in range(1, 30):
        lent = sink.lend((48, 64, 3), np.uint8)
        if lent is None:
            lent = np.empty((48, 64, 3), np.uint8)
        lent[...] = i
        sink.publish({"image": lent})
        kept.append(lent)
        np.testing.assert_array_equal(receive(source)["image"], picture(i))
    for i, lent in enumerate(kept, 1):
        np.testing.assert_array_equal(lent, picture(i))


def test_no_way_of_writing_late_reaches_the_receiver(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    sink.publish({"image": picture(0)})
    receive(source)
    for publish in (
        lambda lent: {"image": lent.reshape(-1)},
        lambda lent: {"image": lent[10:30]},
        lambda lent: {"image": lent, "again": lent},
    ):
        lent = sink.lend((48, 64, 3), np.uint8)
        assert lent is not None
        lent[...] = 7
        sink.publish(publish(lent))
        if lent.flags.writeable:
            lent[...] = 99
        fields = receive(source)
        assert all((array == 7).all() for array in fields.values())
        if "again" in fields:
            fields["again"][...] = 1
            assert (fields["image"] == 7).all()
        del lent  # it occupies the slot that the next one is lent from


def test_memory_of_a_slot_is_not_lent_to_be_taken_for_python_objects(transport: Transport) -> None:
    sink = transport.open_sink()
    sink.publish({"image": picture(1)})
    assert sink.lend((10, 100), np.object_) is None
    assert sink.lend((10, 100), np.float64) is not None


def test_an_interrupted_publish_gives_its_slot_back(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, source = transport.open_sink(num_slots=4), transport.open_source()
    with monkeypatch.context() as patch:
        patch.setattr("numpy.copyto", interrupt)
        for _ in range(8):
            with pytest.raises(KeyboardInterrupt):
                sink.publish({"image": picture(1)})
    sink.publish({"image": picture(2)})
    assert (receive(source)["image"] == 2).all()


@pytest.mark.long
@pytest.mark.parametrize("lent", [False, True])
def test_an_interrupt_anywhere_in_publish_costs_at_most_its_message(transport: Transport, lent: bool) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    begun = 0

    def publish() -> None:
        nonlocal begun
        begun += 1
        image = sink.lend((48, 64, 3), np.uint8) if lent else None
        if image is None:
            image = picture(begun)
        else:
            image[...] = begun % 256
        sink.publish({"i": begun, "image": image})

    publish()
    assert receive(source)["i"] == 1
    for place in everywhere(publish, SOURCES):
        interrupted = begun
        publish()
        assert numbers_until(begun, source) in ([begun], [interrupted, begun]), place
        assert inspect(sink.place).count(State.LOANED) == 0, place


@pytest.mark.long
@pytest.mark.parametrize("kind", ["picture", "copy of a picture", "number"])
def test_an_interrupt_anywhere_in_receive_loses_nothing(transport: Transport, kind: str) -> None:
    sink, source = transport.open_sink(num_slots=8, send_hwm=2), transport.open_source()
    number = 0

    def publish() -> None:
        nonlocal number
        number += 1
        sink.publish({"i": number} if kind == "number" else {"i": number, "image": picture(number)})

    def until(last: int) -> list[int]:
        numbers: list[int] = []
        while not numbers or numbers[-1] != last:
            message = receive(source)
            numbers.append(message["i"])
            if kind != "number":
                np.testing.assert_array_equal(message["image"], picture(message["i"]))
        return numbers

    held = []
    for _ in range(6 if kind == "copy of a picture" else 1):  # more than a consumer may hold of eight slots
        publish()
        held.append(receive(source))
    if kind != "copy of a picture":
        held.clear()
    publish()
    # ZeroMQ's Python puts the parts of a message together.
    received_one = everywhere(lambda: source.receive(PATIENCE_S), [*SOURCES, zmq.sugar.socket.__file__])
    for place in received_one:
        interrupted = number
        publish()
        assert until(number) == [interrupted, number], place
        publish()


def test_a_signals_handler_cannot_publish_in_the_middle_of_a_publish_and_costs_it_nothing(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, source = transport.open_sink(), transport.open_source()
    copy = np.copyto

    def copy_and_publish(*args: Any) -> None:
        copy(*args)
        monkeypatch.undo()
        with pytest.raises(BlendtorchError, match="in the middle of another call"):
            sink.publish({"image": picture(2)})

    monkeypatch.setattr("numpy.copyto", copy_and_publish)
    sink.publish({"image": picture(1)})
    assert (receive(source)["image"] == 1).all()
    sink.publish({"image": picture(3)})
    assert (receive(source)["image"] == 3).all()
    assert inspect(sink.place).count(State.LOANED) == 0


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def test_signals_do_not_keep_a_receiver_from_its_deadline(transport: Transport) -> None:
    source = transport.open_source()
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    done = threading.Event()

    def disturb() -> None:
        while not done.wait(0.005):
            os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert source.receive(0.3) is None
        sink = transport.open_sink()
        sink.publish({"i": 1})
        assert receive(source) == {"i": 1}
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


class Enough(Exception):
    pass


def test_what_a_signal_handler_raises_ends_a_publish_that_waits(transport: Transport) -> None:
    def enough(*_: object) -> None:
        raise Enough

    sink = transport.open_sink(send_hwm=2)
    before = signal.signal(signal.SIGUSR1, enough)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(Enough):
            while True:
                sink.publish({"image": picture(0)})
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_text_that_is_no_unicode_is_an_error(transport: Transport) -> None:
    with pytest.raises(PublishError, match="text cannot be sent"):
        transport.open_sink().publish({"text": "\ud800"})


def test_slots_come_back_when_the_last_view_has_gone(transport: Transport) -> None:
    sink, source = transport.open_sink(num_slots=4), transport.open_source()
    for i in range(20):
        sink.publish({"image": picture(i)})
        view = receive(source)["image"][3:5, ::2, :1].T
        for j in range(6):  # more than the ring has slots
            sink.publish({"image": picture(i + 100 + j)})
            np.testing.assert_array_equal(receive(source)["image"], picture(i + 100 + j))
        assert (view == i).all()
