"""An item as members of a tar archive: ``.npy`` for each array, ``.json`` for everything else.

The members of item 12 with an image and a list of meshes::

    00000012.image.npy
    00000012.meshes.0.vertices.npy
    00000012.json                       {"btid": 0, "image": {"$array": "image.npy"}, "meshes": [...]}

This is how WebDataset lays out samples, so it reads such files as they are; so do ``tar`` and ``numpy.load``. The ``.json`` is
written last: where it is whole, the item is. A member of a tar archive starts at a multiple of 512 bytes and the header of a
``.npy`` fills a multiple of 64, so every array is aligned in the file, and can be used where it lies.

The last 8 bytes of an item are the checksum (XXH3, 64 bits, as :func:`checksum`) of all its bytes before. They lie behind the
``.json``, where a tar archive fills a block up, so other programs do not see them.

What JSON cannot say is an object with a single key that begins with ``$``:

=============================  ================================================================================================
``{"$array": "image.npy"}``    the array in that member of the item
``{"$file": "jpeg.bin"}``      the bytes in that member
``{"$bytes": "AAE="}``         bytes, in base64
``{"$tuple": [1, 2]}``         a tuple
``{"$dict": [[1, "a"]]}``      a dict by its pairs, where a key is no string, or begins with ``$``
``{"$scalar": ["<f4", 0.5]}``  a NumPy scalar; its bytes in base64 where JSON cannot say the value
``{"$float": "nan"}``          ``nan``, ``inf`` or ``-inf``
``{"$int": "-0x1000"}``        an integer of more than 64 bits, in hexadecimal
``{"$pickle": [..., ...]}``    any other object: what it is, and its pickle in base64
=============================  ================================================================================================
"""

from __future__ import annotations

import ast
import base64
import functools
import math
import pickle
import re
import sys
import tarfile
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from blendtorch_shm.errors import RecordingError
from blendtorch_shm.message.dtypes import UNREADABLE, dtype_name, dtype_of
from blendtorch_shm.message.values import SMALL_NBYTES, NotUnpickled

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

BLOCK = 512
"""Unit of a tar archive: members start at its multiples. POSIX.1-2017, pax, "ustar Interchange Format"."""
KEY_DIGITS = 8
CHECKSUM_NBYTES = 8

_LARGE_NBYTES = 4096
"""Larger members are written from where they lie, in an order of their own."""
READ_NBYTES = 2**16
"""What is left of an item is read in one piece when it is no more than this; a mapping would cost more."""
_HEAD_NBYTES = 2 * BLOCK
"""A member's header, and that of most ``.npy`` files."""
_MAX_DEPTH = 64
_MAX_NDIM = 64
_MAX_NPY_HEADER = 2**16
_NAME_LENGTH = 64
_NPY = b"\x93NUMPY"

BAD_ITEM = (*UNREADABLE, SyntaxError)
"""What reading bytes that are not an item may raise."""


# -- writing ----------------------------------------------------------------------------------------------------


def item_members(number: int, fields: Mapping[str, Any], mtime: int) -> tuple[list[Any], int]:
    """The members of an item, ready to be written. Large arrays are not copied.

    Args:
        number: of the item in its file.
        fields: the item.
        mtime: what the members say about their age, in seconds since 1970.

    Returns:
        the buffers to write one after the other, and their size in bytes, a multiple of :data:`BLOCK`.

    Raises:
        RecordingError: a value is nested too deep, cannot be pickled, or is no valid Unicode.
    """
    members = _Members(number, mtime)
    value = members.describe(dict(fields), "")
    try:
        text = msgspec.json.encode(value)
    except UnicodeEncodeError as error:
        raise RecordingError(f"A text cannot be recorded: {error}.") from error
    return members.finish(text)


