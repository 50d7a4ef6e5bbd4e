"""Real Blender: what publishing costs a render loop, with a consumer that takes the frames on the same two cores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from torch_side import BlenderLauncher, RemoteIterableDataset

from .conftest import Row
from .receivers import ENDLESS

SCRIPT = Path(__file__).parent / "render_loop.py"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("instances", [1, pytest.param(2, marks=pytest.mark.long)])
def test_render_loop(row: Row, a_blender: None, instances: int) -> None:
    """Blocks of frames in turn, so that what else the machine does hits both alike."""
    arguments = ["2", "5"] if row.short else ["40", "10"]
    results = []

    def run() -> None:
        with BlenderLauncher(
            "", SCRIPT, instances, ["DATA"], instance_args=[arguments] * instances, progress=False
        ) as bl:
            for item in RemoteIterableDataset(bl.launch_info.addresses["DATA"], max_items=ENDLESS):
                if "alone" in item:
                    results.append(item)
                    if len(results) == instances:
                        return

    row.benchmark.pedantic(run, rounds=1)
    frames = int(arguments[1])
    alone_s, published_s = (np.concatenate([item[key] for item in results]) / frames for key in ("alone", "published"))
    assert len(alone_s) == len(published_s) == instances * int(arguments[0])
    row.note(
        rows=[
            {
                "table": "real Blender",
                "x": f"{instances} x {results[0]['version']}",
                "way": way,
                "frames_per_s": float(1 / np.median(seconds)),
                "spread": float(np.subtract(*np.percentile(seconds, [75, 25])) / np.median(seconds)),
            }
            for way, seconds in (("render loop alone", alone_s), ("published", published_s))
        ]
    )
