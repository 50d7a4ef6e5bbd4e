"""Locks of open file descriptions: they exclude every other description, and go with their holder, however it dies."""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from blendtorch_shm.errors import SegmentError
from blendtorch_shm.memory.layout import MAX_CONSUMERS, MAX_SLOTS
from blendtorch_shm.memory.locks import PRODUCER_LOCK, Locks, consumer_lock, slot_lock

METHODS = ["fork", "spawn"]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "lock")


@pytest.fixture
def locks(path: str) -> Iterator[Locks]:
    with Locks(path) as opened:
        yield opened


@pytest.fixture
def other(path: str) -> Iterator[Locks]:
    """Another member's."""
    with Locks(path) as opened:
        yield opened


def start(method: str, target: Callable[..., None], *args: object) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*args, theirs))
    process.start()
    theirs.close()
    return process, ours


def end(process: BaseProcess, pipe: Connection) -> None:
    pipe.send(None)
    process.join()
    assert process.exitcode == 0


def hold(path: str, number: int, pipe: Connection) -> None:
    with Locks(path) as locks:
        pipe.send(locks.hold(number))
        pipe.recv()


def look(path: str, number: int, pipe: Connection) -> None:
    with Locks(path) as locks:
        pipe.send((locks.is_held(number), locks.try_lock(number), locks.try_lock(number + 1)))
        pipe.recv()


def test_bytes_of_different_things_differ() -> None:
    numbers = [PRODUCER_LOCK]
    numbers += [consumer_lock(index) for index in range(MAX_CONSUMERS)]
    numbers += [slot_lock(ring, slot) for ring in range(3) for slot in range(MAX_SLOTS)]
    assert len(set(numbers)) == len(numbers)


# -- who excludes whom ----------------------------------------------------------------------------------------


def test_two_members_of_one_process_exclude_each_other(locks: Locks, other: Locks) -> None:
    assert locks.hold(3)
    assert not other.hold(3)
    assert not other.try_lock(3)
    assert locks.is_held(3)
    assert other.is_held(3)
    locks.drop(3)
    assert not locks.is_held(3)
    assert other.hold(3)
    assert locks.is_held(3)


def test_a_member_holds_a_byte_once(locks: Locks) -> None:
    assert locks.hold(3)
    assert not locks.hold(3)
    locks.drop(3)
    assert locks.hold(3)


def test_of_many_threads_one_gets_each_lock(path: str) -> None:
    count, rounds = 8, 200
    together = threading.Barrier(count)
    got: list[int] = []

    def take() -> None:
        with Locks(path) as locks:
            for number in range(rounds):
                together.wait()
                if locks.try_lock(number):
                    got.append(number)
            together.wait()  # nobody closes before all have tried

    threads = [threading.Thread(target=take) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(rounds))


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_holder_holds_no_longer(path: str, locks: Locks, method: str) -> None:
    process, pipe = start(method, hold, path, 5)
    assert pipe.recv() is True
    assert locks.is_held(5)
    assert not locks.hold(5)
    assert not locks.is_held(6)
    process.kill()
    process.join()
    assert not locks.is_held(5)
    assert locks.hold(5)


def test_asking_whether_a_lock_is_held_disturbs_nobody(path: str, locks: Locks) -> None:
    process, pipe = start("spawn", hold, path, 1)
    assert pipe.recv() is True
    assert all(locks.is_held(1) for _ in range(100))
    end(process, pipe)
    assert not locks.is_held(1)
    assert locks.try_lock(1)


# -- ranges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("here", [True, False])
def test_a_range_is_locked_as_a_whole_or_not_at_all(path: str, locks: Locks, other: Locks, here: bool) -> None:
    if here:
        assert other.hold(5)
    else:
        process, pipe = start("spawn", hold, path, 5)
        assert pipe.recv() is True
    assert not locks.try_lock(3, 4)
    assert [other.try_lock(number) for number in (3, 4, 6)] == [True] * 3, "nothing of the range was locked"
    for number in (3, 4, 6):
        other.unlock(number)
    if here:
        other.drop(5)
    else:
        end(process, pipe)
    assert locks.try_lock(3, 4)
    assert [other.is_held(number) for number in range(2, 8)] == [False, True, True, True, True, False]
    process, pipe = start("spawn", look, path, 6)
    assert pipe.recv() == (True, False, True)
    end(process, pipe)
    locks.unlock(3, 4)
    assert not any(other.is_held(number) for number in range(2, 8))


def test_part_of_a_range_can_be_unlocked(locks: Locks, other: Locks) -> None:
    assert locks.try_lock(10, 5)
    locks.unlock(12)
    assert [other.is_held(number) for number in range(10, 15)] == [True, True, False, True, True]


