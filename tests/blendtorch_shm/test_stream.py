"""A stream in shared memory, seen from both sides."""

import gc
import os
import time

import numpy as np
import pytest

from blendtorch_shm.errors import SegmentError
from blendtorch_shm.launch.address import Address, Twin, beacon_path
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.memory import segment
from blendtorch_shm.memory.layout import MAX_CONSUMERS, consumer_word
from blendtorch_shm.memory.locks import open_locks, slot_lock
from blendtorch_shm.memory.states import State
from blendtorch_shm.stream.control import attach_control
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.reader import Reader
from blendtorch_shm.stream.source import Source
from blendtorch_shm.transport import open_sink, open_source

from ..interruption import everywhere
from .conftest import SOURCES


def test_a_stream_says_what_it_waits_for(twin: Twin) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    source = open_source([address])
    assert "not attached" in source.explain()
    sink = open_sink(address)
    sink.publish({"i": 1})
    sink.publish({"meta": {1, 2}})
    assert source.receive(10) is not None
    assert "its producer is alive and has published 2 messages, the last one" in source.explain()
    assert "(1 of them contain pickles, which only consumers on this host may take)" in source.explain()
    sink.close()
    assert "its producer has finished" in source.explain()
    source.close()


def test_the_next_producer_goes_on_where_the_last_one_ended(twin: Twin) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    first = open_sink(address)
    for i in range(3):
        first.publish({"i": i})
    first.close()
    second = open_sink(address)
    second.publish({"i": 3})
    source = open_source([address])
    received = [source.receive(10) for _ in range(4)]
    assert [(m.sequence, m.fields["i"]) for m in received if m is not None] == [(i, i) for i in range(4)]
    source.close()
    second.close()


def test_a_forked_child_that_closes_what_it_inherited_leaves_its_parents_stream_alone(twin: Twin) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    sink, source = open_sink(address), open_source([address])
    sink.publish({"i": 0})
    child = os.fork()
    if child == 0:
        sink.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert "its producer is alive" in source.explain()
    sink.publish({"i": 1})
    assert [m.fields["i"] for m in (source.receive(10), source.receive(10)) if m is not None] == [0, 1]
    source.close()
    sink.close()


