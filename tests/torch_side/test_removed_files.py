"""Files of a launch that somebody removes while it runs: what cleans up by age, the end of a login, the user."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import torch_side.launching.instance
from blendtorch_shm.errors import InstanceDied, SegmentError
from blendtorch_shm.launch.address import Twin
from blendtorch_shm.launch.directory import LOCK_FILE, is_abandoned
from torch_side import BlenderLauncher, RemoteIterableDataset

from .conftest import eventually

PUBLISH = """
import os, time
import numpy as np
import blendtorch.btb as btb
args, rest = btb.parse_blendtorch_args()
run = int(os.environ["BLENDTORCH_RESTARTS"])
publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid)
n = 0
while True:
    publisher.publish(image=np.full((48, 64, 3), n % 256, np.uint8), run=run, n=n)
    print("published", run, n, flush=True)
    n += 1
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts without long pauses."""
    monkeypatch.setattr(torch_side.launching.instance, "_FIRST_PAUSE_S", 0.02)


@pytest.fixture
def launcher(script: Callable[[str], Path]) -> Iterator[BlenderLauncher]:
    with BlenderLauncher(
        *("", script(PUBLISH), 1, ["DATA"]), blender="python", progress=False, restart="on-failure"
    ) as launcher:
        yield launcher


def twin_of(launcher: BlenderLauncher) -> Twin:
    twin = launcher.launch_info.addresses["DATA"][0].twin
    assert twin is not None
    return twin


def stream(launcher: BlenderLauncher) -> Iterator[dict[str, Any]]:
    return iter(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=10**6, timeoutms=60_000))


def remove_folder(path: str) -> None:
    """Remove a folder into which somebody may just be writing."""
    os.rename(path, f"{path}-gone")
    shutil.rmtree(f"{path}-gone")


def remove(twin: Twin, what: str) -> None:
    for each in what.split(" and "):
        if each == "logs":
            remove_folder(twin.directory)
        elif each == "streams":
            remove_folder(twin.streams)
        elif each == "rings":
            for path in Path("/dev/shm").glob(f"bt-{twin.launch}-*"):
                path.unlink()
        else:
            Path(twin.streams, each).unlink()


@pytest.mark.parametrize("gone", ["logs", "streams", "logs and streams and rings", "DATA-0.lock", LOCK_FILE])
def test_an_instance_starts_again_and_its_reader_goes_on_whatever_was_removed(
    launcher: BlenderLauncher, gone: str, caplog: pytest.LogCaptureFixture
) -> None:
    twin = twin_of(launcher)
    items = stream(launcher)
    assert next(items)["n"] == 0
    remove(twin, gone)
    received = [int(next(items)["n"]) for _ in range(20)]
    assert received == list(range(1, 21))
    subprocess.run([sys.executable, "-c", "from blendtorch_shm.launch.sweep import sweep; sweep()"], check=True)
    assert not is_abandoned(twin.launch)
    os.kill((launcher.processes or [])[0].pid, signal.SIGKILL)
    item = next(item for item in items if item["run"] == 1)
    assert (item["image"] == item["n"] % 256).all()
    assert "was removed" in caplog.text or "made anew" in caplog.text
    assert eventually(lambda: launcher.reports() and launcher.reports()[0].state == "running")
    assert next(stream(launcher))["run"] == 1


@pytest.mark.parametrize("gone", ["rings", "DATA-0.lock", "streams and rings", "logs and streams and rings"])
def test_a_new_reader_is_told_at_once_that_what_it_reads_was_removed(launcher: BlenderLauncher, gone: str) -> None:
    items = stream(launcher)
    next(items)
    remove(twin_of(launcher), gone)
    with pytest.raises(
        SegmentError, match=r"'DATA' of instance 0 .*was removed.*0 of 1000000 items had arrived.*launch anew"
    ):
        next(stream(launcher))
    next(items)


def test_logs_and_reports_go_on_where_their_directory_was_removed(launcher: BlenderLauncher) -> None:
    twin = twin_of(launcher)
    items = stream(launcher)
    eventually(lambda: launcher.reports()[0].state == "running")
    remove_folder(twin.directory)
    log = Path(twin.directory, "instance-00.log")
    last = [int(next(items)["n"]) for _ in range(20)][-1]
    seen = eventually(lambda: log.exists() and f"published 0 {last}\n" in (text := log.read_text()) and text)
    assert [line for line in seen.splitlines() if line][-1].startswith("published 0 ")
    (report,) = launcher.reports()
    assert (report.state, report.pid) == ("running", (launcher.processes or [])[0].pid)
    assert Path(twin.directory, "instance-00.started").exists()


def test_an_instance_is_recycled_and_its_error_known_although_the_directory_was_just_removed(
    script: Callable[[str], Path],
) -> None:
    path = script(
        "import os, shutil\nimport blendtorch.btb as btb\nargs, _ = btb.parse_blendtorch_args()\n"
        "publisher = btb.DataPublisher(args.btsockets['DATA'], args.btid)\npublisher.publish(n=0)\n"
        "shutil.rmtree(os.path.dirname(os.environ['BLENDTORCH_INSTANCE']))\n"
        "if os.environ['BLENDTORCH_RESTARTS'] == '1':\n    raise ValueError('the cube is gone')\n"
        "publisher.publish(n=1)\nraise AssertionError('not recycled')"
    )
    with BlenderLauncher("", path, 1, ["DATA"], blender="python", progress=False, recycle_after=1) as launcher:
        assert launcher.wait() == [1]
        (report,) = launcher.reports()
        assert report.restarts == 1
        assert report.error.startswith("ValueError: the cube is gone")
        assert "the cube is gone" in report.log_tail


def test_the_last_words_of_an_instance_are_known_although_the_directory_was_just_removed(
    script: Callable[[str], Path],
) -> None:
    path = script(
        "import os, shutil\nprint('last words', flush=True)\n"
        "shutil.rmtree(os.path.dirname(os.environ['BLENDTORCH_INSTANCE']))\nos._exit(3)"
    )
    with BlenderLauncher("", path, blender="python", progress=False) as launcher:
        assert launcher.wait() == [3]
        with pytest.raises(InstanceDied, match="last words"):
            launcher.assert_alive()


def test_an_instance_starts_again_without_a_log_where_there_is_no_place_for_one(
    launcher: BlenderLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a login ends: the directory above is gone, too. Somebody else's file stands in for that."""
    twin = twin_of(launcher)
    items = stream(launcher)
    next(items)
    remove_folder(twin.directory)
    Path(twin.directory).touch()
    os.kill((launcher.processes or [])[0].pid, signal.SIGKILL)
    assert next(item for item in items if item["run"] == 1)
    assert "its log cannot be made" in caplog.text
    assert [next(items) for _ in range(20)]
    assert caplog.text.count("cannot be made anew") == 1
    assert caplog.text.count("Cannot note the state") <= 4, "not again and again"
    with contextlib.suppress(FileNotFoundError):
        Path(twin.directory).unlink()
