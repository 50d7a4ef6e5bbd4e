"""What somebody has removed of a stream while its instance publishes: nobody can begin to read it then."""

from __future__ import annotations

import contextlib
import os

from blendtorch_shm.errors import SegmentError
from blendtorch_shm.launch.address import SHARED_MEMORY, Twin
from blendtorch_shm.stream.control import Control
from blendtorch_shm.stream.place import SharedPlace


def is_whole(twin: Twin) -> bool:
    """Whether a stream has its control segment, and the lock file that its members have."""
    try:
        return bool(Control.attach(SharedPlace(twin)).lock_file == os.stat(twin.lock_path).st_ino)
    except (SegmentError, OSError):
        return False


def has_open(twin: Twin, pid: int) -> bool:
    """Whether a process maps a control segment that has, or had, the name of this stream's."""
    path = f"{SHARED_MEMORY}{twin.prefix}"
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        return any(line.rstrip("\n").removesuffix(" (deleted)").endswith(f" {path}") for line in maps)
    return False
