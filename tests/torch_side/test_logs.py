"""What instances print: how long it may be, where it is afterwards, and who is shown it."""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blendtorch_shm.errors import InstanceDied, LaunchError, StreamTimeout
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.launch.notes import instance_reports, log_path, log_tail, previous_log_path
from torch_side.launcher import BlenderLauncher
from torch_side.launching.config import LaunchConfig
from torch_side.launching.logs import Logs, shorten

from .conftest import eventually

STAY = "\nimport time\ntime.sleep(600)\n"
FAIL = "print('before the end')\nraise ValueError('no cube')"
Script = Callable[[str], Path]


def launched(script: Path, num_instances: int = 1, **options: Any) -> BlenderLauncher:
    options = {"blender": "python", "progress": False} | options
    return BlenderLauncher("", script, num_instances, ["DATA"], **options)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where failed launches have their logs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blendtorch-shm" / "logs"


def kept(cache: Path) -> list[str]:
    """Of which instances logs are kept."""
    return sorted(path.name for path in cache.glob("*/*"))


def named_in(error: BaseException | str) -> Path:
    found = re.search(r"/\S+?instance-\d\d\.log(?=[\s:.(])", f"{error} ")
    assert found is not None, error
    return Path(found[0])


# -- afterwards --------------------------------------------------------------------------------------------------------


def test_the_log_that_an_error_names_is_there_after_the_launch(script: Script, cache: Path) -> None:
    with launched(script(FAIL)) as launcher:
        launcher.wait()
        with pytest.raises(InstanceDied) as caught:
            launcher.assert_alive()
        named = named_in(caught.value)
        assert "no cube" in named.read_text()
    assert named.read_text().startswith("before the end\nTraceback")
    assert named.is_relative_to(cache)
    assert stat.S_IMODE(named.stat().st_mode) == 0o600
    assert stat.S_IMODE(named.parent.stat().st_mode) == 0o700


def test_the_log_of_an_instance_that_was_started_again_has_all_its_runs(script: Script, cache: Path) -> None:
    with launched(script(FAIL), restart="on-failure", max_restarts=1) as launcher:
        launcher.wait()
    assert next(cache.glob("*/*")).read_text().count("ValueError: no cube") == 2


def test_nothing_is_kept_of_launches_that_end_well_or_are_ended(script: Script, cache: Path) -> None:
    with launched(script("print('done')")) as launcher:
        launcher.wait()
    with launched(script("print('ready', flush=True)" + STAY)):
        pass
    with pytest.raises(KeyboardInterrupt), launched(script(STAY)):
        raise KeyboardInterrupt
    assert not cache.exists()


