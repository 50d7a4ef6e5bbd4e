"""The bytes of a message. Typed and validated; arrays are never pickled.

A *message* is the dict that a script publishes. It becomes a payload, the raw bytes of its large arrays, each 64-byte aligned,
and a header::

    form      version of the format, bytes of the specs (little-endian u32 each)
              specs: msgpack of keys, dtypes and shapes of the arrays
    offsets   where each large array begins in the payload (little-endian u64 each)
    fields    msgpack of everything else, see values.py; None where a large array stood, bytes where a small one did

The form is the same bytes in every message that has the same arrays, only with other values. So who receives compares it with
the last one's, and understands and checks its specs again only if it differs. The length of a header does not depend on the
offsets: a message is encoded before it is known where its arrays will lie.

In shared memory the payload lies at the start of a slot and the header right behind it; over TCP they are the two frames of one
ZeroMQ message. The number of a message within its stream is not in it: it stands in the slot's record, or in TCP's stamp.

Arrays up to :data:`~.values.SMALL_NBYTES` travel among the fields and arrive as copies, so that keeping a label does not keep a
picture's slot occupied.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import PublishError, WireError
from ..memory.layout import VERSION, align
from .dtypes import UNREADABLE, Array, dtype_name, extent
from .values import AS_IT_IS, SMALL_NBYTES, NotUnpickled, ValueReader, ValueWriter, decode_one_by_one, encode

_PREFIX = struct.Struct("<II")
_ArraySpec = tuple[str | None, str, tuple[int, ...], bool]
"""Of an array: the field that it is, or None if it is deeper inside one; name of its dtype; shape; whether it is large."""
_decode_specs = msgspec.msgpack.Decoder(list[_ArraySpec]).decode


class Message(NamedTuple):
    """A message as it was published, and its unbroken number within its stream."""

    sequence: int
    fields: dict[str, Any]


# -- writing ----------------------------------------------------------------------------------------------------


class Parts(msgspec.Struct):
    """A message taken apart by an :class:`Encoder`: encoded, its large arrays not yet copied.

    >>> parts = Encoder(trusted=True).take_apart({"image": image, "frame": 3})
    >>> payload = np.empty(parts.nbytes, np.uint8)
    >>> parts.copy_into(payload)
    >>> Decoder(trusted=True).decode(parts.header(), payload)["frame"]
    3

    Attributes:
        large: the arrays that do not travel in the header: those that are a field, then those deeper inside one.
        offsets: where they lie in the payload: one after the other, unless :meth:`place` decides otherwise.
        nbytes: size of the payload.
        form: first part of the header.
        pack: makes its second part from the offsets.
        fields: its last part.
        pickled: whether anything had to be pickled.
        in_place: numbers of the arrays that lie in the payload already.
    """

    large: list[Array]
    offsets: list[int]
    nbytes: int
    form: bytes
    pack: Callable[..., bytes]
    fields: bytes
    pickled: bool
    in_place: Container[int] = ()

    @property
    def header_nbytes(self) -> int:
        """Size of the header, wherever the arrays lie."""
        return len(self.form) + 8 * len(self.large) + len(self.fields)

    def place(self, in_place: Mapping[int, int], start: int) -> None:
        """Decide anew where the large arrays lie in the payload.

        Args:
            in_place: offsets of those that lie there already, by their number in :attr:`large`.
            start: first byte of the payload that is free for the others.
        """
        self.in_place = in_place
        self.nbytes = start
        for i, array in enumerate(self.large):
            if i in in_place:
                self.offsets[i] = in_place[i]
            else:
                self.offsets[i] = align(self.nbytes)
                self.nbytes = self.offsets[i] + array.nbytes

    def header(self) -> bytes:
        """The header of the message."""
        return self.form + self.pack(*self.offsets) + self.fields

    def copy_into(self, payload: Any) -> None:
        """Copy the large arrays to their places, but for those that lie there already.

        Args:
            payload: a writable buffer of :attr:`nbytes` bytes or more.
        """
        for i, array in enumerate(self.large):
            if i not in self.in_place:
                np.copyto(np.ndarray(array.shape, array.dtype, payload, self.offsets[i]), array)


class Encoder:
    """Takes the messages of one stream apart, one after another.

    Args:
        trusted: whether objects may be pickled.
    """

    def __init__(self, *, trusted: bool) -> None:
        self._trusted = trusted
        self._last = _form([])  # replaced as a whole: a signal's handler may publish at any point

    def take_apart(self, fields: Mapping[str, Any]) -> Parts:
        """Separate a message's large arrays from the rest of it, and encode the rest. No large array is copied.

        Raises:
            PublishError: a value needs pickle and the connection is not trusted, it cannot be pickled, it is nested too deep, or
                a text is no valid Unicode.
        """
        specs: list[_ArraySpec] = []
        large: list[Array] = []
        rest = dict(fields)
        writer: ValueWriter | None = None
        for key, value in fields.items():
            kind = type(value)
            if kind is np.ndarray and (name := dtype_name(value.dtype)):
                is_large = value.nbytes > SMALL_NBYTES
                specs.append((key, name, value.shape, is_large))
                if is_large:
                    large.append(value)
                    rest[key] = None
                else:
                    rest[key] = value.tobytes()
            elif not (-(2**63) <= value < 2**63 if kind is int else kind in AS_IT_IS):
                writer = writer or ValueWriter(trusted=self._trusted)
                rest[key] = writer.field(key, value)
        if writer is not None:
            specs += [(None, dtype_name(array.dtype), array.shape, True) for array in writer.large]
            large += writer.large
        offsets: list[int] = []
        nbytes = 0
        for array in large:
            offset = align(nbytes)
            offsets.append(offset)
            nbytes = offset + array.nbytes
        last = self._last
        try:
            if last[0] != specs:
                last = self._last = _form(specs)
            encoded = encode(rest)
        except UnicodeEncodeError as error:
            raise PublishError(f"A published text cannot be sent: {error}.") from error
        _, form, pack = last
        return Parts(large, offsets, nbytes, form, pack, encoded, writer is not None and writer.pickled)


def _form(specs: list[_ArraySpec]) -> tuple[list[_ArraySpec], bytes, Callable[..., bytes]]:
    """These arrays, the form of a message with them, and what packs the offsets of the large ones."""
    encoded = encode(specs)
    offsets = struct.Struct(f"<{sum(is_large for *_, is_large in specs)}Q")
    return specs, _PREFIX.pack(VERSION, len(encoded)) + encoded, offsets.pack


# -- reading ----------------------------------------------------------------------------------------------------


class _Form:
    """The form of a message, understood and checked.

    Attributes:
        head: its bytes.
        nbytes: of all large arrays together.
        large: each large array that is a field: its number among all large ones, key, shape, dtype and size.
        nested: each large array deeper inside a field: its number, shape, dtype and size.
        small: each small array: its key, shape, dtype and size.
        unpack_offsets: from a header, given where they begin.
        fields_at: where the fields begin in a header.
    """

    __slots__ = ("fields_at", "head", "large", "nbytes", "nested", "small", "unpack_offsets")

    def __init__(self, header: bytes) -> None:
        version, specs_nbytes = _PREFIX.unpack_from(header)
        if version != VERSION:
            raise WireError(
                f"A message has wire format {version}, this program understands {VERSION}: "
                f"use the same version of blendtorch-shm on both sides."
            )
        self.head = header[: _PREFIX.size + specs_nbytes]
        if len(self.head) < _PREFIX.size + specs_nbytes:
            raise WireError(f"A message header of {len(header)} bytes says that its specs alone have {specs_nbytes}.")
        self.nbytes = 0
        self.large: list[tuple[int, str, tuple[int, ...], np.dtype[Any], int]] = []
        self.nested: list[tuple[int, tuple[int, ...], np.dtype[Any], int]] = []
        self.small: list[tuple[str, tuple[int, ...], np.dtype[Any], int]] = []
        for key, name, shape, is_large in _decode_specs(self.head[_PREFIX.size :]):
            try:
                dtype, nbytes = extent(name, shape)
            except WireError as error:
                raise WireError(f"Field {key!r}: {error}" if key is not None else str(error)) from error
            if is_large:
                self.nbytes += nbytes
                number = len(self.large) + len(self.nested)
                if key is None:
                    self.nested.append((number, shape, dtype, nbytes))
                else:
                    self.large.append((number, key, shape, dtype, nbytes))
            elif key is None:
                raise WireError("A small array is no field of the message.")
            else:
                self.small.append((key, shape, dtype, nbytes))
        offsets = struct.Struct(f"<{len(self.large) + len(self.nested)}Q")
        self.unpack_offsets = offsets.unpack_from
        self.fields_at = len(self.head) + offsets.size


class Decoder:
    """Puts the messages of one stream or connection together again, one after another.

    Args:
        trusted: whether pickled objects may be read.
    """

    def __init__(self, *, trusted: bool) -> None:
        self._values = ValueReader(trusted=trusted)
        self._form: _Form | None = None  # of the last message

    def decode(self, header: bytes, payload: npt.NDArray[np.uint8], *, is_second_try: bool = False) -> dict[str, Any]:
        """The fields of a message. Its large arrays are views of `payload`, writable if that is; see :class:`Parts`.

        Args:
            header: as made by :meth:`Parts.header`.
            payload: (n,) uint8, the bytes of the large arrays.
            is_second_try: whether what is raised is the message's fault for sure, and not a signal handler's.

        Raises:
            WireError: these bytes are not a valid message, or it contains a pickle and is not trusted.
        """
        try:
            form = self._form
            if form is None or not header.startswith(form.head):
                form = self._form = _Form(header)
            room = len(payload)
            if form.nbytes > room:  # they may have to be copied
                raise WireError(f"Arrays of {form.nbytes} bytes do not fit into {room} bytes.")
            offsets = form.unpack_offsets(header, len(form.head))
            if form.nested:
                nested = [
                    _view(payload, offsets[number], shape, dtype, nbytes)
                    for number, shape, dtype, nbytes in form.nested
                ]
                fields = self._values.fields_around(nested, header[form.fields_at :])
            else:
                fields = self._values.fields(header[form.fields_at :])
            for number, key, shape, dtype, nbytes in form.large:  # as _view does, without the time of a call
                offset = offsets[number]
                if offset + nbytes > room:
                    raise WireError(f"An array of {nbytes} bytes at {offset} does not fit into {room} bytes.")
                array = np.ndarray(shape, dtype, payload, offset)
                fields[key] = array if array.flags.aligned else array.copy()
            for key, shape, dtype, nbytes in form.small:
                raw = fields.get(key)
                if type(raw) is not bytes or len(raw) != nbytes:
                    raise WireError(f"A {type(raw).__name__} is not the {nbytes} bytes of the small array {key!r:.80}.")
                fields[key] = np.ndarray(shape, dtype, bytearray(raw))
            return fields
        except UNREADABLE as error:
            if not is_second_try:
                self.decode(header, payload, is_second_try=True)
                # It can be read: what was raised is a signal handler's, or of ours because of it.
                raise (error.__cause__ or error) if isinstance(error, WireError) else error  # noqa: B904  # its cause stays
            if isinstance(error, NotUnpickled):
                assert form is not None
                raise WireError(error.said_with_its_field(decode_one_by_one, header[form.fields_at :])) from error
            if isinstance(error, WireError):
                raise
            raise WireError(f"{len(header)} bytes are not a valid message header: {error}") from error


def _view(
    payload: npt.NDArray[np.uint8], offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], nbytes: int
) -> Array:
    if offset + nbytes > len(payload):
        raise WireError(f"An array of {nbytes} bytes at {offset} does not fit into {len(payload)} bytes.")
    array: Array = np.ndarray(shape, dtype, payload, offset)
    return array if array.flags.aligned else array.copy()
