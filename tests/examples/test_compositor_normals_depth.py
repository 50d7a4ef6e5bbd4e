"""The example runs with each form of Blender, and its plot shows what its scene, saved by Blender 3.4, holds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "compositor_normals_depth"


def depth_of_the_floor_in_the_uppermost_row() -> float:
    """From where make_compositor_normals_depth.py puts the camera: a plane z = 0, seen from (0, -7.5, 9)."""
    towards = np.array([0, 7.3, -9]) / np.hypot(7.3, 9)
    up = np.array([0, 9, 7.3]) / np.hypot(7.3, 9)
    upwards = (36 / 2 / 40) * (240 / 320) * (119.5 / 120)  # sensor and focal length in mm, the middle of a pixel
    return float(9 / -(towards + upwards * up)[2])


@pytest.mark.timeout(300)
def test_two_instances_deliver_normals_and_depth_that_are_plotted(a_blender: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an example's needs: pip install '.[examples]'")
    for file in EXAMPLE.glob("*.*"):
        shutil.copy(file, tmp_path)
    done = subprocess.run(
        [sys.executable, tmp_path / "compositor_normals_depth.py", "--items", "2", "--blender", a_blender.argument],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "Received normals (2, 240, 320, 3) and depth (2, 240, 320, 1)" in done.stdout
    length, near, far = map(float, re.findall(r"\d+\.\d+", done.stdout.splitlines()[1]))
    assert length == pytest.approx(1, abs=1e-3)
    assert 6 < near < 10
    assert far == pytest.approx(depth_of_the_floor_in_the_uppermost_row(), abs=0.01)
    plot = np.asarray(Image.open(tmp_path / "tmp" / "normals_depth.png").convert("RGB"))
    floor = (plot == [127, 127, 255]).all(-1)  # that is up
    assert 0.02 < floor.mean() < 0.5
    assert len(np.unique(plot.reshape(-1, 3), axis=0)) > 1000