def test_where_waiting_ended_in_an_error_all_logs_are_kept(
    script: Script, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of instances that hang, say."""
    with (
        pytest.raises(StreamTimeout),
        launched(script("print('ready', flush=True)" + STAY), 2, progress=True) as launcher,
    ):
        directory = launcher.launch_info.addresses["DATA"][0].twin.directory
        eventually(lambda: all(report.log_tail for report in instance_reports(directory)))
        raise StreamTimeout("nothing")
    assert kept(cache) == ["instance-00.log", "instance-01.log"]
    named = named_in(next(line for line in capfd.readouterr().err.splitlines() if str(cache) in line))
    assert named.read_text() == "ready\n"


def logs_in(directory: LaunchDirectory, show: Callable[[str], None] = print, **options: Any) -> Logs:
    arguments = {"scene": "", "script": __file__, **options}
    return Logs(directory, LaunchConfig.from_arguments(arguments), show)


@pytest.fixture
def directory() -> Any:
    directory = LaunchDirectory()
    try:
        yield directory.create()
    finally:
        directory.remove()


def test_the_last_five_launches_are_kept_and_what_else_is_there(
    directory: LaunchDirectory, cache: Path, tmp_path: Path
) -> None:
    folders = [cache / f"2024010{day}-120000-{day:08x}" for day in range(1, 8)]
    for folder in folders:
        folder.mkdir(parents=True)
    (cache / "mine").mkdir()
    Path(log_path(directory.path, 0)).write_text("now")
    kept_at = Path(logs_in(directory).keep(0))
    assert kept_at.read_text() == "now"
    assert set(cache.iterdir()) == {*folders[-4:], kept_at.parent, cache / "mine"}


def test_the_end_of_a_long_log_is_kept(directory: LaunchDirectory, cache: Path) -> None:
    text = "".join(f"{i:09d}\n" for i in range(10**6))
    path = log_path(directory.path, 0)
    Path(previous_log_path(path)).write_text(text[: len(text) // 2])
    Path(path).write_text(text[len(text) // 2 :])
    assert Path(logs_in(directory).keep(0)).read_text() == text[-5 * 10**6 :]


def test_where_nothing_can_be_kept_the_error_is_the_one_that_there_was(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with launched(script(FAIL)) as launcher:
        assert launcher.wait() == [1]
        with pytest.raises(InstanceDied, match=r"(?s)ValueError: no cube") as caught:
            launcher.assert_alive()
        assert named_in(caught.value).exists()
        assert f"{tmp_path}/file" in str(caught.value)


# -- where the user wants them -----------------------------------------------------------------------------------------


def test_logs_lie_where_the_user_wants_them_and_stay_there(script: Script, cache: Path, tmp_path: Path) -> None:
    path = script("print('hello')\nimport sys\nsys.exit(int(sys.argv[sys.argv.index('-btid') + 1]))")
    for _ in range(2):
        with launched(path, 2, log_dir=tmp_path / "my" / "logs") as launcher:
            launcher.wait()
            with pytest.raises(InstanceDied, match="exit code 1") as caught:
                launcher.assert_alive()
            directory = launcher.launch_info.addresses["DATA"][0].twin.directory
            assert [report.log_tail for report in instance_reports(directory)] == ["hello", "hello"]
        assert named_in(str(caught.value).partition("Instance 1")[2]).read_text() == "hello\n"
    found = sorted((tmp_path / "my" / "logs").glob("*/*"))
    assert [log.name for log in found] == ["instance-00.log", "instance-01.log"] * 2
    assert {log.read_text() for log in found} == {"hello\n"}
    assert not cache.exists()


def test_a_folder_for_logs_that_cannot_be_made_is_a_clear_error(script: Script, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=rf"log_dir='{tmp_path}/file'.*Not a directory"):
        launched(script(""), log_dir=tmp_path / "file").__enter__()


# -- how long they may be ----------------------------------------------------------------------------------------------


def test_logs_are_bounded_whatever_prints_and_their_ends_are_there(script: Script) -> None:
    """What an instance starts prints into its log, too, and is not told of anything."""
    path = script(
        "import subprocess, sys\n"
        "subprocess.run(['sh', '-c', 'while [ ! -e go ]; do seq 1000; done; echo child'], cwd=sys.path[0])\n"
        "print('the end')"
    )
    with launched(path, max_log_mb=0.1) as launcher:
        directory = launcher.launch_info.addresses["DATA"][0].twin.directory
        log = log_path(directory, 0)
        previous = Path(previous_log_path(log))
        eventually(previous.exists)
        first = previous.stat().st_mtime_ns
        eventually(lambda: previous.exists() and previous.stat().st_mtime_ns != first)  # and so on
        (path.parent / "go").touch()
        launcher.wait()
        assert previous.stat().st_size <= 100_000
        assert log_tail(directory, 0).splitlines()[-3:] == ["1000", "child", "the end"]


def test_what_is_moved_out_of_a_log_and_what_follows_make_one_tail(directory: LaunchDirectory) -> None:
    path = log_path(directory.path, 0)
    with open(path, "ab", buffering=0) as writer:
        writer.write(b"".join(b"%06d\n" % i for i in range(1000)))
        shorten(path, 700)
        writer.write(b"last\n")
    assert Path(path).read_text() == "last\n"
    assert Path(previous_log_path(path)).stat().st_size == 700
    assert log_tail(directory.path, 0, lines=3).splitlines() == ["000998", "000999", "last"]


def test_a_log_is_shortened_although_there_is_no_room_for_what_is_moved(
    directory: LaunchDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = log_path(directory.path, 0)
    Path(path).write_bytes(b"x" * 1000)
    os.mkdir(previous_log_path(path))  # so that no file can be made
    shorten(path, 500)
    assert os.path.getsize(path) == 0


# -- shown -------------------------------------------------------------------------------------------------------------


def test_what_instances_print_is_shown_with_their_numbers(script: Script, capfd: pytest.CaptureFixture[str]) -> None:
    path = script("import sys\nprint('out')\nprint('err', file=sys.stderr)\nprint('no end', end='')")
    with launched(path, 2, follow=True) as launcher:
        launcher.wait()
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines) == sorted(f"[{btid}] {text}" for btid in range(2) for text in ("out", "err", "no end"))
    with launched(path, follow=True) as launcher:
        launcher.wait()
    assert capfd.readouterr().err.splitlines() == ["out", "err", "no end"]


def test_what_is_shown_is_shown_once_also_where_the_log_is_shortened(directory: LaunchDirectory) -> None:
    shown: list[str] = []
    logs = logs_in(directory, shown.append, follow=True, max_log_mb=0.001)
    fd = logs.open(0)
    printed = [f"{i} {'x' * 50}" for i in range(100)]
    for line in printed:
        os.write(fd, line[:20].encode())
        logs.look(0)
        os.write(fd, f"{line[20:]}\n".encode())
        logs.look(0)
    os.close(fd)
    assert os.path.exists(previous_log_path(log_path(directory.path, 0)))
    assert shown == printed


def test_a_flood_is_left_out_and_its_end_is_shown(directory: LaunchDirectory) -> None:
    shown: list[str] = []
    logs = logs_in(directory, shown.append, follow=True)
    Path(log_path(directory.path, 0)).write_text("x\n" * 10**6 + "the end\n")
    logs.look(0)
    assert re.search(r"19\d{5} bytes", shown[0])
    assert shown[-1] == "the end"
    assert len(shown) < 10**5


def test_a_failure_that_was_shown_is_told_without_showing_it_again(
    script: Script, cache: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with launched(script(FAIL), follow=True) as launcher:
        launcher.wait()
        with pytest.raises(InstanceDied, match="no cube"):
            launcher.assert_alive()
    assert capfd.readouterr().err.count("no cube\n") == 1
    (told,) = caplog.messages
    assert "Instance 0 ended" in told
    assert "no cube" not in told
    assert named_in(told).exists()


def test_the_command_shows_what_instances_print_if_asked_to(script: Script, tmp_path: Path) -> None:
    path = script("print('hello from the script')")
    (tmp_path / "launch.json").write_text(f'{{"scene": "", "script": "{path}", "blender": "python"}}')
    command = [sys.executable, "-m", "torch_side.apps.launch", "launch.json"]
    root = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for options, count in ([], 0), (["--follow"], 1):
        done = subprocess.run([*command, *options], cwd=tmp_path, env=root, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.count("hello from the script") == count
