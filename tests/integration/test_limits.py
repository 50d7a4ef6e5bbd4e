"""Limits of memory that are smaller than a ring: fewer slots and a warning, or one clear error; nobody is killed."""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from blendtorch_shm.memory import limits

ROOT = Path(__file__).parents[2]
COUNT = str(ROOT / "tests/scripts/count.py")
MIB = 2**20

PROGRAM = """
import os, resource, sys, traceback
import numpy as np
from blendtorch_shm.errors import BlendtorchError
from blendtorch_shm.launch.address import Address
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.transport import open_sink, open_source

def limit(what, nbytes):
    resource.setrlimit(what, (nbytes, nbytes))

def used():
    return int(open("/proc/self/statm").read().split()[0]) * 4096

def in_child(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BlendtorchError as error:
            print(type(error).__name__, error)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def publish(nbytes, count=3):
    with open_sink(Address("tcp://127.0.0.1:*", address.twin)) as sink:
        for number in range(count):
            sink.publish({"image": np.full(nbytes, number, np.uint8), "number": number})

def read(count=3):
    with open_source([address]) as source:
        for number in range(count):
            message = source.receive(30)
            assert message is not None, source.explain()
            assert message.fields["number"] == number
            assert (message.fields["image"] == number).all()
            del message
    print("received", count)

directory = LaunchDirectory().create()
address = Address("tcp://127.0.0.1:0", directory.twin("DATA", 0))
"""


END = """
directory.remove()
print("left", [name for name in os.listdir("/dev/shm") if name.startswith(address.twin.prefix[1:].rpartition("-DATA")[0])])
"""


def run(code: str, within: str = "exec") -> str:
    """What such a program said, in any way. It leaves nothing."""
    done = subprocess.run(
        ["sh", "-c", f'{within} "$0" -c "$1"', sys.executable, PROGRAM + code + END],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert "left []" in done.stdout, done.stdout
    return done.stdout


# -- of the process -----------------------------------------------------------------------------------------------


def test_a_producer_that_may_not_map_so_much_makes_fewer_slots() -> None:
    output = run(
        """
def work():
    limit(resource.RLIMIT_AS, used() + 2**29)
    publish(20 * 2**20)
print("exit", in_child(work))
read()
"""
    )
    assert "the address space of this process has" in output
    assert "Raise that limit (ulimit -v)" in output
    assert "Trying with 8 slots" in output
    assert "exit 0" in output
    assert "received 3" in output


def test_a_producer_that_may_map_too_little_says_so() -> None:
    output = run(
        """
def work():
    limit(resource.RLIMIT_AS, used() + 3 * 2**27)
    publish(30 * 2**20)
print("exit", in_child(work))
"""
    )
    assert "OutOfSharedMemory There is no room for" in output
    assert "ulimit -v" in output
    assert "/dev/shm is full" not in output
    assert "exit 1" in output


def test_a_producer_may_make_files_of_a_limited_size_only() -> None:
    output = run(
        f"""
def work(nbytes):
    limit(resource.RLIMIT_FSIZE, 40 * {MIB})
    publish(nbytes)
print("exit", in_child(lambda: work(4 * {MIB})))
read()
print("exit", in_child(lambda: work(20 * {MIB})))
"""
    )
    assert "this process may make files of 40.0 MiB at most. Raise that limit (ulimit -f)" in output
    assert "Trying with 8 slots" in output
    assert "exit 0" in output
    assert "received 3" in output
    assert "OutOfSharedMemory There is no room for" in output
    assert "exit 1" in output


@pytest.mark.parametrize("begins", ["before", "after"])
def test_a_reader_that_may_not_map_the_ring_says_so_at_once(begins: str) -> None:
    """Whether the ring was there before it or not; and the messages wait for one that can."""
    output = run(
        f"""
def work():
    limit(resource.RLIMIT_AS, used() + 2**27)
    if {begins!r} == "after":
        source = open_source([address])
        assert source.receive(0.1) is None
        os.write(ready, b"x")
        source.receive(10**6)
    read()
if {begins!r} == "before":
    publish(20 * 2**20)
    print("exit", in_child(work))
else:
    waiting, ready = os.pipe()
    def publish_then():
        os.read(waiting, 1)
        publish(20 * 2**20)
    import threading
    first = open_sink(Address("tcp://127.0.0.1:*", address.twin))
    child = threading.Thread(target=lambda: print("exit", in_child(work)))
    first.close()
    child.start()
    publish_then()
    child.join()
read()
"""
    )
    assert "OutOfSharedMemory DATA of instance 0 cannot be read. The kernel has no memory for" in output
    assert "the address space of this process has" in output
    assert "exit 1" in output
    assert "received 3" in output


# -- of control groups ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def control_group(nbytes: int, inner_nbytes: int | None = None) -> Iterator[Path]:
    """A folder of a control group with so much memory, or of one within it with a limit of its own."""
    mounted = next(
        (
            (Path(top), files)
            for top, files in limits._control_groups("/proc/self")
            if os.access(f"{top}/cgroup.procs", os.W_OK) and os.path.exists(f"{top}/{files.used}")
        ),
        None,
    )
    if os.geteuid() != 0 or mounted is None:
        pytest.skip("needs root and a control group in which to make others")
    top, files = mounted
    outer = top / f"blendtorch-test-{uuid.uuid4().hex[:8]}"
    inner = outer / "inner"
    made: list[Path] = []
    try:
        try:
            for folder, limit in ((outer, nbytes), (inner, inner_nbytes)):
                folder.mkdir()
                made.append(folder)
                if limit is not None:
                    (folder / files.limits[0]).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"cannot make a control group: {error}")
        yield inner
    finally:
        for folder in reversed(made):
            until = time.monotonic() + 30
            while True:  # the kernel may take a moment to see that the last process has gone
                try:
                    folder.rmdir()
                    break
                except OSError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.01)


