"""How a consumer that sleeps is woken: by the number of a READY slot, in its turn; and that nobody depends on it.

Consumers here are processes that would look by themselves only after a time that no test lasts, unless a test says otherwise. So
what they receive after they slept, a number told them of.
"""

import random
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from blendtorch_shm.errors import BlendtorchError, StreamClosed
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.memory.ring import Ring
from blendtorch_shm.memory.states import State
from blendtorch_shm.message.token import unpack
from blendtorch_shm.stream.control import Control
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer

from .members import NEVER_S, PATIENCE_S, Claim, ConsumerProcess, asleep, claims, numbers, wait_until, when

PICTURE = np.zeros(9000, np.uint8)
LOOKS_S = 0.05
"""How soon a sleeper looks by itself, as a rule."""


@pytest.fixture
def sink(place: SharedPlace) -> Iterator[Producer]:
    with Producer(place, trusted=True) as sink:
        yield sink


@pytest.fixture
def places(launch_directory: LaunchDirectory) -> list[SharedPlace]:
    """Where some streams live."""
    return [SharedPlace(launch_directory.twin("DATA", btid)) for btid in range(3)]


@pytest.fixture
def sinks(places: list[SharedPlace]) -> Iterator[list[Producer]]:
    sinks = [Producer(place, trusted=True) for place in places]
    yield sinks
    for sink in sinks:
        sink.close()


def oldest_sleeper(place: SharedPlace) -> int:
    sleepers = asleep(place)
    return min(sleepers, key=sleepers.__getitem__)


# -- who is woken ---------------------------------------------------------------------------------------------


def test_a_sleeper_is_woken_by_the_number_of_each_message_and_claims_that_slot(
    place: SharedPlace, sink: Producer
) -> None:
    consumer = ConsumerProcess(place)
    key = Control.attach(place).key
    for i in range(20):
        consumer.begin()
        consumer.wait_until_asleep()
        assert inspect(place).count(State.READY) == 0
        sink.publish({"i": i})
        result = consumer.result()
        assert result.fields == [{"i": i}]
        assert numbers(result) == claims(result) == [Claim(key, 0, 0, i)]
    consumer.end()


def test_sleepers_are_woken_in_turn_the_longest_first(place: SharedPlace, sink: Producer) -> None:
    consumers = [ConsumerProcess(place) for _ in range(3)]
    for consumer in consumers:
        consumer.begin()
        consumer.wait_until_asleep()
    for i in range(9):
        consumer = consumers[i % 3]
        assert oldest_sleeper(place) == consumer.index
        sink.publish({"i": i})
        assert consumer.result().fields == [{"i": i}]
        assert not any(other.has_result() for other in consumers)
        consumer.begin()
        consumer.wait_until_asleep()
    for i, consumer in enumerate(consumers):
        sink.publish({"i": i})
        assert consumer.result().fields == [{"i": i}]
        consumer.end()


def test_turns_count_across_streams(places: list[SharedPlace], sinks: list[Producer]) -> None:
    """Whose message it was that woke a consumer is of no matter: it slept less long in all of its streams."""
    consumers = [ConsumerProcess(*places) for _ in range(2)]
    for consumer in consumers:
        consumer.begin()
        consumer.wait_until_asleep()
    for i, stream in enumerate([0, 0, 2, 1, 1, 1, 2, 0]):
        consumer = consumers[i % 2]
        assert [oldest_sleeper(place) for place in places] == [consumer.index] * 3
        sinks[stream].publish({"i": i})
        assert consumer.result().fields == [{"i": i}]
        consumer.begin()
        consumer.wait_until_asleep()
    for i, consumer in enumerate(consumers):
        sinks[i].publish({"i": i})
        consumer.result()
        consumer.end()


def test_a_consumer_that_is_behind_is_sent_nothing(place: SharedPlace, sink: Producer) -> None:
    for i in range(8):
        sink.publish({"i": i})
    consumer = ConsumerProcess(place)
    consumer.begin(8)
    result = consumer.result()
    assert [fields["i"] for fields in result.fields] == list(range(8))
    assert numbers(result) == []
    consumer.end()


def test_the_stream_that_a_number_names_is_asked_first(places: list[SharedPlace], sinks: list[Producer]) -> None:
    """In any order and at any time: whoever is told of a slot takes it, or an older one of that stream."""
    consumer = ConsumerProcess(*places)
    chance = random.Random(1)
    count, told = 300, 0
    consumer.begin(count)
    published = 0
    while published < count:
        if chance.random() < 0.5:
            consumer.wait_until_asleep()
        for _ in range(min(chance.randint(1, 3), count - published)):
            sinks[chance.randrange(3)].publish({"i": published}, wait=True)
            published += 1
    heard = consumer.result().heard
    done: set[tuple[int, int]] = set()
    for i, entry in enumerate(heard):
        if isinstance(entry, Claim):
            done.add((entry.key, entry.sequence))
        elif i == 0 or isinstance(heard[i - 1], Claim):
            token = unpack(entry.data)
            assert token is not None
            if (token.key, token.sequence) not in done:
                claimed = heard[next(k for k in range(i, len(heard)) if isinstance(heard[k], Claim))]
                assert isinstance(claimed, Claim)
                assert claimed.key == token.key
                assert claimed == Claim(*token) or claimed.sequence < token.sequence
                told += 1
    assert told, "no number came before its slot was claimed"
    assert len(done) == count
    consumer.end()


