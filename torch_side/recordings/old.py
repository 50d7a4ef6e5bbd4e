"""Recordings of blendtorch: files ``{prefix}_{worker:02d}.btr`` of pickles, one after the other.

The first pickle is an array of int64: where each message begins, then -1 for each that there was room for. It is right once the
file was closed, and is brought up to date every so many messages before; a killed writer leaves messages that it does not name.

To read a pickle is to run what it says. So nothing is read here before the caller was told that the file is trusted.
"""

from __future__ import annotations

import os
import pickle
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from blendtorch_shm.errors import RecordingError

_FIRST_BYTES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1))
EXTENSION = ".btr"


def is_old(fd: int) -> bool:
    """Whether an open file is blendtorch's: it begins with a pickle."""
    return os.pread(fd, 2, 0).startswith(_FIRST_BYTES)


def not_trusted(paths: Sequence[str], to_convert: str) -> RecordingError:
    """The error for files that may not be read.

    Args:
        paths: of the files.
        to_convert: what the command is given that converts them.
    """
    return RecordingError(
        f"{', '.join(paths)} {'is' if len(paths) == 1 else 'are'} of blendtorch: pickles, which can run any program when they"
        f" are read. If you trust whoever made them, pass allow_pickle=True, or convert them once, with"
        f"\n    blendtorch-convert {shlex.quote(to_convert)}"
    )


def find_items(fd: int, path: str) -> npt.NDArray[np.uint64]:
    """(n, 2) uint64, first and end byte of each message that is whole, those included that the file does not name.

    Raises:
        RecordingError: this is not a recording of blendtorch's.
    """
    with _opened(fd) as file:
        size = os.fstat(fd).st_size
        try:
            named = pickle.Unpickler(file).load()
            starts = named[named >= 0].astype(np.int64)
            if named.ndim != 1 or (np.diff([file.tell(), *starts, size]) < 0).any():
                raise ValueError("what it says about its messages does not fit it")
        except Exception as error:
            raise RecordingError(
                f"{path} is not a recording: it is a pickle, and not one of blendtorch's ({error})."
            ) from error
        edges = [*starts.tolist(), size]
        if (
            not _is_pickle(file, edges[:-1]) or file.tell() < size
        ):  # there is more than it names, or the last one is as it was
            found = [end for end, _ in _in_order(fd)]
            edges = found if len(found) >= len(edges) else edges
    return np.array([edges[:-1], edges[1:]], np.uint64).T.copy()


def read_item(fd: int, index: int, data: bytes | bytearray) -> Any:
    """A message as it was published, from its bytes. Raises whatever a pickle may raise."""
    try:
        return pickle.loads(data)
    except pickle.UnpicklingError:  # a FileRecorder that pickled it itself lets it refer to those before it
        for number, (_, value) in enumerate(_in_order(fd), -1):
            if number == index:
                return value
        raise


def _is_pickle(file: BinaryIO, starts: Sequence[int]) -> bool:
    """Whether the last of these messages can be read by itself; the file is then at its end. True if there is none."""
    if not starts:
        return True
    file.seek(starts[-1])
    try:
        pickle.Unpickler(file).load()
    except Exception:
        return False
    return True


def _in_order(fd: int) -> Iterator[tuple[int, Any]]:
    """Where each pickle ends, that of the beginning included, and what it holds, as long as they are whole.

    What arrived as a pickle is complete by itself, and numbers what it repeats from 0 on. What a recorder's one pickler wrote may
    repeat what that wrote before, and goes on with its numbers.
    """
    before: dict[int, Any] = {}
    with _opened(fd) as file:
        while True:
            start = file.tell()
            try:
                try:
                    value, own = _load(file, {})
                except (pickle.UnpicklingError, KeyError):
                    file.seek(start)
                    value, own = _load(file, before)
            except Exception:
                return
            if own and min(own) >= len(before):
                before |= own
            yield file.tell(), value


def _load(file: BinaryIO, before: dict[int, Any]) -> tuple[Any, dict[int, Any]]:
    """The next pickle, and what it may repeat by number beside what is there from `before`."""
    unpickler: Any = pickle._Unpickler(file)  # of the one in C, what it repeats cannot be had
    unpickler.memo = dict(before)
    value = unpickler.load()
    return value, {number: kept for number, kept in unpickler.memo.items() if number not in before}


def _opened(fd: int) -> BinaryIO:
    """The file of a descriptor, from its beginning, at a position of its own."""
    return open(f"/proc/self/fd/{fd}", "rb")
