"""A consumer that wants the newest message alone, for agents and live views.

It claims the newest READY message, and releases those that are older unread. What it was given stays its floor: what another
consumer died with, or put back, is READY again, and older than what this reader has seen. Such messages are skipped, too.
"""

from __future__ import annotations

from ..memory.ring import Ring
from ..message.wire import Message
from .consumer import Consumer
from .lease import Calls
from .place import Place

Newest = dict[int, int]
"""What one reader was given last: sequence numbers, by key of the stream. It outlives sources that follow each other."""


class NewestConsumer(Consumer):
    """Skips all messages but the newest.

    Args:
        place, calls, own: as for :class:`~.consumer.Consumer`.
        newest: what its reader was given last.

    Example::

        with NewestConsumer(place, Calls(), {}) as consumer:
            message = consumer.take()
    """

    def __init__(self, place: Place, calls: Calls, newest: Newest, *, own: bool = False) -> None:
        self._newest = newest
        self._before = -1  # what `_newest` said before the last message
        super().__init__(place, calls, own=own)

    def take(self) -> Message | None:
        """The newest READY message of the stream, or None if there is none that is newer than the last one, or if it cannot be
        opened: then it was noted. Older ones are skipped.
        """
        found = self._claim_oldest(newest=True)
        if found is None:
            return None
        ring, slot = found
        sequence, floor = ring.sequence[slot], self._newest.get(self.key, -1)
        if sequence <= floor:
            self._drop(ring, slot)
            self.skip(floor)
            return None
        self._before = floor
        self._newest[self.key] = sequence  # before an interrupt can come that puts the message back: then it is undone
        self.skip(sequence)
        self._wake_producer_if_few(ring)
        message = self._open(ring, slot)
        if message is not None:
            self._last_sequence = sequence  # a gap was made by us: it says nothing of other consumers
        return message

    def take_many(self, count: int) -> list[Message]:
        """The newest message, if there is one."""
        message = self.take() if count else None
        return [] if message is None else [message]

    def _put_back(self, ring: Ring, slot: int) -> None:
        if ring.sequence[slot] == self._newest.get(self.key):
            self._newest[self.key] = self._before  # first: whoever takes it next may be this consumer
        super()._put_back(ring, slot)
