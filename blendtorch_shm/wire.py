"""The bytes of a message and of an announcement. Typed and validated; arrays are never pickled.

A *message* is the dict that a script publishes. It becomes a payload, the raw bytes of its large arrays, each 64-byte aligned,
and a header: msgpack of :class:`Header`. Where an array stood, the body holds a reference to it. In shared memory the payload
lies at the start of a slot and the header right behind it; over TCP they are the two frames of one ZeroMQ message.

Arrays up to :data:`SMALL_NBYTES` travel inside the header and arrive as copies, so that keeping a label does not keep a
picture's slot occupied. What msgpack does not know by itself (tuples, NumPy scalars, dicts with other keys than strings) has
extension types of its own. Any other object is pickled, and only read where the connection is trusted.
"""

from __future__ import annotations

import ast
import functools
import math
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from .errors import PublishError, WireError
from .layout import VERSION, align

Array = npt.NDArray[Any]
SMALL_NBYTES = 2048
"""Arrays up to this many bytes travel inside the header."""

_ARRAY, _SMALL_ARRAY, _TUPLE, _SCALAR, _MAPPING, _PICKLE, _BIG_INT = range(1, 8)
_PLAIN_DTYPE = re.compile(r"[<>|=]?([biufcSU]\d+|\?|V\d+|[mM]8(\[\w+\])?)")
_MAX_DEPTH = 64


class ArraySpec(msgspec.Struct, array_like=True, frozen=True):
    """A large array of the message: `dtype` (see :func:`dtype_name`), `shape`, and byte `offset` in the payload."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class Header(msgspec.Struct, array_like=True, frozen=True):
    """Everything of a message but the bytes of its large arrays."""

    version: int
    sequence: int
    arrays: list[ArraySpec]
    body: msgspec.Raw


class Message(NamedTuple):
    """A message as it was published, and its unbroken number within its stream."""

    sequence: int
    fields: dict[str, Any]


@dataclass
class Parts:
    """A message taken apart: encoded body, the large arrays, and the first key that needed a pickle, if any."""

    body: bytes = b""
    arrays: list[Array] = field(default_factory=list)
    pickled: str | None = None


_encode = msgspec.msgpack.Encoder().encode
_header_decoder = msgspec.msgpack.Decoder(Header)


# -- writing ----------------------------------------------------------------------------------------------------


def take_apart(fields: Mapping[str, Any], *, trusted: bool) -> Parts:
    """Encode the body of a message and collect its large arrays (C-contiguous or not; none is copied).

    Raises:
        PublishError: a value needs pickle and the connection is not `trusted`, or it cannot be pickled.
    """
    parts = Parts()
    walk = _Walk(parts, trusted)
    body = {}
    for key, value in fields.items():
        walk.key = key
        body[key] = walk(value)
    parts.body = _encode(body)
    return parts


def encode_header(sequence: int, arrays: list[ArraySpec], body: bytes) -> bytes:
    """The header of a message whose arrays lie where `arrays` says."""
    return _encode(Header(VERSION, sequence, arrays, msgspec.Raw(body)))


def header_room(parts: Parts) -> int:
    """Upper bound of the encoded header's size in bytes."""
    return 64 + len(parts.body) + sum(64 + len(dtype_name(a.dtype)) + 9 * a.ndim for a in parts.arrays)


@functools.lru_cache(maxsize=1024)
def dtype_name(dtype: np.dtype[Any]) -> str:
    """A string that :func:`dtype_of` turns into `dtype` again; "" if it has Python objects or cannot be described."""
    if dtype.hasobject:
        return ""
    if dtype.fields is None and dtype.subdtype is None and np.dtype(dtype.str) == dtype:
        return dtype.str
    if dtype.fields is not None:
        description = repr(np.lib.format.dtype_to_descr(dtype))
        if np.lib.format.descr_to_dtype(ast.literal_eval(description)) == dtype:
            return description
    return ""


