"""What every test can count on.

Nothing stays behind
    Each test is watched from its set-up to the end of its clean-up. It fails when it leaves a shared-memory object
    (``/dev/shm/bt-*``), a launch directory (``blendtorch-*`` in ``/dev/shm``, ``$XDG_RUNTIME_DIR`` or the
    temporary directory), a process, or an X server's lock. What a fixture of wider scope holds (a launcher for a
    whole module, say) is in place before the test and so does not count; at the end of the run nothing may be left.
    A failed test is not reported a second time, but what it left is removed, so that the next one starts clean.

A place of its own
    ``$XDG_RUNTIME_DIR`` is a fresh private folder, and ``$DISPLAY`` is unset: a test never opens a window on a desktop. All
    processes of this run carry ``BLENDTORCH_TEST_RUN``. Several runs on one machine do not accuse each other.

Real Blender
    ``blender`` is a fixture: a test that takes it runs once for each form of Blender, and is skipped with the reason
    where that form is not here. ``blender.argument`` is what BlenderLauncher takes as ``blender=``; ``blender.form`` is
    ``"module"`` or ``"executable"``; ``blender.version`` is for example ``(5, 2, 3)``. Such tests carry the marker
    ``blender``. ``blender_forms`` is the whole answer, for a test that wants to choose: form -> Blender, or the reason why not.
"""

import functools
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

MARK = "BLENDTORCH_TEST_RUN"
GRACE_S = 5.0  # For the kernel and for processes that are on their way out; a clean test never waits.


# ------------------------------------------------------------------------------------------------- a place of its own


def pytest_configure(config: pytest.Config) -> None:
    os.environ[MARK] = uuid.uuid4().hex
    os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="bt-run-", dir="/tmp")
    for display in ("DISPLAY", "WAYLAND_DISPLAY"):
        os.environ.pop(display, None)
    config.add_cleanup(functools.partial(shutil.rmtree, os.environ["XDG_RUNTIME_DIR"], ignore_errors=True))


# ---------------------------------------------------------------------------------------------- nothing stays behind


@dataclass(frozen=True, order=True)
class Trace:
    """Something that a test can leave behind."""

    kind: str
    name: str
    detail: str = field(default="", compare=False)  # A process may yet turn into another program.

    def __str__(self) -> str:
        return f"{self.kind} {self.name}{self.detail and f' ({self.detail})'}"

    @property
    def path(self) -> Path | None:
        return Path(self.name) if self.kind != "process" else None


class Processes:
    """The processes of this machine at one moment, and which of them this test run made."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        zombies = set()
        marked = set()
        mark = f"{MARK}={os.environ[MARK]}".encode()
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            pid = int(entry)
            try:
                # The command's name stands in parentheses and may itself hold spaces and parentheses.
                state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
                self.parent[pid] = int(parent)
                if state in "ZX":
                    zombies.add(pid)
                elif mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    marked.add(pid)
            except OSError:
                continue  # It has just ended, or belongs to another user.
        # Descendants by parent (a fork without exec shows its parent's old environment), others by the mark.
        self.ours = {pid for pid in self.parent if self._is_descendant(pid)} | marked
        self.ours -= zombies | {os.getpid()}

    def _is_descendant(self, pid: int) -> bool:
        while (pid := self.parent.get(pid, 0)) > 1:
            if pid == os.getpid():
                return True
        return False

    def traces(self) -> Iterator[Trace]:
        for pid in self.ours:
            command = _command(pid)
            # multiprocessing keeps these two helpers for the life of the process that first needed them.
            if not re.search(r"multiprocessing\.(resource_tracker|forkserver) import main", command):
                yield Trace("process", str(pid), command[:200])

    def foreign_maps(self) -> str:
        """What the processes that are not of this run have mapped."""
        maps = []
        for pid in self.parent.keys() - self.ours - {os.getpid()}:
            try:
                maps.append(Path(f"/proc/{pid}/maps").read_text())
            except OSError:
                continue
        return "\n".join(maps)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def traces() -> set[Trace]:
    found = set(Processes().traces())
    found |= {Trace("shared memory", str(path)) for path in Path("/dev/shm").glob("bt-*")}
    for directory in {os.environ["XDG_RUNTIME_DIR"], tempfile.gettempdir(), "/tmp", "/dev/shm"}:
        found |= {Trace("launch directory", str(path)) for path in Path(directory).glob("blendtorch-*")}
    found |= {Trace("X lock", str(path)) for path in Path("/tmp").glob(".X*-lock")}
    found |= {Trace("X socket", str(path)) for path in Path("/tmp/.X11-unix").glob("X*")}
    return found


def left_since(before: set[Trace]) -> list[Trace]:
    """What has come since `before` and is of this run, now."""
    new = traces() - before
    if not any(trace.path for trace in new):
        return sorted(new)
    processes = Processes()
    foreign_maps = processes.foreign_maps()
    foreign_locks = {
        int(fields[5].rpartition(":")[2])
        for fields in map(str.split, Path("/proc/locks").read_text().splitlines())
        if len(fields) == 8 and int(fields[4]) > 0 and int(fields[4]) not in processes.ours | {os.getpid()}
    }

    def is_foreign(trace: Trace) -> bool:
        path = trace.path
        if path is None:
            return False
        try:
            if trace.kind == "shared memory":
                return str(path) in foreign_maps or _is_of_a_launch_elsewhere(path.name)
            if trace.kind == "launch directory":
                # By inode: opening the lock file here could drop a lock that this very process holds on it.
                return any(file.stat().st_ino in foreign_locks for file in path.iterdir())
            lock = path if trace.kind == "X lock" else Path(f"/tmp/.{path.name}-lock")
            owner = int(lock.read_text())
            return owner in processes.parent and owner not in processes.ours
        except FileNotFoundError:
            return not path.exists()
        except ValueError:
            return False

    return sorted(trace for trace in new if not is_foreign(trace))


def _is_of_a_launch_elsewhere(name: str) -> bool:
    """Whether a shared-memory object belongs to a launch whose directory is not in the place of this run."""
    launch = name.split("-")[1]
    own = Path(os.environ["XDG_RUNTIME_DIR"], f"blendtorch-{launch}")
    others = set(Path("/tmp").glob(f"bt-run-*/blendtorch-{launch}")) | {Path("/tmp", f"blendtorch-{launch}")}
    return any(other.exists() for other in others - {own})


def wait_until_nothing_is_left(before: set[Trace]) -> list[Trace]:
    """What is here now, and still is after a time of grace; of processes, which cannot be another run's, the last count."""
    left = set(left_since(before))
    if left:
        gc.collect()  # What a reference cycle holds is not a leak.
    deadline = time.monotonic() + GRACE_S
    pause = 0.002
    while left and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
        left = {trace for trace in left_since(before) if trace in left or trace.kind == "process"}
    return sorted(left)


