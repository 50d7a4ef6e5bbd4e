"""Messages of Blender instances as a PyTorch dataset."""

from __future__ import annotations

import functools
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import data

from blendtorch_shm.arguments import integer
from blendtorch_shm.errors import BlendtorchError, ConfigurationError, RecordingNotFound, UnreadableMessage
from blendtorch_shm.launch.address import checked
from blendtorch_shm.message.wire import Message
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.newest import Newest
from blendtorch_shm.transport import open_source
from blendtorch_shm.wording import counted

from .constants import DEFAULT_TIMEOUTMS
from .recordings import old
from .recordings.files import absolute, check_prefix, files_of
from .recordings.reader import FileReader
from .recordings.recorder import WorkerRecorder
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
        addresses: of the instances, such as ``launch_info.addresses['DATA']``; one address alone will do. Of a plain string,
            the rest is found where a launch of this user on this host has that address; else it means TCP without keys.
        queue_size: messages that may queue up per worker and instance, over TCP. In shared memory they wait in their slots.
        timeoutms: patience for the next message, in milliseconds. It counts from the last message that anybody took from these
            instances: over TCP, any worker of this dataset; in shared memory, any process of this host.
        max_items: length of the dataset.
        item_transform: called with each item before it becomes tensors; see :meth:`_item`.
        record_path_prefix: see :meth:`enable_recording`.
        output: ``'torch'`` turns every ndarray of an item into a tensor over the same memory, ``'numpy'`` leaves them.
        latest: each item is the newest message that its instance has ready when it is asked for, for agents and live views.
            Older ones are skipped, which ``btt.stats`` counts; so nobody else gets them. Instances take turns. Over TCP, each is
            asked for when it is wanted, and `queue_size` says nothing. A DataLoader's workers fetch ahead, each for itself.

    Raises:
        ConfigurationError: an argument that cannot work.

    Iterating raises :class:`~blendtorch_shm.errors.UnreadableMessage` for a message that cannot be opened here,
    :class:`~blendtorch_shm.errors.StreamTimeout` and :class:`~blendtorch_shm.errors.InstanceDied` if none comes, and whatever a
    transform raises. Who catches that and asks for the next item gets it. What raised is no item: it does not count towards
    `max_items`. A DataLoader that makes batches drops, with an error, the items that it had gathered for that batch; a
    :class:`~.frame_loader.FrameLoader` keeps them.
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
        latest: bool = False,
    ) -> None:
        _check_output(output)
        if isinstance(addresses, data.Dataset):
            raise ConfigurationError(
                f"addresses={addresses!r} is a dataset; expected addresses of instances, such as "
                f"launch_info.addresses['DATA']. What a dataset is told, such as latest=True, is its own."
            )
        self.addresses = checked(addresses)
        self.latest = latest
        self.queue_size = integer("queue_size", queue_size)
        self.timeoutms = integer("timeoutms", timeoutms)
        self.item_transform = item_transform or _as_it_is
        self.output = output
        self.stream_length(max_items)
        # Prefix, and which recording: one for all workers and iterations.
        self._record_to: tuple[str, str] | None = None
        self.record_path_prefix = record_path_prefix
        # In memory that workers share, forked or spawned.
        self._heard_at: torch.Tensor | None = None
        if any(address.twin is None for address in self.addresses):
            self._heard_at = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

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
        return _Iteration(self, self.max_items // workers + (index < self.max_items % workers), recorder)

    def _item(self, item: dict[str, Any]) -> Any:
        """Turn a message into what users get; override it or pass `item_transform`.

        Args:
            item: the message: ``btid`` and what the script published. Its ndarrays are writable, and lie in the message's slot;
                what is written to them, nobody else sees.

        Returns:
            anything. Its ndarrays (in dicts, lists and tuples too) become tensors afterwards.
        """
        return self.item_transform(item)

    def has_transform(self) -> bool:
        """Whether code of the user's sees an item before it becomes tensors."""
        ours = getattr(self._item, "__func__", None) is RemoteIterableDataset._item
        return not ours or self.item_transform is not _as_it_is

    def heard_at(self) -> int:
        """When this process, or another worker of this dataset, last received a message (monotonic, ns). 0: all instances share
        their memory, which says more.
        """
        return 0 if self._heard_at is None else int(self._heard_at)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._heard_at is not None:
            self._heard_at.share_memory_()  # type: ignore[no-untyped-call]  # a plain pickle has made a copy


class _Iteration(Iterator[Any]):
    """One iteration of a dataset. An error ends neither it nor the stream: the next call goes on with the next message.

    It is not a generator, which an error would end. What raised holds no slot: a message that cannot be opened, or that a
    transform was given, is gone; anything else closes the source, and the next call opens one anew.
    """

    _source: Source | None = None  # these are here for one whose making was interrupted
    _watch: Watch | None = None
    _recorder: WorkerRecorder | None = None
    _left: Sequence[Message] = ()
    """What an earlier source had taken, and nobody was given."""

    def __init__(self, dataset: RemoteIterableDataset, count: int, recorder: WorkerRecorder | None) -> None:
        self._dataset = dataset
        self._count = count
        self._received = 0
        self._recorder = recorder
        self._output = to_tensors if dataset.output == "torch" else _as_it_is
        self._is_users = dataset.has_transform()
        self._newest: Newest | None = {} if dataset.latest else None
        heard_at = dataset._heard_at
        self._heard_at = None if heard_at is None else heard_at.numpy()

    def __next__(self) -> Any:
        if self._received == self._count:
            raise StopIteration
        source = self._source or self._open()
        message = None
        is_users = False
        try:
            message = source.receive(LOOK_EVERY_S, held=True)  # until it is handed over, Ctrl-C puts it back
            if message is None:
                message = self._wait(source)
            if self._heard_at is not None:
                self._heard_at[0] = time.monotonic_ns()
            if self._recorder is not None:
                # Before users get at the arrays, and only they may change them. Until it is in the file, Ctrl-C puts it back.
                self._recorder.save(message.fields, source.hand_over)
            if self._is_users:
                source.hand_over()  # to the transform, which may keep it
                is_users = True
            item = self._output(self._dataset._item(message.fields))
            source.hand_over()
            # What is returned keeps the slot, and nothing in here does. After another call, Ctrl-C could come and cost the item.
            self._received += 1
            if self._received == self._count:
                self.close()  # now: who knows when we are asked for more, and what waits here is for other workers
            return item
        except Exception as error:
            if message is not None and (is_users or self._is_bad(message)):
                source.hand_over()  # what is wrong with this item would be wrong in the next call, too
                if isinstance(error, StopIteration):  # it would end the iteration without a word
                    raise RuntimeError("The transform of an item raised StopIteration.") from error
                raise
            if not isinstance(error, UnreadableMessage):
                self.close()
            if isinstance(error, BlendtorchError):
                error.__traceback__ = None  # our own frames say nothing to the user
            raise
        except BaseException:
            self.close()
            raise

    def _is_bad(self, message: Message) -> bool:
        """Whether no item can be made of a message. If one can, what was raised is a signal handler's."""
        try:
            self._output(self._dataset._item(message.fields))
        except Exception:
            return True
        return False

    def _open(self) -> Source:
        dataset = self._dataset
        left = list(self._left)
        count = self._count - self._received - len(left)
        source = open_source(dataset.addresses, queue_size=dataset.queue_size, count=count, newest=self._newest)
        source.give_first(left)
        self._source, self._watch, self._left = source, Watch(dataset, source), ()
        return source

    def _wait(self, source: Source) -> Message:
        worker = data.get_worker_info()
        watch = self._watch
        assert watch is not None
        of_worker = "" if worker is None else f" of worker {worker.id}"
        watch.begin(f"{self._received} of {counted(self._count, 'item')}{of_worker}")
        while True:
            watch.look()
            message = source.receive(LOOK_EVERY_S, held=True)
            if message is not None:
                return message

    def close(self) -> None:
        """Hold no slot: what was not handed over is put back, or kept for the next call. That begins anew."""
        source = self._source
        self._source = self._watch = (
            None  # a source that nobody has is closed by its streams, if an interrupt comes here
        )
        if source is not None:
            source.close()
            self._left = source.left()
        if self._recorder is not None:
            self._recorder.close()

    def __del__(self) -> None:  # an iteration that is forgotten
        self.close()


class SingleFileDataset(data.Dataset[Any]):
    """The items of one recorded file, at random. Any number of workers, forked or spawned, may read it.

    The arrays of an item are not copied: they lie in a private mapping of the file, writable, and what is written there reaches
    neither the file nor the same item when it is asked for again.

    Args:
        path: of the file; see :class:`FileDataset` for a whole recording.
        item_transform: called with each item before it becomes tensors; see :meth:`_item`.
        output: ``'torch'`` turns every ndarray of an item into a tensor over the same memory, ``'numpy'`` leaves them.
        allow_pickle: whether objects may be read that only pickle could carry. Such a file can run any program: do so only if you
            trust whoever made it.
        verify: whether to compare each item with its checksum when it is read. That reads the whole item; without it, arrays that
            nobody looks at are never read, and damage goes unnoticed.

    Raises:
        RecordingNotFound: there is no such file.
        ConfigurationError: it cannot be opened, or an argument that cannot work.
        RecordingError: it is not a recording, or one of blendtorch's and `allow_pickle` is not set; from ``[]``: the item
            is damaged, cannot be read, or contains a pickle.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        item_transform: ItemTransform | None = None,
        *,
        output: str = "torch",
        allow_pickle: bool = False,
        verify: bool = True,
    ) -> None:
        _check_output(output)
        self.path = os.path.abspath(path)
        self.item_transform = item_transform or _as_it_is
        self.output = output
        self.allow_pickle = allow_pickle
        self.verify = verify
        self._length = len(self.reader)

    @functools.cached_property
    def reader(self) -> FileReader:
        """What reads the file, in this process."""
        return FileReader(self.path, allow_pickle=self.allow_pickle, verify=self.verify)

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
        item_transform, output, allow_pickle, verify: as for :class:`SingleFileDataset`.

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
        verify: bool = True,
    ) -> None:
        _check_output(output)
        prefix = absolute(record_path_prefix)
        paths = files_of(prefix)
        if not paths and (paths := files_of(prefix, old.EXTENSION)) and not allow_pickle:
            raise old.not_trusted(paths, prefix)
        if not paths:
            raise RecordingNotFound(f"There is no recording {prefix}_00.tar, nor one with another number.")
        super().__init__(
            [SingleFileDataset(path, output="numpy", allow_pickle=allow_pickle, verify=verify) for path in paths]
        )
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