class _Walk:
    """Turns one value after another into what msgpack can say."""

    def __init__(self, parts: Parts, trusted: bool) -> None:
        self.parts = parts
        self.trusted = trusted
        self.key = ""
        self.depth = 0

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind is np.ndarray:
            return self.array(value)
        if kind is int:
            return value if -(2**63) <= value < 2**63 else msgspec.msgpack.Ext(_BIG_INT, str(value).encode())
        if kind is float or kind is str or kind is bool or value is None or kind is bytes:
            return value
        if kind is dict:
            if all(type(key) is str for key in value):
                return self.nested(value, lambda: {k: self(v) for k, v in value.items()})
            pairs = self.nested(value, lambda: [[self(k), self(v)] for k, v in value.items()])
            return msgspec.msgpack.Ext(_MAPPING, _encode(pairs))
        if kind is list:
            return self.nested(value, lambda: [self(v) for v in value])
        if kind is tuple:
            return msgspec.msgpack.Ext(_TUPLE, _encode(self.nested(value, lambda: [self(v) for v in value])))
        if isinstance(value, np.generic) and dtype_name(value.dtype):
            return msgspec.msgpack.Ext(_SCALAR, _encode([dtype_name(value.dtype), value.tobytes()]))
        if isinstance(value, np.memmap):
            return self.array(np.asarray(value))
        if kind.__module__ in ("mathutils", "gpu.types", "bpy.types", "bpy_types", "builtins") and is_blender_array(value):
            return self.array(np.array(value))
        return self.pickled(value)

    def nested(self, value: Any, inner: Any) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise PublishError(f"publish({self.key}=...) is nested more than {_MAX_DEPTH} levels deep (or contains itself).")
        result = inner()
        self.depth -= 1
        return result

    def array(self, value: Array) -> Any:
        name = dtype_name(value.dtype)
        if not name:
            return self.pickled(value)
        if value.nbytes <= SMALL_NBYTES:
            return msgspec.msgpack.Ext(_SMALL_ARRAY, _encode([name, value.shape, value.tobytes()]))
        self.parts.arrays.append(value)
        return msgspec.msgpack.Ext(_ARRAY, _encode(len(self.parts.arrays) - 1))

    def pickled(self, value: Any) -> Any:
        what = f"publish({self.key}=...) contains a {type(value).__module__}.{type(value).__qualname__}"
        if not self.trusted:
            raise PublishError(
                f"{what}, which only pickle can carry, and nothing is unpickled from an unauthenticated TCP connection. "
                f"Publish arrays, numbers, strings, bytes, lists, tuples and dicts of them, or start the script through "
                f"BlenderLauncher on the host that consumes."
            )
        try:
            data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise PublishError(f"{what}, which cannot be pickled: {error}.") from error
        self.parts.pickled = self.parts.pickled or self.key
        return msgspec.msgpack.Ext(_PICKLE, data)


def is_blender_array(value: Any) -> bool:
    """Whether `value` is one of Blender's array-like types: vectors, matrices, colours, buffers."""
    return type(value).__name__ in {
        "Vector", "Matrix", "Quaternion", "Euler", "Color", "Buffer", "bpy_prop_array",
    }  # fmt: skip


# -- reading ----------------------------------------------------------------------------------------------------


def decode(header: bytes, payload: npt.NDArray[np.uint8], *, trusted: bool) -> Message:
    """Put a message together again. Its large arrays are views of `payload`, writable if that is.

    Args:
        header: as made by :func:`encode_header`.
        payload: (n,) uint8, the bytes of the large arrays.
        trusted: whether pickled objects may be read.

    Raises:
        WireError: these bytes are not a valid message, or it contains a pickle and is not `trusted`.
    """
    try:
        head = _header_decoder.decode(header)
        if head.version != VERSION:
            raise WireError(
                f"A message has wire format {head.version}, this program understands {VERSION}: "
                f"use the same version of blendtorch-shm on both sides."
            )
        arrays = [_view(spec, payload) for spec in head.arrays]
        return Message(head.sequence, _BodyDecoder(arrays, trusted).decode(head.body))
    except WireError:
        raise
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError, LookupError, MemoryError) as error:
        raise WireError(f"{len(header)} bytes are not a valid message header: {error}") from error


