"""A stream in shared memory, seen from both sides."""

import contextlib
import gc
import itertools
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from blendtorch_shm.errors import BlendtorchError, SegmentError, StreamClosed, UnreadableMessage
from blendtorch_shm.launch.address import Twin, beacon_path
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.memory import layout, segment
from blendtorch_shm.memory.layout import VERSION, word
from blendtorch_shm.memory.locks import Locks, slot_lock
from blendtorch_shm.memory.states import State
from blendtorch_shm.message.wire import Parts
from blendtorch_shm.stream import producer
from blendtorch_shm.stream.consumer import Consumer
from blendtorch_shm.stream.control import Control
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer
from blendtorch_shm.stream.rings import Rings
from blendtorch_shm.transport.local import LocalStream

from ..interruption import everywhere, runs_with_a_switch
from .conftest import SOURCES
from .members import PATIENCE_S, asleep, when

NBYTES = 9000
"""Of an array that is large enough to lie in the slot."""


@pytest.fixture
def places(launch_directory: LaunchDirectory) -> list[SharedPlace]:
    """Where some streams live."""
    return [SharedPlace(launch_directory.twin("DATA", btid)) for btid in range(3)]


def picture(i: int) -> np.ndarray:
    return np.full(NBYTES, i % 256, np.uint8)


def receive_all(source: Source) -> list[int]:
    """The numbers of the messages that are here; their pictures show them."""
    found = []
    while (message := source.receive(0)) is not None:
        found.append(message.fields["i"])
        if "image" in message.fields:
            np.testing.assert_array_equal(message.fields["image"], picture(found[-1]))
        del message
    return found


def assert_at_rest(place: SharedPlace, *, ready: int = 0, leased: int = 0) -> None:
    """Nobody is in the middle of anything: but for so many READY and LEASED slots all are FREE, none is locked, nobody waits."""
    seen = inspect(place)
    assert (seen.count(State.READY), seen.count(State.LEASED), seen.count(State.LOANED)) == (ready, leased, 0)
    assert [ring.locked for ring in seen.rings] == [[]] * len(seen.rings)
    assert (seen.asleep, seen.waiting) == ({}, 0)


# -- both ends ------------------------------------------------------------------------------------------------


def test_a_stream_says_what_it_waits_for(place: SharedPlace) -> None:
    with Source([place]) as source:
        assert "DATA of instance 0: no publisher has opened it" in source.explain()
        assert source.explain(brief=True) == ""
        sink = Producer(place, trusted=True)
        sink.publish({"i": 1})
        sink.publish({"meta": {1, 2}})
        assert source.receive(PATIENCE_S) is not None
        assert "its producer is alive and has published 2 messages, the last one" in source.explain()
        assert source.explain(brief=True) == ""
        assert "(1 of them contain pickles, which only consumers on this host may take)" in source.explain()
        sink.close()
        assert "its producer has finished" in source.explain()


def test_the_next_producer_goes_on_where_the_last_one_ended(place: SharedPlace) -> None:
    with Producer(place, trusted=True) as first:
        for i in range(3):
            first.publish({"i": i})
    with Producer(place, trusted=True) as second, Source([place]) as source:
        second.publish({"i": 3})
        received = [source.receive(PATIENCE_S) for _ in range(4)]
        assert [(m.sequence, m.fields["i"]) for m in received if m is not None] == [(i, i) for i in range(4)]


