"""Batches of frames in the training process, without worker processes."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from blendtorch_shm.arguments import integer
from blendtorch_shm.errors import ConfigurationError, InstanceDied, StreamClosed, StreamTimeout, UnreadableMessage
from blendtorch_shm.message.wire import Message
from blendtorch_shm.process import forks, leaving
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.waiting import IDLE_S
from blendtorch_shm.transport import open_source
from blendtorch_shm.wording import counted

from .batch_memory import DeviceMemory, HostMemory, Mark, Memory
from .batches import Batch
from .constants import DEFAULT_TIMEOUTMS
from .dataset import ItemTransform, RemoteIterableDataset, to_tensors
from .waiting import LOOK_EVERY_S, Watch

log = logging.getLogger("blendtorch")

_CHUNK = 8
"""Messages that are taken and copied together, at most: a copy clears the caches of whatever runs between two of them."""
_IN_FLIGHT = 2
"""Chunks whose copies may be under way at one time."""
_LONGEST_NAP_S = 0.002
"""So late a message may be seen because of a nap. A nap in which fewer than two come saves nothing, so none is taken then."""
_MAX_COPY_THREADS = 4
"""One copies 3 GB/s and more, 400 frames of 1080x1920x4 bytes: four are ahead of most that renders. Other cores are Blender's."""
_CLOSING_PATIENCE_S = 30.0
_LOOK_AFTER_USER_S = 1.0

CollateFn = Callable[[list[Any]], Any]


