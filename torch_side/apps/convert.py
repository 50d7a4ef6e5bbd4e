"""The command ``blendtorch-convert``: writes recordings of blendtorch anew, in today's form."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from blendtorch_shm.errors import BlendtorchError, RecordingError, RecordingNotFound

from ..recordings.files import absolute, files_of
from ..recordings.old import EXTENSION
from ..recordings.reader import FileReader
from ..recordings.recorder import FileRecorder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: defaults to those of the command line.

    Returns:
        exit code: 1 if something could not be converted.
    """
    parser = argparse.ArgumentParser(
        prog="blendtorch-convert",
        description="Write recordings of blendtorch (.btr) anew as .tar files beside them, which FileDataset reads without "
        "unpickling. The old files stay. Reading them can run any program that is in them: convert only what you trust.",
    )
    parser.add_argument("recordings", nargs="+", help="record_path_prefix of a recording, such as tmp/cubes, or a file")
    for recording in parser.parse_args(arguments).recordings:
        try:
            print(*_convert(absolute(recording)), sep="\n")
        except (BlendtorchError, OSError) as error:
            print(f"blendtorch-convert: {error}", file=sys.stderr)
            return 1
    return 0


def _convert(path: str) -> list[str]:
    """Write a file, or the files of a recording, anew: all of them or, if something goes wrong, none.

    Raises:
        RecordingNotFound: there are no such files.
        RecordingError: one cannot be read, or there is a file already where a new one is to be.
    """
    old = [path] if os.path.isfile(path) else files_of(path, EXTENSION)
    if not old:
        raise RecordingNotFound(f"There is no recording {path}_00{EXTENSION}, nor one with another number.")
    new = [f"{os.path.splitext(one)[0]}.tar" for one in old]
    for one in filter(os.path.exists, new):
        raise RecordingError(f"{one} exists already. FileDataset reads it instead of the old files; remove it first.")
    unfinished = [f"{one}.unfinished" for one in new]
    try:
        for source, target in zip(old, unfinished, strict=True):
            with FileReader(source, allow_pickle=True) as items, FileRecorder(target, sys.maxsize) as recorder:
                for index in range(len(items)):
                    recorder.save(items[index])
        for target, one in zip(unfinished, new, strict=True):
            os.rename(target, one)
    finally:
        for target in unfinished:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)
    return new


if __name__ == "__main__":
    sys.exit(main())