def within(group: Path) -> str:
    return f"echo $$ > {group}/cgroup.procs && exec"


# As the launcher and its instance: one process that holds much, and one that publishes.
HOLD_AND_PUBLISH = f"""
held = np.ones(120 * {MIB}, np.uint8)
def work():
    publish({{nbytes}})
print("exit", in_child(work))
if {{read}}:
    read()
print("alive")
"""


@pytest.mark.parametrize("whose", ["its own", "an outer one"])
def test_a_control_group_smaller_than_the_ring_means_fewer_slots_and_nobody_is_killed(whose: str) -> None:
    sizes = (400 * MIB, None) if whose == "an outer one" else (800 * MIB, 400 * MIB)
    with control_group(*sizes) as group:
        output = run(HOLD_AND_PUBLISH.format(nbytes=16 * MIB, read=True), within(group))
    named = group if whose == "its own" else group.parent
    assert f"the control group {named} has" in output
    assert "left of 400.0 MiB" in output
    assert "Trying with 8 slots" in output
    assert "exit 0" in output
    assert "received 3" in output
    assert "alive" in output


def test_a_control_group_without_room_is_one_error_and_nobody_is_killed() -> None:
    with control_group(300 * MIB) as group:
        output = run(HOLD_AND_PUBLISH.format(nbytes=50 * MIB, read=False), within(group))
    assert "OutOfSharedMemory There is no room for" in output
    assert "docker run --memory" in output
    assert "exit 1" in output
    assert "alive" in output


def test_the_page_cache_of_a_control_group_makes_room(tmp_path: Path) -> None:
    """It counts as used, and goes when memory is needed."""
    code = f"""
with open({str(tmp_path / "file")!r}, "wb") as file:
    for _ in range(250):
        file.write(bytes({MIB}))
    file.flush()
    os.fsync(file.fileno())
publish(4 * {MIB})
read()
"""
    with control_group(200 * MIB) as group:
        output = run(code, within(group))
    assert "slots" not in output
    assert "received 3" in output


