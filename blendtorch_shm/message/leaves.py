"""Which arrays an observation consists of, as a space says that is plain data (``blender_side/spaces.py`` makes them).

An observation is an array, a number, or dicts and tuples of these. Its *leaves* are the arrays and numbers, each at its path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigurationError
from .dtypes import Array

Path = tuple[str | int, ...]
"""Keys of dicts and places in tuples, from the outside in."""


class Leaf(NamedTuple):
    """An array of an observation.

    Example::

        >>> image = {"type": "Box", "shape": [2, 3], "dtype": "uint8", "low": 0, "high": 255}
        >>> leaves_of({"type": "Dict", "spaces": {"image": image}})
        [Leaf(path=('image',), shape=(2, 3), dtype=dtype('uint8'))]
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def of(self, observation: Any) -> Array:
        """This leaf of an observation, as the array that the space says.

        Raises:
            ConfigurationError: there is none, or it is another array than the space says.
        """
        value = observation
        for depth, key in enumerate(self.path):
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError) as error:
                raise ConfigurationError(
                    f"An observation has no {_name(self.path[: depth + 1])}, which its space has: {value!r:.200}"
                ) from error
        array = np.asarray(value)
        if array.shape != self.shape:
            raise ConfigurationError(
                f"{_name(self.path)} of an observation has the shape {array.shape}, its space has {self.shape}."
            )
        if array.dtype != self.dtype:
            fits = array.dtype.kind == self.dtype.kind == "f" or (
                array.dtype.kind in "iub"
                and self.dtype.kind in "iuf"
                and np.array_equal(array.astype(self.dtype), array)
            )
            if not fits:
                raise ConfigurationError(
                    f"{_name(self.path)} of an observation has the dtype {array.dtype}, its space has {self.dtype}, and does not "
                    f"hold these values."
                )
            array = array.astype(self.dtype)
        return array


def leaves_of(space: Mapping[str, Any]) -> list[Leaf]:
    """All arrays of an observation of this space.

    Raises:
        ConfigurationError: it is no space.
    """
    return _leaves(space, ())


def said(leaves: Iterable[Leaf]) -> list[Any]:
    """Leaves as plain data."""
    return [[list(leaf.path), list(leaf.shape), leaf.dtype.name] for leaf in leaves]


def heard(plain: Iterable[Any]) -> list[Leaf]:
    """What :func:`said` returned, as leaves."""
    return [Leaf(tuple(path), tuple(shape), np.dtype(dtype)) for path, shape, dtype in plain]


def _leaves(space: Mapping[str, Any], path: Path) -> list[Leaf]:
    try:
        match space["type"]:
            case "Box":
                return [Leaf(path, tuple(space["shape"]), np.dtype(space["dtype"]))]
            case "Discrete":
                return [Leaf(path, (), np.dtype(np.int64))]
            case "MultiDiscrete":
                return [Leaf(path, np.shape(space["nvec"]), np.dtype(np.int64))]
            case "MultiBinary":
                n = space["n"]
                return [Leaf(path, (n,) if isinstance(n, int) else tuple(n), np.dtype(np.int8))]
            case "Dict":
                return [leaf for key, inner in space["spaces"].items() for leaf in _leaves(inner, (*path, key))]
            case "Tuple":
                return [leaf for i, inner in enumerate(space["spaces"]) for leaf in _leaves(inner, (*path, i))]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{space!r:.300} is no space: {error!r}.") from error
    raise ConfigurationError(f"{space!r:.300} is no space of a known type.")


def _name(path: Path) -> str:
    return "".join(f"[{key!r}]" for key in path) or "The array"
