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

from ..errors import ConfigurationError, InstanceDied
from ..memory.layout import VERSION
from ..wording import counted
from .address import Address, ForReaders, NamedSockets, describe, is_loopback, leads_nowhere
from .directory import is_abandoned


@dataclass
class LaunchInfo:
    """Addresses of running instances.

    Args:
        addresses: name of a socket -> its address at each instance, in the order of ``btid``. Another name is an error that lists
            those that are there.
        commands: the command line of each instance, ready to copy into a shell.
        processes: the current process of each instance, where this process started them; None otherwise.
    """

    addresses: dict[str, list[Address]]
    commands: list[str]
    processes: Sequence[subprocess.Popen[bytes]] | None = None

    def __post_init__(self) -> None:
        self.addresses = NamedSockets(self.addresses)

    def __repr__(self) -> str:
        sockets = "".join(f", {name} at {', '.join(addresses)}" for name, addresses in self.addresses.items())
        return f"<LaunchInfo of {counted(len(self.commands), 'instance')}{sockets}>"

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
            InstanceDied: the launch ran on this host, which alone can reach it, and is over.
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
                f"Cannot read the launch information {name}: {error.strerror}. It is written where the "
                f"instances are launched, and removed when blendtorch-launch ends: does it run?"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{name} is not launch information: it is not JSON ({error}).") from error
        # blendtorch writes neither a version nor details
        is_object = isinstance(content, dict)
        version = content.get("version", 2 if "details" in content else VERSION) if is_object else VERSION
        if version != VERSION:
            raise ConfigurationError(
                f"{name} was written by version {version!r} of memory layout and wire format, this program understands "
                f"{VERSION}: use the same version of blendtorch-shm on both sides."
            )
        try:
            known = msgspec.convert(content, _Content)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ConfigurationError(f"{name} is not launch information: {error}.") from error
        addresses = {
            socket: [known.details.get(endpoint, ForReaders()).address(endpoint) for endpoint in endpoints]
            for socket, endpoints in known.addresses.items()
        }
        _require_running(name, [address for each in addresses.values() for address in each], known.details)
        return LaunchInfo(addresses, known.commands)


class _Content(msgspec.Struct):
    """What the file holds beside its version. blendtorch writes no details."""

    addresses: dict[str, list[str]]
    commands: list[str] = []
    details: dict[str, ForReaders] = {}


def _require_running(file: str, addresses: list[Address], details: dict[str, ForReaders]) -> None:
    """Raise InstanceDied where a launch must be over: its launcher was killed, or nothing is left of it that could be reached.

    A missing beacon alone proves nothing: a launch in another container may have this loopback and another shared memory.
    """
    launches = {
        known.twin.launch for known in map(details.get, addresses) if known is not None and known.twin is not None
    }
    for address in addresses:
        known = details.get(address)
        if known is None or known.twin is None:
            return
        if address.twin is not None:
            is_over = is_abandoned(known.twin.launch)
        else:
            is_over = is_loopback(address) and leads_nowhere(address, known.twin.launch)
        if not is_over:
            return
    if addresses:
        more = f" and {len(addresses) - 1} more" if len(addresses) > 1 else ""
        raise InstanceDied(
            f"The launch {', '.join(sorted(launches))} that {file} describes is not running on this host any more: its launcher "
            f"has ended, and none of its instances is at {addresses[0]}{more}. Start it again, and load the file that it writes "
            f"then. (If it runs in another container, or on another host: addresses of loopback are of this host alone; "
            f"bind_addr='primaryip' gives others.)"
        )
