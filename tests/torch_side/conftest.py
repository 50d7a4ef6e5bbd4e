"""What the tests share: scripts to run, instances that publish for ever, and waiting for what comes about by itself."""

import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blendtorch_shm.launch.address import Address
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer
from blendtorch_shm.stream.stats import StreamStats, stats
from blendtorch_shm.transport import open_sink
from torch_side import BlenderLauncher, RemoteIterableDataset

from ..blendtorch_shm.conftest import free_port

COUNT = Path(__file__).parents[1] / "scripts" / "count.py"
PATIENCE_S = 60.0


def launch(*args: str, num_instances: int = 2, script: Path = COUNT, **kwargs: Any) -> BlenderLauncher:
    """Instances without Blender; unless told otherwise, two that publish for ever."""
    return BlenderLauncher(
        scene="",
        script=script,
        num_instances=num_instances,
        named_sockets=["DATA"],
        instance_args=[list(args)] * num_instances,
        blender="python",
        progress=False,
        **kwargs,
    )


def eventually(holds: Callable[[], Any], what: str = "it") -> Any:
    """Wait until a condition holds, and return what made it hold."""
    deadline = time.monotonic() + PATIENCE_S
    while not (result := holds()):
        assert time.monotonic() < deadline, f"{what} did not come about within {PATIENCE_S:.0f} s"
        time.sleep(0.01)
    return result


def when_it_waits(address: Any, ready: int = 10) -> StreamStats:
    """The counters of an instance that has published all that there is room for, with the next message in hand."""

    def full() -> StreamStats | None:
        first, second = (stats(address)[0] for _ in range(2))  # no look is of one moment
        is_full = all(seen.ready == ready and seen.waits for seen in (first, second))
        return second if is_full and first.published == second.published else None

    found: StreamStats = eventually(full, "that an instance waits for room")
    return found


def keys(batches: Any) -> list[tuple[int, int]]:
    """Which messages these batches are made of."""
    return [key for batch in batches for key in zip(batch["btid"].tolist(), batch["frameid"].tolist(), strict=True)]


def check(batch: dict[str, Any]) -> None:
    assert (batch["image"] == batch["value"].view(-1, 1, 1, 1)).all()
    assert (batch["xy"] == batch["frameid"].view(-1, 1, 1)).all()


@contextlib.contextmanager
def killed_worker(iterator: Any) -> Iterator[None]:
    """The first worker of a DataLoader's iterator has been killed. To be left when the iterator is gone.

    Torch's handler of SIGCHLD raises wherever the main thread is, in an `except` and in the iterator's `__del__`, too, which then
    leaves the other workers behind. So there is none meanwhile: the iterator finds out when it waits for that worker.
    """
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        os.kill(iterator._workers[0].pid, signal.SIGKILL)
        yield
    finally:
        gc.collect()  # an error may hold the iterator in a cycle
        signal.signal(signal.SIGCHLD, handler)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent to take note of its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module")
def launcher() -> Iterator[BlenderLauncher]:
    """Two instances that publish for ever, each on its ring."""
    with launch() as launcher:
        for address in launcher.launch_info.addresses["DATA"]:
            assert len(list(RemoteIterableDataset(address, max_items=2))) == 2
        yield launcher


@pytest.fixture
def addresses(launcher: BlenderLauncher) -> list[str]:
    return launcher.launch_info.addresses["DATA"]


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "instance.py"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def stream() -> Iterator[tuple[Address, SharedPlace, Producer]]:
    """A stream in shared memory, and its producer, in this process."""
    with contextlib.ExitStack() as cleanup:
        directory = LaunchDirectory()
        cleanup.callback(directory.remove)
        directory.create()
        twin = directory.twin("DATA", 0)
        address = Address(f"tcp://127.0.0.1:{free_port()}", twin)
        yield address, SharedPlace(twin), cleanup.enter_context(open_sink(address))


class Missing:
    """Needs a module where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, ("no_such_module",)


def publish_some(sink: Producer, bad: Any) -> None:
    """Six messages, of which the third and the fifth are bad."""
    for i in range(6):
        sink.publish({"i": i, "image": np.full(9000, i, np.uint8), "pose": bad if i in (2, 4) else 0})


def refuse(item: dict[str, Any]) -> dict[str, Any]:
    if item["pose"] == "bad":
        raise LookupError(f"no such pose in {item['i']}")
    return item


BAD = [(Missing(), None, "'pose'.*no_such_module"), ("bad", refuse, "no such pose")]
"""What to publish, the transform of it, and what is raised."""
