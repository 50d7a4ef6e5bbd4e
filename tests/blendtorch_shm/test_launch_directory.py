"""The directory of a launch, and what becomes of it when its launcher dies."""

import dataclasses
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from blendtorch_shm.errors import LaunchError
from blendtorch_shm.launch import directory as launch_directory
from blendtorch_shm.launch.directory import (
    LAUNCH_VARIABLE,
    LaunchDirectory,
    instance_reports,
    log_path,
    processes_of,
    renderer_path,
    started_path,
    sweep,
    write_status,
)

from ..interruption import everywhere

OTHER_LAUNCHER = """
import sys
from blendtorch_shm.launch.directory import LaunchDirectory
directory = LaunchDirectory().create()
print(directory.path, directory.launch, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory() -> Iterator[LaunchDirectory]:
    directory = LaunchDirectory().create()
    yield directory
    directory.remove()


class OtherLauncher:
    """Another process that owns a launch directory, and has shared memory."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER_LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.path, self.launch = self.process.stdout.readline().split()
        posix_ipc.SharedMemory(f"/bt-{self.launch}-DATA-0-c", posix_ipc.O_CREX, size=4096).close_fd()

    def shared_memory(self) -> list[str]:
        return [name for name in os.listdir("/dev/shm") if self.launch in name]

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.communicate()


@pytest.fixture
def other() -> Iterator[OtherLauncher]:
    other = OtherLauncher()
    yield other
    other.end(signal.SIGKILL)
    sweep()


def test_only_this_user_can_look_into_a_launch(directory: LaunchDirectory) -> None:
    status = os.stat(directory.path)
    assert stat.S_IMODE(status.st_mode) == 0o700
    assert Path(directory.path).parent == Path(os.environ["XDG_RUNTIME_DIR"])
    assert Path(directory.path).name == f"blendtorch-{directory.launch}"
    assert stat.S_IMODE(os.stat(directory.streams).st_mode) == 0o700


def test_removing_a_launch_removes_its_shared_memory_and_nobody_elses(
    directory: LaunchDirectory, other: OtherLauncher
) -> None:
    posix_ipc.SharedMemory(f"/bt-{directory.launch}-DATA-0-c", posix_ipc.O_CREX, size=4096).close_fd()
    Path(directory.twin("DATA", 0).lock_path).touch()
    directory.remove()
    assert not os.path.exists(directory.path)
    assert not [name for name in os.listdir("/dev/shm") if directory.launch in name]
    assert len(other.shared_memory()) == 2


def test_removing_twice_is_removing_once(directory: LaunchDirectory) -> None:
    directory.remove()
    directory.remove()


def test_an_interrupt_anywhere_leaves_nothing_behind() -> None:
    directory = LaunchDirectory()

    def create_and_remove() -> None:
        nonlocal directory
        directory = LaunchDirectory()
        directory.create()
        directory.remove()

    for place in everywhere(create_and_remove, [launch_directory.__file__]):
        directory.remove()  # what was interrupted may be the last one's removal
        assert not os.path.lexists(directory.path), place
        assert not [name for name in os.listdir("/dev/shm") if directory.launch in name], place
        assert directory.launch not in launch_directory._mine, place


def test_a_forked_child_does_not_remove_its_parents_launch(directory: LaunchDirectory) -> None:
    child = os.fork()
    if child == 0:
        directory.remove()
        sweep()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.path.isdir(directory.path)


def test_a_sweep_leaves_the_living_alone(directory: LaunchDirectory, other: OtherLauncher) -> None:
    assert sweep() == []
    assert os.path.isdir(directory.path)
    assert os.path.isdir(other.path)
    assert len(other.shared_memory()) == 2


def test_a_sweep_removes_what_a_killed_launcher_left(other: OtherLauncher) -> None:
    other.end(signal.SIGKILL)
    assert sweep() == [other.launch]
    assert not os.path.exists(other.path)
    assert other.shared_memory() == []


