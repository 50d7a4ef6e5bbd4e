"""The command ``blendtorch-verify``: says which items of a recording are damaged."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from blendtorch_shm.errors import BlendtorchError

from ..recordings.verification import verify_recording

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: defaults to those of the command line.

    Returns:
        exit code: 1 if something is damaged, or cannot be read, or the findings cannot be printed; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="blendtorch-verify",
        description="Compare every item of a recording with the checksum that was written behind it, and name those that differ.",
    )
    parser.add_argument("recordings", nargs="+", help="record_path_prefix of a recording, such as tmp/cubes, or a file")
    recordings = parser.parse_args(arguments).recordings
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a file may have a name that is no text
    try:
        are_whole = [_is_whole(recording) for recording in recordings]
        print(end="", flush=True)
    except KeyboardInterrupt:
        print("blendtorch-verify: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except OSError as error:  # such as BrokenPipeError, of `| head`
        print(f"blendtorch-verify: what was found cannot be printed: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more at its end
        return 1
    return int(not all(are_whole))


def _is_whole(recording: str) -> bool:
    """Print what is damaged; whether nothing is."""
    try:
        found = verify_recording(recording)
    except (BlendtorchError, OSError) as error:
        print(f"blendtorch-verify: {error}", file=sys.stderr)
        return False
    for damage in found.damage:
        print(damage)
    print(f"{recording}: {found.total()}")
    return not found.damage


if __name__ == "__main__":
    sys.exit(main())
