"""From items to a batch, as the DataLoader's default collation makes it, but with each frame copied once, when it comes.

The default collation wants all items of a batch at once, so all of their slots would be leased meanwhile. Here an item's arrays
are copied to their rows of the batch at once, and something small stands in for each, until torch's own collation is
called for what is left: numbers, texts, containers, small arrays.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data._utils.collate import collate, default_collate_fn_map  # documented, in spite of its name

from blendtorch_shm.errors import FieldMissing
from blendtorch_shm.message.values import SMALL_NBYTES

from .batch_memory import Memory, Rows, small_rows, torch_dtype
from .dataset import PLAIN

Array = npt.NDArray[Any]

_OR_DROP_IT = "drop it in `transform` (`item_transform` of a dataset), or give a collate_fn."
_REMEDY = f"Make it alike in all items, {_OR_DROP_IT}"


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
            FieldMissing: a field that only some items have.
            RuntimeError, TypeError: what torch's default collation raises for items that make no batch.
        """
        first = self._items[0]
        if type(first) is not dict:
            self._check_arrays(self._placed)
            return self._memory.move(collate(self._items, collate_fn_map=_COLLATE))
        return self._memory.move(_collate_fields(self._items, _COLLATE, self._check_field))

    def _check_field(self, key: Any) -> None:
        self._check_arrays(path for path in self._placed if path[0] == key)

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
            where, shape = ".".join(map(str, path)), rows.shape[1:]
            raise RuntimeError(
                f"Field {where!r} makes no batch: it has the shape {shape} ({rows.dtype}) in one item, and {array.shape} "
                f"({array.dtype}) in item {len(self._items)}. {_REMEDY}{_of_labels(array.shape, shape)}"
            )
        self._placed[path] += 1
        if array.nbytes <= SMALL_NBYTES:
            assert rows.array is not None
            rows.array[len(self._items)] = array
        else:
            self._copies.append((rows, len(self._items), array))
        return rows


def _of_labels(one: tuple[int, ...], other: tuple[int, ...]) -> str:
    """What to do where two arrays differ in their number of rows alone, as tables of objects do."""
    if len(one) > 1 and one[1:] == other[1:]:
        return " (Tables of btb.GroundTruth have a row for each object that `objects=` names, always.)"
    return ""


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


def _collate_dict(dicts: Sequence[Any], *, collate_fn_map: Any = None) -> Any:
    """As torch has it, but with an error where it would leave out what the first one lacks."""
    _check_keys(dicts)
    batch = copy.copy(dicts[0])
    batch.update({key: collate([each[key] for each in dicts], collate_fn_map=collate_fn_map) for key in batch})
    return batch


def _collate_fields(
    items: Sequence[Any], kinds: Any, check: Callable[[Any], None] = lambda key: None
) -> dict[Any, Any]:
    """A batch of dicts. Errors name the field; `check` is called with each key first."""
    _check_keys(items)
    return {key: _collate_field(key, [item[key] for item in items], kinds, check) for key in items[0]}


def _collate_field(key: Any, values: list[Any], kinds: Any, check: Callable[[Any], None]) -> Any:
    try:
        check(key)
        # Of the most frequent kinds by the short way: torch's is long, and its code no longer in the caches.
        types = set(map(type, values))
        if types == {int}:
            return torch.from_numpy(np.array(values, np.int64))
        if types == {float}:
            return torch.from_numpy(np.array(values, np.float64))
        if types == {Rows}:
            return _collate_rows(values)
        return collate(values, collate_fn_map=kinds)
    except FieldMissing as error:
        raise FieldMissing(f"In field {key!r}: {error}") from None
    except OverflowError as error:
        raise RuntimeError(f"Field {key!r} makes no batch: {error}. {_REMEDY}") from error
    except (RuntimeError, TypeError) as error:
        raise type(error)(f"Field {key!r} makes no batch: {str(error).rstrip('.')}. {_REMEDY}") from error


def _check_keys(items: Sequence[Any]) -> None:
    """See whether all dicts have the same keys. Torch takes those of the first one, and what it lacks would be lost silently."""
    first = items[0].keys()
    for item in items:
        if not isinstance(item, Mapping):
            raise TypeError(
                f"Items of a batch are of different types: {type(items[0]).__name__} and {type(item).__name__}."
            )
        if item.keys() != first:
            key = next(key for key in [*first, *item] if (key in first) != (key in item))
            having = sum(key in each for each in items)
            raise FieldMissing(
                f"Field {key!r} is in {having} of {len(items)} items of a batch, and missing from the others. Publish it in each "
                f"message, {_OR_DROP_IT}"
            )


_COLLATE_HERE = {list: _collate_list, dict: _collate_dict, **default_collate_fn_map}
_COLLATE = {Rows: _collate_rows, **_COLLATE_HERE}


def collate_here(items: list[Any]) -> Any:
    """The batch that a :class:`Batch` would make of `items`, in new memory."""
    if type(items[0]) is dict:
        return _collate_fields(items, _COLLATE_HERE)
    return collate(items, collate_fn_map=_COLLATE_HERE)
