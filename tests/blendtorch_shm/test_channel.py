"""What a channel does alike in shared memory and over TCP, with keys and without."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq.sugar.socket

from blendtorch_shm.errors import (
    BlendtorchError,
    ConfigurationError,
    PortInUse,
    PublishError,
    StreamClosed,
    StreamTimeout,
    UnreadableMessage,
)
from blendtorch_shm.launch.address import Address
from blendtorch_shm.launch.keys import make_keys
from blendtorch_shm.transport import channel as channels
from blendtorch_shm.transport.channel import Channel, bind_channel, connect_channels
from blendtorch_shm.transport.tcp import protocol

from ..interruption import everywhere
from .conftest import SOURCES, free_port
from .members import PATIENCE_S, wait_until
from .test_conformance import ARRAYS, VALUES, Custom, Enough, Missing, picture

HWM = 10
"""Messages that may wait at the other end."""


@dataclass
class Way:
    """How messages travel, and how to open either end; what is open is closed after the test."""

    name: str
    of_instance: Address
    of_trainer: Address
    opened: list[Channel] = field(default_factory=list)

    @property
    def is_shared(self) -> bool:
        return self.of_trainer.twin is not None

    @property
    def is_trusted(self) -> bool:
        return self.name != "tcp"

    def bind(self, *, timeout_s: float = PATIENCE_S) -> Channel:
        """The instance's end."""
        return self._remember(bind_channel(self.of_instance, btid=3, timeout_s=timeout_s))

    def connect(self, *, timeout_s: float = PATIENCE_S) -> Channel:
        """The trainer's end."""
        return self._remember(connect_channels([self.of_trainer], timeout_s=timeout_s))

    def both(self, *, timeout_s: float = PATIENCE_S) -> tuple[Channel, Channel]:
        """The instance's and the trainer's end, which know each other."""
        instance, trainer = self.bind(timeout_s=timeout_s), self.connect(timeout_s=timeout_s)
        instance.send({})
        assert receive(trainer) == {}
        return instance, trainer

    def _remember(self, channel: Channel) -> Channel:
        self.opened.append(channel)
        return channel


@pytest.fixture(params=["shared", "tcp", "curve"])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    if request.param == "shared":
        address = Address(endpoint, request.getfixturevalue("twin"))
        way = Way("shared", address, address)
    elif request.param == "tcp":
        way = Way("tcp", Address(endpoint), Address(endpoint))
    else:
        of_instance, of_trainer = make_keys()
        way = Way("curve", Address(endpoint, keys=of_instance), Address(endpoint, keys=of_trainer))
    yield way
    for channel in reversed(way.opened):
        channel.close(patient=False)


def receive(channel: Channel) -> dict[str, Any]:
    """The next message, without what the channel adds."""
    message = channel.receive(PATIENCE_S)
    assert message is not None, f"no message arrived: {channel.explain()}"
    return {key: value for key, value in message.items() if key not in ("btid", "btmid")}


def numbers(channel: Channel, count: int) -> list[int]:
    """Of the next messages; their pictures show them."""
    found = []
    for _ in range(count):
        message = receive(channel)
        np.testing.assert_array_equal(message["image"], picture(message["i"]))
        found.append(message["i"])
    return found


def send(channel: Channel, *numbers: int) -> None:
    for i in numbers:
        channel.send({"i": i, "image": picture(i)})


