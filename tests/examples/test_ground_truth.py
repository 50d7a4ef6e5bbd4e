"""The example runs, and its boxes and keypoints are where the picture has them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_an_item_with_all_passes_arrives_and_is_shown(a_blender: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an example's needs: pip install '.[examples]'")
    shutil.copytree(ROOT / "examples" / "ground_truth", tmp_path / "ground_truth", ignore=shutil.ignore_patterns("tmp"))
    (tmp_path / "datagen").symlink_to(ROOT / "examples" / "datagen")
    done = subprocess.run(
        [
            sys.executable,
            tmp_path / "ground_truth" / "ground_truth.py",
            "--items",
            "3",
            "--blender",
            a_blender.argument,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    fields = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if len(line.split(maxsplit=1)) == 2)
    assert fields["depth"] == "(480, 640) float32"
    assert fields["flow_backward"] == "(480, 640, 2) float32"
    assert fields["boxes_3d"] == "(7, 8, 3) float32"
    assert fields["keypoints"] == "(48, 3) float32"
    assert fields["frameid"] == "10"
    plot = np.asarray(Image.open(tmp_path / "ground_truth" / "tmp" / "ground_truth.png").convert("RGB"))
    red = (plot == [255, 0, 0]).all(-1)  # occluded keypoints: each cube hides at least one of its own corners
    assert red.sum() > 5
    assert red[:, plot.shape[1] // 4 :].sum() == 0  # in the first panel only
