"""One process: the ring is private memory. For tests, and for producer threads."""

from __future__ import annotations

from ..stream.place import PrivatePlace
from ..stream.sink import RingSink
from ..stream.source import RingSource
from ..stream.writer import Writer


class LocalStream:
    """A stream within this process.

    Args:
        send_hwm: messages that may wait, unclaimed, before publishing stalls.
        num_slots: slots per ring; default `send_hwm` + 6.
    """

    def __init__(self, *, send_hwm: int = 10, num_slots: int | None = None) -> None:
        self._place = PrivatePlace()
        self._send_hwm = send_hwm
        self._num_slots = num_slots

    def open_sink(self) -> RingSink:
        """The producer's end."""
        return RingSink(Writer(self._place, max_ready=self._send_hwm, num_slots=self._num_slots), trusted=True)

    def open_source(self) -> RingSource:
        """A consumer's end; any number of them share the messages."""
        return RingSource([self._place])
