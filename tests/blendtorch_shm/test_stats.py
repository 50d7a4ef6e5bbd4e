"""What a stream's counters say, read from outside."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np

from blendtorch_shm.launch.address import Address, Twin
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.stats import StreamStats, stats
from blendtorch_shm.transport import open_sink, open_source

from .conftest import free_port

PICTURE = np.zeros((60, 80, 3), np.uint8)


def look(twin: Twin) -> StreamStats:
    (found,) = stats([Address("tcp://127.0.0.1:1", twin)])
    return found


def take(source: Source) -> object:
    message = source.receive(20)
    assert message is not None
    return message.fields["image"]


def test_a_stream_that_does_not_exist_yet_is_absent(twin: Twin) -> None:
    assert look(twin) == StreamStats("DATA", 0)
    assert look(twin).producer == "absent"


def test_a_producer_whose_lock_file_was_removed_is_alive_until_it_dies(twin: Twin) -> None:
    sink = open_sink(Address(f"tcp://127.0.0.1:{free_port()}", twin))
    sink.publish({"image": PICTURE})
    for make_another in (False, True):
        Path(twin.lock_path).unlink()
        if make_another:
            Path(twin.lock_path).touch()
        assert (look(twin).producer, look(twin).published) == ("alive", 1)
        assert [consumer.alive for consumer in look(twin).consumers] == [True], "its forwarder"
        Path(twin.lock_path).touch()
    sink._locks.close()
    assert look(twin).producer == "gone"
    sink.close()


def test_a_producer_whose_shared_memory_was_removed_is_lost(twin: Twin) -> None:
    sink = open_sink(Address(f"tcp://127.0.0.1:{free_port()}", twin))
    sink.publish({"image": PICTURE})
    Path(f"/dev/shm{twin.prefix}").unlink()
    assert look(twin).producer == "lost"
    sink.close()


def test_addresses_without_a_twin_are_left_out() -> None:
    assert stats("tcp://127.0.0.1:11000") == []


def test_counters_follow_a_message_from_publish_to_release(twin: Twin) -> None:
    address = Address(f"tcp://127.0.0.1:{free_port()}", twin)
    sink, source = open_sink(address), open_source([address])
    for _ in range(3):
        sink.publish({"image": PICTURE})
    seen = look(twin)
    assert (seen.producer, seen.starts, seen.published, seen.ready, seen.leased, seen.slots) == (
        "alive",
        1,
        3,
        3,
        0,
        16,
    )
    assert seen.silence_s is not None
    assert seen.nbytes > 16 * PICTURE.nbytes
    held = take(source)
    seen = look(twin)
    assert (seen.ready, seen.leased, seen.delivered, seen.released, seen.waits) == (2, 1, 1, 0, False)
    assert [consumer.leased for consumer in seen.consumers if consumer.pid == os.getpid() and consumer.delivered] == [1]
    del held
    seen = look(twin)
    assert (seen.leased, seen.delivered, seen.released) == (0, 1, 1)
    mine = [consumer for consumer in seen.consumers if consumer.delivered]
    assert [(consumer.pid, consumer.alive, consumer.remote) for consumer in mine] == [(os.getpid(), True, 0)]
    source.close()
    sink.close()
    seen = look(twin)
    assert (seen.producer, seen.published, seen.delivered) == ("finished", 3, 1)
    assert not any(consumer.alive for consumer in seen.consumers)


def test_copies_for_hoarders_are_counted(twin: Twin) -> None:
    address = Address(f"tcp://127.0.0.1:{free_port()}", twin)
    sink, source = open_sink(address), open_source([address])
    held = []
    for _ in range(20):
        sink.publish({"image": PICTURE})
        held.append(take(source))
    assert look(twin).copied == 7
    assert look(twin).leased == 13
    source.close()
    sink.close()


def _hold_one_and_wait(address: Address, ready: object) -> None:
    source = open_source([address])
    held = take(source)
    ready.set()  # type: ignore[attr-defined]
    signal.pause()
    del held


def test_what_a_dead_consumer_held_is_counted_as_taken_back_and_redelivered(twin: Twin) -> None:
    address = Address(f"tcp://127.0.0.1:{free_port()}", twin)
    sink = open_sink(address)
    sink.publish({"image": PICTURE})
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    consumer = context.Process(target=_hold_one_and_wait, args=(address, ready))
    consumer.start()
    assert ready.wait(30)
    consumer.kill()
    consumer.join()
    source = open_source([address])
    take(source)
    seen = look(twin)
    assert (seen.published, seen.delivered, seen.released, seen.reclaimed, seen.redelivered) == (1, 2, 1, 1, 1)
    source.close()
    sink.close()


def test_consumers_over_tcp_are_counted_at_the_producers_own_place(twin: Twin) -> None:
    address = Address(f"tcp://127.0.0.1:{free_port()}", twin)
    sink = open_sink(address)
    sources = [open_source([address_over_tcp]) for address_over_tcp in (Address(address), Address(address))]
    for source in sources:
        while "connected" not in source.explain():
            assert source.receive(0.02) is None
    for _ in range(4):
        sink.publish({"image": PICTURE})
    for source in sources:
        take(source)
    while look(twin).delivered < 4:  # two of them are still on their way to being queued
        time.sleep(0.01)
    (forwarder,) = (consumer for consumer in look(twin).consumers if consumer.remote)
    assert (forwarder.remote, forwarder.delivered, forwarder.pid) == (2, 4, os.getpid())
    for source in sources:
        source.close()
    sink.close()
