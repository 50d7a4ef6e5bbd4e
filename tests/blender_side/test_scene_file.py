"""Scenes that are not whole, or from another Blender, and what the trainer is told of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from blendtorch_shm.launch.notes import log_path
from torch_side import BlenderLauncher

from .conftest import IN_EACH_BLENDER, Runner

pytestmark = [pytest.mark.timeout(300), IN_EACH_BLENDER]


@pytest.fixture(scope="module")
def scenes(run_script: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    done = run_script("make_scene_files.py", folder)
    assert done.exit_code == 0, done.log
    return folder


def test_a_file_says_which_blender_saved_it_compressed_or_not(scenes: Path) -> None:
    said = json.loads((scenes / "said.json").read_text())
    assert said["plain"] == said["compressed"] == said["here"]
    assert said["text"] is said["none"] is None


def test_what_a_scene_refers_to_and_is_not_there_is_told_once_at_the_launcher(
    scenes: Path, blender: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import bpy\nprint('runs')")
    with BlenderLauncher(scenes / "plain.blend", script, 2, ["DATA"], blender=blender.argument) as launcher:
        assert launcher.wait() == [0, 0]
        twin = launcher.launch_info.addresses["DATA"][0].twin
        log = Path(log_path(twin.directory, 0)).read_text()
    warnings = [line for line in capfd.readouterr().err.splitlines() if "WARNING" in line]
    expected = [("gone.blend", "'Oak'", "'Elm'"), ("'wood'", "textures/wood.png")]
    if json.loads((scenes / "said.json").read_text())["knows what is missing"]:
        expected.append(("changed.blend", "'Ash'"))
    assert len(warnings) == len(expected)
    for names in expected:
        (warning,) = (line for line in warnings if all(name in line for name in names))
        assert str(scenes / "plain.blend") in warning
        assert warning.removeprefix("blendtorch: ") in log
    assert "'Fir'" not in "".join(warnings)


def test_a_file_of_a_newer_blender_is_told_with_both_versions(
    scenes: Path, blender: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether this one opens it or not."""
    script = tmp_path / "script.py"
    script.write_text("import bpy\nprint('runs')")
    plain = (scenes / "plain.blend").read_bytes()
    newer = tmp_path / "newer.blend"
    newer.write_bytes(re.sub(rb"^(BLENDER(?:..-..v|.v))(..)", rb"\g<1>99", plain, count=1))
    with BlenderLauncher(newer, script, 1, ["DATA"], blender=blender.argument) as launcher:
        launcher.wait()
        twin = launcher.launch_info.addresses["DATA"][0].twin
        log = Path(log_path(twin.directory, 0)).read_text()
    here = ".".join(map(str, blender.version[:2]))
    (told,) = (line for line in log.splitlines() if "saved by Blender" in line)
    assert str(newer) in told
    assert f"Blender {here}" in told
    assert re.search(r"saved by Blender (99|9)\.", told)
    assert "blender=" in told
