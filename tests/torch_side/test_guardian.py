"""What stands between the launcher and an instance: how an instance ended is known, and what it leaves behind ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blendtorch_shm.errors import InstanceDied
from blendtorch_shm.launch.sweep import sweep
from torch_side import BlenderLauncher
from torch_side.launching.bound import BoundProcess

from .conftest import eventually, is_alive

LAUNCH = """
import os, signal, sys, threading, time
from torch_side.launcher import BlenderLauncher
from torch_side.launching import instance
instance._FIRST_PAUSE_S = 0.02
if sys.argv[2] == "ignored":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)

def wait_for_anybody():
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.001)

if sys.argv[2] == "waited for":
    threading.Thread(target=wait_for_anybody, daemon=True).start()
with BlenderLauncher("", sys.argv[1], 1, ["DATA"], blender="python", progress=False, restart=sys.argv[3]) as launcher:
    print(launcher.wait(), launcher.reports()[0].restarts)
"""
"""A launcher in a program in which it cannot learn from the kernel how its children end."""


@pytest.mark.parametrize("children", ["ignored", "waited for"])
@pytest.mark.parametrize(
    ("script_ends", "restart", "said"),
    [
        ("sys.exit(0)", "on-failure", "[0] 0"),
        ("sys.exit(7)", "never", "[7] 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "never", "[-9] 0"),
        ("sys.exit(3 if os.environ['BLENDTORCH_RESTARTS'] == '0' else 0)", "on-failure", "[0] 1"),
    ],
)
def test_how_an_instance_ended_is_known_whoever_waits_for_the_children_of_this_program(
    script: Callable[[str], Path], children: str, script_ends: str, restart: str, said: str
) -> None:
    path = script(f"import os, signal, sys\n{script_ends}")
    done = subprocess.run([sys.executable, "-c", LAUNCH, path, children, restart], capture_output=True, text=True)
    assert done.stdout.strip() == said, done.stderr
    assert done.returncode == 0, done.stderr


def test_an_instance_can_wait_for_its_own_children_although_the_launcher_ignores_its_own(
    script: Callable[[str], Path],
) -> None:
    path = script("import subprocess, sys\nsys.exit(subprocess.call(['sh', '-c', 'exit 5']))")
    done = subprocess.run([sys.executable, "-c", LAUNCH, path, "ignored", "never"], capture_output=True, text=True)
    assert done.stdout.strip() == "[5] 0", done.stderr


HIDES = "env -i setsid sh -c 'echo $$; exec sleep 600' &"
"""Starts a process with an empty environment, in a session of its own, that loses its parent."""


@pytest.fixture
def bound() -> Any:
    started: list[BoundProcess] = []

    def start(script: str, **options: Any) -> BoundProcess:
        started.append(BoundProcess(["sh", "-c", script], **options))
        return started[-1]

    yield start
    for process in started:
        process.close()


def test_what_hides_ends_with_everything_else(bound: Callable[..., BoundProcess], tmp_path: Path) -> None:
    with open(tmp_path / "out", "w+") as out:
        process = bound(f"({HIDES}) ; {HIDES} sleep 0.2; exit 3", stdout=out)
        assert process.wait(60) == 3
        hidden = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    assert len(hidden) == 2
    assert all(map(is_alive, hidden))
    assert not process.is_over()
    process.close()
    assert process.is_over()
    assert process.wait() == process.poll() == 3
    assert not any(map(is_alive, hidden))


def test_the_process_id_of_one_that_has_ended_is_nobody_elses_before_all_is_over(
    bound: Callable[..., BoundProcess],
) -> None:
    process = bound("exit 0")
    assert process.wait(60) == 0
    assert os.path.exists(f"/proc/{process.pid}")
    process.close()
    assert not os.path.exists(f"/proc/{process.pid}")


def test_one_whose_guardian_is_killed_dies_with_it(bound: Callable[..., BoundProcess]) -> None:
    process = bound("exec sleep 600")
    process._guardian.kill()
    assert process.wait(60) == -signal.SIGKILL
    eventually(lambda: not is_alive(process.pid))


def test_one_that_is_known_has_a_process_group_of_its_own_and_hears_signals(bound: Callable[..., BoundProcess]) -> None:
    for _ in range(20):
        process = bound("sleep 600")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_one_whose_guardian_is_stopped_can_be_ended(bound: Callable[..., BoundProcess]) -> None:
    process = bound("sleep 600")
    process._guardian.send_signal(signal.SIGSTOP)
    process.close()
    assert process.poll() == -signal.SIGKILL
    assert not os.path.exists(f"/proc/{process.pid}")


def test_the_end_of_one_whose_guardian_is_stopped_is_known(bound: Callable[..., BoundProcess]) -> None:
    process = bound("sleep 600")
    process._guardian.send_signal(signal.SIGSTOP)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not process.is_unguarded


def test_one_that_survives_its_guardian_is_killed_and_the_error_says_so(script: Callable[[str], Path]) -> None:
    """As with a Blender that has capabilities: for such a program the kernel forgets whose death it was to die with."""
    path = script(
        "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nprint('ready', flush=True)\ntime.sleep(600)"
    )
    with BlenderLauncher("", path, blender="python", progress=False) as launcher:
        (process,) = launcher.launch_info.processes
        assert isinstance(process, BoundProcess)
        eventually(lambda: "ready" in launcher.reports()[0].log_tail)
        process._guardian.kill()
        assert launcher.wait() == [-signal.SIGKILL]
        eventually(lambda: not is_alive(process.pid))
        with pytest.raises(InstanceDied, match="because its guardian, the process that watches over it, was killed"):
            launcher.assert_alive()


def test_one_that_cannot_be_run_says_why(bound: Callable[..., BoundProcess], tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as out:
        process = BoundProcess([str(tmp_path / "none")], stderr=out)
    assert process.wait(60) == 1
    process.close()
    assert (tmp_path / "out").read_text() == f"Cannot run {tmp_path}/none: No such file or directory\n"


@pytest.mark.parametrize("end", ["close", "restart", "kill"])
def test_what_hides_from_the_launcher_ends_with_its_instance(script: Callable[[str], Path], end: str) -> None:
    path = script(
        "import os, subprocess, sys, time\n"
        "if os.environ['BLENDTORCH_RESTARTS'] == '0':\n"
        f"    subprocess.check_call(['sh', '-c', {HIDES!r}])\n"
        "    time.sleep(0.2)\n"
        "    os._exit(1 if sys.argv[-1] == 'restart' else 0)\n"
        "print('again', flush=True); time.sleep(600)"
    )
    code = (
        "import sys, time\nfrom torch_side.launcher import BlenderLauncher\n"
        "launcher = BlenderLauncher('', sys.argv[1], blender='python', progress=False, restart='on-failure',"
        " instance_args=[[sys.argv[2]]]).__enter__()\nprint(launcher._directory.path, flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path, end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        log = Path(launcher.stdout.readline().strip(), "instance-00.log")
        hidden = int(eventually(lambda: log.exists() and "\n" in (text := log.read_text()) and text).split()[0])
        if end == "restart":
            eventually(lambda: "again" in log.read_text())
        else:
            assert is_alive(hidden)
            (launcher.kill if end == "kill" else launcher.terminate)()
            launcher.wait()
        if end == "kill":
            eventually(lambda: not is_alive(hidden), "its end")
        assert not is_alive(hidden)
        launcher.terminate()
    sweep()  # what a killed launcher leaves
