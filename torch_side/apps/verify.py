"""The command ``blendtorch-verify``: says which items of a recording are damaged."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from blendtorch_shm.errors import BlendtorchError

from ..verification import verify_recording


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: defaults to those of the command line.

    Returns:
        exit code: 1 if something is damaged, or cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="blendtorch-verify",
        description="Compare every item of a recording with the checksum that was written behind it, and name those that differ.",
    )
    parser.add_argument("recordings", nargs="+", help="record_path_prefix of a recording, such as tmp/cubes, or a file")
    failed = False
    for recording in parser.parse_args(arguments).recordings:
        try:
            found = verify_recording(recording)
        except (BlendtorchError, OSError) as error:
            print(f"blendtorch-verify: {error}", file=sys.stderr)
            failed = True
        else:
            for damage in found.damage:
                print(damage)
            print(f"{recording}: {found.total()}")
            failed |= bool(found.damage)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
