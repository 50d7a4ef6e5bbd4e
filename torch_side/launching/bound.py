"""Processes that are bound to the life of the thread that starts them, each with a guardian (:mod:`.guardian`)."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from blendtorch_shm.errors import LaunchError

from . import guardian

_START_S = 60.0
"""How long a guardian may take to say which process it has started."""
_END_S = 10.0
"""How long a guardian may take to end everything."""
_LOOK_EVERY_S = 0.5
"""Whoever waits looks this often whether the guardian is gone without a word."""


class BoundProcess(subprocess.Popen[bytes]):
    """A process in a session of its own. With the thread that started it, however that ends, it ends, too, and so does everything
    that it started.

    Whether this program ignores SIGCHLD, or waits for all its children, does not matter: what is known of the process, its
    guardian has told. When the guardian is killed, the process is killed with it, and has ended by SIGKILL.

    Args:
        command: the program and its arguments.
        env: its environment. None: that of this process.
        marks: further environment variables, which its guardian does not get.
        death_signal: what the process is sent when its guardian dies.
        stdout, stderr: as of ``subprocess.Popen``.
        pass_fds: descriptors that it inherits.

    Raises:
        OSError: the system refused to make a process.
        LaunchError: its guardian did not start.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        marks: Mapping[str, str] | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
        stdout: Any = None,
        stderr: Any = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.args = list(command)
        self.returncode: int | None = None
        self.is_unguarded = False
        """Whether somebody has killed its guardian while it ran. Then it was sent its death signal, and may have ignored it."""
        self.stdin = self.stdout = self.stderr = None
        self._communication_started = False  # what the base class looks at
        self._sigint_wait_secs = 0.0
        self._news, theirs = socket.socketpair()
        with theirs:
            own = [f"{name}={value}" for name, value in (marks or {}).items()]
            numbers = map(str, (os.getpid(), theirs.fileno(), int(death_signal)))
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, *numbers, *own, "--", *command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[theirs.fileno(), *pass_fds],
                start_new_session=True,
            )
        try:
            self.pid = self._first_news()
        except LaunchError as error:
            self.close()
            raise LaunchError(f"Cannot start {command[0]}: {error}") from None

    def fileno(self) -> int:
        """A descriptor that is readable from the end of the process on, until :meth:`hear_no_more`."""
        return self._news.fileno()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        if self.returncode is None:
            is_over = self.is_over()  # first: what a guardian that is gone had to tell, it has told
            news = self._heard()
            if news.endswith(b"\n"):
                self.returncode = int(news.split()[1])
            elif is_over:
                self.is_unguarded = True
                self.returncode = -signal.SIGKILL
            else:
                with contextlib.suppress(PermissionError):  # of a program that has given up its rights since
                    self._guardian.send_signal(signal.SIGCONT)  # a stopped one would tell nothing
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process, and return the exit code."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            with contextlib.suppress(OSError, ValueError):  # closed: another thread knows by now
                news = select.poll()
                news.register(self._news, select.POLLIN)
                news.poll(1000 * min(_LOOK_EVERY_S, remaining_s))
        return code

    def end_all(self) -> None:
        """Kill it, and all that it started. This does not wait: see :meth:`is_over`."""
        self._guardian.terminate()
        self._guardian.send_signal(signal.SIGCONT)  # a stopped one would not notice

    def is_over(self) -> bool:
        """Whether its guardian has ended, and nothing is left of all that it started, unless the guardian was killed."""
        return self._guardian.poll() is not None  # also if somebody else has waited for it

    def hear_no_more(self) -> None:
        """Its end is known: close the descriptor."""
        self._news.close()

    def close(self) -> None:
        """Kill it, and all that it started, and wait until that is done."""
        self.end_all()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guardian.wait(_END_S)
        self.poll()
        self.hear_no_more()

    def _first_news(self) -> int:
        """The process id."""
        line = b""
        self._news.settimeout(_START_S)
        with contextlib.suppress(OSError):
            while not line.endswith(b"\n") and (byte := self._news.recv(1)):
                line += byte
        if not (line.startswith(b"pid ") and line.endswith(b"\n")):
            raise LaunchError(
                f"the process that watches over it has not started within {_START_S:.0f} s, or ended at once. It is run by "
                f"{sys.executable!r}, which must be a Python that works; look for its own message above."
            )
        self._news.setblocking(False)
        return int(line.split()[1])

    def _heard(self) -> bytes:
        """What its guardian has told of its end. It stays there, so an interrupt loses nothing."""
        try:
            return self._news.recv(64, socket.MSG_PEEK)
        except OSError:  # nothing yet; or another thread knows by now
            return b""
