"""Launching instances, and being rid of them: real processes, most of them plain Python."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import blendtorch_shm.launch.directory
import torch_side.launcher
import torch_side.launching.display
import torch_side.launching.logs
from blendtorch_shm.errors import (
    BlenderNotFound,
    BlendtorchError,
    ConfigurationError,
    InstanceDied,
    LaunchError,
    PortInUse,
    SceneNotFound,
    ScriptNotFound,
)
from blendtorch_shm.launch.notes import InstanceReport, instance_reports
from blendtorch_shm.launch.sweep import processes_of, sweep
from torch_side.launcher import BlenderLauncher
from torch_side.launching import ports
from torch_side.utils import get_primary_ip

from ..interruption import everywhere
from .conftest import eventually, is_alive

STAY = "\nimport time\ntime.sleep(600)\n"
"""The end of a script that goes on until it is ended."""


@contextlib.contextmanager
def launched(script: Path, num_instances: int = 1, **options: Any) -> Iterator[tuple[BlenderLauncher, str]]:
    """A launcher of plain Python instances, and its directory."""
    with BlenderLauncher(
        options.pop("scene", ""), script, num_instances, ["DATA"], blender=options.pop("blender", "python"), **options
    ) as launcher:
        yield launcher, directory_of(launcher)


def directory_of(launcher: BlenderLauncher) -> str:
    twin = launcher.launch_info.addresses["DATA"][0].twin
    assert twin is not None
    return twin.directory


def reports(directory: str, state: str) -> list[InstanceReport] | None:
    """The reports once all instances are in that state."""
    found = instance_reports(directory)
    return found if found and all(report.state == state for report in found) else None


def logs(directory: str, num_instances: int = 1) -> list[str]:
    """What the instances printed, once each has printed a whole line."""
    paths = [Path(directory, f"instance-{btid:02d}.log") for btid in range(num_instances)]
    return eventually(
        lambda: (texts := [path.read_text() for path in paths]) and all("\n" in t for t in texts) and texts
    )


# -- what an instance is given -----------------------------------------------------------------------------------------


def test_an_instance_gets_its_number_seed_sockets_and_arguments(script: Callable[[str], Path]) -> None:
    path = script("import json, sys\nprint(json.dumps([sys.argv, __name__, __file__]))" + STAY)
    with BlenderLauncher(
        "",
        path,
        2,
        ["DATA", "CTRL"],
        seed=7,
        instance_args=[["--color", "light red"], ["positional", 3]],
        blender="python",
    ) as launcher:
        addresses = launcher.launch_info.addresses
        assert list(addresses) == ["DATA", "CTRL"]
        first_port = int(addresses["DATA"][0].rpartition(":")[2])
        assert len({*addresses["DATA"], *addresses["CTRL"]}) == 4
        assert first_port >= ports.DEFAULT_START_PORT
        seen = [json.loads(log) for log in logs(directory_of(launcher), 2)]
    for btid, extra in enumerate([["--color", "light red"], ["positional", "3"]]):
        sockets = [f"{name}={addresses[name][btid]}" for name in ("DATA", "CTRL")]
        argv = ["--", "-btsockets", *sockets, "-btid", str(btid), "-btseed", str(7 + btid), *extra]
        assert seen[btid] == [[str(path), *argv], "__main__", str(path)]


def test_ports_count_up_through_sockets_first_and_instances_second(script: Callable[[str], Path]) -> None:
    start = free_ports(4)
    with BlenderLauncher("", script(STAY), 2, ["A", "B"], start, blender="python") as launcher:
        assert launcher.launch_info.addresses == {
            "A": [f"tcp://127.0.0.1:{start}", f"tcp://127.0.0.1:{start + 1}"],
            "B": [f"tcp://127.0.0.1:{start + 2}", f"tcp://127.0.0.1:{start + 3}"],
        }


def test_a_publisher_in_the_instance_can_bind_its_address_although_it_is_reserved(
    script: Callable[[str], Path],
) -> None:
    path = script(
        "import sys, zmq\naddress = sys.argv[3].partition('=')[2]\nsocket = zmq.Context().socket(zmq.PUSH)\n"
        "socket.bind(address)\nprint('bound', flush=True)" + STAY
    )
    with launched(path) as (_, directory):
        assert logs(directory) == ["bound\n"]


def test_addresses_know_their_shared_memory_in_the_instance_too(script: Callable[[str], Path]) -> None:
    path = script(
        "import sys\nfrom blendtorch_shm.launch.address import resolve\n"
        "print(resolve(sys.argv[3].partition('=')[2]).twin.lock_path)" + STAY
    )
    with launched(path) as (launcher, directory):
        twin = launcher.launch_info.addresses["DATA"][0].twin
        assert twin is not None
        assert logs(directory) == [f"{twin.lock_path}\n"]
        assert twin.directory == directory


def test_environments_can_differ_between_instances(script: Callable[[str], Path]) -> None:
    path = script("import os\nprint(os.environ['GPU'], os.environ['HOME'])" + STAY)
    with launched(path, 2, env=[{"GPU": "0"}, {"GPU": "1"}]) as (_, directory):
        assert logs(directory, 2) == [f"{gpu} {os.environ['HOME']}\n" for gpu in "01"]


def test_a_script_can_import_its_neighbours_and_is_not_confused_by_our_modules(script: Callable[[str], Path]) -> None:
    path = script("import neighbour, signal, sys\nprint(neighbour.X, signal.SIGTERM.name, 'bpy' in sys.modules)" + STAY)
    (path.parent / "neighbour.py").write_text("X = 1")
    with launched(path) as (_, directory):
        assert logs(directory) == ["1 SIGTERM False\n"]


def test_commands_can_be_copied_into_a_shell(script: Callable[[str], Path]) -> None:
    with launched(script("print('hello')")) as (launcher, _):
        command = launcher.launch_info.commands[0]
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "hello\n")


# -- how instances end -------------------------------------------------------------------------------------------------


def test_a_script_that_raises_ends_its_instance_and_is_reported_with_its_traceback(
    script: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with launched(script("def f():\n    raise ValueError('the cube is gone')\nf()")) as (launcher, directory):
        eventually(lambda: reports(directory, "exited"))
        with pytest.raises(InstanceDied) as caught:
            launcher.assert_alive()
        message = str(caught.value)
        assert "Instance 0 ended" in message
        assert "exit code 1" in message
        assert "ValueError: the cube is gone" in message
        assert "bootstrap.py" not in message
        assert eventually(lambda: caplog.messages) == [message]
        (report,) = launcher.reports()
        assert report.error == "ValueError: the cube is gone (instance.py:2)"


@pytest.mark.parametrize(
    ("text", "error", "line"),
    [
        ("signal = btb.Signal()\nsignal.add(lambda: cub)\nsignal.invoke()", "NameError", 3),
        ("class Pose: pass\nbtb.DataPublisher(data).publish(pose=Pose())", "PublishError", 3),
        ("numbers = [\n", "SyntaxError", 2),
        ("btb.parse_blendtorch_args()[0].btsockets['DAT']", "SocketNotFound", 2),
        ("try: cub\nexcept NameError as error: raise ValueError('no cube') from error", "ValueError", 3),
    ],
)
def test_the_traceback_of_a_script_has_no_frames_of_ours(
    script: Callable[[str], Path], text: str, error: str, line: int
) -> None:
    begin = "import blendtorch.btb as btb; data = btb.parse_blendtorch_args()[0].btsockets.get('DATA')\n"
    with launched(script(begin + text)) as (launcher, directory):
        assert launcher.wait() == [1]
        log = Path(directory, "instance-00.log").read_text()
        (report,) = launcher.reports()
    assert re.match(rf"{error}: .* \(instance.py:{line}\)$", report.error)
    assert "blender_side" not in log
    assert "blendtorch_shm/" not in log
    assert log.count("Traceback") <= 1 + (" from error" in text)


def test_a_killed_instance_is_noticed_while_the_others_go_on(script: Callable[[str], Path]) -> None:
    with launched(script(STAY), 2) as (launcher, directory):
        launcher.assert_alive()
        first, second = launcher.launch_info.processes or []
        first.kill()
        report = eventually(lambda: [r for r in instance_reports(directory) if r.state == "exited"])[0]
        assert (report.btid, report.exit_code) == (0, -signal.SIGKILL)
        assert second.poll() is None
        with pytest.raises(InstanceDied, match=r"Instance 0 .*killed by SIGKILL.*memory"):
            launcher.assert_alive()


def test_a_death_is_noticed_by_assert_alive_before_anybody_else(script: Callable[[str], Path]) -> None:
    with launched(script(STAY)) as (launcher, _):
        process = (launcher.launch_info.processes or [])[0]
        process.kill()
        process.wait()
        with pytest.raises(InstanceDied):
            launcher.assert_alive()


@pytest.mark.parametrize(
    ("ending", "code"), [("", 0), ("import sys; sys.exit(3)", 3), ("import sys; sys.exit('no')", 1)]
)
def test_wait_returns_exit_codes(script: Callable[[str], Path], ending: str, code: int) -> None:
    with launched(script(ending), 2) as (launcher, _):
        assert launcher.wait() == [code, code]


def test_states_go_from_starting_to_running_to_exited(script: Callable[[str], Path], tmp_path: Path) -> None:
    go = tmp_path / "go"
    path = script(f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)")
    with launched(path) as (launcher, directory):
        assert instance_reports(directory)[0].state in ("starting", "running")
        eventually(lambda: reports(directory, "running"))
        go.touch()
        launcher.wait()
        assert instance_reports(directory)[0].exit_code == 0


def test_what_it_renders_with_is_told_once_and_software_loudly(
    script: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = script(
        "import os\nopen(os.environ['BLENDTORCH_INSTANCE'] + '.renderer', 'w').write('EEVEE, llvmpipe')" + STAY
    )
    heard = ""

    def all_told() -> bool:
        nonlocal heard
        heard += capfd.readouterr().err
        return heard.count("renders with EEVEE, llvmpipe") == 2

    with launched(path, 2):
        eventually(all_told)
    heard += capfd.readouterr().err
    assert heard.count("SOFTWARE rendering") == 1
    assert heard.count("runs its script") == 2


def test_progress_can_be_turned_off(script: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    with launched(script(""), progress=False) as (launcher, _):
        launcher.wait()
    assert capfd.readouterr().err == ""


# -- leaving nothing behind (every test is checked for that by conftest.py) --------------------------------------------


def test_leaving_ends_whole_process_trees(script: Callable[[str], Path]) -> None:
    """Grandchildren that ignore SIGTERM, in a session of their own, with a parent that is gone."""
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    )
    path = script(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}], stdout=subprocess.PIPE, start_new_session=True)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\nsys.stdout.flush()\nimport os; os._exit(0)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_side.launching.supervisor.GRACE_S", 0.2)
        with launched(path) as (launcher, directory):
            launcher.wait()
            grandchild = int(logs(directory)[0])
            assert is_alive(grandchild)
    assert not is_alive(grandchild)


def test_a_stopped_instance_ends_too(script: Callable[[str], Path]) -> None:
    with launched(script(STAY)) as (launcher, directory):
        eventually(lambda: reports(directory, "running"))
        (launcher.launch_info.processes or [])[0].send_signal(signal.SIGSTOP)
    assert (launcher.launch_info.processes or [])[0].returncode == -signal.SIGTERM


def test_an_exception_in_the_block_passes_through_after_the_instances_ended(script: Callable[[str], Path]) -> None:
    with pytest.raises(ZeroDivisionError), launched(script(STAY)) as (launcher, _):
        _ = 1 / 0
    assert (launcher.launch_info.processes or [])[0].returncode is not None


def test_an_exception_from_a_signal_handler_does_not_hide_why_the_block_ended(script: Callable[[str], Path]) -> None:
    """torch's handler of SIGCHLD raises when a worker was killed, as when a whole process group is sent SIGTERM."""

    def handler(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker is killed")

    path = script(
        "import os, signal, sys, time\n"
        f"def on_term(*_):\n    os.kill({os.getpid()}, signal.SIGUSR1)\n    time.sleep(0.1)\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, on_term)\nprint('ready', flush=True)" + STAY
    )
    processes = []

    def fail_in_the_block() -> None:
        with launched(path) as (launcher, directory):
            processes.extend(launcher.launch_info.processes or [])
            logs(directory)
            _ = 1 / 0

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(ZeroDivisionError):
            fail_in_the_block()
        assert [process.returncode for process in processes] == [0]
    finally:
        signal.signal(signal.SIGUSR1, previous)


@pytest.mark.long
def test_ctrl_c_anywhere_leaves_nothing_behind(script: Callable[[str], Path]) -> None:
    """What hits the first lines of ``__exit__`` leaves the rest to the end of this process."""
    launcher = BlenderLauncher("", script(STAY), named_sockets=["DATA"], blender="python", progress=False)

    def launch() -> None:
        with launcher:
            pass

    modules = torch_side.launcher, torch_side.launching.logs, blendtorch_shm.launch.directory
    files = [module.__file__ for module in modules]
    for place in everywhere(launch, files):
        torch_side.launcher._close_all()
        assert launcher not in torch_side.launcher._running, place
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, place
        assert not (launcher._directory and processes_of(launcher._directory.launch)), place
        assert not list(Path(os.environ["XDG_RUNTIME_DIR"]).glob("*blendtorch-*")), place
        assert not list(Path("/dev/shm").glob(f"*{launcher._directory.launch}*") if launcher._directory else []), place


def test_a_launcher_can_be_used_again(script: Callable[[str], Path]) -> None:
    launcher = BlenderLauncher("", script(STAY), named_sockets=["DATA"], blender="python")
    with pytest.raises(LaunchError, match="with statement"):
        _ = launcher.launch_info
    for _ in range(2):
        with launcher:
            launcher.assert_alive()
            with pytest.raises(LaunchError, match="already running"):
                launcher.__enter__()


def test_twenty_one_launches_after_another_leave_nothing_not_even_a_port(script: Callable[[str], Path]) -> None:
    path, start = script(""), free_ports(1)
    for _ in range(21):
        with launched(path, start_port=start, progress=False) as (launcher, _):
            launcher.assert_alive()


def test_launches_side_by_side_do_not_disturb_each_other(script: Callable[[str], Path]) -> None:
    path = script(STAY)
    with launched(path, 2) as (first, first_directory), launched(path, 2) as (second, second_directory):
        ports_used = [*first.launch_info.addresses["DATA"], *second.launch_info.addresses["DATA"]]
        assert len(set(ports_used)) == 4
        assert first_directory != second_directory
        first.assert_alive()
        second.assert_alive()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_neither_ends_the_instances_nor_keeps_their_ports(script: Callable[[str], Path]) -> None:
    port = free_ports(1)  # not one that the next launch on this machine takes
    launcher = BlenderLauncher("", script(STAY), named_sockets=["DATA"], blender="python", start_port=port)
    readable, writable = os.pipe()
    with launcher:
        child = os.fork()
        if child == 0:
            launcher.close()
            os.write(writable, b"x" if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else b"?")
            signal.pause()
            os._exit(0)
        assert os.read(readable, 1) == b"x"
        launcher.assert_alive()
    reservation = ports.PortReservations("127.0.0.1")
    try:
        assert reservation.reserve(1, port) == [port]
    finally:
        reservation.close()
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        os.close(readable)
        os.close(writable)


OTHER_LAUNCHER = """
import contextlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
from torch_side.launcher import BlenderLauncher
launcher = BlenderLauncher("", sys.argv[1], 2, ["DATA"], blender=sys.argv[2]).__enter__()
directory = launcher.launch_info.addresses["DATA"][0].twin.directory
print(directory, *(process.pid for process in launcher.launch_info.processes), flush=True)
with {block}:
    time.sleep({seconds})
"""


def hear_signals() -> None:
    """In a new process: as at a terminal, even if whoever runs the tests ignores some signals, as nohup does."""
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def under_nohup() -> None:
    """In a new process: as :func:`hear_signals`, and with SIGHUP ignored."""
    hear_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class OtherLauncher:
    """A launcher in another process, with two instances, that ends by itself or not."""

    def __init__(
        self,
        script: Path,
        *,
        blender: str = "python",
        block: str = "contextlib.closing(launcher)",
        seconds: int = 600,
        begin: Callable[[], None] = hear_signals,
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER_LAUNCHER.format(block=block, seconds=seconds), str(script), blender],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=begin,
        )
        assert self.process.stdout is not None
        self.directory, *pids = self.process.stdout.readline().split()
        self.pids = [int(pid) for pid in pids]

    def is_gone(self) -> bool:
        return not os.path.exists(self.directory) and not any(map(is_alive, self.pids))


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131), (signal.SIGINT, -signal.SIGINT)],
)
def test_a_signal_to_the_launcher_ends_everything(script: Callable[[str], Path], number: int, code: int) -> None:
    other = OtherLauncher(script(STAY))
    eventually(lambda: reports(other.directory, "running"))
    other.process.send_signal(number)
    other.process.communicate()
    assert other.process.returncode == code
    assert other.is_gone()


