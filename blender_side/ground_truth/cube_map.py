"""Passes of panoramic cameras: the six sides of a cube around the camera are drawn, and each pixel looks up what it shows.

Of depths, the plane of the triangle there is looked up, so that they are of the pixel's own middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..panorama import Panorama

if TYPE_CHECKING:
    from .draw import Rasterizer, View
    from .scene import Drawn

_FINER = 4
"""How many pixels of a side, in its middle, are one of the image at least: what is seen is looked up to an eighth of a pixel."""
_LARGEST = 4096
_DISTANCES = ("depth", "distance")
_SLOPE = 0.5
"""Of a distance: how much it may change within an eighth of a pixel, and still be of the same plane."""

#: Where each side looks, and what is up there, in camera coordinates.
_SIDES = (
    ((0, 0, -1), (0, 1, 0)),
    ((1, 0, 0), (0, 1, 0)),
    ((0, 0, 1), (0, 1, 0)),
    ((-1, 0, 0), (0, 1, 0)),
    ((0, 1, 0), (0, 0, 1)),
    ((0, -1, 0), (0, 0, -1)),
)


def side_projection(clip_range: tuple[float, float]) -> NDArray[np.float64]:
    """The projection of each side: 90 degrees. It begins where a corner is as far away as the clip range begins."""
    near, far = clip_range[0] / np.sqrt(3), clip_range[1]
    a, b = (near + far) / (near - far), 2 * near * far / (near - far)
    return np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, a, b], [0, 0, -1, 0]], np.float64)


def draw(
    rasterizer: Rasterizer,
    arrays: Mapping[str, NDArray[Any]],
    things: Sequence[Drawn],
    view: View,
    panorama: Panorama,
    backgrounds: Mapping[str, float],
) -> None:
    """Fill arrays as `Rasterizer.draw` does, except flow. ``depth`` is the distance from the camera, as in Cycles' depth pass.

    Args:
        rasterizer: that draws the sides.
        arrays: what to fill, by the names of attachments.
        things: what to draw.
        view: as seen from where.
        panorama: where the image shows what.
        backgrounds: what arrays hold where nothing is.
    """
    size, sides = _lookup(panorama, view.shape)
    pixels: dict[str, tuple[tuple[int, ...], Any]] = {"plane": ((4,), np.float32), "distance": ((), np.float32)}
    pixels |= {name: (array.shape[2:], array.dtype) for name, array in arrays.items() if name not in _DISTANCES}
    for name, array in arrays.items():
        array.fill(backgrounds[name])
    for side in sides:
        to_side = np.eye(4)
        to_side[:3, :3] = side.turn
        seen = {name: np.empty((size, size, *shape), dtype) for name, (shape, dtype) in pixels.items()}
        rasterizer.draw(seen, things, view.of_side(to_side, size), [None] * len(things))
        near = seen["distance"][side.rows, side.columns]
        found = near <= view.clip_range[1]
        for name, array in arrays.items():
            if name in _DISTANCES:
                values = _along(side.rays, seen["plane"][side.rows, side.columns], near)[found]
            else:
                values = seen[name][side.rows, side.columns][found]
            if name == "normals":
                values = values @ side.turn.astype(np.float32)
            array.reshape(-1, *array.shape[2:])[side.pixels[found]] = values


def _along(rays: NDArray[np.float64], planes: NDArray[np.float32], near: NDArray[np.float32]) -> NDArray[np.float64]:
    """How far away planes (N, 4) are along rays (N, 3), near to distances that were found beside them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = planes[:, 3] / (planes[:, :3] * rays).sum(axis=1)
        return np.where(np.abs(distances - near) <= _SLOPE * near, distances, near)


class _Side(NamedTuple):
    """A side of the cube, and N pixels that show something of it.

    Attributes:
        turn: (3, 3) rotation from camera coordinates to the side's own.
        pixels: (N,) which of the image, counted row by row.
        rows: (N,) of the side, where they look.
        columns: (N,) likewise.
        rays: (N, 3) unit vectors, where exactly they look, in the side's coordinates.
    """

    turn: NDArray[np.float64]
    pixels: NDArray[np.intp]
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    rays: NDArray[np.float64]


@lru_cache(maxsize=4)
def _lookup(panorama: Panorama, shape: tuple[int, int]) -> tuple[int, list[_Side]]:
    """The size of the sides, and those that are seen."""
    height, width = shape
    y, x = np.mgrid[:height, :width] + 0.5
    directions = panorama.directions(np.stack([x / width, 1 - y / height], axis=-1)).reshape(-1, 3)
    size = min(ceil(2 * _FINER / panorama.finest(shape)), _LARGEST)
    nearest = np.argmax(np.nan_to_num(directions @ np.array([look for look, _ in _SIDES]).T, nan=-1.0), axis=1)
    sides = []
    for i, (look, up) in enumerate(np.array(_SIDES, np.float64)):
        turn = np.stack([np.cross(look, up), up, -look])
        pixels = np.flatnonzero((nearest == i) & np.isfinite(directions[:, 0]))
        if not len(pixels):
            continue
        rays = directions[pixels] @ turn.T
        across, upwards, backwards = rays.T
        columns = ((across / -backwards + 1) / 2 * size).astype(np.intp).clip(0, size - 1)
        rows = ((1 - upwards / -backwards) / 2 * size).astype(np.intp).clip(0, size - 1)
        sides.append(_Side(turn, pixels, rows, columns, rays))
    return size, sides
