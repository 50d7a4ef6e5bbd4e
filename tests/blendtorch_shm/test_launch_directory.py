"""The directories of a launch: who makes, locks and removes them."""

import dataclasses
import fcntl
import gc
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from blendtorch_shm.errors import LaunchError
from blendtorch_shm.launch import directory as launch_directory
from blendtorch_shm.launch.directory import LOCK_FILE, MARKER, LaunchDirectory, is_abandoned
from blendtorch_shm.launch.sweep import sweep
from blendtorch_shm.memory.locks import is_locked

from ..interruption import everywhere


@pytest.fixture
def directory() -> Iterator[LaunchDirectory]:
    directory = LaunchDirectory().create()
    yield directory
    directory.remove()


def test_only_this_user_can_look_into_a_launch(directory: LaunchDirectory) -> None:
    status = os.stat(directory.path)
    assert stat.S_IMODE(status.st_mode) == 0o700
    assert Path(directory.path).parent == Path(os.environ["XDG_RUNTIME_DIR"])
    assert Path(directory.path).name == f"blendtorch-{directory.launch}"
    assert stat.S_IMODE(os.stat(directory.streams).st_mode) == 0o700


def test_removing_a_launch_removes_its_shared_memory_and_nobody_elses(
    directory: LaunchDirectory,
) -> None:
    other = LaunchDirectory().create()
    for launch in (directory.launch, other.launch):
        posix_ipc.SharedMemory(f"/bt-{launch}-DATA-0-c", posix_ipc.O_CREX, size=4096).close_fd()
    Path(directory.twin("DATA", 0).lock_path).touch()
    directory.remove()
    assert not os.path.exists(directory.path)
    assert not [name for name in os.listdir("/dev/shm") if directory.launch in name]
    assert len([name for name in os.listdir("/dev/shm") if other.launch in name]) == 2
    other.remove()


def test_what_cannot_be_removed_keeps_neither_the_rest_nor_the_next_launch(directory: LaunchDirectory) -> None:
    """Anybody on this host may make a file that is called like this launch's memory; a folder stands for what stays."""
    stays = Path(f"/dev/shm/bt-{directory.launch}-AAAA")
    stays.mkdir()
    try:
        for name in ("", "-DATA-0", "-ZZZZ"):  # the folder is not the last one, in whatever order they are found
            posix_ipc.SharedMemory(f"/bt-{directory.launch}-{name}", posix_ipc.O_CREX, size=4096).close_fd()
        directory.remove()
        assert not os.path.exists(directory.path)
        assert [name for name in os.listdir("/dev/shm") if directory.launch in name] == [stays.name]
    finally:
        stays.rmdir()


def lock_is_held(path: str) -> bool:
    with open(f"{path}/{LOCK_FILE}", "rb") as lock:
        return is_locked(lock.fileno(), 0, 0)


def test_each_directory_says_whose_it_is_and_is_locked_until_it_is_removed(directory: LaunchDirectory) -> None:
    for path in (directory.path, directory.streams):
        marker = MARKER.fullmatch(
            Path(path, LOCK_FILE).read_text()
        )  # opens and closes it, which must not drop the lock
        assert marker is not None
        assert (marker["launch"], marker["nonce"]) == (directory.launch, directory.twin("DATA", 0).nonce)
        assert int(marker["inode"]) == os.stat(path).st_ino
        assert lock_is_held(path)
        assert lock_is_held(path), "looking at it drops nothing"


def test_somebody_elses_folder_of_the_same_name_is_not_removed(directory: LaunchDirectory) -> None:
    aside = f"{directory.path}-aside"
    os.rename(directory.path, aside)
    mine = Path(directory.path, "thesis.txt")
    mine.parent.mkdir()
    mine.write_text("mine")
    directory.remove()
    assert mine.read_text() == "mine"
    assert os.listdir(aside) == [LOCK_FILE]
    for path in (directory.path, aside):
        for file in Path(path).iterdir():
            file.unlink()
        os.rmdir(path)


def test_a_directory_that_lost_its_lock_file_is_removed_by_its_owner(directory: LaunchDirectory) -> None:
    for path in (directory.path, directory.streams):
        os.unlink(f"{path}/{LOCK_FILE}")
    directory.remove()
    assert not os.path.exists(directory.path)
    assert not os.path.exists(directory.streams)


