"""Programs for tests that need many: each a process and a session of its own, none of which has to import torch first.

One process, the :class:`Workshop`, imports what they need and forks once for each program. The child runs it as its
``__main__`` and ends as Python ends any program: what is raised becomes a traceback on standard error and an exit code, and
what is registered with ``atexit`` runs.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300.0
"""Whoever has not done what he should after this long hangs. Where much else runs, importing torch takes a minute."""


class Workshop:
    """Where programs are made. A context manager.

    Args:
        prefix: a command that runs the command which follows it, such as ``["unshare", "--mount"]``.
        folder: for the output of the programs.
    """

    def __init__(self, folder: Path, prefix: list[str] | None = None) -> None:
        self._folder = folder
        self._made = 0
        self._process = subprocess.Popen(
            [*(prefix or []), sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
        )

    def __enter__(self) -> Workshop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def run(self, code: str, *args: object) -> Program:
        """Start a program.

        Args:
            code: what its ``__main__`` is.
            args: what its ``sys.argv`` holds behind the name.
        """
        self._made += 1
        said, heard = (self._folder / f"{self._made}.{kind}" for kind in ("stdout", "stderr"))
        said.touch()
        heard.touch()
        pid = self.ask(code=code, args=[str(a) for a in args], stdout=str(said), stderr=str(heard))
        return Program(self, pid, said, heard)

    def ask(self, **order: Any) -> int:
        """The answer of the other process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        readable, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        assert readable, f"no answer to {order}"
        return int(self._process.stdout.readline())


class Program:
    """A running program."""

    def __init__(self, workshop: Workshop, pid: int, said: Path, heard: Path) -> None:
        self.pid = pid
        self._workshop = workshop
        self._said, self._heard = said, heard

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._said.read_text()

    @property
    def stderr(self) -> str:
        """What it and its children have said on standard error so far."""
        return self._heard.read_text()

    def until(self, holds: Callable[[], Any]) -> None:
        """Wait until a condition holds, while the program runs."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert not self._has_ended(), f"it ended:\n{self.stdout}\n{self.stderr}"
            assert time.monotonic() < deadline, f"in vain:\n{self.stdout}\n{self.stderr}"
            time.sleep(0.005)

    def until_it_says(self, text: str) -> None:
        """Wait until it has printed `text`."""
        self.until(lambda: text in self.stdout)

    def interrupt(self, group: bool) -> None:
        """Send SIGINT, to the process or, as a terminal does for Ctrl-C, to its whole group."""
        (os.killpg if group else os.kill)(self.pid, signal.SIGINT)

    def ends(self) -> int:
        """Wait for its end. The exit code, negative for a signal."""
        deadline = time.monotonic() + PATIENCE_S
        while not self._has_ended():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGABRT)  # faulthandler then says where each thread is
                time.sleep(0.5)
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"it does not end:\n{self.stdout}\n{self.stderr}")
            time.sleep(0.005)
        return self._workshop.ask(wait=self.pid)

    def _has_ended(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def main() -> dict[str, Any]:
    """Fork a child for each order; in it, return the order."""
    import torch_side.dataset  # noqa: F401

    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            return order
        print(pid, flush=True)
    sys.exit()


def become(order: dict[str, Any]) -> dict[str, Any]:
    """Make this process one that is as if it had just been started; the namespace of its ``__main__``."""
    import faulthandler

    os.setsid()
    for path, fd in ((os.devnull, 0), (order["stdout"], 1), (order["stderr"], 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = ["program", *order["args"]]
    return {"__name__": "__main__", "__builtins__": __builtins__}


if __name__ == "__main__":
    _order = main()
    exec(compile(_order["code"], "program", "exec"), become(_order))
