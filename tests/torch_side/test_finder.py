"""Finding something that runs an instance, and saying clearly when there is nothing."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blendtorch_shm.errors import BlenderNotFound, LaunchError
from torch_side import finder
from torch_side.finder import discover_blender, find_runtime


@pytest.fixture
def no_bpy(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "bpy" else find_spec(name, *args)
    )


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    finder._probe.cache_clear()
    yield
    finder._probe.cache_clear()


def pretend_blender(folder: Path, version: tuple[int, int, int] = (4, 2, 1), broken: bool = False) -> Path:
    """A program that answers the probe as a Blender of that version would."""
    answer = f'{finder._MARK}{{"version": {list(version)}, "python": [3, 11], "missing": ["pyzmq"]}}'
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "blender"
    path.write_text("#!/bin/sh\n" + ("echo no driver >&2; exit 3" if broken else f"echo noise; echo '{answer}'"))
    path.chmod(0o755)
    return path


def test_without_any_blender_the_error_says_what_was_looked_for_and_what_to_do(
    no_bpy: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BlenderNotFound) as caught:
        find_runtime(None, "/opt/no-blender")
    for words in (sys.executable, "PATH", "/opt/no-blender", "bpy", "apt-get install", "blender="):
        assert words in str(caught.value)
    assert discover_blender() is None


def test_blend_path_comes_before_everything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(pretend_blender(tmp_path / "on_path", (3, 6, 0)).parent), prepend=os.pathsep)
    here = pretend_blender(tmp_path / "here")
    runtime = find_runtime(None, [tmp_path / "nothing", here.parent])
    assert (runtime.kind, runtime.path, runtime.version) == ("executable", str(here), (4, 2, 1))
    assert (runtime.python, runtime.missing) == ((3, 11), ("pyzmq",))


def test_the_bpy_module_comes_before_an_executable_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: find_spec("json" if name == "bpy" else name, *args)
    )
    monkeypatch.setenv("PATH", str(pretend_blender(tmp_path).parent), prepend=os.pathsep)
    runtime = find_runtime(None, None)
    assert (runtime.kind, runtime.path) == ("module", sys.executable)


def test_an_executable_on_the_path_is_found_where_there_is_no_module(
    no_bpy: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = pretend_blender(tmp_path)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    assert find_runtime(None, None).path == str(path)
    assert discover_blender() == {"path": path, "major": 4, "minor": 2, "patch": 1, "python": (3, 11)}


@pytest.mark.parametrize(
    "as_what", [str, Path, lambda folder: f"/nowhere:{folder}", lambda folder: ["/nowhere", folder]]
)
def test_discover_blender_takes_paths_in_every_form(tmp_path: Path, as_what: Any) -> None:
    path = pretend_blender(tmp_path)
    found = discover_blender(as_what(tmp_path))
    assert found is not None
    assert found["path"] == path


def test_a_folder_names_the_blender_in_it(tmp_path: Path) -> None:
    assert find_runtime(pretend_blender(tmp_path).parent, None).path == str(tmp_path / "blender")


@pytest.mark.parametrize(
    ("blender", "complaint"),
    [
        ("/no/such/blender", "does not exist"),
        ("no-such-blender", "is not on the PATH"),
        (__file__, "is not an executable file"),
    ],
)
def test_a_name_that_leads_nowhere_is_a_clear_error(blender: str, complaint: str) -> None:
    with pytest.raises(BlenderNotFound, match=complaint):
        find_runtime(blender, None)


def test_a_program_that_does_not_run_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"exit code 3.*no driver"):
        find_runtime(pretend_blender(tmp_path, broken=True), None)
    assert discover_blender(tmp_path) is None


def test_a_program_is_asked_again_once_it_has_changed(tmp_path: Path) -> None:
    path = pretend_blender(tmp_path)
    assert find_runtime(path, None).version == (4, 2, 1)
    pretend_blender(tmp_path, (5, 2, 3))
    os.utime(path, ns=(0, 0))
    assert find_runtime(path, None).version == (5, 2, 3)


def test_python_is_the_running_interpreter_and_needs_no_blender(no_bpy: None) -> None:
    runtime = find_runtime("python", None)
    assert (runtime.kind, runtime.path, runtime.version, runtime.missing) == ("python", sys.executable, (), ())


def test_this_interpreter_by_its_path_needs_bpy(no_bpy: None) -> None:
    with pytest.raises(BlenderNotFound, match=r"has no bpy module.*(pip install|use a Python)"):
        find_runtime(sys.executable, None)


def test_another_interpreter_without_bpy_is_a_clear_error(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    answer = f'{finder._MARK}{{"version": null, "python": [3, 12], "missing": []}}'
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    with pytest.raises(BlenderNotFound, match=r"python3 has no bpy module.*3\.13, 3\.11"):
        find_runtime(python, None)


def test_real_blender_tells_what_it_is(blender: Any) -> None:
    runtime = find_runtime(blender.argument, None)
    assert (runtime.kind, runtime.version) == (blender.form, blender.version)