def in_background(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


# -- messages ---------------------------------------------------------------------------------------------------


def test_messages_arrive_both_ways_in_order_and_once(way: Way) -> None:
    instance, trainer = way.bind(), way.connect()
    for start in range(0, 60, 6):
        some = range(start, start + 6)
        send(trainer, *some)
        send(instance, *some)
        assert numbers(instance, 6) == numbers(trainer, 6) == list(some)
    assert instance.receive(0.01) is None
    assert trainer.receive(0.01) is None


def test_values_and_arrays_of_all_kinds_arrive_both_ways_as_they_were_sent(way: Way) -> None:
    ends = way.both()
    for sender, receiver in (ends, ends[::-1]):
        sender.send(VALUES)
        assert receive(receiver) == VALUES
        for array in ARRAYS.values():
            sender.send({"array": array, "nested": {"deep": [(array,)]}})
            fields = receive(receiver)
            for received in (fields["array"], fields["nested"]["deep"][0][0]):
                np.testing.assert_array_equal(received, array, strict=True)
                assert received.flags.writeable
                assert received.flags.aligned


def test_fields_come_go_and_change_size_both_ways(way: Way) -> None:
    ends = way.both()
    messages: list[dict[str, Any]] = [
        {},
        {"a": picture(0)},
        {"a": picture(1, (500, 400, 4)), "text": "x" * 9000},
        {"a": picture(2, (2, 2)), "meshes": [{"v": np.ones((n, 3), np.float32)} for n in (1, 1000, 3)]},
        {"c": "only text"},
    ]
    for sender, receiver in (ends, ends[::-1]):
        for message in messages:
            sender.send(message)
        for message in messages:
            np.testing.assert_equal(receive(receiver), message)


def test_a_message_says_who_sent_it_and_has_the_number_that_send_returned(way: Way) -> None:
    instance, trainer = way.bind(), way.connect()
    for sender, receiver, btid in ((instance, trainer, 3), (trainer, instance, None)):
        sent = [sender.send({"x": i}) for i in range(3)]
        assert sent == [sent[0], sent[0] + 1, sent[0] + 2]
        assert [receiver.receive(PATIENCE_S) for _ in sent] == [
            {"btid": btid, "btmid": number, "x": i} for i, number in enumerate(sent)
        ]


def test_what_was_received_stays_as_it_is_and_may_be_written_to(way: Way) -> None:
    ends = way.both()
    for sender, receiver in (ends, ends[::-1]):
        kept = []
        for i in range(40):  # more than a ring has slots
            sender.send({"image": picture(i)})
            image = receive(receiver)["image"]
            image[0] = 255
            kept.append(image)
        for i, image in enumerate(kept):
            np.testing.assert_array_equal(image[1:], picture(i)[1:])
            assert (image[0] == 255).all()


def test_a_lent_array_is_sent(way: Way) -> None:
    ends = way.both()
    for sender, receiver in (ends, ends[::-1]):
        for i in range(20):
            lent = sender.lend((48, 64, 3), np.uint8)
            image = np.empty((48, 64, 3), np.uint8) if lent is None else lent
            image[...] = i
            sender.send({"image": image})
            np.testing.assert_array_equal(receive(receiver)["image"], picture(i))
            del lent, image


def test_objects_travel_where_the_connection_is_trusted_and_are_an_error_elsewhere(way: Way) -> None:
    ends = way.both()
    for sender, receiver in (ends, ends[::-1]):
        if way.is_trusted:
            sender.send({"meta": Custom(3)})
            assert receive(receiver)["meta"].value == 3
        else:
            with pytest.raises(PublishError, match=r"meta"):
                sender.send({"meta": Custom(3)})
        with pytest.raises(PublishError, match=r"callback"):
            sender.send({"callback": lambda: None})
        sender.send({"i": 1})
        assert receive(receiver) == {"i": 1}


def test_a_message_that_cannot_be_opened_raises_in_its_place_and_costs_itself_alone(way: Way) -> None:
    if not way.is_trusted:
        pytest.skip("objects do not travel here")
    ends = way.both()
    for sender, receiver in (ends, ends[::-1]):
        for i in range(3):
            sender.send({"i": i, "pose": Missing() if i == 1 else None})
        assert receive(receiver)["i"] == 0
        with pytest.raises(UnreadableMessage, match="'pose'"):
            receiver.receive(PATIENCE_S)
        assert receive(receiver)["i"] == 2


# -- waiting ----------------------------------------------------------------------------------------------------


def test_receive_gives_none_when_nothing_came_and_polls_with_zero(way: Way) -> None:
    ends = (way.bind(), way.connect())
    for end in ends:
        assert end.receive(0) is None
        assert end.receive(0.3) is None
    for sender, receiver in (ends, ends[::-1]):
        sender.send({"i": 1})
        message = None
        while message is None:
            message = receiver.receive(0)
        assert message["i"] == 1


def test_whoever_waits_for_a_message_calls_meanwhile_what_may_raise(way: Way) -> None:
    def enough() -> None:
        raise Enough

    for end in (way.bind(), way.connect()):
        with pytest.raises(Enough):
            end.receive(float("inf"), enough)


def test_ten_messages_wait_for_an_end_that_is_not_there_then_send_gives_up_and_nothing_is_lost(way: Way) -> None:
    for is_instance in (True, False):
        sender = way.bind(timeout_s=0.05) if is_instance else way.connect(timeout_s=0.05)
        for i in range(HWM):
            send(sender, i)
        for _ in range(2):
            with pytest.raises(
                StreamTimeout, match=r"could not be sent for 0\.1 s.*(10 hold messages that nobody|not reached yet)"
            ):
                send(sender, HWM)
        receiver = way.connect() if is_instance else way.bind()
        assert numbers(receiver, HWM) == list(range(HWM))
        assert receiver.receive(0.05) is None
        sender.close()
        receiver.close()


def test_send_waits_until_the_other_end_takes_something(way: Way) -> None:
    ends = way.both()
    for sender, receiver in (ends, ends[::-1]):
        thread = in_background(functools.partial(send, sender, *range(40)))
        assert numbers(receiver, 40) == list(range(40))
        thread.join()


def test_send_gives_up_too_when_all_messages_are_held_and_none_is_taken(way: Way) -> None:
    """Of sixteen slots a consumer may hold thirteen: then there is no slot for the fourth message, although ten may wait."""
    if not way.is_shared:
        pytest.skip("elsewhere nobody holds slots")
    ends = way.both(timeout_s=0.05)
    for sender, receiver in (ends, ends[::-1]):
        held = []
        for i in range(13):
            send(sender, i)
            held.append(receive(receiver))
        with pytest.raises(StreamTimeout):
            send(sender, *range(HWM))
        held.clear()
        while receiver.receive(0) is not None:
            pass
        send(sender, 1)
        assert numbers(receiver, 1) == [1]


def test_while_there_is_no_room_meanwhile_is_called_and_may_raise(way: Way) -> None:
    def enough() -> None:
        raise Enough

    for end in (way.bind(), way.connect()):
        send(end, *range(HWM))
        with pytest.raises(Enough):
            end.send({"image": picture(0)}, enough)


def test_one_thread_sends_while_another_one_receives(way: Way) -> None:
    ends = way.both()
    found: dict[Channel, list[int]] = {}
    threads = []
    for end in ends:
        threads.append(in_background(functools.partial(send, end, *range(100))))
        threads.append(in_background(lambda end=end: found.update({end: numbers(end, 100)})))  # type: ignore[misc]
    for thread in threads:
        thread.join()
    assert [found[end] for end in ends] == [list(range(100))] * 2


def test_whoever_waits_for_a_message_lets_another_thread_send(way: Way) -> None:
    """Without end: a lock that is released and taken again at once would be had by nobody else."""
    ends = way.both()
    for sender, receiver in (ends, ends[::-1]):
        done = threading.Event()
        thread = in_background(functools.partial(wait_until_done, sender, done))
        for i in range(50):
            sender.send({"i": i})
            assert receive(receiver) == {"i": i}
        done.set()
        thread.join()


def wait_until_done(channel: Channel, done: threading.Event) -> None:
    def look() -> None:
        if done.is_set():
            raise Enough

    with pytest.raises(Enough):
        channel.receive(float("inf"), look)


# -- who is there, and who comes later --------------------------------------------------------------------------


def test_whichever_end_is_there_first_nothing_is_lost(way: Way) -> None:
    for first, second in ((way.bind, way.connect), (way.connect, way.bind)):
        one = first()
        send(one, 1, 2)
        other = second()
        send(other, 1, 2)
        assert numbers(other, 2) == numbers(one, 2) == [1, 2]
        one.close()
        other.close()


def test_another_instance_goes_on_where_the_first_one_closed(way: Way) -> None:
    trainer = way.connect()
    for _ in range(3):
        instance = way.bind()
        send(trainer, 0, 1)
        assert numbers(instance, 1) == [0]
        send(instance, 5)
        assert numbers(trainer, 1) == [5]
        instance.close()
        send(trainer, 2)
        instance = way.bind()
        assert numbers(instance, 2) == [1, 2]
        send(instance, 6)
        assert numbers(trainer, 1) == [6]
        instance.close()


def test_another_trainer_goes_on_where_the_first_one_closed(way: Way) -> None:
    instance = way.bind()
    for _ in range(3):
        trainer = way.connect()
        send(instance, 0, 1)
        assert numbers(trainer, 1) == [0]
        send(trainer, 5)
        assert numbers(instance, 1) == [5]
        trainer.close()
        trainer = way.connect()
        assert numbers(trainer, 1) == [1]
        assert trainer.receive(0.01) is None
        trainer.close()


def test_what_was_sent_before_closing_still_arrives(way: Way) -> None:
    for closes_first in (0, 1):
        ends = way.both()
        sender, receiver = ends[closes_first], ends[1 - closes_first]
        send(sender, *range(5))
        thread = in_background(sender.close)  # elsewhere it waits until that was received
        assert numbers(receiver, 5) == list(range(5))
        thread.join()
        assert receiver.receive(0.01) is None
        receiver.close()


def test_what_an_instance_has_received_before_it_closes_its_successor_does_not_get(way: Way) -> None:
    trainer = way.connect()
    for i in range(10):
        instance = way.bind()
        send(trainer, i)
        assert numbers(instance, 1) == [i]
        instance.close()


def test_a_trainer_that_closes_says_what_was_not_received(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    trainer = way.connect()
    send(trainer, 1)
    trainer.close(patient=False)
    if way.is_shared:
        assert numbers(way.bind(), 1) == [1]
    else:
        assert "closed before its last messages were received" in caplog.text


def test_a_second_trainer_is_refused_until_the_first_one_closes(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "GREET_AGAIN_S", 0.05)
    instance, trainer = way.both()
    if way.is_shared:
        with pytest.raises(ConfigurationError, match="another trainer is connected.*Close that one"):
            way.connect()
        send(trainer, 1)
        trainer.close()
        second = way.connect()
    else:
        second = way.connect(timeout_s=0.05)
        while "another trainer is connected" not in second.explain():
            assert second.receive(0.01) is None
        send(second, *range(HWM))
        wait_until(lambda: "another trainer is connected" in what_a_time_out_says(second))  # but for moments of hope
        send(trainer, 1)
        assert trainer.receive(0.01) is None
        thread = in_background(trainer.close)
        assert numbers(instance, 1) == [1]
        thread.join()
        assert numbers_of(second, instance, HWM) == list(range(HWM))
        send(instance, 7)
        assert numbers(second, 1) == [7]
        return
    assert numbers(instance, 1) == [1]
    send(second, 2)
    send(instance, 7)
    assert numbers(instance, 1) == [2]
    assert numbers(second, 1) == [7]


def test_a_trainer_here_and_one_elsewhere_refuse_each_other(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    if not way.is_shared:
        pytest.skip("there is no here")
    monkeypatch.setattr(protocol, "GREET_AGAIN_S", 0.05)
    monkeypatch.setattr(channels, "LOST_S", 0.1)
    elsewhere = Way("tcp", way.of_instance, way.of_trainer.elsewhere(), way.opened)
    instance, trainer = way.both()
    second = elsewhere.connect()
    while "another trainer is connected" not in second.explain():
        assert second.receive(0.01) is None
    trainer.close()
    send(second, 1)
    assert numbers_of(second, instance, 1) == [1]
    with pytest.raises(ConfigurationError, match="another trainer is connected"):
        way.connect()
    second.close()
    trainer = way.connect()
    send(trainer, 2)
    send(instance, 3)
    assert numbers(instance, 1) == [2]
    assert numbers(trainer, 1) == [3]


def what_a_time_out_says(channel: Channel) -> str:
    with pytest.raises(StreamTimeout) as raised:
        channel.send({})
    return str(raised.value)


def numbers_of(sender: Channel, receiver: Channel, count: int) -> list[int]:
    """What `receiver` gets from a sender that has to be connected still, which it looks after when it is asked for something."""
    found: list[int] = []
    while len(found) < count:
        assert sender.receive(0.01) is None
        message = receiver.receive(0)
        if message is not None:
            found.append(message["i"])
    return found


def test_a_trainer_may_wait_for_several_instances_at_once(way: Way) -> None:
    of_instance, of_trainer = (
        Address(f"tcp://127.0.0.1:{port}", a.twin and replace(a.twin, btid=1), a.keys)
        for port in [free_port()]
        for a in (way.of_instance, way.of_trainer)
    )
    instances = [way.bind(), way._remember(bind_channel(of_instance, btid=4, timeout_s=PATIENCE_S))]
    trainer = way._remember(connect_channels([way.of_trainer, of_trainer], timeout_s=PATIENCE_S))
    for i in range(20):
        for to, instance in enumerate(instances):
            trainer.send({"i": i, "image": picture(i)}, to=to)
            assert numbers(instance, 1) == [i]
            send(instance, i)
        both = [trainer.receive(PATIENCE_S) for _ in instances]
        assert {(message["btid"], message["i"]) for message in both if message is not None} == {(3, i), (4, i)}
    instances[0].close()
    trainer.send({"i": 9, "image": picture(9)}, to=1)
    assert numbers(instances[1], 1) == [9]


# -- the end ----------------------------------------------------------------------------------------------------


def test_using_a_closed_end_is_an_error_and_closing_twice_is_none(way: Way) -> None:
    for end in way.both():
        end.close()
        end.close()
        with pytest.raises(StreamClosed):
            end.send({"i": 1})
        with pytest.raises(StreamClosed):
            end.receive(0)


def test_closing_wakes_a_thread_that_waits_for_a_message(way: Way) -> None:
    for end in way.both():
        outcome: list[object] = []

        def wait(end: Channel = end, outcome: list[object] = outcome) -> None:
            try:
                end.receive(float("inf"))
            except StreamClosed as error:
                outcome.append(error)

        thread = in_background(wait)
        thread.join(0.1)
        assert thread.is_alive()
        end.close()
        thread.join()
        assert outcome


def test_channels_that_were_closed_leave_nothing(way: Way) -> None:
    def open_and_close() -> None:
        instance, trainer = way.both()
        send(trainer, 1)
        assert numbers(instance, 1) == [1]
        trainer.close()
        instance.close()
        way.opened.clear()

    open_and_close()
    before = resources()
    for _ in range(40):
        open_and_close()
    gc.collect()
    wait_until(lambda: all(now <= then for now, then in zip(resources(), before, strict=True)))


def resources() -> tuple[int, int, int]:
    """How many descriptors and threads this process has, and how many files there are of its launches."""
    files = [name for name in os.listdir("/dev/shm") if name.startswith("bt-") and _is_ours(name)]
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(files)


def _is_ours(name: str) -> bool:
    launch = f"blendtorch-{name.split('-')[1]}"
    return Path(os.environ["XDG_RUNTIME_DIR"], launch).exists()


def test_a_forked_child_can_use_neither_end_and_disturbs_none(way: Way) -> None:
    instance, trainer = way.both()
    send(trainer, 1)
    child = os.fork()
    if child == 0:  # what is asserted in here is told by the exit status
        status = 1
        try:
            for end in (instance, trainer):
                for use in (lambda end=end: end.send({}), lambda end=end: end.receive(0)):  # type: ignore[misc]
                    with pytest.raises(StreamClosed, match="fork"):
                        use()
                end.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    send(instance, 2)
    assert numbers(instance, 1) == [1]
    assert numbers(trainer, 1) == [2]


# -- interrupts -------------------------------------------------------------------------------------------------

PLACES = [*SOURCES, zmq.sugar.socket.__file__]
"""ZeroMQ's Python puts the parts of a message together."""


def numbers_until(last: int, channel: Channel) -> list[int]:
    found = numbers(channel, 1)
    while found[-1] != last:
        found += numbers(channel, 1)
    return found


@pytest.mark.long
@pytest.mark.parametrize("sends", ["instance", "trainer"])
def test_an_interrupt_anywhere_in_send_costs_at_most_its_message(way: Way, sends: str) -> None:
    ends = way.both()
    sender, receiver = ends if sends == "instance" else ends[::-1]
    begun = 0

    def send_one() -> None:
        nonlocal begun
        begun += 1
        sender.send({"i": begun, "image": picture(begun)})

    for place in everywhere(send_one, PLACES):
        interrupted = begun
        send_one()
        assert numbers_until(begun, receiver) in ([begun], [interrupted, begun]), place


@pytest.mark.long
@pytest.mark.parametrize("receives", ["instance", "trainer"])
def test_an_interrupt_anywhere_in_receive_loses_nothing(way: Way, receives: str) -> None:
    ends = way.both()
    receiver, sender = ends if receives == "instance" else ends[::-1]
    number = 1
    send(sender, number)
    for place in everywhere(lambda: receiver.receive(PATIENCE_S), PLACES):
        send(sender, number + 1)
        assert numbers_until(number + 1, receiver) == [number, number + 1], place
        number += 2
        send(sender, number)


@pytest.mark.long
@pytest.mark.parametrize("closes", ["instance", "trainer"])
def test_an_interrupt_anywhere_in_close_leaves_nothing_open(way: Way, closes: str) -> None:
    other = way.connect() if closes == "instance" else way.bind()
    opened: list[Channel] = []

    def open_and_exchange() -> None:
        before = len(opened)
        if closes == "trainer":
            opened.append(way.connect())
        while len(opened) == before:
            with contextlib.suppress(PortInUse):  # the thread that listens there may be on its way out still
                opened.append(way.bind())
        send(opened[-1], 1)
        assert numbers(other, 1) == [1]

    open_and_exchange()
    for _ in everywhere(lambda: opened[-1].close(), PLACES):
        opened[-1].close()
        open_and_exchange()


@contextlib.contextmanager
def handler_of_usr1(handler: Callable[..., object]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_a_signals_handler_raises_ends_a_call_that_waits_and_costs_nothing(way: Way) -> None:
    def enough(*_: object) -> None:
        raise Enough

    ends = way.both()
    with handler_of_usr1(enough):
        for sender, receiver in (ends, ends[::-1]):
            timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            with pytest.raises(Enough):
                receiver.receive(float("inf"))
            timer.join()
            sent: list[int] = []
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            with pytest.raises(Enough):
                while True:
                    send(sender, len(sent) % 256)
                    sent.append(len(sent) % 256)
            timer.join()
            assert numbers(receiver, len(sent)) == sent
            while receiver.receive(0.05) is not None:  # one that was cut short, perhaps
                pass


def test_a_signals_handler_cannot_send_in_the_middle_of_a_call_and_costs_it_nothing(way: Way) -> None:
    instance, trainer = way.both()
    refused: list[BlendtorchError] = []

    def send_from_handler(*_: object) -> None:
        try:
            trainer.send({"by": "handler"})
        except BlendtorchError as error:
            refused.append(error)

    with handler_of_usr1(send_from_handler):
        timers = [threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))]
        timers.append(threading.Timer(0.3, lambda: instance.send({"i": 1})))
        for timer in timers:
            timer.start()
        assert receive(trainer) == {"i": 1}
        for timer in timers:
            timer.join()
    if way.is_shared:  # two streams: it was in the middle of none of the one that it sends to
        assert receive(instance) == {"by": "handler"}
    else:
        assert re.search("in the middle of another call", str(refused[0]))
    send(trainer, 2)
    assert numbers(instance, 1) == [2]


# -- deaths -----------------------------------------------------------------------------------------------------

_context = multiprocessing.get_context("spawn")


def begun(run: Callable[..., None], *args: Any) -> Iterator[BaseProcess]:
    """A process of its own that has come so far as to say so."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=run, args=(theirs, *args))
    process.start()
    theirs.close()
    assert ours.poll(PATIENCE_S)
    assert ours.recv() == "ready"
    yield process
    process.kill()
    process.join()


def _take_and_wait(says: Any, address: Address, is_instance: bool, count: int) -> None:
    """Receive so many messages and answer them, say so, and wait to be killed."""
    channel = bind_channel(address, btid=3, timeout_s=9) if is_instance else connect_channels([address], timeout_s=9)
    for _ in range(count):
        message = channel.receive(PATIENCE_S)
        assert message is not None
        channel.send({"i": message["i"] + 100, "image": picture(message["i"] + 100)})
        del message  # what it holds when it is killed would be somebody else's again
    says.send("ready")
    time.sleep(PATIENCE_S)


def test_what_a_killed_instance_had_not_taken_its_successor_gets(way: Way) -> None:
    trainer = way.connect()
    send(trainer, *range(6))
    process = begun(_take_and_wait, way.of_instance, True, 2)
    next(process)
    assert numbers(trainer, 2) == [100, 101]
    next(process, None)
    send(trainer, 6)
    instance = way.bind()
    assert numbers(instance, 5) == [2, 3, 4, 5, 6]
    send(instance, 9)
    assert numbers(trainer, 1) == [9]
    assert instance.receive(0.05) is None


def test_after_a_trainer_was_killed_the_next_one_gets_what_that_had_not_taken(way: Way) -> None:
    instance = way.bind()
    send(instance, *range(6))
    process = begun(_take_and_wait, way.of_trainer, False, 2)
    next(process)
    assert numbers(instance, 2) == [100, 101]
    next(process, None)
    trainer = way.connect()
    send(trainer, 7)
    assert numbers(trainer, 4) == [2, 3, 4, 5]
    assert numbers(instance, 1) == [7]
    send(instance, 8)
    assert numbers(trainer, 1) == [8]
