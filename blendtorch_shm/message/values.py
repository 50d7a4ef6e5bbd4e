"""What can stand in a message, and as which msgpack.

msgpack knows None, booleans, integers of 64 bits, floats, strings, bytes, lists, and dicts with string keys. Tuples, NumPy
scalars, other dicts, larger integers and arrays inside of all these are extension types of this module. Any other object is
pickled, and only read where the connection is trusted.

An array that is larger than :data:`SMALL_NBYTES` is not in the msgpack: only its number is.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from ..errors import PublishError, WireError
from .dtypes import UNREADABLE, Array, dtype_name, dtype_of, extent

SMALL_NBYTES = 2048
"""Arrays up to this many bytes travel among the fields, and arrive as copies."""

_LARGE_ARRAY, _SMALL_ARRAY, _TUPLE, _SCALAR, _MAPPING, _PICKLE, _BIG_INT = range(1, 8)
_MAX_DEPTH = 64
AS_IT_IS = frozenset([float, str, bool, bytes, type(None)])
"""Types that msgpack knows, whatever the value."""

_Ext = msgspec.msgpack.Ext
encode = msgspec.msgpack.Encoder().encode


# -- writing ----------------------------------------------------------------------------------------------------


class ValueWriter:
    """Turns the fields of one message into what msgpack can say.

    Args:
        trusted: whether what msgpack cannot say may be pickled.

    Attributes:
        large: the large arrays that it came across.
        pickled: whether anything had to be pickled.
    """

    def __init__(self, *, trusted: bool) -> None:
        self.large: list[Array] = []
        self.pickled = False
        self._trusted = trusted
        self._key = ""
        self._depth = 0

    def field(self, key: str, value: Any) -> Any:
        """One field's value.

        Raises:
            PublishError: it needs pickle and the connection is not trusted, it cannot be pickled, or it is nested too deep.
        """
        self._key = key
        try:
            return self._value(value)
        except UnicodeEncodeError as error:
            raise PublishError(f"publish({key}=...) contains a text that cannot be sent: {error}.") from error

    def _value(self, value: Any) -> Any:
        kind = type(value)
        if kind is np.ndarray:
            return self._array(value)
        if kind in AS_IT_IS:
            return value
        if kind is int:
            if -(2**63) <= value < 2**63:
                return value
            return _Ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
        if kind is dict:
            if all(type(key) is str for key in value):
                return self._nested(lambda: {k: self._value(v) for k, v in value.items()})
            pairs = self._nested(lambda: [[self._value(k), self._value(v)] for k, v in value.items()])
            return _Ext(_MAPPING, encode(pairs))
        if kind is list:
            return self._nested(lambda: [self._value(v) for v in value])
        if kind is tuple:
            return _Ext(_TUPLE, encode(self._nested(lambda: [self._value(v) for v in value])))
        if isinstance(value, np.generic) and value.nbytes and (name := dtype_name(value.dtype)):
            return _Ext(_SCALAR, encode([name, value.tobytes()]))
        if isinstance(value, np.memmap):
            return self._array(np.asarray(value))
        array = blender_array(value)
        return self._pickle(value) if array is None else self._array(array)

    def _nested(self, inner: Callable[[], Any]) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise PublishError(
                f"publish({self._key}=...) is nested more than {_MAX_DEPTH} levels deep (or contains itself)."
            )
        result = inner()
        self._depth -= 1
        return result

    def _array(self, value: Array) -> Any:
        name = dtype_name(value.dtype)
        if not name:
            return self._pickle(value)
        if value.nbytes <= SMALL_NBYTES:
            return _Ext(_SMALL_ARRAY, encode([name, value.shape, value.tobytes()]))
        self.large.append(value)
        return _Ext(_LARGE_ARRAY, encode(len(self.large) - 1))

    def _pickle(self, value: Any) -> Any:
        what = f"publish({self._key}=...) contains a {type(value).__module__}.{type(value).__qualname__}"
        if not self._trusted:
            raise PublishError(
                f"{what}, which only pickle can carry, and nothing is unpickled from an unauthenticated TCP connection. "
                f"Publish arrays, numbers, strings, bytes, lists, tuples and dicts of them, or start the script through "
                f"BlenderLauncher on the host that consumes."
            )
        try:
            data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise PublishError(f"{what}, which cannot be pickled: {error}.") from error
        if b"__main__" in data and (name := _name_from_main(data)):
            raise PublishError(
                f"{what}, which no reader can open: {name!r} is defined in the script itself, which nobody else can import. "
                f"Define it in a module that both sides import (a file beside the script, for example), or publish arrays, "
                f"numbers, strings, bytes, lists, tuples and dicts of them."
            )
        self.pickled = True
        return _Ext(_PICKLE, data)


def _name_from_main(pickled: bytes) -> str:
    """The first class, function or the like that a pickle takes from the module ``__main__``; "" if there is none."""
    memo: dict[Any, Any] = {}
    before = last = None  # what was pushed: for a name, first the module
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        elif opcode.name == "STACK_GLOBAL":
            if before == "__main__":
                return str(last)
        else:
            before, last = last, memo[argument] if opcode.name in ("BINGET", "LONG_BINGET") else argument
    return ""


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

_decode_small_array = msgspec.msgpack.Decoder(tuple[str, tuple[int, ...], bytes]).decode
_decode_scalar = msgspec.msgpack.Decoder(tuple[str, bytes]).decode
_decode_number = msgspec.msgpack.Decoder(int).decode
decode_one_by_one = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode
"""Of a message's fields, the encoded value of each."""


