"""Locks that the kernel owns: they order claims, and prove who is alive.

Each stream has one lock file. Byte *n* of it stands for one thing (:func:`slot_lock`, :func:`consumer_lock`,
:data:`PRODUCER_LOCK`); a process holds it through a POSIX record lock, which the kernel drops when the process dies, however
it dies. That is the whole crash detector: whoever is told that nobody holds a member's lock knows that the member is dead.

Three properties of POSIX record locks shape this file:

* They vanish when the process closes *any* descriptor of the file. So a file is opened once per process, here, and
  nowhere else, and as a bare descriptor: ``mmap`` would keep a duplicate that the garbage collector closes some day.
* They do not exclude threads of one process. A table of what this process holds does that.
* A forked child does not inherit them. The table is emptied in the child; the descriptor goes on serving.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from typing import Protocol

from ..errors import SegmentError
from .layout import MAX_CONSUMERS, MAX_SLOTS

PRODUCER_LOCK = 0
_CONSUMER_LOCKS = 1
_SLOT_LOCKS = _CONSUMER_LOCKS + MAX_CONSUMERS
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, len, pid


def consumer_lock(index: int) -> int:
    """The byte that a consumer process holds for as long as it is a member of the stream."""
    return _CONSUMER_LOCKS + index


def slot_lock(ring: int, slot: int) -> int:
    """The byte that is held while the slot is being claimed or reclaimed."""
    return _SLOT_LOCKS + ring * MAX_SLOTS + slot


class Locks(Protocol):
    """A set of numbered locks."""

    def try_lock(self, number: int, count: int = 1) -> bool:
        """Take the lock if nobody has it, without waiting; or `count` locks from `number` on, all or none."""

    def unlock(self, number: int, count: int = 1) -> None:
        """Give back what this process took."""

    def is_held(self, number: int) -> bool:
        """Whether any living process, this one included, has the lock."""

    def close(self) -> None:
        """One user less, who has given back what it took."""


class ThreadLocks:
    """Locks between the threads of one process, for streams that never leave it."""

    def __init__(self) -> None:
        self._guard = threading.RLock()  # a lease may end, and unlock, in the middle of any bytecode of its own thread
        self._held: set[int] = set()

    def try_lock(self, number: int, count: int = 1) -> bool:
        numbers = range(number, number + count)
        is_ours = False
        try:
            with self._guard:
                if not self._held.isdisjoint(numbers):
                    return False
                is_ours = True  # among the threads of this process, and from here on
                self._held.update(numbers)
                is_ours = self._take(number, count)
                if not is_ours:
                    self._held.difference_update(numbers)
                return is_ours
        except BaseException:  # Ctrl-C
            if is_ours:
                self.unlock(number, count)
            raise

    def _take(self, number: int, count: int) -> bool:
        """What the threads of this process have agreed on, against other processes."""
        return True

    def unlock(self, number: int, count: int = 1) -> None:
        with self._guard:
            self._held.difference_update(range(number, number + count))

    def is_held(self, number: int) -> bool:
        return number in self._held

    def close(self) -> None:
        pass


class FileLocks(ThreadLocks):
    """Locks between processes: one byte each of a lock file. Get one with :func:`open_locks`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.users = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SegmentError.cannot_open("lock file", path, error) from error

    def _take(self, number: int, count: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, count, number)
            return True
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise SegmentError(f"Cannot lock {count} bytes at {number} of {self.path}: {error.strerror}.") from error

    def unlock(self, number: int, count: int = 1) -> None:
        with self._guard:
            super().unlock(number, count)
            fcntl.lockf(self._fd, fcntl.LOCK_UN, count, number)

    def is_held(self, number: int) -> bool:
        if super().is_held(number):
            return True
        answer = fcntl.fcntl(self._fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """One user less; the last one closes the file, which drops every lock this process has on it."""
        with _registry_guard:
            self.users -= 1
            if self.users == 0:
                _registry.pop(self.path, None)
                os.close(self._fd)
                self._held.clear()

    def forget_parent(self) -> None:
        """In a forked child: the parent's locks are not ours."""
        self._guard = threading.RLock()
        self._held.clear()


_registry: dict[str, FileLocks] = {}
_registry_guard = threading.RLock()


def open_locks(path: str) -> FileLocks:
    """This process's one handle of the lock file at `path`, created if missing.

    Raises:
        SegmentError: the file cannot be opened.
    """
    with _registry_guard:
        locks = _registry.get(path)
        if locks is None:
            locks = _registry[path] = FileLocks(path)
        locks.users += 1
        return locks


def _after_fork_in_child() -> None:
    global _registry_guard
    _registry_guard = threading.RLock()
    for locks in _registry.values():
        locks.forget_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
