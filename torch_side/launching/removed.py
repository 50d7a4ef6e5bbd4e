"""What somebody has removed of a stream while its instance publishes: nobody can begin to read it then."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from blendtorch_shm.errors import SegmentError
from blendtorch_shm.launch.address import SHARED_MEMORY, Twin
from blendtorch_shm.stream.control import Control
from blendtorch_shm.stream.place import SharedPlace


def is_lost(twin: Twin, pids: Iterable[int]) -> bool:
    """Whether one of these processes has a stream open whose control segment, or lock file, does not have its name any more.

    Args:
        twin: the stream.
        pids: processes of its instance, in any order.
    """
    return not _is_whole(twin) and any(_has_open(f"{SHARED_MEMORY}{twin.prefix}", pid) for pid in pids)


def _is_whole(twin: Twin) -> bool:
    try:
        return bool(Control.attach(SharedPlace(twin)).lock_file == os.stat(twin.lock_path).st_ino)
    except (SegmentError, OSError):
        return False


def _has_open(path: str, pid: int) -> bool:
    """Whether a process maps the file that has, or had, this path."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        return any(line.rstrip("\n").removesuffix(" (deleted)").endswith(f" {path}") for line in maps)
    return False
