"""examples/datagen as its users run it, with each form of Blender."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from torch_side import BlenderLauncher, FileDataset

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DATAGEN = ROOT / "examples" / "datagen"


def generate(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DATAGEN / "generate.py", *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.timeout(600)
def test_a_replay_shows_the_same_pictures_as_the_run_that_was_recorded(a_blender: Any, tmp_path: Path) -> None:
    live, replayed, recording = tmp_path / "live", tmp_path / "replayed", tmp_path / "recording"
    common = ("falling_cubes", "--batch-size", 2, "--recording", recording)
    # 5 and 4 items for the two workers: one more batch from the first, and its last one not full
    generating = ("--items", 9, "--instances", 2, "--workers", 2, "--blender", a_blender.argument)
    done = generate(*common, *generating, "--record", "--out", live)
    assert done.returncode == 0, done.stderr
    replayed.mkdir()
    (replayed / "output_99.png").touch()  # of an earlier run
    done = generate(*common, "--workers", 1, "--replay", "--out", replayed)
    assert done.returncode == 0, done.stderr

    assert sorted(pictures(live)) == [f"output_{i:02d}.png" for i in range(5)]
    assert pictures(replayed) == pictures(live)
    assert len(set(pictures(live).values())) == 5
    with Image.open(live / "output_00.png") as picture:
        assert picture.size == (2 * 320, 240)
    with Image.open(live / "output_04.png") as picture:
        assert picture.size == (320, 240)

    items = FileDataset(recording, output="numpy")
    assert len({(item["btid"], item["episode"], item["frameid"]) for item in items}) == 9
    for item in items:
        assert item["xy"].shape == (6 * 8, 2)
        assert item["btid"] in (0, 1)
        assert item["frameid"] % 5 == 0
        assert len(np.unique(item["image"].reshape(-1, 3), axis=0)) > 20  # six cubes, their sides, floor and sky


@pytest.mark.timeout(300)
def test_the_cube_is_generated_too(a_blender: Any, tmp_path: Path) -> None:
    done = generate(
        "cube", "--items", 2, "--instances", 1, "--workers", 0, "--blender", a_blender.argument, "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert list(pictures(tmp_path)) == ["output_00.png"]


def test_cubes_fall_onto_the_floor_and_come_to_rest_otherwise_in_each_episode(blender: Any, tmp_path: Path) -> None:
    out = tmp_path / "corners.json"
    with BlenderLauncher(
        scene=DATAGEN / "falling_cubes.blend",
        script=HERE / "scripts" / "where_cubes_are.py",
        blender=blender.argument,
        background=True,
        instance_args=[[str(DATAGEN / "falling_cubes.blend.py"), str(out)]],
        progress=False,
    ) as launcher:
        assert launcher.wait() == [0]
    corners = np.array(json.loads(out.read_text())).reshape(2, 101, 6, 8, 3)
    lowest = corners[..., 2].min(axis=-1)

    centers = corners.mean(axis=-2)
    assert (lowest[:, 0] > 0.2).all(), "at first no cube touches the floor"
    free_fall = 9.81 * (4 / 24) ** 2 / 2  # for four frames at 24 a second
    np.testing.assert_allclose((centers[:, 0] - centers[:, 4])[..., 2], free_fall, rtol=0.05)
    assert (lowest > -0.05).all(), "none falls through the floor"
    assert (abs(lowest[:, -1]) < 0.002).any(axis=-1).all(), "one at least lies on the floor at the end"
    assert abs(corners[:, -1] - corners[:, -6]).max() < 0.01, "all are at rest at the end"
    edges = np.linalg.norm(corners[:, 0, :, 0] - corners[:, 0, :, 1], axis=-1)
    assert ((edges > 0.5) & (edges < 0.9)).all()
    for frame in (0, -1):
        assert (abs(centers[0, frame] - centers[1, frame]).max(axis=-1) > 0.01).all(), "each episode is another one"


def test_replaying_without_a_recording_says_how_to_make_one(tmp_path: Path) -> None:
    done = generate("falling_cubes", "--replay", "--recording", tmp_path / "none", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert f"no recording {tmp_path / 'none'}_00.tar" in done.stderr
    assert "generate.py falling_cubes --record" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["falling_cubes", "--items", "0"], "--items: 0 is less than 1"),
        (["falling_cubes", "--workers", "many"], "--workers: invalid integer value: 'many'"),
        (["falling_cubes", "--record", "--replay"], "--replay: not allowed with argument --record"),
        (["sphere"], "invalid choice: 'sphere' (choose from"),
    ],
)
def test_arguments_that_cannot_work_are_refused(
    args: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(DATAGEN)
    monkeypatch.setattr(sys, "argv", ["generate.py", *args])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(DATAGEN / "generate.py"))["parse_args"]()
    assert exit.value.code == 2
    assert said in capsys.readouterr().err
