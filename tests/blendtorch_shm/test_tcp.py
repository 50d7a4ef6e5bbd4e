"""Messages over TCP: what is on the way when somebody leaves, when the network fails, and when strangers talk."""

import contextlib
import itertools
import logging
import os
import pickle
import random
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.launch.address import Address, Twin, is_loopback
from blendtorch_shm.launch.keys import ClientKeys, ServerKeys, make_keys
from blendtorch_shm.memory.layout import VERSION
from blendtorch_shm.memory.states import State
from blendtorch_shm.message.wire import Encoder
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.lease import Calls
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Sink
from blendtorch_shm.transport import open_sink, open_source
from blendtorch_shm.transport.tcp import Demand, TcpLane, forwarder
from blendtorch_shm.transport.tcp.protocol import Bye, Hello, Taken

from ..interruption import everywhere
from .conftest import SOURCES, free_port

PATIENCE_S = 20.0

Open = Callable[..., Any]


@pytest.fixture
def opened() -> Iterator[Callable[[Any], Any]]:
    """Closes after the test what it is given."""
    ends: list[Any] = []

    def remember(end: Any) -> Any:
        ends.append(end)
        return end

    yield remember
    for end in reversed(ends):
        end.close()


@pytest.fixture
def address() -> Address:
    return Address(f"tcp://127.0.0.1:{free_port()}")


def publish(sink: Sink, numbers: Iterable[int]) -> threading.Thread:
    """Publish messages with these numbers, and pictures that show them, from a thread."""

    def run() -> None:
        for i in numbers:
            sink.publish({"i": i, "image": np.full((60, 80, 3), i % 251, np.uint8)})

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def receive(source: Source, timeout_s: float = PATIENCE_S) -> int:
    message = source.receive(timeout_s)
    assert message is not None, f"no message arrived\n{source.explain()}"
    i = int(message.fields["i"])
    assert (message.fields["image"] == i % 251).all()
    return i


class Proxy:
    """A network between two programs of this host, which can be cut."""

    def __init__(self, endpoint: str) -> None:
        self._target = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def cut(self) -> None:
        """Break all connections; new ones may be made at once."""
        os.write(self._wake_write, b"c")

    def close(self) -> None:
        os.write(self._wake_write, b"q")
        self._thread.join()
        for end in (self._wake_read, self._wake_write):
            os.close(end)
        self._listener.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        self._connect(selector)
                    elif key.fileobj == self._wake_read:
                        order = os.read(self._wake_read, 1)
                        for end in list(self._pairs):
                            self._drop(selector, end)
                        if order == b"q":
                            return
                    elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._pairs:
                        self._pass_on(selector, key.fileobj)

    def _connect(self, selector: selectors.BaseSelector) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(self._target)
        except OSError:
            near.close()
            return
        self._pairs[near], self._pairs[far] = far, near
        for end in (near, far):
            selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, selector: selectors.BaseSelector, end: socket.socket) -> None:
        try:
            data = end.recv(65536)
            if data:
                self._pairs[end].sendall(data)
                return
        except OSError:
            pass
        self._drop(selector, end)

    def _drop(self, selector: selectors.BaseSelector, end: socket.socket) -> None:
        other = self._pairs.pop(end, None)
        if other is not None:
            del self._pairs[other]
            for each in (end, other):
                selector.unregister(each)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not a good-bye
                each.close()


# -- leaving ----------------------------------------------------------------------------------------------------


def test_what_a_consumer_had_not_taken_when_it_closed_goes_to_the_next(opened: Open, address: Address) -> None:
    sink = opened(open_sink(address))
    first = opened(open_source([address]))
    producer = publish(sink, range(40))
    numbers = [receive(first) for _ in range(7)]
    first.close()
    second = opened(open_source([address]))
    numbers += [receive(second) for _ in range(33)]
    producer.join()
    assert numbers == list(range(40))
    assert second.receive(0.2) is None


