"""One Blender that makes scene after scene; another one when it has crashed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

_PATIENCE_S = 240
_ROOT = Path(__file__).parents[3]


class Crashed(Exception):
    """Blender ended, or did not answer."""


class Failed(Exception):
    """An exception left the code that was called inside Blender."""


class Blender:
    """Calls functions inside a Blender of its own (see ``inside.py``).

    Args:
        folder: for files of both.
        python: the Python that has ``bpy``.
    """

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.folder = folder
        self.deaths = 0
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._log = folder / f"blender-{id(self)}.log"

    def call(self, name: str, *arguments: Any) -> Any:
        if self._process is None:
            self.start()
        assert self._pipe is not None
        try:
            self._pipe.send((name, *arguments))
            # second by second: a campaign may be stopped (SIGSTOP) for longer than that
            if not any(self._pipe.poll(1) for _ in range(_PATIENCE_S)):
                raise EOFError
            how, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            code = self.end()
            self.deaths += 1
            said = self._log.read_text(errors="replace").partition("\nExtension modules")[0][-1500:]
            raise Crashed(f"Blender ended with {_described(code)} in {name}: {said}") from error
        if how == "failed":
            self.end()  # who knows what it left
            raise Failed(answer)
        return answer

    def end(self) -> int | None:
        """Let it end; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert self._pipe is not None
        self._pipe.close()
        try:
            return process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def start(self) -> None:
        self._pipe, theirs = Pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._python, str(Path(__file__).with_name("inside.py")), str(theirs.fileno())],
                cwd=_ROOT, pass_fds=[theirs.fileno()], stdout=log, stderr=log, env=os.environ | {"PYTHONFAULTHANDLER": "1"},
            )  # fmt: skip
        theirs.close()


class Blenders:
    """One for what is right, one for what the product says: what one of them leaves does not change the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.oracle, self.product = Blender(folder), Blender(folder)
        self.before: dict[str, Any] = {}
        """The description of the scene before."""

    def __enter__(self) -> Blenders:
        for blender in (self.oracle, self.product):
            blender.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.oracle.end()
        self.product.end()


def _described(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"status {code}"
