"""Who waits looks again and again for a moment before it sleeps, if its last wait was short."""

import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from blendtorch_shm.errors import StreamClosed
from blendtorch_shm.stream import waiting
from blendtorch_shm.stream.bell import Bell
from blendtorch_shm.stream.control import Control
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer
from blendtorch_shm.stream.waiting import Spin
from blendtorch_shm.transport.local import LocalStream

from .members import NEVER_S, PATIENCE_S, asleep, when

Opened = tuple[LocalStream, Producer, Source]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What is done while somebody spins, the next thing last. Who spins when there is nothing to be done fails."""
    todo: list[Callable[[], Any]] = []

    def sched_yield() -> None:
        todo.pop()()

    monkeypatch.setattr(os, "sched_yield", sched_yield)
    return todo


@pytest.fixture
def long_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait is short, so that a spin lasts as long as it has to."""
    monkeypatch.setattr(waiting, "SPIN_S", NEVER_S)


@pytest.fixture
def no_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait is long."""
    monkeypatch.setattr(waiting, "SPIN_S", 0.0)


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    """A stream within this process and its ends; `send_hwm` may be its parameter."""
    stream = LocalStream(send_hwm=getattr(request, "param", 10))
    with stream.open_sink() as sink, stream.open_source() as source:
        yield stream, sink, source


def wait_once(stream: LocalStream, sink: Producer, source: Source) -> None:
    """Let the source wait for a message; the first time, nobody spins."""
    publishing = when(lambda: asleep(stream.place), lambda: sink.publish({"i": 0}))
    assert source.receive(PATIENCE_S) is not None
    publishing.join()


def test_a_spin_goes_on_only_after_a_short_wait_and_only_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    spin = Spin()
    monkeypatch.setattr(waiting, "SPIN_S", NEVER_S)
    spin.begin()
    assert not spin.goes_on(), "it never waited"
    spin.end()
    spin.begin()
    assert spin.goes_on()
    monkeypatch.setattr(waiting, "SPIN_S", 0.0)
    assert not spin.goes_on(), "the moment is over"
    spin.end()
    spin.begin()
    assert not spin.goes_on(), "the last wait was too long"


def test_where_waits_are_long_a_spin_is_tried_less_and_less_often_until_one_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    spin = Spin()

    def spins_in_a_wait_of(seconds: float) -> bool:
        nonlocal now
        spin.begin()
        spins = spin.goes_on()
        now += seconds
        spin.end()
        return spins

    pattern = "".join(
        "x" if spins_in_a_wait_of(1.0) else "." for _ in range(300)
    )  # the pauses are 1, 2, 4 ... and no longer than 64
    assert pattern.startswith(".x..x....x........x................x")
    assert f"x{'.' * 64}x" in pattern
    while not spins_in_a_wait_of(waiting.SPIN_S / 2):
        pass
    assert spins_in_a_wait_of(1.0)
    assert spins_in_a_wait_of(1.0), "it begins with frequent trials again"
    assert not spins_in_a_wait_of(1.0)


def test_a_consumer_whose_last_wait_was_short_finds_the_next_message_without_being_told(
    opened: Opened, meanwhile: list[Callable[[], Any]], long_spin: None
) -> None:
    stream, sink, source = opened
    wait_once(*opened)
    seen: list[dict[int, int]] = []

    def publish() -> None:
        seen.append(asleep(stream.place))
        sink.publish({"i": 1})

    meanwhile[:] = [publish, lambda: None]
    message = source.receive(PATIENCE_S)
    assert message is not None
    assert (message.fields, meanwhile, seen) == ({"i": 1}, [], [{}])


def test_who_wants_many_messages_does_not_spin(
    opened: Opened, meanwhile: list[Callable[[], Any]], long_spin: None
) -> None:
    _, _, source = opened
    wait_once(*opened)
    assert source.receive_many(2, 0.01) == []


def test_a_consumer_whose_last_wait_was_long_does_not_spin(
    opened: Opened, meanwhile: list[Callable[[], Any]], no_spin: None
) -> None:
    for _ in range(3):
        wait_once(*opened)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What is done while somebody naps, the next thing last. Who naps when there is nothing to be done fails."""
    todo: list[Callable[[], Any]] = []
    monkeypatch.setattr(waiting, "NAPS_S", NEVER_S)
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: todo.pop()()))
    return todo


