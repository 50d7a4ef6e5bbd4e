"""Interrupts at any moment of opening, reading and closing, and of launching and ending: nothing is left in use."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STORM = """
import gc, os, random, signal, sys, threading, time
import numpy as np
from blendtorch_shm.launch.address import Address
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.memory.states import State
from blendtorch_shm.process import interrupts
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer
from torch_side.dataset import RemoteIterableDataset
from torch_side.frame_loader import FrameLoader

wanted, kind = int(sys.argv[1]), sys.argv[2]
random.seed(0)
directory = LaunchDirectory().create()
twin = directory.twin("DATA", 0)
place = SharedPlace(twin)
sink = Producer(place, trusted=True)
raised, armed = 0, False

def interrupt(*_):
    global raised
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.004))
    if armed:
        raised += 1
        raise KeyboardInterrupt

def publish():
    for i in range(10**9):
        sink.publish({"n": i, "image": np.zeros(9000, np.uint8)})

def read_some():
    if kind == "dataset":
        iterator = iter(RemoteIterableDataset(Address("tcp://127.0.0.1:1", twin), max_items=1000))
    else:
        iterator = iter(FrameLoader([Address("tcp://127.0.0.1:1", twin)], 2))
    held = [next(iterator) for _ in range(random.randrange(6))]
    if random.random() < 0.5:
        iterator.close()

def is_ours(frame):
    # Python's own threads may hang in Thread.start, which does not bear interrupts: they hold nothing of ours.
    while frame is not None and "threading.py" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None

def in_use():
    read_some()  # whoever comes next looks after what was left
    gc.collect()
    seen = inspect(place)
    files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return {
        "seats": len(seen.consumers),
        "slots": seen.count(State.LEASED),
        "threads": sum(map(is_ours, sys._current_frames().values())),
        "files": sum("/dev/shm/" in file for file in files),
        "sockets": len(files) // 16,  # ZeroMQ keeps some
    }

sys.unraisablehook = lambda _: None
signal.signal(signal.SIGALRM, interrupt)
threading.Thread(target=publish, daemon=True).start()
for _ in range(5):
    read_some()
time.sleep(0.5)
before = in_use()
signal.setitimer(signal.ITIMER_REAL, 0.001)
while raised < wanted:
    try:
        armed = True
        read_some()
        armed = False
    except KeyboardInterrupt:
        armed = False
    except RuntimeError as error:  # threading does not bear interrupts: see Condition.__exit__
        armed = False
        if "lock" not in str(error):
            raise
signal.setitimer(signal.ITIMER_REAL, 0)
interrupts.kept.clear()  # the next call would raise what came in a callback
until = time.monotonic() + 20
while (after := in_use()) != before and time.monotonic() < until:
    time.sleep(0.5)
print(raised, "interrupts:", before, "before,", after, "after", flush=True)
directory.remove()
os._exit(before != after)
"""


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_after_interrupts_at_any_moment_no_slot_seat_thread_or_descriptor_is_in_use(kind: str) -> None:
    interrupts = "10000" if os.environ.get("BLENDTORCH_TESTS") == "all" else "800"
    storm = subprocess.run(
        [sys.executable, "-c", STORM, interrupts, kind], capture_output=True, text=True, timeout=300, check=False
    )
    assert storm.returncode == 0, storm.stdout + storm.stderr


LAUNCHES = """
import gc, os, random, signal, subprocess, sys, threading, time
import torch_side.launcher
from torch_side.launcher import BlenderLauncher

wanted = int(sys.argv[2])
random.seed(0)
raised, armed = 0, False

def interrupt(*_):
    global raised
    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.04))
    if armed:
        raised += 1
        raise KeyboardInterrupt

def launch():
    with BlenderLauncher("", sys.argv[1], 2, ["DATA"], blender="python", progress=False):
        time.sleep(random.uniform(0, 0.1))

def in_use():
    gc.collect()
    with os.scandir("/proc/self/fd") as fds:
        files = sorted(os.path.realpath(fd.path).partition(":")[0] for fd in fds)
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        return {
            "threads": [thread.name for thread in threading.enumerate()],
            "files": [file for file in files if "/proc" not in file],
            "children": len(children.read().split()),
            "directories": [name for name in os.listdir(os.environ["XDG_RUNTIME_DIR"]) if "blendtorch-" in name],
        }

signal.signal(signal.SIGALRM, interrupt)
launch()
before = in_use()
signal.setitimer(signal.ITIMER_REAL, 0.001)
while raised < wanted:
    try:
        armed = True
        launch()
        armed = False
    except KeyboardInterrupt:
        armed = False
    torch_side.launcher._close_all()  # what hits the first lines of __exit__ leaves the rest to the end of this process
signal.setitimer(signal.ITIMER_REAL, 0)
until = time.monotonic() + 20
while (after := in_use()) != before and time.monotonic() < until:
    time.sleep(0.5)
print(raised, "interrupts:", before, "before,", after, "after", flush=True)
os._exit(before != after)
"""


def test_after_interrupts_at_any_moment_of_launches_no_process_thread_descriptor_or_directory_is_left(
    script: Callable[[str], Path],
) -> None:
    interrupts = "1000" if os.environ.get("BLENDTORCH_TESTS") == "all" else "60"
    storm = subprocess.run(
        [sys.executable, "-c", LAUNCHES, script("import time\ntime.sleep(600)"), interrupts],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert storm.returncode == 0, storm.stdout + storm.stderr
