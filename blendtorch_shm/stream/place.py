"""Where a stream lives, on this host or in one process: the names of its memory, lock file, bell and inboxes."""

from __future__ import annotations

import os

from ..errors import SegmentMissing
from ..launch.address import SHARED_MEMORY, Twin
from ..memory import segment
from ..memory.locks import Locks, is_locked_by_inode
from ..memory.segment import Segment
from ..process.descriptors import opened
from .bell import Bell, open_bell, private_bell


class SharedPlace:
    """A stream in this host's shared memory."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin
        self.name = twin.prefix
        self.title = f"{'the way back of ' if twin.is_back else ''}{twin.name} of instance {twin.btid}"
        """For people."""

    def create(self, suffix: str, nbytes: int) -> Segment:
        """A new zeroed segment."""
        return segment.create(self.name + suffix, nbytes)

    def attach(self, suffix: str, *, own: bool = False) -> Segment:
        """An existing segment, with pages of our own if wanted; SegmentMissing if there is none."""
        return segment.attach(self.name + suffix, own=own)

    def unlink(self, suffix: str) -> None:
        """Forget a segment."""
        segment.unlink(self.name + suffix)

    def next_ring(self) -> int:
        """One more than the largest number of a ring that is there, of whatever stream."""
        prefix = f"{self.name[1:]}."
        numbers = [name.removeprefix(prefix) for name in os.listdir(SHARED_MEMORY) if name.startswith(prefix)]
        return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)

    def is_current(self, control: Segment) -> bool:
        """Whether the stream's name still means this control segment, or nothing at all; False: the stream was made anew."""
        try:
            return os.stat(f"{SHARED_MEMORY}{self.name}").st_ino == control.inode
        except OSError:
            return True

    def open_locks(self, *, create: bool = False) -> Locks:
        """A new description of the stream's lock file, for one member."""
        return Locks(self.twin.lock_path, create=create)

    def is_locked_in(self, lock_file: int, number: int) -> bool:
        """Whether somebody holds a byte of the lock file with this inode, although it was removed."""
        return is_locked_by_inode(number, lock_file, SHARED_MEMORY)

    def open_bell(self) -> Bell:
        """The producer's bell."""
        return open_bell(self.twin.bell_path)

    def inbox(self, consumer: int) -> str:
        """The ZeroMQ endpoint of a consumer's inbox."""
        return f"ipc://{self.twin.inbox_path(consumer)}"

    def __repr__(self) -> str:
        return f"<SharedPlace {self.name}>"


class PrivatePlace:
    """A stream in the memory of this process; see :class:`SharedPlace`."""

    def __init__(self, name: str = "private") -> None:
        self.name = self.title = name
        self._segments: dict[str, Segment] = {}
        self._bell: Bell | None = None
        self._lock_file = opened(os.memfd_create, f"locks of {name}"[:200], os.MFD_CLOEXEC)

    def create(self, suffix: str, nbytes: int) -> Segment:
        return self._segments.setdefault(suffix, segment.private(nbytes))

    def attach(self, suffix: str, *, own: bool = False) -> Segment:
        try:
            return self._segments[suffix]
        except KeyError:
            raise SegmentMissing(f"The stream {self.name} has no segment {suffix!r} yet.") from None

    def unlink(self, suffix: str) -> None:
        self._segments.pop(suffix, None)

    def next_ring(self) -> int:
        return 0

    def is_current(self, control: Segment) -> bool:
        return True

    def open_locks(self, *, create: bool = False) -> Locks:
        return Locks(f"/proc/self/fd/{self._lock_file.fileno()}", create=create)

    def is_locked_in(self, lock_file: int, number: int) -> bool:
        return False

    def open_bell(self) -> Bell:
        if self._bell is None:
            self._bell = private_bell()
        return self._bell

    def inbox(self, consumer: int) -> str:
        return f"inproc://{id(self)}.{consumer}.inbox"

    def __del__(self) -> None:
        self._lock_file.close()

    def __repr__(self) -> str:
        return f"<PrivatePlace {self.name}>"


Place = SharedPlace | PrivatePlace
"""Where a stream lives."""
