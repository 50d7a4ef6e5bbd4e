"""What a launch does to other launches and to folders that only look like one: real launches, in processes of their own."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blendtorch_shm.launch.directory import LOCK_FILE
from torch_side import BlenderLauncher, RemoteIterableDataset

from .conftest import launch

ANOTHER_LAUNCH = """
import sys
from torch_side.launcher import BlenderLauncher
with BlenderLauncher("", sys.argv[1], 1, ["DATA"], blender="python", progress=False):
    pass
"""


@pytest.fixture
def launch_elsewhere(tmp_path: Path) -> Callable[[], str]:
    """Launch once, in another process of this user; what it logged."""
    script = tmp_path / "nothing.py"
    script.touch()

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", ANOTHER_LAUNCH, script], stderr=subprocess.PIPE, text=True, check=True
        )
        return done.stderr

    return run


def make_old(folder: str) -> None:
    long_ago = time.time() - 900
    os.utime(folder, (long_ago, long_ago))


def number_of(items: Iterator[dict[str, object]]) -> object:
    return next(items)["frameid"]


def test_a_launch_leaves_a_users_folder_alone_that_is_called_like_one(launch_elsewhere: Callable[[], str]) -> None:
    """A checkout that is named after its commit."""
    folder = Path(os.environ["XDG_RUNTIME_DIR"], "blendtorch-98c0429a")
    (folder / "src").mkdir(parents=True)
    (folder / "src/thesis.txt").write_text("mine")
    try:
        for mode, words in [(0o755, 0), (0o700, 1)]:
            folder.chmod(mode)
            make_old(str(folder))
            assert launch_elsewhere().count(f"{folder} may be what a dead launch left, and stays") == words
            assert (folder / "src/thesis.txt").read_text() == "mine"
    finally:
        shutil.rmtree(folder)


def test_a_launch_survives_that_a_cleaner_removes_its_old_lock_file(launch_elsewhere: Callable[[], str]) -> None:
    with launch(num_instances=1) as launcher:
        directory, addresses = directory_of(launcher), launcher.launch_info.addresses["DATA"]
        reader = iter(RemoteIterableDataset(addresses, max_items=10**6))
        assert number_of(reader) == 0
        os.unlink(f"{directory}/{LOCK_FILE}")
        make_old(directory)
        assert "may be what a dead launch left" not in launch_elsewhere()
        assert os.path.isdir(directory)
        assert number_of(reader) == 1
        assert number_of(iter(RemoteIterableDataset(addresses, max_items=1))) == 2
    assert not os.path.exists(directory)


def test_a_launch_survives_that_its_directory_is_copied(launch_elsewhere: Callable[[], str], tmp_path: Path) -> None:
    """The training process copies the logs: that opens and closes the file whose lock the same process holds."""
    with launch(restart="on-failure") as launcher:
        directory = directory_of(launcher)
        reader = iter(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=10**6))
        next(reader)
        shutil.copytree(directory, tmp_path / "logs")
        processes = list(launcher.launch_info.processes or [])
        launch_elsewhere()
        assert [process.poll() for process in processes] == [None, None]
        assert os.path.isdir(directory)
        for _ in range(100):
            next(reader)
        assert [report.restarts for report in launcher.reports()] == [0, 0]


def directory_of(launcher: BlenderLauncher) -> str:
    twin = launcher.launch_info.addresses["DATA"][0].twin
    assert twin is not None
    return twin.directory
