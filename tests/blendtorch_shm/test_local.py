"""Streams within one process."""

import numpy as np

from blendtorch_shm.transport.local import LocalStream


def test_a_source_that_is_opened_when_another_closes_has_an_inbox_at_once() -> None:
    stream = LocalStream()
    with stream.open_sink() as sink:
        for i in range(50):  # ZeroMQ may be slow to forget a name, or quick
            stream.open_source().close()
            sink.publish({"i": i, "image": np.zeros((30, 40, 3), np.uint8)})
            with stream.open_source() as source:
                message = source.receive(0)
                assert message is not None, source.explain()
                assert message.fields["i"] == i
                del message
