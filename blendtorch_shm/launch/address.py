"""Addresses: plain TCP endpoints that know more than they show.

To the user an address is the string that ``launch_info.json`` shows, ``tcp://127.0.0.1:11000``. Where the launcher
made it, it also carries a :class:`Twin`, the names of the same stream in this host's shared memory, and the keys that open it.
A plain string has neither. Where a launch of this user has that endpoint on this host, :func:`find` knows the rest; else it works
over TCP, with scripts that were started by hand, or ``allow_unauthenticated``.

The same knowledge travels as JSON: to instances in the environment variable :data:`ENVIRONMENT_VARIABLE`, so that a script may
treat the address as the ordinary string that it is, to readers in the launch information, and to readers of this user on this
host in a file beside the beacon (:func:`readers_path`).
"""

from __future__ import annotations

import contextlib
import difflib
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, NoReturn, TypeVar
from urllib.parse import quote, unquote

import msgspec

from ..errors import ConfigurationError, SocketNotFound
from ..process.descriptors import opened
from .keys import ClientKeys, ServerKeys

ENVIRONMENT_VARIABLE = "BLENDTORCH_ADDRESSES"
"""JSON in an instance's environment: what it needs to know of each endpoint that it binds, see :func:`resolve`."""

SHARED_MEMORY = "/dev/shm"
"""Where Linux shows POSIX shared memory. Also home of what must be visible to exactly those: lock files, bells, inboxes."""


MAX_SOCKET_NAME = 48
"""Longest name of a socket as part of a file's name; the path of an inbox has 107 bytes at most."""
_BACK = "+back"
_LAUNCH = re.compile(r"[0-9a-f]{8}")
_ENDPOINT = re.compile(r"tcp://[^\s/:\[\]]+:[0-9]{1,5}")
_AddressOrMany = TypeVar("_AddressOrMany")
_LARGEST_NBYTES = 2**24
"""Of a file that is read. That of a launch with a thousand sockets has less."""
_CONNECT_S = 1.0
"""For a connection within this host, which is there or refused at once."""


@dataclass(frozen=True)
class Twin:
    """Where one instance's socket lives on this host.

    Args:
        directory: the launch directory: logs and states of the instances.
        launch: identifier of the launch, 8 hexadecimal characters.
        nonce: what the launch's beacon says, for those who see the same shared memory.
        name: name of the socket, such as ``DATA``.
        btid: number of the instance.
        is_back: whether this is a channel's way back, from the trainer to the instance.
    """

    directory: str
    launch: str
    nonce: str
    name: str
    btid: int
    is_back: bool = False

    def __post_init__(self) -> None:
        # It may come from a file, and becomes part of paths.
        try:
            can_be = b"\0" not in os.fsencode(self.directory)
        except UnicodeEncodeError:
            can_be = False
        if not can_be:
            raise ConfigurationError(f"{self.directory!r} is not the path of a directory.")
        if not _LAUNCH.fullmatch(self.launch):
            raise ConfigurationError(f"{self.launch!r} is not the identifier of a launch.")
        if not is_socket_name(self.name) or not 0 <= self.btid <= 99999:
            raise ConfigurationError(f"{self.name!r} of instance {self.btid} is not the name of a socket.")

    @property
    def streams(self) -> str:
        """The directory (mode 0700) of lock files, bells and inboxes."""
        return streams_path(self.launch)

    @property
    def lock_path(self) -> str:
        """The file whose byte-range locks order claims and prove who is alive."""
        return f"{self.streams}/{self._file_name}.lock"

    @property
    def bell_path(self) -> str:
        """The pipe by which the producer is woken when it waits for room."""
        return f"{self.streams}/{self._file_name}.bell"

    def inbox_path(self, consumer: int) -> str:
        """The socket at which a consumer that sleeps is sent the numbers of slots; at most 107 bytes, which ZeroMQ can bind."""
        return f"{self.streams}/{self._file_name}.{consumer}.inbox"

    @property
    def prefix(self) -> str:
        """Start of the name of every POSIX object of this stream."""
        return f"/bt-{self.launch}-{self._file_name}"

    @property
    def _file_name(self) -> str:
        """Another one for each socket and instance: what follows the last ``-`` is the number. ``%`` and ``+`` are escaped."""
        return f"{_escaped(self.name)}{_BACK if self.is_back else ''}-{self.btid}"

    def back(self) -> Twin:
        """The other way of a channel: from the trainer to the instance."""
        return replace(self, is_back=True)

    def sockets(self) -> list[Twin]:
        """Those of the same instance that somebody has opened, this one included, by name, even if some files are gone."""
        files = set()
        with contextlib.suppress(OSError):  # the launch is over, or its directory was removed
            files = {entry.removesuffix(".lock") for entry in os.listdir(self.streams) if entry.endswith(".lock")}
        prefix = f"bt-{self.launch}-"
        files |= {entry.removeprefix(prefix) for entry in os.listdir(SHARED_MEMORY) if entry.startswith(prefix)}
        found = []
        for file in sorted(files):
            escaped, _, btid = file.rpartition("-")
            name = unquote(escaped)
            if (
                btid == str(self.btid) and is_socket_name(name) and "+" not in escaped
            ):  # a ring's number is behind a dot
                found.append(replace(self, name=name))
        return found

    def is_here(self) -> bool:
        """Whether this process sees the shared memory in which the launch lives, and the launch lives.

        No host name and no IP address could tell: two containers of one host may or may not share it. So whoever can read the
        launch's beacon, and finds the nonce that it was told elsewhere, does.
        """
        try:
            return _read_own(beacon_path(self.launch)) == self.nonce.encode()
        except OSError:
            return False