def test_what_a_killed_consumer_had_not_taken_goes_to_the_next(opened: Open, address: Address) -> None:
    program = """
import sys, time
from blendtorch_shm.launch.address import Address
from blendtorch_shm.transport import open_source
source = open_source([Address(sys.argv[1])])
for _ in range(5):
    print(source.receive(20).fields["i"], flush=True)
time.sleep(600)
"""
    sink = opened(open_sink(address))
    producer = publish(sink, range(40))
    with subprocess.Popen([sys.executable, "-c", program, address], stdout=subprocess.PIPE, text=True) as consumer:
        assert consumer.stdout is not None
        numbers = [int(consumer.stdout.readline()) for _ in range(5)]
        consumer.kill()
    source = opened(open_source([address]))
    rest: list[int] = []
    while set(numbers + rest) != set(range(40)):
        rest.append(receive(source))
    producer.join()
    assert len(rest) == len(set(rest)), "the living got something twice"
    assert (
        source.receive(0.2) is None
    )  # what it took last, and was killed before it had said so, came again: it died with it


def test_what_tcp_consumers_leave_is_there_for_those_who_share_the_memory(
    opened: Open, address: Address, twin: Twin
) -> None:
    sink = opened(open_sink(Address(address, twin)))
    elsewhere = opened(open_source([address]))
    producer = publish(sink, range(40))
    numbers = [receive(elsewhere) for _ in range(5)]
    elsewhere.close()
    here = opened(open_source([Address(address, twin)]))
    numbers += [receive(here) for _ in range(35)]
    producer.join()
    assert sorted(numbers) == list(range(40))


def test_what_tcp_consumers_leave_is_told_to_who_sleeps_and_no_socket_for_that_stays_open(
    opened: Open, address: Address, twin: Twin
) -> None:
    sink = opened(open_sink(Address(address, twin)))
    elsewhere = opened(open_source([address]))
    producer = publish(sink, range(5))
    receive(elsewhere)
    producer.join()
    while inspect(SharedPlace(twin)).count(State.READY):  # else they are on their way
        time.sleep(0.01)
    here = opened(open_source([Address(address, twin)]))
    numbers: list[int] = []
    consumer = threading.Thread(target=lambda: numbers.append(receive(here)))
    consumer.start()
    while not inspect(SharedPlace(twin)).asleep:
        time.sleep(0.01)
    elsewhere.close()
    consumer.join()
    assert numbers[0] in range(1, 5)
    connections = sink.forwarder._consumer.sleepers._outbox._sockets
    assert connections
    sink.close()
    assert not connections


def test_messages_without_arrays_are_not_lost_either(opened: Open, address: Address, twin: Twin) -> None:
    sink = opened(open_sink(Address(address, twin)))
    elsewhere = opened(open_source([address]))
    for i in range(8):
        sink.publish({"i": i})
    first = elsewhere.receive(PATIENCE_S)
    assert first is not None
    elsewhere.close()
    here = opened(open_source([Address(address, twin)]))
    numbers = []
    for _ in range(7):
        message = here.receive(PATIENCE_S)
        assert message is not None
        numbers.append(message.fields["i"])
    assert sorted([first.fields["i"], *numbers]) == list(range(8))


def test_consumers_that_do_not_take_what_they_have_starve_nobody(opened: Open, address: Address) -> None:
    sink = opened(open_sink(address))
    stalled = [opened(open_source([address], queue_size=10)) for _ in range(3)]
    producer = publish(sink, range(300))
    numbers = [receive(source) for source in stalled]  # they are connected, and now take no more
    busy = opened(open_source([address]))
    while len(numbers) < 300 - 30:
        numbers.append(receive(busy))
    for source in stalled:
        source.close()
    while len(numbers) < 300:
        numbers.append(receive(busy))
    producer.join()
    assert sorted(numbers) == list(range(300))


