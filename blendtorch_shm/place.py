"""Where a stream lives: names, memory, locks and the semaphore, in shared memory or in one process."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import Any, Protocol

import posix_ipc

from . import segment
from .address import Twin
from .errors import SegmentError
from .locks import Locks, ThreadLocks, open_locks
from .segment import Segment


class Room(Protocol):
    """The semaphore on which a producer waits for room."""

    def release(self) -> None:
        """Wake the producer. Surplus posts do no harm."""

    def acquire(self, timeout: float) -> None:
        """Sleep until a post or for `timeout` seconds, whichever comes first."""


class Place(Protocol):
    """Where a stream lives: names, memory, locks."""

    name: str

    def create(self, suffix: str, nbytes: int) -> Segment:
        """A new zeroed segment."""

    def attach(self, suffix: str) -> Segment:
        """An existing segment; SegmentError if there is none."""

    def unlink(self, suffix: str) -> None:
        """Forget a segment."""

    def open_locks(self) -> Locks:
        """The stream's locks."""

    def open_room(self, create: bool) -> Room:
        """The stream's semaphore."""


class _SemaphoreRoom:
    """A POSIX semaphore. A wake-up and nothing more: where somebody has removed it, the producer looks a little later."""

    def __init__(self, name: str, create: bool) -> None:
        self._semaphore: Any = None
        try:
            self._semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREAT if create else 0, mode=0o600)
        except (OSError, posix_ipc.Error) as error:
            if create:
                raise SegmentError(f"Cannot make the semaphore {name}: {error}.") from error

    def release(self) -> None:
        if self._semaphore is not None:
            with contextlib.suppress(OSError, posix_ipc.Error):  # at its maximum value: nobody needs one more
                self._semaphore.release()

    def acquire(self, timeout: float) -> None:
        # A signal that interrupts posix_ipc loses what its handler raises, such as a SystemExit. So signals wait, too.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with contextlib.suppress(posix_ipc.BusyError):
                self._semaphore.acquire(timeout)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _ThreadRoom:
    def __init__(self) -> None:
        self._semaphore = threading.Semaphore(0)

    def release(self) -> None:
        self._semaphore.release()

    def acquire(self, timeout: float) -> None:
        self._semaphore.acquire(timeout=timeout)


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

    def open_room(self, create: bool) -> Room:
        return _SemaphoreRoom(self.name, create)


class PrivatePlace:
    """A stream in the memory of this process."""

    def __init__(self, name: str = "private") -> None:
        self.name = name
        self._segments: dict[str, Segment] = {}
        self._locks = ThreadLocks()
        self._room = _ThreadRoom()

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

    def open_room(self, create: bool) -> Room:
        return self._room
