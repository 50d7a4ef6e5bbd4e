"""The file that a worker records to: a tar archive, ``{prefix}_{worker:02d}.tar``. Nothing here knows of other files.

How an item looks in it stands at the top of :mod:`.item`. Around the items are two members more, which WebDataset skips by their
names:

- ``__recording__`` comes first, and says which recording the file is a part of.
- ``__index__`` comes last: a ``.npy`` of uint64, first and end byte of each item, and at the end where this member itself begins.
  A file without it (its writer was killed, or still writes) is read from header to header instead.

An item ends with a checksum of its bytes, and so does the first member. Zeros stand there in recordings of earlier versions, and
in those that another program packed anew: they are read without a check.

An item is one ``pwritev`` from the memory where its arrays lie, and what is written is never written again. So after
``kill -9`` the items that are whole are those that were saved, and arrays that a reader has mapped do not change.
"""

from __future__ import annotations

import array
import logging
import os
import tarfile
import time
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from blendtorch_shm.errors import RecordingError
from blendtorch_shm.process.descriptors import opened

from .item import (
    BAD_ITEM,
    BLOCK,
    CHECKSUM_NBYTES,
    checksum,
    has_checksum,
    npy_header,
    padded,
    parse_header,
    read_npy,
)

log = logging.getLogger("blendtorch")

FORMAT = 1
_MARK, _INDEX = "__recording__", "__index__"
_END = bytes(2 * BLOCK)
"""Of a tar archive."""
MARK_NBYTES = 2 * BLOCK
"""Of the first member: the first item begins there."""
_IOV_MAX = os.sysconf("SC_IOV_MAX")

Ranges = npt.NDArray[np.uint64]


class Mark(msgspec.Struct):
    """Content of the first member of a file.

    Attributes:
        recording: one for all files of a recording, and only for them.
        format: of the file, :data:`FORMAT`.
    """

    recording: str
    format: int = FORMAT


def write_mark(fd: int, recording: str) -> None:
    text = msgspec.json.encode(Mark(recording))
    content = _header(_MARK, len(text), int(time.time())) + text + bytes(-len(text) % BLOCK - CHECKSUM_NBYTES)
    write(fd, [content + checksum(content)], 0)


def has_checksums(fd: int, ranges: Ranges) -> bool:
    """Whether the mark, the first item or the last one ends with a checksum. A recording has them everywhere or nowhere, but
    damage may have wiped some.
    """
    ends = [MARK_NBYTES, *ranges[[0, -1], 1].tolist()] if len(ranges) else [MARK_NBYTES]
    return any(any(os.pread(fd, CHECKSUM_NBYTES, end - CHECKSUM_NBYTES)) for end in ends)


def recording_at(path: str) -> str | None:
    with opened(os.open, path, os.O_RDONLY | os.O_CLOEXEC) as file:
        mark = read_mark(file.fileno())
    return None if mark is None else mark.recording


def read_mark(fd: int) -> Mark | None:
    """None if the file does not begin as one of ours."""
    data = os.pread(fd, MARK_NBYTES, 0)
    try:
        name, nbytes = parse_header(data[:BLOCK])
        mark = msgspec.json.decode(data[BLOCK : BLOCK + nbytes], type=Mark)
    except BAD_ITEM:
        return None
    return mark if name == _MARK and nbytes <= BLOCK else None


def find_items(fd: int, path: str) -> tuple[Ranges, bool]:
    """(n, 2) uint64, first and end byte of each item that is whole; and whether the index says so, and not a search.

    Raises:
        RecordingError: this is not a recording.
        OSError: it cannot be read.
    """
    size = os.fstat(fd).st_size
    mark = read_mark(fd)
    if mark is None:
        if size == 0:  # killed before it had written anything
            return np.zeros((0, 2), np.uint64), False
        raise RecordingError(f"{path} is not a recording: it does not begin with a tar member {_MARK}.")
    if mark.format != FORMAT:
        raise RecordingError(
            f"{path} was recorded in format {mark.format}, and this version of blendtorch-shm reads format {FORMAT}. "
            f"Its arrays are .npy files in a tar archive."
        )
    ranges = read_index(fd, size)
    return (_scan(fd, size, path), False) if ranges is None else (ranges, True)


