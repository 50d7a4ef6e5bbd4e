"""The bytes of a message. Typed and validated; arrays are never pickled.

A *message* is the dict that a script publishes. It becomes a payload, the raw bytes of its large arrays, each 64-byte aligned,
and a header: msgpack of :class:`Header`, the same dict with nothing where its arrays stood, and a list of what they are. In
shared memory the payload lies at the start of a slot and the header right behind it; over TCP they are the two frames of one
ZeroMQ message.

Arrays up to :data:`SMALL_NBYTES` travel inside the header and arrive as copies, so that keeping a label does not keep a
picture's slot occupied. What msgpack does not know by itself (tuples, NumPy scalars, dicts with other keys than strings) has
extension types of its own. Any other object is pickled, and only read where the connection is trusted.
"""

from __future__ import annotations

import contextlib
import functools
import math
import pickle
import re
import threading
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import PublishError, WireError
from ..memory.layout import VERSION, align

Array = npt.NDArray[Any]
SMALL_NBYTES = 2048
"""Arrays up to this many bytes travel inside the header."""

_NESTED_ARRAY, _NESTED_SMALL_ARRAY, _TUPLE, _SCALAR, _MAPPING, _PICKLE, _BIG_INT = range(1, 8)
# Larger numbers are others to NumPy 1, and a unit of time with a zero before it makes every NumPy divide by it.
_PLAIN_DTYPE = re.compile(r"[<>|=]?([biufcSUV][0-9]{1,8}|\?|[mM]8(\[([1-9][0-9]{0,8})?[a-zA-Z]+\])?)")
_MAX_DEPTH = 64
_MAX_NDIM = 64
_MAX_DTYPE = 2**14
"""Characters in the description of a dtype; about 400 fields."""
_IN_FIELDS = -1


class ArraySpec(msgspec.Struct, array_like=True, gc=False):
    """An array of the message.

    Attributes:
        key: the field it stands in, or None if deeper inside a field.
        dtype: see :func:`dtype_name`.
        shape: its shape; C order.
        offset: of its bytes in the payload, or -1 if they stand in the header, in its place; see :func:`arrange`.
    """

    key: str | None
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Header(msgspec.Struct, array_like=True, frozen=True):
    """Everything of a message but the bytes of its large arrays."""

    version: int
    sequence: int
    arrays: list[ArraySpec]
    fields: dict[str, Any]


class Message(NamedTuple):
    """A message as it was published, and its unbroken number within its stream."""

    sequence: int
    fields: dict[str, Any]


class Parts(msgspec.Struct):
    """A message taken apart.

    Attributes:
        fields: what msgpack can say of it.
        specs: its arrays, but for small ones deeper inside a field.
        large: those that do not travel in the header.
        large_specs: the spec of each of these.
        nested: how many of these are deeper inside a field.
        nbytes: size of the payload that they are laid out in, one after the other; :func:`arrange` makes another one.
        pickled: whether anything had to be pickled.
    """

    fields: dict[str, Any] = {}  # each gets its own
    specs: list[ArraySpec] = []
    large: list[Array] = []
    large_specs: list[ArraySpec] = []
    nested: int = 0
    nbytes: int = 0
    pickled: bool = False

    def add(self, key: str | None, dtype: str, array: Array) -> None:
        """Note a large array."""
        offset = align(self.nbytes)
        spec = ArraySpec(key, dtype, array.shape, offset)
        self.specs.append(spec)
        self.large_specs.append(spec)
        self.large.append(array)
        self.nbytes = offset + array.nbytes


_encode = msgspec.msgpack.Encoder().encode


# -- writing ----------------------------------------------------------------------------------------------------


def take_apart(fields: Mapping[str, Any], *, trusted: bool) -> Parts:
    """Separate a message's arrays from the rest of it. None is copied but the small ones.

    Raises:
        PublishError: a value needs pickle and the connection is not `trusted`, or it cannot be pickled.
    """
    parts = Parts()
    walk: _Walk | None = None
    for key, value in fields.items():
        kind = type(value)
        if kind is np.ndarray and (name := dtype_name(value.dtype)):
            if value.nbytes > SMALL_NBYTES:
                parts.add(key, name, value)
                value = None
            else:
                parts.specs.append(ArraySpec(key, name, value.shape, _IN_FIELDS))
                value = value.tobytes()
        elif kind not in _AS_IT_IS and not (kind is int and -(2**63) <= value < 2**63):
            walk = walk or _Walk(parts, trusted)
            walk.key = key
            value = walk(value)
        parts.fields[key] = value
    return parts


def arrange(parts: Parts, lent: Mapping[int, int], start: int) -> None:
    """Lay the large arrays out anew.

    Args:
        parts: of the message.
        lent: payload offsets of the large arrays that are in place already, by their number.
        start: first byte of the payload that is free for the others.
    """
    parts.nbytes = start
    for i, array in enumerate(parts.large):
        if i in lent:
            parts.large_specs[i].offset = lent[i]
        else:
            parts.large_specs[i].offset = offset = align(parts.nbytes)
            parts.nbytes = offset + array.nbytes


