"""Where a stream lives: names, memory, locks and bells, in shared memory or in one process."""

from __future__ import annotations

from typing import Protocol

from ..errors import SegmentError
from ..launch.address import Twin
from ..memory import segment
from ..memory.locks import Locks, ThreadLocks, open_locks
from ..memory.segment import Segment
from .bell import Bell, open_bell, private_bell


class Place(Protocol):
    """Where a stream lives: names, memory, locks, bells."""

    name: str

    def create(self, suffix: str, nbytes: int) -> Segment:
        """A new zeroed segment."""

    def attach(self, suffix: str) -> Segment:
        """An existing segment; SegmentError if there is none."""

    def unlink(self, suffix: str) -> None:
        """Forget a segment."""

    def open_locks(self) -> Locks:
        """The stream's locks."""

    def open_bell(self, member: int) -> Bell:
        """The bell of a member, whose number is that of the lock that it holds."""


class SharedPlace:
    """A stream in this host's shared memory."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin
        self.name = twin.prefix

    def create(self, suffix: str, nbytes: int) -> Segment:
        return segment.create(self.name + suffix, nbytes)

    def attach(self, suffix: str) -> Segment:
        return segment.attach(self.name + suffix)

    def unlink(self, suffix: str) -> None:
        segment.unlink(self.name + suffix)

    def open_locks(self) -> Locks:
        return open_locks(self.twin.lock_path)

    def open_bell(self, member: int) -> Bell:
        return open_bell(self.twin.bell_path(member))


class PrivatePlace:
    """A stream in the memory of this process."""

    def __init__(self, name: str = "private") -> None:
        self.name = name
        self._segments: dict[str, Segment] = {}
        self._locks = ThreadLocks()
        self._bells: dict[int, Bell] = {}

    def create(self, suffix: str, nbytes: int) -> Segment:
        return self._segments.setdefault(suffix, segment.private(nbytes))

    def attach(self, suffix: str) -> Segment:
        try:
            return self._segments[suffix]
        except KeyError:
            raise SegmentError(f"The stream {self.name} has no segment {suffix!r} yet.") from None

    def unlink(self, suffix: str) -> None:
        self._segments.pop(suffix, None)

    def open_locks(self) -> Locks:
        return self._locks

    def open_bell(self, member: int) -> Bell:
        return self._bells.get(member) or self._bells.setdefault(member, private_bell())