# -- who cannot take a message --------------------------------------------------------------------------------


def test_a_sleeper_that_was_told_and_has_not_run_since_is_not_told_again(place: SharedPlace, sink: Producer) -> None:
    stopped, other = ConsumerProcess(place), ConsumerProcess(place)
    for consumer in (stopped, other):
        consumer.begin()
        consumer.wait_until_asleep()
    stopped.stop()
    sink.publish({"i": 0})  # its number is sent to the one that cannot run
    sink.publish({"i": 1})
    assert other.result().fields == [{"i": 0}]
    for i in (1, 2, 3):
        other.begin()
        assert other.result().fields == [{"i": i}]
        sink.publish({"i": i + 1})
    other.begin()
    assert other.result().fields == [{"i": 4}]
    stopped.go_on()
    sink.publish({"i": 5})
    assert stopped.result().fields == [{"i": 5}]
    for consumer in (stopped, other):
        consumer.end()


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_sleeper_that_cannot_run_keeps_no_message_from_others(
    place: SharedPlace, sink: Producer, is_killed: bool
) -> None:
    """The other one looks by itself now and then."""
    gone = ConsumerProcess(place)
    gone.begin()
    gone.wait_until_asleep()
    if is_killed:
        gone.kill()
    else:
        gone.stop()
    other = ConsumerProcess(place, idle_s=LOOKS_S)
    for i in range(3):
        other.begin()
        other.wait_until_asleep()
        sink.publish({"i": i})
        assert other.result().fields == [{"i": i}]
    other.end()
    if not is_killed:
        gone.kill()


def test_what_a_dead_consumer_held_wakes_who_sleeps(place: SharedPlace, sink: Producer) -> None:
    """One that looks by itself finds it, and tells others of it."""
    holder, looker, sleeper = (
        ConsumerProcess(place, holds=True),
        ConsumerProcess(place, idle_s=LOOKS_S),
        ConsumerProcess(place),
    )
    for i in range(2):
        sink.publish({"i": i, "image": PICTURE})
    holder.begin(2)
    holder.result()
    for consumer in (sleeper, looker):
        consumer.begin()
        consumer.wait_until_asleep()
    assert inspect(place).count(State.LEASED) == 2
    holder.kill()
    results = [looker.result(), sleeper.result()]
    assert sorted(result.fields[0]["i"] for result in results) == [0, 1]
    assert numbers(results[1]), "the sleeper was told"
    for consumer in (looker, sleeper):
        consumer.end()


def test_a_consumer_with_the_number_of_one_that_was_killed_in_its_sleep_is_woken(
    place: SharedPlace, sink: Producer
) -> None:
    killed = ConsumerProcess(place)
    killed.begin()
    killed.wait_until_asleep()
    killed.kill()
    sink.publish({"i": 0})  # tells the dead one, who is not known to be
    successor = ConsumerProcess(place)
    assert successor.index == killed.index
    successor.begin()
    assert successor.result().fields == [{"i": 0}]
    for i in (1, 2):
        successor.begin()
        successor.wait_until_asleep()
        sink.publish({"i": i})
        assert successor.result().fields == [{"i": i}]
    successor.end()


def test_a_sleeper_is_woken_by_the_next_producer(place: SharedPlace) -> None:
    first = Producer(place, trusted=True)
    consumer = ConsumerProcess(place)
    consumer.begin()
    consumer.wait_until_asleep()
    first.close()
    with Producer(place, trusted=True) as second:
        second.publish({"i": 0})
        assert consumer.result().fields == [{"i": 0}]
    consumer.end()


def test_who_was_told_of_two_messages_and_takes_one_tells_another_sleeper_of_the_other(
    places: list[SharedPlace], sinks: list[Producer]
) -> None:
    first, second = ConsumerProcess(*places), ConsumerProcess(*places)
    for consumer in (first, second):
        consumer.begin()
        consumer.wait_until_asleep()
    first.stop()
    sinks[0].publish({"i": 0})
    sinks[1].publish({"i": 1})
    assert not second.has_result(), "both numbers went to the one that has slept longest"
    first.go_on()
    results = [first.result(), second.result()]
    assert sorted(result.fields[0]["i"] for result in results) == [0, 1]
    assert numbers(results[1]) == claims(results[1]), "the second one was told by the first one"
    for consumer in (first, second):
        consumer.end()


# -- nobody else may --------------------------------------------------------------------------------------------


