"""The scene's file: which Blender saved it, and what it refers to that is not there.

Blender says both in its log at most, and goes on: with pink textures, and without what should come from a library.
"""

from __future__ import annotations

import ctypes
import glob
import gzip
import io
import os
import re
from collections.abc import Iterator
from importlib import import_module, util
from typing import IO, Any

import bpy

_HEADER = re.compile(rb"BLENDER(?:[-_][vV](\d)(\d\d)|\d\d-\d\dv(\d\d)(\d\d))")
"""The first bytes of a file: ``BLENDER-v405``, or from 5.0 on ``BLENDER17-01v0502``."""
_HEADER_NBYTES = 17
_GZIP, _ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ZSTANDARD_NBYTES = 2**18
"""Of a compressed file: more than its first block."""
_KINDS = {
    "libraries": "library",
    "images": "image",
    "movieclips": "movie clip",
    "fonts": "font",
    "volumes": "volume",
    "cache_files": "cache file",
}
"""Collections of `bpy.data` with blocks that refer to files; what such a block is called."""
_TILES = re.compile("<UDIM>|<UVTILE>")
_LISTED = 8


def saved_by(path: str) -> tuple[int, int] | None:
    """The version of Blender that saved a file, by its first bytes.

    Args:
        path: of the file, compressed or not.

    Returns:
        such as ``(5, 2)``. None: this cannot be read, or is no file of Blender's.
    """
    try:
        with open(path, "rb") as file:
            start = _decompressed(file).read(_HEADER_NBYTES)
    except Exception:  # of whichever library decompresses
        return None
    match = _HEADER.match(start)
    if match is None:
        return None
    major, minor = filter(None, match.groups())
    return int(major), int(minor)


def _decompressed(file: IO[bytes]) -> Any:
    start = file.read(4)
    file.seek(0)
    if start.startswith(_GZIP):  # before 3.0
        return gzip.GzipFile(fileobj=file)
    if start != _ZSTANDARD:
        return file
    if util.find_spec("zstandard") is not None:  # as in Blender's own releases
        return import_module("zstandard").ZstdDecompressor().stream_reader(file)
    return io.BytesIO(_first_bytes(file.read(_ZSTANDARD_NBYTES)))


class _Buffer(ctypes.Structure):
    """``ZSTD_inBuffer`` and ``ZSTD_outBuffer`` of zstd.h."""

    _fields_ = (("data", ctypes.c_char_p), ("size", ctypes.c_size_t), ("position", ctypes.c_size_t))


def _first_bytes(compressed: bytes) -> bytes:
    """Have the library decompress that Debian's Blender uses."""
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_createDStream.restype = ctypes.c_void_p
    library.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
    library.ZSTD_decompressStream.argtypes = [ctypes.c_void_p, *[ctypes.POINTER(_Buffer)] * 2]
    stream = library.ZSTD_createDStream()
    try:
        made = ctypes.create_string_buffer(_HEADER_NBYTES)
        out = _Buffer(ctypes.cast(made, ctypes.c_char_p), len(made), 0)
        library.ZSTD_decompressStream(stream, out, _Buffer(compressed, len(compressed), 0))
        return made.raw[: out.position]
    finally:
        library.ZSTD_freeDStream(stream)


def why_not_opened(path: str, error: Exception) -> str:
    """What to say where Blender did not open a file."""
    what, saved = f"Blender {bpy.app.version_string} cannot open {path}", saved_by(path)
    said = str(error).strip()
    if saved is None or saved <= bpy.app.version[:2]:
        return f"{what}: {said}"
    return f"{what}, which was saved by Blender {_dotted(saved)}. {_remedy(saved)} ({said})"


def warnings(path: str) -> list[str]:
    """What is missing from the file that is open, one line each.

    Args:
        path: of the file, as the user knows it.
    """
    found = []
    saved = tuple(bpy.data.version[:2])
    if saved > bpy.app.version[:2]:
        found.append(
            f"{path} was saved by Blender {_dotted(saved)}, and this is {bpy.app.version_string}: what that does not know may be"
            f" missing, or look different. {_remedy(saved)}"
        )
    missing = list(_missing())
    found += [f"{path} refers to {each}" for each in missing[:_LISTED]]
    if len(missing) > _LISTED:
        found.append(f"{path} refers to {len(missing) - _LISTED} more that are not there.")
    return found


def _remedy(saved: tuple[int, ...]) -> str:
    return (
        f"Files of newer versions are not for older ones: make it with Blender {_dotted(bpy.app.version[:2])}, or launch with"
        f" Blender {_dotted(saved)} or later (blender=...)."
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _missing() -> Iterator[str]:
    """What is referred to and not there."""
    for kind, what in _KINDS.items():
        for block in getattr(bpy.data, kind):
            path = _file_of(block)
            if path is None or _is_there(path, is_sequence=getattr(block, "source", "") == "SEQUENCE"):
                if kind == "libraries" and (gone := _names(block, only_missing=True)):
                    yield f"{gone} in the library {path}, which has nothing of that name: it is not in the pictures."
            elif kind == "libraries":
                yield f"the library {path}, which is not there: what comes from it is not in the pictures ({_names(block)})."
            else:
                effect = " (missing textures are drawn pink)" if kind == "images" else ""
                yield f"the {what} {block.name!r}, {path}, which is not there{effect}."


def _file_of(block: Any) -> str | None:
    """The path of the file that a block refers to. None: it needs none."""
    is_unused = block.users == 0 and not isinstance(block, bpy.types.Library)
    is_inside = getattr(block, "packed_file", None) is not None or len(getattr(block, "packed_files", ())) > 0
    if is_unused or is_inside or getattr(block, "source", "") in ("GENERATED", "VIEWER"):
        return None
    if not block.filepath or block.filepath.startswith("<"):  # <builtin>
        return None
    return os.path.normpath(str(bpy.path.abspath(block.filepath, library=block.library)))


def _is_there(path: str, *, is_sequence: bool) -> bool:
    if _TILES.search(path):
        return bool(glob.glob("*".join(map(glob.escape, _TILES.split(path)))))
    if os.path.exists(path) or not is_sequence:
        return os.path.exists(path)
    folder, name = os.path.split(path)
    stem, _, rest = re.fullmatch(r"(.*?)(\d*)(\D*)", name).groups()  # type: ignore[union-attr]  # it matches any name
    return bool(glob.glob(os.path.join(glob.escape(folder), f"{glob.escape(stem)}[0-9]*{glob.escape(rest)}")))


def _names(library: Any, *, only_missing: bool = False) -> str:
    """Names of what is linked from a library, or of what it lacks."""
    names = [repr(block.name) for block in library.users_id if not only_missing or getattr(block, "is_missing", False)]
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
