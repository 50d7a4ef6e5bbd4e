"""Find out with which parameters pictures were made, from the pictures alone, by steering Blender.

    python densityopt.py               # two Blenders render, this process learns; saves what it drew in tmp/

Blender renders supershapes. Their two numbers of lobes are drawn from distributions, and others, the target distributions,
were used for the target pictures. A discriminator learns to tell the simulated pictures from the target ones. What it says of
a picture is the score of the two numbers behind it, and the distributions move to where scores are high. Nothing is
differentiated through Blender.
"""

import argparse
import csv
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import blendtorch.btt as btt

HERE = Path(__file__).parent

NAMES = ("around", "upwards")
"""A supershape has so many lobes around its axis, and so many on the curve from pole to pole and on to the first one."""
EXPONENTS = ((1.0, 4.0, 4.0), (2.0, 4.0, 4.0))
"""n1, n2 and n3 of these two curves, which are the same in all pictures."""

TARGET_BATCHES = 8
WARM_UP = 10
"""Epochs in which only the discriminator learns: its first scores mean nothing."""
REMEMBERED = 6
"""It learns from the simulated pictures of so many epochs,"""
LESSONS = 2
"""so many times per epoch."""
LEARNING_RATE = 0.2
"""Of the distributions, in spreads."""
PRINT_EVERY = 10


class LogNormals:
    """Two independent log-normal distributions, of the numbers of lobes.

    A spread of 0.1 means that two thirds of the numbers are less than about 10 % away from the median.

    Args:
        medians: two, above 0.
        spreads: two, above 0: the standard deviations of the logarithms.
    """

    def __init__(self, medians: Sequence[float], spreads: Sequence[float]) -> None:
        self.medians = torch.tensor(medians)
        self.spreads = torch.tensor(spreads)

    def __str__(self) -> str:
        return "  ".join(f"{median:5.2f} ± {spread:4.0%}" for median, spread in zip(*self.state(), strict=True))

    def state(self) -> tuple[list[float], list[float]]:
        """Medians and spreads."""
        return self.medians.tolist(), self.spreads.tolist()

    def sample(self, n: int) -> Tensor:
        """(n, 2): numbers of lobes."""
        return self.medians * torch.exp(self.spreads * torch.randn(n, 2))

    def move(self, lobes: Tensor, scores: Tensor) -> None:
        """Make samples with high scores more likely.

        This is one step along the natural gradient of the expected score. As with any score-function gradient (REINFORCE), it is
        estimated from samples and their scores; the mean score is the baseline. Steps are measured in spreads, so they
        get smaller as the distributions get narrower, and as the scores get alike.

        Args:
            lobes: (n, 2), drawn from these distributions as they are now.
            scores: (n,).
        """
        advantages = ((scores - scores.mean()) / scores.std().clamp(min=1))[:, None]
        z = torch.log(lobes / self.medians) / self.spreads
        self.medians = self.medians * torch.exp(LEARNING_RATE * self.spreads * (advantages * z).mean(dim=0))
        self.spreads = self.spreads * torch.exp(LEARNING_RATE * (advantages * (z**2 - 1)).mean(dim=0) / 2)


TARGET = LogNormals(medians=(6.0, 3.0), spreads=(0.08, 0.08))
"""What is to be found. Training gets pictures only."""
START = LogNormals(medians=(3.5, 5.5), spreads=(0.35, 0.35))


class Simulator:
    """The Blender instances, as a function from numbers of lobes to pictures.

    Each instance renders its share of a request. Pictures arrive in any order, and their `shape_id` says which is which.
    """

    def __init__(self, launch_info: btt.LaunchInfo, batch_size: int) -> None:
        self._channels = [btt.DuplexChannel(address) for address in launch_info.addresses["CTRL"]]
        self._batches = iter(btt.FrameLoader(launch_info.addresses["DATA"], batch_size))

    def request(self, lobes: Tensor) -> None:
        """Ask for the pictures of (batch_size, 2) numbers of lobes. Does not wait for them."""
        curves = [np.column_stack([m, np.tile(n, (len(m), 1))]) for m, n in zip(lobes.T, EXPONENTS, strict=True)]
        params, ids = np.hstack(curves), np.arange(len(lobes))
        for i, channel in enumerate(self._channels):
            mine = slice(i, None, len(self._channels))
            channel.send(shape_params=params[mine], shape_ids=ids[mine])

    def receive(self) -> Tensor:
        """(batch_size, 64, 64, 3) uint8: the pictures that were asked for, in that order."""
        batch = next(self._batches)
        images: Tensor = batch["image"][batch["shape_id"].argsort()]
        return images

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