def _read_own(path: str) -> bytes:
    """The content of a file of this user's. What another user left for us to read would be trusted: it may contain pickles."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # at a pipe, one would wait
    with opened(os.open, path, flags) as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
            raise PermissionError(f"{path} is not a file of this user.")
        return file.read(_LARGEST_NBYTES)


def is_loopback(endpoint: str) -> bool:
    """Whether a ``tcp://`` endpoint can be reached from this host alone."""
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "lo")


def sign_of_launch(launch: str) -> str:
    """The name, in the abstract name space of UNIX sockets, that exists in a launch's network for as long as it lives."""
    return f"blendtorch-launch-{launch}"


def sign_of_port(host: str, port: int) -> str:
    """Such a name, by which a launcher holds a port for its instance."""
    return f"blendtorch-port-{host}-{port}"


def is_signed(launch: str) -> bool:
    """Whether a launch shows in this network that it lives, whatever has become of its files."""
    try:
        return sign_of_launch(launch) in _signs()
    except OSError:
        return False


def _signs() -> set[str]:
    """The names in the abstract name space of UNIX sockets."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as sockets:
        return {line.partition("@")[2].rstrip("\n") for line in sockets}


def leads_nowhere(endpoint: str, launch: str) -> bool:
    """Whether no instance of a launch can be reached at a ``tcp://`` endpoint of loopback, now or later.

    So it is if the launch is not in this network, and nobody listens there, or an instance of another launch does. What cannot
    be found out is no. A port at which nobody listens is left alone.
    """
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        signs = _signs()
        if sign_of_launch(launch) in signs:
            return False
        if sign_of_port(host, int(port)) in signs:
            return True
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return False
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError, OverflowError):
        return False


def check_endpoint(endpoint: str) -> None:
    """See whether a reader can connect to `endpoint`.

    Raises:
        ConfigurationError: it cannot. Says what an endpoint looks like.
    """
    if not _ENDPOINT.fullmatch(endpoint):
        hint = f" Is it 'tcp://{endpoint}'?" if _ENDPOINT.fullmatch(f"tcp://{endpoint}") else ""
        if endpoint.endswith(".json"):
            hint = f" If it is launch information, pass LaunchInfo.load_json({endpoint!r}).addresses['DATA']."
        raise ConfigurationError(
            f"{str(endpoint)!r} is not an address of an instance. Expected tcp://ADDRESS:PORT, with an IPv4 address or the name "
            f"of a host.{hint}"
        )


def is_socket_name(name: str) -> bool:
    """Whether a socket may be called `name`: it stands in ``-btsockets NAME=ADDRESS``, and in names of files."""
    if not name.isprintable() or name.startswith("-") or "=" in name:
        return False
    return 1 <= len(_escaped(name)) <= MAX_SOCKET_NAME


def _escaped(name: str) -> str:
    """`name` as part of a file's name: each byte of what is no letter of ASCII, no digit and not in ``_.-~`` as ``%20``."""
    return quote(name, safe="")


def readers_path(launch: str) -> str:
    """The file, for this user alone, that says how to read from the instances of a launch: endpoint -> :class:`ForReaders`."""
    return f"{streams_path(launch)}/readers.json"


def streams_path(launch: str) -> str:
    """The directory, in shared memory, of a launch's lock files, bells and inboxes."""
    return f"{SHARED_MEMORY}/blendtorch-{launch}"


def beacon_path(launch: str) -> str:
    """The file that proves to a reader that it sees the same shared memory as the launch."""
    return f"{streams_path(launch)}/beacon"


class Address(str):
    """A TCP endpoint, and what is known about it.

    Compares, prints and formats as the plain string. Pickling keeps the rest; but in a process that does not see the memory of
    the launch, such as one in another container, what comes out is for TCP.

    Attributes:
        twin: the same stream in shared memory, if this process may look there.
        keys: to bind it (an instance) or to connect to it (a reader); None where connections are not authenticated.
        unauthenticated: connections without keys were asked for, beyond loopback too.
        launch: identifier of the launch; empty where none is known.
    """

    twin: Twin | None
    keys: ServerKeys | ClientKeys | None
    unauthenticated: bool
    launch: str

    def __new__(
        cls,
        endpoint: str,
        twin: Twin | None = None,
        keys: ServerKeys | ClientKeys | None = None,
        unauthenticated: bool = False,
        launch: str = "",
    ) -> Address:
        self = super().__new__(cls, endpoint)
        self.twin = twin
        self.keys = keys
        self.unauthenticated = unauthenticated
        self.launch = launch if twin is None else twin.launch
        return self

    @property
    def is_plain(self) -> bool:
        """Whether nothing is known about it."""
        return self.twin is None and self.keys is None and not self.unauthenticated and not self.launch

    def elsewhere(self) -> Address:
        """The same for a reader that does not share the memory."""
        return Address(str(self), None, self.keys, self.unauthenticated, self.launch)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (str(self), self.twin, self.keys, self.unauthenticated, self.launch)


