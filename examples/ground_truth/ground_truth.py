"""A Blender instance publishes pictures with ground truth; this receives some, checks K, and shows one with all its labels."""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

import blendtorch.btt as btt

HERE = Path(__file__).parent
SCENE = HERE.parent / "datagen" / "falling_cubes.blend"
PLOT = HERE / "tmp" / "ground_truth.png"
EDGES = [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7)]
"""Of a box, between its corners."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=6, help="how many to receive; the last is shown (default: 6)")
    parser.add_argument("--blender", help="a Blender executable, or a Python that has bpy; default: whatever is found")
    options = parser.parse_args()
    with btt.BlenderLauncher(
        scene=SCENE, script=HERE / "ground_truth.blend.py", named_sockets=["DATA"], blender=options.blender
    ) as launcher:
        dataset = btt.RemoteIterableDataset(
            launcher.launch_info.addresses["DATA"], max_items=options.items, output="numpy"
        )
        *_, item = dataset
    for name, value in item.items():
        print(f"{name:<20}{value.shape} {value.dtype}" if isinstance(value, np.ndarray) else f"{name:<20}{value}"[:120])
    plot(item)
    print(f"The plot: {PLOT}")


def plot(item: dict[str, Any]) -> None:
    """The picture, with boxes and keypoints, and every raster."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(2, 4, figsize=(16, 6.6), layout="constrained")
    depth, flow = item["depth"], item["flow_backward"]
    boxes = item["boxes_3d"] @ item["camera"]["K"].T
    boxes = boxes[..., :2] / boxes[..., 2:]
    is_cube = np.array([item["category_names"][i] == "cube" for i in item["category_ids"]])
    shown = {
        "image, 2D boxes, keypoints": dict(X=item["image"]),
        "3D boxes, projected by K": dict(X=item["image"]),
        "depth (m)": dict(X=np.where(np.isinf(depth), np.nan, depth), cmap="viridis_r"),
        "normals (camera space)": dict(X=(item["normals"] + 1) / 2),
        "instance": dict(X=np.ma.masked_equal(item["instance"], 0), cmap="tab10", interpolation="nearest"),
        "category": dict(X=item["category"], cmap="Set2", interpolation="nearest"),
        "flow to the frame before, x (px)": dict(X=flow[..., 0], cmap="RdBu"),
        "flow to the frame before, y (px)": dict(X=flow[..., 1], cmap="RdBu"),
    }
    for axis, (title, picture) in zip(axes.flat, shown.items(), strict=True):
        drawn = axis.imshow(**picture)
        axis.set_title(title)
        axis.set_axis_off()
        if "px" in title or "(m)" in title:
            figure.colorbar(drawn, ax=axis, shrink=0.8)
        if "px" in title:
            limit = max(np.nanmax(np.abs(picture["X"])), 1e-3)
            drawn.set_clim(-limit, limit)
    height, width, _ = item["image"].shape
    for left, top, right, bottom in item["boxes_2d"][is_cube]:
        axes[0, 0].add_patch(
            plt.Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color="white")
        )
    for x, y, visibility in item["keypoints"]:
        if visibility:
            axes[0, 0].plot(
                x - 0.5, y - 0.5, "o" if visibility == 2 else "x", color="black" if visibility == 2 else "red", ms=4
            )
    for box in boxes[is_cube]:
        for edge in EDGES:
            axes[0, 1].plot(*(box[list(edge)] - 0.5).T, color="black", lw=1)
    for axis in axes[0, :2]:
        axis.set_xlim(-0.5, width - 0.5)
        axis.set_ylim(height - 0.5, -0.5)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=60)
    plt.close(figure)


if __name__ == "__main__":
    main()