def test_a_launcher_under_nohup_outlives_the_terminal(script: Callable[[str], Path]) -> None:
    other = OtherLauncher(script(STAY), begin=under_nohup)
    eventually(lambda: reports(other.directory, "running"))
    other.process.send_signal(signal.SIGHUP)
    for pid in other.pids:
        os.kill(pid, signal.SIGHUP)
    other.process.terminate()
    other.process.communicate()
    assert other.process.returncode == 143
    assert other.is_gone()


def test_a_signal_during_start_up_ends_everything(script: Callable[[str], Path]) -> None:
    other = OtherLauncher(script(STAY))
    other.process.terminate()
    other.process.communicate()
    assert other.is_gone()


def test_a_launcher_that_nobody_closed_is_closed_at_exit(script: Callable[[str], Path]) -> None:
    other = OtherLauncher(script(STAY), block="open(sys.argv[1])", seconds=0)
    other.process.communicate()
    assert other.process.returncode == 0
    assert other.is_gone()


def test_instances_die_with_a_killed_launcher_and_the_next_launch_clears_up(script: Callable[[str], Path]) -> None:
    path = script(STAY)
    other = OtherLauncher(path)
    eventually(lambda: reports(other.directory, "running"))
    other.process.kill()
    other.process.communicate()
    eventually(lambda: not any(map(is_alive, other.pids)), "the instances' death")
    assert os.path.isdir(other.directory)
    with launched(path):
        assert other.is_gone()


