"""Memory that shows what is shared, and keeps what is written to it: pages are copied on the first write (MAP_PRIVATE).

Two sides of a stream lend out memory that must not change behind others' backs:

* A reader's arrays lie in slots, and may be changed in place (:class:`OwnPages`). If the reader is killed, another one gets the
  message, as it was published.
* A script's arrays lie in a slot until they are published (:class:`Window`). What is written through views that were kept is
  the script's own from then on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import mmap
import os
import resource
import weakref
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import OutOfSharedMemory
from ..process import forks
from ..process.descriptors import opened
from ..wording import byte_size
from .layout import PAGE

if TYPE_CHECKING:
    from .segment import Segment

_MADV_DONTNEED_LOCKED = 24  # Linux 5.18
_MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14, <linux/mman.h>
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4  # the last one, of shared memory: Linux 5.13
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value
_THERE, _OF_A_FILE = 0xC0, 0x20
"""In the highest byte of a page's entry: present or swapped; not a copy (man 5 proc, pagemap)."""
_ENTRY_NBYTES = 8
_AS_SHARED = bytes(flags for flags in range(256) if not flags & _THERE or flags & _OF_A_FILE)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]


def address_of(memory: memoryview | mmap.mmap) -> int:
    """Where `memory` begins."""
    return int(np.frombuffer(memory, np.uint8).__array_interface__["data"][0])


