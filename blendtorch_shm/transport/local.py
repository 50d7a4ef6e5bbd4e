"""One process: the ring is private memory, and announcements pass through a queue. For tests, and for producer threads."""

from __future__ import annotations

import queue

from ..place import PrivatePlace
from ..sink import RingSink
from ..source import RingSource
from ..writer import Writer


class _Bell:
    """Both ends of the announcements."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[None] = queue.SimpleQueue()

    def announce(self) -> None:
        self._queue.put(None)

    def hear(self, timeout_s: float) -> bool:
        try:
            self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return False
        return True

    def close(self, *, patient: bool = True) -> None:
        pass


class LocalStream:
    """A stream within this process.

    Args:
        send_hwm: messages that may wait, unclaimed, before publishing stalls.
        num_slots: slots per ring; default `send_hwm` + 6.
    """

    def __init__(self, *, send_hwm: int = 10, num_slots: int | None = None) -> None:
        self._place = PrivatePlace()
        self._bell = _Bell()
        self._send_hwm = send_hwm
        self._num_slots = num_slots

    def open_sink(self) -> RingSink:
        """The producer's end."""
        writer = Writer(self._place, max_ready=self._send_hwm, num_slots=self._num_slots)
        return RingSink(writer, [self._bell], trusted=True)

    def open_source(self) -> RingSource:
        """A consumer's end; any number of them share the messages."""
        return RingSource([self._place], self._bell)
