"""Locks that the kernel owns: they order claims, and prove who is alive.

Each stream has one lock file. Byte *n* of it stands for one thing (:func:`slot_lock`, :func:`consumer_lock`,
:data:`PRODUCER_LOCK`). A member of the stream holds its byte for as long as it lives, and the kernel drops the lock when the
process dies, however it dies. That is the whole crash detector: if nobody holds a member's byte, the member is dead.

The locks are those of *open file descriptions* (``F_OFD_SETLK``, man 2 fcntl). Each member opens the lock file itself, so:

* Two members exclude each other even if they are threads of one process.
* Closing any other descriptor of the file drops nothing.
* They belong to the file itself, so containers that share /dev/shm see each other's, whatever their process numbers.
* A forked child shares its parent's description. It closes its copy at once (:mod:`~blendtorch_shm.process.forks`), or its
  parent would look alive for as long as the child lives.
"""

from __future__ import annotations

import fcntl
import io
import os
import struct

from ..closing import Closable
from ..errors import SegmentError
from ..process import forks, interrupts
from ..process.descriptors import opened
from .layout import MAX_CONSUMERS, MAX_SLOTS

PRODUCER_LOCK = 0
_CONSUMER_LOCKS = 1
_SLOT_LOCKS = _CONSUMER_LOCKS + MAX_CONSUMERS
GETLK, SETLK = 36, 37  # F_OFD_GETLK and F_OFD_SETLK, <fcntl.h>: a Python built against an old glibc lacks the names
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, len, pid


def consumer_lock(index: int) -> int:
    """The byte that a consumer holds for as long as it is a member of the stream."""
    return _CONSUMER_LOCKS + index


def slot_lock(ring: int, slot: int) -> int:
    """The byte that is held while the slot is being claimed or reclaimed."""
    return _SLOT_LOCKS + ring * MAX_SLOTS + slot


def lock_request(number: int, count: int = 1) -> bytes:
    """What :func:`fcntl.fcntl` takes to lock `count` bytes from `number` on; 0: all."""
    return _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, count, 0)


def unlock_request(number: int, count: int = 1) -> bytes:
    """What :func:`fcntl.fcntl` takes to unlock `count` bytes from `number` on; 0: all."""
    return _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, number, count, 0)


def is_locked(fd: int, number: int, count: int = 1) -> bool:
    """Whether somebody has locked one of those bytes (`count` 0: of all from `number` on), through another description."""
    answer = fcntl.fcntl(fd, GETLK, lock_request(number, count))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def is_locked_by_inode(number: int, inode: int, directory: str) -> bool:
    """Whether somebody has locked that byte of a lock file that has no name any more.

    Args:
        number: of the byte.
        inode: of the file, which nobody here has open.
        directory: one on the same file system.
    """
    device = os.stat(directory).st_dev
    file = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
    try:
        with open("/proc/locks", encoding="ascii", errors="replace") as locks:
            fields = [line.split() for line in locks]
    except OSError:  # not on this host: it cannot be found out
        return False
    return any(
        each[1] == "OFDLCK"
        and each[5] == file
        and int(each[6]) <= number
        and (each[7] == "EOF" or number <= int(each[7]))
        for each in fields
        if len(each) == 8  # else one that waits
    )


class Locks(Closable):
    """One member's open file description of a stream's lock file.

    Args:
        path: of the lock file.
        create: make it if it is missing.

    Attributes:
        fd: for the hot path, which asks the kernel itself; -1 when closed.

    Raises:
        SegmentError: the file cannot be opened.

    Example::

        with Locks(twin.lock_path) as locks:
            print(locks.is_held(PRODUCER_LOCK))
    """

    fd = -1
    _file: io.FileIO | None = None

    def __init__(self, path: str, *, create: bool = True) -> None:
        self.path = path
        self._held: set[int] = set()  # members' bytes; a description does not see its own locks
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        if not path.startswith("/proc/"):
            flags |= os.O_NOFOLLOW
        try:
            self._file = opened(os.open, path, flags, 0o600)
        except OSError as error:
            raise SegmentError.cannot_open("lock file", path, error) from error
        self.fd = self._file.fileno()
        forks.register(self)

    def inode(self) -> int:
        """Which file this is, whatever has its name now."""
        return os.fstat(self.fd).st_ino

    def hold(self, number: int) -> bool:
        """Lock a member's byte for as long as the member lives; False if somebody has it."""
        if number in self._held:
            return False
        self._held.add(number)
        if self.try_lock(number):
            return True
        self._held.discard(number)
        return False

    def drop(self, number: int) -> None:
        """Unlock a member's byte."""
        self.unlock(number)
        self._held.discard(number)

    def try_lock(self, number: int, count: int = 1) -> bool:
        """Lock `count` bytes from `number` on, all or none, without waiting; False if another description has one of them."""
        try:
            fcntl.fcntl(self.fd, SETLK, lock_request(number, count))
            return True
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if not interrupts.is_systems(error):
                raise
            raise SegmentError(f"Cannot lock {count} bytes at {number} of {self.path}: {error.strerror}.") from error

    def unlock(self, number: int, count: int = 1) -> None:
        """Unlock `count` bytes from `number` on."""
        fcntl.fcntl(self.fd, SETLK, unlock_request(number, count))

    def unlock_slots(self) -> None:
        """Unlock every slot's byte."""
        self.unlock(_SLOT_LOCKS, 0)

    def is_held(self, number: int) -> bool:
        """Whether anybody alive has locked that byte. Of slots' bytes, one's own do not count."""
        if number in self._held:
            return True
        return is_locked(self.fd, number)

    def close(self) -> None:
        """Close the file, which drops every lock of this description."""
        if self.fd >= 0:
            self.fd = -1
            assert self._file is not None
            self._file.close()  # an interrupt before that leaves it to __del__
            self._held.clear()

    def __del__(self) -> None:  # nobody is left who could drop its locks
        self.fd = -1
        if self._file is not None:
            self._file.close()

    def in_child(self) -> None:
        """A forked child closes its copy; the locks stay its parent's."""
        self.close()

    def __repr__(self) -> str:
        return f"<Locks {self.path}, {'closed' if self.fd < 0 else f'fd {self.fd}'}>"
