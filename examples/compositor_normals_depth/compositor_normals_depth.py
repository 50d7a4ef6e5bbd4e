"""Two Blender instances render random supershapes; this receives their normals and depth, and plots them."""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from torch.utils import data

import blendtorch.btt as btt

HERE = Path(__file__).parent
PLOT = HERE / "tmp" / "normals_depth.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=4, help="how many to plot (default: 4)")
    parser.add_argument("--instances", type=int, default=2, help="how many Blenders (default: 2)")
    parser.add_argument("--blender", help="a Blender executable, or a Python that has bpy; default: whatever is found")
    options = parser.parse_args()

    with btt.BlenderLauncher(
        scene=HERE / "compositor_normals_depth.blend",
        script=HERE / "compositor_normals_depth.blend.py",
        num_instances=options.instances,
        named_sockets=["DATA"],
        blender=options.blender,
    ) as launcher:
        dataset = btt.RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=options.items)
        batch = next(iter(data.DataLoader(dataset, batch_size=options.items)))
    normals, depth = batch["normals"].numpy(), batch["depth"].numpy()
    print(f"Received normals {normals.shape} and depth {depth.shape} from instances {batch['btid'].tolist()}.")
    print(
        f"Normals are {np.linalg.norm(normals, axis=-1).mean():.3f} long, depth goes from {depth.min():.2f} to {depth.max():.2f}."
    )
    plot(normals, depth)
    print(f"The plot: {PLOT}")


def plot(normals: np.ndarray, depth: np.ndarray) -> None:
    """A column for each item: normals (N, H, W, 3) as colours, depth (N, H, W, 1) with a scale."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(2, len(depth), figsize=(3.2 * len(depth), 4.6), squeeze=False, layout="constrained")
    for column, (upper, lower) in enumerate(axes.T):
        upper.imshow((normals[column] + 1) / 2)  # x, y and z from -1 to 1 as red, green and blue
        shown = lower.imshow(depth[column, ..., 0], cmap="viridis_r", vmin=depth.min(), vmax=depth.max())
        for axis in (upper, lower):
            axis.set_axis_off()
    axes[0, 0].set_title("normals, world space", loc="left")
    axes[1, 0].set_title("depth along the optical axis", loc="left")
    figure.colorbar(shown, ax=axes, label="metres")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
