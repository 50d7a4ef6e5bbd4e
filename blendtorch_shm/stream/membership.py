"""A consumer's place at a stream: its number, its lock, its counters."""

from __future__ import annotations

import os
import time

from ..errors import SegmentError
from ..memory.layout import FORWARDER, consumer_word
from ..memory.locks import consumer_lock
from ..memory.states import State
from .control import Control
from .place import Place
from .reclaim import reclaim
from .rings import Rings

_FORWARDERS_PATIENCE_S = 5.0


class Counter:
    """A word in shared memory that only this process writes. Threads may lose a count to each other."""

    __slots__ = ("_at", "_words")

    def __init__(self, words: memoryview, at: int) -> None:
        self._words = words
        self._at = at

    def add(self, n: int) -> None:
        """Count `n` more."""
        words, at = self._words, self._at
        try:
            words[at] += n
        except ValueError:  # whatever stood there, it stays a word
            words[at] = (words[at] + n) % 2**64


class Membership:
    """A consumer's place at a stream, from joining to leaving.

    Args:
        place: where the stream lives.
        control: its control segment.
        rings: its rings.
        forwards: whether this is the producer's forwarder, whose place is kept for it.

    Attributes:
        index: which of the stream's consumers this is.
        owner: what stands in the record of a slot that it has leased.
        locks: its description of the stream's lock file.
        delivered, released, copied, rejected, reclaimed, redelivered, skipped: its counters, see ``layout.CONSUMER_RECORD``.

    Raises:
        SegmentError: the stream has as many readers as it can have; or its lock file was removed, so that nobody can tell who of
            its members lives.
    """

    def __init__(self, place: Place, control: Control, rings: Rings, *, forwards: bool = False) -> None:
        self._control = control
        self._rings = rings
        self.index = -1
        try:
            self.locks = place.open_locks()
        except SegmentError as error:
            raise SegmentError(
                f"{error} But the stream is there: if its launch lives, the file alone was removed, so nobody can tell who of "
                f"its members lives. Restart the instance, or launch anew."
            ) from error
        try:
            if self.locks.inode() != control.lock_file:
                raise SegmentError(
                    f"The lock file {self.locks.path} is not the one that the members of {place.title} have: it was removed "
                    f"while they used it, so nobody can tell who of them lives. Restart the instance, or launch anew."
                )
            taken_back = self._join(forwards)
            self.owner = self.index + 1
            (
                self.delivered,
                self.released,
                self.copied,
                self.rejected,
                self.reclaimed,
                self.redelivered,
                self.skipped,
            ) = (
                Counter(control.words, consumer_word(self.index, name))
                for name in ("delivered", "released", "copied", "rejected", "reclaimed", "redelivered", "skipped")
            )
            self.reclaimed.add(taken_back)
            control.words[consumer_word(self.index, "pid")] = os.getpid()
            self.count_remote(0)
        except BaseException:
            self.leave()
            raise

    def _join(self, forwards: bool) -> int:
        """Take the first free place; how many messages its last holder had left LEASED.

        The forwarder's own is free for a producer that starts, unless somebody just takes back what the last one had left.
        """
        places = [FORWARDER, *range(FORWARDER)] if forwards else range(FORWARDER)
        until = time.monotonic() + (_FORWARDERS_PATIENCE_S if forwards else 0)
        while True:
            for index in places:
                if self.locks.hold(consumer_lock(index)):
                    self.index = index
                    taken_back = self._take_over(index + 1)
                    if taken_back is not None:
                        self._control.asleep[index] = 0
                        return taken_back
                    self.locks.drop(consumer_lock(index))
                    self.index = -1
            if time.monotonic() >= until:
                raise SegmentError(
                    f"It has {FORWARDER} readers already, which is the limit: each iterator of a dataset, and each worker of a "
                    f"DataLoader, is one. Close one, and this one takes its place."
                )
            time.sleep(0.01)

    def _take_over(self, owner: int) -> int | None:
        """Reclaim what a dead member of the same number still held; None if somebody is just doing it."""
        rings = self._rings.now()
        taken_back = sum(reclaim(ring, self.locks, lambda found: found == owner) for ring in rings)
        for ring in rings:
            for slot, state in enumerate(ring.states()):
                if state == State.LEASED and ring.owner[slot] == owner:
                    return None
        return taken_back

    def count_remote(self, consumers: int) -> None:
        """Say how many consumers elsewhere this one sends to."""
        self._control.words[consumer_word(self.index, "remote")] = consumers

    def leave(self) -> None:
        """Give the place up. Everything that it leased must be released before."""
        self.locks.close()

    def has_left(self) -> bool:
        """Whether the place may be another one's by now."""
        return self.locks.fd < 0