class FrameLoader:
    """The messages that Blender instances publish, each once, in batches.

    Does what ``DataLoader(RemoteIterableDataset(...), batch_size, num_workers)`` does, in a thread of this process instead of
    worker processes. A frame is copied once, from its slot to its row of the batch; with a CUDA device it gets there by DMA
    from the slot, and the CPU copies nothing.

    A batch is what the DataLoader's default collation makes: a dict with a tensor for each array and number, a list for each
    text. It stays as it is for as long as somebody holds it, or any view of it; then its memory is used again.

    Several loaders, in one process or in several (as the ranks of ``DistributedDataParallel`` on one host), may have the same
    addresses: each message goes to one of them.

    Args:
        addresses: of the instances, such as ``launch_info.addresses['DATA']``; one address alone will do. Of a plain string,
            the rest is found where a launch of this user on this host has that address; else it means TCP without keys.
        batch_size: items per batch.
        max_items: items of one iteration; None means that it does not end.
        device: where batches are to be, such as ``'cuda'``; None means this host's memory.
        transform: called with each item (``btid`` and what the script published, arrays as writable ndarrays in the message's
            slot) before it becomes part of a batch. What it writes to them, nobody else sees. Runs in the loader's thread.
        collate_fn: makes a batch of a list of `batch_size` items, whose arrays are tensors over their slots. Without it, the
            default collation, which does not keep the slots.
        drop_last: leave out the last batch of an iteration if it would be smaller than the others; its items are not taken.
        prefetch: batches that are kept ready, beyond the one that is being used.
        queue_size: messages that may queue up here per instance, over TCP.
        timeoutms: patience for the next message, in milliseconds. In shared memory, it counts from the last message that
            anybody took from these instances.
        copy_threads: frames that are copied at a time; by default one for each two CPUs, four at most.

    Raises:
        ConfigurationError: an argument that cannot work.

    Iterating raises what iterating over :class:`~torch_side.dataset.RemoteIterableDataset` does. Who catches an error of one
    message or of its `transform`, or that none came, and asks for the next batch gets it: one of `batch_size` items that are
    whole. After any other error, such as that of items that make no batch, the iteration is over.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        batch_size: int,
        *,
        max_items: int | None = None,
        device: torch.device | str | int | None = None,
        transform: ItemTransform | None = None,
        collate_fn: CollateFn | None = None,
        drop_last: bool = False,
        prefetch: int = 2,
        queue_size: int = 10,
        timeoutms: int = DEFAULT_TIMEOUTMS,
        copy_threads: int | None = None,
    ) -> None:
        for name, function in (("transform", transform), ("collate_fn", collate_fn)):
            if function is not None and not callable(function):
                raise ConfigurationError(f"{name}={function!r} cannot be called.")
        self.dataset = RemoteIterableDataset(
            addresses,
            queue_size,
            timeoutms,
            2**63 - 1 if max_items is None else max_items,
            transform,
        )
        self.batch_size = integer("batch_size", batch_size)
        self.max_items = None if max_items is None else self.dataset.max_items
        self.device = _device(device)
        self.collate_fn = collate_fn
        self.drop_last = drop_last
        self.prefetch = integer("prefetch", prefetch)
        self.copy_threads = _copy_threads() if copy_threads is None else integer("copy_threads", copy_threads)

    def __len__(self) -> int:
        """Batches of one iteration.

        Raises:
            TypeError: it does not end.
        """
        if self.max_items is None:
            raise TypeError("This FrameLoader has no length: max_items is None.")
        return self.max_items // self.batch_size if self.drop_last else math.ceil(self.max_items / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        return _Batches(self)


class _Batches(Iterator[Any]):
    """One iteration of a loader. It is not a generator, which an error would end.

    Args:
        loader: whose batches it yields.
    """

    _receiver: _Receiver | None = None  # here for one whose making was interrupted

    def __init__(self, loader: FrameLoader) -> None:
        self._loader = loader
        self._is_over = loader.max_items is not None and len(loader) == 0

    def __next__(self) -> Any:
        if self._is_over:
            raise StopIteration
        receiver = self._receiver or self._start()
        try:
            batches = receiver.next()
        except BaseException:
            if not receiver.goes_on:
                self.close()
            raise
        if not batches:
            self.close()
            raise StopIteration
        return batches.pop()  # what is returned keeps the batch, and nothing in here does

    def _start(self) -> _Receiver:
        self._receiver = receiver = _Receiver(self._loader, weakref.ref(self))
        receiver.start()
        return receiver

    def close(self) -> None:
        """End this iteration."""
        self._is_over = True
        if self._receiver is not None:
            self._receiver.close()

    def __del__(self) -> None:  # an iteration that is forgotten
        self.close()


class _Failure(NamedTuple):
    """What the user is to get instead of a batch."""

    error: BaseException
    goes_on: bool
    """Whether the thread does, once the user does."""


class _Prepared(NamedTuple):
    """A batch, and when it is complete."""

    batch: Any
    marks: list[Mark]
    memory: Memory


class _Stopped(Exception):
    """The iteration is over, for whatever reason."""


class _Receiver:
    """Fills batches, in a thread of its own, ahead of who takes them.

    Args:
        loader: what is to be in them.
        user: a weak reference to who takes them.
    """

    def __init__(self, loader: FrameLoader, user: weakref.ref[_Batches]) -> None:
        self._loader = loader
        self._user = user
        self._dataset = loader.dataset
        self._generation = forks.generation
        self._stop = False
        self.goes_on = False
        """Whether what :meth:`next` raised concerns one item alone: the next call goes on with the others."""
        self._ready: queue.SimpleQueue[_Prepared | _Failure | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        """One entry for each batch that may be prepared."""
        for _ in range(loader.prefetch):
            self._room.put(None)
        self._wish: queue.SimpleQueue[None] = queue.SimpleQueue()
        """An entry when the user goes on after an error."""
        # Now: the arrays that a transform sees must be its own. One that is set later is for the next iteration.
        self._collate_fn = loader.collate_fn
        self._has_transform = self._dataset.has_transform()
        self._in_flight: deque[tuple[Mark, Any]] = deque()
        """What is being copied, and must be kept until its mark has passed."""
        self._pace = _Pace(time.monotonic())
        self._device = loader.device
        if self._device == torch.device("cuda"):  # without a number: the current one of this thread
            self._device = torch.device("cuda", torch.cuda.current_device())
        # A daemon, and a member: one that is not would be waited for at exit before anybody could tell it to stop.
        self._thread = threading.Thread(target=self._run, name="blendtorch FrameLoader", daemon=True)

    # -- in the thread of the user ------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to receive."""
        leaving.join(self)  # before the source does: at exit, this ends first
        self._thread.start()

    def next(self) -> list[Any]:
        """The next batch, in a list; an empty list after the last one."""
        if forks.generation != self._generation:
            raise StreamClosed(
                "A FrameLoader's iteration that began before a fork cannot go on after it: begin one in the child."
            )
        if self.goes_on:
            self.goes_on = False
            self._wish.put(None)
        prepared = self._ready.get()
        if prepared is None:
            return []
        if isinstance(prepared, _Failure):
            self.goes_on = prepared.goes_on
            try:
                raise prepared.error
            finally:
                del prepared  # or it would be in a cycle: its traceback has this frame
        self._room.put(None)
        prepared.memory.hand_over(prepared.batch, prepared.marks)
        return [prepared.batch]

    def close(self) -> None:
        """Stop, and wait until that is done."""
        if forks.generation != self._generation:
            return
        self._stop = True
        self._room.put(None)
        self._wish.put(None)
        # The garbage collector may close a forgotten iteration from any thread, this one too.
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            # With a timeout: the collector may run us in a thread that holds a lock which the loader's thread waits for.
            self._thread.join(_CLOSING_PATIENCE_S)
            if self._thread.is_alive():
                log.warning(
                    "A FrameLoader's thread has not ended within %g s, and is left alone: it holds its slots until it does. "
                    "Does `transform` or `collate_fn` wait for something?",
                    _CLOSING_PATIENCE_S,
                )
        leaving.leave(self)

    def finish(self) -> None:
        """Close: the process is about to exit."""
        self.close()

    # -- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._receive()
            self._ready.put(None)
        except _Stopped:
            pass
        except BaseException as error:  # for the user, with its traceback
            _clear_frames(error)
            self._ready.put(_Failure(error, goes_on=False))

    def _is_over(self) -> bool:
        """Whether nobody takes batches any more. An interrupt may have kept who forgot them from saying so."""
        return self._stop or self._user() is None

    def _await(self, entries: queue.SimpleQueue[None]) -> None:
        while True:
            try:
                entries.get(timeout=_LOOK_AFTER_USER_S)
                is_there = True
            except queue.Empty:
                is_there = False
            if self._is_over():
                raise _Stopped
            if is_there:
                return

    def _receive(self) -> None:
        loader = self._loader
        count = self._dataset.max_items
        if loader.drop_last:
            count -= count % loader.batch_size
        received = 0
        source = open_source(
            self._dataset.addresses,
            queue_size=self._dataset.queue_size,
            count=count,
            changes=self._has_transform or self._collate_fn is not None,
        )
        self._watch = Watch(self._dataset, source)
        try:
            memory = open_memory(source, self._device, loader.copy_threads, spares=loader.prefetch)
            try:
                while received < count:
                    self._await(self._room)
                    size = min(loader.batch_size, count - received)
                    prepared = self._prepare(source, memory, received, size, count)
                    received += size
                    if received == count:
                        source.close()  # now: who knows when the user is done, and what waits here is for others
                    self._ready.put(prepared)
                    del prepared
                while self._in_flight:
                    self._land()
            finally:
                while self._in_flight:  # after an error, which is what the user gets
                    try:
                        self._land()
                    except Exception as error:
                        log.debug("Another copy of a FrameLoader has failed: %s", error)
                memory.close()
        finally:
            source.close()

    def _prepare(self, source: Source, memory: Memory, received: int, size: int, count: int) -> _Prepared:
        """Receive `size` messages and make a batch of them."""
        collate_fn = self._collate_fn
        batch = Batch(memory, min(self._loader.batch_size, count))
        kept: list[Any] = []
        marks: list[Mark] = []
        taken = 0
        while taken < size:
            messages = self._next(source, min(_CHUNK, size - taken), received + taken, count)
            items, errors = self._transform(messages)
            del messages
            taken += len(items)
            if collate_fn is None:
                with self._copying(memory, items, marks):
                    batch.add(items)
            else:
                kept += map(to_tensors, items)
            del items
            self._tell(errors)
        if collate_fn is None:
            with self._copying(memory, None, marks):
                result = batch.collate()
        else:
            collated = collate_fn(kept)
            with self._copying(memory, (kept, collated), marks):
                result = memory.move(collated)
        return _Prepared(result, marks, memory)

    def _transform(self, messages: list[Message]) -> tuple[list[Any], list[BaseException]]:
        """The items that users make of these messages, and what was raised instead of some."""
        items: list[Any] = []
        errors: list[BaseException] = []
        for message in messages:
            if self._is_over():
                errors.clear()  # each is in a cycle with this frame, which holds messages
                raise _Stopped
            try:
                items.append(self._dataset._item(message.fields) if self._has_transform else message.fields)
            except Exception as error:
                errors.append(error)
        return items, errors

    def _tell(self, errors: list[BaseException]) -> None:
        """Let the user have these errors, one after the other, and go on as soon as the user does. Meanwhile, only a batch that
        was begun may hold slots.
        """
        _clear_frames(*errors)
        while errors:
            while self._in_flight:
                self._land()
            self._ready.put(_Failure(errors.pop(0), goes_on=True))
            try:
                self._await(self._wish)
            except _Stopped:
                errors.clear()  # or they would be kept for as long as what is raised here
                raise

    def _next(self, source: Source, wanted: int, received: int, count: int) -> list[Message]:
        """The next messages, one at least and `wanted` at most."""
        silent = 0
        errors: list[BaseException] = []
        while True:
            if self._is_over():
                raise _Stopped
            while self._in_flight and (len(self._in_flight) == _IN_FLIGHT or self._in_flight[0][0].query()):
                self._land()
            if nap_s := self._pace.nap_s(wanted):
                time.sleep(nap_s)
            try:
                messages = source.receive_many(wanted, 0 if self._in_flight else IDLE_S)
                self._pace.note(len(messages), wanted, time.monotonic())
                if messages:
                    return messages
                if self._in_flight:  # the instances may wait for just these slots
                    self._land()
                else:
                    silent += 1
                    self._look(silent, received, count)
            except (UnreadableMessage, StreamTimeout, InstanceDied) as error:
                errors.append(error.with_traceback(None))  # our own frames say nothing to the user
            if errors:
                silent = 0
                self._tell(errors)

    def _look(self, silent: int, received: int, count: int) -> None:
        """Now and then, see whether to wait on makes sense, after so many looks for a message that found none."""
        looks = round(LOOK_EVERY_S / IDLE_S)
        if silent == looks:
            items = counted(received, "item")
            self._watch.begin(items if self._loader.max_items is None else f"{received} of {counted(count, 'item')}")
        if silent % looks == 0:
            self._watch.look()

    @contextlib.contextmanager
    def _copying(self, memory: Memory, held: Any, marks: list[Mark]) -> Iterator[None]:
        """Keep `held` for as long as the copies that begin in here take, even if something fails after the first of them."""
        try:
            yield
        finally:
            mark = memory.mark()
            if mark is not None:
                marks.append(mark)
                self._in_flight.append((mark, held))

    def _land(self) -> None:
        """Wait until the oldest copies are done, and let go of what was copied: now its slot may be used again."""
        mark, _held = self._in_flight.popleft()
        mark.synchronize()


