"""A collation for DataLoader workers, into memory that is used again.

The default collation lays each batch into fresh shared memory: the kernel clears it, the worker and the training process map
it, a socket carries a file descriptor for each field, and all is undone when the batch is dropped. Here a worker keeps its
*blocks*. It copies each array to its row in one; the training process maps a block when it sees it for the first time, and
says in the block itself when it is done. What crosses the queue is the number of a block, and small tensors as they are.

Blocks are anonymous (``memfd_create``): nothing is left of them when processes die, whichever, and however.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import weakref
from multiprocessing import reduction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.multiprocessing import reductions
from torch.utils import data

from blendtorch_shm import interrupts, leaving
from blendtorch_shm.errors import ConfigurationError, StreamClosed
from blendtorch_shm.layout import PAGE
from blendtorch_shm.segment import Segment

from .batch_memory import HostMemory, Rows, with_tensors
from .batches import Batch

Bytes = npt.NDArray[np.uint8]

_INLINE_NBYTES = 2**16
"""Tensors up to this many bytes travel through the queue: a pipe holds so much."""
_SPARES = 2
"""How many free blocks of a size keep their memory, beyond as many as are in use."""
_FREE, _SENT, _HELD = range(3)


def pooled_collate(items: list[Any]) -> Any:
    """Make a batch as the default collation does, in memory that is used again once nobody holds the batch.

    For ``DataLoader(dataset, batch_size, num_workers=..., collate_fn=pooled_collate)``, with any kind of workers. An array is
    copied once, in the worker; the training process copies nothing. A `collate_fn` of yours may call this and change the
    batch: tensors that it makes travel as torch sends them.

    Args:
        items: of the dataset, `batch_size` of them; whatever the default collation takes.

    Returns:
        the batch, on the CPU. It stays as it is for as long as somebody in the training process holds it, or any view of it.

    Raises:
        ConfigurationError: the DataLoader has ``batch_size=None``, so there is but one item.
        RuntimeError, TypeError, KeyError: items that make no batch. The message names the field.
    """
    if type(items) is not list:
        raise ConfigurationError(
            f"pooled_collate makes a batch of a list of items, and got a {type(items).__name__}. "
            f"With batch_size=None there is nothing to collate: leave collate_fn out."
        )
    if data.get_worker_info() is None:
        return data.default_collate(items)
    global _pool
    if _pool is None:
        _pool = _Pool()
    batch = Batch(_pool, len(items))
    batch.add(items)
    return with_tensors(batch.collate(), _to_be_sent)


class _Block:
    """Memory of one field of a batch, shared by a worker and the training process. Behind it is a page for two bytes.

    Args:
        fd: of the memory.
        capacity: bytes for the field.
    """

    def __init__(self, fd: int, capacity: int) -> None:
        self.capacity = capacity
        self._mapping = mmap.mmap(fd, capacity + PAGE)
        self._memory = Segment("", self._mapping)
        self.user: weakref.ref[Bytes] | None = None
        """The array that every tensor, view and array of it in this process is built on."""

    @property
    def state(self) -> int:
        """The worker, who has it while it is FREE, makes it SENT; the training process HELD, and in the end FREE."""
        return self._memory.view[self.capacity]

    @state.setter
    def state(self, state: int) -> None:
        self._memory.view[self.capacity] = state

    @property
    def is_left(self) -> bool:
        """Whether the worker ended in good order. It does when all that it has sent was read, or when nobody will."""
        return bool(self._memory.view[self.capacity + 1])

    def leave(self) -> None:
        """The worker ends."""
        self._memory.view[self.capacity + 1] = 1

    def is_used_here(self) -> bool:
        """Whether this process has anything that lies in it."""
        return self.user is not None and self.user() is not None

    def root(self, nbytes: int) -> Bytes:
        """A new array over its first `nbytes`."""
        return np.frombuffer(self._memory.view, np.uint8, nbytes)

    def prefault(self, nbytes: int) -> None:
        """Map the pages of its first `nbytes` at once."""
        self._memory.prefault(0, nbytes)

    def empty(self) -> None:
        """Give its pages back to the kernel, whoever has them mapped."""
        with contextlib.suppress(OSError):
            self._mapping.madvise(mmap.MADV_REMOVE, 0, self.capacity)


# -- in the worker ----------------------------------------------------------------------------------------------


class _OwnBlock(_Block):
    """A block in the worker that made it.

    Args:
        number: tells it from the worker's others.
        capacity: bytes for the field. Pages that are never written take no memory.
    """

    def __init__(self, number: int, capacity: int) -> None:
        self._fd = os.memfd_create("blendtorch-batch", os.MFD_CLOEXEC)
        os.truncate(self._fd, capacity + PAGE)
        super().__init__(self._fd, capacity)
        self._number = number
        self._is_known = False
        self.is_empty = True

    def is_free(self) -> bool:
        """Whether nobody has anything that lies in it, nor will."""
        return not self.is_used_here() and self.state == _FREE

    def send(self, array: npt.NDArray[Any]) -> tuple[Any, ...]:
        """What pickle is to know of `array`, which begins where the block does."""
        self.state = _SENT
        fd = None
        if not self._is_known:
            self._is_known = True
            fd = reduction.DupFd(self._fd)
            os.close(self._fd)
        return _receive, (os.getpid(), self._number, fd, self.capacity, array.shape, array.dtype.str)


class _Pool(HostMemory):
    """The blocks of this process."""

    def __init__(self) -> None:
        super().__init__(copy_threads=1, spares=_SPARES)
        self._own: list[_OwnBlock] = []
        self._at: dict[int, _OwnBlock] = {}
        """By address."""
        leaving.join(self)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Rows:
        nbytes = math.prod(shape) * dtype.itemsize
        block = self._free_block(max(PAGE, 1 << (nbytes - 1).bit_length()))  # few sizes, for fields whose shape varies
        if block.is_empty:
            block.is_empty = False
            block.prefault(nbytes)
        root = block.root(nbytes)
        block.user = weakref.ref(root)
        return Rows(shape, dtype, np.ndarray(shape, dtype, root), None)

    def _free_block(self, capacity: int) -> _OwnBlock:
        """A block of that size, if it can be one that has memory. Blocks that are no longer needed give theirs back."""
        same = [block for block in self._own if block.capacity == capacity]
        free = [block for block in same if block.is_free()]
        filled = [block for block in free if not block.is_empty]
        if filled:
            in_use = len(same) - len(free)
            surplus = filled[: max(0, len(filled) - 1 - in_use - _SPARES)]
            block = filled[-1]
        else:
            surplus = [other for other in self._own if other.capacity != capacity and other.is_free()]
            block = free[-1] if free else self._new_block(capacity)
        for other in surplus:
            other.is_empty = True
            other.empty()
        return block

    def _new_block(self, capacity: int) -> _OwnBlock:
        block = _OwnBlock(len(self._own), capacity)
        self._own.append(block)
        self._at[block.root(capacity).ctypes.data] = block
        return block

    def block_of(self, tensor: torch.Tensor) -> _OwnBlock | None:
        """The block at whose start `tensor` lies."""
        return self._at.get(tensor.data_ptr())

    def finish(self) -> None:
        """The process is about to exit, and has sent what it had to."""
        for block in self._own:
            block.leave()
            if block.state != _HELD:
                block.empty()


_pool: _Pool | None = None


class _PooledTensor(torch.Tensor):
    """A tensor of a batch, in the worker. What is computed from it is an ordinary tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.clone()


