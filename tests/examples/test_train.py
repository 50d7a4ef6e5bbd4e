"""examples/train as its users run it, but briefly."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "examples" / "train" / "train.py"


def train(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TRAIN, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.timeout(300)
def test_it_learns_and_says_who_waited_and_how_far_off_it_is(a_blender: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an example's needs: pip install '.[examples]'")
    batches = ("--items", 1201, "--validation-items", 60, "--batch-size", 8)  # the last one is not full
    done = train(*batches, "--blender", a_blender.argument, "--out", tmp_path)
    assert done.returncode == 0, done.stderr

    assert "Trained with 1201 pictures in " in done.stdout
    waits = re.search(r"waited for data for (.+)% of the time, the instances for room for (.+)%, (.+)%\.", done.stdout)
    assert waits is not None, done.stdout
    assert all(0 <= float(percent) <= 100 for percent in waits.groups())
    errors = re.search(
        r"In 60 pictures .+ are (.+) pixels off on average \(median (.+), .+ below (.+)\)\. .+ would be (.+) off\.",
        done.stdout,
    )
    assert errors is not None, done.stdout
    mean, median, most, blind = map(float, errors.groups())
    assert 0 < median <= most
    # One that learnt nothing, or where the corners are on average, is no better than that; this one gets to 0.8 of it.
    assert 0 < mean < 0.9 * blind

    for name in ("loss_curve.png", "predictions.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    weights = torch.load(tmp_path / "network.pt", weights_only=True)
    assert weights["features.1.num_batches_tracked"] == 151


def test_a_device_that_torch_does_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="an example's needs: pip install '.[examples]'")
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "abacus"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(TRAIN), run_name="__main__")
    assert exit.value.code == 2
    assert "abacus" in capsys.readouterr().err
