"""What travels between processes of one host: slot numbers, and nothing else. They are hints, whoever sends them."""

import os
import pickle
import resource
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from blendtorch_shm.launch.address import Address, Twin
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.memory.layout import MAX_SLOTS
from blendtorch_shm.memory.states import State
from blendtorch_shm.message.token import NBYTES, Token, pack, unpack
from blendtorch_shm.stream import merge
from blendtorch_shm.stream.control import Control
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer
from blendtorch_shm.stream.stats import stats

from .members import (
    NEVER_S,
    PATIENCE_S,
    ConsumerProcess,
    Heard,
    ProducerProcess,
    asleep,
    claims,
    numbers,
    wait_until,
)

LOOKS_S = 0.05
"""How soon a sleeper looks by itself, as a rule."""
PATTERN = b"a pixel of a frame: "


@pytest.fixture
def sink(place: SharedPlace) -> Iterator[Producer]:
    with Producer(place, trusted=True) as sink:
        yield sink


def rejected(twin: Twin) -> int:
    """How much the stream's consumers have counted that made no sense."""
    (found,) = stats([Address("tcp://127.0.0.1:1", twin)])
    return found.rejected


# -- what crosses ---------------------------------------------------------------------------------------------


class Wiretap:
    """Stands at the path of an inbox, hands on every byte, and keeps a copy; or hands on none.

    Attributes:
        sent: what each connection's maker sent, such as a producer.
        answered: what was answered.
    """

    def __init__(self, path: str, *, passes: bool = True) -> None:
        self._passes = passes
        self._inbox = f"{path}.tapped"
        os.rename(path, self._inbox)  # a listening socket is an inode, and goes on under its new name
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self.sent: list[bytearray] = []
        self.answered: list[bytearray] = []
        self._open = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # shut down
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._inbox)
            self._open += [near, far]
            self.sent.append(bytearray())
            self.answered.append(bytearray())
            for source, target, record in ((near, far, self.sent[-1]), (far, near, self.answered[-1])):
                self._threads.append(threading.Thread(target=self._hand_on, args=(source, target, record)))
                self._threads[-1].start()

    def _hand_on(self, source: socket.socket, target: socket.socket, record: bytearray) -> None:
        try:
            while data := source.recv(2**20):
                record += data
                if self._passes:
                    target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        for end in self._open:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join()
        for end in self._open:
            end.close()


def frames(sent: bytes) -> list[bytes]:
    """The messages in what one end of a ZeroMQ connection sent (ZMTP 3.1), each of which must be a single frame."""
    found = []
    at = 64  # behind the greeting
    while at < len(sent):
        flags = sent[at]
        size, begin = (int.from_bytes(sent[at + 1 : at + 9]), at + 9) if flags & 2 else (sent[at + 1], at + 2)
        assert begin + size <= len(sent)
        if not flags & 4:  # no command
            assert not flags & 1, "another frame would follow"
            found.append(sent[begin : begin + size])
        at = begin + size
    return found


def sockets_of(pid: int) -> list[str]:
    """All sockets of a process: the paths of those of the Unix kind ("" for the end of who connected), and the kind of others."""
    inodes = set()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{entry}")
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    paths = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        paths[fields[6]] = fields[7] if len(fields) > 7 else ""
    return [paths.get(inode, "of another kind") for inode in inodes]


