"""Ctrl-C wherever it hits, and iterations that are left half-way: a short end, and nothing stays behind.

Ctrl-C in a terminal is SIGINT to the whole foreground process group; ``kill -INT`` hits the process alone.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blendtorch_shm.launch.info import LaunchInfo
from blendtorch_shm.transport import open_source
from torch_side.launcher import BlenderLauncher

from .programs import PATIENCE_S, Program, Workshop

pytestmark = pytest.mark.timeout(PATIENCE_S + 60)

COUNT = Path(__file__).parents[1] / "scripts" / "count.py"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with Workshop(tmp_path_factory.mktemp("programs")) as workshop:
        yield workshop


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Launch information of two instances that publish for ever."""
    path = tmp_path_factory.mktemp("launch") / "info.json"
    with BlenderLauncher("", COUNT, 2, ["DATA"], blender="python", progress=False) as launcher:
        LaunchInfo.save_json(path, launcher.launch_info)
        for address in launcher.launch_info.addresses["DATA"]:  # they run, and have made all that they will
            source = open_source([address])
            assert source.receive(PATIENCE_S) is not None
            source.close()
        yield path


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tracebacks_of_its_own(heard: str) -> range:
    """How many tracebacks are the program's: without those of workers that multiprocessing still starts, and of its thread
    that hands over descriptors, when the program ends. Where two first lines follow each other, one of the two may have been cut
    short there, or the rest of both follows.
    """
    first = "Traceback (most recent call last):\n"
    others = heard.count("import spawn_main;") + heard.count("in _serve\n")
    count = heard.count("Traceback") - others
    return range(count - heard.count(first + first), count + 1)


def check_that_it_ends_with_one_traceback(program: Program) -> None:
    """The main program's own, with nothing of workers, threads or finalizers; other lines than those of tracebacks are news."""
    code = program.ends()
    heard = program.stderr
    assert code == -2, heard
    chained = len(re.findall("During handling of|The above exception was", heard))  # it hit an except clause
    assert 1 + chained in tracebacks_of_its_own(heard), heard
    assert heard.count("KeyboardInterrupt") >= 1, heard
    assert not re.search("Exception ignored|Exception in", heard), heard


READ = """
import sys
from torch.utils.data import DataLoader
from torch_side import LaunchInfo, RemoteIterableDataset

def dataset(way, **options):
    addresses = list(LaunchInfo.load_json(sys.argv[1]).addresses["DATA"])
    twins = {"shared": 2, "mixed": 1, "tcp": 0}[way]
    return RemoteIterableDataset(addresses[:twins] + [a.elsewhere() for a in addresses[twins:]], **options)

def loader(way, workers, method, **options):
    return DataLoader(dataset(way, **options), batch_size=4, num_workers=workers, multiprocessing_context=method)
"""


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------

ITERATE = (
    READ
    + """
for number, item in enumerate(loader(sys.argv[2], int(sys.argv[3]), sys.argv[4] or None, max_items=10**6)):
    if number == 5:
        print("iterating")
"""
)


@pytest.mark.parametrize(
    ("way", "workers", "method", "group"),
    # A spawned worker imports torch for seconds: one way has to do.
    [(way, n, "fork" * bool(n), group) for way in ("shared", "tcp") for n in (0, 2) for group in (False, True)]
    + [("mixed", 2, "spawn", True)],
)
def test_ctrl_c_ends_an_iteration(
    workshop: Workshop, info: Path, way: str, workers: int, method: str, group: bool
) -> None:
    program = workshop.run(ITERATE, info, way, workers, method)
    program.until_it_says("iterating")
    program.interrupt(group)
    check_that_it_ends_with_one_traceback(program)


def test_ctrl_c_is_not_lost_when_it_hits_while_an_item_is_dropped(workshop: Workshop, info: Path) -> None:
    """There Python would print and forget it. What else the callback had to do is done later."""
    code = """
import signal
from blendtorch_shm.stream import consumer
end = consumer.Consumer.end

def interrupted_end(self, lease):
    consumer.Consumer.end = end
    signal.raise_signal(signal.SIGINT)

items = iter(dataset("shared", max_items=10**6))
kept = next(items)
consumer.Consumer.end = interrupted_end
del kept
print("forgotten?")
for _ in items:
    pass
"""
    program = workshop.run(READ + code, info)
    check_that_it_ends_with_one_traceback(program)
    assert program.stdout == "forgotten?\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_the_wait_for_a_message_that_does_not_come(workshop: Workshop, port: int, workers: int) -> None:
    code = """
import os, sys
from torch.utils.data import DataLoader
from torch_side import RemoteIterableDataset

def begin(worker):
    print("worker", worker, "begins")  # before, Python's own code runs in it, and torch's, which say a lot when interrupted

dataset, workers = RemoteIterableDataset("tcp://127.0.0.1:" + sys.argv[1]), int(sys.argv[2])
items = iter(DataLoader(dataset, num_workers=workers, worker_init_fn=begin))
print("waiting")
next(items)
"""
    program = workshop.run(code, port, workers)
    for worker in range(workers):
        program.until_it_says(f"worker {worker} begins")
    program.until_it_says("waiting")
    program.interrupt(group=True)
    check_that_it_ends_with_one_traceback(program)