def remove(left: list[Trace]) -> None:
    # torch raises from its SIGCHLD handler, wherever the main thread is, when a DataLoader worker has been killed.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for trace in left:
            try:
                if trace.path is None:
                    os.kill(int(trace.name), signal.SIGKILL)
                    os.waitpid(int(trace.name), 0)
                elif trace.path.is_dir():
                    shutil.rmtree(trace.path, ignore_errors=True)
                else:
                    trace.path.unlink()
            except OSError:
                pass  # Gone by itself in the meantime, or not a child that could be waited for.
    finally:
        signal.signal(signal.SIGCHLD, handler)


def report(left: list[Trace]) -> None:
    if left:
        remove(left)
        pytest.fail("left behind:\n" + "\n".join(f"  {trace}" for trace in left), pytrace=False)


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    result = yield
    item.stash[_failed] = item.stash.get(_failed, False) or result.failed
    return result


@pytest.fixture(scope="session", autouse=True)
def nothing_stays_behind_at_the_end() -> Iterator[None]:
    before = traces()
    yield
    report(wait_until_nothing_is_left(before))


@pytest.fixture(autouse=True)
def nothing_stays_behind(request: pytest.FixtureRequest, nothing_stays_behind_at_the_end: None) -> Iterator[None]:
    before = traces()
    yield
    if request.node.stash.get(_failed, False):
        remove(left_since(before))
    else:
        report(wait_until_nothing_is_left(before))


# ------------------------------------------------------------------------------------------------------ real Blender


@dataclass(frozen=True)
class Blender:
    form: str
    argument: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.form} {'.'.join(map(str, self.version))}"


def _version(command: list[str], missing: str) -> tuple[int, ...] | str:
    try:
        env = dict(os.environ)  # not C's own: a test that imports bpy into this process has changed that
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    found = re.search(r"Blender (\d+)\.(\d+)\.(\d+)", done.stdout)
    if found is None:
        return f"{missing} (exit status {done.returncode}: {done.stderr.strip()[-200:]})"
    return tuple(map(int, found.groups()))


@functools.cache
def _find_module() -> Blender | str:
    program = "import bpy; print('Blender', '%d.%d.%d' % bpy.app.version)"
    version = _version([sys.executable, "-c", program], "this Python cannot import bpy")
    return version if isinstance(version, str) else Blender("module", sys.executable, version)


@functools.cache
def _find_executable() -> Blender | str:
    path = shutil.which("blender")
    if path is None:
        return "there is no blender on the PATH"
    if shutil.which("Xvfb") is None:
        return "there is no Xvfb for the Blender executable to draw on"
    version = _version([path, "--version"], f"{path} does not run")
    return version if isinstance(version, str) else Blender("executable", path, version)


_FORMS: dict[str, Callable[[], Blender | str]] = {"module": _find_module, "executable": _find_executable}


@pytest.fixture(scope="session")
def blender_forms() -> dict[str, Blender | str]:
    return {form: find() for form, find in _FORMS.items()}


@pytest.fixture(scope="session", params=_FORMS)
def blender(request: pytest.FixtureRequest) -> Blender:
    found = _FORMS[request.param]()
    if isinstance(found, str):
        pytest.skip(f"Blender as {request.param}: {found}")
    return found


@pytest.fixture
def a_blender(blender_forms: dict[str, Blender | str]) -> Blender:
    """The first form of Blender that is here and draws off-screen: for what others test with each form."""
    for blender in blender_forms.values():
        if not isinstance(blender, str) and (blender.form == "executable" or blender.version >= (5, 1, 0)):
            return blender
    pytest.skip(f"no Blender that draws off-screen: {', '.join(map(str, blender_forms.values()))}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"blender", "blender_forms"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.blender)