class _Members:
    """Describes one value after another, and collects the members of those that JSON does not hold."""

    def __init__(self, number: int, mtime: int) -> None:
        self._key = b"%0*d" % (KEY_DIGITS, number)
        self._mtime = mtime
        self._names: set[str] = set()
        self._large: list[Any] = []
        self._small: list[Any] = []
        self._pad = b""  # behind the last of the large ones
        self._nbytes = 0
        self._depth = 0

    def describe(self, value: Any, path: str) -> Any:
        """`value` as JSON can say it; `path` is where it stands in the item, for the names of members."""
        kind = type(value)
        if kind is str or kind is bool or value is None:
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**63 else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is np.ndarray:
            return self._array(value, path)
        if kind is dict or kind is list or kind is tuple:
            return self._nested(value, path)
        if kind is bytes:
            if len(value) <= SMALL_NBYTES:
                return {"$bytes": _base64(value)}
            name = self._name(path, "bin")
            self.add(name, b"", value, len(value))
            return {"$file": name}
        if isinstance(value, np.generic) and value.nbytes and (dtype := dtype_name(value.dtype)):
            plain = value.dtype.kind in "iuf" and value.dtype.itemsize <= 8 and bool(np.isfinite(value))
            return {"$scalar": [dtype, value.item() if plain else _base64(value.tobytes())]}
        if isinstance(value, np.memmap):
            return self._array(np.asarray(value), path)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return self._array(value.detach().cpu().numpy(), path)
        return self._pickled(value, path)

    def _nested(self, value: Any, path: str) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise RecordingError(f"{path[:60]}... is nested more than {_MAX_DEPTH} levels deep (or contains itself).")
        result: Any
        if type(value) is dict:
            if all(type(key) is str and key[:1] != "$" for key in value):
                result = {k: self.describe(v, f"{path}.{k}" if path else k) for k, v in value.items()}
            else:
                pairs = []
                for k, v in value.items():
                    pairs.append([self.describe(k, path), self.describe(v, f"{path}.{k}" if type(k) is str else path)])
                result = {"$dict": pairs}
        else:
            result = [self.describe(v, f"{path}.{i}") for i, v in enumerate(value)]
            if type(value) is tuple:
                result = {"$tuple": result}
        self._depth -= 1
        return result

    def _array(self, value: Array, path: str) -> Any:
        header = _npy_header(value.dtype, value.shape)
        if not header:
            return self._pickled(value, path)
        name = self._name(path, "npy")
        flat = np.asarray(value, order="C").reshape(-1).view(np.uint8)
        self.add(name, header, flat, flat.nbytes)
        return {"$array": name}

    def _pickled(self, value: Any, path: str) -> Any:
        what = f"{type(value).__module__}.{type(value).__qualname__}"
        try:
            data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise RecordingError(f"{path} contains a {what}, which cannot be pickled: {error}.") from error
        return {"$pickle": [what, _base64(data)]}

    def _name(self, path: str, extension: str) -> str:
        """A name that no other member of the item has, also where case does not count."""
        stem = safe = _safe_name(path)
        number = 1
        while f"{safe}.{extension}".lower() in self._names:
            number += 1
            safe = f"{stem}-{number}"
        name = f"{safe}.{extension}"
        self._names.add(name.lower())
        return name

    def add(self, name: str, head: bytes, body: Any, body_nbytes: int) -> None:
        """Append a member of two parts. The large ones come before all others, which a reader can then take in one piece."""
        nbytes = len(head) + body_nbytes
        header = member_header(self._key, name, nbytes, self._mtime)
        pad = bytes(-nbytes % BLOCK)
        self._nbytes += BLOCK + nbytes + len(pad)
        if body_nbytes > _LARGE_NBYTES and name != "json":
            self._large += [b"".join([self._pad, header, head]), body]
            self._pad = pad
        else:
            self._small += [header, head, body, pad]

    def finish(self, text: bytes) -> tuple[list[Any], int]:
        """Everything that was added, then the ``.json`` with this text, then the checksum."""
        room = -len(text) % BLOCK
        if room < CHECKSUM_NBYTES:  # JSON may end with spaces
            text += b" " * (room + 1)
        self.add("json", b"", text, len(text))
        self._small[-1] = self._small[-1][:-CHECKSUM_NBYTES]
        buffers = [*self._large, b"".join([self._pad, *self._small])]
        hasher = xxhash.xxh3_64()
        for buffer in buffers:
            hasher.update(buffer)
        return [*buffers, hasher.digest()], self._nbytes


def checksum(data: bytes | bytearray | memoryview) -> bytes:
    """Of some bytes, (8,)."""
    return xxhash.xxh3_64_digest(data)


def padded(nbytes: int) -> int:
    """The room that a member of this size takes."""
    return nbytes + -nbytes % BLOCK


def member_header(key: bytes, name: str, nbytes: int, mtime: int) -> bytes:
    """The block before a member of an item."""
    start, end, total = _header_template(name, nbytes, mtime)
    return b"%b%b%06o\0 %b" % (key, start, total + sum(key), end)


@functools.lru_cache(maxsize=4096)
def _header_template(name: str, nbytes: int, mtime: int) -> tuple[bytes, bytes, int]:
    """The parts of a header around its checksum, without the key; and the checksum so far."""
    info = tarfile.TarInfo("0" * KEY_DIGITS + "." + name)
    info.size, info.mtime, info.mode = nbytes, mtime, 0o644
    block = info.tobuf(tarfile.USTAR_FORMAT if nbytes < 8**11 else tarfile.GNU_FORMAT, "ascii", "strict")
    start, end = block[KEY_DIGITS:148], block[156:]
    return start, end, sum(start) + 8 * ord(" ") + sum(end)