PUBLISH = """
import sys
import numpy as np
from blender_side.publisher import DataPublisher
publisher = DataPublisher("tcp://127.0.0.1:" + sys.argv[1], 0, send_hwm=3)
for number in range(100):
    publisher.publish(image=np.zeros((100, 100), np.uint8), number=number)
    print("published", number)
"""


@pytest.mark.parametrize("is_read_from", [False, True])
def test_ctrl_c_ends_a_producer_whose_consumers_leave_no_room(
    workshop: Workshop, port: int, is_read_from: bool
) -> None:
    producer = workshop.run(PUBLISH, port)
    if is_read_from:
        code = """
import signal, sys
from torch_side import RemoteIterableDataset
items = iter(RemoteIterableDataset("tcp://127.0.0.1:" + sys.argv[1], queue_size=1))
next(items)
print("got one")
signal.pause()
"""
        consumer = workshop.run(code, port)
        consumer.until_it_says("got one")
    producer.until_it_says("published 2")
    producer.interrupt(group=False)
    check_that_it_ends_with_one_traceback(producer)
    if is_read_from:
        consumer.interrupt(group=False)
        check_that_it_ends_with_one_traceback(consumer)


LAUNCH = """
import sys
from torch_side import BlenderLauncher
print("launching")
with BlenderLauncher("", sys.argv[1], 2, ["DATA"], blender="python", progress=False) as launcher:
    print("waiting")
    launcher.wait()
"""


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.2, 0.3])
def test_ctrl_c_ends_a_launch_at_any_moment(workshop: Workshop, delay_s: float, group: bool) -> None:
    program = workshop.run(LAUNCH, COUNT)
    program.until_it_says("launching")
    time.sleep(delay_s)  # whatever that hits
    program.interrupt(group)
    check_that_it_ends_with_one_traceback(program)


def test_ctrl_c_ends_the_wait_for_instances(workshop: Workshop) -> None:
    program = workshop.run(LAUNCH, COUNT)
    program.until_it_says("waiting")
    program.interrupt(group=True)
    check_that_it_ends_with_one_traceback(program)


# -- left half-way -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "workers", "method"),
    [(way, workers, "fork" * bool(workers)) for way in ("shared", "tcp") for workers in (0, 2)]
    + [("mixed", 1, "spawn")],
)
def test_an_iteration_can_be_left_half_way_begun_again_and_collected_late(
    workshop: Workshop, info: Path, way: str, workers: int, method: str
) -> None:
    code = """
import gc
way, workers, method = sys.argv[2], int(sys.argv[3]), sys.argv[4] or None
left = loader(way, workers, method, max_items=10**6)
rounds = 1 if method == "spawn" else 3
for _ in range(rounds):
    for number, item in enumerate(left):
        if number == 2:
            break
items = iter(left)
for _ in range(max(1, workers)):  # one of each worker; below, Python removes semaphores that a starting one still needs
    next(items)
cycle = [items]
cycle.append(cycle)
del items, cycle
assert len(list(loader(way, 0, None, max_items=40))) == 10
gc.collect()
print("done")
"""
    program = workshop.run(READ + code, info, way, workers, method)
    assert program.ends() == 0, program.stderr
    assert program.stdout == "done\n"
    assert 0 in tracebacks_of_its_own(program.stderr), program.stderr
    assert "Exception ignored" not in program.stderr


@pytest.mark.parametrize("way", ["shared", "tcp"])
def test_a_killed_worker_is_torchs_own_error_and_the_next_iteration_works(
    workshop: Workshop, info: Path, way: str
) -> None:
    code = """
import os, signal, time
items = iter(loader(sys.argv[2], 2, "fork", max_items=10**6))
next(items)
try:
    os.kill(items._workers[0].pid, signal.SIGKILL)
    try:
        for _ in items:
            pass
    except (OSError, EOFError):  # torch was reading from that worker; the signal of its death is still to come
        time.sleep(20)
except RuntimeError:  # raised by torch's handler of that signal, wherever the program is
    print("lost")
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
del items
print(len(list(loader(sys.argv[2], 2, "fork", max_items=40))))
"""
    program = workshop.run(READ + code, info, way)
    assert program.ends() == 0, program.stderr
    assert program.stdout == "lost\n10\n"