def _to_be_sent(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as one that travels in its block or, if it is small, through the queue."""
    assert _pool is not None
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return tensor
    if tensor.nbytes > _INLINE_NBYTES and _pool.block_of(tensor) is None:
        return tensor
    return tensor.as_subclass(_PooledTensor)


def _reduce(pooled: _PooledTensor) -> tuple[Any, ...]:
    """What multiprocessing's pickle is to know of a tensor, which somebody may have changed in place."""
    tensor = pooled.detach().requires_grad_(pooled.requires_grad)
    block = None if _pool is None else _pool.block_of(tensor)
    with contextlib.suppress(TypeError, RuntimeError):  # NumPy does not know the dtype; a gradient is required
        array = tensor.numpy()
        if block is not None and block.state == _FREE and tensor.is_contiguous() and tensor.nbytes <= block.capacity:
            return block.send(array)
        if tensor.nbytes <= _INLINE_NBYTES:
            return torch.from_numpy, (array,)
    return reductions.reduce_tensor(tensor)  # type: ignore[no-untyped-call, no-any-return]


reduction.ForkingPickler.register(_PooledTensor, _reduce)


# -- in the training process ------------------------------------------------------------------------------------


_received: dict[tuple[int, int], _Block] = {}
"""By process and number. They stay mapped for the batches to come."""


class _User(weakref.ref[Bytes]):
    """Knows for how long anybody holds what lies in a block."""

    __slots__ = ("block", "pid")
    block: _Block
    pid: int


def _user_gone(user: _User) -> None:
    if os.getpid() == user.pid:  # a forked child holds a copy of what its parent holds
        user.block.user = None
        user.block.state = _FREE  # last: from now on it may be sent again
        _forget_ended_workers()


interrupts.keep_of(_user_gone)


def _receive(worker: int, number: int, fd: Any, capacity: int, shape: tuple[int, ...], dtype_name: str) -> torch.Tensor:
    """The tensor that :meth:`_OwnBlock.send` described."""
    dtype = np.dtype(dtype_name)
    nbytes = math.prod(shape) * dtype.itemsize
    key = worker, number
    if fd is not None:
        _forget_ended_workers()
        _received.pop(key, None)  # of an earlier process of the same number
        with contextlib.suppress(ConnectionError, EOFError, FileNotFoundError):  # it was killed
            _received[key] = _map(fd.detach(), capacity)
            _received[key].prefault(nbytes)
    block = _received.get(key)
    if block is not None:
        root = block.root(nbytes)
        block.user = user = _User(root, _user_gone)
        user.block, user.pid = block, os.getpid()
        block.state = _HELD
        # Only now: who forgets blocks, in whatever thread, spares those that are used.
        if _received.get(key) is block and not block.is_left:
            return torch.from_numpy(np.ndarray(shape, dtype, root))
    raise StreamClosed(f"A batch is lost with the DataLoader worker that made it, process {worker}, which has ended.")


def _map(fd: int, capacity: int) -> _Block:
    try:
        return _Block(fd, capacity)
    finally:
        os.close(fd)


def _forget_ended_workers() -> None:
    """Give back the memory of workers that are no more."""
    ended = {worker for worker in {worker for worker, _ in list(_received)} if not _runs(worker)}
    for key, block in list(_received.items()):
        if (block.is_left or key[0] in ended) and not block.is_used_here():
            _received.pop(key, None)
            if not block.is_used_here():
                block.empty()  # processes that were forked meanwhile may have it mapped as well


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _after_fork_in_child() -> None:
    """The workers of the parent, and its blocks, are not ours."""
    global _pool
    _pool = None
    _received.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
