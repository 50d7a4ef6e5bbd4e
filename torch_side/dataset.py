"""Messages of Blender instances as a PyTorch dataset."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import data

from blendtorch_shm.address import Address
from blendtorch_shm.errors import ConfigurationError, InstanceDied, StreamTimeout
from blendtorch_shm.launch_directory import InstanceReport, instance_reports
from blendtorch_shm.place import SharedPlace
from blendtorch_shm.source import Source
from blendtorch_shm.stream import RECLAIM_EVERY_S, activity
from blendtorch_shm.transport import open_source

from .process import describe_exit

log = logging.getLogger("blendtorch")

DEFAULT_TIMEOUTMS = 120_000
"""Patience for the next message: Blender starts, and its first EEVEE frame may compile shaders for tens of seconds."""
_LOOK_EVERY_S = 0.25
_TELL_EVERY_S = 10.0
_LAST_MESSAGES_S = 2 * RECLAIM_EVERY_S
"""After the last instance has ended: time to find what a consumer that died had held."""

ItemTransform = Callable[[Any], Any]


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
        record_path_prefix: str | None = None,
        *,
        output: str = "torch",
    ) -> None:
        texts = [addresses] if isinstance(addresses, str) else list(addresses)
        if not texts or not all(isinstance(a, str) for a in texts):
            raise ConfigurationError(
                f"addresses={addresses!r} names no instances; expected strings, such as launch_info.addresses['DATA']."
            )
        if output not in ("torch", "numpy"):
            raise ConfigurationError(f"output={output!r} is not known; use 'torch' or 'numpy'.")
        for name, value in (("queue_size", queue_size), ("timeoutms", timeoutms)):
            if not 0 < value < 2**31:
                raise ConfigurationError(f"{name}={value!r} is not between 1 and 2147483647.")
        self.addresses = [a if isinstance(a, Address) else Address(a) for a in texts]
        self.queue_size = queue_size
        self.timeoutms = timeoutms
        self.item_transform = item_transform
        self.output = output
        self.stream_length(max_items)
        if record_path_prefix is not None:
            self.enable_recording(record_path_prefix)

    def stream_length(self, max_items: int) -> None:
        """Set the number of items that one iteration yields, over all workers together."""
        if max_items < 0:
            raise ConfigurationError(f"max_items={max_items} is negative.")
        self.max_items = max_items

    def enable_recording(self, prefix: str) -> None:
        """Not available yet.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            f"Recording (record_path_prefix={str(prefix)!r}) is not available in this version; leave it out."
        )

    def __len__(self) -> int:
        return self.max_items

    def __iter__(self) -> Iterator[Any]:
        worker = data.get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return self._stream(self.max_items // workers + (index < self.max_items % workers))

    def _item(self, item: dict[str, Any]) -> Any:
        """Turn a message into what users get; override it or pass `item_transform`.

        Args:
            item: the message: ``btid`` and what the script published. Its ndarrays are writable, and lie in the message's slot.

        Returns:
            anything. Its ndarrays (in dicts, lists and tuples too) become tensors afterwards.
        """
        return item if self.item_transform is None else self.item_transform(item)

    def _stream(self, count: int) -> Iterator[Any]:
        if count == 0:
            return
        source = open_source(self.addresses, queue_size=self.queue_size, count=count)
        try:
            for received in range(count):
                message = source.receive(_LOOK_EVERY_S)
                if message is None:
                    watch = _Watch(self, source, received, count)
                    while message is None:
                        watch.look()
                        message = source.receive(_LOOK_EVERY_S)
                item = self._item(message.fields)
                items = [to_tensors(item) if self.output == "torch" else item]
                del message, item
                if received == count - 1:
                    source.close()  # now: who knows when we are asked for more, and what waits here is for other workers
                yield items.pop()  # what is yielded keeps the slot, and nothing in here does
        finally:
            source.close()


class _Watch:
    """Waits with the user: says what the instances do meanwhile, and when waiting on makes no sense."""

    def __init__(self, dataset: RemoteIterableDataset, source: Source, received: int, count: int) -> None:
        self._timeout_s = dataset.timeoutms / 1000
        self._addresses = dataset.addresses
        self._twins = {a.twin for a in dataset.addresses if a.twin is not None}
        self._source = source
        self._progress = f"{received} of {count} items"
        self._start = self._told = time.monotonic() - _LOOK_EVERY_S
        self._exited_at: float | None = None
        worker = data.get_worker_info()
        self._tells = worker is None or worker.id == 0  # one voice for all

    def look(self) -> None:
        """Raises StreamTimeout when patience has run out, InstanceDied when nobody is left who could send."""
        now = time.monotonic()
        waited_s = now - self._start
        reports = self._reports()
        if self._exited_at is not None and now - self._exited_at > _LAST_MESSAGES_S:
            raise InstanceDied(
                f"All {len(self._addresses)} instances have ended, {self._progress} had arrived.\n"
                f"{self._describe(reports) or 'Their launch is over: its directory was removed.'}"
            )
        if self._exited_at is None and self._all_exited(reports):
            self._exited_at = now
        if waited_s > self._timeout_s:
            raise StreamTimeout(
                f"No message arrived for {waited_s:.1f} s (timeoutms={self._timeout_s * 1000:.0f}), {self._progress} had. "
                f"If the instances only need longer (a first EEVEE frame compiles shaders), raise timeoutms.\n"
                f"{self._source.explain()}\n{self._describe(reports) or self._remote()}"
            )
        if self._tells and now - self._told > _TELL_EVERY_S:
            self._told = now
            log.warning(
                "Waiting for a message for %.0f s (%s had arrived).\n%s\n%s",
                waited_s,
                self._progress,
                self._source.explain(),
                self._describe(reports, lines=2),
            )

    def _all_exited(self, reports: dict[tuple[str, int], InstanceReport]) -> bool:
        """Whether no instance is left. Nothing is known of those without a shared-memory twin."""
        return all(a.twin is not None for a in self._addresses) and all(
            reports[twin.directory, twin.btid].state == "exited"
            if (twin.directory, twin.btid) in reports
            else not twin.is_here()
            for twin in self._twins
        )

    def _reports(self) -> dict[tuple[str, int], InstanceReport]:
        """By launch directory and btid."""
        wanted = {(twin.directory, twin.btid) for twin in self._twins}
        found = {
            (directory, report.btid): report
            for directory in {directory for directory, _ in wanted}
            for report in instance_reports(directory)
        }
        return {instance: report for instance, report in found.items() if instance in wanted}

    def _remote(self) -> str:
        return (
            f"Nothing is known about the instances at {', '.join(self._addresses)}: do they run, and can this host reach "
            f"those ports?"
        )

    def _describe(self, reports: dict[tuple[str, int], InstanceReport], lines: int = 8) -> str:
        """What each instance does, when it last published, and the last `lines` lines of its log."""
        text = []
        for (directory, btid), report in sorted(reports.items()):
            state: str = report.state
            if report.state == "exited":
                state = f"exited, {describe_exit(report.exit_code or 0)}"
            if report.is_stopped():
                state = f"STOPPED (SIGSTOP, or a debugger; kill -CONT {report.pid} lets it go on)"
            if report.restarts:
                state += f", started again {report.restarts} times"
            for twin in self._twins:
                if (twin.directory, twin.btid) == (directory, btid):
                    seen = activity(SharedPlace(twin))
                    silence_s = None if seen is None else seen.silence_s()
                    age = "no message yet" if silence_s is None else f"last message {silence_s:.1f} s ago"
                    state += f"; {twin.name}: {age}"
            text.append(f"instance {btid}: {state}; it last logged:")
            text.extend(f"    {line}" for line in report.log_tail.splitlines()[-lines:] or ["(nothing)"])
        return "\n".join(text)


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
        return {k: to_tensors(v) for k, v in value.items()}
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
