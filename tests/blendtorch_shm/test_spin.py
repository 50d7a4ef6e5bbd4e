"""How who waits is woken, and when it looks again and again for a moment instead: if its last wait was short."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from blendtorch_shm.errors import StreamClosed
from blendtorch_shm.launch.address import Address, Twin
from blendtorch_shm.stream.bell import Bell
from blendtorch_shm.stream.control import FOR_A_SLOT, STALLED_NS, WAITING, Spin
from blendtorch_shm.stream.sink import RingSink
from blendtorch_shm.stream.source import RingSource
from blendtorch_shm.transport import open_sink, open_source
from blendtorch_shm.transport.local import LocalStream

Opened = tuple[LocalStream, RingSink, RingSource]


@pytest.fixture
def yields(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What is to be done while somebody spins, the next thing last; it may be nothing."""
    todo: list[Callable[[], Any]] = []

    def sched_yield() -> None:
        todo.pop()()

    monkeypatch.setattr(os, "sched_yield", sched_yield)
    return todo


@pytest.fixture
def long_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spin lasts as long as it has to."""
    monkeypatch.setattr("blendtorch_shm.stream.control.SPIN_S", 60.0)


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    """A stream within this process and its ends; `send_hwm` may be its parameter."""
    stream = LocalStream(send_hwm=getattr(request, "param", 10))
    sink, source = stream.open_sink(), stream.open_source()
    yield stream, sink, source
    source.close()
    sink.close()


def waited_shortly(spin: Spin) -> None:
    spin.begin()
    spin.end()


def test_a_consumer_whose_last_wait_was_short_is_not_woken_for_the_next_message(
    opened: Opened, yields: list[Callable[[], Any]], long_spin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sink, source = opened
    waited_shortly(source._spin)
    rings: list[None] = []
    monkeypatch.setattr(Bell, "ring", lambda bell: rings.append(None))
    yields[:] = [lambda: sink.publish({"i": 1}), lambda: None]
    message = source.receive(10)
    assert message is not None
    assert (message.fields, yields, rings) == ({"i": 1}, [], [])


def test_who_wants_many_messages_does_not_spin(
    opened: Opened, yields: list[Callable[[], Any]], long_spin: None
) -> None:
    _, _, source = opened
    waited_shortly(source._spin)
    assert source.receive_many(2, 0.01) == []  # a spin would fail: there is nothing to be done meanwhile


def test_a_consumer_that_slept_does_not_spin(opened: Opened, yields: list[Callable[[], Any]]) -> None:
    _, sink, source = opened
    for i in range(3):  # a spin would fail: there is nothing to be done meanwhile
        timer = threading.Timer(0.02, sink.publish, [{"i": i}])
        timer.start()
        message = source.receive(10)
        assert message is not None
        assert message.fields == {"i": i}
        timer.join()


def test_nobody_spins_while_another_consumer_sleeps(
    twin: Twin, yields: list[Callable[[], Any]], long_spin: None
) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    sink = open_sink(address)
    first, second = open_source([address]), open_source([address])
    assert isinstance(first, RingSource)
    assert isinstance(second, RingSource)
    waited_shortly(first._spin)
    second._readers[0].sleep(True)
    assert first.receive(0.01) is None
    second._readers[0].sleep(False)
    waited_shortly(first._spin)
    yields[:] = [lambda: sink.publish({"i": 1})]
    assert first.receive(10) is not None
    for end in (first, second, sink):
        end.close()


def test_a_spin_ends_with_the_patience_of_who_waits(opened: Opened, long_spin: None) -> None:
    _, _, source = opened
    waited_shortly(source._spin)
    assert source.receive(0.01) is None


@pytest.mark.parametrize("opened", [2], indirect=True)
def test_a_producer_whose_last_wait_was_short_looks_for_room_before_it_sleeps(
    opened: Opened, yields: list[Callable[[], Any]], long_spin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sink, source = opened
    slept: list[float] = []

    def sleep(timeout: float) -> None:
        slept.append(timeout)
        assert source.receive(10) is not None
        assert source.receive(10) is not None

    monkeypatch.setattr(sink._writer._bell, "wait", sleep)
    for i in range(3):
        sink.publish({"i": i})
    assert len(slept) == 1  # the first wait
    sink.publish({"i": 3})
    yields[:] = [lambda: source.receive(10), lambda: None]
    stalled_ns = sink._writer._words[STALLED_NS]
    sink.publish({"i": 4})
    assert (yields, len(slept)) == ([], 1)
    assert sink._writer._words[STALLED_NS] > stalled_ns  # spinning is waiting, too
    monkeypatch.setattr("blendtorch_shm.stream.control.SPIN_S", 0.0)  # every wait is too long
    sink.publish({"i": 5})
    assert len(slept) == 2


@pytest.mark.parametrize("opened", [1], indirect=True)
def test_a_producer_that_spins_may_be_closed(opened: Opened, yields: list[Callable[[], Any]], long_spin: None) -> None:
    _, sink, _ = opened
    sink.publish({"i": 0})
    waited_shortly(sink._writer._spin)
    yields[:] = [sink.stop_waiting]
    with pytest.raises(StreamClosed, match="was closed while publishing waited for room"):
        sink.publish({"i": 1})
    assert yields == []


@pytest.mark.parametrize("opened", [8], indirect=True)
def test_a_producer_is_woken_by_a_claim_that_leaves_few_enough_or_by_a_release_when_it_needs_a_slot(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sink, source = opened
    for _ in range(6):
        sink.publish({"image": np.zeros(9000, np.uint8)})
    reader = source._readers[0]
    wakes: list[None] = []
    monkeypatch.setattr(reader._producers_bell, "ring", lambda: wakes.append(None))
    seen = []
    held = []
    for waiting, take in [
        (0, True),
        (4, True),
        (4, True),
        (4, False),
        (FOR_A_SLOT, True),
        (FOR_A_SLOT, False),
        (0, False),
    ]:
        reader._words[WAITING] = waiting
        if take:
            held.append(source.receive(1))
        else:
            held.pop()
        seen.append(len(wakes))
        wakes.clear()
    assert seen == [0, 0, 1, 0, 0, 1, 0]
    reader._words[WAITING] = 0
    held.clear()