def copy_arrays(parts: Parts, payload: Any, lent: Container[int] = ()) -> None:
    """Copy the large arrays to their places.

    Args:
        parts: of the message.
        payload: a writable buffer of bytes.
        lent: numbers of the arrays that are in place already.
    """
    for i, array in enumerate(parts.large):
        if i not in lent:
            np.copyto(np.ndarray(array.shape, array.dtype, payload, parts.large_specs[i].offset), array)


def encode_header(sequence: int, parts: Parts) -> bytes:
    """The header of a message.

    Raises:
        PublishError: a text is no valid Unicode.
    """
    try:
        return _encode(Header(VERSION, sequence, parts.specs, parts.fields))
    except UnicodeEncodeError as error:
        raise PublishError(f"A published text cannot be sent: {error}.") from error


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
            description = msgspec.json.encode(np.lib.format.dtype_to_descr(dtype)).decode()
            if dtype_of(description) == dtype:
                return description
    return ""


_AS_IT_IS = frozenset([float, str, bool, bytes, type(None)])


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
            return value if -(2**63) <= value < 2**63 else self.big_int(value)
        if kind in _AS_IT_IS:
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
        if isinstance(value, np.generic) and value.nbytes and dtype_name(value.dtype):
            return msgspec.msgpack.Ext(_SCALAR, _encode([dtype_name(value.dtype), value.tobytes()]))
        if isinstance(value, np.memmap):
            return self.array(np.asarray(value))
        array = blender_array(value)
        return self.pickled(value) if array is None else self.array(array)

    def big_int(self, value: int) -> Any:
        return msgspec.msgpack.Ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))

    def nested(self, value: Any, inner: Any) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise PublishError(
                f"publish({self.key}=...) is nested more than {_MAX_DEPTH} levels deep (or contains itself)."
            )
        result = inner()
        self.depth -= 1
        return result

    def array(self, value: Array) -> Any:
        name = dtype_name(value.dtype)
        if not name:
            return self.pickled(value)
        if value.nbytes <= SMALL_NBYTES:
            return msgspec.msgpack.Ext(_NESTED_SMALL_ARRAY, _encode([name, value.shape, value.tobytes()]))
        self.parts.add(None, name, value)
        self.parts.nested += 1
        return msgspec.msgpack.Ext(_NESTED_ARRAY, _encode(self.parts.nested - 1))

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
        self.parts.pickled = True
        return msgspec.msgpack.Ext(_PICKLE, data)


def blender_array(value: Any) -> Array | None:
    """The content of one of Blender's array-like values as an ndarray; None if `value` is something else."""
    if type(value).__module__ in ("mathutils", "bpy.types", "bpy_types", "builtins"):
        name = type(value).__name__
        if name in ("Vector", "Matrix", "Quaternion", "Euler", "Color", "bpy_prop_array"):
            return np.array(value)
        if name == "Buffer":
            # Rows first in memory, whatever it says: 3.4 exports the strides of the reverse order.
            view = memoryview(value)
            return np.frombuffer(view.tobytes("A"), view.format).reshape(view.shape)
    return None


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
        _this_message.has_references = False
        head = (_trusted_decoder if trusted else _decoder).decode(header)
        if head.version != VERSION:
            raise WireError(
                f"A message has wire format {head.version}, this program understands {VERSION}: "
                f"use the same version of blendtorch-shm on both sides."
            )
        fields = head.fields
        nested: list[Array] = []
        nbytes = 0
        for spec in head.arrays:
            key, offset = spec.key, spec.offset
            if offset >= 0:
                array = _array(spec.dtype, spec.shape, payload, offset)
                nbytes += array.nbytes
                if nbytes > len(payload):  # they may have to be copied
                    raise WireError(f"Arrays of {nbytes} bytes and more do not fit into {len(payload)} bytes.")
            else:
                raw = None if key is None else fields.get(key)
                if type(raw) is not bytes:
                    raise WireError(f"The bytes of the small array {key!r:.80} are a {type(raw).__name__}.")
                array = _array(spec.dtype, spec.shape, bytearray(raw), 0)
            if key is None:
                nested.append(array)
            else:
                fields[key] = array
        return Message(head.sequence, _with_arrays(fields, nested) if _this_message.has_references else fields)
    except WireError:
        raise
    except (
        msgspec.MsgspecError,
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        LookupError,
        MemoryError,
        SystemError,  # NumPy's, for a text that is no Unicode
    ) as error:
        raise WireError(f"{len(header)} bytes are not a valid message header: {error}") from error


