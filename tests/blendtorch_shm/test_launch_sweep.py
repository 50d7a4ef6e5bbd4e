"""What a sweep removes, and what it leaves alone: only what proves to be of a dead launch goes."""

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import posix_ipc
import pytest

from blendtorch_shm.launch import directory as launch_directory
from blendtorch_shm.launch import sweep as launch_sweep
from blendtorch_shm.launch.directory import LOCK_FILE, LaunchDirectory
from blendtorch_shm.launch.notes import INSTANCE_VARIABLE, LAUNCH_VARIABLE, instance_path, note_path
from blendtorch_shm.launch.sweep import processes_of, sweep, sweep_and_warn


class Launch:
    """A launch of another process, with shared memory, that lives until it is killed.

    Args:
        also: what that process does once it has made its directories.
    """

    def __init__(self, also: Callable[[], object] = lambda: None) -> None:
        self.directory = LaunchDirectory()
        self.path, self.streams = self.directory.path, self.directory.streams
        self.launch = self.directory.launch
        readable, writable = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self.directory.create()
                posix_ipc.SharedMemory(f"/bt-{self.launch}-DATA-0", posix_ipc.O_CREX, size=4096).close_fd()
                also()
                os.write(writable, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.close(writable)
        assert os.read(readable, 1) == b"x", "the other process has made its directories"
        os.close(readable)

    def kill(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def is_whole(self) -> bool:
        return os.path.isdir(self.path) and os.path.isdir(self.streams) and os.path.exists(self.shared_memory)

    def is_gone(self) -> bool:
        return not any(os.path.lexists(path) for path in (self.path, self.streams, self.shared_memory))

    @property
    def shared_memory(self) -> str:
        return f"/dev/shm/bt-{self.launch}-DATA-0"


@pytest.fixture
def other() -> Iterator[Launch]:
    other = Launch()
    yield other
    other.kill()
    for path in (other.path, other.streams):
        shutil.rmtree(path, ignore_errors=True)
    Path(other.shared_memory).unlink(missing_ok=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that is called like a launch's, private and old, where launches have theirs."""
    folder = Path(os.environ["XDG_RUNTIME_DIR"], "blendtorch-0123abcd")
    folder.mkdir(mode=0o700)
    make_old(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def make_old(folder: Path) -> None:
    long_ago = time.time() - 2 * launch_sweep._UNFINISHED_S
    os.utime(folder, (long_ago, long_ago))


def left() -> dict[str, str]:
    """What a sweep leaves where this run's launches have their logs, by the names of the folders."""
    base = os.environ["XDG_RUNTIME_DIR"]
    return {os.path.basename(path): why for path, why in sweep().left.items() if os.path.dirname(path) == base}


# -- what proves to be of a dead launch --------------------------------------------------------------------------------


def test_what_a_killed_launcher_left_is_removed(other: Launch) -> None:
    other.kill()
    assert other.is_whole()
    swept = sweep()
    assert other.launch in swept.removed
    assert other.path not in swept.left
    assert other.is_gone()


def test_the_living_are_left_alone(other: Launch) -> None:
    own = LaunchDirectory().create()
    swept = sweep()
    assert not {own.launch, other.launch} & set(swept.removed)
    assert not {own.path, own.streams, other.path, other.streams} & set(swept.left)
    assert other.is_whole()
    assert os.path.isdir(own.path)
    assert os.path.isdir(own.streams)
    own.remove()


def test_processes_of_a_dead_launch_end_in_whatever_session(other: Launch) -> None:
    instance = instance_path(other.path, 3)
    orphan = subprocess.Popen(
        [sys.executable, "-c", "print('here', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, LAUNCH_VARIABLE: other.launch, INSTANCE_VARIABLE: instance},
        start_new_session=True,
    )
    assert orphan.stdin is not None
    assert orphan.stdout is not None
    orphan.stdout.readline()
    sweep()
    assert processes_of(other.launch) == [orphan.pid]
    assert processes_of(other.launch, instance) == [orphan.pid]
    assert processes_of(other.launch, instance_path(other.path, 0)) == []
    other.kill()
    sweep()
    assert orphan.wait() == -signal.SIGKILL
    orphan.stdin.close()
    orphan.stdout.close()


def test_a_process_does_not_remove_the_launch_that_it_belongs_to(
    other: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.kill()
    monkeypatch.setenv(LAUNCH_VARIABLE, other.launch)
    assert "this process belongs to the launch" in sweep().left[other.path]
    assert other.is_whole()


def test_temporary_directories_of_killed_blenders_go_and_other_folders_that_a_note_names_stay(
    other: Launch, tmp_path: Path
) -> None:
    names = ["blender_abcdef", "blender_shared", "blender_projects", "mine"]
    for btid, name in enumerate(names):
        (tmp_path / name).mkdir(mode=0o755 if name == "blender_shared" else 0o700)
        Path(note_path(other.path, btid, "started")).write_text(f"{tmp_path / name}/")
    other.kill()
    sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_forked_child_does_not_keep_its_dead_parent_alive() -> None:
    readable, writable = os.pipe()

    def fork() -> None:
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        os.write(writable, str(child).encode())

    other = Launch(also=fork)
    child = int(os.read(readable, 20))
    other.kill()
    sweep()
    os.kill(child, 0)  # it lives
    os.kill(child, signal.SIGKILL)
    os.close(readable)
    os.close(writable)
    assert other.is_gone()


def test_sweeps_at_once_do_not_disturb_each_other() -> None:
    launches = [Launch() for _ in range(4)]
    for launch in launches:
        launch.kill()
    with ThreadPoolExecutor(4) as pool:
        results = [future.result() for future in [pool.submit(sweep) for _ in range(4)]]
    assert {launch.launch for launch in launches} <= {name for swept in results for name in swept.removed}
    assert all(launch.is_gone() for launch in launches)


def test_the_part_of_a_launch_that_another_container_sees_is_enough(
    other: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It shares /dev/shm, and has other directories for logs."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        sweep()
        assert other.is_whole()
        other.kill()
        sweep()
    assert os.listdir(other.path), "it cannot be seen from there"
    assert not os.path.exists(other.streams)
    assert not os.path.exists(other.shared_memory)
    sweep()
    assert other.is_gone()


# -- launches that come and go meanwhile -------------------------------------------------------------------------------


def at_each_line_of_the_directory_module(run: Callable[[], object], do: Callable[[], object]) -> int:
    """Call `run`, and `do` before each of the lines of launch/directory.py that it runs; the number of these lines."""
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if frame.f_code.co_filename != launch_directory.__file__:
            return None
        nonlocal lines
        if event == "line":
            lines += 1
            sys.settrace(None)
            do()
            sys.settrace(trace)
        return trace

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(tracing)
    return lines


def test_sweeps_while_a_launch_is_made_change_nothing_even_if_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_sweep, "_UNFINISHED_S", -1.0)
    directory = LaunchDirectory()
    removed: list[str] = []
    try:
        assert at_each_line_of_the_directory_module(directory.create, lambda: removed.extend(sweep().removed)) > 10
        assert directory.launch not in removed
        assert sorted(os.listdir(directory.path)) == [LOCK_FILE]
        assert sorted(os.listdir(directory.streams)) == ["beacon", LOCK_FILE]
    finally:
        directory.remove()


def test_sweeps_while_a_launch_is_removed_say_nothing_of_it() -> None:
    directory = LaunchDirectory().create()
    told: set[str] = set()
    assert at_each_line_of_the_directory_module(directory.remove, lambda: told.update(sweep().left)) > 10
    assert not [path for path in told if directory.launch in path]
    assert not os.path.exists(directory.path)
    assert not os.path.exists(directory.streams)


def test_as_long_as_a_directory_holds_anything_it_can_be_proved_whose_it_is() -> None:
    """So what a killed removal leaves, the next sweep removes."""
    directory = LaunchDirectory().create()
    for path in (directory.path, directory.streams):
        for number in range(20):
            Path(path, f"file-{number}").touch()

    def check() -> None:
        for path in (directory.path, directory.streams):
            assert not os.path.exists(path) or LOCK_FILE in os.listdir(path)

    assert at_each_line_of_the_directory_module(directory.remove, check) > 40
    assert not os.path.exists(directory.path)
    assert not os.path.exists(directory.streams)


# -- what is in doubt --------------------------------------------------------------------------------------------------


def test_a_folder_without_a_lock_stays_and_the_log_says_so_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "thesis.txt").write_text("mine")
    make_old(folder)
    with caplog.at_level(logging.WARNING, logger="blendtorch"):
        sweep_and_warn()
        sweep_and_warn()
    assert [record.getMessage() for record in caplog.records if str(folder) in record.getMessage()] == [
        f"{folder} may be what a dead launch left, and stays: it has no {LOCK_FILE}. Remove it if you do not need it."
    ]
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_folder_that_everybody_may_read_is_nobodys_launch_and_not_worth_a_word(folder: Path) -> None:
    folder.chmod(0o755)
    assert left() == {}
    assert folder.is_dir()


def test_a_young_folder_may_be_in_the_making(folder: Path) -> None:
    os.utime(folder)
    assert left() == {}
    (folder / LOCK_FILE).touch()
    assert left() == {}
    make_old(folder)
    assert list(left()) == [folder.name]


@pytest.mark.parametrize("name", [".blendtorch-0123abcd", f".blendtorch-0123abcd-{'0' * 32}"])
def test_an_unfinished_directory_stays_and_is_mentioned_once_it_is_old(name: str) -> None:
    unfinished = Path(os.environ["XDG_RUNTIME_DIR"], name)
    unfinished.mkdir(mode=0o700)
    try:
        assert left() == {}
        make_old(unfinished)
        assert left() == {name: f"it has no {LOCK_FILE}"}
    finally:
        unfinished.rmdir()


def test_an_unfinished_directory_that_was_marked_is_removed(other: Launch) -> None:
    other.kill()
    unfinished = Path(os.environ["XDG_RUNTIME_DIR"], f".{os.path.basename(other.path)}-{'0' * 32}")
    os.rename(other.path, unfinished)
    sweep()
    assert not unfinished.exists()
    assert other.is_gone()


def test_a_launch_lives_while_one_of_its_two_locks_is_held(other: Launch) -> None:
    os.unlink(f"{other.path}/{LOCK_FILE}")
    make_old(Path(other.path))
    assert left() == {}
    assert other.is_whole()
    (Path(other.path) / LOCK_FILE).touch()  # somebody's touch proves nothing
    make_old(Path(other.path))
    assert left() == {}
    assert other.is_whole()


def test_a_directory_that_lost_its_lock_stays_when_its_launcher_is_dead(other: Launch) -> None:
    os.unlink(f"{other.path}/{LOCK_FILE}")
    other.kill()
    make_old(Path(other.path))
    assert left() == {os.path.basename(other.path): f"it has no {LOCK_FILE}"}
    assert os.path.isdir(other.path)
    assert not os.path.exists(other.streams)
    assert not os.path.exists(other.shared_memory)


def test_without_both_locks_nothing_is_removed(other: Launch) -> None:
    for path in (other.path, other.streams):
        os.unlink(f"{path}/{LOCK_FILE}")
        make_old(Path(path))
    other.kill()
    assert {other.path, other.streams} <= set(sweep().left)
    assert other.is_whole()


def test_a_copy_of_a_launchs_directory_stays(other: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    copy = tmp_path / os.path.basename(other.path)
    shutil.copytree(other.path, copy)
    make_old(copy)
    other.kill()
    assert "it is a copy" in sweep().left[str(copy)]
    assert other.is_gone()
    assert sorted(os.listdir(copy)) == [LOCK_FILE]


def test_a_directory_from_before_a_restart_of_the_host_or_of_another_host_stays(other: Launch) -> None:
    other.kill()
    for path in (other.path, other.streams):
        lock = Path(path, LOCK_FILE)
        lock.write_text(lock.read_text().replace(launch_directory.boot_id(), "01234567-89ab-cdef-0123-456789abcdef"))
    assert "another host" in sweep().left[other.path]
    assert other.is_whole()


def test_a_directory_whose_mode_was_changed_stays(other: Launch) -> None:
    other.kill()
    os.chmod(other.path, 0o755)
    assert left() == {os.path.basename(other.path): "its mode is 755, and that of a launch's directory 700"}
    assert not os.path.exists(other.streams)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_directory_of_another_user_is_none_of_our_business(other: Launch) -> None:
    other.kill()
    for path in (other.path, other.streams):
        os.chown(path, 12345, 12345)
    swept = sweep()
    assert not {other.path, other.streams} & set(swept.left)
    assert other.is_whole()


def test_a_link_that_looks_like_a_launch_is_not_followed(other: Launch, tmp_path: Path) -> None:
    other.kill()
    link = Path(os.environ["XDG_RUNTIME_DIR"], "blendtorch-0123abcd")
    target = tmp_path / "target"
    os.rename(other.path, target)
    link.symlink_to(target)
    try:
        assert left() == {}
        assert sorted(os.listdir(target)) == [LOCK_FILE]
    finally:
        link.unlink()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_proves_nothing(folder: Path, tmp_path: Path, kind: str) -> None:
    lock = folder / LOCK_FILE
    {"link": lambda: lock.symlink_to(tmp_path), "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    make_old(folder)
    assert list(left()) == [folder.name]
    assert os.path.lexists(lock)


def test_a_launch_of_an_older_version_stays_and_is_mentioned_once_it_is_dead(folder: Path) -> None:
    """Those had an empty lock file, with a POSIX lock."""
    (folder / LOCK_FILE).touch()
    make_old(folder)
    readable, writable = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        fcntl.lockf(os.open(folder / LOCK_FILE, os.O_RDWR), fcntl.LOCK_EX)
        os.write(writable, b"x")
        signal.pause()
    os.read(readable, 1)
    os.close(readable)
    os.close(writable)
    while_it_lived = left()
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert while_it_lived == {}
    assert "older versions" in left()[folder.name]
    assert folder.is_dir()