def test_consumers_share_what_comes_slowly(opened: Open, address: Address) -> None:
    sink = opened(open_sink(address))
    sources = [opened(open_source([address])) for _ in range(2)]
    for source in sources:
        while "connected" not in source.explain():
            assert source.receive(0.02) is None
    turns = []
    for i in range(30):
        publish(sink, range(i, i + 1)).join()
        turns.append(next(who for who in itertools.cycle((0, 1)) if sources[who].receive(0.02) is not None))
    assert 3 <= turns[10:].count(0) <= 17


ENDS_WITHOUT_CLOSING = """
import sys
import numpy as np
import blendtorch.btb as btb

def main():
    publisher = btb.DataPublisher(sys.argv[1], 3)
    for i in range(20):
        publisher.publish(i=i, image=np.full((60, 80, 3), i, np.uint8))

main()
"""


def test_a_script_that_just_ends_loses_nothing(opened: Open, address: Address) -> None:
    source = opened(open_source([address]))
    with subprocess.Popen([sys.executable, "-c", ENDS_WITHOUT_CLOSING, address]) as producer:
        assert [receive(source) for _ in range(20)] == list(range(20))
    assert producer.returncode == 0


def test_a_consumer_that_just_ends_is_not_taken_for_one_that_died(opened: Open, address: Address) -> None:
    program = """
import sys
from blendtorch_shm.launch.address import Address
from blendtorch_shm.transport import open_source
source = open_source([Address(sys.argv[1])])
for _ in range(5):
    print(source.receive(20).fields["i"])
"""
    sink = opened(open_sink(address))
    producer = publish(sink, range(30))
    done = subprocess.run([sys.executable, "-c", program, address], capture_output=True, text=True, check=True)
    source = opened(open_source([address]))
    assert [*map(int, done.stdout.split()), *(receive(source) for _ in range(25))] == list(range(30))
    producer.join()


def test_a_forwarder_that_waits_is_woken_by_each_commit(
    opened: Open, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder, "_LOOK_EVERY_MS", 600_000)
    sink, source = opened(open_sink(address)), opened(open_source([address]))
    for i in range(20):
        while not sink.forwarder.waits:
            assert source.receive(0.001) is None  # it greets meanwhile, and says what it has taken
        publish(sink, [i]).join()
        assert receive(source) == i


