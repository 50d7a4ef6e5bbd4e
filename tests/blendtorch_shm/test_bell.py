"""Bells: what wakes who sleeps, whom it wakes, and that a stream goes on where none rings."""

import gc
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from blendtorch_shm.errors import SegmentError, StreamClosed
from blendtorch_shm.launch.address import Address
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.memory.locks import PRODUCER_LOCK, consumer_lock
from blendtorch_shm.message.wire import Message
from blendtorch_shm.stream.bell import Bell, open_bell, private_bell
from blendtorch_shm.stream.control import FOR_A_SLOT, WAITING
from blendtorch_shm.stream.sink import RingSink
from blendtorch_shm.stream.source import RingSource
from blendtorch_shm.transport import open_sink, open_source

CONSUMER = """
import pickle, sys
from blendtorch_shm.stream import source
from blendtorch_shm.transport import open_source

source.IDLE_S = float(sys.argv[3])
opened = open_source([pickle.loads(bytes.fromhex(sys.argv[1]))])
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    print(opened.receive(600).fields["i"], flush=True)
opened.close()
"""


@pytest.fixture(params=["pipe", "eventfd"])
def bell(request: pytest.FixtureRequest, tmp_path: Path) -> Bell:
    return private_bell() if request.param == "eventfd" else open_bell(str(tmp_path / "bell"))


def addresses_of(launch_directory: LaunchDirectory, count: int) -> list[Address]:
    return [Address("tcp://127.0.0.1:*", launch_directory.twin("DATA", i)) for i in range(count)]


@pytest.fixture
def address(launch_directory: LaunchDirectory) -> Address:
    return addresses_of(launch_directory, 1)[0]


@pytest.fixture
def sink(address: Address) -> Iterator[RingSink]:
    sink = open_sink(address)
    yield sink
    sink.close()


