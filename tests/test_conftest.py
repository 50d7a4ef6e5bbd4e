"""The watch over what tests leave behind, itself under test: in a pytest of its own, in a child process."""

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
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_leaks.py").write_text(LEAKING_TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)], capture_output=True, text=True
    )
    assert "2 passed, 1 error" in done.stdout, done.stdout + done.stderr
    for leftover in (
        "shared memory /dev/shm/bt-",
        "launch directory /tmp/bt-run-",
        "(sleep 600)",
    ):
        assert leftover in done.stdout
