"""The watch over what tests leave behind, itself under test: in a pytest of its own, in a child process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

LEAKING_TESTS = """
import os, pathlib, subprocess, uuid

def test_that_leaks():
    launch = uuid.uuid4().hex[:8]
    pathlib.Path(f"/dev/shm/bt-{launch}-DATA-0-1").touch()
    pathlib.Path(os.environ["XDG_RUNTIME_DIR"], f"blendtorch-{launch}").mkdir()
    is_running = "grep -q '^sleep' /proc/$!/cmdline"
    subprocess.run(["sh", "-c", f"setsid sleep 600 >/dev/null 2>&1 & until {is_running}; do :; done"])

def test_that_is_clean():
    pass
"""


def test_a_test_that_leaves_something_behind_fails_and_the_next_one_starts_clean(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, LEAKING_TESTS)
    assert "2 passed, 1 error" in done.stdout, done.stdout + done.stderr
    for leftover in (
        "shared memory /dev/shm/bt-",
        "launch directory /tmp/bt-run-",
        "(sleep 600)",
    ):
        assert leftover in done.stdout


def run_pytest(folder: Path, *files: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run these tests under the watch, one worker per file if there are several."""
    tests = folder / "tests"
    tests.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    for name in ("conftest.py", "selection.py"):
        shutil.copy(Path(__file__).with_name(name), tests)
    for number, text in enumerate(files):
        (tests / f"test_{number}.py").write_text(text)
    options = ["-p", "no:cacheprovider", "--import-mode=importlib", f"-n{len(files) if len(files) > 1 else 0}"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--dist=loadfile", str(tests)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
    )


TEST_THAT_HAS_MUCH = """
import contextlib, os, pathlib, shutil, subprocess, sys, time
import posix_ipc

STEPS = pathlib.Path(os.environ["STEPS"])

def test_that_has_much(monkeypatch):
    from blendtorch_shm.launch.directory import LaunchDirectory
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(STEPS))  # as that of a desktop, which is no run of tests
    while not STEPS.joinpath("watch-begins").exists():
        time.sleep(0.01)
    directory = LaunchDirectory().create()
    posix_ipc.SharedMemory(f"/bt-{directory.launch}-DATA-0-1", posix_ipc.O_CREX, size=4096).close_fd()
    with contextlib.ExitStack() as programs:
        programs.enter_context(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        if shutil.which("Xvfb"):  # which has a socket
            command = ["Xvfb", "-displayfd", "1", "-nolisten", "tcp"]
            display = programs.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            programs.callback(display.terminate)
            display.stdout.readline()
        STEPS.joinpath("other-has-much").touch()
        while not STEPS.joinpath("watch-ends").exists():
            time.sleep(0.01)
    directory.remove()
"""
TEST_THAT_IS_WATCHED = """
import os, pathlib, time

STEPS = pathlib.Path(os.environ["STEPS"])

def test_that_is_clean():
    STEPS.joinpath("watch-begins").touch()
    while not STEPS.joinpath("other-has-much").exists():
        time.sleep(0.01)

def test_that_comes_after_it():
    STEPS.joinpath("watch-ends").touch()
"""


def test_workers_do_not_accuse_each_other(tmp_path: Path) -> None:
    """A process, shared memory and directories of one come while a test of the other one runs, and outlast it."""
    steps = tmp_path / "steps"
    steps.mkdir()
    done = run_pytest(tmp_path, TEST_THAT_HAS_MUCH, TEST_THAT_IS_WATCHED, STEPS=str(steps))
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    assert "error" not in done.stdout, done.stdout
