"""A display for Blender executables that cannot render without one."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time

from blendtorch_shm.errors import LaunchError

from .bound import BoundProcess
from .supervisor import GRACE_S

_SCREEN = "800x600x24"
"""Small: what Blender draws of its own interface is lost time. Off-screen pictures do not depend on it."""
_START_S = 30.0


class VirtualDisplay:
    """A running Xvfb. Make it with :meth:`start`, in the thread whose end it is to share."""

    def __init__(self, server: BoundProcess, name: str) -> None:
        self._server = server
        self.name = name
        """Value for ``DISPLAY``."""

    @classmethod
    def start(cls, log_path: str) -> VirtualDisplay:
        """Start an X server on a free display number.

        Raises:
            LaunchError: Xvfb is not installed, or does not start.
        """
        xvfb = shutil.which("Xvfb")
        if xvfb is None:
            raise LaunchError(
                "This Blender needs a display: DISPLAY is not set, and Xvfb is not installed. Do one of these: "
                "apt-get install -y xvfb; use the bpy module (5.1 or later), which needs no display; or background=True, "
                "in which nothing but final renders is possible."
            )
        readable, writable = os.pipe()
        try:
            with open(log_path, "ab") as log:
                command = [xvfb, "-displayfd", str(writable), "-screen", "0", _SCREEN, "-nolisten", "tcp"]
                server = BoundProcess(
                    command, death_signal=signal.SIGTERM, stdout=log, stderr=log, pass_fds=[writable]
                )  # SIGTERM: it removes its lock and socket
            os.close(writable)
            writable = -1
            number = _read_line(readable)
            if not number.isdigit():
                server.close()
                with open(log_path, errors="replace") as log_file:
                    raise LaunchError(
                        f"Xvfb does not start (exit code {server.returncode}): {log_file.read()[-500:].strip()}"
                    )
        finally:
            os.close(readable)
            if writable >= 0:
                os.close(writable)
        return cls(server, f":{number}")

    def stop(self) -> None:
        """End the X server."""
        self._server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.wait(GRACE_S)
        self._server.close()


def _read_line(fd: int) -> str:
    """One line from a pipe, or what came of it before the other end was closed or time was up."""
    text = b""
    deadline = time.monotonic() + _START_S
    while not text.endswith(b"\n") and select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(fd, 64)
        if not part:
            break
        text += part
    return text.decode().strip()
