"""Messages of Blender instances as a PyTorch dataset."""

from __future__ import annotations

import functools
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import data

from blendtorch_shm.arguments import integer
from blendtorch_shm.errors import ConfigurationError, RecordingNotFound
from blendtorch_shm.launch.address import Address
from blendtorch_shm.transport import open_source

from .constants import DEFAULT_TIMEOUTMS
from .old_recordings import not_trusted, old_files_of
from .recording import FileReader, WorkerRecorder, absolute, check_prefix, files_of
from .waiting import LOOK_EVERY_S, Watch

ItemTransform = Callable[[Any], Any]


def _as_it_is(item: Any) -> Any:
    return item


class RemoteIterableDataset(data.IterableDataset[Any]):
    """The messages that Blender instances publish, each once, fairly interleaved.

    Messages of instances on this host lie in shared memory, and so do the tensors of an item: a slot is used again when the last
    tensor (or view, or NumPy array of one) over it has gone. Instances elsewhere are received over TCP. Works with any number of
    DataLoader workers, forked or spawned: they share the messages, and `max_items` altogether.

    Args:
        addresses: of the instances, such as ``launch_info.addresses['DATA']``; one address alone will do. Plain strings
            mean TCP.
        queue_size: messages that may queue up per worker and instance, over TCP. In shared memory they wait in their slots.
        timeoutms: patience for the next message, in milliseconds.
        max_items: length of the dataset.
        item_transform: called with each item before it becomes tensors; see :meth:`_item`.
        record_path_prefix: see :meth:`enable_recording`.
        output: ``'torch'`` turns every ndarray of an item into a tensor over the same memory, ``'numpy'`` leaves them.

    Raises:
        ConfigurationError: an argument that cannot work.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        queue_size: int = 10,
        timeoutms: int = DEFAULT_TIMEOUTMS,
        max_items: int = 100000,
        item_transform: ItemTransform | None = None,
        record_path_prefix: str | os.PathLike[str] | None = None,
        *,
        output: str = "torch",
    ) -> None:
        texts = [addresses] if isinstance(addresses, str) else list(addresses)
        if not texts or not all(isinstance(a, str) for a in texts):
            raise ConfigurationError(
                f"addresses={addresses!r} names no instances; expected strings, such as launch_info.addresses['DATA']."
            )
        _check_output(output)
        self.addresses = [a if isinstance(a, Address) else Address(a) for a in texts]
        self.queue_size = integer("queue_size", queue_size)
        self.timeoutms = integer("timeoutms", timeoutms)
        self.item_transform = item_transform or _as_it_is
        self.output = output
        self.stream_length(max_items)
        # Prefix, and which recording: one for all workers and iterations.
        self._record_to: tuple[str, str] | None = None
        self.record_path_prefix = record_path_prefix

    def stream_length(self, max_items: int) -> None:
        """Set the number of items that one iteration yields, over all workers together."""
        self.max_items = integer("max_items", max_items, 0, sys.maxsize)

    def enable_recording(self, prefix: str | os.PathLike[str]) -> None:
        """Record from the next iteration on; :class:`FileDataset` replays.

        Each worker writes the messages that it receives, as they arrived, to a file of its own, ``{prefix}_{worker:02d}.tar``.
        Iterating again adds to the recording. With the first message, it replaces whatever was recorded under this prefix before.
        If a file cannot be written any more, because the disk is full, an error in the log says so, and the stream goes on.

        Args:
            prefix: path of the files up to their number. Missing folders are made.

        Raises:
            ConfigurationError: nothing can be written there, or there are other files than recordings, or one that
                somebody else just writes.
        """
        path = absolute(prefix)
        recording = uuid.uuid4().hex
        check_prefix(path, recording)
        self._record_to = (path, recording)

    @property
    def record_path_prefix(self) -> str | None:
        """Where it records to, as an absolute path; None: it does not. To set it is to call :meth:`enable_recording`."""
        return None if self._record_to is None else self._record_to[0]

    @record_path_prefix.setter
    def record_path_prefix(self, prefix: str | os.PathLike[str] | None) -> None:
        if prefix is None:
            self._record_to = None
        else:
            self.enable_recording(prefix)

    def __len__(self) -> int:
        return self.max_items

    def __iter__(self) -> Iterator[Any]:
        worker = data.get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        recorder = None if self._record_to is None else WorkerRecorder(*self._record_to, index, workers)
        return self._stream(self.max_items // workers + (index < self.max_items % workers), recorder)

    def _item(self, item: dict[str, Any]) -> Any:
        """Turn a message into what users get; override it or pass `item_transform`.

        Args:
            item: the message: ``btid`` and what the script published. Its ndarrays are writable, and lie in the message's slot.

        Returns:
            anything. Its ndarrays (in dicts, lists and tuples too) become tensors afterwards.
        """
        return self.item_transform(item)

    def _stream(self, count: int, recorder: WorkerRecorder | None) -> Iterator[Any]:
        if count == 0:
            return
        ours = getattr(self._item, "__func__", None) is RemoteIterableDataset._item and self.item_transform is _as_it_is
        source = open_source(self.addresses, queue_size=self.queue_size, count=count)
        try:
            for received in range(count):
                message = source.receive(LOOK_EVERY_S, held=True)  # until it is handed over, Ctrl-C puts it back
                if message is None:
                    watch = Watch(self.addresses, self.timeoutms, source, f"{received} of {count} items")
                    while message is None:
                        watch.look()
                        message = source.receive(LOOK_EVERY_S, held=True)
                if recorder is not None:
                    source.hand_over()  # to the recording
                    recorder.save(message.fields)  # before users get at the arrays, and only they may change them
                if not ours:
                    source.hand_over()  # to the transform, which may keep it
                item = self._item(message.fields)
                item = to_tensors(item) if self.output == "torch" else item
                source.hand_over()
                del message
                if received == count - 1:
                    source.close()  # now: who knows when we are asked for more, and what waits here is for other workers
                    if recorder is not None:
                        recorder.close()
                # What is yielded keeps the slot, and nothing in here does. After a call, Ctrl-C could come and cost the item.
                yield (item, item := None)[0]
        finally:
            source.close()
            if recorder is not None:
                recorder.close()


class SingleFileDataset(data.Dataset[Any]):
    """The items of one recorded file, at random. Any number of workers, forked or spawned, may read it.

    The arrays of an item are not read: they lie in a private mapping of the file, writable, and what is written there reaches
    neither the file nor the same item when it is asked for again.

    Args:
        path: of the file; see :class:`FileDataset` for a whole recording.
        item_transform: called with each item before it becomes tensors; see :meth:`_item`.
        output: ``'torch'`` turns every ndarray of an item into a tensor over the same memory, ``'numpy'`` leaves them.
        allow_pickle: whether objects may be read that only pickle could carry. Such a file can run any program: do so only if you
            trust whoever made it.

    Raises:
        RecordingNotFound: there is no such file.
        ConfigurationError: it cannot be opened, or an argument that cannot work.
        RecordingError: it is not a recording, or one of blendtorch's and `allow_pickle` is not set; from ``[]``: the item
            cannot be read, or contains a pickle.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        item_transform: ItemTransform | None = None,
        *,
        output: str = "torch",
        allow_pickle: bool = False,
    ) -> None:
        _check_output(output)
        self.path = os.path.abspath(path)
        self.item_transform = item_transform or _as_it_is
        self.output = output
        self.allow_pickle = allow_pickle
        self._length = len(self.reader)

    @functools.cached_property
    def reader(self) -> FileReader:
        """What reads the file, in this process."""
        return FileReader(self.path, allow_pickle=self.allow_pickle)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "reader"}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        item = self._item(self.reader[index])
        return to_tensors(item) if self.output == "torch" else item

    def _item(self, item: dict[str, Any]) -> Any:
        """As :meth:`RemoteIterableDataset._item`: override it, or pass `item_transform`."""
        return self.item_transform(item)


