"""TCP ports for instances, held for them until they bind, and for as long as the launch lives.

A port is held by two sockets. A TCP socket bound to it, not listening and with ``SO_REUSEADDR``, keeps ordinary programs
away, while the instance's own bind (ZeroMQ sets ``SO_REUSEADDR`` too) succeeds beside it; it fails where somebody listens,
and not on connections of an earlier launch that are still in TIME_WAIT. Two launchers would both get such a socket, so they
settle it by a UNIX socket in the abstract name space: one holder, same network namespace as the port, gone with its process.
Another such name shows that the launch lives.
"""

from __future__ import annotations

import contextlib
import errno
import socket

from blendtorch_shm.errors import ConfigurationError, PortInUse
from blendtorch_shm.launch.address import sign_of_launch, sign_of_port

DEFAULT_START_PORT = 11000
"""As this, ``start_port`` means: the first free ports from here on. Any other number means exactly that one."""
_HIGHEST = 65535


class PortReservations:
    """Ports reserved on one local address."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._held: list[socket.socket] = []

    def reserve(self, count: int, start_port: int) -> list[int]:
        """Reserve `count` ports, counting up from `start_port`.

        Raises:
            PortInUse: one of them is taken, where exact ones were asked for.
            ConfigurationError: the address is not one of this host's.
        """
        exact = start_port != DEFAULT_START_PORT
        ports: list[int] = []
        port = start_port
        while len(ports) < count:
            if port > _HIGHEST:
                raise PortInUse(
                    f"No {count} free ports from {start_port} up to {_HIGHEST} on {self._address}. Choose another start_port."
                )
            if self._try_reserve(port):
                ports.append(port)
            elif exact:
                raise PortInUse(
                    f"Port {port} on {self._address} is in use{_by_whom(port)}. Choose another start_port, or leave "
                    f"start_port out: the first free ports from {DEFAULT_START_PORT} on are taken then."
                )
            port += 1
        return ports

    def sign(self, launch: str) -> None:
        """Show to who shares this network, and perhaps not the shared memory, that a launch lives: until :meth:`close`."""
        name = socket.socket(socket.AF_UNIX)
        self._held.append(name)
        with contextlib.suppress(OSError):  # then it looks as if it was over, but to nobody who sees its shared memory
            name.bind(f"\0{sign_of_launch(launch)}")

    def close(self) -> None:
        """Give the ports back."""
        for held in self._held:
            held.close()
        self._held.clear()

    def _try_reserve(self, port: int) -> bool:
        with contextlib.ExitStack() as undo:
            name = undo.enter_context(socket.socket(socket.AF_UNIX))
            tcp = undo.enter_context(socket.socket(socket.AF_INET))
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                name.bind(f"\0{sign_of_port(self._address, port)}")
                tcp.bind((self._address, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return False
                raise ConfigurationError(
                    f"Cannot listen on port {port} of bind_addr {self._address}: {error.strerror}. bind_addr must be an "
                    f"address of this host ('primaryip': that of the default route); ports below 1024 need privileges."
                ) from error
            undo.pop_all()
            self._held += [name, tcp]
            return True


def _by_whom(port: int) -> str:
    """', by ...' if the process can be found, which needs permission to look into it."""
    with contextlib.suppress(Exception):  # psutil is missing, or may not look, or the process has gone
        import psutil

        for connection in psutil.net_connections("tcp4"):
            if (
                connection.laddr
                and connection.laddr.port == port
                and connection.pid
                and connection.status != "TIME_WAIT"
            ):
                process = psutil.Process(connection.pid)
                return f" by process {connection.pid} ({' '.join(process.cmdline())[:120] or process.name()})"
    return ""
