"""blendtorch-launch: the real program, with real processes of plain Python as instances."""

import fcntl
import importlib
import json
import os
import pty
import re
import runpy
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

import torch_side
from blendtorch_shm.errors import InstanceDied
from blendtorch_shm.launch.info import LaunchInfo
from blendtorch_shm.launch.sweep import sweep
from torch_side.apps import launch

ROOT = Path(__file__).parents[2]
COUNT = ROOT / "tests/scripts/count.py"
PATIENCE_S = 60.0
BTID = "import sys\nbtid = int(sys.argv[sys.argv.index('-btid') + 1])\n"
STAY = "\nimport time\ntime.sleep(600)\n"
"""The end of a script that goes on until it is ended."""


class Program:
    """blendtorch-launch in a process of its own, with its standard error in a file."""

    def __init__(self, folder: Path, *args: object, module: str = "torch_side.apps.launch", **options: Any) -> None:
        self.heard_in = folder / "stderr"
        with self.heard_in.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, args)],
                cwd=options.pop("cwd", folder),
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=stderr,
                **options,
            )

    def heard(self) -> str:
        return self.heard_in.read_text()

    def until(self, holds: Callable[[], Any]) -> None:
        """Wait until a condition holds, while the program runs."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.heard()}"
            assert time.monotonic() < deadline, f"it did not come about within {PATIENCE_S:.0f} s:\n{self.heard()}"
            time.sleep(0.01)

    def until_running(self, num_instances: int = 1) -> None:
        self.until(lambda: self.heard().count("runs its script") == num_instances)

    def ends(self) -> tuple[int, str]:
        """Its exit code and all that it said. It never says a traceback of its own, nor anything on standard output."""
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        assert output == b""
        heard = self.heard()
        assert "apps/launch.py" not in heard
        return self.process.returncode, heard


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start the program with a file of arguments, in the folder of that file."""
    programs = []

    def starts(arguments: object, *args: object, **options: Any) -> Program:
        file = tmp_path / "launch.json"
        file.write_bytes(arguments if isinstance(arguments, bytes) else json.dumps(arguments).encode())
        programs.append(Program(tmp_path, file, *args, **options))
        return programs[-1]

    yield starts
    for program in programs:
        program.process.kill()
        program.process.wait()


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Write a script, and return the arguments that launch it without Blender."""

    def write(text: str, num_instances: int = 1, **others: Any) -> dict[str, Any]:
        (tmp_path / "instance.py").write_text(text)
        return {"scene": "", "script": "instance.py", "num_instances": num_instances, "blender": "python", **others}

    return write


def counting(*args: str, num_instances: int = 2) -> dict[str, Any]:
    return {
        "scene": None,
        "script": str(COUNT),
        "num_instances": num_instances,
        "named_sockets": ["DATA"],
        "instance_args": [list(args)] * num_instances,
        "blender": "python",
    }


# -- launching, and what is written about it ---------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["torch_side.apps.launch", "blendtorch.btt.apps.launch"])
def test_it_launches_tells_how_to_connect_and_ends_with_its_instances(
    start: Callable[..., Program], tmp_path: Path, module: str
) -> None:
    code, heard = start(counting("--stop-after", "3"), module=module).ends()
    assert code == 0
    info = tmp_path / "launch_info.json"
    assert f"the launch information is in {info}" in heard
    for btid in range(2):
        assert f"instance {btid} is done" in heard
    assert all(line.startswith("blendtorch: ") for line in heard.splitlines())
    assert "\x1b" not in heard


def test_the_launch_information_is_enough_to_read_while_the_program_runs(
    start: Callable[..., Program], tmp_path: Path
) -> None:
    program = start(counting(), "--out-launch-info", "here.json")
    info = tmp_path / "here.json"
    program.until(info.exists)
    assert stat.S_IMODE(info.stat().st_mode) == 0o600
    addresses = LaunchInfo.load_json(info).addresses["DATA"]
    assert len(addresses) == 2
    dataset = torch_side.RemoteIterableDataset(addresses, max_items=20, timeoutms=int(PATIENCE_S * 1000))
    for item in dataset:
        assert int(item["image"][0, 0, 0]) == item["value"]
    program.process.send_signal(signal.SIGTERM)
    assert program.ends()[0] == 0
    assert not info.exists()
    assert not (tmp_path / "launch_info.json").exists()


@pytest.mark.parametrize("swept", [False, True])
def test_the_launch_information_of_a_killed_program_is_an_error_at_once(
    start: Callable[..., Program], tmp_path: Path, swept: bool
) -> None:
    program = start(counting())
    info = tmp_path / "launch_info.json"
    program.until(info.exists)
    addresses = LaunchInfo.load_json(info).addresses["DATA"]
    items = iter(torch_side.RemoteIterableDataset(addresses, timeoutms=int(PATIENCE_S * 1000)))
    next(items)
    program.process.kill()
    program.process.wait()
    if swept:  # by a launch with another folder for logs, which leaves those of the dead one
        elsewhere = {"XDG_RUNTIME_DIR": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        program_that_sweeps = "from blendtorch_shm.launch.sweep import sweep; sweep()"
        subprocess.run([sys.executable, "-c", program_that_sweeps], env={**os.environ, **elsewhere}, check=True)
    with pytest.raises(InstanceDied, match=r"[Ii]nstances 0 and 1 ended with their launcher, which was killed"):
        for _ in items:
            pass
    for _ in range(2):  # the second time, nothing of it is left
        with pytest.raises(InstanceDied, match="not running on this host any more"):
            LaunchInfo.load_json(info)
        sweep()


def test_the_launch_information_of_another_launch_stays(
    start: Callable[..., Program], script: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    program = start(script("import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)"))
    info = tmp_path / "launch_info.json"
    program.until(info.exists)
    LaunchInfo.save_json(info, LaunchInfo({}, ["another"]))
    (tmp_path / "go").touch()
    assert program.ends()[0] == 0
    assert LaunchInfo.load_json(info).commands == ["another"]


def test_the_launch_information_replaces_what_a_link_points_to(
    start: Callable[..., Program], script: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "launch_info.json").symlink_to("shared/info.json")
    program = start(script(STAY), "--out-launch-info", "launch_info.json")
    program.until((tmp_path / "shared/info.json").exists)
    assert (tmp_path / "launch_info.json").is_symlink()
    assert LaunchInfo.load_json(tmp_path / "shared/info.json").commands
    program.process.terminate()
    assert program.ends()[0] == 0


def test_a_relative_path_is_looked_for_here_then_beside_the_file(
    start: Callable[..., Program], script: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments = script("print('beside')\nraise SystemExit(3)")
    code, heard = start(arguments, cwd=elsewhere).ends()
    assert (code, "    beside\n" in heard) == (1, True)
    (elsewhere / "instance.py").write_text("print('here')\nraise SystemExit(3)")
    code, heard = start(arguments, cwd=elsewhere).ends()
    assert (code, "    here\n" in heard) == (1, True)


def test_progress_can_be_turned_off(start: Callable[..., Program], script: Callable[..., dict[str, Any]]) -> None:
    assert start(script("", progress=False)).ends() == (0, "")


def test_the_console_script_is_the_program() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert EntryPoint("blendtorch-launch", scripts["blendtorch-launch"], "console_scripts").load() is launch.main


def test_help_explains_every_argument_of_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        launch._parser().parse_args(["--help"])
    told = capsys.readouterr().out
    for name in signature(torch_side.BlenderLauncher).parameters:
        assert f"\n  {name}: " in told


# -- python -m under the name that users know --------------------------------------------------------------------------


def test_the_alias_is_the_same_module_and_runs_with_its_own_file() -> None:
    assert importlib.import_module("blendtorch.btt.apps.launch") is launch
    assert runpy.run_module("blendtorch.btt.utils")["__file__"] == str(ROOT / "torch_side/utils.py")


@pytest.mark.parametrize(
    ("module", "complaint"),
    [("blendtorch.btt.nowhere", "No module named"), ("blendtorch.btt", "No code object available for")],
)
def test_what_cannot_be_run_under_an_alias_is_one_line(tmp_path: Path, module: str, complaint: str) -> None:
    program = Program(tmp_path, module=module)
    code, heard = program.ends()
    assert code == 1
    assert heard.endswith(f"{complaint} {module}\n")
    assert heard.count("\n") == 1


# -- how it ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_it_and_its_instances_and_is_no_failure(
    start: Callable[..., Program], script: Callable[..., dict[str, Any]], number: signal.Signals
) -> None:
    # Also where these tests themselves run under nohup.
    program = start(script(STAY, 2), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    program.until_running(2)
    program.process.send_signal(number)
    code, heard = program.ends()
    assert code == 0
    assert heard.splitlines()[-1] == f"blendtorch: ended on {number.name}, with all instances."


def test_a_background_job_of_a_shell_script_listens_to_sigint_and_one_under_nohup_not_to_sighup(
    start: Callable[..., Program], script: Callable[..., dict[str, Any]]
) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    program = start(script(STAY), preexec_fn=ignore)
    program.until_running()
    program.process.send_signal(signal.SIGHUP)
    program.process.send_signal(signal.SIGINT)
    code, heard = program.ends()
    assert code == 0
    assert "ended on SIGINT" in heard


def test_a_signal_while_it_looks_for_blender_ends_it(start: Callable[..., Program], tmp_path: Path) -> None:
    blender = tmp_path / "blender"
    blender.write_text("#!/bin/sh\ntouch asked\nexec sleep 600\n")
    blender.chmod(0o755)
    program = start({"scene": "", "script": str(COUNT), "blender": str(blender)})
    program.until((tmp_path / "asked").exists)
    program.process.send_signal(signal.SIGINT)
    code, heard = program.ends()
    assert (code, heard) == (0, "blendtorch: ended on SIGINT, with all instances.\n")
    assert not (tmp_path / "launch_info.json").exists()


def test_further_signals_while_it_ends_change_nothing(
    start: Callable[..., Program], script: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    program = start(
        script(
            "import os, signal, sys, time\n"
            "def on_term(*_):\n    open('asked', 'w')\n    while not os.path.exists('go'): time.sleep(0.01)\n    sys.exit(0)\n"
            "signal.signal(signal.SIGTERM, on_term)\nopen('ready', 'w')" + STAY
        )
    )
    program.until((tmp_path / "ready").exists)
    program.process.send_signal(signal.SIGINT)
    program.until((tmp_path / "asked").exists)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        program.process.send_signal(number)
    (tmp_path / "go").touch()
    code, heard = program.ends()
    assert code == 0
    assert heard.splitlines()[-1] == "blendtorch: ended on SIGINT, with all instances."


@pytest.mark.parametrize(
    ("ending", "how"),
    [
        ("raise ValueError('the cube is gone')", "exit code 1"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
    ],
)
def test_an_instance_that_fails_is_named_with_its_log_and_fails_the_program(
    start: Callable[..., Program], script: Callable[..., dict[str, Any]], ending: str, how: str
) -> None:
    text = f"{BTID}if btid == 0: sys.exit(0)\nprint('the end', flush=True)\n{ending}"
    code, heard = start(script(text, 2)).ends()
    assert code == 1
    assert "    the end\n" in heard
    assert heard.splitlines()[-1].startswith(f"blendtorch: instance 1 failed: {how}")
    assert "instance 0 failed" not in heard


# -- what cannot work, and what it is told as --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaints"),
    [
        (b"{'scene': ''}", ["launch.json is not JSON", "line 1"]),
        (b"", ["launch.json is not JSON"]),
        (b"\xff{}", ["launch.json is not JSON", "utf-8"]),
        ([1], ["holds an array", "must hold an object", '"script"']),
        (None, ["holds null"]),
        ({}, ['"scene" is missing', '"script" is missing']),
        ({"script": "a.py"}, ['launch.json: "scene" is missing']),
        ({"num_instance": 2}, ['"num_instance" is not an argument', 'Did you mean "num_instances"?']),
        ({"qqqqqqq": 2}, ['"qqqqqqq" is not an argument', "There are: scene, script, num_instances, "]),
        ({"num_instances": "2"}, ['launch.json: num_instances must be an int from 1 to 9999, not "2".']),
        ({"num_instances": True}, ["num_instances must be an int from 1 to 9999, not true."]),
        ({"num_instances": None}, ["num_instances must be an int from 1 to 9999, not null."]),
        ({"num_instances": 0}, ["num_instances must be an int from 1 to 9999, not 0."]),
        ({"named_sockets": "DATA"}, ['named_sockets must be a list of names, such as ["DATA"], not "DATA".']),
        ({"named_sockets": ["Ä", 1]}, ['such as ["DATA"], not ["Ä", 1] (see named_sockets[1]).']),
        ({"instance_args": ["--x"]}, ["instance_args must be a list with one list of arguments per instance"]),
        ({"env": {"A": 1}}, ["env must be a dict of str to str", 'not {"A": 1}.']),
        ({"background": "yes"}, ['background must be true or false, not "yes".']),
        ({"script": 5}, ["script must be the path of a Python script, not 5."]),
        ({"proto": "ipc"}, ['proto must be "tcp" (on this host, shared memory is used in any case), not "ipc".']),
        (b'{"scene": "", "script": "", "stall_timeout": NaN}', ["stall_timeout must be a positive number"]),
        (b"[" * 100_000, ["launch.json is not JSON"]),
        (
            {"seed": "x", "prot": "tcp"},
            ["launch.json:\n    seed must be", 'not "x".\n    "prot"', 'Did you mean "proto"?'],
        ),
    ],
)
def test_a_file_that_does_not_hold_arguments_is_a_clear_error(
    start: Callable[..., Program], tmp_path: Path, arguments: object, complaints: list[str]
) -> None:
    if isinstance(arguments, dict) and arguments and "script" not in arguments:
        arguments = {"scene": "", "script": str(COUNT), "blender": "python", **arguments}
    code, heard = start(arguments).ends()
    assert code == 2
    assert heard.startswith(f"blendtorch: {tmp_path / 'launch.json'}")
    for complaint in complaints:
        assert complaint in heard
    assert not (tmp_path / "launch_info.json").exists()


@pytest.mark.parametrize("name", ["no.json", "."])
def test_a_file_that_cannot_be_read_is_a_clear_error(tmp_path: Path, name: str) -> None:
    code, heard = Program(tmp_path, name).ends()
    assert code == 2
    assert heard.startswith(f"blendtorch: Cannot read {name}: ")
    assert heard.count("\n") == 1


@pytest.mark.parametrize(
    ("out", "complaint"),
    [
        ("no/info.json", "No such file or directory"),
        ("launch.json/info.json", "Not a directory"),
        (".", "this is not a file"),
        ("/dev/null", "this is not a file"),
        ("launch.json", "this is the file of arguments"),
    ],
)
def test_a_place_that_cannot_be_written_is_an_error_before_anything_is_launched(
    start: Callable[..., Program], script: Callable[..., dict[str, Any]], tmp_path: Path, out: str, complaint: str
) -> None:
    code, heard = start(script("open('launched', 'w')"), "--out-launch-info", out).ends()
    assert code == 2
    assert heard.startswith(f"blendtorch: Cannot write the launch information to {out}: {complaint}")
    assert heard.count("\n") == 1
    assert not (tmp_path / "launched").exists()
    assert json.loads((tmp_path / "launch.json").read_text())["blender"] == "python"


@pytest.mark.parametrize(
    ("wrong", "code", "complaint"),
    [
        ({"script": "no.py"}, 1, r"script 'no\.py' does not exist .* beside .*launch\.json"),
        ({"blender": "/no/blender"}, 1, "/no/blender"),
        ({"scene": "instance.py"}, 2, "needs Blender"),
        ({"bind_addr": "192.0.2.1"}, 2, "bind_addr"),
    ],
)
def test_what_the_launcher_refuses_is_a_clear_error(
    start: Callable[..., Program],
    script: Callable[..., dict[str, Any]],
    wrong: dict[str, Any],
    code: int,
    complaint: str,
) -> None:
    ended, heard = start({**script("", named_sockets=["DATA"]), **wrong}).ends()
    assert ended == code
    assert re.search(f"^blendtorch: .*{complaint}", heard, re.MULTILINE)


def test_wrong_use_of_the_program_is_told_with_its_usage(tmp_path: Path) -> None:
    code, heard = Program(tmp_path).ends()
    assert code == 2
    assert "usage: blendtorch-launch" in heard


# -- on a terminal -----------------------------------------------------------------------------------------------------


class Terminal:
    """The program on a pseudo-terminal of 100 columns."""

    def __init__(self, folder: Path) -> None:
        self.output = ""
        self._fd, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", sys.executable, "-m", "torch_side.apps.launch", "launch.json"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
            stdin=inner,
            stdout=inner,
            stderr=inner,
        )
        os.close(inner)

    def until(self, shown: Callable[[list[str]], Any]) -> None:
        """Read on until the screen shows something."""
        deadline = time.monotonic() + PATIENCE_S
        while not shown(screen := self.screen()):
            assert time.monotonic() < deadline, f"it did not come about within {PATIENCE_S:.0f} s: {screen}"
            assert self._read(), f"it ended: {screen}"

    def ends(self) -> int:
        while self._read():
            pass
        os.close(self._fd)
        return self.process.wait(PATIENCE_S)

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def _read(self) -> bool:
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # nobody has the other end any more
            return False
        self.output += data.decode(errors="replace")
        return bool(data)

    def screen(self) -> list[str]:
        """The lines that a terminal without end would show."""
        lines, row, column = [""], 0, 0
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\r\n\x1b]+", self.output):
            if token == "\r":
                column = 0
            elif token == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif token == "\x1b[1A":
                row -= 1
            elif token == "\x1b[2K":
                lines[row] = ""
            elif token.startswith("\x1b["):
                assert token[-1] == "m" or token in ("\x1b[?25l", "\x1b[?25h"), token
            else:
                line = lines[row].ljust(column)
                lines[row] = line[:column] + token + line[column + len(token) :]
                column += len(token)
        return "\n".join(line.rstrip() for line in lines).rstrip().split("\n")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Terminal]]:
    terminals = []

    def starts(arguments: dict[str, Any]) -> Terminal:
        (tmp_path / "launch.json").write_text(json.dumps(arguments))
        terminals.append(Terminal(tmp_path))
        return terminals[-1]

    yield starts
    for started in terminals:
        started.process.kill()
        started.process.wait()


def rows(screen: list[str]) -> list[str]:
    """The lines about instances, without their ages and the space between columns."""
    found = (re.fullmatch(r" +(\d+) +([a-z]+) +\d:\d\d:\d\d(.*)", line) for line in screen)
    return [" ".join(" ".join(match.groups()).split()) for match in found if match]


def test_a_terminal_shows_one_line_per_instance_redrawn_in_place_below_the_news(
    terminal: Callable[[dict[str, Any]], Terminal], script: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    shown = terminal(
        script(
            f"{BTID}import os, time\nopen(os.environ['BLENDTORCH_INSTANCE'] + '.renderer', 'w').write(f'EEVEE, card {{btid}}')\n"
            "while not os.path.exists(f'go-{btid}'): time.sleep(0.01)\nsys.exit(btid)",
            2,
        )
    )
    shown.until(lambda screen: rows(screen) == [f"{btid} running EEVEE, card {btid}" for btid in range(2)])
    (tmp_path / "go-1").touch()
    shown.until(lambda screen: "1 failed EEVEE, card 1 exit code 1" in rows(screen))
    (tmp_path / "go-0").touch()
    assert shown.ends() == 1
    screen = shown.screen()
    assert rows(screen) == [
        "0 exited EEVEE, card 0 exit code 0",
        "1 failed EEVEE, card 1 exit code 1",
    ]
    assert screen[-1] == "blendtorch: instance 1 failed: exit code 1."
    above = screen[: screen.index(next(line for line in screen if line.startswith("instance   state")))]
    for news in ("the launch information is in", "instance 0 runs its script", "instance 1 renders with EEVEE, card 1"):
        assert sum(news in line for line in above) == 1
    assert not any(re.search(r"\S.*instance +state", line) for line in screen)
    assert shown.output.rindex("\x1b[?25h") > shown.output.rindex("\x1b[?25l")


def test_ctrl_c_clears_the_lines_and_leaves_the_cursor_visible(
    terminal: Callable[[dict[str, Any]], Terminal], script: Callable[..., dict[str, Any]]
) -> None:
    shown = terminal(script(STAY, 2))
    shown.until(lambda screen: rows(screen) == ["0 running -", "1 running -"])
    shown.type(b"\x03")
    assert shown.ends() == 0
    screen = shown.screen()
    assert screen[-1] == "blendtorch: ended on SIGINT, with all instances."
    assert rows(screen) == []
    assert "Traceback" not in shown.output
    assert shown.output.rindex("\x1b[?25h") > shown.output.rindex("\x1b[?25l")


def test_a_terminal_shows_restarts_with_the_exit_before(
    terminal: Callable[[dict[str, Any]], Terminal], script: Callable[..., dict[str, Any]]
) -> None:
    text = "import os\nif not os.path.exists('again'):\n    open('again', 'w')\n    raise SystemExit(3)" + STAY
    shown = terminal(script(text, restart="on-failure"))
    shown.until(lambda screen: rows(screen) == ["0 running - exit code 3, restarted 1 time"])
    shown.type(b"\x03")
    assert shown.ends() == 0
