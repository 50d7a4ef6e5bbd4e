"""What a launcher and its instances tell each other."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.launch.notes import (
    INSTANCE_VARIABLE,
    clear_notes,
    has_note,
    instance_path,
    instance_reports,
    leave_note,
    log_path,
    note_path,
    read_note,
    write_status,
)


@pytest.fixture
def directory() -> Iterator[LaunchDirectory]:
    directory = LaunchDirectory().create()
    yield directory
    directory.remove()


def test_a_report_tells_what_is_known_of_each_instance(directory: LaunchDirectory) -> None:
    path = directory.path
    for btid, state in [(10, "exited"), (2, "running"), (0, "starting")]:
        write_status(path, btid, 4711, state, -11 if state == "exited" else None)  # type: ignore[arg-type]
    Path(log_path(path, 2)).write_text("".join(f"line {i}\n" for i in range(100)))
    Path(note_path(path, 2, "renderer")).write_text("EEVEE on llvmpipe\n")
    first, second, third = instance_reports(path)
    assert [(r.btid, r.state, r.exit_code) for r in (first, second, third)] == [
        (0, "starting", None),
        (2, "running", None),
        (10, "exited", -11),
    ]
    assert second.log_tail.splitlines() == [f"line {i}" for i in range(80, 100)]
    assert second.renderer == "EEVEE on llvmpipe"
    assert (first.log_tail, first.renderer) == ("", "")


def test_what_means_nothing_is_not_in_the_tail_of_a_log(directory: LaunchDirectory) -> None:
    write_status(directory.path, 0, 7, "running", None)
    noise = "EGL Error (0x3009): EGL_BAD_MATCH: Arguments are inconsistent\n"
    Path(log_path(directory.path, 0)).write_text(f"{noise}one\n{noise * 30}libEGL warning: DRI2: nothing\ntwo\n{noise}")
    assert instance_reports(directory.path)[0].log_tail == "one\ntwo"


def test_a_log_of_one_endless_line_is_cut(directory: LaunchDirectory) -> None:
    write_status(directory.path, 0, 4711, "running", None)
    Path(log_path(directory.path, 0)).write_bytes(b"\xff" + b"x" * 1_000_000)
    assert len(instance_reports(directory.path)[0].log_tail) == 8192


def test_there_is_nothing_to_report_once_a_launch_is_over(directory: LaunchDirectory) -> None:
    write_status(directory.path, 0, 4711, "running", None)
    directory.remove()
    assert instance_reports(directory.path) == []


STATUS = {"btid": 0, "pid": 4711, "state": "running", "exit_code": None, "restarts": 0, "kept_log": ""}


@pytest.mark.parametrize(
    "status",
    [
        [],
        {},
        {**STATUS, "state": "well"},
        {**STATUS, "pid": "4711"},
        {**STATUS, "btid": True},
        {**STATUS, "exit_code": []},
        {**STATUS, "kept_log": 1},
        {**STATUS, "lost": "DATA"},
        {**STATUS, "lost": [1]},
        {**STATUS, "more": 1},
    ],
)
def test_a_status_that_is_none_of_ours_is_passed_over(directory: LaunchDirectory, status: Any) -> None:
    path = Path(f"{instance_path(directory.path, 0)}.json")
    path.write_text(json.dumps(STATUS))
    assert [report.pid for report in instance_reports(directory.path)] == [4711]
    path.write_text(json.dumps(status))
    assert instance_reports(directory.path) == []


def test_what_an_instance_notes_its_launcher_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INSTANCE_VARIABLE, instance_path(str(tmp_path), 7))
    assert not has_note(str(tmp_path), 7, "renderer")
    assert read_note(str(tmp_path), 7, "renderer") == ""
    assert leave_note("renderer", "EEVEE on llvmpipe")
    assert leave_note("recycled", "")
    assert read_note(str(tmp_path), 7, "renderer") == "EEVEE on llvmpipe"
    assert has_note(str(tmp_path), 7, "recycled")
    assert not has_note(str(tmp_path), 8, "recycled")
    clear_notes(str(tmp_path), 7)
    assert os.listdir(tmp_path) == []


def test_without_a_launcher_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(INSTANCE_VARIABLE, raising=False)
    assert not leave_note("renderer", "EEVEE on llvmpipe")


def test_notes_need_nothing_but_the_standard_library() -> None:
    program = (
        "import sys\nbefore = set(sys.modules)\nimport blendtorch_shm.launch.notes\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["blendtorch_shm"]