def test_a_producer_that_was_killed_right_after_a_fork_has_a_successor(place: SharedPlace, twin: Twin) -> None:
    script = f"""
import os, signal, sys, time
os.register_at_fork(after_in_child=lambda: time.sleep(0.3))  # before anything of ours: the child has all descriptors
from blendtorch_shm.launch.address import Twin
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer
sink = Producer(SharedPlace({twin!r}), trusted=True)
if os.fork():
    os.kill(os.getpid(), signal.SIGKILL)
os._exit(0)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    with Producer(place, trusted=True) as sink:
        sink.publish({"i": 0})


def test_a_second_living_producer_is_refused(place: SharedPlace, sink: Producer, source: Source) -> None:
    with pytest.raises(SegmentError, match="Another living process publishes as .*a socket name of its own"):
        Producer(place, trusted=True)
    sink.publish({"i": 0})
    assert receive_all(source) == [0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # the child ends at once
def test_a_forked_child_that_closes_what_it_inherited_leaves_its_parents_stream_alone(
    place: SharedPlace, sink: Producer, source: Source
) -> None:
    sink.publish({"i": 0, "image": picture(0)})
    held = source.receive(PATIENCE_S)
    assert held is not None
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sink.close()
            try:
                source.receive(0)
            except StreamClosed:
                status = 0
            source.close()
            del held
            gc.collect()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    seen = inspect(place)
    assert (seen.has_producer, len(seen.consumers), seen.count(State.LEASED)) == (True, 1, 1)
    sink.publish({"i": 1})
    assert receive_all(source) == [1]


def test_a_ring_that_could_not_be_attached_is_tried_again(
    sink: Producer, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = segment.attach

    def fail_for_rings(name: str, **kwargs: bool) -> segment.Segment:
        if name.endswith(".0"):
            raise SegmentError("too many open files")
        return attach(name, **kwargs)

    sink.publish({"i": 0})
    with monkeypatch.context() as patch:
        patch.setattr(segment, "attach", fail_for_rings)
        assert source.receive(0) is None
    assert receive_all(source) == [0]


def test_messages_of_any_size_travel_in_order_through_several_rings(
    place: SharedPlace, sink: Producer, source: Source
) -> None:
    sizes = [1_000, 2_000_000, 5_000, 300_000, 9_000_000]
    for i, size in enumerate(sizes):
        sink.publish({"i": i, "image": np.full(size, i, np.uint8)})
    assert len(inspect(place).rings) > 1
    for i, size in enumerate(sizes):
        message = source.receive(PATIENCE_S)
        assert message is not None
        assert (message.fields["i"], message.fields["image"].size) == (i, size)
        assert (message.fields["image"] == i).all()
        del message
    sink.publish({"i": 5})
    assert receive_all(source) == [5]
    assert len(inspect(place).rings) == 1, "the others were removed when they were empty"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to somebody else")
def test_what_belongs_to_another_user_is_not_trusted(place: SharedPlace, twin: Twin, sink: Producer) -> None:
    path = f"/dev/shm{twin.prefix}"
    os.chown(path, 65534, 65534)
    with pytest.raises(SegmentError, match="belongs to another user"):
        Control.attach(place)
    os.chown(path, 0, 0)
    assert twin.is_here()
    os.chown(beacon_path(twin.launch), 65534, 65534)
    assert not twin.is_here()


# -- turns ----------------------------------------------------------------------------------------------------


def test_a_stream_that_begins_late_is_not_starved_by_one_that_always_has_something(places: list[SharedPlace]) -> None:
    early, late = places[:2]
    with Source([early, late]) as source, Producer(early, trusted=True) as busy:
        busy.publish({"from": "early"})
        assert source.receive(PATIENCE_S) is not None
        with Producer(late, trusted=True) as quiet:
            quiet.publish({"from": "late"})
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                busy.publish({"from": "early"})  # there is never nothing to take
                message = source.receive(PATIENCE_S)
                assert message is not None
                if message.fields["from"] == "late":
                    return
            pytest.fail("nothing came of the stream that began late")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_streams_take_turns_however_few_messages_are_taken_at_once(places: list[SharedPlace], count: int) -> None:
    sinks = [Producer(place, trusted=True) for place in places]
    with Source(places) as source:
        waiting, taken = [0] * 3, [0] * 3
        for _ in range(12):
            for btid, sink in enumerate(sinks):  # there is never nothing to take, of any of them
                while waiting[btid] < 5:
                    sink.publish({"from": btid})
                    waiting[btid] += 1
            for message in source.receive_many(count, PATIENCE_S):
                waiting[message.fields["from"]] -= 1
                taken[message.fields["from"]] += 1
    assert sum(taken) == 12 * count
    assert max(taken) - min(taken) <= 2
    for sink in sinks:
        sink.close()


def test_of_many_messages_taken_at_once_one_that_somebody_else_is_claiming_is_left_to_him(
    twin: Twin, sink: Producer, source: Source
) -> None:
    for i in range(4):
        sink.publish({"i": i})
    with Locks(twin.lock_path) as locks:
        assert locks.try_lock(slot_lock(0, 1))
        assert [message.fields["i"] for message in source.receive_many(4, PATIENCE_S)] == [0, 2, 3]
        assert source.receive_many(4, 0.01) == []
        locks.unlock(slot_lock(0, 1))
        assert [message.fields["i"] for message in source.receive_many(4, PATIENCE_S)] == [1]


# -- files that somebody removes --------------------------------------------------------------------------------


@pytest.mark.parametrize("somebody_made_another", [False, True])
def test_nobody_joins_a_stream_whose_lock_file_was_removed(
    place: SharedPlace, twin: Twin, sink: Producer, source: Source, somebody_made_another: bool
) -> None:
    sink.publish({"image": picture(1)})
    held = source.receive(PATIENCE_S)
    os.unlink(twin.lock_path)
    if somebody_made_another:
        Locks(twin.lock_path).close()
    with pytest.raises(SegmentError, match=re.escape(twin.lock_path)):
        Consumer(place)
    sink.publish({"image": picture(2)})
    following = source.receive(PATIENCE_S)
    assert held is not None
    assert following is not None
    assert (held.fields["image"] == 1).all()
    assert (following.fields["image"] == 2).all()


@pytest.mark.parametrize("gone", ["lock file", "shared memory"])
def test_a_stream_whose_files_were_removed_begins_anew_and_its_readers_take_what_is_left_and_follow(
    place: SharedPlace, twin: Twin, sink: Producer, source: Source, gone: str
) -> None:
    for i in range(3):
        sink.publish({"i": i, "image": picture(i)})
    held = source.receive(PATIENCE_S)
    if gone == "lock file":
        os.unlink(twin.lock_path)
    else:
        segment.unlink(place.name)
        segment.unlink(f"{place.name}.0")
    sink.close()
    with Producer(place, trusted=True) as successor, Source([place]) as late:
        for i in range(10, 13):
            successor.publish({"i": i, "image": picture(i)})
        received = [source.receive(PATIENCE_S) for _ in range(4)] + [late.receive(PATIENCE_S)]
        assert sorted(message.fields["i"] for message in received if message is not None) == [1, 2, 10, 11, 12]
        assert all((m.fields["image"] == m.fields["i"]).all() for m in (held, *received) if m is not None)
        assert inspect(place).published == 3


@pytest.mark.parametrize("somebody_made_another", [False, True])
def test_a_second_publisher_does_not_replace_a_living_ones_stream_whose_lock_file_was_removed(
    place: SharedPlace, twin: Twin, sink: Producer, source: Source, somebody_made_another: bool
) -> None:
    sink.publish({"i": 0})
    os.unlink(twin.lock_path)
    if somebody_made_another:
        Locks(twin.lock_path).close()
    with pytest.raises(SegmentError, match="Another living process"):
        Producer(place, trusted=True)
    sink.publish({"i": 1})
    assert [message.fields["i"] for message in source.receive_many(2, PATIENCE_S)] == [0, 1]
    assert place.is_current(sink._control.segment)


@pytest.mark.parametrize("nbytes", [NBYTES, 20 * NBYTES])
def test_readers_take_what_is_left_of_a_stream_that_began_anew_also_from_rings_that_they_had_not_seen(
    place: SharedPlace, twin: Twin, sink: Producer, nbytes: int
) -> None:
    with Source([place]) as source:
        sink.publish({"i": 0, "image": picture(0)})
        received = [source.receive(PATIENCE_S)]
        for i in (1, 2):
            sink.publish({"i": i, "image": np.full(nbytes, i, np.uint8)})
        os.unlink(twin.lock_path)
        sink.close()
        with Producer(place, trusted=True) as successor:
            successor.publish({"i": 3, "image": picture(3)})
            received += [source.receive(PATIENCE_S) for _ in range(3)]
    assert [message.fields["i"] for message in received if message is not None] == [0, 1, 2, 3]
    assert all((message.fields["image"] == message.fields["i"]).all() for message in received if message is not None)


# -- what makes no sense --------------------------------------------------------------------------------------


def test_of_many_messages_taken_at_once_one_that_makes_no_sense_costs_only_itself(
    place: SharedPlace, sink: Producer, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        with monkeypatch.context() as patch:
            if i == 1:
                patch.setattr(Parts, "header", lambda parts: b"no header")
            sink.publish({"i": i, "image": picture(i)})
    messages = source.receive_many(4, PATIENCE_S)
    assert [message.fields["i"] for message in messages] == [0, 2, 3]
    assert all((message.fields["image"] == message.fields["i"]).all() for message in messages)
    assert_at_rest(place, leased=3)
    with pytest.raises(UnreadableMessage, match="DATA of instance 0.*wire format"):
        source.receive_many(4, PATIENCE_S)
    sink.publish({"i": 4})
    (message,) = source.receive_many(4, PATIENCE_S)
    assert message.fields["i"] == 4
    assert_at_rest(place, leased=3)


def test_messages_that_make_no_sense_keep_no_slot_of_those_that_came_with_them(
    place: SharedPlace, sink: Producer, source: Source
) -> None:
    gc.disable()
    try:
        for bad in ([1], [0, 1, 2, 3]):
            for i in range(4):
                sink.publish({"i": i, "image": picture(i)})
            (ring,) = Rings(place, Control.attach(place)).now()
            for slot in (ring.ready()[i] for i in bad):
                field = word(layout.SLOT_RECORD, "payload_nbytes")
                record = layout.records_offset(ring.num_slots) + slot * layout.SLOT_RECORD.itemsize
                ring.segment.words[record // 8 + field] = 2**40
            good, errors = [], []
            while len(good) + len(errors) < 4:
                try:
                    good += [message.fields["i"] for message in source.receive_many(4, PATIENCE_S)]
                except UnreadableMessage as error:
                    errors.append(str(error))
            assert good == [i for i in range(4) if i not in bad]
            assert all("claims 1099511627776 + " in error for error in errors)
            assert_at_rest(place)
    finally:
        gc.enable()
    control = Control.attach(place)
    (consumer,) = inspect(place).consumers
    assert control.words[layout.consumer_word(consumer, "rejected")] == 5


# -- another program on the other side ------------------------------------------------------------------------


def make_it_another_version(memory: segment.Segment, header: np.dtype[np.void]) -> None:
    memory.words[word(header, "version")] = VERSION + 1


def both_versions(name: str) -> str:
    return re.escape(
        f"{name} has memory layout {VERSION + 1}, this program understands {VERSION}: use the same version"
    )


def test_a_stream_of_another_version_is_an_error_that_names_both(place: SharedPlace) -> None:
    with Producer(place, trusted=True) as sink:
        sink.publish({"i": 0})
        make_it_another_version(Control.attach(place).segment, layout.STREAM_HEADER)
        with pytest.raises(SegmentError, match=both_versions(place.name)):
            Control.attach(place)
        with Source([place]) as source:
            assert source.receive(0) is None
            assert re.search(f"not attached.*{both_versions(place.name)}", source.explain())


def test_a_producer_leaves_a_stream_of_another_version_alone(place: SharedPlace) -> None:
    """Its consumers would wait for ever at memory that is no longer the stream's."""
    with Producer(place, trusted=True) as sink:
        sink.publish({"i": 0})
    memory = Control.attach(place).segment
    make_it_another_version(memory, layout.STREAM_HEADER)
    with pytest.raises(SegmentError, match=both_versions(place.name)):
        Producer(place, trusted=True)
    memory.words[word(layout.STREAM_HEADER, "version")] = VERSION
    with Producer(place, trusted=True) as sink, Source([place]) as source:
        sink.publish({"i": 1})
        assert receive_all(source) == [0, 1]


