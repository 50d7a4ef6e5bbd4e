"""Locks that the kernel drops when their holder dies."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from blendtorch_shm.errors import SegmentError
from blendtorch_shm.memory.locks import PRODUCER_LOCK, ThreadLocks, consumer_lock, open_locks, slot_lock

METHODS = ["fork", "spawn"]


def hold(path: str, number: int, pipe: Connection) -> None:
    locks = open_locks(path)
    pipe.send(locks.try_lock(number))
    pipe.recv()


def run(method: str, target: Callable[..., None], *args: object) -> tuple[multiprocessing.Process, Connection]:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*args, theirs))
    process.start()
    theirs.close()
    return process, ours


def test_numbers_of_different_things_differ() -> None:
    numbers = [
        PRODUCER_LOCK,
        consumer_lock(0),
        consumer_lock(255),
        slot_lock(0, 0),
        slot_lock(0, 4095),
        slot_lock(1, 0),
    ]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_holder_holds_no_longer(tmp_path: Path, method: str) -> None:
    path = str(tmp_path / "lock")
    locks = open_locks(path)
    process, pipe = run(method, hold, path, 5)
    assert pipe.recv() is True
    assert locks.is_held(5)
    assert not locks.try_lock(5)
    assert not locks.is_held(6)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not locks.is_held(5)
    assert locks.try_lock(5)
    locks.close()


def test_asking_whether_a_lock_is_held_disturbs_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    locks = open_locks(path)
    process, pipe = run("spawn", hold, path, 1)
    assert pipe.recv() is True
    for _ in range(100):
        assert locks.is_held(1)
    pipe.send(None)
    process.join()
    locks.close()


def test_two_users_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    first, second = (open_locks(str(tmp_path / "lock")) for _ in range(2))
    assert first.try_lock(3)
    assert not second.try_lock(3)
    assert second.is_held(3)
    first.unlock(3)
    assert second.try_lock(3)
    first.close()
    second.close()


@pytest.mark.parametrize("here", [True, False])
def test_many_locks_are_taken_together_or_not_at_all(tmp_path: Path, here: bool) -> None:
    path = str(tmp_path / "lock")
    locks = open_locks(path)
    other = open_locks(path)
    if here:
        assert other.try_lock(5)
    else:
        process, pipe = run("spawn", hold, path, 5)
        assert pipe.recv() is True
    assert not locks.try_lock(3, 4)
    assert [locks.is_held(number) for number in range(3, 7)] == [False, False, True, False]
    if here:
        other.unlock(5)
    else:
        pipe.send(None)
        process.join()
    assert locks.try_lock(3, 4)
    assert not other.try_lock(6)
    assert other.try_lock(7)
    locks.unlock(3, 4)
    assert [locks.is_held(number) for number in range(3, 8)] == [False, False, False, False, True]
    process, pipe = run("spawn", lock_in_child, path, 5)
    assert pipe.recv() == (False, True, True)
    pipe.send(None)
    process.join()
    locks.close()
    other.close()


def test_between_threads_as_well() -> None:
    locks = ThreadLocks()
    assert locks.try_lock(5)
    assert not locks.try_lock(3, 4)
    locks.unlock(5)
    assert locks.try_lock(3, 4)
    assert not locks.try_lock(6)
    locks.unlock(3, 4)
    assert locks.try_lock(6)


def lock_in_child(path: str, number: int, pipe: Connection) -> None:
    locks = open_locks(path)
    pipe.send((locks.is_held(number), locks.try_lock(number), locks.try_lock(number + 1)))
    pipe.recv()


@pytest.mark.parametrize("method", METHODS)
def test_a_child_has_none_of_its_parents_locks_and_closing_harms_no_one(tmp_path: Path, method: str) -> None:
    path = str(tmp_path / "lock")
    locks = open_locks(path)
    assert locks.try_lock(7)
    process, pipe = run(method, lock_in_child, path, 7)
    assert pipe.recv() == (True, False, True)
    pipe.send(None)
    process.join()
    process, pipe = run(method, lock_in_child, path, 7)  # still ours, after that child closed its descriptor
    assert pipe.recv() == (True, False, True)
    pipe.send(None)
    process.join()
    locks.close()


def test_closing_one_user_keeps_the_locks_of_the_other(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    first, second = open_locks(path), open_locks(path)
    assert first.try_lock(1)
    second.close()
    process, pipe = run("spawn", lock_in_child, path, 1)
    assert pipe.recv()[0] is True
    pipe.send(None)
    process.join()
    first.close()


def test_a_lock_file_in_a_folder_that_has_gone_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(SegmentError, match="its directory was removed"):
        open_locks(str(tmp_path / "gone" / "lock"))