@functools.lru_cache(maxsize=1024)
def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of a ``.npy`` file, of the first version that can say it; b"" if none can.

    https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    if not dtype_name(dtype):
        return b""
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    return npy_header(repr(description), 64)


def npy_header(text: str, align: int, nbytes: int = 0) -> bytes:
    """The header of a ``.npy`` file with this description. With `nbytes` more behind it, it fills a multiple of `align`."""
    version, length_nbytes = (1, 2) if len(text) < 2**15 else (2, 4)
    encoded = text.encode("latin1" if text.isascii() else "utf8")
    if not text.isascii():
        version, length_nbytes = 3, 4
    start = len(_NPY) + 2 + length_nbytes
    encoded += b" " * (-(start + len(encoded) + 1 + nbytes) % align) + b"\n"
    return _NPY + bytes([version, 0]) + len(encoded).to_bytes(length_nbytes, "little") + encoded


@functools.lru_cache(maxsize=1024)
def _safe_name(path: str) -> str:
    """`path` with only such characters as every file system takes."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", path)[:_NAME_LENGTH].strip(".") or "value"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# -- reading ----------------------------------------------------------------------------------------------------


def parse_header(block: bytes | bytearray) -> tuple[str, int]:
    """Name and size of the member that this block stands before.

    Raises:
        ValueError: it is no such block.
    """
    if block[257:262] != b"ustar":
        raise ValueError("these bytes are not the header of a member of a tar archive")
    field = block[124:136]
    try:
        nbytes = int(field[:11], 8)
    except ValueError:
        try:
            nbytes = tarfile.nti(field)  # type: ignore[attr-defined]  # of 8 GiB and more
        except tarfile.HeaderError as error:
            raise ValueError("a member has no size") from error
    if nbytes < 0:
        raise ValueError(f"a member of {nbytes} bytes cannot be")
    return block[:100].split(b"\0", 1)[0].decode("latin1"), nbytes


def has_checksum(block: bytes) -> bool:
    """Whether a header is as it was written: it says the sum of its bytes, those of the sum itself being spaces."""
    try:
        said = int(block[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    total = said + sum(block[148:156]) - 8 * ord(" ")
    return zlib.adler32(block) % 2**16 == (1 + total) % 65521  # half of Adler-32 is that very sum


class Source(Protocol):
    """The bytes of an item, somewhere."""

    nbytes: int

    def read(self, start: int, nbytes: int) -> bytearray:
        """Some of them, to keep. Raises ValueError if there are no such bytes."""

    def mapped(self) -> Bytes:
        """All of them, (nbytes,) uint8, writable, without having been read."""


def read_item(source: Source, *, allow_pickle: bool) -> dict[str, Any]:
    """Put an item together again. Its large arrays are views of what `source` has mapped.

    Args:
        source: the members of the item.
        allow_pickle: whether pickled objects may be read.

    Raises:
        RecordingError: it contains a pickle that may not be read, or that cannot be read here.
        Exception: one of :data:`BAD_ITEM`; this is not an item.
    """
    members: dict[str, _Member] = {}
    nbytes = source.nbytes
    at = piece_start = 0
    piece = bytearray()
    while at < nbytes:
        if at + _HEAD_NBYTES > piece_start + len(piece) < nbytes:
            left = nbytes - at
            piece, piece_start = source.read(at, left if left <= READ_NBYTES else _HEAD_NBYTES), at
        name, size = parse_header(piece[at - piece_start : at - piece_start + BLOCK])
        at += BLOCK
        members[name.partition(".")[2]] = (at, size, piece, piece_start)
        at += padded(size)
        if at > nbytes:
            raise ValueError(f"{name[:80]} goes beyond the item's end")
    restore = _Restore(source, members, allow_pickle)
    description = restore.bytes_of("json")
    try:
        fields = restore(msgspec.json.decode(description))
    except NotUnpickled as error:
        raise RecordingError(error.said_with_its_field(_decode_one_by_one, bytes(description))) from error
    if type(fields) is not dict:
        raise ValueError(f"its .json holds a {type(fields).__name__}")
    return fields


_Member = tuple[int, int, bytearray, int]
"""Where it is in the item and how long; a piece of the item that has at least its beginning, and where that is."""


_CONTAINERS = (dict, list)
_decode_one_by_one = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class _Restore:
    """Turns what :meth:`_Members.describe` said into the value again."""

    def __init__(self, source: Source, members: dict[str, _Member], allow_pickle: bool) -> None:
        self._source = source
        self._mapped: Bytes | None = None
        self._members = members
        self._allow_pickle = allow_pickle

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind is dict:
            if len(value) == 1:
                for key, inner in value.items():
                    if key[:1] == "$":
                        return self._tagged(key, inner)
            return {k: self(v) if type(v) in _CONTAINERS else v for k, v in value.items()}
        if kind is list:
            return [self(v) for v in value]
        return value

    def _tagged(self, tag: str, value: Any) -> Any:
        if tag == "$array":
            return self._array(value)
        if tag == "$tuple":
            return tuple([self(v) for v in value])
        if tag == "$scalar":
            dtype = dtype_of(value[0])
            if dtype.kind in "iuf" and type(value[1]) in (int, float):
                return dtype.type(value[1])
            return np.frombuffer(base64.b64decode(value[1], validate=True), dtype, 1)[0]
        if tag == "$bytes":
            return base64.b64decode(value, validate=True)
        if tag == "$file":
            return bytes(self.bytes_of(value))
        if tag == "$dict":
            return {self(k): self(v) for k, v in value}
        if tag == "$float" and value in ("nan", "inf", "-inf"):
            return float(value)
        if tag == "$int":
            return int(value, 16)
        if tag == "$pickle":
            return self._unpickle(*value)
        raise ValueError(f"{tag[:80]} is not known")

    def _take(self, name: str) -> _Member:
        """A member; each has one place in the item."""
        member = self._members.pop(name, None)
        if member is None:
            raise ValueError(f"it has no member {name!r:.80}")
        return member

    def bytes_of(self, name: str) -> bytearray:
        """What is in a member."""
        start, nbytes, piece, piece_start = self._take(name)
        at = start - piece_start
        return piece[at : at + nbytes] if at + nbytes <= len(piece) else self._source.read(start, nbytes)

    def _array(self, name: str) -> Array:
        start, nbytes, piece, piece_start = self._take(name)
        at = start - piece_start
        if at + nbytes <= len(piece):
            return read_npy(piece, at, nbytes, piece[at : at + min(nbytes, BLOCK)])
        if self._mapped is None:
            self._mapped = self._source.mapped()
        return read_npy(self._mapped, start, nbytes, piece[at:])

    def _unpickle(self, what: str, data: str) -> Any:
        if not self._allow_pickle:
            raise RecordingError(
                f"it contains a pickled object ({what[:200]}), and reading a pickle can run any program. If you trust whoever "
                f"made this file, pass allow_pickle=True."
            )
        raw = base64.b64decode(data, validate=True)
        try:
            return pickle.loads(raw)
        except Exception as error:
            raise NotUnpickled(f"a {what[:200]}", data.encode(), error) from error


def read_npy(data: bytearray | Bytes, start: int, nbytes: int, beginning: bytearray) -> Array:
    """The array in the ``.npy`` file at `data[start : start + nbytes]`: a view of it, or a copy of up to SMALL_NBYTES.

    Args:
        data: writable.
        start, nbytes: of the file, all of which is there.
        beginning: some bytes from `start` on; to read them in a mapping costs a page fault.

    Raises:
        Exception: one of :data:`BAD_ITEM`; this is no such file.
    """
    length_nbytes = 2 if beginning[6] == 1 else 4
    header_nbytes = 8 + length_nbytes + int.from_bytes(beginning[8 : 8 + length_nbytes], "little")
    if header_nbytes > min(nbytes, _MAX_NPY_HEADER):
        raise ValueError("an array has no header as in .npy files")
    if header_nbytes > len(beginning):
        beginning = bytearray(data[start : start + header_nbytes])
    dtype, shape, order, size = _parse_npy_header(bytes(beginning[:header_nbytes]))
    if size != nbytes - header_nbytes:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} does not fill {nbytes - header_nbytes} bytes")
    array: Array = np.ndarray(shape, dtype, data, start + header_nbytes, order=order)
    return array if size > SMALL_NBYTES and array.flags.aligned else array.copy(order="K")


@functools.lru_cache(maxsize=256)
def _parse_npy_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], Any, int]:
    """dtype, shape, order in memory, and bytes. NumPy's own reader does not check what it is told, and some would crash it."""
    if header[:6] != _NPY:
        raise ValueError("an array has no header as in .npy files")
    text = (
        header[10:].decode("latin1") if header[6] == 1 else header[12:].decode("utf8" if header[6] == 3 else "latin1")
    )
    said = ast.literal_eval(text.strip())
    description, shape = said["descr"], said["shape"]
    dtype = dtype_of(description if isinstance(description, str) else msgspec.json.encode(description).decode())
    if type(shape) is not tuple or len(shape) > _MAX_NDIM or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError(f"{shape!r:.80} is not the shape of an array")
    return dtype, shape, "F" if said["fortran_order"] else "C", math.prod(shape) * dtype.itemsize
