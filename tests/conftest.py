"""What every test can count on.

Nothing stays behind
    Each test is watched from its set-up to the end of its clean-up. It fails when it leaves a shared-memory object
    (``/dev/shm/bt-*``), a launch directory (``blendtorch-*`` in ``/dev/shm``, ``$XDG_RUNTIME_DIR`` or the
    temporary directory), a process, or an X server's lock. What a fixture of wider scope holds (a launcher for a
    whole module, say) is in place before the test and so does not count; at the end of the run nothing may be left.
    A failed test is not reported a second time, but what it left is removed, so that the next one starts clean.

A place of its own
    ``$XDG_RUNTIME_DIR`` is a fresh private folder, ``$XDG_CACHE_HOME`` one with links to what the user has there, and
    ``$DISPLAY`` is unset: a test never opens a window on a desktop. All
    processes of this run carry ``BLENDTORCH_TEST_RUN``. Several runs on one machine do not accuse each other, and each worker
    of pytest-xdist is such a run. What all launches of a machine share they share: ports, ``/dev/shm``, and the removal of
    what dead launches left, whosoever they were. So a test names what it made, and does not count what there is.

The files are spread over the workers whole (``--dist loadfile``): their tests share launches and what Blender rendered.

Real Blender
    ``blender`` is a fixture: a test that takes it runs once for each form of Blender, and is skipped with the reason
    where that form is not here. ``blender.argument`` is what BlenderLauncher takes as ``blender=``; ``blender.form`` is
    ``"module"`` or ``"executable"``; ``blender.version`` is for example ``(5, 2, 3)``. Such tests carry the marker
    ``blender``. ``blender_forms`` is the whole answer, for a test that wants to choose: form -> Blender, or the reason why not.
    ``$BLENDTORCH_TEST_BLENDERS`` (paths with ``:`` between them) names others instead, as ``blender=`` of BlenderLauncher does.
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

from blendtorch_shm.errors import BlendtorchError
from torch_side.finder import find_runtime
from torch_side.launching.logs import cache_folder

from .selection import described

MARK = "BLENDTORCH_TEST_RUN"
GRACE_S = 5.0  # For the kernel and for processes that are on their way out; a clean test never waits.


# ------------------------------------------------------------------------------------------------- a place of its own


def pytest_configure(config: pytest.Config) -> None:
    os.environ[MARK] = uuid.uuid4().hex
    os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="bt-run-", dir="/tmp")
    os.environ["XDG_CACHE_HOME"] = _cache_like(cache_folder().parent, Path(os.environ["XDG_RUNTIME_DIR"], "cache"))
    for display in ("DISPLAY", "WAYLAND_DISPLAY"):
        os.environ.pop(display, None)
    config.add_cleanup(functools.partial(shutil.rmtree, os.environ["XDG_RUNTIME_DIR"], ignore_errors=True))


def _cache_like(users: Path, ours: Path) -> str:
    """A cache folder with what is in the user's, such as compiled shaders, but for the logs of failed launches."""
    for folder in (users / "mesa_shader_cache", ours / "blendtorch-shm"):
        folder.mkdir(parents=True, exist_ok=True)
    for entry in [*users.iterdir(), *users.glob("blendtorch-shm/python*")]:
        if entry.name != "blendtorch-shm":
            (ours / entry.relative_to(users)).symlink_to(entry)
    return str(ours)


def pytest_report_header() -> str:
    return described()


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


def seen() -> set[Trace]:
    """Whatever could be a trace of somebody, this run or another one: cheap, as it is looked at twice per test."""
    found = {Trace("process", pid) for pid in os.listdir("/proc") if pid.isdigit()}
    for directory in {os.environ["XDG_RUNTIME_DIR"], tempfile.gettempdir(), "/tmp", "/dev/shm", "/tmp/.X11-unix"}:
        found |= {trace for name in _names(directory) if (trace := _trace(directory, name))}
    return found


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _trace(directory: str, name: str) -> Trace | None:
    path = f"{directory}/{name}"
    if name.startswith("blendtorch-"):
        return Trace("launch directory", path)
    if name.startswith("bt-") and directory == "/dev/shm":
        return Trace("shared memory", path)
    if re.fullmatch(r"\.X.*-lock", name) and directory == "/tmp":
        return Trace("X lock", path)
    if name.startswith("X") and directory == "/tmp/.X11-unix":
        return Trace("X socket", path)
    return None


