"""Launch information: what a reader on this or another host needs in order to connect to running instances."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import msgspec

from ..errors import ConfigurationError
from ..memory.layout import VERSION
from .address import Address, ForReaders, describe


@dataclass
class LaunchInfo:
    """Addresses of running instances.

    Args:
        addresses: name of a socket -> its address at each instance, in the order of ``btid``.
        commands: the command line of each instance, ready to copy into a shell.
        processes: the current process of each instance, where this process started them; None otherwise.
    """

    addresses: dict[str, list[Address]]
    commands: list[str]
    processes: list[subprocess.Popen[bytes]] | None = None

    def __repr__(self) -> str:
        sockets = "".join(f", {name} at {', '.join(addresses)}" for name, addresses in self.addresses.items())
        return f"<LaunchInfo of {len(self.commands)} instance{'' if len(self.commands) == 1 else 's'}{sockets}>"

    @staticmethod
    def save_json(file: str | os.PathLike[str] | IO[str], launch_info: LaunchInfo) -> None:
        """Write `launch_info` as JSON. A path is replaced atomically and readable by this user only (mode 0600).

        Beside the plain addresses the file holds, under ``details``, what a reader needs in order to find out whether it shares
        the instances' memory, and the keys that let it connect: who has the file may read from the instances.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "version": VERSION,
            "addresses": {name: [str(a) for a in addresses] for name, addresses in launch_info.addresses.items()},
            "commands": launch_info.commands,
            "details": describe(
                address
                for addresses in launch_info.addresses.values()
                for address in addresses
                if isinstance(address, Address) and not address.is_plain  # type: ignore[redundant-expr]  # users may put strings
            ),
        }
        text = json.dumps(content, indent=4) + "\n"
        if not isinstance(file, (str, os.PathLike)):
            file.write(text)
            return
        path = os.path.abspath(file)
        fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=f".{os.path.basename(path)}.")  # mode 0600
        try:
            with os.fdopen(fd, "w") as stream:
                stream.write(text)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    @staticmethod
    def load_json(file: str | os.PathLike[str] | IO[str]) -> LaunchInfo:
        """Read what :meth:`save_json`, or blendtorch, wrote.

        An address has its shared-memory twin where this process sees the memory of the instances (see
        :meth:`~blendtorch_shm.launch.address.Twin.is_here`); all others are read over TCP.

        Raises:
            ConfigurationError: the file cannot be read, is not launch information, or is of another version.
        """
        name = getattr(file, "name", "the file")
        try:
            if isinstance(file, (str, os.PathLike)):
                name = os.fspath(file)
                with open(file, encoding="utf-8") as stream:
                    content = json.load(stream)
            else:
                content = json.load(file)
        except OSError as error:
            raise ConfigurationError(
                f"Cannot read the launch information {name}: {error.strerror}. It is written where the instances are launched."
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{name} is not launch information: it is not JSON ({error}).") from error
        if not isinstance(content, dict):
            raise ConfigurationError(
                f"{name} is not launch information: it holds a {type(content).__name__}, not an object."
            )
        version = content.get("version", VERSION)  # blendtorch writes none
        if version != VERSION:
            raise ConfigurationError(
                f"{name} was written by version {version!r} of memory layout and wire format, this program understands "
                f"{VERSION}: use the same version of blendtorch-shm on both sides."
            )
        addresses = content.get("addresses")
        if not isinstance(addresses, dict) or not all(_is_list_of_str(value) for value in addresses.values()):
            raise ConfigurationError(
                f"{name} is not launch information: 'addresses' must map the name of each socket to a list of addresses."
            )
        commands = content.get("commands", [])
        if not _is_list_of_str(commands):
            raise ConfigurationError(f"{name} is not launch information: 'commands' must be a list of command lines.")
        try:
            details = msgspec.convert(content.get("details", {}), dict[str, ForReaders])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"{name} is not launch information: 'details' makes no sense ({error})."
            ) from error
        return LaunchInfo(
            {name: [_address(a, details.get(a)) for a in values] for name, values in addresses.items()}, list(commands)
        )


def _address(endpoint: str, known: ForReaders | None) -> Address:
    if known is None:
        return Address(endpoint)
    return Address(endpoint, known.twin if known.twin is not None and known.twin.is_here() else None, known.keys)


def _is_list_of_str(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value)
