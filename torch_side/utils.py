"""Small helpers of the training side."""

from __future__ import annotations

import socket

from blendtorch_shm.errors import ConfigurationError

__all__ = ["get_primary_ip"]


def get_primary_ip() -> str:
    """The IPv4 address of this host from which the default route leaves. Sends nothing.

    Raises:
        ConfigurationError: there is no route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737 test network: connecting a datagram socket only picks a route
        except OSError as error:
            raise ConfigurationError(
                f"This host has no default route, so it has no primary address ({error.strerror}). Name bind_addr yourself."
            ) from error
        return str(probe.getsockname()[0])