@functools.lru_cache(maxsize=1024)
def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype that :func:`dtype_name` described.

    Raises:
        WireError: it is not one that may travel.
    """
    try:
        if len(name) > _MAX_DTYPE:
            raise ValueError(f"its description has {len(name)} characters, {_MAX_DTYPE} are allowed")
        dtype = np.lib.format.descr_to_dtype(_checked(_decode_fields(name) if name.startswith("[") else name))
        if dtype.itemsize <= 0:
            raise ValueError("its elements have no bytes")
    except (msgspec.MsgspecError, ValueError, TypeError, MemoryError, RecursionError, OverflowError) as error:
        raise WireError(f"{name[:80]!r} is not the dtype of an array that may travel: {error}") from error
    return dtype


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


@functools.lru_cache(maxsize=1024)
def _extent(name: str, shape: tuple[int, ...]) -> tuple[np.dtype[Any], int]:
    """The dtype of that name, and how many bytes an array of it and `shape` has.

    Raises:
        WireError: there can be no such array.
    """
    dtype = dtype_of(name)
    if len(shape) > _MAX_NDIM or min(shape, default=0) < 0:
        raise WireError(f"An array of {len(shape)} dimensions, {min(shape, default=0)} the smallest, cannot be.")
    return dtype, math.prod(shape) * dtype.itemsize


def _array(name: str, shape: tuple[int, ...], buffer: Any, offset: int) -> Array:
    dtype, nbytes = _extent(name, shape)
    if offset + nbytes > len(buffer):
        raise WireError(
            f"An array of shape {shape} and dtype {dtype} at {offset} does not fit into {len(buffer)} bytes."
        )
    array: Array = np.ndarray(shape, dtype, buffer, offset)
    return array if array.flags.aligned else array.copy()


class _Reference(NamedTuple):
    """Stands where a nested large array belongs."""

    number: int


class _ThisMessage(threading.local):
    """What decoding the header of a message comes across, for the rest of :func:`decode` in the same thread."""

    has_references = False


_this_message = _ThisMessage()


def _with_arrays(value: Any, arrays: list[Array]) -> Any:
    if type(value) is _Reference:
        return arrays[value.number]
    if type(value) is dict:
        return {k if type(k) is str else _with_arrays(k, arrays): _with_arrays(v, arrays) for k, v in value.items()}
    if type(value) is list:
        return [_with_arrays(v, arrays) for v in value]
    if type(value) is tuple:
        return tuple(_with_arrays(v, arrays) for v in value)
    return value


_small_array_decoder = msgspec.msgpack.Decoder(tuple[str, tuple[int, ...], bytes])
_scalar_decoder = msgspec.msgpack.Decoder(tuple[str, bytes])
_index_decoder = msgspec.msgpack.Decoder(int)


def _extension(code: int, data: memoryview) -> Any:
    if code == _NESTED_ARRAY:
        number = _index_decoder.decode(data)
        if number < 0:
            raise WireError(f"Array {number} does not exist.")
        _this_message.has_references = True
        return _Reference(number)
    if code == _NESTED_SMALL_ARRAY:
        name, shape, raw = _small_array_decoder.decode(data)
        return _array(name, shape, bytearray(raw), 0)
    if code == _TUPLE:
        return tuple(_list_decoder.decode(data))
    if code == _SCALAR:
        name, raw = _scalar_decoder.decode(data)
        return np.frombuffer(raw, dtype_of(name), 1)[0]
    if code == _MAPPING:
        return dict(_pairs_decoder.decode(data))
    if code == _BIG_INT:
        return int.from_bytes(data, "little", signed=True)
    raise WireError(
        "A message from an unauthenticated connection contains a pickle; it was not read."
        if code == _PICKLE
        else f"Extension type {code} is unknown."
    )


def _trusted_extension(code: int, data: memoryview) -> Any:
    if code == _TUPLE:
        return tuple(_trusted_list_decoder.decode(data))
    if code == _MAPPING:
        return dict(_trusted_pairs_decoder.decode(data))
    if code == _PICKLE:
        try:
            return pickle.loads(data)
        except Exception as error:
            raise WireError(f"A published object cannot be unpickled here: {error!r}") from error
    return _extension(code, data)


_decoder = msgspec.msgpack.Decoder(Header, ext_hook=_extension)
_list_decoder = msgspec.msgpack.Decoder(list[Any], ext_hook=_extension)
_pairs_decoder = msgspec.msgpack.Decoder(list[tuple[Any, Any]], ext_hook=_extension)
_trusted_decoder = msgspec.msgpack.Decoder(Header, ext_hook=_trusted_extension)
_trusted_list_decoder = msgspec.msgpack.Decoder(list[Any], ext_hook=_trusted_extension)
_trusted_pairs_decoder = msgspec.msgpack.Decoder(list[tuple[Any, Any]], ext_hook=_trusted_extension)