@pytest.fixture
def deep_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sleeps looks by himself only after a time that no test lasts."""
    monkeypatch.setattr("blendtorch_shm.stream.source.IDLE_S", 600.0)
    monkeypatch.setattr("blendtorch_shm.stream.writer._SLOW_WAIT_S", 600.0)


def ring_source(*addresses: Address) -> RingSource:
    source = open_source(addresses)
    assert isinstance(source, RingSource)
    return source


class Consumer:
    """A process that receives messages, and says so."""

    def __init__(self, address: Address, count: int, idle_s: float = 600.0) -> None:
        command = [sys.executable, "-c", CONSUMER, pickle.dumps(address).hex(), str(count), str(idle_s)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.hear() == "ready"

    def hear(self) -> str:
        """What it says next."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        """Bury it, whether it has ended or was killed."""
        self.process.communicate(timeout=60)


def wait_until_asleep(sink: RingSink, *consumers: Consumer, others: int = 0) -> None:
    """All of these, each of which has one thread and waits for nothing but its bell; and so many others."""
    while sink._writer._sleepers._asleep.tobytes().count(1) < len(consumers) + others:
        time.sleep(0.001)
    for consumer in consumers:
        while Path(f"/proc/{consumer.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.001)


def when(condition: Callable[[], bool], action: Callable[[], object]) -> threading.Thread:
    """A thread that waits for `condition`, then does `action`."""

    def run() -> None:
        while not condition():
            time.sleep(0.001)
        action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


# -- a bell ---------------------------------------------------------------------------------------------------


def test_a_bell_rings_until_it_is_cleared_however_often_it_was_rung(bell: Bell) -> None:
    assert not bell.is_rung()
    bell.clear()
    for _ in range(3):
        bell.ring()
    assert bell.is_rung()
    bell.clear()
    assert not bell.is_rung()


def test_a_bell_that_nobody_hears_may_be_rung_for_ever(bell: Bell) -> None:
    for _ in range(100_000):
        bell.ring()
    assert bell.is_rung()
    bell.clear()
    assert not bell.is_rung()


def test_who_waits_for_a_bell_is_woken_by_another_thread(bell: Bell) -> None:
    timer = threading.Timer(0.02, bell.ring)
    timer.start()
    bell.wait(600.0)
    timer.join()
    assert not bell.is_rung()


def test_waiting_ends_without_a_ring_and_a_signal_does_not_lose_what_its_handler_raises(bell: Bell) -> None:
    bell.wait(0.01)

    def interrupt(*_: object) -> None:
        raise InterruptedError("a signal")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with pytest.raises(InterruptedError, match="a signal"):
            bell.wait(600.0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_both_ends_of_a_pipe_are_the_same_bell_whoever_opens_it_first(tmp_path: Path) -> None:
    first, second = (open_bell(str(tmp_path / "bell")) for _ in range(2))
    first.ring()
    assert second.is_rung()
    del first
    second.ring()  # nobody else has it open
    assert second.is_rung()


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


# -- whom it wakes --------------------------------------------------------------------------------------------


def test_a_consumer_that_sleeps_is_woken_by_each_message(address: Address, sink: RingSink) -> None:
    consumer = Consumer(address, 20)
    for i in range(20):
        wait_until_asleep(sink, consumer)
        sink.publish({"i": i})
        assert consumer.hear() == str(i)
    consumer.end()


def test_consumers_that_sleep_are_woken_in_turn(address: Address, sink: RingSink) -> None:
    consumers = [Consumer(address, 2) for _ in range(3)]
    for i in range(6):
        wait_until_asleep(sink, *consumers[max(0, i - 3) :])
        sink.publish({"i": i})
        assert consumers[i % 3].hear() == str(i)
    for consumer in consumers:
        consumer.end()


def test_a_consumer_with_the_number_of_one_that_was_killed_in_its_sleep_is_woken(
    address: Address, sink: RingSink
) -> None:
    killed = Consumer(address, 1)
    wait_until_asleep(sink, killed)
    killed.process.kill()
    killed.end()
    sink.publish({"i": 0})  # rings for the dead one, who is not known to be
    successor = Consumer(address, 2)
    assert successor.hear() == "0"
    wait_until_asleep(sink, successor)
    sink.publish({"i": 1})
    assert successor.hear() == "1"
    successor.end()


def test_a_consumer_that_sleeps_is_woken_by_the_next_producer(address: Address) -> None:
    first = open_sink(address)
    consumer = Consumer(address, 1)
    wait_until_asleep(first, consumer)
    first.close()
    second = open_sink(address)
    second.publish({"i": 0})
    assert consumer.hear() == "0"
    consumer.end()
    second.close()


def test_a_consumer_of_several_streams_is_woken_by_any_of_them(
    launch_directory: LaunchDirectory, deep_sleep: None
) -> None:
    addresses = addresses_of(launch_directory, 3)
    sinks = [open_sink(address) for address in addresses]
    source = open_source(addresses)
    for i in (1, 0, 2, 2, 1):
        timer = threading.Timer(0.02, sinks[i].publish, [{"i": i}])
        timer.start()
        message = source.receive(600)
        timer.join()
        assert message is not None
        assert message.fields == {"i": i}
    source.close()
    for sink in sinks:
        sink.close()


def test_a_forwarder_that_sleeps_is_woken_beside_the_next_consumer(
    sink: RingSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has to wait for Python's lock before it sends anything, and so must not be the only one."""
    woken: list[int] = []

    def wake(index: int) -> bool:
        woken.append(index)
        return True

    monkeypatch.setattr(sink._writer._sleepers, "_wake", wake)
    forwarder = sink._writer.companion
    assert forwarder is not None
    others = [forwarder + 1, forwarder + 2]
    asleep = sink._writer._sleepers._asleep
    for consumers in ([forwarder, *others], others, [forwarder], [forwarder, *others], []):
        for index in (forwarder, *others):
            asleep[index] = index in consumers
        sink._writer.wake_a_consumer()
        woken.append(-1)
    assert woken == [forwarder, others[0], -1, others[1], -1, forwarder, -1, forwarder, others[0], -1, -1]


def test_a_consumer_that_was_woken_and_has_not_run_since_is_passed_over(address: Address, sink: RingSink) -> None:
    stopped, other = Consumer(address, 1), Consumer(address, 4)
    wait_until_asleep(sink, stopped, other)
    stopped.process.send_signal(signal.SIGSTOP)
    for i in range(2):
        sink.publish({"i": i})  # one of the two rings for the one that cannot run
    assert [other.hear() for _ in range(2)] == ["0", "1"]
    for i in range(2, 4):
        wait_until_asleep(sink, other, others=1)
        sink.publish({"i": i})
        assert other.hear() == str(i)
    other.end()
    stopped.process.send_signal(signal.SIGCONT)
    sink.publish({"i": 4})
    assert stopped.hear() == "4"
    stopped.end()


