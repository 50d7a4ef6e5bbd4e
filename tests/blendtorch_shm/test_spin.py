"""Who waits looks again and again for a moment before it sleeps, if the last wait was short, and if that helps."""

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from blendtorch_shm.address import Address, Twin
from blendtorch_shm.errors import StreamClosed
from blendtorch_shm.source import RingSource
from blendtorch_shm.stream import STALLED_NS
from blendtorch_shm.transport import open_sink, open_source
from blendtorch_shm.transport.local import LocalStream


@pytest.fixture
def yields(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What is to be done while somebody spins, the next thing last; it may be nothing."""
    todo: list[Callable[[], Any]] = []

    def sched_yield() -> None:
        todo.pop()()

    monkeypatch.setattr(os, "sched_yield", sched_yield)
    return todo


def be_brisk(source: RingSource, sink: Any) -> None:
    """Wait for a message that comes while `source` looks for the second time, which is soon."""
    found = source._readers[0].sleep  # called between the two looks

    def publish(asleep: bool) -> None:
        source._readers[0].sleep = found  # type: ignore[method-assign]
        sink.publish({"i": -1})

    source._readers[0].sleep = publish  # type: ignore[method-assign]
    source._is_brisk = False
    message = source.receive(10)
    assert message is not None
    assert message.fields == {"i": -1}


def test_a_consumer_whose_last_wait_was_short_is_not_woken_for_the_next_message(
    yields: list[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = LocalStream()
    sink, source = stream.open_sink(), stream.open_source()
    monkeypatch.setattr("blendtorch_shm.source.SPIN_S", 60.0)
    be_brisk(source, sink)
    announced: list[None] = []
    monkeypatch.setattr(stream._bell, "announce", lambda: announced.append(None))
    yields[:] = [lambda: sink.publish({"i": 1}), lambda: None]
    message = source.receive(10)
    assert message is not None
    assert (message.fields, yields, announced) == ({"i": 1}, [], [])
    source.close()
    sink.close()


def test_a_consumer_that_slept_does_not_spin(yields: list[Callable[[], Any]]) -> None:
    stream = LocalStream()
    sink, source = stream.open_sink(), stream.open_source()
    for i in range(3):  # a spin would fail: there is nothing to be done meanwhile
        timer = threading.Timer(0.02, sink.publish, [{"i": i}])
        timer.start()
        message = source.receive(10)
        assert message is not None
        assert message.fields == {"i": i}
        timer.join()
    source.close()
    sink.close()


def test_nobody_spins_while_another_consumer_sleeps(
    twin: Twin, yields: list[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    sink = open_sink(address)
    first, second = open_source([address]), open_source([address])
    assert isinstance(first, RingSource)
    assert isinstance(second, RingSource)
    monkeypatch.setattr("blendtorch_shm.source.SPIN_S", 60.0)
    be_brisk(first, sink)
    second._readers[0].sleep(True)
    assert first.receive(0.01) is None
    second._readers[0].sleep(False)
    be_brisk(first, sink)
    yields[:] = [lambda: sink.publish({"i": 1})]
    assert first.receive(0.01) is not None
    for end in (first, second, sink):
        end.close()


def test_a_spin_ends_with_the_patience_of_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = LocalStream()
    sink, source = stream.open_sink(), stream.open_source()
    monkeypatch.setattr("blendtorch_shm.source.SPIN_S", 60.0)
    be_brisk(source, sink)
    assert source.receive(0.01) is None
    assert not source._is_brisk
    source.close()
    sink.close()


def test_a_producer_whose_last_wait_was_short_looks_for_room_before_it_sleeps(
    yields: list[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = LocalStream(send_hwm=2)
    sink, source = stream.open_sink(), stream.open_source()
    monkeypatch.setattr("blendtorch_shm.writer.SPIN_S", 60.0)
    slept: list[float] = []

    def sleep(timeout: float) -> None:
        slept.append(timeout)
        assert source.receive(10) is not None
        assert source.receive(10) is not None

    monkeypatch.setattr(sink._writer._room, "acquire", sleep)
    for i in range(3):
        sink.publish({"i": i})
    assert len(slept) == 1  # the first wait
    sink.publish({"i": 3})
    yields[:] = [lambda: source.receive(10), lambda: None]
    stalled_ns = sink._writer._words[STALLED_NS]
    sink.publish({"i": 4})
    assert (yields, len(slept)) == ([], 1)
    assert sink._writer._words[STALLED_NS] > stalled_ns  # spinning is waiting, too
    monkeypatch.setattr(sink._writer, "_is_brisk", False)
    sink.publish({"i": 5})
    assert len(slept) == 2
    source.close()
    sink.close()


def test_a_producer_that_spins_may_be_closed(yields: list[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = LocalStream(send_hwm=1)
    sink = stream.open_sink()
    monkeypatch.setattr("blendtorch_shm.writer.SPIN_S", 60.0)
    sink.publish({"i": 0})
    sink._writer._is_brisk = True
    yields[:] = [sink.stop_waiting]
    with pytest.raises(StreamClosed, match="was closed while publishing waited for room"):
        sink.publish({"i": 1})
    assert yields == []
    sink.close()
