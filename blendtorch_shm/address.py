"""Addresses: plain TCP endpoints that know their shared-memory twin.

To the user an address is the string that ``launch_info.json`` shows, ``tcp://127.0.0.1:11000``. Where the launcher
made it, it also carries a :class:`Twin`, the names of the same stream in this host's shared memory. A plain string
has no twin, and works over TCP.

Instances learn about twins from the environment variable :data:`ENVIRONMENT_VARIABLE`, so a script may treat the
address as the ordinary string that it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .errors import ConfigurationError

ENVIRONMENT_VARIABLE = "BLENDTORCH_TWINS"
"""JSON object in an instance's environment: TCP endpoint -> the fields of its :class:`Twin`."""


@dataclass(frozen=True)
class Twin:
    """Where one instance's socket lives on this host.

    Args:
        directory: the launch directory (mode 0700).
        launch: identifier of the launch, 8 hexadecimal characters.
        name: name of the socket, such as ``DATA``.
        btid: number of the instance.
    """

    directory: str
    launch: str
    name: str
    btid: int

    @property
    def endpoint(self) -> str:
        """ZeroMQ endpoint of the announcements."""
        return f"ipc://{self.directory}/{self.name}-{self.btid}.sock"

    @property
    def lock_path(self) -> str:
        """The file whose byte-range locks order claims and prove who is alive."""
        return f"{self.directory}/{self.name}-{self.btid}.lock"

    @property
    def prefix(self) -> str:
        """Start of the name of every POSIX object of this stream."""
        return f"/bt-{self.launch}-{self.name}-{self.btid}"


class Address(str):
    """A TCP endpoint, and its twin in shared memory if it has one.

    Compares, prints and formats as the plain string. Pickling keeps the twin.
    """

    twin: Twin | None

    def __new__(cls, endpoint: str, twin: Twin | None = None) -> Address:
        self = super().__new__(cls, endpoint)
        self.twin = twin
        return self

    def __reduce__(self) -> tuple[type[Address], tuple[str, Twin | None]]:
        return Address, (str(self), self.twin)


def twins_to_env(addresses: Iterable[Address]) -> str:
    """The value of :data:`ENVIRONMENT_VARIABLE` for an instance that owns `addresses`."""
    return json.dumps({str(a): asdict(a.twin) for a in addresses if a.twin is not None})


def resolve(endpoint: str) -> Address:
    """`endpoint` with the twin it has in this process: its own, or the one the environment names.

    Raises:
        ConfigurationError: the environment variable is not what the launcher writes.
    """
    if isinstance(endpoint, Address) and endpoint.twin is not None:
        return endpoint
    text = os.environ.get(ENVIRONMENT_VARIABLE)
    if not text:
        return Address(endpoint)
    try:
        twin = json.loads(text).get(str(endpoint))
        return Address(endpoint, None if twin is None else Twin(**twin))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"The environment variable {ENVIRONMENT_VARIABLE} is not what the launcher writes ({error}). "
            f"Unset it to publish over TCP, or start the script through BlenderLauncher."
        ) from error