def test_producers_that_begin_at_once_do_not_take_more_than_there_is() -> None:
    """Each looks at what is left before the others have taken theirs."""
    code = f"""
import multiprocessing
def work(btid):
    global address
    address = Address("tcp://127.0.0.1:0", directory.twin("DATA", btid))
    barrier.wait()
    publish(10 * {MIB})
barrier = multiprocessing.Barrier(3)
pids = []
for btid in range(3):
    if (pid := os.fork()) == 0:
        try:
            work(btid)
            os._exit(0)
        except BlendtorchError as error:
            print(error, flush=True)
            os._exit(1)
    pids.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
print("killed", [code for code in codes if code < 0])
"""
    with control_group(400 * MIB) as group:
        output = run(code, within(group))
    assert "killed []" in output


@pytest.mark.parametrize("version", [1, 2])
def test_the_folders_of_both_versions_are_found_as_containers_show_them(tmp_path: Path, version: int) -> None:
    """A container sees its own group at the top, whatever its path is outside; elsewhere all outer ones count."""
    top = tmp_path / "cg"
    line = {1: "4:memory:", 2: "0::"}[version]
    kind = {1: "cgroup cgroup rw,memory", 2: "cgroup2 cgroup2 rw"}[version]
    for path, root, expected in [
        ("/a/b", "/", [top / "a/b", top / "a", top]),
        ("/docker/x", "/docker/x", [top]),
        ("/docker/x/y", "/docker/x", [top / "y", top]),
        ("/", "/../..", [top]),
        ("/../other", "/", [top]),
        ("/", "/", [top]),
    ]:
        (tmp_path / "cgroup").write_text(f"9:name=systemd:/elsewhere\n{line}{path}\n")
        (tmp_path / "mountinfo").write_text(
            f"31 23 0:28 / /proc rw - proc proc rw\n35 31 0:32 {root} {top} rw shared:1 - {kind}\n"
        )
        found = [Path(folder) for folder, _ in limits._control_groups(str(tmp_path))]
        assert found == expected, (path, root)


def test_of_version_2_the_lower_of_both_limits_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond memory.high the kernel slows processes down until they hardly run. The files are made up: few machines have both
    versions, and this one may have the other.
    """
    inner = tmp_path / "inner"
    inner.mkdir()
    for folder, maximum, high in [(inner, "max", str(100 * MIB)), (tmp_path, str(1000 * MIB), "max")]:
        (folder / "memory.max").write_text(f"{maximum}\n")
        (folder / "memory.high").write_text(f"{high}\n")
        (folder / "memory.current").write_text(f"{60 * MIB}\n")
        (folder / "memory.stat").write_text(
            f"anon 5\nfile {50 * MIB}\ninactive_file {10 * MIB}\nactive_file {10 * MIB}\n"
        )
    monkeypatch.setattr(
        limits, "_control_groups", lambda: iter([(str(inner), limits._V2), (str(tmp_path), limits._V2)])
    )
    assert limits.short_of_memory(40 * MIB) == ""
    assert "60.0 MiB left of 100.0 MiB" in limits.short_of_memory(50 * MIB)
    (inner / "memory.high").write_text("max\n")
    assert limits.short_of_memory(50 * MIB) == ""
    assert f"the control group {tmp_path} has 960.0 MiB left of 1000.0 MiB" in limits.short_of_memory(800 * MIB)


LAUNCH = f"""
import resource
from torch_side import BlenderLauncher
what, nbytes = {{}}
if what == resource.RLIMIT_DATA:  # a thread's stack counts
    nbytes += int(open("/proc/self/statm").read().split()[5]) * 4096
resource.setrlimit(what, (nbytes, nbytes))
with BlenderLauncher("", {COUNT!r}, 1, ["DATA"], blender="python", progress=False):
    pass
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("resource.RLIMIT_FSIZE, 0", "this process may make files of 0.0 MiB at most. Raise that limit (ulimit -f)"),
        (
            "resource.RLIMIT_FSIZE, 10240",
            "this process may make files of 10.0 KiB at most. Raise that limit (ulimit -f)",
        ),
        ("resource.RLIMIT_DATA, 2**20", "Cannot start the thread that watches over the instances"),
    ],
)
def test_a_launcher_says_which_limit_keeps_it_from_launching(what: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH.format(what)], capture_output=True, text=True, timeout=120, check=False
    )
    assert said in done.stderr
    assert "LaunchError" in done.stderr.splitlines()[-1]