class FileDataset(data.ConcatDataset[Any]):
    """A whole recording, at random: the files of all workers, one after the other in the order of their numbers.

    Recordings of blendtorch (``.btr``) are read where `allow_pickle` says that they are trusted.

    Args:
        record_path_prefix: as it was recorded, see :meth:`RemoteIterableDataset.enable_recording`.
        item_transform, output, allow_pickle: as for :class:`SingleFileDataset`.

    Raises:
        RecordingNotFound: there is no such recording.
        ConfigurationError: an argument that cannot work.
        RecordingError: as for :class:`SingleFileDataset`.
    """

    def __init__(
        self,
        record_path_prefix: str | os.PathLike[str],
        item_transform: ItemTransform | None = None,
        *,
        output: str = "torch",
        allow_pickle: bool = False,
    ) -> None:
        _check_output(output)
        prefix = absolute(record_path_prefix)
        paths = files_of(prefix)
        if not paths and (paths := old_files_of(prefix)) and not allow_pickle:
            raise not_trusted(paths, prefix)
        if not paths:
            raise RecordingNotFound(f"There is no recording {prefix}_00.tar, nor one with another number.")
        super().__init__([SingleFileDataset(path, output="numpy", allow_pickle=allow_pickle) for path in paths])
        self.item_transform = item_transform or _as_it_is
        self.output = output

    def __getitem__(self, index: int) -> Any:
        item = self._item(super().__getitem__(index))  # type: ignore[no-untyped-call]
        return to_tensors(item) if self.output == "torch" else item

    def _item(self, item: dict[str, Any]) -> Any:
        """As :meth:`RemoteIterableDataset._item`: override it, or pass `item_transform`."""
        return self.item_transform(item)


def _check_output(output: str) -> None:
    if output not in ("torch", "numpy"):
        raise ConfigurationError(f"output={output!r} is not known; use 'torch' or 'numpy'.")


PLAIN = frozenset([int, float, bool, str, bytes, type(None)])
"""Types of values that hold no array."""


def to_tensors(value: Any) -> Any:
    """`value` with each ndarray in it, in dicts, lists and tuples too, as a tensor over the same memory.

    Arrays that torch has no dtype for (strings, records) stay as they are; read-only ones, and those with negative strides
    or foreign byte order, are copied.
    """
    kind = type(value)
    if kind is np.ndarray:
        try:
            return torch.from_numpy(value if value.flags.writeable else value.copy())
        except ValueError:  # negative strides, or byte order
            return _to_tensor_by_copy(value)
        except TypeError:  # no such dtype in torch
            return value
    if kind is dict:
        return {k: v if type(v) in PLAIN else to_tensors(v) for k, v in value.items()}
    if kind is list:
        return [to_tensors(v) for v in value]
    if isinstance(value, tuple):
        items = [to_tensors(v) for v in value]
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    return value


def _to_tensor_by_copy(array: np.ndarray[Any, Any]) -> Any:
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError:
        return array
