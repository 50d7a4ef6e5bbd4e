"""A source that hands out the newest message alone, whatever the transport."""

import time
from typing import Any

import numpy as np
import pytest

from blendtorch_shm.errors import UnreadableMessage
from blendtorch_shm.launch.address import Address, Twin
from blendtorch_shm.memory.states import State
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.stats import stats
from blendtorch_shm.transport import open_sink, open_source

from ..interruption import everywhere
from .conftest import SOURCES, Transport, free_port
from .members import wait_until
from .test_conformance import Missing, picture

PATIENCE_S = 20.0


def receive(source: Source) -> int:
    message = source.receive(PATIENCE_S)
    assert message is not None, "no message arrived"
    np.testing.assert_array_equal(message.fields["image"], picture(message.fields["i"], message.fields["image"].shape))
    return int(message.fields["i"])


def publish(sink: Any, *numbers: int, shape: tuple[int, ...] = (48, 64, 3)) -> None:
    for i in numbers:
        sink.publish({"i": i, "image": picture(i, shape)})


def test_the_newest_message_arrives_and_those_before_it_do_not(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source(newest={})
    for first in range(0, 80, 8):  # more messages than there are slots
        publish(sink, *range(first, first + 8))
        assert receive(source) == first + 7
    assert source.receive(0) is None
    publish(sink, 80)
    assert receive(source) == 80


def test_many_messages_are_the_newest_one(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source(newest={})
    publish(sink, *range(8))
    (message,) = source.receive_many(4, PATIENCE_S)
    assert message.fields["i"] == 7
    assert source.receive_many(4, 0) == []


def test_the_newest_is_found_in_whichever_ring_it_lies(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source(newest={})
    publish(sink, 0, 1)
    publish(sink, 2, 3, shape=(200, 200, 4))
    publish(sink, 4)
    assert receive(source) == 4
    publish(sink, 5)
    publish(sink, 6, shape=(500, 400, 4))
    assert receive(source) == 6


def test_items_may_be_kept(transport: Transport) -> None:
    sink, source = transport.open_sink(num_slots=8, send_hwm=2), transport.open_source(newest={})
    kept = []
    for i in range(0, 40, 2):
        publish(sink, i, i + 1)
        message = source.receive(PATIENCE_S)
        assert message is not None
        kept.append(message)
    for i, message in enumerate(kept):
        np.testing.assert_array_equal(message.fields["image"], picture(2 * i + 1))


def test_a_message_that_was_not_handed_over_comes_again_unless_there_is_a_newer_one(transport: Transport) -> None:
    sink, source = transport.open_sink(), transport.open_source(newest={})
    publish(sink, *range(4))
    for _ in range(3):
        message = source.receive(PATIENCE_S, held=True)
        assert message is not None
        assert message.fields["i"] == 3
        del message
    publish(sink, 4, 5)
    if transport.name in ("shared", "local"):
        assert receive(source) == 5
    else:  # it holds no slot, and comes first
        assert [receive(source), receive(source)] == [3, 5]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["picture", "copy of a picture", "number"])
def test_an_interrupt_anywhere_loses_the_newest_never_and_gives_no_older_one(transport: Transport, kind: str) -> None:
    sink, source = transport.open_sink(num_slots=8, send_hwm=2), transport.open_source(newest={})
    published = -1
    received: list[int] = []

    def publish_two() -> None:
        nonlocal published
        for _ in range(2):
            published += 1
            sink.publish({"i": published} if kind == "number" else {"i": published, "image": picture(published)})

    def take() -> None:
        message = source.receive(PATIENCE_S)
        assert message is not None
        received.append(message.fields["i"])  # not traced: it is ours
        if kind != "number":
            np.testing.assert_array_equal(message.fields["image"], picture(received[-1]))

    def until_the_last() -> None:
        while not received or received[-1] != published:
            take()

    held = []
    for _ in range(6 if kind == "copy of a picture" else 0):  # more than a consumer may hold of eight slots
        publish_two()
        held.append(source.receive(PATIENCE_S))
    publish_two()
    for place in everywhere(take, SOURCES):
        until_the_last()
        assert source.receive(0) is None, place
        publish_two()
        assert received == sorted(set(received)), place
    until_the_last()
    assert received == sorted(set(received))


def test_a_message_that_cannot_be_opened_raises_and_the_next_newest_follows(transport: Transport) -> None:
    if not transport.trusted:
        pytest.skip("objects do not travel here")
    sink, source = transport.open_sink(), transport.open_source(newest={})
    publish(sink, 0, 1)
    sink.publish({"pose": Missing()})
    with pytest.raises(UnreadableMessage, match="'pose'"):
        source.receive(PATIENCE_S)
    publish(sink, 2, 3)
    assert receive(source) == 3


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_what_another_consumer_gives_back_late_is_skipped(twin: Twin, is_elsewhere: bool) -> None:
    address = Address(f"tcp://127.0.0.1:{free_port()}", twin)
    with open_sink(address) as sink, open_source([address]) as slow:
        publish(sink, 0)
        held = slow.receive(PATIENCE_S, held=True)
        assert held is not None
        with open_source([Address(address) if is_elsewhere else address], newest={}) as source:
            publish(sink, 1, 2)
            assert receive(source) == 2
            del held
            slow.close()
            assert inspect(sink.place).count(State.READY) == 1
            until = time.monotonic() + PATIENCE_S
            while inspect(sink.place).count(State.READY):
                assert source.receive(0.01) is None
                assert time.monotonic() < until
            publish(sink, 3)
            assert receive(source) == 3
        wait_until(lambda: inspect(sink.place).count(State.LEASED) == 0)  # elsewhere, to say so takes a moment


def test_a_source_that_follows_another_one_goes_on_from_what_that_one_gave(twin: Twin, place: SharedPlace) -> None:
    address = Address(f"tcp://127.0.0.1:{free_port()}", twin)
    newest: dict[int, int] = {}
    with open_sink(address) as sink, open_source([address]) as slow:
        publish(sink, 0)
        held = slow.receive(PATIENCE_S, held=True)
        publish(sink, 1, 2)
        with open_source([address], newest=newest) as source:
            assert receive(source) == 2
        del held
        slow.close()
        with open_source([address], newest=newest) as source:
            assert source.receive(0) is None
            assert inspect(place).count(State.READY) == 0
            publish(sink, 3)
            assert receive(source) == 3


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_what_was_skipped_is_counted_and_its_slots_are_free(twin: Twin, is_elsewhere: bool) -> None:
    address = Address(f"tcp://127.0.0.1:{free_port()}", twin)
    with open_sink(address) as sink:
        with open_source([Address(address) if is_elsewhere else address], newest={}) as source:
            for first in range(0, 30, 10):
                publish(sink, *range(first, first + 10))
                assert receive(source) == first + 9
        while inspect(sink.place).count(State.LEASED):
            time.sleep(0.01)
        (seen,) = stats(address)
        assert (seen.published, seen.delivered, seen.released, seen.skipped, seen.ready) == (30, 30, 30, 27, 0)
        assert sorted(consumer.skipped for consumer in seen.consumers)[-1] == 27


def test_a_remote_reader_that_may_not_take_pickles_leaves_them_to_others(twin: Twin) -> None:
    address = Address(f"tcp://127.0.0.1:{free_port()}", twin)
    with open_sink(address) as sink, open_source([Address(address)], newest={}) as source:
        publish(sink, 0)
        sink.publish({"i": 1, "image": picture(1), "set": {1}})
        publish(sink, 2)
        sink.publish({"i": 3, "image": picture(3), "set": {1}})
        assert receive(source) == 2
        with open_source([address]) as near:
            assert [receive(near), receive(near)] == [1, 3]