def left_since(before: set[Trace]) -> list[Trace]:
    """What has come since `before` and is of this run, now."""
    new = seen() - before
    left = [process for trace in new if not trace.path and (process := _process_of_this_run(int(trace.name)))]
    paths = [trace for trace in new if trace.path and _is_of_this_run(trace)]
    if paths:  # Nothing says whose they are; what others use is theirs.
        others = _Others()
        paths = [trace for trace in paths if trace.path and trace.path.exists() and not others.use(trace)]
    return sorted(left + paths)


# Of processes, the descendants of this one, by parent (a fork without exec shows its parent's old environment), and others
# by the mark. Each worker of pytest-xdist has a mark of its own.


def _state_and_parent(pid: int) -> tuple[str, int]:
    """The state that ps shows, "X" for none, and the parent."""
    try:
        # The command's name stands in parentheses and may itself hold spaces and parentheses.
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


def _is_ours(pid: int) -> bool:
    """Whether this run made the process, or is it."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        environment = b""  # It has just ended, or belongs to another user.
    if f"{MARK}={os.environ[MARK]}".encode() in environment.split(b"\0"):
        return True
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = _state_and_parent(pid)[1]
    return False


def _process_of_this_run(pid: int) -> Trace | None:
    if pid == os.getpid() or _state_and_parent(pid)[0] in "ZX" or not _is_ours(pid):
        return None
    command = _command(pid)
    # multiprocessing keeps these two helpers for the life of the process that first needed them.
    if re.search(r"multiprocessing\.(resource_tracker|forkserver) import main", command):
        return None
    return Trace("process", str(pid), command[:200])


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _is_of_this_run(trace: Trace) -> bool:
    """Whether a path may be: not if it belongs to a launch that has its directory in the place of another run."""
    assert trace.path is not None
    launch = re.match(r"(?:bt|blendtorch)-([^-]*)", trace.path.name)
    if launch is None:
        return True
    name = f"blendtorch-{launch[1]}"
    others = {*Path("/tmp").glob(f"bt-run-*/{name}"), Path("/tmp", name)}
    return not any(other.exists() for other in others - {Path(os.environ["XDG_RUNTIME_DIR"], name), trace.path})


class _Others:
    """The processes that are not of this run, and what they use."""

    def __init__(self) -> None:
        self._pids = {int(pid) for pid in os.listdir("/proc") if pid.isdigit() and not _is_ours(int(pid))}
        self._maps, self._files = "", set()
        for pid in self._pids:
            try:
                self._maps += Path(f"/proc/{pid}/maps").read_text()
            except OSError:
                continue
            for fd in _names(f"/proc/{pid}/fd"):
                try:
                    self._files.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
                except OSError:
                    continue

    def use(self, trace: Trace) -> bool:
        path = trace.path
        assert path is not None
        if trace.kind == "shared memory":  # nobody may map it just now, but its launcher has the launch's lock open
            streams = f"/dev/shm/blendtorch-{path.name.split('-')[1]}/"
            return str(path) in self._maps or any(file.startswith(streams) for file in self._files)
        if trace.kind == "launch directory":  # the launcher holds a lock in it
            return any(file.startswith(f"{path.resolve()}/") for file in self._files)
        if trace.kind == "X socket":  # an Xvfb that chose its display number itself has no lock
            sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
            return any(f"socket:[{fields[6]}]" in self._files for fields in sockets if fields[-1] == str(path))
        try:
            return int(path.read_text()) in self._pids
        except (OSError, ValueError):
            return False


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
    before = seen()
    yield
    report(wait_until_nothing_is_left(before))


@pytest.fixture(autouse=True)
def nothing_stays_behind(request: pytest.FixtureRequest, nothing_stays_behind_at_the_end: None) -> Iterator[None]:
    before = seen()
    yield
    left = wait_until_nothing_is_left(before)
    if request.node.stash.get(_failed, False):
        remove(left)
    else:
        report(left)


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


def _find_named(path: str) -> Blender | str:
    try:
        runtime = find_runtime(path, None)
    except BlendtorchError as error:
        return str(error)
    return Blender(runtime.kind, path, runtime.version)


_FORMS: dict[str, Callable[[], Blender | str]] = {"module": _find_module, "executable": _find_executable}
if _named := os.environ.get("BLENDTORCH_TEST_BLENDERS"):
    _FORMS = {path: functools.partial(_find_named, path) for path in _named.split(os.pathsep)}


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
