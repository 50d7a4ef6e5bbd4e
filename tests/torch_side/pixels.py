"""What tests of environments share: scripts/pixels.py launched, and what its pictures say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blendtorch_shm.launch.address import Address
from blendtorch_shm.launch.notes import instance_reports
from torch_side import BlenderLauncher

PIXELS = Path(__file__).parent / "scripts" / "pixels.py"
KILLED, STUCK, FAILS, SHAPE, DTYPE, NOTHING = range(1000, 1006)
"""Actions that are faults."""


def launch(instance_args: Sequence[Sequence[str]], **options: Any) -> BlenderLauncher:
    """An instance for each list of arguments."""
    return BlenderLauncher(
        scene="",
        script=PIXELS,
        num_instances=len(instance_args),
        named_sockets=["GYM"],
        instance_args=list(map(list, instance_args)),
        blender="python",
        progress=False,
        **options,
    )


def elsewhere(which: Sequence[Address]) -> list[Address]:
    """The same instances, as a trainer on another host sees them."""
    return [address.elsewhere() for address in which]


def mark(*numbers: int) -> int:
    """What the script makes of (instance, episode, step, action): every element of a picture."""
    return sum(number * factor for number, factor in zip(numbers, (1, 7, 31, 101), strict=True)) % 251


def check(picture: Any, btid: int, episode: int, step: int, action: int) -> None:
    """All of it is of this moment."""
    flat = np.asarray(picture).reshape(-1)
    numbers = (btid, episode, step, action)
    assert flat[:4].tolist() == [number % 256 for number in numbers]
    assert (flat[4:] == mark(*numbers)).all()


def who(picture: Any) -> list[int]:
    """Instance, episode, step and action of a picture."""
    numbers: list[int] = np.asarray(picture).reshape(-1)[:4].tolist()
    check(picture, *numbers)
    return numbers


def pid(launcher: BlenderLauncher, btid: int) -> int:
    """The process of an instance."""
    directory = launcher.launch_info.addresses["GYM"][0].twin.directory
    return next(report.pid for report in instance_reports(directory) if report.btid == btid)
