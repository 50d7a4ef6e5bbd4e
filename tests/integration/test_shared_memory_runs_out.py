"""A /dev/shm that is too small: a clear error within seconds, or fewer slots; never a crash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"

PROGRAM = """
import sys
from torch_side import BlenderLauncher, RemoteIterableDataset
from blendtorch_shm.errors import InstanceDied

if __name__ == "__main__":
    with BlenderLauncher("", {script!r}, 1, ["DATA"], instance_args=[{args!r}], blender="python", progress=False) as bl:
        try:
            items = list(RemoteIterableDataset(bl.launch_info.addresses["DATA"], max_items=30))
            assert all((item["image"] == item["value"]).all() for item in items)
            print("received", len(items), [item["frameid"] for item in items] == list(range(30)))
            print(open(bl.launch_info.addresses["DATA"][0].twin.directory + "/instance-00.log").read())
        except InstanceDied as error:
            print("InstanceDied:", error)
"""


def run_with_shm(nbytes: int, *args: str) -> str:
    """Run :data:`PROGRAM` where /dev/shm has `nbytes`; its output."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to mount a small /dev/shm")
    program = PROGRAM.format(script=str(SCRIPTS / "count.py"), args=list(args))
    mount = f'mount -t tmpfs -o size={nbytes} tmpfs /dev/shm && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, sys.executable, program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_room_at_all_is_one_error_with_the_numbers_and_the_remedy() -> None:
    output = run_with_shm(2**20, "--shape", "480", "640", "3")
    assert "InstanceDied:" in output
    assert "OutOfSharedMemory: /dev/shm is full: " in output
    assert "needs 3.8 MiB" in output
    assert "of 1.0 MiB are free" in output
    assert "--shm-size" in output


def test_too_little_room_means_fewer_slots_and_the_stream_runs() -> None:
    output = run_with_shm(8 * 2**20, "--shape", "480", "640", "3")
    assert "received 30 True" in output
    assert "Trying with 8 slots" in output
