"""From items to a batch, as the DataLoader's default collation makes it, but with each frame copied once, when it comes.

The default collation wants all items of a batch at once, so all of their slots would be leased meanwhile. Here an item's arrays
are copied to their rows of the batch at once, and something small stands in for each, until torch's own collation is
called for what is left: numbers, texts, containers, small arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data._utils.collate import collate, default_collate_fn_map  # documented, in spite of its name

from blendtorch_shm.message.values import SMALL_NBYTES

from .batch_memory import Memory, Rows, small_rows, torch_dtype
from .dataset import PLAIN

Array = npt.NDArray[Any]


class Batch:
    """One batch while it is being filled.

    Args:
        memory: where it lies.
        size: items of a full batch.
    """

    def __init__(self, memory: Memory, size: int) -> None:
        self._memory = memory
        self._size = size
        self._items: list[Any] = []
        self._copies: list[tuple[Rows, int, Array]] = []
        self._rows: dict[tuple[Any, ...], Rows] = {}
        self._placed: Counter[tuple[Any, ...]] = Counter()
        """How many items have an array there."""

    def add(self, items: Sequence[Any]) -> None:
        """Begin to copy the arrays of `items`.

        Raises:
            RuntimeError: an array has another shape or dtype than that of the first item.
        """
        for item in items:
            self._items.append(self._without_arrays(item, ()))
        copies, self._copies = self._copies, []
        for rows, index, array in copies:
            self._memory.copy(rows, index, array)

    def collate(self) -> Any:
        """The batch. Its copies may still be under way.

        Raises:
            RuntimeError, TypeError, KeyError: what torch's default collation raises for items that make no batch.
        """
        first = self._items[0]
        if type(first) is not dict:
            self._check_arrays(self._placed)
            return self._memory.move(collate(self._items, collate_fn_map=_COLLATE))
        return self._memory.move({key: self._collate_field(key) for key in first})

    def _collate_field(self, key: Any) -> Any:
        try:
            values = [item[key] for item in self._items]
            self._check_arrays(path for path in self._placed if path[0] == key)
            # Of the most frequent kinds by the short way: torch's is long, and its code no longer in the caches.
            kinds = set(map(type, values))
            if kinds == {int}:
                return torch.from_numpy(np.array(values, np.int64))
            if kinds == {float}:
                return torch.from_numpy(np.array(values, np.float64))
            if kinds == {Rows}:
                return _collate_rows(values)
            return collate(values, collate_fn_map=_COLLATE)
        except KeyError as error:
            if not all(key in item for item in self._items):
                raise KeyError(
                    f"Field {key!r} is missing from an item of this batch, and is in the first one. Publish it always, or "
                    f"give a collate_fn."
                ) from error
            raise
        except OverflowError as error:
            raise RuntimeError(f"Field {key!r} makes no batch: {error}") from error
        except (RuntimeError, TypeError) as error:
            raise type(error)(f"Field {key!r} makes no batch: {error}") from error

    def _check_arrays(self, paths: Iterable[tuple[Any, ...]]) -> None:
        """Text and the like would go through torch's collation with what stands for arrays in between."""
        for path in paths:
            placed, size = self._placed[path], len(self._items)
            if placed != size:
                others = {type(item[path[0]]).__name__ for item in self._items} - {"Rows"} if len(path) == 1 else set()
                raise TypeError(
                    f"{'.'.join(map(str, path))!r} is an array in {placed} of {size} items, and "
                    f"{' or '.join(sorted(others)) or 'something else'} in the others."
                )

    def _without_arrays(self, value: Any, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind is np.ndarray:
            return self._place(value, path)
        if kind is dict:
            return {k: v if type(v) in PLAIN else self._without_arrays(v, (*path, k)) for k, v in value.items()}
        if kind is list:
            return [self._without_arrays(v, (*path, i)) for i, v in enumerate(value)]
        if isinstance(value, tuple):
            items = [self._without_arrays(v, (*path, i)) for i, v in enumerate(value)]
            return kind(*items) if hasattr(value, "_fields") else kind(items)
        if kind is torch.Tensor and not value.requires_grad and _is_plain(value):
            try:
                array = value.numpy()
            except (TypeError, RuntimeError):  # NumPy lacks the dtype; a conjugate or a negative that is yet to be made
                return value.clone()
            return self._place(array, path)
        return value

    def _place(self, array: Array, path: tuple[Any, ...]) -> Any:
        """Begin to copy `array`. What stands for it: the rows of its field."""
        rows = self._rows.get(path)
        if rows is None:
            if torch_dtype(array.dtype) is None:
                return array  # the collation says what it thinks of it
            shape, dtype = (self._size, *array.shape), array.dtype.newbyteorder("=")
            is_small = array.nbytes <= SMALL_NBYTES  # to hold a label must not be to hold the pictures
            rows = self._rows[path] = (small_rows if is_small else self._memory.empty)(shape, dtype)
        if array.shape != rows.shape[1:] or (array.dtype != rows.dtype and array.dtype.newbyteorder("=") != rows.dtype):
            raise RuntimeError(
                f"Field {'.'.join(map(str, path))!r} makes no batch: it has the shape {rows.shape[1:]} ({rows.dtype}) in one "
                f"item, and {array.shape} ({array.dtype}) in item {len(self._items)}. Make them equal in `transform`, or give "
                f"a collate_fn."
            )
        self._placed[path] += 1
        if array.nbytes <= SMALL_NBYTES:
            assert rows.array is not None
            rows.array[len(self._items)] = array
        else:
            self._copies.append((rows, len(self._items), array))
        return rows


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout is torch.strided


def _collate_rows(found: Sequence[Any], *, collate_fn_map: Any = None) -> torch.Tensor:
    rows: Rows = found[0]
    return rows.first(len(found))


def _collate_list(lists: Sequence[Any], *, collate_fn_map: Any = None) -> Any:
    """A table of texts that is the same in all items stays one list: transposed, as torch would have it, it is of no use."""
    first = lists[0]
    if first and set(map(type, first)) == {str} and all(other == first for other in lists):
        return first
    return collate(lists, collate_fn_map={kind: f for kind, f in collate_fn_map.items() if kind is not list})


_COLLATE_HERE = {list: _collate_list, **default_collate_fn_map}
_COLLATE = {Rows: _collate_rows, **_COLLATE_HERE}


def collate_here(items: list[Any]) -> Any:
    """The batch that a :class:`Batch` would make of `items`, in new memory."""
    return collate(items, collate_fn_map=_COLLATE_HERE)
