"""Batches in shared memory, whose rows other processes write: what comes of a step of many environments.

The trainer owns the memory (:class:`Batches`), and tells each instance where its row lies. The instance renders into that row
(:class:`RowWriter`), and says when it is done. So the trainer has one array of all observations that nobody copied.

A batch is used again when the last view of its arrays has gone, and nobody writes to it any more. The trainer sees the memory by
way of pages of its own: what it changes in place, no instance sees. An instance writes only into rows that it was told, and only
until it has said that it is done.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import OutOfSharedMemory, SegmentError, SegmentMissing
from . import segment
from .layout import PAGE, align
from .own_pages import Window, address_of
from .ring import Bytes
from .segment import Segment

log = logging.getLogger("blendtorch")

Array = np.ndarray[Any, np.dtype[Any]]
Kind = tuple[tuple[int, ...], np.dtype[Any]]
"""Shape and dtype of an array."""
LENT_FROM = 2049
"""Smaller arrays are not lent: to copy them costs less."""


def _nbytes(kind: Kind) -> int:
    return int(np.prod(kind[0], dtype=np.int64)) * kind[1].itemsize


class Batch:
    """A batch that is being made, or was handed out.

    Attributes:
        arrays: (N, ...) each, one for each kind, in pages of the trainer's own. They keep the batch from being used again. May be
            handed out when all rows are written: a page that the trainer changes does not show what comes later.
        shared: the same, as they were written, whatever was changed in `arrays`. They keep nothing.
        writers: rows that somebody may write to still.
    """

    def __init__(self, shared: Sequence[Array], arrays: Sequence[Array], offsets: Sequence[int]) -> None:
        self.shared = shared
        self.arrays = arrays
        self._offsets = offsets
        self.writers: set[int] = set()

    def at(self, row: int) -> list[int]:
        """Where in the segment the arrays of a row lie."""
        return [offset + row * array[0].nbytes for offset, array in zip(self._offsets, self.arrays, strict=True)]

    def put(self, row: int, values: Sequence[Array]) -> None:
        """Copy a row in, for an instance that does not see this memory."""
        for shared, value in zip(self.shared, values, strict=True):
            shared[row] = value


class Batches:
    """Memory for some batches of the same kinds of arrays.

    Args:
        name: of the segment. One that an earlier trainer left is removed.
        num_rows: of each batch, N.
        kinds: of the arrays of one row.
        num_batches: how many.

    Attributes:
        name: of the segment.
        inode: which segment of that name it is.

    Raises:
        OutOfSharedMemory: there is no room for two of them. Where there is none for all, there are fewer, and the log says so.

    Example::

        batches = Batches("/bt-...", 4, [((480, 640, 3), np.dtype(np.uint8))], 8)
        batch = batches.take()
        place = batches.name, batches.inode, batch.at(0)  # tell the instance
        batch.arrays[0]  # (4, 480, 640, 3), when all have said that they are done
    """

    def __init__(self, name: str, num_rows: int, kinds: Sequence[Kind], num_batches: int) -> None:
        self.name = name
        self._num_rows = num_rows
        self._kinds = list(kinds)
        self._offsets: list[int] = []
        end = 0
        for kind in kinds:
            self._offsets.append(align(end))
            end = self._offsets[-1] + num_rows * _nbytes(kind)
        self._batch_nbytes = max(PAGE, align(end, PAGE))
        segment.unlink(name)
        self._segment = self._create(num_batches)
        self.inode = self._segment.inode
        self._num = self._segment.nbytes // self._batch_nbytes
        self._used: dict[int, weakref.ref[Bytes]] = {}
        self._writers: dict[int, set[int]] = {}

    def _create(self, num: int) -> Segment:
        while True:
            try:
                segment.create(self.name, num * self._batch_nbytes)
                return segment.attach(self.name, own=True)
            except OutOfSharedMemory:
                segment.unlink(self.name)  # there may have been room for it, but not to map it
                if num <= 2:
                    raise
                num = max(2, num // 2)
                log.warning(
                    "Shared memory has no room for as many batches as were asked for: there are %d, and what is kept beyond "
                    "are copies.",
                    num,
                )

    def take(self) -> Batch | None:
        """A batch that nobody uses, to be written; None if all are in use."""
        free = [number for number in range(self._num) if self._is_free(number)]
        if not free:
            return None
        number = free[0]
        start = number * self._batch_nbytes
        own = self._segment.own
        assert own is not None
        own.renew(start, self._batch_nbytes)
        root = np.frombuffer(own.view, np.uint8, self._batch_nbytes, start)
        batch = Batch(
            self._arrays(np.frombuffer(self._segment.view, np.uint8, self._batch_nbytes, start)),
            self._arrays(root),
            [start + offset for offset in self._offsets],
        )
        self._used[number] = weakref.ref(root)
        self._writers[number] = batch.writers
        return batch

    def _arrays(self, root: Bytes) -> list[Array]:
        return [
            np.ndarray((self._num_rows, *shape), dtype, root, offset)
            for (shape, dtype), offset in zip(self._kinds, self._offsets, strict=True)
        ]

    def _is_free(self, number: int) -> bool:
        used = self._used.get(number)
        return used is None or (used() is None and not self._writers[number])

    def free(self) -> int:
        """How many batches nobody has views of, or writes to."""
        return sum(map(self._is_free, range(self._num)))

    def close(self) -> None:
        """Remove the memory's name. What was handed out stays valid."""
        segment.unlink(self.name)

    def __repr__(self) -> str:
        return f"<Batches {self.name}, {self.free()} of {self._num} free>"


