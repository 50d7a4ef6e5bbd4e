"""Keys for TCP connections, which may leave this host, or come from another user of it.

CURVE (http://curvezmq.org/page:read-the-docs, part of ZeroMQ) encrypts a TCP connection and lets each end know the other by its
public key. A launcher makes one pair for its instances and one for whoever reads from them. The instances get the first, the
launch information carries the second: holding that file is the permission to connect. Keys are in Z85, ZeroMQ's
printable encoding of 32 bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from ..errors import ConfigurationError


@dataclass(frozen=True)
class ServerKeys:
    """What an instance needs: its own pair, and the public key of those it lets in."""

    server_public: str
    server_secret: str = field(repr=False)
    client_public: str

    def __post_init__(self) -> None:
        _check(self)

    def secure(self, socket: zmq.Socket[bytes]) -> None:
        """Make `socket` the server end of encrypted connections. Who may connect is up to the socket's authenticator."""
        socket.curve_server = 1
        socket.curve_publickey = self.server_public.encode()
        socket.curve_secretkey = self.server_secret.encode()


@dataclass(frozen=True)
class ClientKeys:
    """What a reader needs: its own pair, and the public key by which it knows the instances."""

    client_public: str
    client_secret: str = field(repr=False)
    server_public: str

    def __post_init__(self) -> None:
        _check(self)

    def secure(self, socket: zmq.Socket[bytes]) -> None:
        """Have `socket` connect with these keys."""
        socket.curve_serverkey = self.server_public.encode()
        socket.curve_publickey = self.client_public.encode()
        socket.curve_secretkey = self.client_secret.encode()


def make_keys() -> tuple[ServerKeys, ClientKeys]:
    """New keys for one launch.

    Raises:
        ConfigurationError: this ZeroMQ was built without CURVE.
    """
    if not zmq.has("curve"):
        raise ConfigurationError(
            "This pyzmq was built without CURVE, so TCP connections cannot be authenticated. Install pyzmq from PyPI, or "
            "allow unauthenticated connections by name (allow_unauthenticated=True)."
        )
    server_public, server_secret = (key.decode() for key in zmq.curve_keypair())
    client_public, client_secret = (key.decode() for key in zmq.curve_keypair())
    return (
        ServerKeys(server_public, server_secret, client_public),
        ClientKeys(client_public, client_secret, server_public),
    )


def _check(keys: ServerKeys | ClientKeys) -> None:
    for name, key in vars(keys).items():
        try:
            valid = len(z85.decode(key.encode())) == 32
        except (ValueError, KeyError, IndexError, struct.error):  # the last: five characters that say 2**32 or more
            valid = False
        if not valid:
            raise ConfigurationError(f"The key {name!r} is not one: expected 40 characters of Z85.")
