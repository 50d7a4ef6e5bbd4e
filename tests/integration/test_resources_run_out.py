"""Shared memory, disk and file descriptors that run out: a clear error, or a stream that goes on; nothing lost, nothing left."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COUNT = str(ROOT / "tests/scripts/count.py")

PROGRAM = """
import contextlib, itertools, os, resource, sys
from blendtorch_shm.launch.address import Address
from blendtorch_shm.errors import BlendtorchError
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.transport import open_sink, open_source
from torch_side.launcher import BlenderLauncher

def launch(script, *args, **options):
    return BlenderLauncher("", script, 1, ["DATA"], instance_args=[args], blender="python", progress=False, **options)

def take(source, count):
    for _ in range(count):
        message = source.receive(30)
        assert message is not None, source.explain()
        yield message.fields

def fill(path):
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))

def left():
    found = [n for d in ("/dev/shm", os.environ["XDG_RUNTIME_DIR"]) for n in os.listdir(d)]
    print("left", [name for name in found if name.startswith(("bt-", "blendtorch-", ".blendtorch-"))])
"""


def run(code: str, *, shm_nbytes: int = 2**28, run_nbytes: int = 2**20) -> str:
    """Run code behind :data:`PROGRAM` where /dev/shm and the runtime directory are so large; what it said, in any way."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to mount a small /dev/shm")
    mount = (
        f"mount -t tmpfs -o size={shm_nbytes} tmpfs /dev/shm && "
        f'mount -t tmpfs -o size={run_nbytes} tmpfs "$XDG_RUNTIME_DIR" && exec "$0" -c "$1"'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, sys.executable, PROGRAM + code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# -- shared memory -----------------------------------------------------------------------------------------------------

READ = f"""
from torch_side import RemoteIterableDataset
with launch({COUNT!r}, "--shape", "480", "640", "3") as bl:
    try:
        items = list(RemoteIterableDataset(bl.launch_info.addresses["DATA"], max_items=30))
        assert all((item["image"] == item["value"]).all() for item in items)
        print("received", len(items), [item["frameid"] for item in items] == list(range(30)))
        print(open(bl.launch_info.addresses["DATA"][0].twin.directory + "/instance-00.log").read())
    except BlendtorchError as error:
        print(type(error).__name__, error)
left()
"""


def test_no_shared_memory_at_all_is_one_error_with_the_numbers_and_the_remedy() -> None:
    output = run(READ, shm_nbytes=2**20)
    assert "InstanceDied" in output
    assert "OutOfSharedMemory: /dev/shm is full: " in output
    assert "needs 3.8 MiB" in output
    assert "of 1.0 MiB are free" in output
    assert "--shm-size" in output
    assert "left []" in output


def test_too_little_shared_memory_means_fewer_slots_and_the_stream_runs() -> None:
    output = run(READ, shm_nbytes=8 * 2**20)
    assert "received 30 True" in output
    assert "Trying with 8 slots" in output


def test_when_a_larger_ring_finds_no_room_publish_fails_and_the_stream_goes_on_as_soon_as_there_is_some() -> None:
    """Another program fills the memory meanwhile; nothing that was published before is lost, nor what is published after."""
    output = run(
        """
import numpy as np
directory = LaunchDirectory().create()
address = Address("tcp://127.0.0.1:0", directory.twin("DATA", 0))
sink = open_sink(Address("tcp://127.0.0.1:*", address.twin))
source = open_source([address])
small, large = np.full(10_000, 1, np.uint8), np.full(1_000_000, 2, np.uint8)
for number in range(3):
    sink.publish({"image": small, "number": number})
fill("/dev/shm/another program")
try:
    sink.publish({"image": large, "number": -1})
except BlendtorchError as error:
    print(type(error).__name__, error)
sink.publish({"image": small, "number": 3})
os.unlink("/dev/shm/another program")
sink.publish({"image": large, "number": 4})
received = [(fields["number"], int(fields["image"].sum())) for fields in take(source, 5)]
assert received == [(0, 10_000), (1, 10_000), (2, 10_000), (3, 10_000), (4, 2_000_000)], received
print("all there")
source.close()
sink.close()
directory.remove()
left()
""",
        shm_nbytes=2**25,
    )
    assert "OutOfSharedMemory /dev/shm is full: " in output
    assert "all there" in output
    assert "left []" in output


# -- the disk of logs and states ---------------------------------------------------------------------------------------


def test_a_full_disk_at_launch_is_one_error_that_says_which_and_what_to_do() -> None:
    output = run(
        f"""
fill(os.environ["XDG_RUNTIME_DIR"] + "/filler")
try:
    with launch({COUNT!r}):
        pass
except BlendtorchError as error:
    print(type(error).__name__, error)
left()
"""
    )
    assert "LaunchError Cannot make directories for the launch" in output
    assert "No space left on device" in output
    assert "XDG_RUNTIME_DIR" in output
    assert "left []" in output


def test_when_the_disk_fills_up_meanwhile_streams_and_restarts_go_on_without_their_logs(tmp_path: Path) -> None:
    script = tmp_path / "chatty.py"
    script.write_text(
        "import itertools, os, sys\nimport numpy as np\nimport blendtorch.btb as btb\n"
        "args, _ = btb.parse_blendtorch_args()\n"
        "publisher = btb.DataPublisher(args.btsockets['DATA'], args.btid)\n"
        "for i in itertools.count():\n"
        "    print('x' * 4000)\n    print('y' * 4000, file=sys.stderr)\n"
        "    publisher.publish(image=np.full(10_000, i % 256, np.uint8), number=i, pid=os.getpid())\n"
    )
    output = run(
        f"""
with launch({str(script)!r}, restart="on-failure") as bl:
    source = open_source(bl.launch_info.addresses["DATA"])
    first = next(take(source, 1))
    fill(os.environ["XDG_RUNTIME_DIR"] + "/filler")
    numbers = [fields["number"] for fields in take(source, 300)]
    assert numbers == list(range(1, 301)), numbers
    bl.launch_info.processes[0].kill()
    second = next(fields for fields in take(source, 100) if fields["pid"] != first["pid"])
    assert second["number"] == 0
    print("went on")
    source.close()
left()
"""
    )
    assert "Cannot note the state of instance 0" in output
    assert "No space left on device" in output
    assert "went on" in output
    assert "left []" in output


# -- file descriptors --------------------------------------------------------------------------------------------------

LIMITED = """
@contextlib.contextmanager
def limited(spare):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1 + spare, hard))
    try:
        yield
    except BlendtorchError as error:
        print(spare, type(error).__name__, error)
    else:
        print(spare, "went well")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

directory = LaunchDirectory().create()
address = Address("tcp://127.0.0.1:13377", directory.twin("DATA", 0))
"""


def check_descriptors(output: str, spares: range) -> None:
    """That with each number of spare descriptors it either went well, with the largest at least, or said what is missing."""
    lines = [line for line in output.splitlines() if line[:1].isdigit()]
    assert [int(line.split()[0]) for line in lines] == list(spares), output
    for line in lines:
        assert line.endswith("went well") or ("OutOfDescriptors Too many open files" in line and "ulimit -n" in line)
    assert lines[0].endswith("close files and connections.")
    assert lines[-1].endswith("went well")
    assert "left []" in output


def test_a_launcher_without_descriptors_says_how_many_it_needs() -> None:
    output = run(
        f"""{LIMITED}
for spare in range(0, 60, 4):
    with limited(spare), launch({COUNT!r}):
        pass
directory.remove()
left()
"""
    )
    check_descriptors(output, range(0, 60, 4))


def test_a_publisher_without_descriptors_says_how_many_it_needs() -> None:
    output = run(
        f"""{LIMITED}
for spare in range(0, 80, 4):
    with limited(spare):
        sink = open_sink(address)
        sink.publish({{"number": spare}})
        sink.close()
directory.remove()
left()
"""
    )
    check_descriptors(output, range(0, 80, 4))


@pytest.mark.parametrize("plain", [False, True])
def test_a_reader_without_descriptors_says_how_many_it_needs_and_harms_nobody(plain: bool) -> None:
    """In shared memory or, given the plain address, over TCP."""
    output = run(
        f"""{LIMITED}
sink = open_sink(address)
def read(expected):
    source = open_source([Address(str(address)) if {plain} else address])
    sink.publish({{"number": expected}})
    assert [fields["number"] for fields in take(source, 1)] == [expected]
    source.close()

read(-1)
for spare in range(0, 60, 4):
    with limited(spare):
        read(spare)
read(-2)
sink.close()
directory.remove()
left()
"""
    )
    check_descriptors(output, range(0, 60, 4))


def test_a_publisher_whose_script_uses_up_all_descriptors_goes_on() -> None:
    """ZeroMQ ends a process that has too few for its threads, so these run already when a reader first sleeps."""
    output = run(
        f"""{LIMITED}
import time
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.place import SharedPlace

for spare in range(8):
    pid = os.fork()
    if pid == 0:
        with open_sink(address) as sink:
            sink.publish({{"number": 0}})
            while not inspect(SharedPlace(address.twin)).asleep:
                time.sleep(0.01)
            with limited(spare):
                sink.publish({{"number": 1}})
                sink.publish({{"number": 2}})
        os._exit(0)
    with open_source([address]) as source:
        assert [fields["number"] for fields in take(source, 3)] == [0, 1, 2]
    assert os.waitpid(pid, 0)[1] == 0, spare
directory.remove()
left()
"""
    )
    assert "left []" in output
