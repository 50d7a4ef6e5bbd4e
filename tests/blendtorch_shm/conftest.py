"""A stream for each way a message travels, opened and removed by the test that uses it."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import blendtorch_shm
from blendtorch_shm.launch.address import Address, Twin
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.launch.keys import make_keys
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer, Sink
from blendtorch_shm.transport import open_sink, open_source
from blendtorch_shm.transport.local import LocalStream

SOURCES = [str(path) for path in Path(blendtorch_shm.__file__).parent.rglob("*.py")]
"""The source files of the core."""


@pytest.fixture
def launch_directory() -> Iterator[LaunchDirectory]:
    directory = LaunchDirectory().create()
    yield directory
    directory.remove()


@pytest.fixture
def twin(launch_directory: LaunchDirectory) -> Twin:
    return launch_directory.twin("DATA", 0)


@pytest.fixture
def place(twin: Twin) -> SharedPlace:
    """Where one stream lives in shared memory."""
    return SharedPlace(twin)


@pytest.fixture
def sink(place: SharedPlace) -> Iterator[Producer]:
    with Producer(place, trusted=True) as sink:
        yield sink


@pytest.fixture
def source(place: SharedPlace, sink: Producer) -> Iterator[Source]:
    with Source([place]) as source:
        yield source


@dataclass
class Transport:
    """How to open either end; what is open is closed after the test."""

    name: str
    open_sink: Callable[..., Sink]
    open_source: Callable[..., Source]
    trusted: bool


@pytest.fixture(params=["shared", "tcp", "curve", "local"])
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    opened: list[Sink | Source] = []

    def remember(end: Sink | Source) -> Sink | Source:
        opened.append(end)
        return end

    if request.param == "local":
        made: dict[str, LocalStream] = {}

        def stream(send_hwm: int = 10, num_slots: int | None = None) -> LocalStream:
            return made.setdefault("stream", LocalStream(send_hwm=send_hwm, num_slots=num_slots))

        yield Transport(
            "local",
            lambda **kwargs: remember(stream(**kwargs).open_sink()),
            lambda **kwargs: remember(stream().open_source(**kwargs)),
            trusted=True,
        )
    else:
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        at_sink = at_source = Address(endpoint)
        if request.param == "shared":
            at_sink = at_source = Address(endpoint, request.getfixturevalue("twin"))
        elif request.param == "curve":
            server_keys, client_keys = make_keys()
            at_sink, at_source = Address(endpoint, keys=server_keys), Address(endpoint, keys=client_keys)
        yield Transport(
            request.param,
            lambda **kwargs: remember(open_sink(at_sink, **kwargs)),
            lambda **kwargs: remember(open_source([at_source], **kwargs)),
            trusted=request.param != "tcp",
        )
    for end in reversed(opened):
        end.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