def test_closing_in_another_thread_ends_a_receive_that_waits(place: SharedPlace, sink: Producer) -> None:
    source = Source([place])
    closing = when(lambda: asleep(place), source.close)
    with pytest.raises(StreamClosed, match=r"receive\(\) after close"):
        source.receive(NEVER_S)
    closing.join()
    assert inspect(place).consumers == []
    assert asleep(place) == {}
    with pytest.raises(StreamClosed, match=r"receive\(\) after close"):
        source.receive(NEVER_S)


@pytest.mark.parametrize("many", [True, False])
def test_a_second_thread_that_receives_is_told_so_and_disturbs_nothing(
    place: SharedPlace, sink: Producer, many: bool
) -> None:
    received: list[object] = []
    with Source([place]) as source:

        def receive() -> None:
            received.extend([source.receive(NEVER_S), source.receive(NEVER_S)])

        receiving = threading.Thread(target=receive)
        receiving.start()
        wait_until(lambda: asleep(place))
        for _ in range(3):
            with pytest.raises(BlendtorchError, match="another call of it runs.*Open a source for each thread"):
                source.receive_many(2, 0) if many else source.receive(0)
        sink.publish({"i": 0})
        sink.publish({"i": 1})
        receiving.join()
        assert [message.fields["i"] for message in received] == [0, 1]  # type: ignore[attr-defined]
        sink.publish({"i": 2})
        message = source.receive(PATIENCE_S)
        assert message is not None
        assert message.fields == {"i": 2}


def test_closing_works_after_a_second_thread_was_refused(place: SharedPlace, sink: Producer) -> None:
    source = Source([place])
    ended: list[BaseException] = []

    def receive() -> None:
        try:
            source.receive(NEVER_S)
        except StreamClosed as error:
            ended.append(error)

    receiving = threading.Thread(target=receive)
    receiving.start()
    wait_until(lambda: asleep(place))
    with pytest.raises(BlendtorchError, match="another call of it runs"):
        source.receive(0)
    source.close()
    receiving.join()
    assert len(ended) == 1
    assert inspect(place).consumers == []


@pytest.fixture
def handler() -> Iterator[list[object]]:
    """What the next SIGUSR1 does, last in first out."""
    todo: list[object] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: todo.pop()())  # type: ignore[operator]
    yield todo
    signal.signal(signal.SIGUSR1, before)


def test_publishing_in_a_signals_handler_in_the_middle_of_publish_is_an_error_that_says_so(
    place: SharedPlace, sink: Producer, handler: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[str] = []

    def publish() -> None:
        try:
            sink.publish({"from": "the handler"})
        except BlendtorchError as error:
            errors.append(str(error))
        assert sink.lend((9000,), np.uint8) is None

    commit = Ring.commit

    def interrupted(*arguments: object) -> object:
        if handler:
            signal.raise_signal(signal.SIGUSR1)
        return commit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Ring, "commit", interrupted)
    handler.append(publish)
    sink.publish({"from": "the script"})
    assert len(errors) == 1
    assert "publish() was called in the middle of another call" in errors[0]
    sink.publish({"from": "the script again"})
    with Source([place]) as source:
        messages = [source.receive(PATIENCE_S), source.receive(PATIENCE_S), source.receive(0)]
    assert [message and message.fields["from"] for message in messages] == ["the script", "the script again", None]


def test_an_error_of_a_handler_in_the_middle_of_publish_ends_it_and_the_next_one_goes_on(
    place: SharedPlace, sink: Producer, handler: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script does not catch what the handler's publish raises."""
    commit = Ring.commit

    def interrupted(*arguments: object) -> object:
        if handler:
            signal.raise_signal(signal.SIGUSR1)
        return commit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Ring, "commit", interrupted)
    handler.append(lambda: sink.publish({"from": "the handler"}))
    with pytest.raises(BlendtorchError, match="by a signal's handler"):
        sink.publish({"from": "the script"})
    sink.publish({"from": "the script again"})
    assert inspect(place).count(State.LOANED) == 0
    with Source([place]) as source:
        message = source.receive(PATIENCE_S)
        assert message is not None
        assert message.fields == {"from": "the script again"}


def test_receiving_in_a_signals_handler_in_the_middle_of_receive_is_an_error_that_says_so(
    place: SharedPlace, sink: Producer, handler: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[str] = []
    claim = Ring.claim

    def interrupted(*arguments: object) -> object:
        if handler:
            signal.raise_signal(signal.SIGUSR1)
        return claim(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Ring, "claim", interrupted)
    with Source([place]) as source:

        def receive() -> None:
            try:
                source.receive(0)
            except BlendtorchError as error:
                errors.append(str(error))

        for i in range(3):
            sink.publish({"i": i})
        handler.extend([receive, receive])
        messages = [source.receive(PATIENCE_S) for _ in range(3)]
    assert [message and message.fields["i"] for message in messages] == [0, 1, 2]
    assert len(errors) == 2
    assert all("by a signal's handler" in error for error in errors)