def test_who_takes_one_message_and_leaves_another_wakes_somebody_for_it(
    launch_directory: LaunchDirectory, deep_sleep: None
) -> None:
    """It was woken by both of its streams, and nobody else was."""
    addresses = addresses_of(launch_directory, 2)
    first, second = (open_sink(address) for address in addresses)
    of_both = ring_source(*addresses)
    of_second = ring_source(addresses[1])
    received: list[Message | None] = []
    receiving = threading.Thread(target=lambda: received.append(of_second.receive(600)))
    receiving.start()
    while not second._writer._sleepers.anyone():
        time.sleep(0.001)
    for reader in of_both._readers:
        reader.sleep(True)
    second._writer._sleepers._woken = of_both._readers[1].index - 1  # so that its turn is next
    second.publish({"i": 2})
    first.publish({"i": 1})
    assert all(reader.bell.is_rung() for reader in of_both._readers)
    assert receiving.is_alive()
    of_both._turn = -1  # the first stream is asked first
    message = of_both.take_or_sleep(600)
    assert message is not None
    assert message.fields == {"i": 1}
    receiving.join()
    assert [message and message.fields for message in received] == [{"i": 2}]
    for end in (of_both, of_second, first, second):
        end.close()


def test_a_producer_that_waits_for_fewer_messages_is_woken(address: Address, deep_sleep: None) -> None:
    sink, source = open_sink(address, send_hwm=1), open_source([address])
    words = sink._writer._words
    sink.publish({"i": 0})
    for i in range(1, 4):
        taking = when(lambda: words[WAITING] == 1, lambda: source.receive(10))
        sink.publish({"i": i})
        taking.join()
    source.close()
    sink.close()


def test_a_producer_that_waits_for_a_slot_is_woken(address: Address, deep_sleep: None) -> None:
    sink, source = open_sink(address, num_slots=5), open_source([address])
    words = sink._writer._words
    message = {"image": np.zeros(5000, np.uint8)}
    held = []
    for _ in range(2):
        sink.publish(message)
        held.append(source.receive(10))
    for _ in range(3):
        sink.publish(message)
    giving_back = when(lambda: words[WAITING] == FOR_A_SLOT, held.clear)
    sink.publish(message)
    giving_back.join()
    source.close()
    sink.close()


# -- without bells --------------------------------------------------------------------------------------------


def test_a_stream_whose_bells_were_removed_still_serves_old_and_new_consumers(address: Address, sink: RingSink) -> None:
    assert address.twin is not None
    old = ring_source(address)
    pipes = list(Path(address.twin.streams).glob("*.bell"))
    assert len(pipes) == 3
    for pipe in pipes:
        pipe.unlink()
    new = ring_source(address)
    for i in range(6):
        source = (old, new)[i % 2]
        publishing = when(sink._writer._sleepers.anyone, lambda i=i: sink.publish({"i": i}))
        message = source.receive(10)
        publishing.join()
        assert message is not None
        assert message.fields == {"i": i}
    old.close()
    new.close()


def test_a_producer_that_cannot_open_a_bell_publishes_all_the_same(address: Address, sink: RingSink) -> None:
    sink.publish({"i": 0})
    consumer = Consumer(address, 3, idle_s=0.05)
    assert consumer.hear() == "0"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for i in (1, 2):
        wait_until_asleep(sink, consumer)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            sink.publish({"i": i})
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert consumer.hear() == str(i), "it looks by itself"
    assert sink._writer._sleepers._bells == {}
    consumer.end()


def test_the_bells_of_a_stream_are_its_users_alone_and_go_with_its_launch(
    address: Address, sink: RingSink, launch_directory: LaunchDirectory
) -> None:
    assert address.twin is not None
    source = ring_source(address)
    companion = sink._writer.companion
    assert companion is not None
    members = [PRODUCER_LOCK, consumer_lock(companion), consumer_lock(source._readers[0].index)]
    assert len(set(members)) == 3
    paths = [address.twin.bell_path(member) for member in members]
    assert [stat.filemode(os.stat(path).st_mode) for path in paths] == ["prw-------"] * 3
    launch_directory.remove()
    assert not any(os.path.exists(path) for path in paths)
    source.close()


def test_a_source_that_was_closed_sleeps_at_nothing(address: Address, sink: RingSink) -> None:
    source = ring_source(address)
    fd = source._readers[0].bell.fd
    source.close()
    assert not os.path.exists(f"/proc/self/fd/{fd}")
    assert source._poller.poll(0) == []
    with pytest.raises(StreamClosed, match=r"receive\(\) after close"):
        source.receive(600)


def test_ctrl_c_while_a_bell_goes_is_not_lost() -> None:
    program = """
import os
from blendtorch_shm.stream import bell
from blendtorch_shm.process import interrupts

def interrupt(fd):
    os.close(fd)
    raise KeyboardInterrupt

bell.Bell.__del__.__defaults__ = (interrupt,)
bell.private_bell()
try:
    interrupts.raise_kept()
except KeyboardInterrupt:
    print("kept")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("kept\n", "")
