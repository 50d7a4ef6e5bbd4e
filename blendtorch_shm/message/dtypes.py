"""The dtypes of arrays that may travel, and their names in a message or a recording. None contains Python objects."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import struct
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import WireError

Array = npt.NDArray[Any]
UNREADABLE = (
    WireError,
    msgspec.MsgspecError,
    struct.error,
    ValueError,
    TypeError,
    OverflowError,
    RecursionError,
    LookupError,
    MemoryError,
    SystemError,  # NumPy's, for a text that is no Unicode
)
"""What reading foreign bytes as a message, or as a part of one, may raise."""

# Larger numbers are others to NumPy 1, and a unit of time with a zero before it makes every NumPy divide by it.
_PLAIN_DTYPE = re.compile(r"[<>|=]?([biufcSUV][0-9]{1,8}|\?|[mM]8(\[([1-9][0-9]{0,8})?[a-zA-Z]+\])?)")
_MAX_NAME = 2**14
"""Characters in the name of a dtype; about 400 fields."""
_MAX_NDIM = 64


@functools.lru_cache(maxsize=1024)
def dtype_name(dtype: np.dtype[Any]) -> str:
    """A string that :func:`dtype_of` turns into `dtype` again; "" if it has Python objects or cannot be described.

    It is NumPy's own, such as ``<f4``, or for a structured dtype the JSON of :class:`_Field`, as in ``[["x","<f4"]]``.
    """
    if dtype.hasobject or not dtype.itemsize:
        return ""
    if dtype.fields is None and dtype.subdtype is None:
        return dtype.str if _PLAIN_DTYPE.fullmatch(dtype.str) and np.dtype(dtype.str) == dtype else ""
    if dtype.fields is not None:
        with contextlib.suppress(ValueError, WireError):  # overlapping or unordered fields, or too many
            name = msgspec.json.encode(np.lib.format.dtype_to_descr(dtype)).decode()
            if dtype_of(name) == dtype:
                return name
    return ""


@functools.lru_cache(maxsize=1024)
def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype that :func:`dtype_name` described.

    Raises:
        WireError: it is not one that may travel.
    """
    try:
        if len(name) > _MAX_NAME:
            raise ValueError(f"its description has {len(name)} characters, {_MAX_NAME} are allowed")
        dtype = np.lib.format.descr_to_dtype(_checked(_decode_fields(name) if name.startswith("[") else name))
        if dtype.itemsize <= 0:
            raise ValueError("its elements have no bytes")
    except UNREADABLE as error:
        raise WireError(f"{name[:80]!r} is not the dtype of an array that may travel: {error}") from error
    return dtype


@functools.lru_cache(maxsize=1024)
def extent(name: str, shape: tuple[int, ...]) -> tuple[np.dtype[Any], int]:
    """The dtype of that name, and how many bytes an array of it and `shape` has.

    Raises:
        WireError: there can be no such array.
    """
    dtype = dtype_of(name)
    if len(shape) > _MAX_NDIM or min(shape, default=0) < 0:
        raise WireError(f"An array of {len(shape)} dimensions, {min(shape, default=0)} the smallest, cannot be.")
    return dtype, math.prod(shape) * dtype.itemsize


class _Field(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A field of a structured dtype, as in :attr:`numpy.dtype.descr`: `name` may be a title and a name."""

    name: str | tuple[str, str]
    dtype: str | list[_Field]
    shape: tuple[int, ...] = ()


_decode_fields = msgspec.json.Decoder(list[_Field]).decode


def _checked(description: str | list[_Field]) -> Any:
    """`description` as :func:`numpy.lib.format.descr_to_dtype` takes it."""
    if not isinstance(description, str):
        return [(f.name, _checked(f.dtype), f.shape) for f in description]
    if not _PLAIN_DTYPE.fullmatch(description):
        raise ValueError("unknown dtype")
    return description