class _Pace:
    """How fast messages come. Where several come within a moment, it is slept through: to be woken for each of them costs more
    than to take it, on either side.
    """

    def __init__(self, now: float) -> None:
        self._last_at = now
        self._interval_s = _LONGEST_NAP_S
        self._most = 0
        self._is_drained = False

    def nap_s(self, wanted: int) -> float:
        """How long `wanted` messages take to come, or as much of it as is worth while; 0 unless there were too few before."""
        if not self._is_drained or self._interval_s >= _LONGEST_NAP_S / 2:
            return 0.0
        return min(self._interval_s * wanted, _LONGEST_NAP_S)

    def note(self, taken: int, wanted: int, now: float) -> None:
        """That so many messages were there."""
        self._most = max(taken, self._most - 1)  # that the source hands out at once, which may be less than is there
        self._is_drained = taken < min(wanted, self._most)
        if taken:
            interval_s = min((now - self._last_at) / taken, _LONGEST_NAP_S)
            self._interval_s += (interval_s - self._interval_s) / 4
            self._last_at = now


def _clear_frames(*errors: BaseException) -> None:
    """Let go of what lies in the frames of `errors`: messages, whose slots would be leased for as long as one is kept."""
    seen: list[BaseException] = []
    pending = list(errors)
    while pending:
        found = pending.pop()
        if found not in seen:
            seen.append(found)
            traceback.clear_frames(found.__traceback__)
            pending += [other for other in (found.__cause__, found.__context__) if other is not None]


def open_memory(source: Source, device: torch.device | None, copy_threads: int, spares: int) -> Memory:
    """Where batches for `device` lie."""
    return HostMemory(copy_threads, spares) if device is None else DeviceMemory(device, source.segments)


def _device(device: torch.device | str | int | None) -> torch.device | None:
    """The CUDA device that is meant; None for this host's memory."""
    try:
        found = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(f"device={device!r} is not a device: {error}") from error
    if found is None or found.type == "cpu":
        return None
    if found.type != "cuda":
        raise ConfigurationError(f"device={device!r} is neither the CPU nor a CUDA device.")
    if not torch.cuda.is_available():
        raise ConfigurationError(f"device={device!r}, but torch finds no CUDA device here. Leave device out.")
    return found


def _copy_threads() -> int:
    return max(1, min(_MAX_COPY_THREADS, len(os.sched_getaffinity(0)) // 2))