class _Lent:
    """An array of a row that a script was lent."""

    def __init__(self, window: Window, array: Array) -> None:
        self.window = window
        self._array = weakref.ref(array)
        self._root = weakref.ref(array.base)

    def is_alive(self) -> bool:
        """Whether the script has it still, or a view of it."""
        return self._root() is not None

    def is_it(self, array: object) -> bool:
        """Whether this is the very array, and its elements lie in their order."""
        mine = self._array()
        return mine is array and mine is not None and mine.base is self._root() and mine.flags.c_contiguous


class RowWriter:
    """An instance's end: the row that the next answer goes into.

    Example::

        writer.begin(batches.name, batches.inode, batch.at(row), kinds)
        image = writer.lend((480, 640, 3), np.dtype(np.uint8))
        ...
        writer.write([image])
    """

    def __init__(self) -> None:
        self._attached: Segment | None = None
        self._segment: Segment | None = None
        """That which is to be written to, if any is."""
        self._row: list[tuple[int, Kind]] = []
        self._lent: dict[int, _Lent] = {}  # by offset in the segment: also those of earlier rows

    def begin(self, name: str, inode: int, offsets: Sequence[int], kinds: Sequence[Kind]) -> None:
        """What is written next goes here.

        Raises:
            SegmentError: there is no such memory; the trainer that named it has gone.
        """
        attached = self._attached
        if attached is None or (attached.name, attached.inode) != (name, inode):
            self.abandon()
            self._attached = attached = segment.attach(name)
            if attached.inode != inode:  # a later trainer's
                raise SegmentMissing(f"The shared-memory segment {name} is another one by now.")
        row = list(zip(offsets, kinds, strict=True))
        nbytes = attached.nbytes
        if any(not 0 <= offset <= nbytes - _nbytes(kind) for offset, kind in row):
            raise SegmentError(f"A row at {list(offsets)} does not lie within the {nbytes} bytes of {name}.")
        self._segment, self._row = attached, row
        for offset, _ in self._row:  # what a script kept of an earlier answer stays as it was
            earlier = self._lent.pop(offset, None)
            if earlier is not None and earlier.is_alive():
                earlier.window.keep()

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array | None:
        """An uninitialised array in the row, of this shape and dtype, that was not lent yet; None if there is none."""
        if self._segment is None:
            return None
        for offset, kind in self._row:
            nbytes = _nbytes(kind)
            if kind == (shape, np.dtype(dtype)) and nbytes >= LENT_FROM and offset not in self._lent:
                first = offset // PAGE * PAGE
                home = address_of(self._segment.view) + first
                try:
                    window = Window(self._segment, first, offset + nbytes - first, home)
                except OSError:
                    return None
                array: Array = np.ndarray(shape, dtype, window.array(offset - first, nbytes, None))
                self._lent[offset] = _Lent(window, array)
                return array
        return None

    def write(self, values: Sequence[Array]) -> int:
        """Have these arrays in the row; those that were lent are there already. What was lent is the script's own afterwards.

        Returns:
            how many bytes were copied.
        """
        assert self._segment is not None
        copied = 0
        others = []
        for (offset, kind), value in zip(self._row, values, strict=True):
            lent = self._lent.get(offset)
            if lent is None or not lent.is_it(value):
                if lent is not None and lent.is_alive():  # it is something else that the script may need
                    lent.window.keep()
                others.append((offset, kind, value))
        for offset, (shape, dtype), value in others:
            copied += value.nbytes
            np.ndarray(shape, dtype, self._segment.view, offset)[...] = value
        for offset, _ in self._row:
            if offset in self._lent:
                self._lent[offset].window.seal()
                if not self._lent[offset].is_alive():
                    del self._lent[offset]
        self._row, self._segment = [], None
        return copied

    def abandon(self) -> None:
        """The row is not written: what was lent is the script's own."""
        for lent in self._lent.values():
            if lent.is_alive():
                lent.window.keep()
        self._lent, self._row, self._segment = {}, [], None
