"""The command that removes what dead launches left."""

import os
import signal
import subprocess
import sys

import pytest

from blendtorch_shm.launch.directory import LaunchDirectory
from torch_side.apps.clean import main

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
    assert main([]) == 0
    assert "nothing to remove" in capsys.readouterr().out
    living.remove()
