"""Where batches lie, and how frames get there: the memory of this host, or that of a CUDA device.

Both begin copies and say later when they are done (:class:`Mark`). Whoever gives them a frame to copy keeps the frame, and
with it the lease on its slot, until the mark that was made after it has passed.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from blendtorch_shm.memory.segment import Segment

from .dataset import to_tensors
from .pinned import Driver, Registrations

Array = npt.NDArray[Any]


class Rows(NamedTuple):
    """The batch of one field, to be filled row by row: an array, or on a device a tensor."""

    shape: tuple[int, ...]
    """(batch size, ...)"""
    dtype: np.dtype[Any]
    """In this machine's byte order."""
    array: Array | None
    tensor: torch.Tensor | None

    def first(self, count: int) -> torch.Tensor:
        """The first `count` rows."""
        if self.array is not None:
            return torch.from_numpy(self.array[:count])
        assert self.tensor is not None
        return self.tensor[:count]


def small_rows(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Rows:
    """Rows in ordinary memory of this host."""
    return Rows(shape, dtype, np.empty(shape, dtype), None)


@functools.lru_cache(maxsize=256)
def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype | None:
    """What torch calls `dtype`, in this machine's byte order; None if it has no such."""
    try:
        return torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    except TypeError:
        return None


class Mark(Protocol):
    """A point in a line of copies. ``torch.cuda.Event`` is one."""

    def query(self) -> bool:
        """Whether all copies begun before it are done."""

    def synchronize(self) -> None:
        """Wait until they are. Raises what went wrong with one of them."""


class Memory(Protocol):
    """Where batches lie. All but :meth:`hand_over` is called by one thread."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Rows:
        """Uninitialised memory that nobody else has, nor any view of it. Torch knows the dtype."""

    def copy(self, rows: Rows, index: int, array: Array) -> None:
        """Begin to copy `array` to its row of what :meth:`empty` returned; shape and dtype are right."""

    def move(self, batch: Any) -> Any:
        """`batch` with all its tensors in this memory; begins to copy those that are not."""

    def mark(self) -> Mark | None:
        """When the copies begun since the previous mark are done; None if they are."""

    def hand_over(self, batch: Any, marks: Sequence[Mark]) -> None:
        """Let the calling thread use `batch`, which is complete when all `marks` have passed."""

    def close(self) -> None:
        """Forget what is kept for the next batches. All marks have passed; batches stay valid."""


# -- the memory of this host ------------------------------------------------------------------------------------


class Block:
    """Memory of one field of a batch.

    Args:
        memory: of `capacity` bytes for the field, at least.
        capacity: tells which fields it is used for.
    """

    def __init__(self, memory: memoryview, capacity: int) -> None:
        self._memory = memory
        self.capacity = capacity
        self.user: weakref.ref[Array] | None = None
        """The array that every tensor, view and array of it in this process is built on; once that is dead, none is left."""
        self.batch = 0
        """The last batch it was used for."""

    def root(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """A new array over its first `nbytes`."""
        # Over the memory, not a view of another array: NumPy builds the views of views on the last array of such a chain.
        return np.frombuffer(self._memory, np.uint8, nbytes)

    def is_used_here(self) -> bool:
        """Whether this process has anything that lies in it."""
        return self.user is not None and self.user() is not None

    def is_free(self) -> bool:
        """Whether nobody has anything that lies in it, nor will."""
        return not self.is_used_here()


class _Copies:
    """The mark of copies by threads."""

    def __init__(self, copies: list[Future[None]]) -> None:
        self._copies = copies

    def query(self) -> bool:
        if not all(copy.done() for copy in self._copies):
            return False
        self.synchronize()
        return True

    def synchronize(self) -> None:
        wait(self._copies)
        for copy in self._copies:
            copy.result()


class HostMemory:
    """Batches in the memory of this process, which is used again as soon as nobody holds the batch that was there.

    Fresh memory would cost a page fault for every 4 KiB of each batch, which is more than the copy itself.

    Args:
        copy_threads: how many frames are copied at a time. With 1, the calling thread copies.
        spares: batches that are kept ready. Of a size, so many free blocks are kept beyond as many as are in use.
    """

    def __init__(self, copy_threads: int, spares: int) -> None:
        # Not torch's own threads: they wait for work by spinning, at the cost of whoever renders on the same cores.
        self._threads = ThreadPoolExecutor(copy_threads, "blendtorch copies") if copy_threads > 1 else None
        self._begun: list[Future[None]] = []
        self._spares = spares
        self._blocks: list[Block] = []
        self._batch = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Rows:
        nbytes = math.prod(shape) * dtype.itemsize
        block = self._block(nbytes)
        root = block.root(nbytes)
        block.user = weakref.ref(root)
        return Rows(shape, dtype, np.ndarray(shape, dtype, root), None)

    def _block(self, capacity: int) -> Block:
        """A free block. Let go is what the user held more of for a while, and what is of a size that batches had once."""
        free = [block for block in self._blocks if block.is_free()]
        same = sorted((block for block in free if block.capacity == capacity), key=lambda block: block.batch)
        in_use = sum(block.capacity == capacity for block in self._blocks) - len(same)
        if same:
            block = same.pop()  # the last one used: most of it may still be in the caches
        else:
            block = self._new_block(capacity)
            self._blocks.append(block)
        block.batch = self._batch
        surplus = same[: max(0, len(same) - in_use - self._spares)]
        lately = {block.capacity for block in self._blocks if block.batch >= self._batch - 2 * (self._spares + 1)}
        for other in surplus + [block for block in free if block.capacity not in lately]:
            self._blocks.remove(other)
            self._let_go(other)
        return block

    def _new_block(self, capacity: int) -> Block:
        return Block(_allocate(capacity), capacity)

    def _let_go(self, block: Block) -> None:
        """What else is to be done with a block that is not kept."""

    def copy(self, rows: Rows, index: int, array: Array) -> None:
        assert rows.array is not None
        if self._threads is None:
            copy_frame(rows.array[index], array)
        else:
            self._begun.append(self._threads.submit(copy_frame, rows.array[index], array))

    def move(self, batch: Any) -> Any:
        self._batch += 1  # called once for each
        return batch

    def mark(self) -> Mark | None:
        if not self._begun:
            return None
        begun, self._begun = self._begun, []
        return _Copies(begun)

    def hand_over(self, batch: Any, marks: Sequence[Mark]) -> None:
        for mark in marks:
            mark.synchronize()

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
        self._blocks.clear()


def _allocate(nbytes: int) -> memoryview:
    """Pages of this process, large ones if it can be. A forked child that holds a batch sees no later one in its place."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def copy_frame(row: Array, array: Array) -> None:
    """The one copy of a frame."""
    np.copyto(row, array)


# -- the memory of a CUDA device --------------------------------------------------------------------------------


class Cuda:
    """The few things that are asked of ``torch.cuda``; a test without a device puts something else in its place.

    Gives the thread that makes it a stream of its own: whatever is done in there, a user's transform too, is in that stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.set_device(device)  # of this thread alone, as is the stream
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._stream)
        self.driver = Driver()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory that the allocator knows to be used by the stream."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def copy(self, row: torch.Tensor, source: torch.Tensor) -> None:
        """Begin a copy."""
        row.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        """When all that was begun in the stream is done. Who waits for it sleeps."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def join(self, mark: Mark, tensors: Sequence[torch.Tensor]) -> None:
        """Make the calling thread's stream wait for `mark`, and tell the allocator that it uses `tensors` as well."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(mark)  # type: ignore[arg-type]
        for tensor in tensors:
            tensor.record_stream(current)


class DeviceMemory:
    """Batches in the memory of a CUDA device. Frames get there by DMA from where they are, in a stream of their own.

    Args:
        device: the device.
        segments: the shared memory that frames may lie in now. It is registered with the driver when the first of them is
            copied, until :meth:`close`, or until it is no longer among these.
        cuda: how the device is talked to.
    """

    def __init__(
        self, device: torch.device, segments: Callable[[], Sequence[Segment]], cuda: Cuda | None = None
    ) -> None:
        self._device = device
        self._cuda = cuda or Cuda(device)
        self._registrations = Registrations(segments, self._cuda.driver)
        self._is_begun = False

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Rows:
        known = torch_dtype(dtype)
        assert known is not None
        return Rows(shape, dtype, None, self._cuda.empty(shape, known))

    def copy(self, rows: Rows, index: int, array: Array) -> None:
        assert rows.tensor is not None
        array = self._registrations.cover(array)
        self._is_begun = True
        self._cuda.copy(rows.tensor[index], to_tensors(array))

    def move(self, batch: Any) -> Any:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            self._is_begun = True  # a transform may have begun something there
            if tensor.device == self._device:
                return tensor
            moved = self._cuda.empty(tuple(tensor.shape), tensor.dtype)
            self._cuda.copy(moved, tensor)
            return moved

        return with_tensors(batch, move)

    def mark(self) -> Mark | None:
        if not self._is_begun:
            return None
        self._is_begun = False
        return self._cuda.mark()

    def hand_over(self, batch: Any, marks: Sequence[Mark]) -> None:
        if marks:
            self._cuda.join(marks[-1], tensors_of(batch))  # of one stream, the last one passes last

    def close(self) -> None:
        self._registrations.close()


def with_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `change` applied to each tensor in it, in dicts, lists and tuples too."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: with_tensors(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [with_tensors(v, change) for v in value]
    if isinstance(value, tuple):
        items = [with_tensors(v, change) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in `value`, in dicts, lists and tuples too."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    with_tensors(value, note)
    return found