# -- what somebody removes while the launch lives ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "gone",
    [
        ["path"],
        ["streams"],
        ["path", "streams"],
        [f"path/{LOCK_FILE}"],
        [f"streams/{LOCK_FILE}"],
        ["streams/beacon"],
        [f"path/{LOCK_FILE}", f"streams/{LOCK_FILE}", "streams/beacon"],
    ],
)
def test_what_was_removed_is_made_anew_and_nobody_ever_takes_the_launch_for_a_dead_one(
    directory: LaunchDirectory, gone: list[str]
) -> None:
    posix_ipc.SharedMemory(f"/bt-{directory.launch}-DATA-0", posix_ipc.O_CREX, size=4096).close_fd()
    for _ in range(2):  # what was made anew, too
        for name in gone:
            which, _, rest = name.partition("/")
            path = Path(getattr(directory, which), rest)
            if rest:
                path.unlink()
            else:
                shutil.rmtree(path)
        assert directory.launch not in sweep().removed
        assert not is_abandoned(directory.launch)
        assert directory.mend()
        assert directory.mend() == []
        test_each_directory_says_whose_it_is_and_is_locked_until_it_is_removed(directory)
        assert directory.twin("DATA", 0).is_here()
        assert directory.launch not in sweep().removed
        assert not is_abandoned(directory.launch)
    directory.remove()
    assert not os.path.exists(directory.path)
    assert not [name for name in os.listdir("/dev/shm") if directory.launch in name]
    assert directory.mend() == []
    assert not os.path.exists(directory.path), "it is over"


def test_who_opened_a_lock_file_before_it_was_removed_never_finds_its_lock_free(directory: LaunchDirectory) -> None:
    """A sweep that is slow."""
    with open(f"{directory.streams}/{LOCK_FILE}", "rb") as lock:
        os.unlink(lock.name)
        directory.mend()
        assert is_locked(lock.fileno(), 0, 0)


def test_somebody_elses_folder_of_the_same_name_is_left_alone(directory: LaunchDirectory) -> None:
    shutil.rmtree(directory.path)
    mine = Path(directory.path, "thesis.txt")
    mine.parent.mkdir()
    mine.write_text("mine")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="not empty"):
            directory.mend()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    directory.remove()
    assert os.listdir(directory.path) == [mine.name]
    shutil.rmtree(directory.path)


def test_what_cleans_up_by_age_is_told_that_the_launch_lives(
    directory: LaunchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    posix_ipc.SharedMemory(f"/bt-{directory.launch}-DATA-0", posix_ipc.O_CREX, size=4096).close_fd()
    log, folder = Path(directory.path, "instance-00.log"), Path(directory.path, "packages")
    log.touch()
    folder.mkdir()
    (folder / "link").symlink_to("/nowhere")
    paths = [
        *(log, folder, folder / "link", Path(directory.path), Path(directory.streams, "beacon")),
        *(Path(directory.streams, LOCK_FILE), Path(f"/dev/shm/bt-{directory.launch}-DATA-0")),
    ]
    for path in paths:
        os.utime(path, (1, 1), follow_symlinks=False)
    assert directory.mend() == []
    assert all(path.lstat().st_mtime == 1 for path in paths)
    monkeypatch.setattr(launch_directory, "_TOUCH_EVERY_S", -1)
    assert directory.mend() == []
    assert all(min(path.lstat().st_mtime, path.lstat().st_atime) > 1 for path in paths)
    for path in (directory.path, directory.streams):
        fd = os.open(path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # what systemd-tmpfiles tries
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)


def test_removing_twice_is_removing_once(directory: LaunchDirectory) -> None:
    directory.remove()
    directory.remove()


@pytest.mark.long
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
        assert not list(Path(os.environ["XDG_RUNTIME_DIR"]).glob(f"*{directory.launch}*")), place


def test_a_forked_child_does_not_remove_its_parents_launch(directory: LaunchDirectory) -> None:
    child = os.fork()
    if child == 0:
        directory.remove()
        sweep()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.path.isdir(directory.path)


def test_logs_may_lie_in_shared_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/dev/shm")
    directory = LaunchDirectory().create()
    assert directory.path == directory.streams
    directory.remove()
    assert not os.path.exists(directory.path)


def test_a_base_whose_path_is_no_text_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The path travels to the instances and their readers as JSON."""
    strange, plain = os.fsdecode(bytes(tmp_path) + b"/\xff"), str(tmp_path / "\u00e4")
    os.mkdir(strange)
    os.mkdir(plain)
    monkeypatch.setattr(launch_directory, "base_directories", lambda: [strange, plain])
    directory = LaunchDirectory().create()
    assert os.path.dirname(directory.path) == plain
    directory.remove()


def test_without_any_usable_base_the_error_names_them_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch_directory, "base_directories", lambda: [str(tmp_path / "none"), str(tmp_path / "other")])
    with pytest.raises(LaunchError, match=r"none, .*other cannot be written.*TMPDIR"):
        LaunchDirectory().create()


def test_who_sees_the_beacon_is_here_for_as_long_as_the_launch_lives(directory: LaunchDirectory) -> None:
    twin = directory.twin("DATA", 0)
    assert twin.is_here()
    assert not dataclasses.replace(twin, nonce="0" * 32).is_here(), "another launch of the same name"
    directory.remove()
    assert not twin.is_here()
