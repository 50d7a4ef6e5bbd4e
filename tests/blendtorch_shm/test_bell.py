"""The producer's bell: what wakes a producer that waits for room, and that a stream goes on where none rings."""

import gc
import os
import select
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blendtorch_shm.errors import SegmentError, StreamClosed
from blendtorch_shm.launch.address import Twin
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.memory.layout import FOR_A_SLOT
from blendtorch_shm.memory.states import State
from blendtorch_shm.stream import producer
from blendtorch_shm.stream.bell import Bell, open_bell, private_bell
from blendtorch_shm.stream.control import Control
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer

from .members import NEVER_S, PATIENCE_S, ConsumerProcess, when

PICTURE = np.zeros(9000, np.uint8)


@pytest.fixture(params=["pipe", "eventfd"])
def bell(request: pytest.FixtureRequest, tmp_path: Path) -> Bell:
    return private_bell() if request.param == "eventfd" else open_bell(str(tmp_path / "bell"))


@pytest.fixture
def never_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A producer that waits looks by itself only after a time that no test lasts, so that only its bell can have woken it."""
    monkeypatch.setattr(producer, "_LOOK_EVERY_S", NEVER_S)


@pytest.fixture
def source(place: SharedPlace) -> Iterator[Source]:
    with Source([place]) as source:
        yield source


def is_rung(bell: Bell) -> bool:
    poller = select.poll()
    poller.register(bell.fd, select.POLLIN)
    return bool(poller.poll(0))


# -- a bell ---------------------------------------------------------------------------------------------------


def test_a_bell_rings_until_it_is_cleared_however_often_it_was_rung(bell: Bell) -> None:
    assert not is_rung(bell)
    bell.clear()
    for _ in range(3):
        bell.ring()
    assert is_rung(bell)
    bell.clear()
    assert not is_rung(bell)


def test_a_bell_that_nobody_hears_may_be_rung_for_ever(bell: Bell) -> None:
    for _ in range(100_000):
        bell.ring()
    assert is_rung(bell)
    bell.clear()
    assert not is_rung(bell)


def test_who_waits_for_a_bell_is_woken_by_another_thread(bell: Bell) -> None:
    timer = threading.Timer(0.02, bell.ring)
    timer.start()
    bell.wait(NEVER_S)
    timer.join()
    assert not is_rung(bell)


def test_waiting_ends_without_a_ring_and_a_signal_does_not_lose_what_its_handler_raises(bell: Bell) -> None:
    bell.wait(0.01)

    def interrupt(*_: object) -> None:
        raise InterruptedError("a signal")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with pytest.raises(InterruptedError, match="a signal"):
            bell.wait(NEVER_S)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_both_ends_of_a_pipe_are_the_same_bell_whoever_opens_it_first(tmp_path: Path) -> None:
    first, second = (open_bell(str(tmp_path / "bell")) for _ in range(2))
    first.ring()
    assert is_rung(second)
    del first
    second.ring()  # nobody else has it open
    assert is_rung(second)


def test_a_bell_takes_a_descriptor_for_as_long_as_it_lives(tmp_path: Path) -> None:
    gc.collect()
    before = os.listdir("/proc/self/fd")
    bells = [open_bell(str(tmp_path / "bell")), private_bell()]
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    bells.clear()
    assert os.listdir("/proc/self/fd") == before


def test_what_is_not_a_pipe_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(SegmentError, match=r"none/bell: No such file.*launch is over"):
        open_bell(str(tmp_path / "none" / "bell"))
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(SegmentError, match="file is not a pipe of this user"):
        open_bell(str(file))
    assert file.read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(SegmentError, match="Cannot open the pipe .*link"):
        open_bell(str(tmp_path / "link"))
    if os.geteuid() == 0:
        os.chown(tmp_path / "pipe", 12345, -1)
        with pytest.raises(SegmentError, match="pipe is not a pipe of this user"):
            open_bell(str(tmp_path / "pipe"))


# -- a producer that waits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("send_hwm", [1, 2, 5])
def test_a_producer_that_waits_for_room_is_woken_when_few_enough_are_ready(
    place: SharedPlace, never_looks: None, send_hwm: int
) -> None:
    with Producer(place, send_hwm=send_hwm, trusted=True) as sink, Source([place]) as source:
        for i in range(send_hwm):
            sink.publish({"i": i})
        wake_below = (send_hwm + 1) // 2
        received: list[int] = []

        def take() -> None:
            while inspect(place).count(State.READY) >= wake_below:
                message = source.receive(PATIENCE_S)
                assert message is not None
                received.append(message.fields["i"])

        taking = when(lambda: inspect(place).waiting == wake_below, take)
        sink.publish({"i": send_hwm})
        taking.join()
        assert received[: send_hwm - wake_below + 1] == list(range(send_hwm - wake_below + 1))
        assert inspect(place).waiting == 0


def test_a_producer_that_waits_for_a_slot_is_woken_when_the_last_view_of_a_message_has_gone(
    place: SharedPlace, never_looks: None
) -> None:
    with Producer(place, num_slots=5, trusted=True) as sink, Source([place]) as source:
        held = []
        for _ in range(2):
            sink.publish({"image": PICTURE})
            message = source.receive(PATIENCE_S)
            assert message is not None
            held.append(message.fields["image"][10:20])  # a view keeps the whole
            del message
        for _ in range(3):
            sink.publish({"image": PICTURE})
        giving_back = when(lambda: inspect(place).waiting == FOR_A_SLOT, held.clear)
        sink.publish({"image": PICTURE})
        giving_back.join()
        assert inspect(place).waiting == 0


@pytest.mark.parametrize("send_hwm", [1, 10])
def test_a_producer_is_woken_by_a_consumer_in_another_process(
    place: SharedPlace, never_looks: None, send_hwm: int
) -> None:
    with Producer(place, send_hwm=send_hwm, num_slots=12, trusted=True) as sink:
        consumer = ConsumerProcess(place)
        consumer.begin(200)
        for i in range(200):
            sink.publish({"i": i, "image": PICTURE})
        assert consumer.result().fields == [{"i": i, "image": (0, 0)} for i in range(200)]
        consumer.end()


def test_a_claim_rings_where_it_leaves_few_enough_and_a_release_where_a_slot_is_needed(
    place: SharedPlace, source: Source
) -> None:
    """A bell costs two switches between processes, so it must not ring for each message."""
    with Producer(place, send_hwm=8, trusted=True) as sink:
        control, bell = Control.attach(place), place.open_bell()
        for _ in range(6):
            sink.publish({"image": PICTURE})
        assert source.receive(PATIENCE_S) is not None
        seen = []
        held = []
        for waiting, takes in [
            (0, True),
            (4, True),
            (4, True),
            (3, False),
            (FOR_A_SLOT, True),
            (FOR_A_SLOT, False),
            (0, False),
        ]:
            control.waiting = waiting
            bell.clear()
            if takes:
                held.append(source.receive(PATIENCE_S))
            else:
                held.pop()
            seen.append(is_rung(bell))
        assert seen == [False, True, True, False, False, True, False]  # 5 were READY at first
        control.waiting = 0
        held.clear()


def test_a_producer_that_waits_in_another_thread_is_closed_at_once(place: SharedPlace, never_looks: None) -> None:
    sink = Producer(place, send_hwm=1, trusted=True)
    sink.publish({"i": 0})
    closing = when(lambda: inspect(place).waiting, sink.close)
    with pytest.raises(StreamClosed, match="was closed while publishing waited for room"):
        sink.publish({"i": 1})
    closing.join()
    assert inspect(place).count(State.READY) == 1


def test_a_producer_whose_bell_was_removed_looks_by_itself(place: SharedPlace, twin: Twin) -> None:
    with Producer(place, send_hwm=1, trusted=True) as sink:
        os.unlink(twin.bell_path)
        with Source([place]) as source:  # whose bell is another one
            sink.publish({"i": 0})
            taking = when(lambda: inspect(place).waiting, lambda: source.receive(PATIENCE_S))
            sink.publish({"i": 1})
            taking.join()
            message = source.receive(PATIENCE_S)
            assert message is not None
            assert message.fields == {"i": 1}


def test_the_pipe_of_a_stream_is_its_users_alone_and_goes_with_its_launch(
    place: SharedPlace, twin: Twin, launch_directory: LaunchDirectory
) -> None:
    with Producer(place, trusted=True):
        assert stat.filemode(os.stat(twin.bell_path).st_mode) == "prw-------"
        launch_directory.remove()
        assert not os.path.exists(twin.bell_path)
