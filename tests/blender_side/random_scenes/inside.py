"""The program that runs inside Blender: takes descriptions over a pipe, and answers each with what was found."""

from __future__ import annotations

import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.blender_side.random_scenes import oracle, product

CALLS = {"right": oracle.right, "product": product.make, "plant": product.plant}


def main() -> None:
    pipe = Connection(int(sys.argv[-1]))
    while True:
        try:
            call, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = "done", CALLS[call](*arguments)
        except Exception:
            answer = "failed", traceback.format_exc()
        pipe.send(answer)


main()