def test_a_ring_of_another_version_is_not_read(place: SharedPlace, sink: Producer, source: Source) -> None:
    sink.publish({"i": 0})
    memory = place.attach(".0")
    make_it_another_version(memory, layout.RING_HEADER)
    assert source.receive(0) is None
    assert re.search(f"not all of its memory could be attached: .*{both_versions(place.name + '.0')}", source.explain())
    memory.words[word(layout.RING_HEADER, "version")] = VERSION
    assert receive_all(source) == [0]
    assert "attached" not in source.explain()


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ppc64le"])
def test_shared_memory_is_refused_on_a_processor_that_may_reorder_stores(
    place: SharedPlace, sink: Producer, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    why = rf"this processor \({machine}\) may reorder stores.*plain tcp:// addresses work on any"
    with pytest.raises(SegmentError, match=why):
        Control.attach(place)
    with Source([place]) as source:
        assert re.search(f"not attached.*{why}", source.explain())
    sink.close()
    with pytest.raises(SegmentError, match=why):
        Producer(place, trusted=True)
    monkeypatch.undo()
    assert not inspect(place).has_producer


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_shared_memory_works_on_x86(place: SharedPlace, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with Producer(place, trusted=True) as sink, Source([place]) as source:
        sink.publish({"i": 0})
        assert receive_all(source) == [0]


def test_a_stream_within_one_process_works_on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    stream = LocalStream()
    with stream.open_sink() as sink, stream.open_source() as source:
        sink.publish({"i": 0})
        assert receive_all(source) == [0]


# -- interrupts -----------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("many", [True, False])
def test_ctrl_c_anywhere_while_messages_are_taken_loses_nothing(
    place: SharedPlace, sink: Producer, source: Source, count: int, many: bool
) -> None:
    """What the call did not return, the next one does."""

    def publish() -> None:
        for i in range(count):
            sink.publish({"i": i, "image": picture(i)})

    publish()
    take = (lambda: source.receive_many(count, PATIENCE_S)) if many else (lambda: source.receive(PATIENCE_S))
    for where in everywhere(take, SOURCES):
        assert receive_all(source) == list(range(count)), where
        assert_at_rest(place)
        publish()
    assert receive_all(source) == list(range(count if many else 1, count))
    assert_at_rest(place)


@pytest.mark.long
@pytest.mark.parametrize("many", [True, False])
def test_ctrl_c_anywhere_while_a_consumer_sleeps_and_is_woken_loses_nothing(
    place: SharedPlace, sink: Producer, source: Source, many: bool
) -> None:
    def take() -> None:
        over = threading.Event()
        publishing = when(lambda: over.is_set() or asleep(place), lambda: sink.publish({"i": 0, "image": picture(0)}))
        try:
            if many:
                source.receive_many(4, PATIENCE_S)
            else:
                source.receive(PATIENCE_S)
        finally:
            over.set()
            publishing.join()

    for where in everywhere(take, SOURCES):
        assert receive_all(source) == [0], where
        assert_at_rest(place)
    assert receive_all(source) == []
    assert_at_rest(place)


@pytest.mark.long
def test_ctrl_c_anywhere_while_a_consumer_waits_in_vain_leaves_nobody_asleep(
    place: SharedPlace, sink: Producer, source: Source
) -> None:
    for where in everywhere(lambda: source.receive(0.001), SOURCES):
        assert receive_all(source) == [], where
        assert_at_rest(place)
        sink.publish({"i": 0})
        assert receive_all(source) == [0], where


@pytest.mark.long
@pytest.mark.parametrize("lends", [False, True])
@pytest.mark.parametrize("somebody_sleeps", [False, True])
def test_ctrl_c_anywhere_while_publishing_publishes_all_of_a_message_or_nothing(
    place: SharedPlace, sink: Producer, source: Source, lends: bool, somebody_sleeps: bool
) -> None:
    numbers = itertools.count()
    control = Control.attach(place)
    received: list[int] = []

    def publish() -> None:
        i = next(numbers)
        image = sink.lend((NBYTES,), np.uint8) if lends else None
        if image is None:
            image = np.empty(NBYTES, np.uint8)
        image[:] = i % 256
        sink.publish({"i": i, "image": image})

    publish()
    received += receive_all(source)
    for where in everywhere(publish, SOURCES):
        last = next(numbers)
        sink.publish({"i": last, "image": picture(last)})
        found = receive_all(source)
        assert found in ([last], [last - 1, last]), where
        received += found
        control.asleep[200] = 0
        assert_at_rest(place)
        assert inspect(place).published == len(received), where
        if somebody_sleeps:  # for each call anew; it has no inbox
            control.asleep[200] = last + 1
    control.asleep[200] = 0
    received += receive_all(source)
    assert inspect(place).published == len(received)
    assert_at_rest(place)


@pytest.mark.parametrize("is_first", [True, False])
def test_ctrl_c_anywhere_while_a_ring_is_opened_hides_no_message(is_first: bool) -> None:
    """A ring that consumers do not know would take all that is published, and nobody would ever see it."""
    streams: list[tuple[Producer, Source]] = []

    def open_stream() -> None:
        stream = LocalStream()
        streams[:] = [(stream.open_sink(), stream.open_source())]
        if not is_first:
            streams[0][0].publish({"i": 0})
            assert receive_all(streams[0][1]) == [0]

    open_stream()
    for where in everywhere(
        lambda: streams[0][0].publish({"i": 1, "image": picture(1)}), [producer.__file__], stride=1
    ):
        sink, source = streams[0]
        sink.publish({"i": 2, "image": picture(2)})
        assert receive_all(source) in ([2], [1, 2]), where
        source.close()
        sink.close()
        open_stream()
    for end in streams[0]:
        end.close()


@pytest.mark.long
def test_ctrl_c_anywhere_while_an_array_is_lent_keeps_no_slot(
    place: SharedPlace, sink: Producer, source: Source
) -> None:
    sink.publish({"i": 0, "image": picture(0)})
    receive_all(source)
    for where in everywhere(lambda: sink.lend((NBYTES,), np.uint8), SOURCES):
        sink.publish({"i": 1, "image": picture(1)})
        assert receive_all(source) == [1], where
        assert_at_rest(place)


@pytest.mark.long
def test_ctrl_c_anywhere_while_a_producer_waits_for_room_lets_the_next_call_go_on(place: SharedPlace) -> None:
    with Producer(place, send_hwm=1, trusted=True) as sink, Source([place]) as source:

        def publish() -> None:
            over = threading.Event()
            taking = when(lambda: over.is_set() or inspect(place).waiting, lambda: received.extend(receive_all(source)))
            try:
                sink.publish({"i": 1})
            finally:
                over.set()
                taking.join()

        received: list[int] = []
        sink.publish({"i": 0})
        for where in everywhere(publish, SOURCES):
            received += receive_all(source)
            sink.publish({"i": 2})
            received += receive_all(source)
            assert received in ([0, 2], [0, 1, 2]), where
            assert_at_rest(place)
            received.clear()
            sink.publish({"i": 0})


@pytest.mark.long
def test_ctrl_c_anywhere_while_a_source_is_opened_leaves_no_member_behind(place: SharedPlace, sink: Producer) -> None:
    sink.publish({"i": 1})
    sources: list[Source] = []
    for where in everywhere(lambda: sources.append(Source([place])), SOURCES):
        while sources:
            sources.pop().close()
        assert inspect(place).consumers == [], where
        assert_at_rest(place, ready=1)
    sources.pop().close()
    with Source([place]) as source:
        assert receive_all(source) == [1]


@pytest.mark.long
def test_ctrl_c_anywhere_while_a_source_is_closed_leaves_no_member_behind_once_it_is_closed_again(
    place: SharedPlace, twin: Twin, sink: Producer
) -> None:
    sink.publish({"i": 1})
    sources: list[Source] = [Source([place])]
    for where in everywhere(lambda: sources[0].close(), SOURCES):
        sources.pop().close()
        assert inspect(place).consumers == [], where
        assert not os.path.exists(twin.inbox_path(0)), where
        assert_at_rest(place, ready=1)
        sources.append(Source([place]))


@pytest.mark.long
def test_ctrl_c_anywhere_in_a_producers_life_lets_the_next_one_go_on(place: SharedPlace) -> None:
    """From its opening to its end, with a new ring in between."""
    sinks: list[Producer] = []
    numbers = itertools.count()

    def live() -> None:
        sinks.append(Producer(place, trusted=True))
        i = next(numbers)
        sinks[0].publish({"i": i, "image": picture(i)})
        sinks[0].close()

    Producer(place, trusted=True).close()
    with Source([place]) as source:
        received: list[int] = []
        for where in everywhere(live, SOURCES):
            for sink in sinks:
                sink.close()
            sinks.clear()
            assert not inspect(place).has_producer, where
            with Producer(place, trusted=True) as successor:
                last = next(numbers)
                successor.publish({"i": last, "image": picture(last)})
            found = receive_all(source)
            assert found in ([last], [last - 1, last]), where
            received += found
            assert inspect(place).published == len(received), where
            assert_at_rest(place)


def test_a_publish_whose_handler_closed_the_sink_leaves_the_next_producer_alone(
    place: SharedPlace, sink: Producer, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink.publish({"i": 0, "image": picture(0)})
    successors: list[Producer] = []
    lent: list[np.ndarray] = []

    def replace_and_raise(_: Parts) -> bytes:
        monkeypatch.undo()
        sink.close(patient=False)
        successors.append(Producer(place, trusted=True))
        lent.append(successors[0].lend((NBYTES,), np.uint8))
        raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "header", replace_and_raise)
    with pytest.raises(KeyboardInterrupt):
        sink.publish({"i": 1, "image": picture(1)})
    lent[0][...] = 2
    successors[0].publish({"i": 2, "image": lent[0]})
    lent.clear()
    assert receive_all(source) == [0, 2]
    successors[0].close()
    assert_at_rest(place)


def test_a_source_that_was_dropped_without_closing_gives_up_its_place_when_the_next_one_opens(twin: Twin) -> None:
    place = SharedPlace(twin)
    sink, dropped = Producer(place, trusted=True), Source([place])
    sink.publish({"image": np.zeros(9000, np.uint8)})
    held = dropped.receive(10)
    members = len(inspect(place).consumers)
    del dropped
    gc.collect()
    successor = Source([place])
    assert len(inspect(place).consumers) == members + 1  # the first one still has a message
    assert inspect(place).count(State.LEASED) == 1
    del held
    assert len(inspect(place).consumers) == members
    assert inspect(place).count(State.LEASED) == 0
    successor.close()
    sink.close()


def test_a_publish_in_the_middle_of_another_one_is_an_error_or_right(sink: Producer, source: Source) -> None:
    """By a signal's handler or a finalizer, before each line of ours."""
    numbers = itertools.count()
    accepted: list[int] = []

    def publish() -> None:
        i = next(numbers)
        lent = sink.lend((NBYTES,), np.uint8)
        image = np.empty(NBYTES, np.uint8) if lent is None else lent
        image[:] = i % 256
        sink.publish({"i": i, "image": image, "other": picture(i)})
        accepted.append(i)

    def nested() -> None:
        with contextlib.suppress(BlendtorchError):
            publish()

    at, received = 0, []
    while runs_with_a_switch(publish, nested, at := at + 1):
        received += receive_all(source)
    assert at > 50
    assert sorted(received + receive_all(source)) == sorted(accepted)


def test_a_stream_whose_control_segment_was_removed_begins_anew_with_rings_of_other_names(place: SharedPlace) -> None:
    with Producer(place, trusted=True) as first, Source([place]) as old:
        for i in range(4):
            first.publish({"i": i, "image": picture(i)})
        message = old.receive(PATIENCE_S)
        assert message is not None
        assert message.fields["i"] == 0
        os.unlink(f"/dev/shm{place.name}")
        first.close()
        with Producer(place, trusted=True) as second:
            second.publish({"i": 4, "image": picture(4)})
            assert {
                name.rpartition(".")[2] for name in os.listdir("/dev/shm") if f"/{name}".startswith(f"{place.name}.")
            } == {
                "0",
                "1",
            }
            found = [old.receive(PATIENCE_S) for _ in range(4)]
            assert [message.fields["i"] for message in found if message is not None] == [1, 2, 3, 4]