# -- what cannot work, and what it is told as --------------------------------------------------------------------------


def free_ports(count: int) -> int:
    """The first of so many consecutive ports that nobody has."""
    while True:
        start = random.randrange(20000, 30000)
        reservation = ports.PortReservations("127.0.0.1")
        try:
            reservation.reserve(count, start)
            return start
        except PortInUse:
            continue
        finally:
            reservation.close()


def test_a_port_in_use_is_named_with_its_holder_and_nothing_starts(script: Callable[[str], Path]) -> None:
    start = free_ports(2)
    with socket.create_server(("127.0.0.1", start + 1)), pytest.raises(PortInUse) as caught:
        BlenderLauncher("", script(STAY), 2, ["DATA"], start, blender="python").__enter__()
    message = str(caught.value)
    assert f"Port {start + 1} on 127.0.0.1" in message
    assert f"by process {os.getpid()}" in message
    assert "start_port" in message


def test_the_default_port_moves_past_those_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    start = free_ports(4)
    monkeypatch.setattr(ports, "DEFAULT_START_PORT", start)
    first, second = ports.PortReservations("127.0.0.1"), ports.PortReservations("127.0.0.1")
    with socket.create_server(("127.0.0.1", start + 1)), contextlib.closing(first), contextlib.closing(second):
        assert first.reserve(1, start) == [start]
        assert second.reserve(2, start) == [start + 2, start + 3]