def test_who_shares_a_stream_naps_instead_of_spinning(
    place: SharedPlace, meanwhile: list[Callable[[], Any]], naps: list[Callable[[], Any]]
) -> None:
    with Producer(place, trusted=True) as sink, Source([place]) as first, Source([place]) as second:
        publishing = when(lambda: asleep(place), lambda: sink.publish({"i": 0}))
        assert first.receive(PATIENCE_S) is not None
        publishing.join()
        Control.attach(place).asleep[255] = 1  # another one sleeps
        naps[:] = [lambda: sink.publish({"i": 1})]
        assert first.receive(PATIENCE_S) is not None
        Control.attach(place).asleep[255] = 0
        for i in (2, 3):
            sink.publish({"i": i})
        assert second.receive(PATIENCE_S) is not None
        assert first.receive(PATIENCE_S) is not None  # the other one took the message before
        naps[:] = [lambda: sink.publish({"i": 4}), lambda: None]
        message = first.receive(PATIENCE_S)
        assert message is not None
        assert (message.fields, naps, meanwhile) == ({"i": 4}, [], [])


def test_who_naps_for_too_long_sleeps(
    place: SharedPlace, naps: list[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Producer(place, trusted=True) as sink, Source([place]) as source:
        publishing = when(lambda: asleep(place), lambda: sink.publish({"i": 0}))
        assert source.receive(PATIENCE_S) is not None
        publishing.join()
        Control.attach(place).asleep[255] = 1
        naps[:] = [lambda: monkeypatch.setattr(waiting, "NAPS_S", 0.0)]
        publishing = when(lambda: len(asleep(place)) == 2, lambda: sink.publish({"i": 1}))
        assert source.receive(PATIENCE_S) is not None
        publishing.join()
        assert naps == []


def test_a_spin_ends_with_the_patience_of_who_waits(opened: Opened, long_spin: None) -> None:
    _, _, source = opened
    wait_once(*opened)
    assert source.receive(0.01) is None


@pytest.mark.parametrize("opened", [2], indirect=True)
def test_a_producer_whose_last_wait_was_short_looks_for_room_before_it_sleeps(
    opened: Opened, meanwhile: list[Callable[[], Any]], long_spin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, sink, source = opened
    slept: list[float] = []

    def wait(bell: Bell, timeout_s: float) -> None:
        slept.append(timeout_s)
        assert source.receive(0) is not None
        assert source.receive(0) is not None

    monkeypatch.setattr(Bell, "wait", wait)
    for i in range(3):
        sink.publish({"i": i})
    assert len(slept) == 1  # the first wait
    sink.publish({"i": 3})
    control = Control.attach(stream.place)
    stalled_ns = control.stalled_ns
    meanwhile[:] = [lambda: source.receive(0), lambda: None]
    sink.publish({"i": 4})
    assert (meanwhile, len(slept)) == ([], 1)
    assert control.stalled_ns > stalled_ns  # spinning is waiting, too
    monkeypatch.setattr(waiting, "SPIN_S", 0.0)
    sink.publish({"i": 5})
    assert len(slept) == 2


@pytest.mark.parametrize("opened", [1], indirect=True)
def test_a_producer_that_spins_may_be_closed(
    opened: Opened, meanwhile: list[Callable[[], Any]], long_spin: None
) -> None:
    stream, sink, source = opened
    sink.publish({"i": 0})
    taking = when(lambda: inspect(stream.place).waiting, lambda: source.receive(0))
    sink.publish({"i": 1})  # a wait
    taking.join()
    meanwhile[:] = [sink.stop_waiting]
    with pytest.raises(StreamClosed, match="was closed while publishing waited for room"):
        sink.publish({"i": 2})
    assert meanwhile == []