def test_a_sweep_ends_the_processes_of_a_dead_launch_in_whatever_session(other: OtherLauncher) -> None:
    orphan = subprocess.Popen(
        [sys.executable, "-c", "print('here', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, LAUNCH_VARIABLE: other.launch},
        start_new_session=True,
    )
    assert orphan.stdin is not None
    assert orphan.stdout is not None
    orphan.stdout.readline()
    assert processes_of(other.launch) == [orphan.pid]
    other.end(signal.SIGKILL)
    sweep()
    assert orphan.wait() == -signal.SIGKILL
    orphan.stdin.close()
    orphan.stdout.close()


def test_a_sweep_removes_the_temporary_directory_that_a_killed_blender_left(
    other: OtherLauncher, tmp_path: Path
) -> None:
    scratch = tmp_path / "blender_abcdef"
    scratch.mkdir()
    (tmp_path / "mine").mkdir()
    Path(started_path(other.path, 0)).write_text(f"{scratch}/")
    Path(started_path(other.path, 1)).write_text(f"{tmp_path}/mine/")
    other.end(signal.SIGKILL)
    sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_directory_without_a_lock_is_given_time_to_get_one() -> None:
    half_made = Path(os.environ["XDG_RUNTIME_DIR"], ".blendtorch-01234567")
    half_made.mkdir()
    assert sweep() == []
    long_ago = time.time() - 2 * launch_directory._ABANDONED_S
    os.utime(half_made, (long_ago, long_ago))
    assert sweep() == ["01234567"]
    assert not half_made.exists()


def test_a_directory_that_has_its_lock_file_and_not_yet_its_lock_is_given_time_to_get_it() -> None:
    half_made = Path(os.environ["XDG_RUNTIME_DIR"], ".blendtorch-01234567")
    half_made.mkdir()
    (half_made / launch_directory._LOCK).touch()
    assert sweep() == []
    long_ago = time.time() - 2 * launch_directory._ABANDONED_S
    os.utime(half_made, (long_ago, long_ago))
    assert sweep() == ["01234567"]
    assert not half_made.exists()


def test_a_link_that_looks_like_a_launch_is_not_followed(tmp_path: Path) -> None:
    link = Path(os.environ["XDG_RUNTIME_DIR"], "blendtorch-0123abcd")
    link.symlink_to(tmp_path)
    try:
        assert sweep() == []
        assert tmp_path.is_dir()
    finally:
        link.unlink()


def test_logs_may_lie_in_shared_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/dev/shm")
    directory = LaunchDirectory().create()
    assert directory.path == directory.streams
    directory.remove()
    assert not os.path.exists(directory.path)


def test_without_any_usable_base_the_error_names_them_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch_directory, "_candidates", lambda: [str(tmp_path / "none"), str(tmp_path / "other")])
    with pytest.raises(LaunchError, match=r"none, .*other cannot be written.*TMPDIR"):
        LaunchDirectory().create()


def test_who_sees_the_beacon_is_here_for_as_long_as_the_launch_lives(directory: LaunchDirectory) -> None:
    twin = directory.twin("DATA", 0)
    assert twin.is_here()
    assert not dataclasses.replace(twin, nonce="0" * 32).is_here(), "another launch of the same name"
    directory.remove()
    assert not twin.is_here()


def test_a_report_tells_what_is_known_of_each_instance(directory: LaunchDirectory) -> None:
    path = directory.path
    for btid, state in [(10, "exited"), (2, "running"), (0, "starting")]:
        write_status(path, btid, 4711, state, -11 if state == "exited" else None)  # type: ignore[arg-type]
    Path(log_path(path, 2)).write_text("".join(f"line {i}\n" for i in range(100)))
    Path(renderer_path(path, 2)).write_text("EEVEE on llvmpipe\n")
    first, second, third = instance_reports(path)
    assert [(r.btid, r.state, r.exit_code) for r in (first, second, third)] == [
        (0, "starting", None),
        (2, "running", None),
        (10, "exited", -11),
    ]
    assert second.log_tail.splitlines() == [f"line {i}" for i in range(80, 100)]
    assert second.renderer == "EEVEE on llvmpipe"
    assert (first.log_tail, first.renderer) == ("", "")


def test_a_log_of_one_endless_line_is_cut(directory: LaunchDirectory) -> None:
    write_status(directory.path, 0, 4711, "running", None)
    Path(log_path(directory.path, 0)).write_bytes(b"\xff" + b"x" * 1_000_000)
    assert len(instance_reports(directory.path)[0].log_tail) == 8192


def test_there_is_nothing_to_report_once_a_launch_is_over(directory: LaunchDirectory) -> None:
    write_status(directory.path, 0, 4711, "running", None)
    directory.remove()
    assert instance_reports(directory.path) == []