def test_two_launches_cannot_have_the_same_exact_port(script: Callable[[str], Path]) -> None:
    start = free_ports(1)
    with launched(script(STAY), start_port=start), pytest.raises(PortInUse), launched(script(STAY), start_port=start):
        pass


def test_the_port_of_an_earlier_connection_can_be_had_again() -> None:
    """The side that closes first keeps its port in TIME_WAIT for a minute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        server.accept()[0].close()
        client.close()
    reservation = ports.PortReservations("127.0.0.1")
    assert reservation.reserve(1, port) == [port]
    reservation.close()


def test_a_missing_blender_is_a_clear_error(script: Callable[[str], Path]) -> None:
    with pytest.raises(BlenderNotFound, match="/no/blender"), launched(script(STAY), blender="/no/blender"):
        pass


def test_a_missing_scene_or_script_is_a_clear_error_before_anything_starts(script: Callable[[str], Path]) -> None:
    with pytest.raises(SceneNotFound, match=r"'no\.blend' does not exist"):
        BlenderLauncher("no.blend", script(STAY))
    with pytest.raises(ScriptNotFound, match=r"'no\.py' does not exist"):
        BlenderLauncher("", "no.py")


def test_a_scene_needs_blender(script: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigurationError, match="needs Blender"), launched(script(STAY), scene=script(STAY)):
        pass


def test_without_xvfb_an_old_executable_without_a_display_is_a_clear_error(
    script: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = json.dumps(dict(version=[3, 4, 1], python=sys.version_info[:2], missing=[]))
    blender = tmp_path / "blender"
    blender.write_text(f"#!/bin/sh\necho 'BLENDTORCH-PROBE {answer}'\n")
    blender.chmod(0o755)
    monkeypatch.setattr(torch_side.launching.display.shutil, "which", lambda name: None)
    path = script(STAY)
    monkeypatch.setenv("PATH", str(tmp_path))
    launcher = BlenderLauncher("", path, blend_path=tmp_path)
    monkeypatch.setattr("torch_side.finder._which", lambda directories, environment=True: str(blender))
    with pytest.raises(LaunchError, match="apt-get install -y xvfb"):
        launcher.__enter__()


def test_arguments_that_cannot_work_are_named_before_anything_starts(script: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigurationError, match="num_instances must be an int from 1 to 9999, not 0"):
        BlenderLauncher("", script(""), 0)


def test_its_repr_says_what_is_launched_and_how_it_is(script: Callable[[str], Path]) -> None:
    path = script(STAY)
    launcher = BlenderLauncher("", path, 2, ["DATA"], blender="python")
    assert repr(launcher) == f"<BlenderLauncher of 2 x {path}, DATA: not launched>"
    with launcher:
        eventually(lambda: reports(directory_of(launcher), "running"))
        assert repr(launcher) == f"<BlenderLauncher of 2 x {path}, DATA: 2 running>"
    assert repr(launcher) == f"<BlenderLauncher of 2 x {path}, DATA: not launched>"


@pytest.mark.parametrize("bind_addr", ["not.a.host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_ours_is_a_clear_error(script: Callable[[str], Path], bind_addr: str) -> None:
    with pytest.raises(ConfigurationError, match="bind_addr"), launched(script(STAY), bind_addr=bind_addr):
        pass


def test_primaryip_is_the_address_of_the_default_route(script: Callable[[str], Path]) -> None:
    try:
        primary = get_primary_ip()
    except BlendtorchError:
        pytest.skip("this host has no default route")
    with launched(script(STAY), bind_addr="primaryip") as (launcher, _):
        assert launcher.launch_info.addresses["DATA"][0].startswith(f"tcp://{primary}:")


# -- real Blender ------------------------------------------------------------------------------------------------------


def test_blender_runs_a_script_with_all_packages_and_ends_with_it(blender: Any, script: Callable[[str], Path]) -> None:
    path = script(
        "import bpy, sys, blendtorch_shm, numpy, zmq, posix_ipc, msgspec\n"
        "print('seen', sys.argv[sys.argv.index('--'):], len(bpy.data.objects), flush=True)"
    )
    with launched(path, blender=blender.argument, seed=5) as (launcher, directory):
        address = launcher.launch_info.addresses["DATA"][0]
        assert launcher.wait() == [0]
        log = Path(directory, "instance-00.log").read_text()
    assert f"seen ['--', '-btsockets', 'DATA={address}', '-btid', '0', '-btseed', '5'] 3" in log


def test_blender_that_cannot_open_the_scene_ends_at_once(
    blender: Any, script: Callable[[str], Path], tmp_path: Path
) -> None:
    scene = tmp_path / "broken.blend"
    scene.write_bytes(b"BLENDER-v999" + bytes(1000))
    with launched(script("print('must not run')"), scene=scene, blender=blender.argument) as (launcher, directory):
        assert launcher.wait() == [1]
        log = Path(directory, "instance-00.log").read_text()
    assert "must not run" not in log
    assert "broken.blend" in log


def test_blender_whose_script_raises_ends_with_its_traceback(blender: Any, script: Callable[[str], Path]) -> None:
    with launched(script("import bpy\nraise ValueError('no cube')"), blender=blender.argument) as (launcher, _):
        assert launcher.wait() == [1]
        with pytest.raises(InstanceDied, match="ValueError: no cube"):
            launcher.assert_alive()


def test_blender_that_goes_on_is_ended_and_leaves_no_temporary_directory(
    blender: Any, script: Callable[[str], Path]
) -> None:
    path = script(
        "import bpy\nprint('tempdir', bpy.app.tempdir, flush=True)\n"
        "if bpy.app.background:\n    import time\n    time.sleep(600)\n"
        "bpy.app.timers.register(lambda: 0.1)\n"
    )
    with launched(path, blender=blender.argument) as (launcher, directory):
        log = Path(directory, "instance-00.log")
        line = eventually(lambda: [line for line in log.read_text().splitlines(True) if line.startswith("tempdir ")])[0]
        scratch = line.split()[1]
        assert os.path.isdir(scratch)
        launcher.assert_alive()
    assert not os.path.exists(scratch)


def test_blender_and_its_display_die_with_a_killed_launcher(blender: Any, script: Callable[[str], Path]) -> None:
    path = script(
        "import bpy\nif bpy.app.background:\n    import time\n    time.sleep(600)\n"
        "bpy.app.timers.register(lambda: 0.1)\n"
    )
    other = OtherLauncher(path, blender=blender.argument)
    eventually(lambda: reports(other.directory, "running"))
    other.process.kill()
    other.process.communicate()
    eventually(lambda: not any(map(is_alive, other.pids)), "the instances' death")
    assert other.directory.rpartition("-")[2] in sweep().removed
    assert other.is_gone()
