"""``blendtorch-clean``: remove what launches left on this host whose launchers are dead.

Each launch does that too, before it starts anything. This is for who wants the memory back now.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from blendtorch_shm.launch.address import SHARED_MEMORY
from blendtorch_shm.launch.sweep import sweep
from blendtorch_shm.wording import byte_size

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the arguments of the command line. None: those of this process.

    Returns:
        the exit code, 0.
    """
    argparse.ArgumentParser(
        prog="blendtorch-clean",
        description="Remove what dead launches of this user left on this host: processes, shared memory, sockets, logs. "
        "Launches that live are not touched; what may be of a dead one and is not proven to be is left, and listed.",
    ).parse_args(argv)
    before = _free_nbytes()
    swept = sweep()
    for launch in swept.removed:
        print(f"removed launch {launch}, whose launcher is dead")
    for path, why in swept.left.items():
        print(f"left {path}: {why}; remove it yourself if you do not need it")
    if swept.removed:
        print(f"{byte_size(max(0, _free_nbytes() - before))} of {SHARED_MEMORY} are free again")
    else:
        print("nothing to remove: nothing is proven to be of a dead launch")
    return 0


def _free_nbytes() -> int:
    space = os.statvfs(SHARED_MEMORY)
    return space.f_bavail * space.f_frsize


if __name__ == "__main__":
    sys.exit(main())
