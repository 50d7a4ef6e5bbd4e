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

from blendtorch_shm.errors import ConfigurationError, StreamClosed
from blendtorch_shm.memory.layout import PAGE
from blendtorch_shm.memory.segment import Segment
from blendtorch_shm.process import forks, interrupts, leaving

from .batch_memory import Block, HostMemory, with_tensors
from .batches import Batch, collate_here

Bytes = npt.NDArray[np.uint8]

_INLINE_NBYTES = 2**16
"""Tensors up to this many bytes travel through the queue: a pipe holds so much."""
_SPARES = 2
"""Batches that wait in the queue, unless the user says otherwise (``prefetch_factor``)."""
_FREE, _SENT, _HELD = range(3)


def pooled_collate(items: list[Any]) -> Any:
    """Make a batch as the default collation does, in memory that is used again once nobody holds the batch.

    One thing differs: a list of texts that is the same in all items, such as `instance_names` of ground truth, stays that list.

    For ``DataLoader(dataset, batch_size, num_workers=..., collate_fn=pooled_collate)``, with any kind of workers. An array is
    copied once, in the worker; the training process copies nothing. A `collate_fn` of yours may call this and change the
    batch: tensors that it makes travel as torch sends them.

    Args:
        items: of the dataset, `batch_size` of them; whatever the default collation takes.

    Returns:
        the batch, on the CPU. It stays as it is for as long as somebody in the training process holds it, or any view of it.

    Raises:
        ConfigurationError: the DataLoader has ``batch_size=None``, so there is but one item.
        FieldMissing: a field that only some items have.
        RuntimeError, TypeError: items that make no batch. The message names the field.
    """
    if type(items) is not list:
        raise ConfigurationError(
            f"pooled_collate makes a batch of a list of items, and got a {type(items).__name__}. "
            f"With batch_size=None there is nothing to collate: leave collate_fn out."
        )
    if data.get_worker_info() is None:
        return collate_here(items)
    global _pool
    if _pool is None:
        _pool = _Pool()
    batch = Batch(_pool, len(items))
    batch.add(items)
    return with_tensors(batch.collate(), _to_be_sent)


class _Block(Block):
    """Memory of one field of a batch, shared by a worker and the training process. Behind it is a page for two bytes.

    Args:
        fd: of the memory.
        capacity: bytes for the field.
    """

    def __init__(self, fd: int, capacity: int) -> None:
        self._mapping = mmap.mmap(fd, capacity + PAGE)
        self._segment = Segment("", self._mapping)
        super().__init__(self._segment.view, capacity)

    @property
    def state(self) -> int:
        """The worker, who has it while it is FREE, makes it SENT; the training process HELD, and in the end FREE."""
        return self._memory[self.capacity]

    @state.setter
    def state(self, state: int) -> None:
        self._memory[self.capacity] = state

    def free(self, user: weakref.ref[Bytes]) -> None:
        """The training process has dropped what `user` refers to. Tells the worker, unless that was done before."""
        # There is no call in here, so neither Ctrl-C nor another thread comes between: all is done, or nothing.
        if self.user is user:
            self.user = None
            self._memory[self.capacity] = _FREE

    @property
    def is_left(self) -> bool:
        """Whether the worker ended in good order. It does when all that it has sent was read, or when nobody will."""
        return bool(self._memory[self.capacity + 1])

    def leave(self) -> None:
        """The worker ends."""
        self._memory[self.capacity + 1] = 1

    def prefault(self, nbytes: int) -> None:
        """Map the pages of its first `nbytes` at once."""
        self._segment.prefault(0, nbytes)

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
        return super().is_free() and self.state == _FREE

    def send(self, array: npt.NDArray[Any]) -> tuple[Any, ...]:
        """What pickle is to know of `array`, which begins where the block does."""
        fd = None
        if not self._is_known:
            fd = reduction.DupFd(self._fd)  # first: with too many open files, nothing was sent
            self._is_known = True
            os.close(self._fd)
        self.state = _SENT
        return _receive, (os.getpid(), self._number, fd, self.capacity, array.shape, array.dtype.str)


class _Pool(HostMemory):
    """The blocks of this process."""

    def __init__(self) -> None:
        super().__init__(copy_threads=1, spares=_SPARES)
        self._at: dict[int, _OwnBlock] = {}
        """All of them, by address. Those that have memory are the `_blocks` to choose from."""
        leaving.join(self)

    def _block(self, nbytes: int) -> Block:
        block = super()._block(max(PAGE, 1 << (nbytes - 1).bit_length()))  # few sizes, for fields whose shape varies
        assert isinstance(block, _OwnBlock)
        if block.is_empty:
            block.is_empty = False
            block.prefault(nbytes)
        return block

    def _new_block(self, capacity: int) -> Block:
        for block in self._at.values():
            if block.is_empty and block.capacity == capacity:
                return block
        block = _OwnBlock(len(self._at), capacity)
        self._at[block.root(capacity).ctypes.data] = block
        return block

    def _let_go(self, block: Block) -> None:
        assert isinstance(block, _OwnBlock)
        block.is_empty = True
        block.empty()

    def block_of(self, tensor: torch.Tensor) -> _OwnBlock | None:
        """The block at whose start `tensor` lies."""
        return self._at.get(tensor.data_ptr())

    def finish(self) -> None:
        """The process is about to exit, and has sent what it had to."""
        for block in self._at.values():
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
    array = None
    with contextlib.suppress(TypeError, RuntimeError):  # NumPy does not know the dtype; a gradient is required
        array = tensor.numpy()
    if array is not None:
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

    __slots__ = ("block", "generation", "worker")
    block: _Block
    generation: int
    worker: int


def _user_gone(user: _User) -> None:
    try:
        if forks.generation == user.generation:  # a forked child holds a copy of what its parent holds
            user.block.free(user)
            if user.block.is_left or not _runs(user.worker):
                _forget_ended_workers()
    except BaseException as error:  # of a signal's handler, or Ctrl-C
        interrupts.keep(error)


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
        user.block, user.generation, user.worker = block, forks.generation, worker
        block.state = _HELD
        # Only now: who forgets blocks, in whatever thread, spares those that are used.
        if _received.get(key) is block and not block.is_left:
            return torch.from_numpy(np.ndarray(shape, dtype, root))
        del root  # a traceback keeps what is in its frames
    raise StreamClosed(f"A batch is lost with the DataLoader worker that made it, process {worker}, which has ended.")


def _map(fd: int, capacity: int) -> _Block:
    try:
        return _Block(fd, capacity)
    finally:
        os.close(fd)


def _forget_ended_workers() -> None:
    """Give back the memory of workers that are no more, and blocks that Ctrl-C kept from being given back."""
    ended = {worker for worker in {worker for worker, _ in list(_received)} if not _runs(worker)}
    for key, block in list(_received.items()):
        user = block.user
        if user is not None and user() is None:
            block.free(user)
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