def page_faults() -> int:
    """How many page faults all threads of this process have had. The first write to a page of a private mapping is one. To ask
    takes 1 us.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


def _copy(mapping: mmap.mmap, offset: int, nbytes: int) -> None:
    """Make copies of the pages of a private mapping: what it shows now, it shows whatever becomes of what is shared."""
    try:
        mapping.madvise(MADV_POPULATE_WRITE, offset, nbytes)
    except OSError:  # an older kernel
        np.frombuffer(mapping, np.uint8)[offset : offset + nbytes : PAGE] |= 0  # a write to each page


class OwnPages:
    """All of a segment, as one reader sees it: what it changes is its own.

    Args:
        fd: of the segment.
        nbytes: its size.

    Attributes:
        view: ``memoryview`` of bytes, writable. What the segment has at the same place can be seen here, but for pages that were
            written to since the last :meth:`renew`.

    Example::

        own = OwnPages(fd, nbytes)
        own.view[0] = 7
        own.renew(0, 1)  # shows what is shared again
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE)
        self.view = memoryview(self._mapping)
        self._address = address_of(self._mapping)

    def prefault(self, offset: int, nbytes: int) -> None:
        """Map these pages now, in one system call; `offset` is a multiple of the page size."""
        with contextlib.suppress(OSError):  # an older kernel
            self._mapping.madvise(_MADV_POPULATE_READ, offset, nbytes)

    def renew(self, offset: int, nbytes: int) -> bool:
        """Forget what was written to these pages; `offset` is a multiple of the page size. Nobody uses them.

        It takes 1 us for 12 KiB, 4 for 900 KiB, 40 for 24 MiB, if nothing was written.

        Returns:
            whether :func:`page_faults` grows when one of them is written to. As long as it does not, there is nothing to forget.
        """
        pages = -(-nbytes // PAGE)
        if _page_table.has_copies(self._address + offset, pages):
            try:
                self._mapping.madvise(mmap.MADV_DONTNEED, offset, pages * PAGE)
            except OSError:  # locked in memory, as by mlockall
                self._mapping.madvise(_MADV_DONTNEED_LOCKED, offset, pages * PAGE)
            self.prefault(offset, pages * PAGE)
        return _page_table.counts_faults

    def keep(self, offset: int, nbytes: int) -> None:
        """Copy these pages, until :meth:`renew`; `offset` is a multiple of the page size."""
        _copy(self._mapping, offset, nbytes)

    def is_as_shared(self, offset: int, nbytes: int) -> bool:
        """Whether nothing was written to the pages of these bytes since they were renewed."""
        before = offset % PAGE
        return not _page_table.has_copies(self._address + offset - before, -(-(before + nbytes) // PAGE))

    def offset_of(self, address: int) -> int | None:
        """Where in the segment an address in here lies; None if it is no such address."""
        offset = address - self._address
        return offset if 0 <= offset < len(self._mapping) else None


class _PageTable:
    """What the kernel says of this process's pages, where it says it (not in every sandbox)."""

    def __init__(self) -> None:
        self._file: io.FileIO | None = None
        self._fd = -1
        self._is_true = True  # as far as we know
        self.counts_faults = False
        """Whether the kernel counts the page fault of a first write."""
        forks.register(self)

    def has_copies(self, address: int, pages: int) -> bool:
        """Whether any of these pages of a private mapping is a copy by now; True, too, where that cannot be known."""
        nbytes = pages * _ENTRY_NBYTES
        try:
            entries = os.pread(self._fd, nbytes, address // PAGE * _ENTRY_NBYTES)
        except OSError:
            return not self._open() or self.has_copies(address, pages)
        return len(entries) != nbytes or entries[7::8].strip(_AS_SHARED) != b""

    def _open(self) -> bool:
        """Open it, if it was not yet, and is to be believed: of two pages, it tells the one that was written to."""
        if self._file is not None or not self._is_true:
            return False
        try:
            self._file = open("/proc/self/pagemap", "rb", buffering=0)  # noqa: SIM115  # for as long as we live
            self._fd = self._file.fileno()
            with opened(os.memfd_create, "blendtorch", os.MFD_CLOEXEC) as file:
                file.truncate(2 * PAGE)
                tried = mmap.mmap(file.fileno(), 2 * PAGE, flags=mmap.MAP_PRIVATE)
        except OSError:
            return False
        read = tried[0], tried[PAGE]
        faults = page_faults()
        tried[0] = read[1]
        self.counts_faults = page_faults() > faults
        first = address_of(tried)
        self._is_true = self.has_copies(first, 1) and not self.has_copies(first + PAGE, 1)
        if not self._is_true:
            self._close()
        return self._is_true

    def in_child(self) -> None:
        """In a forked child: the open file shows the pages of its parent."""
        self._close()

    def _close(self) -> None:
        self._fd = -1
        if self._file is not None:
            self._file.close()
            self._file = None


_page_table = _PageTable()


class Window:
    """A piece of shared memory at an address of its own, for arrays that a script is lent.

    It takes the page-table entries of the memory at its other address along, and gives them back with :meth:`seal`: to fault the
    pages in anew would cost a third of a copy.

    Args:
        segment: that it is a piece of; one with a descriptor.
        start: where in it, in bytes; a multiple of the page size.
        nbytes: how much of it.
        home: the piece's other address in this process.

    Attributes:
        view: ``memoryview`` of bytes, writable.

    Raises:
        OSError: the process may not map so much, or has no file descriptor left.

    Example::

        window = Window(segment, 0, PAGE, address_of(segment.view))
        window.view[0] = 7  # segment.view[0] is 7
        window.seal()
        window.view[0] = 8  # segment.view[0] is 7
    """

    def __init__(self, segment: Segment, start: int, nbytes: int, home: int) -> None:
        if segment.fd < 0:  # or this would be other memory
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._mapping = mmap.mmap(segment.fd, nbytes, offset=start)
        self.view = memoryview(self._mapping)
        self._address = address_of(self._mapping)
        self._segment, self._start, self._home = segment, start, home
        self._parts: list[weakref.ref[Window]] = []
        self._is_sealed = False
        if not self._move(home, self._address):
            with contextlib.suppress(OSError):
                self._mapping.madvise(MADV_POPULATE_WRITE)
        forks.register(self)

    def part(self, offset: int, nbytes: int) -> tuple[Window, int]:
        """A window of its own on these bytes of this one, and their offset in it."""
        first = offset // PAGE * PAGE
        window = Window(self._segment, self._start + first, offset + nbytes - first, self._address + first)
        self._parts = [*(part for part in self._parts if part() is not None), weakref.ref(window)]
        return window, offset - first

    def array(self, offset: int, nbytes: int, holding: object) -> npt.NDArray[np.uint8]:
        """These bytes as an array (n,) uint8. It, and all views of it, keep `holding` and this window alive."""
        memory = (ctypes.c_ubyte * nbytes).from_buffer(self.view, offset)
        memory.holding = self, holding  # type: ignore[attr-defined]
        return np.frombuffer(memory, np.uint8)

    def seal(self) -> None:
        """From now on, what is written here is seen here alone.

        What is shared can be seen here until it is written to. So nobody writes to it elsewhere while arrays in here are alive.
        Parts of it are sealed as well. To seal it twice does no harm.
        """
        for part in self._living_parts():  # before: their entries move to this one
            part.seal()
        if not self._is_sealed:
            if self._home:  # once: later, it would be a private mapping that moves
                home, self._home = self._home, 0
                self._move(self._address, home)
            self._set_apart()

    def keep(self) -> None:
        """Seal it, and the parts of it that are in use, and copy all that it shows: from now on, the slot may change."""
        self.seal()
        for part in self._living_parts():
            part.keep()
        _copy(self._mapping, 0, len(self._mapping))

    def in_child(self) -> None:
        """In a forked child: what it writes to its copies of arrays does not reach its parent."""
        if not self._is_sealed:  # else it is its own already, with what the parent wrote there
            self._set_apart()

    def _living_parts(self) -> list[Window]:
        return [part for ref in self._parts if (part := ref()) is not None]

    def _set_apart(self) -> None:
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE | _MAP_FIXED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        nbytes = len(self._mapping)
        if _libc.mmap(self._address, nbytes, protection, flags, self._segment.fd, self._start) == _FAILED:
            raise OutOfSharedMemory(
                f"The system maps no more memory for this process ({os.strerror(ctypes.get_errno())}): what a script was lent, "
                f"{byte_size(nbytes)}, cannot be kept apart from what it publishes. Raise vm.max_map_count (sysctl), or publish "
                f"arrays of your own."
            )
        self._is_sealed = True

    def _move(self, source: int, target: int) -> bool:
        """Move the page-table entries of this piece from one address to the other. Both stay mapped. False on an older kernel."""
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
        nbytes = len(self._mapping)
        return bool(_libc.mremap(source, nbytes, nbytes, flags, target) == target)
