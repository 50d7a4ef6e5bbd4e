"""One process: the ring is private memory. For tests, and for producer threads."""

from __future__ import annotations

from ..stream.merge import Source
from ..stream.newest import Newest
from ..stream.place import PrivatePlace
from ..stream.producer import DEFAULT_SEND_HWM, Producer


class LocalStream:
    """A stream within this process.

    Args:
        send_hwm: messages that may wait, unclaimed, before publishing stalls.
        num_slots: slots per ring; default `send_hwm` + 6.

    Example::

        stream = LocalStream()
        with stream.open_sink() as sink, stream.open_source() as source:
            sink.publish({"i": 1})
            print(source.receive(1.0).fields)
    """

    def __init__(self, *, send_hwm: int = DEFAULT_SEND_HWM, num_slots: int | None = None) -> None:
        self.place = PrivatePlace()
        self._send_hwm = send_hwm
        self._num_slots = num_slots

    def open_sink(self) -> Producer:
        """The producer's end."""
        return Producer(self.place, send_hwm=self._send_hwm, num_slots=self._num_slots, trusted=True)

    def open_source(self, *, newest: Newest | None = None) -> Source:
        """A consumer's end; any number of them share the messages."""
        return Source([self.place], newest=newest)

    def __repr__(self) -> str:
        return f"<LocalStream, send_hwm={self._send_hwm}>"
