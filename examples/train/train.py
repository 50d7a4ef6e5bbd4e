"""A small network learns to find the corners of a cube, live from Blender instances that render pictures of it.

    python train.py                    # two Blenders render, this process trains; saves what it drew in tmp/

No picture is seen twice: each is rendered, trained with and forgotten. In the end other instances, with other seeds, render
the pictures that the network is tested with.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import blendtorch.btt as btt

HERE = Path(__file__).parent
HEIGHT, WIDTH, CORNERS = 96, 128, 8
EDGES = torch.tensor([(i, i | bit) for bit in (1, 2, 4) for i in range(CORNERS) if not i & bit])
"""Of the cube. Its corners are numbered in binary: a digit for each axis."""


class Network(nn.Module):
    """From pictures, (N, 96, 128, 3) uint8, to where the corners are in them, (N, 8, 2) pixels from the upper left."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for wider in (16, 32, 64, 128, 128):  # each halves height and width
            layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
            channels = wider
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.corners = nn.Sequential(
            nn.Linear(channels * (HEIGHT // 32) * (WIDTH // 32), 256), nn.ReLU(), nn.Linear(256, CORNERS * 2)
        )

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 3, 1, 2).float() / 64 - 1  # most pixels are dark
        xy = self.corners(self.features(x)).view(-1, CORNERS, 2)
        return WIDTH / 4 * xy + xy.new_tensor([WIDTH / 2, HEIGHT / 2])


class Course(NamedTuple):
    """What training was like."""

    errors: list[float]
    """Of each batch, before the network learned from it: mean distance between a corner and its prediction, in pixels."""
    total_s: float
    """From the first batch on."""
    waited_s: float
    """Of these, how long the trainer waited for batches,"""
    stalled_s: list[float]
    """and how long each instance waited for room to publish."""


def main() -> None:
    args = parse_args()
    # Torch's threads wait by spinning, at the cost of whoever renders on the same cores.
    torch.set_num_threads(args.threads or max(1, len(os.sched_getaffinity(0)) - args.instances))
    torch.manual_seed(args.seed)
    network = Network().to(args.device)
    with launch(args, args.seed) as launcher:
        course = train(network, launcher, args)
    print(
        f"Trained with {args.items} pictures in {course.total_s:.0f} s, {args.items / course.total_s:.0f} pictures/s.\n"
        f"The trainer waited for data for {course.waited_s / course.total_s:.1%} of the time, the instances for room for "
        f"{', '.join(f'{stalled_s / course.total_s:.1%}' for stalled_s in course.stalled_s)}."
    )
    with launch(args, args.seed + args.instances) as launcher:
        images, corners, found = validate(network, launcher, args)
    errors = distances(found, corners).mean(dim=1)
    mean, median, most = errors.mean(), errors.median(), errors.quantile(0.95)
    blind = distances(corners.mean(dim=0), corners).mean()  # the best that is possible without a look at the picture
    print(
        f"In {len(errors)} pictures of other instances, corners are {mean:.2f} pixels off on average "
        f"(median {median:.2f}, 95 % of the pictures below {most:.2f}). Their average places would be {blind:.2f} off."
    )
    args.out.mkdir(parents=True, exist_ok=True)
    plot_course(course, args).savefig(args.out / "loss_curve.png", dpi=90)
    plot_predictions(images, corners, found).savefig(args.out / "predictions.png", dpi=90)
    torch.save(network.state_dict(), args.out / "network.pt")
    print(f"Saved loss_curve.png, predictions.png and network.pt in {args.out}")


def launch(args: argparse.Namespace, seed: int) -> btt.BlenderLauncher:
    """Instances that render. The first one's random numbers begin with `seed`, the next one's with one more, and so on."""
    return btt.BlenderLauncher(
        scene=HERE.parent / "datagen" / "cube.blend",
        script=HERE / "train.blend.py",
        num_instances=args.instances,
        named_sockets=["DATA"],
        seed=seed,
        blender=args.blender,
    )


def load(launcher: btt.BlenderLauncher, args: argparse.Namespace, items: int) -> btt.FrameLoader:
    addresses = launcher.launch_info.addresses["DATA"]
    return btt.FrameLoader(addresses, args.batch_size, max_items=items, device=args.device)


def train(network: nn.Module, launcher: btt.BlenderLauncher, args: argparse.Namespace) -> Course:
    loader = load(launcher, args, args.items)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=len(loader))
    errors: list[float] = []
    waited_s = 0.0

    asked = time.perf_counter()
    with tqdm(total=args.items, unit="picture") as progress:
        for batch in loader:
            now = time.perf_counter()
            if errors:
                waited_s += now - asked
            else:
                first, stalled_before = now, stalled(launcher)

            image, xy = batch["image"], batch["xy"]
            predicted = network(image)
            loss = nn.functional.smooth_l1_loss(predicted, xy, beta=3.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

            errors.append(distances(predicted, xy).mean().item())
            progress.set_postfix_str(f"{np.mean(errors[-50:]):.2f} px off", refresh=False)
            progress.update(len(image))
            asked = time.perf_counter()
    stalled_s = [after - before for before, after in zip(stalled_before, stalled(launcher), strict=True)]
    return Course(errors, asked - first, waited_s, stalled_s)


def stalled(launcher: btt.BlenderLauncher) -> list[float]:
    """For how many seconds each instance has waited for room so far."""
    return [stream.stalled_s for stream in launcher.stats()["DATA"]]


def distances(predicted: Tensor, xy: Tensor) -> Tensor:
    """(N, 8): of each corner from its prediction, in pixels."""
    return (predicted.detach() - xy).norm(dim=-1)


@torch.no_grad()
def validate(
    network: nn.Module, launcher: btt.BlenderLauncher, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures that were not trained with, the corners in them, and where the network finds those."""
    network.eval()
    results = [
        (batch["image"].cpu(), batch["xy"].cpu(), network(batch["image"]).cpu())
        for batch in load(launcher, args, args.validation_items)
    ]
    images, corners, found = map(torch.cat, zip(*results, strict=True))
    return images, corners, found


def plot_course(course: Course, args: argparse.Namespace) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    seen = np.minimum(np.arange(1, len(course.errors) + 1) * args.batch_size, args.items)
    width = max(1, len(course.errors) // 50)
    smooth = np.convolve(course.errors, np.full(width, 1 / width), "valid")
    axes.plot(seen, course.errors, color="0.8", label="each batch, before it was trained with")
    axes.plot(seen[width - 1 :], smooth, color="tab:blue", label=f"mean of {width} batches")
    axes.set(xlabel="pictures", ylabel="mean distance of corners (pixels)", yscale="log", xlim=(0, args.items))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    return figure


def plot_predictions(images: Tensor, corners: Tensor, found: Tensor) -> Figure:
    """The first pictures, with the true corners as dots, and the cube that the network found as lines."""
    figure = Figure(figsize=(9.6, 6.2), layout="constrained")
    errors = distances(found, corners).mean(dim=1)
    for i, axes in enumerate(figure.subplots(3, 4).flat):
        axes.axis("off")
        if i < len(images):
            axes.imshow(images[i], extent=(0, WIDTH, HEIGHT, 0))
            axes.plot(*found[i][EDGES].permute(2, 1, 0), color="white", linewidth=1.2)
            axes.plot(*corners[i].T, "o", color="black", markeredgecolor="white", markersize=4, markeredgewidth=0.7)
            axes.set_title(f"{errors[i]:.1f} pixels off", fontsize=9)
            axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=at_least(2), default=60_000, metavar="N", help="pictures to train with (60000)")
    parser.add_argument("--validation-items", type=at_least(1), default=1000, metavar="N", help="to test with (1000)")
    parser.add_argument("--instances", type=at_least(1), default=2, metavar="N", help="Blender processes (2)")
    parser.add_argument("--batch-size", type=at_least(2), default=32, metavar="N", help="pictures in a batch (32)")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (0.002)")
    parser.add_argument("--device", type=device, default="cpu", help="where to train, such as cuda (cpu)")
    parser.add_argument("--threads", type=at_least(1), help="of torch (one for each CPU that the instances leave)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--blender", help="a Blender executable, or a Python that has bpy (whatever is found first)")
    parser.add_argument(
        "--out", type=Path, default=HERE / "tmp", help="folder for what is saved (tmp, beside this file)"
    )
    return parser.parse_args()


def device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of torch's: {error}") from error


def at_least(smallest: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text} is less than {smallest}")
        return int(text)

    return integer


if __name__ == "__main__":
    try:
        main()
    except btt.BlendtorchError as error:
        sys.exit(str(error))