def test_of_large_frames_only_slot_numbers_cross_between_processes(place: SharedPlace, twin: Twin) -> None:
    """Every byte between them is looked at, in a place that both believe to be the other one."""
    count, shape = 60, (1080, 1920, 4)
    producer = ProducerProcess(place)
    consumer = ConsumerProcess(place)
    path = twin.inbox_path(consumer.index)
    tap = Wiretap(path)
    try:
        consumer.begin(count)
        producer.begin(count, shape, PATTERN)
        result = consumer.result()
        assert [fields["i"] for fields in result.fields] == list(range(count))
        assert sockets_of(producer.pid) == [""], "a producer has one connection to each consumer that ever slept"
        assert set(sockets_of(consumer.pid)) == {path}, "a consumer has its inbox, and connections that came there"
        producer.end()
        consumer.end()
    finally:
        tap.close()
    (sent,), (answered,) = tap.sent, tap.answered
    assert PATTERN not in sent
    assert PATTERN not in answered
    assert frames(bytes(answered)) == []
    pushed = frames(bytes(sent))
    assert 0 < len(pushed) <= count
    tokens = [unpack(number) for number in pushed]
    assert all(token is not None and token.key == Control.attach(place).key for token in tokens)
    assert [token.sequence for token in tokens if token] == sorted({token.sequence for token in tokens if token})
    heard = [entry for entry in result.heard if isinstance(entry, Heard)]
    assert all(len(entry.data) <= 32 and not entry.more for entry in heard)
    assert [entry.data for entry in heard] == pushed[: len(heard)]
    assert len(sent) + len(answered) < 1000 + 34 * count, "8 MB a frame"


def test_an_inbox_is_its_users_alone_and_goes_with_its_source(place: SharedPlace, twin: Twin, sink: Producer) -> None:
    with Source([place]):
        (index,) = inspect(place).consumers
        path = twin.inbox_path(index)
        assert stat.S_ISSOCK(os.stat(path).st_mode)
        assert stat.S_IMODE(os.stat(twin.streams).st_mode) == 0o700
    assert not os.path.exists(path)


# -- numbers that others made up ------------------------------------------------------------------------------


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    """The attacker's."""
    with zmq.Context() as context:
        yield context


def connect(context: "zmq.Context[zmq.Socket[bytes]]", place: SharedPlace, consumer: int) -> "zmq.Socket[bytes]":
    attacker = context.socket(zmq.PUSH)
    attacker.linger = 0
    attacker.connect(place.inbox(consumer))
    return attacker


MAKES_A_FOLDER = b"cos\nmkdir\n(S'hacked'\ntR."