def test_a_forwarder_that_nobody_waits_for_is_not_woken(
    opened: Open, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[object] = []
    monkeypatch.setattr(forwarder.TcpForwarder, "wake", woken.append)
    sink = opened(open_sink(address))
    publish(sink, range(3)).join()
    assert not sink.forwarder.waits
    assert woken == []


# -- lanes ------------------------------------------------------------------------------------------------------


def test_towards_the_end_lanes_ask_for_no_more_than_will_be_taken(address: Address) -> None:
    demand = Demand(2, queue_size=10, count=25)
    lanes = [TcpLane(address, demand, Calls()) for _ in range(2)]
    assert demand.room == 10
    demand.remaining = 5
    assert demand.room == 3
    lanes[0].close()
    lanes[0].close()
    assert demand.room == 5
    demand.remaining = -1
    assert demand.room == 1
    lanes[1].close()


def test_a_lane_counts_what_it_takes_and_its_arrays_outlive_it(opened: Open, address: Address) -> None:
    sink = opened(open_sink(address))
    producer = publish(sink, range(3))
    demand = Demand(count=3)
    lane = TcpLane(address, demand, Calls())
    images = []
    while demand.remaining:
        message = lane.take()
        if message is None:
            zmq.select(lane.sockets, [], [], PATIENCE_S)
        else:
            images.append(message.fields["image"])
    producer.join()
    lane.close()
    assert all(socket.closed for socket in lane.sockets)
    assert [image.min() for image in images] == [image.max() for image in images] == [0, 1, 2]


@pytest.mark.parametrize("text", ["10.0.0.1:11000", "tcp://[::1]:11000", "tcp://127.0.0.1", "tcp://127.0.0.1:port"])
def test_what_is_no_endpoint_is_a_clear_error_and_leaves_no_socket(text: str) -> None:
    demand = Demand()
    with pytest.raises(ConfigurationError, match=r"is not an address.*tcp://ADDRESS:PORT"):
        TcpLane(Address(text), demand, Calls())
    assert demand.lanes == 0
    demand.close()  # which would wait for its sockets


# -- a network that fails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_or_repeated_however_often_connections_break(opened: Open, address: Address, seed: int) -> None:
    rng = random.Random(seed)
    sink = opened(open_sink(address))
    proxies = [opened(Proxy(address)) for _ in range(2)]
    sources = [opened(open_source([Address(proxy.endpoint)], queue_size=rng.choice([1, 4, 10]))) for proxy in proxies]
    count = 400
    producer = publish(sink, range(count))
    numbers: list[list[int]] = [[], []]
    while sum(map(len, numbers)) < count:
        which = rng.randrange(2)
        message = sources[which].receive(0.05)
        if message is not None:
            numbers[which].append(message.fields["i"])
            assert (message.fields["image"] == message.fields["i"] % 251).all()
        if rng.random() < 0.05:
            proxies[rng.randrange(2)].cut()
    producer.join()
    assert sorted(numbers[0] + numbers[1]) == list(range(count))
    for source in sources:
        assert source.receive(0.2) is None


def test_one_consumer_gets_messages_in_order_across_interruptions(opened: Open, address: Address) -> None:
    sink, proxy = opened(open_sink(address)), opened(Proxy(address))
    source = opened(open_source([Address(proxy.endpoint)]))
    producer = publish(sink, range(100))
    numbers = []
    for i in range(100):
        numbers.append(receive(source))
        if i % 25 == 10:
            proxy.cut()
    producer.join()
    assert numbers == list(range(100))


@pytest.mark.long
def test_ctrl_c_anywhere_while_it_connects_and_receives_costs_no_message(opened: Open, address: Address) -> None:
    sink = opened(open_sink(address))
    number, source = 0, None

    def connect_and_receive() -> None:
        nonlocal source
        source = None
        source = open_source([address])
        assert source.receive(PATIENCE_S) is not None

    publish(sink, [number]).join()
    for place in everywhere(connect_and_receive, [path for path in SOURCES if "/tcp/" in path]):
        if source is None:
            continue
        interrupted, number = number, number + 1
        publish(sink, [number]).join()
        assert [receive(source), receive(source)] == [interrupted, number], place
        source.close()
        number += 1
        publish(sink, [number]).join()
    source.close()


def test_ctrl_c_anywhere_while_it_receives_many_costs_no_message(opened: Open, address: Address) -> None:
    sink, source = opened(open_sink(address)), opened(open_source([address]))
    received: list[int] = []
    published = 0

    def receive_many(timeout_s: float = 0.1) -> None:
        messages = source.receive_many(3, timeout_s)
        received.extend([int(message.fields["i"]) for message in messages])  # not traced: the messages are ours

    def receive_three() -> None:
        nonlocal published
        if published - len(received) < 4:
            publish(sink, range(published, published + 4)).join()
            published += 4
        before = len(received)
        while len(received) < before + 3:
            receive_many()

    files = [
        path
        for path in SOURCES
        if path.endswith(("stream/merge.py", "stream/lease.py", "tcp/lane.py", "tcp/protocol.py"))
    ]
    places: set[str] = set()
    while not any("accept" in place for place in places):  # a call that finds less to do ends the round early
        for place in everywhere(receive_three, files, stride=1):
            places.add(place)
            assert received == list(range(len(received))), place
    while len(received) < published:
        receive_many(PATIENCE_S)
    assert received == list(range(published))


def test_a_consumer_waits_for_a_producer_that_comes_later_and_for_its_successor(opened: Open, address: Address) -> None:
    source = opened(open_source([address]))
    assert source.receive(0.1) is None
    assert "not reached yet" in source.explain()
    for _ in range(2):
        sink = open_sink(address)
        producer = publish(sink, range(3))
        assert [receive(source) for _ in range(3)] == [0, 1, 2]
        assert f"{address}: connected" in source.explain()
        producer.join()
        sink.close()


def test_what_a_producer_had_sent_when_it_closed_is_not_lost_to_its_successor(opened: Open, address: Address) -> None:
    source = opened(open_source([address]))
    sink = open_sink(address)
    publish(sink, range(8)).join()
    assert receive(source) == 0  # seven more are here or on their way
    closing = threading.Thread(target=sink.close)
    closing.start()
    closing.join()
    successor = opened(open_sink(address))
    publish(successor, range(8, 10)).join()
    assert [receive(source) for _ in range(9)] == list(range(1, 10))
    assert source.receive(0.2) is None


PRODUCER = """
import sys
import msgspec, numpy as np
from blendtorch_shm.launch.address import Address, Twin, is_loopback
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.transport import open_sink
sink = open_sink(Address(sys.argv[1], msgspec.json.decode(sys.argv[2], type=Twin)))
print("publishing", flush=True)
while (i := inspect(sink.place).published) < int(sys.argv[3]):
    sink.publish({"i": i, "image": np.full((60, 80, 3), i % 251, np.uint8)})
sink.close()
"""


def test_a_consumer_stays_with_a_stream_whose_producer_is_killed_and_replaced(
    opened: Open, address: Address, twin: Twin
) -> None:
    count, kills = 2000, 4
    command = [sys.executable, "-c", PRODUCER, address, msgspec.json.encode(twin).decode(), str(count)]
    source = opened(open_source([address]))
    numbers: list[int] = []
    for kill in range(kills + 1):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as producer:
            assert producer.stdout is not None
            assert producer.stdout.readline() == "publishing\n"
            while len(numbers) < (kill + 1) * count // (kills + 1):
                numbers.append(receive(source))
            if kill < kills:
                producer.kill()
    assert sorted(numbers) == list(range(count))
    assert source.receive(0.2) is None


# -- strangers --------------------------------------------------------------------------------------------------


def bind_with_keys(opened: Open) -> tuple[Sink, Address, Address]:
    """A sink that lets in those with its keys, its address for them, and the address without."""
    server_keys, client_keys = make_keys()
    plain = Address(f"tcp://127.0.0.1:{free_port()}")
    sink = opened(open_sink(Address(plain, keys=server_keys)))
    return sink, Address(plain, keys=client_keys), plain


def test_who_has_no_keys_or_wrong_ones_gets_nothing_and_costs_nothing(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    sink, with_keys, plain = bind_with_keys(opened)
    _, other_keys = make_keys()
    assert with_keys.keys is not None
    half_right = ClientKeys(other_keys.client_public, other_keys.client_secret, with_keys.keys.server_public)
    strangers = [
        opened(open_source([a])) for a in (plain, Address(plain, keys=other_keys), Address(plain, keys=half_right))
    ]
    producer = publish(sink, range(30))
    for stranger in strangers:
        assert stranger.receive(0.5) is None
        assert "refused" in stranger.explain()
    source = opened(open_source([with_keys]))
    assert [receive(source) for _ in range(30)] == list(range(30))
    producer.join()
    refusals = [record.message for record in caplog.records if "refused" in record.message]
    assert len(refusals) == len(set(refusals))
    assert any("does not have the keys" in text for text in refusals)
    assert any("does not speak" in text for text in refusals)


NO_TEXT = b"\x96\xa5" + 5 * b"\xff"  # msgpack of a list that begins with a text, which is not UTF-8


@pytest.mark.parametrize("keys", [False, True], ids=["loopback", "with keys"])
def test_noise_harms_nobody(opened: Open, address: Address, keys: bool, caplog: pytest.LogCaptureFixture) -> None:
    sink, honest, plain = bind_with_keys(opened) if keys else (opened(open_sink(address)), address, address)
    host, port = "127.0.0.1", int(plain.rpartition(":")[2])
    rng = np.random.default_rng(0)
    for nbytes in (1, 64, 10_000):
        with socket.create_connection((host, port)) as raw:
            raw.sendall(rng.bytes(nbytes))
    with zmq.Context() as context:
        sockets = [context.socket(kind) for kind in (zmq.PULL, zmq.DEALER, zmq.REQ, zmq.SUB)]
        for stranger in sockets:
            stranger.linger = 0
            stranger.connect(plain)
        for talker in sockets[1:3]:
            for text in (b"", b"\0", rng.bytes(100), rng.bytes(100_000), NO_TEXT):
                # Once it has been refused it has nowhere to send to, and would wait for ever.
                with contextlib.suppress(zmq.Again):
                    if talker.type == zmq.DEALER:
                        talker.send(text, zmq.NOBLOCK)
                        talker.send_multipart([text, text], zmq.NOBLOCK)
        producer = publish(sink, range(50))
        source = opened(open_source([honest]))
        assert [receive(source) for _ in range(50)] == list(range(50))
        producer.join()
        for stranger in sockets:
            assert not stranger.poll(50) or stranger.recv() == b""
            stranger.close()
    texts = [record.message for record in caplog.records]
    assert len(texts) == len(set(texts)), "something was logged twice"


GREETINGS = [
    Hello(VERSION + 1, b"s" * 16, 1, 10, 0, [], 0),
    Hello(VERSION, b"short", 1, 10, 0, [], 0),
    Hello(VERSION, b"s" * 16, -1, 10, 0, [], 0),
    Hello(VERSION, b"s" * 16, 1, -1, 0, [], 0),
    Taken(2**63, 1),
    Bye(),
]


@pytest.mark.parametrize("greeting", GREETINGS, ids=repr)
def test_who_greets_wrongly_gets_nothing(opened: Open, address: Address, greeting: msgspec.Struct) -> None:
    sink = opened(open_sink(address))
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(address)
        stranger.send(msgspec.msgpack.encode(greeting))
        producer = publish(sink, range(5))
        if greeting == GREETINGS[0]:
            refusal = stranger.recv().decode()
            assert refusal.startswith("refused: ")
            assert f"version {VERSION + 1}" in refusal
            assert f"version {VERSION}:" in refusal
        assert not stranger.poll(300)
        source = opened(open_source([address]))
        assert [receive(source) for _ in range(5)] == list(range(5))
        producer.join()


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_from_an_unauthenticated_producer_is_not_read(
    opened: Open, address: Address, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def message(fields: dict[str, Any], number: int) -> list[bytes]:
        header = Encoder(trusted=True).take_apart(fields).header()
        return [generation + number.to_bytes(8, "little") + bytes(16), header, b""]

    bomb = Bomb(tmp_path / "executed")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as producer:
        producer.bind(address)
        source = opened(open_source([address]))
        assert source.receive(0.1) is None
        route, greeting = producer.recv_multipart()
        generation = msgspec.msgpack.decode(greeting)[3].to_bytes(8, "little")
        good, wrong = message({"i": 3}, 3), message({"i": 2}, 2)
        bad = [
            message({"bomb": bomb}, 0),
            message({"bomb": [bomb]}, 1),
            [wrong[0], pickle.dumps(bomb), b""],
            [pickle.dumps(bomb)],
            [message({}, 4)[0], good[1][:-1], b""],
            [wrong[0][:-1], *wrong[1:]],
            [*wrong, b""],
            [message({}, 5)[0], os.urandom(50), b"x" * 1000],
        ]
        for frames in [*bad, good]:
            producer.send_multipart([route, *frames])
        received = source.receive(PATIENCE_S)
        assert received is not None
        assert received.fields == {"i": 3}
        said: list[Any] = []
        while not said or said[-1] != ["Taken", 3]:
            said.append(msgspec.msgpack.decode(producer.recv_multipart()[1])[:2])
        assert said == [["Taken", n] for n in (0, 1, 2, 4, 5, 3)], "what makes no sense must not come again for ever"
    assert not bomb.path.exists()
    assert f"{len(bad)} messages were rejected" in source.explain()
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


def test_pickles_travel_where_both_ends_have_shown_their_keys(opened: Open) -> None:
    sink, with_keys, _ = bind_with_keys(opened)
    source = opened(open_source([with_keys]))
    sink.publish({"path": Path("a/b"), "image": np.zeros((60, 80, 3), np.uint8)})
    message = source.receive(PATIENCE_S)
    assert message is not None
    assert message.fields["path"] == Path("a/b")


# -- beyond loopback --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "loopback"),
    [
        ("tcp://127.0.0.1:11000", True),
        ("tcp://127.1.2.3:1", True),
        ("tcp://localhost:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://0.0.0.0:11000", False),
        ("tcp://*:11000", False),
        ("tcp://10.0.0.1:11000", False),
        ("tcp://eth0:11000", False),
    ],
)
def test_loopback_is_told_from_the_rest(endpoint: str, loopback: bool) -> None:
    assert is_loopback(endpoint) is loopback


def test_listening_beyond_loopback_takes_keys_or_must_be_asked_for(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = f"tcp://0.0.0.0:{free_port()}"
    with pytest.raises(ConfigurationError, match=r"every program.*allow_unauthenticated"):
        open_sink(Address(endpoint))
    open_sink(Address(endpoint, keys=make_keys()[0])).close()
    assert not caplog.records
    open_sink(Address(endpoint, unauthenticated=True)).close()
    assert "open to every program" in caplog.text


def test_keys_that_are_none_are_a_clear_error() -> None:
    good = make_keys()[0]
    with pytest.raises(ConfigurationError, match="server_public.*40 characters"):
        ServerKeys("x", good.server_secret, good.client_public)


# -- here and elsewhere -----------------------------------------------------------------------------------------


def test_of_instances_here_and_elsewhere_none_keeps_the_other_waiting(
    opened: Open, address: Address, twin: Twin
) -> None:
    """Both publish without end, so that one that is passed over for good would never be heard."""
    here = Address(f"tcp://127.0.0.1:{free_port()}", twin)
    sinks = [opened(open_sink(here)), opened(open_sink(address))]
    source = opened(open_source([here, address]))
    ending = threading.Event()
    firsts = (0, 10**9)
    producers = []
    for sink, first in zip(sinks, firsts, strict=True):
        numbers = itertools.takewhile(lambda _: not ending.is_set(), itertools.count(first))
        producers.append(publish(sink, numbers))
    received: dict[int, list[int]] = {first: [] for first in firsts}
    while min(map(len, received.values())) < 100:
        i = receive(source)
        received[i - i % 10**9].append(i)
    ending.set()
    while any(producer.is_alive() for producer in producers):  # they may wait for room
        source.receive(0.01)
    for first in firsts:
        assert received[first] == list(range(first, first + len(received[first])))


@pytest.mark.parametrize("value", [1, {1}], ids=["anywhere", "on this host only"])
def test_closing_lingers_for_what_a_reader_on_this_host_has_not_taken_yet(
    address: Address, twin: Twin, value: object
) -> None:
    sink = open_sink(Address(address, twin), lingerms=600_000)
    sink.publish({"value": value})
    closing = threading.Thread(target=sink.close)
    closing.start()
    closing.join(1.0)
    assert closing.is_alive()
    with Source([SharedPlace(twin)]) as source:
        message = source.receive(PATIENCE_S)
    assert message is not None
    assert message.fields["value"] == value
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
