"""What each pass of ground truth costs beside a picture: milliseconds at 640x480, beside that of a SOLID draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torch_side import BlenderLauncher, RemoteIterableDataset

SCRIPT = Path(__file__).parent / "ground_truth.py"
SCENE = Path(__file__).parents[1] / "examples" / "datagen" / "falling_cubes.blend"


@pytest.mark.timeout(300)
def test_cost_of_passes(benchmark: Any, a_blender: None, request: pytest.FixtureRequest) -> None:
    """Samples are taken in turn, so that what else the machine does hits all alike. The row's time is that of the whole run."""
    rounds = 5 if request.config.getoption("--short") else 60

    def run() -> dict[str, Any]:
        with BlenderLauncher(SCENE, SCRIPT, 1, ["DATA"], instance_args=[[str(rounds)]], progress=False) as launcher:
            (item,) = RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=1, output="numpy")
            return dict(item)

    item = benchmark.pedantic(run, rounds=1)
    samples = item["samples"]
    assert all(len(taken) == rounds and (taken > 0).all() for taken in samples.values())
    benchmark.extra_info["rows"] = [
        {"table": "ground truth", "x": f"Blender {item['version']}", "way": label, "ms": float(np.median(ms))}
        for label, ms in samples.items()
    ]