def test_made_up_numbers_are_counted_and_neither_lose_nor_repeat_nor_execute_anything(
    place: SharedPlace,
    twin: Twin,
    sink: Producer,
    context: "zmq.Context[zmq.Socket[bytes]]",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = ConsumerProcess(place)
    key = Control.attach(place).key
    attacker = connect(context, place, consumer.index)
    right = pack(key, 0, 0, 0)
    bad: list[list[bytes]] = [
        [b""],
        [right[:-1]],
        [right + b"\0"],
        [bytes(NBYTES)],
        [b"\xff" * NBYTES],
        [pack(key ^ 1, 0, 0, 0)],
        [pack(key, 0, MAX_SLOTS, 0)],
        [pack(key, 0, 2**32 - 1, 2**64 - 1)],
        [pickle.dumps(Token(key, 0, 0, 0))[:200]],
        [MAKES_A_FOLDER],
        [b"GET / HTTP/1.1\r\n\r\n"],
        [right, right],
        [right, b"", b"x" * 200],
    ]
    counted = sum(map(len, bad)) - 1  # the last part of the first of several parts is right
    harmless = [pack(key, 2**32 - 1, MAX_SLOTS - 1, 2**64 - 1), pack(key, 63, 7, 5), right]
    consumer.begin(3)
    consumer.wait_until_asleep()
    for parts in bad:
        attacker.send_multipart(parts)
    for number in harmless:
        attacker.send(number)
    wait_until(lambda: rejected(twin) == counted)
    for i in range(3):
        sink.publish({"i": i})
    result = consumer.result()
    assert result.fields == [{"i": i} for i in range(3)]
    consumer.begin()
    consumer.wait_until_asleep()
    sink.publish({"i": 3})
    assert consumer.result().fields == [{"i": 3}]
    assert rejected(twin) == counted
    assert inspect(place).count(State.FREE) == len(inspect(place).rings[0].slots)
    folder = Path(os.readlink(f"/proc/{consumer.pid}/cwd"), "hacked")
    assert not folder.exists()
    assert len(MAKES_A_FOLDER) == NBYTES
    monkeypatch.chdir(tmp_path)
    pickle.loads(MAKES_A_FOLDER)
    assert Path("hacked").is_dir(), "it is a program, for whoever would read it as a pickle"
    consumer.end()


def test_who_is_kept_awake_by_made_up_numbers_joins_new_streams_all_the_same(
    place: SharedPlace, launch_directory: LaunchDirectory, sink: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "IDLE_S", NEVER_S)
    later = SharedPlace(launch_directory.twin("DATA", 1))
    done = threading.Event()
    with Source([place, later]) as source, zmq.Context() as context, connect(context, place, 0) as attacker:

        def publish_and_attack() -> None:
            with Producer(later, trusted=True) as other:
                other.publish({"i": 1})
                while not done.wait(0.001):
                    attacker.send(bytes(NBYTES))

        thread = threading.Thread(target=publish_and_attack)
        thread.start()
        try:
            message = source.receive(PATIENCE_S / 2)
            assert message is not None
            assert message.fields == {"i": 1}
        finally:
            done.set()
            thread.join()


def test_who_counts_made_up_numbers_says_so(
    place: SharedPlace, twin: Twin, sink: Producer, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    with Source([place]) as source:
        (index,) = inspect(place).consumers
        attacker = connect(context, place, index)
        for _ in range(5):
            attacker.send(b"no number")
        while rejected(twin) < 5:
            assert source.receive(0.01) is None
        assert "5 messages at its inbox were no slot numbers" in source.explain()


def test_who_sends_too_much_loses_the_connection_and_nobody_else_does(
    place: SharedPlace, sink: Producer, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    consumer = ConsumerProcess(place)
    consumer.begin()
    consumer.wait_until_asleep()
    sink.publish({"i": 0})  # the producer has its connection by now
    assert numbers(consumer.result()) != []
    attacker = connect(context, place, consumer.index)
    monitor = attacker.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    attacker.send(pickle.dumps(bytes(100_000)))
    assert monitor.poll(PATIENCE_S * 1000), "it was cut off"
    attacker.disable_monitor()
    monitor.close()
    for i in (1, 2):
        consumer.begin()
        consumer.wait_until_asleep()
        sink.publish({"i": i})
        result = consumer.result()
        assert result.fields == [{"i": i}]
        assert all(len(entry.data) <= NBYTES for entry in result.heard if isinstance(entry, Heard))
    consumer.end()


def test_who_talks_no_zeromq_at_an_inbox_disturbs_nobody(place: SharedPlace, twin: Twin, sink: Producer) -> None:
    consumer = ConsumerProcess(place)
    talkers = []
    for words in (b"", b"\xff", b"GET / HTTP/1.1\r\n\r\n" * 10_000, os.urandom(100_000), bytes(100_000)):
        talker = socket.socket(socket.AF_UNIX)
        talker.setblocking(False)
        talker.connect(twin.inbox_path(consumer.index))
        try:
            talker.send(words)
        except OSError:  # cut off, or not read
            pass
        talkers.append(talker)
    for i in range(5):
        consumer.begin()
        consumer.wait_until_asleep()
        sink.publish({"i": i})
        assert consumer.result().fields == [{"i": i}]
    for talker in talkers:
        talker.close()
    consumer.end()


def test_old_numbers_that_are_sent_again_and_again_repeat_no_message(
    place: SharedPlace, sink: Producer, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    consumer = ConsumerProcess(place)
    attacker = connect(context, place, consumer.index)
    key = Control.attach(place).key
    done = threading.Event()

    def attack() -> None:
        sequence = 0
        while not done.is_set():
            sequence = (sequence + 1) % 300
            if attacker.poll(10, zmq.POLLOUT):
                attacker.send(pack(key, 0, sequence % 16, sequence))

    attacking = threading.Thread(target=attack)
    attacking.start()
    consumer.begin(300)
    for i in range(300):
        sink.publish({"i": i})
        if i % 10 == 0:
            wait_until(lambda: asleep(place))
    result = consumer.result()
    done.set()
    attacking.join()
    assert [fields["i"] for fields in result.fields] == list(range(300))
    assert [claim.sequence for claim in claims(result)] == list(range(300))
    assert len(numbers(result)) > 300, "most were the attacker's"
    consumer.end()


# -- numbers that never come ----------------------------------------------------------------------------------


@pytest.mark.parametrize("before_the_first", [True, False])
def test_nothing_is_lost_where_an_inbox_was_removed(
    place: SharedPlace, twin: Twin, sink: Producer, before_the_first: bool
) -> None:
    consumer = ConsumerProcess(place, idle_s=LOOKS_S)
    if not before_the_first:
        consumer.begin()
        consumer.wait_until_asleep()
        sink.publish({"i": -1})
        consumer.result()
    os.unlink(twin.inbox_path(consumer.index))
    consumer.begin(20)
    for i in range(20):
        wait_until(lambda: asleep(place))
        sink.publish({"i": i})
    assert consumer.result().fields == [{"i": i} for i in range(20)]
    consumer.end()


def test_whatever_stands_in_the_place_of_an_inbox_closing_and_opening_go_on(
    place: SharedPlace, twin: Twin, sink: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(twin.inbox_path(0))
    with Source([place]):
        path.unlink()
        (path / "in it").mkdir(parents=True)
    assert inspect(place).consumers == []
    sink.publish({"i": 0})
    with Source([place]) as source:
        message = source.receive(PATIENCE_S)
        assert message is not None
        assert message.fields == {"i": 0}
    assert f"Cannot make the inbox ipc://{path}" in caplog.text


def test_nothing_is_lost_where_all_numbers_are_withheld(place: SharedPlace, twin: Twin, sink: Producer) -> None:
    consumer = ConsumerProcess(place, idle_s=LOOKS_S)
    tap = Wiretap(twin.inbox_path(consumer.index), passes=False)
    try:
        consumer.begin(20)
        for i in range(20):
            wait_until(lambda: asleep(place))
            sink.publish({"i": i})
        result = consumer.result()
        assert result.fields == [{"i": i} for i in range(20)]
        assert numbers(result) == []
        consumer.end()
    finally:
        tap.close()
    assert tap.sent, "the producer tried"


def test_numbers_that_come_late_do_no_harm(place: SharedPlace, twin: Twin, sink: Producer) -> None:
    """A consumer that looked by itself meets the numbers of messages that it took long ago."""
    stopped = ConsumerProcess(place)
    stopped.begin()
    stopped.wait_until_asleep()
    stopped.stop()
    sink.publish({"i": 0})
    with Source([place]) as source:
        message = source.receive(PATIENCE_S)
        assert message is not None
        assert message.fields == {"i": 0}
    stopped.go_on()  # and finds that the slot of its number is FREE
    wait_until(lambda: rejected(twin) == 0 and stopped.sleeps())
    sink.publish({"i": 1})
    result = stopped.result()
    assert result.fields == [{"i": 1}]
    assert [claim.sequence for claim in claims(result)] == [1]
    stopped.end()


def test_a_producer_that_may_open_no_more_files_publishes_all_the_same(place: SharedPlace, sink: Producer) -> None:
    consumer = ConsumerProcess(place, idle_s=LOOKS_S)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    consumer.begin(2)
    sink.publish({"i": 0})
    wait_until(lambda: asleep(place))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        sink.publish({"i": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert consumer.result().fields == [{"i": 0}, {"i": 1}]
    consumer.end()
