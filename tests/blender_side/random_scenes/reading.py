"""Reads what Blender's final renders wrote."""

from __future__ import annotations

import numpy as np
import OpenEXR
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]


def light(path: str, layer: str) -> Array:
    """(H, W, 4) scene-linear light, multiplied by alpha."""
    channels = _channels(path, layer)
    return np.stack([channels[f"Combined.{name}"] for name in "RGBA"], axis=-1)


def colors(path: str) -> NDArray[np.uint8]:
    """(H, W, 4) display colours, not multiplied by alpha."""
    return np.asarray(Image.open(path).convert("RGBA"))


def rasters(path: str, layer: str) -> dict[str, Array]:
    """What is seen in the middle of each pixel: number (0: nothing), depth, normal, position, place of the object's origin."""
    channels = _channels(path, layer)
    index = "Object Index" if "Object Index.X" in channels else "IndexOB"
    shown = channels["Combined.A"] > 0.5
    return {
        "number": np.where(shown, channels[f"{index}.X"], 0).round().astype(np.int64),
        "depth": np.where(shown, channels["Depth.Z"], np.inf),
        "normal": np.stack([channels[f"Normal.{name}"] for name in "XYZ"], axis=-1),
        "position": np.stack([channels[f"Position.{name}"] for name in "XYZ"], axis=-1),
        "place": np.stack([channels[f"Place.{name}"] for name in "RGB"], axis=-1),
    }


def coverage(path: str, layer: str) -> Array:
    """How much of each pixel shows something. Alpha is 1 beside a fisheye's circle, too, but there is no light."""
    return _channels(path, layer)["Combined.R"]


def _channels(path: str, layer: str) -> dict[str, Array]:
    found = {}
    for part in OpenEXR.File(path, separate_channels=True).parts:
        for name, channel in part.channels.items():
            if name.startswith(f"{layer}."):
                found[name.removeprefix(f"{layer}.")] = channel.pixels
    return found