@functools.lru_cache(maxsize=1024)
def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype that :func:`dtype_name` described.

    Raises:
        WireError: it is not one that may travel.
    """
    try:
        if _PLAIN_DTYPE.fullmatch(name):
            dtype = np.dtype(name)
        elif name.startswith("["):
            dtype = np.lib.format.descr_to_dtype(ast.literal_eval(name))
        else:
            raise ValueError("unknown dtype")
        if dtype.hasobject:
            raise ValueError("has objects")
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, OverflowError, LookupError) as error:
        raise WireError(f"{name[:80]!r} is not the dtype of an array that may travel: {error}") from error
    return dtype


def _view(spec: ArraySpec, payload: npt.NDArray[np.uint8]) -> Array:
    dtype = dtype_of(spec.dtype)
    nbytes = _nbytes(dtype, spec.shape)
    if spec.offset < 0 or spec.offset + nbytes > payload.nbytes:
        raise WireError(f"An array of {nbytes} bytes at {spec.offset} lies outside the payload of {payload.nbytes} bytes.")
    array: Array = np.ndarray(spec.shape, dtype, buffer=payload, offset=spec.offset)  # type: ignore[arg-type]
    return array if array.flags.aligned else array.copy()


def _nbytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    if any(n < 0 for n in shape):
        raise WireError(f"An array has the shape {shape}.")
    return math.prod(shape) * dtype.itemsize


class _BodyDecoder:
    def __init__(self, arrays: list[Array], trusted: bool) -> None:
        self.arrays = arrays
        self.trusted = trusted

    def decode(self, body: Any) -> dict[str, Any]:
        return msgspec.msgpack.decode(body, type=dict[str, Any], ext_hook=self.extension)

    def extension(self, code: int, data: memoryview) -> Any:
        if code == _ARRAY:
            index = msgspec.msgpack.decode(data, type=int)
            if not 0 <= index < len(self.arrays):
                raise WireError(f"Array {index} of {len(self.arrays)} does not exist.")
            return self.arrays[index]
        if code == _SMALL_ARRAY:
            name, shape, raw = msgspec.msgpack.decode(data, type=tuple[str, tuple[int, ...], bytes])
            dtype = dtype_of(name)
            if _nbytes(dtype, shape) != len(raw):
                raise WireError(f"An array of shape {shape} and dtype {name} cannot have {len(raw)} bytes.")
            return np.ndarray(shape, dtype, buffer=bytearray(raw))
        if code == _TUPLE:
            return tuple(self.any(data, list[Any]))
        if code == _SCALAR:
            name, raw = msgspec.msgpack.decode(data, type=tuple[str, bytes])
            return np.frombuffer(raw, dtype_of(name), 1)[0]
        if code == _MAPPING:
            return dict(self.any(data, list[tuple[Any, Any]]))
        if code == _BIG_INT:
            return int(bytes(data))
        if code == _PICKLE:
            if not self.trusted:
                raise WireError("A message from an unauthenticated connection contains a pickle; it was not read.")
            try:
                return pickle.loads(data)
            except Exception as error:
                raise WireError(f"A published object cannot be unpickled here: {error!r}") from error
        raise WireError(f"Extension type {code} is unknown.")

    def any(self, data: memoryview, kind: Any) -> Any:
        return msgspec.msgpack.decode(data, type=kind, ext_hook=self.extension)


# -- announcements ----------------------------------------------------------------------------------------------

_ANNOUNCEMENT = struct.Struct("<QQQQQ")
_ANNOUNCEMENT_MAGIC = int.from_bytes(b"btready1", "little")


class Announcement(NamedTuple):
    """Where a READY message lies: what travels over ZeroMQ instead of the pixels."""

    key: int
    ring: int
    slot: int
    generation: int

    def encode(self) -> bytes:
        """40 bytes, little-endian: magic, key, ring, slot, generation."""
        return _ANNOUNCEMENT.pack(_ANNOUNCEMENT_MAGIC, *self)

    @staticmethod
    def decode(data: bytes) -> Announcement:
        """Raises WireError if `data` is no announcement."""
        if len(data) != _ANNOUNCEMENT.size:
            raise WireError(f"An announcement has {_ANNOUNCEMENT.size} bytes, not {len(data)}.")
        magic, *rest = _ANNOUNCEMENT.unpack(data)
        if magic != _ANNOUNCEMENT_MAGIC:
            raise WireError("Bytes that are no announcement arrived where one was expected.")
        return Announcement(*rest)
