"""The command that removes what dead launches left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blendtorch_shm.launch.directory import LOCK_FILE, LaunchDirectory
from torch_side.apps.clean import main

from .conftest import eventually

LAUNCHER = """
import sys
import posix_ipc
from blendtorch_shm.launch.directory import LaunchDirectory
directory = LaunchDirectory().create()
posix_ipc.SharedMemory(f"/bt-{directory.launch}-DATA-0", posix_ipc.O_CREX, size=4096).close_fd()
print(directory.path, directory.launch, flush=True)
sys.stdin.read()
"""


def test_what_dead_launches_left_is_removed_and_living_ones_are_not_touched(capsys: pytest.CaptureFixture[str]) -> None:
    living = LaunchDirectory().create()
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as dead:
        assert dead.stdout is not None
        path, launch = dead.stdout.readline().split()
        dead.send_signal(signal.SIGKILL)
    assert main([]) == 0
    assert f"removed launch {launch}" in capsys.readouterr().out
    assert not os.path.exists(path)
    assert not [name for name in os.listdir("/dev/shm") if launch in name]
    assert os.path.isdir(living.path)
    assert os.path.isdir(living.streams)
    # Other tests' launches may be dead for a moment.
    eventually(lambda: main([]) == 0 and "nothing to remove" in capsys.readouterr().out)
    living.remove()


def test_what_is_in_doubt_is_left_and_listed_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.environ["XDG_RUNTIME_DIR"], "blendtorch-98c0429a")
    folder.mkdir(mode=0o700)
    long_ago = time.time() - 900
    os.utime(folder, (long_ago, long_ago))
    try:
        assert main([]) == 0
        assert (
            f"left {folder}: it has no {LOCK_FILE}; remove it yourself if you do not need it\n"
            in capsys.readouterr().out
        )
        assert folder.is_dir()
    finally:
        folder.rmdir()