def _arrived(endpoint: str, twin: Twin | None, *rest: Any) -> Address:
    """An address that was pickled. On loopback, it keeps its twin where the launch must be over: the twin tells that at once."""
    address = Address(endpoint, twin, *rest)
    if twin is None or twin.is_here() or (is_loopback(endpoint) and leads_nowhere(endpoint, twin.launch)):
        return address
    return address.elsewhere()


class NamedSockets(dict[str, _AddressOrMany]):
    """Addresses by the names of their sockets. A name that is not there is an error that lists those that are."""

    def __missing__(self, name: object) -> NoReturn:
        there = f"it has {', '.join(map(repr, self))}" if self else "it has none"
        nearest = difflib.get_close_matches(str(name), self, 1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise SocketNotFound(
            f"This launch has no socket {name!r}: {there}.{hint} Sockets are named where instances are launched:"
            f" BlenderLauncher(..., named_sockets=[{name!r}])."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # wherever it is sent, for whom these names are no sockets


class ForInstances(msgspec.Struct, forbid_unknown_fields=True):
    """What an instance is told about an endpoint that it binds."""

    twin: Twin | None = None
    keys: ServerKeys | None = None
    unauthenticated: bool = False


class ForReaders(msgspec.Struct):
    """What a reader is told about an endpoint that it connects to."""

    twin: Twin | None = None
    keys: ClientKeys | None = None
    launch: Annotated[str, msgspec.Meta(pattern=f"^({_LAUNCH.pattern})?$")] = ""
    """Where there is no twin."""

    def address(self, endpoint: str) -> Address:
        """`endpoint` with all this; with the twin only where this process sees the memory of the launch."""
        twin = self.twin
        address = Address(endpoint, twin, self.keys, launch=self.launch)
        return address if twin is None or twin.is_here() else address.elsewhere()


def describe(addresses: Iterable[Address]) -> dict[str, dict[str, Any]]:
    """What is known about `addresses`, ready for JSON: endpoint -> :class:`ForInstances` or :class:`ForReaders`."""
    return {
        str(address): {
            "twin": None if address.twin is None else asdict(address.twin),
            "keys": None if address.keys is None else asdict(address.keys),
            **({"unauthenticated": True} if address.unauthenticated else {}),
            **({"launch": address.launch} if address.launch and address.twin is None else {}),
        }
        for address in addresses
    }


def resolve(endpoint: str) -> Address:
    """`endpoint` with all that is known about it in this process: by itself, or from the environment.

    Raises:
        ConfigurationError: the environment variable is not what the launcher writes.
    """
    if isinstance(endpoint, Address) and not endpoint.is_plain:
        return endpoint
    text = os.environ.get(ENVIRONMENT_VARIABLE)
    if not text:
        return Address(endpoint)
    try:
        known = msgspec.json.decode(text, type=dict[str, ForInstances]).get(str(endpoint), ForInstances())
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"The environment variable {ENVIRONMENT_VARIABLE} is not what the launcher writes ({error}). "
            f"Unset it to publish over TCP, or start the script through BlenderLauncher."
        ) from error
    return Address(endpoint, known.twin, known.keys, known.unauthenticated)


def find(endpoint: str) -> Address:
    """`endpoint`, which a reader was told, with all that is known about it: by itself, or because a launch of this user runs on
    this host, in this network, and has it.
    """
    if isinstance(endpoint, Address) and not endpoint.is_plain:
        return endpoint
    numeric = endpoint.replace("//localhost:", "//127.0.0.1:")
    try:
        signs = _signs()
        launches = [name.removeprefix("blendtorch-") for name in os.listdir(SHARED_MEMORY)]
    except OSError:
        return Address(endpoint)
    for launch in launches:
        if _LAUNCH.fullmatch(launch) and sign_of_launch(launch) in signs:
            with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError, RecursionError):
                known = msgspec.json.decode(_read_own(readers_path(launch)), type=dict[str, ForReaders])
                if numeric in known:
                    return known[numeric].address(endpoint)
    return Address(endpoint)


def checked(addresses: Any) -> list[Address]:
    """The addresses of instances, each with all that is known about it.

    Raises:
        ConfigurationError: there are none, or a reader could not connect to one of them.
    """
    found = [addresses] if isinstance(addresses, str) else []
    if isinstance(addresses, Iterable) and not isinstance(addresses, (str, Mapping)):
        found = list(addresses)
    if not found or not all(isinstance(address, str) for address in found):
        raise ConfigurationError(
            f"addresses={addresses!r} names no instances; expected strings, such as launch_info.addresses['DATA']."
        )
    for address in found:
        check_endpoint(address)
    return [find(address) for address in found]
