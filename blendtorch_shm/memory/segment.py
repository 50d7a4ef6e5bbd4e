"""Pieces of memory: POSIX shared memory that other processes can map, and private memory with the same face.

A segment is allocated before it is mapped (``posix_fallocate``): a full ``/dev/shm`` is an error message here, and never
a SIGBUS in the middle of a frame. Limits are looked at before (limits.py), for beyond those the kernel kills. Nobody
unmaps: a mapping goes when the last view of it has gone. Closing is not unlinking; :func:`unlink` belongs to the creator and to
whoever sweeps after a dead one.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import platform

import posix_ipc

from ..errors import OutOfSharedMemory, SegmentError, SegmentMissing
from ..process.descriptors import opened
from ..wording import byte_size
from . import limits
from .own_pages import MADV_POPULATE_WRITE, OwnPages

_AT_A_TIME = 2**25
"""Bytes that are allocated before limits are looked at again: other producers may be allocating, too."""
_KEEP_THE_ORDER_OF_STORES = ("x86_64", "amd64", "i386", "i686")


class Segment:
    """`nbytes` of memory: a byte view, and the same bytes as 64-bit words.

    Attributes:
        name: its POSIX name, or "" for private memory.
        inode: which segment this is, whatever has its name now; 0 for private memory.
        view: ``memoryview`` of bytes, writable.
        words: ``memoryview`` of unsigned 64-bit integers over the same memory.
        own: the same memory, for who may change it without others seeing that; None if it was not asked for.
        fd: a descriptor of the memory; -1 where it is mapped with pages of our own.

    Example::

        segment = create("/bt-7d6e622c-DATA-0", PAGE)
        segment.words[0] = 7
    """

    _file: io.FileIO | None = None  # of one whose making was interrupted

    def __init__(
        self,
        name: str,
        mapping: mmap.mmap,
        inode: int = 0,
        *,
        own: OwnPages | None = None,
        file: io.FileIO | None = None,
    ) -> None:
        self.name = name
        self.inode = inode
        self.own = own
        self._file = file
        self.fd = -1 if file is None else file.fileno()
        self.nbytes = len(mapping)
        self.view = memoryview(mapping)
        self.words = self.view[: self.nbytes & ~7].cast("Q")
        self._mapping = mapping

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def __repr__(self) -> str:
        return f"<Segment {self.name or 'private'}, {byte_size(self.nbytes)}>"

    def prefault(self, offset: int, nbytes: int) -> None:
        """Map these pages now, in one system call, instead of one page fault each at first use.

        Args:
            offset: in bytes, a multiple of the page size.
            nbytes: length in bytes.
        """
        with contextlib.suppress(OSError):  # an older kernel: the pages fault in one by one, no harm
            self._mapping.madvise(MADV_POPULATE_WRITE, offset, nbytes)


def create(name: str, nbytes: int) -> Segment:
    """Make the shared segment `name` of `nbytes` zero bytes, mode 0600.

    Raises:
        OutOfSharedMemory: `/dev/shm` has no room for it, or a limit of this process or of its control groups leaves none.
        SegmentError: it exists already, or cannot be made, or this processor may reorder stores.
    """
    _check_processor(name)
    try:
        file = opened(posix_ipc.SharedMemory, name, posix_ipc.O_CREX, 0o600)
    except posix_ipc.ExistentialError as error:
        raise SegmentError(f"The shared-memory segment {name} exists already.") from error
    except (OSError, posix_ipc.Error) as error:
        raise _creation_error(name, nbytes, error) from error
    try:
        _require_room(name, nbytes, limits.short_of_file_size(nbytes))
        # Twice, for the producer's forwarder maps its rings as any consumer does.
        _require_room(name, nbytes, limits.short_of_address_space(2 * nbytes))
        for start in range(0, nbytes, _AT_A_TIME):
            _require_room(name, nbytes, limits.short_of_memory(nbytes - start))
            os.posix_fallocate(file.fileno(), start, min(_AT_A_TIME, nbytes - start))
        return Segment(name, mmap.mmap(file.fileno(), nbytes), os.fstat(file.fileno()).st_ino, file=file)
    except BaseException as error:
        unlink(name)
        if isinstance(error, OSError):
            raise _creation_error(name, nbytes, error) from error
        raise


def attach(name: str, *, own: bool = False) -> Segment:
    """Map the existing shared segment `name`, whole.

    Args:
        name: its POSIX name.
        own: map it once more, for who may change it without others seeing that; and keep no descriptor.

    Raises:
        SegmentMissing: there is none, or it is empty (its creator has not finished, or died).
        OutOfSharedMemory: this process may not map as much.
        SegmentError: it cannot be opened, is another user's, or this processor may reorder stores.
    """
    _check_processor(name)
    try:
        file = opened(posix_ipc.SharedMemory, name)
    except posix_ipc.ExistentialError as error:
        raise SegmentMissing(f"There is no shared-memory segment {name}.") from error
    except (OSError, posix_ipc.Error) as error:
        raise SegmentError(f"Cannot open the shared-memory segment {name}: {error}.") from error
    try:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid():  # its content would be trusted
            raise SegmentError(f"The shared-memory segment {name} belongs to another user (id {status.st_uid}).")
        nbytes = status.st_size
        if nbytes == 0:
            raise SegmentMissing(f"The shared-memory segment {name} is empty.")
        mapping = mmap.mmap(file.fileno(), nbytes)
        if own:
            own_pages = OwnPages(file.fileno(), nbytes)
            file.close()
            return Segment(name, mapping, status.st_ino, own=own_pages)
        return Segment(name, mapping, status.st_ino, file=file)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise _no_memory(name, nbytes) from error
        raise SegmentError(f"Cannot map the shared-memory segment {name}: {error}.") from error


def _check_processor(name: str) -> None:
    machine = platform.machine()
    if machine.lower() not in _KEEP_THE_ORDER_OF_STORES:
        raise SegmentError(
            f"Cannot use the shared-memory segment {name}: this processor ({machine}) may reorder stores, so a consumer could "
            f"see a message before its content. Shared memory needs an x86-64 processor; plain tcp:// addresses work on any."
        )


def unlink(name: str) -> None:
    """Remove the name; who has the segment mapped keeps it. A missing one is fine.

    Raises:
        SegmentError: it is another user's.
    """
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        pass
    except (OSError, posix_ipc.Error) as error:
        raise SegmentError(f"Cannot remove the shared-memory segment {name}: {error}. Is it another user's?") from error


def private(nbytes: int) -> Segment:
    """`nbytes` of zeroed memory that belongs to this process.

    Raises:
        OutOfSharedMemory: a limit of this process or of its control groups leaves no room.
    """
    _require_room("memory of this process", nbytes, limits.short_of_address_space(nbytes))
    _require_room("memory of this process", nbytes, limits.short_of_memory(nbytes))
    file = opened(os.memfd_create, "blendtorch", os.MFD_CLOEXEC)
    file.truncate(nbytes)
    return Segment("", mmap.mmap(file.fileno(), nbytes), file=file)


_FEWER = "or use fewer or smaller slots (send_hwm, resolution)."


def _require_room(name: str, nbytes: int, shortage: str) -> None:
    if shortage:
        raise OutOfSharedMemory(f"There is no room for {name}: it needs {byte_size(nbytes)}, and {shortage}, {_FEWER}")


def _creation_error(name: str, nbytes: int, error: Exception) -> SegmentError:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        space = os.statvfs("/dev/shm")
        free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
        return OutOfSharedMemory(
            f"/dev/shm is full: {name} needs {byte_size(nbytes)}, and {byte_size(free)} of {byte_size(total)} are free. "
            f"Make it larger (docker run --shm-size=2g, or mount -o remount,size=2g /dev/shm), remove what dead programs "
            f"left in it, {_FEWER}"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return _no_memory(name, nbytes)
    return SegmentError(f"Cannot create the shared-memory segment {name} of {byte_size(nbytes)}: {error}.")


def _no_memory(name: str, nbytes: int) -> OutOfSharedMemory:
    """The kernel had none for a segment."""
    why = limits.short_of_address_space(nbytes) or limits.short_of_memory(nbytes)
    why = why or "it may be a limit of this process or of its control group that changed meanwhile, or vm.max_map_count"
    return OutOfSharedMemory(f"The kernel has no memory for {name} of {byte_size(nbytes)}: {why}, {_FEWER}")