class NotUnpickled(WireError):
    """An object that another process pickled cannot be made here. Says why, and what to do.

    Args:
        what: it is, for people.
        encoded: the object, as it stands among the fields of its message.
        error: what was raised.
    """

    def __init__(self, what: str, encoded: bytes, error: Exception) -> None:
        why = f"{error!r}."
        if isinstance(error, ModuleNotFoundError) and error.name:
            why = (
                f"it needs the module {error.name!r}, which this Python does not find. Install it (pip install "
                f"{error.name.partition('.')[0]}, as a rule), or, if it is your own, have it where this program finds it."
            )
        elif isinstance(error, AttributeError):
            why = f"{error}. Is that module the same on both sides?"
        super().__init__(f"{what} cannot be unpickled here: {why}")
        self._encoded = encoded

    def said_with_its_field(self, decode_one_by_one: Callable[[bytes], dict[str, msgspec.Raw]], fields: bytes) -> str:
        """What there is to say, with the key of the field that the object is in, of these fields of its message."""
        with contextlib.suppress(*UNREADABLE):  # what comes behind the object may be no message at all
            for key, value in decode_one_by_one(fields).items():
                if self._encoded in bytes(value):
                    return f"Field {key!r}: {self}"
        return str(self)


class ValueReader:
    """Turns msgpack into the fields of one message after another.

    Args:
        trusted: whether pickled objects may be read.

    Attributes:
        fields: turns bytes into the fields of a message without large arrays deeper inside of them. Raises WireError, or another
            exception, since any bytes may come.
    """

    def __init__(self, *, trusted: bool) -> None:
        self._trusted = trusted
        self._large: Sequence[Array] = ()  # of the message that is being read
        hook = self._extension
        self.fields = msgspec.msgpack.Decoder(dict[str, Any], ext_hook=hook).decode
        self._decode_list = msgspec.msgpack.Decoder(list[Any], ext_hook=hook).decode
        self._decode_pairs = msgspec.msgpack.Decoder(list[tuple[Any, Any]], ext_hook=hook).decode

    def fields_around(self, large: Sequence[Array], data: bytes) -> dict[str, Any]:
        """The fields of a message that has these arrays deeper inside of them, as :attr:`ValueWriter.large` had."""
        self._large = large
        try:
            return self.fields(data)
        finally:
            self._large = ()

    def _extension(self, code: int, data: memoryview) -> Any:
        if code == _LARGE_ARRAY:
            number = _decode_number(data)
            if not 0 <= number < len(self._large):
                raise WireError(f"Array {number} is named, and the message has {len(self._large)} nested ones.")
            return self._large[number]
        if code == _SMALL_ARRAY:
            name, shape, raw = _decode_small_array(data)
            dtype, nbytes = extent(name, shape)
            if len(raw) != nbytes:
                raise WireError(f"{len(raw)} bytes are no array of shape {shape} and dtype {dtype}.")
            return np.ndarray(shape, dtype, bytearray(raw))
        if code == _TUPLE:
            return tuple(self._decode_list(data))
        if code == _SCALAR:
            name, raw = _decode_scalar(data)
            return np.frombuffer(raw, dtype_of(name), 1)[0]
        if code == _MAPPING:
            return dict(self._decode_pairs(data))
        if code == _BIG_INT:
            return int.from_bytes(data, "little", signed=True)
        if code == _PICKLE:
            if not self._trusted:
                raise WireError("A message from an unauthenticated connection contains a pickle; it was not read.")
            try:
                return pickle.loads(data)
            except Exception as error:
                raise NotUnpickled("an object", bytes(data), error) from error
        raise WireError(f"Extension type {code} is unknown.")