def test_all_slots_are_unlocked_at_once_and_no_members_byte(locks: Locks, other: Locks) -> None:
    members = [PRODUCER_LOCK, consumer_lock(0), consumer_lock(MAX_CONSUMERS - 1)]
    slots = [slot_lock(0, 0), slot_lock(0, MAX_SLOTS - 1), slot_lock(63, 7)]
    assert all(locks.hold(number) for number in members)
    assert all(locks.try_lock(number) for number in slots)
    locks.unlock_slots()
    assert all(other.is_held(number) for number in members)
    assert not any(other.is_held(number) for number in slots)


# -- closing --------------------------------------------------------------------------------------------------


def test_closing_drops_every_lock_of_its_own_and_none_of_another_member(path: str, locks: Locks) -> None:
    third = Locks(path)
    with Locks(path) as other:
        assert other.hold(1)
        assert other.try_lock(2)
        assert locks.hold(3)
    assert not third.is_held(1)
    assert not third.is_held(2)
    assert third.is_held(3)
    third.close()


def test_opening_and_closing_the_file_by_other_means_drops_nothing(path: str, locks: Locks, other: Locks) -> None:
    """Record locks of the older kind (F_SETLK) all go when any descriptor of their process is closed."""
    assert locks.hold(1)
    Path(path).read_bytes()
    os.close(os.open(path, os.O_RDWR))
    os.close(os.dup(locks.fd))
    assert other.is_held(1)
    process, pipe = start("spawn", look, path, 1)
    assert pipe.recv() == (True, False, True)
    end(process, pipe)


def test_who_is_forgotten_holds_nothing(path: str, locks: Locks) -> None:
    forgotten = Locks(path)
    assert forgotten.hold(1)
    del forgotten
    gc.collect()
    assert not locks.is_held(1)


def test_what_was_closed_can_be_closed_again_and_closes_no_other_file(path: str, tmp_path: Path) -> None:
    locks = Locks(path)
    fd = locks.fd
    locks.close()
    assert locks.fd == -1
    with open(tmp_path / "another file", "w") as file:
        assert file.fileno() == fd, "the number is used again"
        locks.close()
        file.write("still open")


# -- forks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_child_has_none_of_its_parents_locks_and_drops_none(
    path: str, locks: Locks, other: Locks, method: str
) -> None:
    assert locks.hold(7)
    for _ in range(2):  # the second one finds that the first one's end has dropped nothing
        process, pipe = start(method, look, path, 7)
        assert pipe.recv() == (True, False, True)
        end(process, pipe)
    assert other.is_held(7)


def test_a_forked_child_closes_what_it_inherited_and_leaves_its_parents_locks_alone(locks: Locks, other: Locks) -> None:
    assert locks.hold(7)
    assert locks.try_lock(8)
    fd = locks.fd
    child = os.fork()
    if child == 0:
        found = [locks.fd, os.path.exists(f"/proc/self/fd/{fd}")]
        locks.close()
        locks.__del__()
        os._exit(0 if found == [-1, False] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert other.is_held(7)
    assert other.is_held(8)


def fork_a_child_and_wait(path: str, pipe: Connection) -> None:
    """Hold a byte, then fork a child that outlives this process."""
    locks = Locks(path)
    assert locks.hold(7)
    child = os.fork()
    if child == 0:
        pipe.send(os.getpid())
        pipe.recv()  # until the test has looked
        os._exit(0)
    signal.pause()


def test_a_forked_child_does_not_keep_its_dead_parent_alive(path: str, locks: Locks) -> None:
    parent, pipe = start("spawn", fork_a_child_and_wait, path)
    child: int = pipe.recv()
    assert locks.is_held(7)
    parent.kill()
    parent.join()
    try:
        os.kill(child, 0)  # it goes on
        assert not locks.is_held(7)
        assert locks.hold(7)
    finally:
        pipe.send(None)


# -- files ----------------------------------------------------------------------------------------------------


def test_a_lock_file_in_a_folder_that_has_gone_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(SegmentError, match="lock.*No such file.*its directory was removed"):
        Locks(str(tmp_path / "gone" / "lock"))


def test_a_lock_file_is_its_users_alone_and_no_link(path: str, locks: Locks, tmp_path: Path) -> None:
    assert os.stat(path).st_mode & 0o777 == 0o600
    (tmp_path / "link").symlink_to("lock")
    with pytest.raises(SegmentError, match="Cannot open the lock file .*link"):
        Locks(str(tmp_path / "link"))


def test_a_failed_lock_that_is_not_somebody_elses_is_an_error(locks: Locks) -> None:
    with pytest.raises(SegmentError, match="Cannot lock 1 bytes at -5"):
        locks.try_lock(-5)