def test_a_ring_that_could_not_be_attached_is_tried_again(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    sink, source = open_sink(address), open_source([address])
    attach = segment.attach

    def fail_for_rings(name: str) -> segment.Segment:
        if name.endswith(".0"):
            raise SegmentError("too many open files")
        return attach(name)

    sink.publish({"i": 0})
    with monkeypatch.context() as patch:
        patch.setattr(segment, "attach", fail_for_rings)
        assert source.receive(0) is None
    message = source.receive(10)
    assert message is not None
    assert message.fields == {"i": 0}
    source.close()
    sink.close()


def test_a_stream_that_begins_late_is_not_starved_by_one_that_always_has_something(
    launch_directory: LaunchDirectory,
) -> None:
    early, late = (Address("tcp://127.0.0.1:*", launch_directory.twin("DATA", btid)) for btid in range(2))
    source = open_source([early, late])
    busy = open_sink(early)
    busy.publish({"from": "early"})
    assert source.receive(20) is not None
    quiet = open_sink(late)
    quiet.publish({"from": "late"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        busy.publish({"from": "early"})  # there is never nothing to take
        message = source.receive(20)
        assert message is not None
        if message.fields["from"] == "late":
            break
    else:
        pytest.fail("nothing came of the stream that began late")
    source.close()
    for sink in (busy, quiet):
        sink.close()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_streams_take_turns_however_few_messages_are_taken_at_once(
    launch_directory: LaunchDirectory, count: int
) -> None:
    addresses = [Address("tcp://127.0.0.1:*", launch_directory.twin("DATA", btid)) for btid in range(3)]
    sinks = [open_sink(address) for address in addresses]
    source = open_source(addresses)
    waiting, taken = [0] * 3, [0] * 3
    for _ in range(12):
        for btid, sink in enumerate(sinks):  # there is never nothing to take, of any of them
            while waiting[btid] < 5:
                sink.publish({"from": btid})
                waiting[btid] += 1
        for message in source.receive_many(count, 20):
            waiting[message.fields["from"]] -= 1
            taken[message.fields["from"]] += 1
    assert sum(taken) == 12 * count
    assert max(taken) - min(taken) <= 2
    source.close()
    for sink in sinks:
        sink.close()


def test_of_many_messages_taken_at_once_one_that_makes_no_sense_costs_only_itself(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    sink = open_sink(address, send_hwm=10, num_slots=11)
    for i in range(4):
        with monkeypatch.context() as patch:
            if i == 1:
                patch.setattr("blendtorch_shm.stream.sink.encode_header", lambda *arguments: b"no header")
            sink.publish({"i": i, "image": np.full(9000, i, np.uint8)})
    source = open_source([address])
    messages = source.receive_many(4, 10)
    assert [message.fields["i"] for message in messages] == [0, 2, 3]
    assert all((message.fields["image"] == message.fields["i"]).all() for message in messages)
    source.close()
    sink.close()


def test_of_many_messages_taken_at_once_one_that_somebody_else_is_claiming_is_left_to_him(twin: Twin) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    sink, source = open_sink(address), open_source([address])
    locks = open_locks(twin.lock_path)
    for i in range(4):
        sink.publish({"i": i})
    assert locks.try_lock(slot_lock(0, 1))
    assert [message.fields["i"] for message in source.receive_many(4, 10)] == [0, 2, 3]
    assert source.receive_many(4, 0.01) == []
    locks.unlock(slot_lock(0, 1))
    assert [message.fields["i"] for message in source.receive_many(4, 10)] == [1]
    locks.close()
    source.close()
    sink.close()


@pytest.mark.parametrize("count", [1, 4])
def test_ctrl_c_anywhere_while_messages_are_taken_loses_only_what_was_taken_already(twin: Twin, count: int) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    sink, source = open_sink(address), open_source([address])

    def publish() -> None:
        for i in range(count):
            sink.publish({"i": i, "image": np.full(9000, i, np.uint8)})

    publish()
    (ring,) = source._readers[0]._all_rings()
    lost = []
    for place in everywhere(lambda: source.receive_many(count, 10), SOURCES):
        left = []
        while (message := source.receive(0)) is not None:
            left.append(message.fields["i"])
            assert (message.fields["image"] == left[-1]).all()
        del message
        lost.append(count - len(left))
        assert left == list(range(lost[-1], count)), place
        assert ring.count(State.FREE) == ring.num_slots, place
        publish()
    assert lost[0] == 0
    assert lost[-1] == count
    source.close()
    sink.close()


def test_ctrl_c_anywhere_while_a_stream_is_opened_leaves_no_member_behind(twin: Twin) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    sink = open_sink(address)
    sink.publish({"i": 1})
    locks = open_locks(twin.lock_path)
    held = set(locks._held)
    sources: list[Source] = []
    for place in everywhere(lambda: sources.append(open_source([address])), SOURCES):
        while sources:
            sources.pop().close()
        assert locks._held == held, place
    sources.pop().close()
    locks.close()
    sink.close()


def test_a_publish_whose_handler_closed_the_sink_leaves_the_next_producer_alone(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    sink, source = open_sink(address), open_source([address])
    sink.publish({"image": np.zeros(9000, np.uint8)})
    successors = []

    def replace_and_raise(*_: object) -> None:
        monkeypatch.undo()
        sink.close(patient=False)
        successors.append(open_sink(address))
        successors.append(successors[0].lend((9000,), np.uint8))
        raise KeyboardInterrupt

    monkeypatch.setattr("blendtorch_shm.stream.sink.encode_header", replace_and_raise)
    with pytest.raises(KeyboardInterrupt):
        sink.publish({"image": np.zeros(9000, np.uint8)})
    successor, lent = successors
    lent[...] = 7
    successor.publish({"image": lent})
    assert source.receive(10) is not None
    message = source.receive(10)
    assert message is not None
    assert (message.fields["image"] == 7).all()
    source.close()
    successor.close()


def test_messages_that_make_no_sense_keep_no_slot_of_those_that_came_with_them(twin: Twin) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    sink, source = open_sink(address), open_source([address])
    reader = Reader(SharedPlace(twin))
    gc.disable()
    try:
        for bad in ([1], [0, 1, 2, 3]):
            for i in range(4):
                sink.publish({"i": i, "image": np.full(9000, i, np.uint8)})
            (ring,) = reader._all_rings()
            for slot in (ring.ready()[i] for i in bad):
                ring._payload_nbytes[slot] = 2**40
            good = [message.fields["i"] for message in source.receive_many(4, 0.05)]
            assert good == [i for i in range(4) if i not in bad]
            assert ring.count(State.FREE) == ring.num_slots
    finally:
        gc.enable()
    words = attach_control(SharedPlace(twin)).words
    assert sum(words[consumer_word(index, "rejected")] for index in range(MAX_CONSUMERS)) == 5
    reader.finish()
    source.close()
    sink.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to somebody else")
def test_what_belongs_to_another_user_is_not_trusted(twin: Twin) -> None:
    sink = open_sink(Address("tcp://127.0.0.1:*", twin))
    segment = f"/dev/shm{twin.prefix}"
    os.chown(segment, 65534, 65534)
    with pytest.raises(SegmentError, match="belongs to another user"):
        attach_control(SharedPlace(twin))
    os.chown(segment, 0, 0)
    assert twin.is_here()
    os.chown(beacon_path(twin.launch), 65534, 65534)
    assert not twin.is_here()
    sink.close()