class Discriminator(nn.Module):
    """From pictures, (n, 64, 64, 3) uint8, to (n,) logits: above 0 where it takes the picture for a target one."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for wider in (8, 16, 32, 64):  # each halves height and width
            layers += [nn.Conv2d(channels, wider, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            channels = wider
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels * 4 * 4, 1))
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.5, 0.99))

    def forward(self, images: Tensor) -> Tensor:
        grey = images.float().mean(dim=-1)[:, None] / 127.5 - 1
        logits: Tensor = self.layers(grey)
        return logits[:, 0]

    def learn(self, targets: Tensor, simulated: Tensor) -> None:
        """Learn to tell these pictures from those."""
        self.train()
        logits = self(torch.cat([targets, simulated]))
        # It is never to be quite sure of a target picture, or there would be no telling which others are more like one.
        labels = torch.cat([torch.full((len(targets),), 0.95), torch.zeros(len(simulated))])
        self.optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
        self.optimizer.step()

    @torch.no_grad()
    def judge(self, images: Tensor) -> Tensor:
        """The logits, when there is nothing to be learned."""
        self.eval()
        logits: Tensor = self(images)
        return logits


class Epoch(NamedTuple):
    """What the distributions were in an epoch."""

    medians: list[float]
    spreads: list[float]
    mistaken: float
    """How probable the discriminator found it, on average, that a simulated picture is a target one."""


class Course(NamedTuple):
    """What the optimisation was like."""

    epochs: list[Epoch]
    targets: Tensor
    before: Tensor
    after: Tensor
    total_s: float


def main() -> None:
    args = parse_args()
    # Torch's threads wait by spinning, at the cost of whoever renders on the same cores.
    torch.set_num_threads(args.threads or max(1, len(os.sched_getaffinity(0)) - args.num_instances))
    torch.manual_seed(args.seed)
    with (
        btt.BlenderLauncher(
            scene="",
            script=HERE / "supershape.blend.py",
            num_instances=args.num_instances,
            named_sockets=["DATA", "CTRL"],
            blender=args.blender,
        ) as launcher,
        closing(Simulator(launcher.launch_info, args.batch_size)) as simulator,
    ):
        course = optimise(simulator, args)
    args.out.mkdir(parents=True, exist_ok=True)
    save(course.epochs, args.out / "history.csv")
    plot_curve(course.epochs).savefig(args.out / "curve.png", dpi=90)
    plot_pictures(course).savefig(args.out / "pictures.png", dpi=90)
    print(f"{len(course.epochs)} epochs took {course.total_s:.0f} s.")
    print(f"Saved history.csv, curve.png and pictures.png in {args.out}")


def optimise(simulator: Simulator, args: argparse.Namespace) -> Course:
    """Move the distributions from `START` until there were enough epochs, or they took long enough."""
    discriminator = Discriminator()
    targets = render_targets(simulator, args.batch_size)
    simulated = LogNormals(*START.state())
    memory: deque[Tensor] = deque(maxlen=REMEMBERED)
    epochs: list[Epoch] = []

    print(f"{'epoch':>6}  {NAMES[0]:>12}  {NAMES[1]:>12}  taken for target pictures")
    start = time.perf_counter()
    while len(epochs) < args.epochs and (time.perf_counter() - start < 60 * args.minutes or not epochs):
        lobes = simulated.sample(args.batch_size)
        simulator.request(lobes)
        for _ in range(LESSONS if memory else 0):  # while Blender renders
            discriminator.learn(some(targets, args.batch_size), some(torch.cat(list(memory)), args.batch_size))
        images = simulator.receive()
        scores = discriminator.judge(images)

        epochs.append(Epoch(*simulated.state(), scores.sigmoid().mean().item()))
        if len(epochs) % PRINT_EVERY == 1:
            print(f"{len(epochs):6}  {simulated}  {epochs[-1].mistaken:24.0%}", flush=True)
        if not memory:
            before = images
        if len(epochs) > WARM_UP:
            simulated.move(lobes, scores)
        memory.append(images)
    total_s = time.perf_counter() - start

    print(f"{'end':>6}  {simulated}\n{'target':>6}  {TARGET}")
    simulator.request(simulated.sample(args.batch_size))
    return Course(epochs, targets, before, simulator.receive(), total_s)


def render_targets(simulator: Simulator, batch_size: int) -> Tensor:
    """The target pictures. In earnest they would be photographs, say."""
    batches = []
    for _ in range(TARGET_BATCHES):
        simulator.request(TARGET.sample(batch_size))
        batches.append(simulator.receive())
    return torch.cat(batches)


def some(images: Tensor, n: int) -> Tensor:
    return images[torch.randint(len(images), (n,))]


def save(epochs: list[Epoch], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = [f"{what}_{name}" for what in ("median", "spread") for name in NAMES]
        writer.writerow(["epoch", *columns, "mistaken"])
        for i, epoch in enumerate(epochs, 1):
            writer.writerow([i, *(f"{x:.6g}" for x in (*epoch.medians, *epoch.spreads, epoch.mistaken))])


def plot_curve(epochs: list[Epoch]) -> Figure:
    figure = Figure(figsize=(7, 5), layout="constrained")
    x = np.arange(1, len(epochs) + 1)
    upper: Axes
    lower: Axes
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for i, (name, color) in enumerate(zip(NAMES, ("tab:blue", "tab:orange"), strict=True)):
        median = np.array([epoch.medians[i] for epoch in epochs])
        factor = np.exp([epoch.spreads[i] for epoch in epochs])
        upper.fill_between(x, median / factor, median * factor, color=color, alpha=0.25, linewidth=0)
        upper.plot(x, median, color=color, label=f"lobes {name}: median, spread")
        medians, spreads = TARGET.state()
        upper.axhline(medians[i], color=color, linestyle="--", linewidth=1, label=f"target, {name}")
        for sign in (-1, 1):
            upper.axhline(medians[i] * np.exp(sign * spreads[i]), color=color, linestyle=":", linewidth=0.8)
    upper.set(ylabel="lobes", xlim=(1, len(epochs)), ylim=(0, 11))
    upper.legend(fontsize=8, ncols=2, loc="upper right")
    lower.plot(x, [100 * epoch.mistaken for epoch in epochs], color="0.3")
    lower.axhline(50, color="0.3", linestyle=":", linewidth=0.8)
    lower.set(xlabel="epoch", ylabel="taken for\ntarget (%)", ylim=(0, 100))
    return figure


def plot_pictures(course: Course, rows: int = 4, columns: int = 4) -> Figure:
    """The first pictures of each kind."""
    figure = Figure(figsize=(9, 3.25), layout="constrained")
    sheets = {"Before": course.before, "After": course.after, "Target": course.targets}
    for axes, (title, images) in zip(figure.subplots(1, 3), sheets.items(), strict=True):
        shown = images[: min(len(images) // columns, rows) * columns]
        _, height, width, channels = shown.shape
        sheet = shown.view(-1, columns, height, width, channels).transpose(1, 2)
        axes.imshow(sheet.reshape(-1, columns * width, channels))
        axes.set_title(title)
        axes.axis("off")
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=at_least(1), default=100, metavar="N", help="requests to Blender (100)")
    parser.add_argument("--minutes", type=float, default=np.inf, help="stop after so many, if that is sooner")
    parser.add_argument("--num-instances", type=at_least(1), default=2, metavar="N", help="Blender processes (2)")
    parser.add_argument("--batch-size", type=at_least(4), default=64, metavar="N", help="pictures in a request (64)")
    parser.add_argument("--threads", type=at_least(1), help="of torch (one for each CPU that the instances leave)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--blender", help="a Blender executable, or a Python that has bpy (whatever is found first)")
    parser.add_argument(
        "--out", type=Path, default=HERE / "tmp", help="folder for what is saved (tmp, beside this file)"
    )
    return parser.parse_args()


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