def index_member(ranges: array.array[int], at: int, mtime: int) -> list[bytes]:
    """Ends with a block's end, so that its last number is found from the end of the file."""
    words = np.append(np.array(ranges, "<u8"), np.array([at], "<u8"))
    description = f"{{'descr': '<u8', 'fortran_order': False, 'shape': ({len(words)},), }}"
    head = npy_header(description, BLOCK, words.nbytes)
    return [_header(_INDEX, len(head) + words.nbytes, mtime), head, words.tobytes(), _END]


def read_index(fd: int, size: int) -> Ranges | None:
    """What `index_member` said; None if it is not there, or does not fit this file (somebody edited it)."""
    end = size - len(_END)
    if end < MARK_NBYTES:
        return None
    try:
        at = int.from_bytes(read(fd, end - 8, 8), "little")
        if at > end - BLOCK:
            return None
        name, nbytes = parse_header(read(fd, at, BLOCK))
        if name != _INDEX or at + BLOCK + nbytes != end:
            return None
        content = read(fd, at + BLOCK, nbytes)
        words = read_npy(content, 0, nbytes, content)
    except BAD_ITEM:
        return None
    if words.dtype != np.dtype("<u8") or words.ndim != 1 or len(words) % 2 != 1:
        return None
    starts, ends = np.append(words[:-1:2], words[-1]), np.append(np.array([MARK_NBYTES], "<u8"), words[1::2])
    fits = words[-1] == at and (starts == ends).all() and (starts[1:] > starts[:-1]).all()
    return words[:-1].reshape(-1, 2) if fits else None


def _scan(fd: int, size: int, path: str) -> Ranges:
    """Find the items by going from header to header."""
    ranges = array.array("Q")
    at, start, key = MARK_NBYTES, 0, ""
    while at + BLOCK <= size:
        block = os.pread(fd, BLOCK, at)
        try:
            name, nbytes = parse_header(block)
            if not has_checksum(block):
                raise ValueError("its checksum is another")
        except ValueError as error:
            if block.strip(b"\0"):
                log.warning(
                    "%s is damaged at byte %d (%s); %d items before that can be read.",
                    path,
                    at,
                    error,
                    len(ranges) // 2,
                )
            break
        its_key, _, rest = name.partition(".")
        if its_key != key:
            if key:
                log.warning("%s is damaged at byte %d: item %s has no end there, and is left out.", path, at, key)
            start, key = at, its_key
        at += BLOCK + padded(nbytes)
        if at > size:
            break
        if rest == "json":
            ranges.extend((start, at))
            key = ""
    return np.frombuffer(ranges.tobytes(), np.uint64).reshape(-1, 2)


def _header(name: str, nbytes: int, mtime: int) -> bytes:
    """The block before a member that is no part of an item."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = nbytes, mtime, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def write(fd: int, buffers: list[Any], at: int) -> None:
    """All of the buffers, one after the other."""
    while buffers:
        written = os.pwritev(fd, buffers[:_IOV_MAX], at)
        at += written
        for done, buffer in enumerate(buffers):  # noqa: B007
            nbytes = len(buffer)
            if written < nbytes:
                break
            written -= nbytes
        else:
            return
        buffers = [memoryview(buffers[done])[written:], *buffers[done + 1 :]]


def read(fd: int, at: int, nbytes: int) -> bytearray:
    """Exactly those bytes.

    Raises:
        ValueError: the file ends before.
    """
    data = bytearray(nbytes)
    done = 0
    while done < nbytes:
        got = os.preadv(fd, [memoryview(data)[done:] if done else data], at + done)
        if not got:
            raise ValueError("the file ends before that")
        done += got
    return data
