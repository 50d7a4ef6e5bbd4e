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

from .address import Address
from .errors import ConfigurationError


@dataclass
class LaunchInfo:
    """Addresses of running instances.

    Args:
        addresses: name of a socket -> its address at each instance, in the order of ``btid``.
        commands: the command line of each instance, ready to copy into a shell.
        processes: the instances, where this process started them.
    """

    addresses: dict[str, list[Address]]
    commands: list[str]
    processes: list[subprocess.Popen[bytes]] | None = None

    @staticmethod
    def save_json(file: str | os.PathLike[str] | IO[str], launch_info: LaunchInfo) -> None:
        """Write `launch_info` as JSON. A path is replaced atomically and readable by this user only (mode 0600).

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "addresses": {name: [str(a) for a in addresses] for name, addresses in launch_info.addresses.items()},
            "commands": launch_info.commands,
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

        Raises:
            ConfigurationError: the file cannot be read, or is not launch information.
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
        except ValueError as error:
            raise ConfigurationError(f"{name} is not launch information: it is not JSON ({error}).") from error
        if not isinstance(content, dict):
            raise ConfigurationError(
                f"{name} is not launch information: it holds a {type(content).__name__}, not an object."
            )
        addresses = content.get("addresses")
        if not isinstance(addresses, dict) or not all(_is_list_of_str(value) for value in addresses.values()):
            raise ConfigurationError(
                f"{name} is not launch information: 'addresses' must map the name of each socket to a list of addresses."
            )
        commands = content.get("commands", [])
        if not _is_list_of_str(commands):
            raise ConfigurationError(f"{name} is not launch information: 'commands' must be a list of command lines.")
        return LaunchInfo({name: [Address(a) for a in values] for name, values in addresses.items()}, list(commands))


def _is_list_of_str(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value)
