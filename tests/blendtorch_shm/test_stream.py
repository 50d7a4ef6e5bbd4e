"""A stream in shared memory, seen from both sides."""

import posix_ipc

from blendtorch_shm.address import Address, Twin
from blendtorch_shm.transport import open_sink, open_source


def test_a_stream_says_what_it_waits_for(twin: Twin) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    source = open_source([address])
    assert "not attached" in source.explain()
    sink = open_sink(address)
    sink.publish({"i": 1})
    sink.publish({"meta": {1, 2}})
    assert source.receive(10) is not None
    assert "its producer is alive and has published 2 messages; of 16 slots, 1 hold" in source.explain()
    assert "(1 of them contain pickles, which only consumers on this host may take)" in source.explain()
    sink.close()
    assert "its producer has finished" in source.explain()
    source.close()


def test_a_stream_whose_semaphore_was_removed_still_serves_new_consumers(twin: Twin) -> None:
    address = Address("tcp://127.0.0.1:*", twin)
    sink = open_sink(address)
    posix_ipc.unlink_semaphore(twin.prefix)
    source = open_source([address])
    for i in range(30):
        sink.publish({"i": i})
        message = source.receive(10)
        assert message is not None
        assert message.fields == {"i": i}
    source.close()
    sink.close()


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
