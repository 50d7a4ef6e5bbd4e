"""Panoramic cameras as Cycles has them: from directions to places in the image, and back.

Directions are in camera coordinates: x to the right, y up, the camera looks along -z. Places are fractions of the image's width
and height, from the lower left. Whatever the image's shape, all of it is used: no sensor and no pixel aspect counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError

_MODELS = ("EQUIRECTANGULAR", "FISHEYE_EQUIDISTANT")
_DESCRIBING = ("panorama", "fisheye", "latitude", "longitude", "central_cylindrical")
_STEP = np.radians(1.0)
"""How long parts of edges are that are taken for straight in the image."""


@dataclass(frozen=True)
class Panorama:
    """A projection.

    Attributes:
        model: 'EQUIRECTANGULAR' or 'FISHEYE_EQUIDISTANT'.
        longitudes: least and greatest that the first one shows, in radians, to the right.
        latitudes: likewise, upwards.
        fov: angle that the second one shows, across the image's width and height, in radians.
        shift: of the image's contents, to the left and down, as a fraction of the image.
    """

    model: str
    longitudes: tuple[float, float]
    latitudes: tuple[float, float]
    fov: float
    shift: tuple[float, float]

    @classmethod
    def of(cls, lens: Any) -> Panorama | None:
        """That of a camera's data, or None if it is perspective or orthographic.

        Raises:
            ConfigurationError: it is of another model.
        """
        if lens.type in ("PERSP", "ORTHO"):
            return None
        settings = _settings(lens)
        model = str(settings.panorama_type) if lens.type == "PANO" else str(lens.type)
        if model not in _MODELS:
            raise ConfigurationError(
                f"The camera {lens.name!r} is of the model {model}, of which there are no labels and no projections. There are"
                f" for perspective and orthographic cameras, and for the panoramic models {' and '.join(_MODELS)}."
            )
        return cls(
            model,
            (settings.longitude_min, settings.longitude_max),
            (settings.latitude_min, settings.latitude_max),
            settings.fisheye_fov,
            (lens.shift_x, lens.shift_y),
        )

    @property
    def _period(self) -> float:
        """After how many widths of the image the same is seen again."""
        return 2 * pi / abs(self.longitudes[1] - self.longitudes[0])

    def finest(self, shape: tuple[int, int]) -> float:
        """The least angle that a pixel of an image of this height and width sees from edge to edge, in radians, off the poles."""
        height, width = shape
        if self.model == "FISHEYE_EQUIDISTANT":
            return self.fov / max(shape)
        (west, east), (south, north) = self.longitudes, self.latitudes
        return min(abs(east - west) / width, abs(north - south) / height)

    def place(self, directions: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Where in the image directions are.

        Args:
            directions: (N, 3), of any length.

        Returns:
            (N, 2) places. Outside [0, 1] is not in the image; of a direction that comes again and again the one nearest to the
            image's middle.
        """
        x, y, z = np.asarray(directions, np.float64).T
        if self.model == "FISHEYE_EQUIDISTANT":
            radius = np.arctan2(np.hypot(x, y), -z) / self.fov
            angle = np.arctan2(y, x)
            places = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
            return np.asarray(places + 0.5 - self.shift)
        (west, east), (south, north) = self.longitudes, self.latitudes
        across = (np.arctan2(x, -z) - west) / (east - west) - self.shift[0]
        up = (np.arctan2(y, np.hypot(x, z)) - south) / (north - south) - self.shift[1]
        first = 0.5 - self._period / 2
        return np.stack([(across - first) % self._period + first, up], axis=1)

    def directions(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """What places of the image show: (..., 2) to unit vectors (..., 3); NaN outside a fisheye's circle."""
        across, up = np.moveaxis(places + self.shift, -1, 0)
        if self.model == "FISHEYE_EQUIDISTANT":
            across, up = across - 0.5, up - 0.5
            radius, angle = np.hypot(across, up), np.arctan2(up, across)
            away = np.where(radius <= 0.5, radius * self.fov, np.nan)
            return np.stack([np.sin(away) * np.cos(angle), np.sin(away) * np.sin(angle), -np.cos(away)], axis=-1)
        (west, east), (south, north) = self.longitudes, self.latitudes
        longitude, latitude = west + across * (east - west), south + up * (north - south)
        level = np.cos(latitude)
        return np.stack([level * np.sin(longitude), np.sin(latitude), -level * np.cos(longitude)], axis=-1)

    def shows(self, places: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether places are in the image, and in a fisheye's circle."""
        inside = ((places >= 0) & (places <= 1)).all(axis=1)
        if self.model == "FISHEYE_EQUIDISTANT":
            inside &= np.hypot(*(places + self.shift - 0.5).T) <= 0.5
        return np.asarray(inside)

    def extent(self, xyz: NDArray[np.floating[Any]], triangles: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """The box around the whole of a surface.

        Args:
            xyz: (V, 3) vertices, camera coordinates.
            triangles: (T, 3) indices of vertices.

        Returns:
            (4,): the least place across and up, and the greatest. A surface that goes across the edge at which the image of an
            equirectangular camera meets itself, or over a pole, takes all of the width.
        """
        xyz = np.asarray(xyz, np.float64)
        used = np.unique(triangles)
        edges = np.concatenate([triangles[:, (0, 1)], triangles[:, (1, 2)], triangles[:, (2, 0)]])
        edges = np.unique(np.sort(edges, axis=1), axis=0)
        first, last = xyz[edges[:, 0]], xyz[edges[:, 1]]
        chords = np.stack([self.place(first), self.place(last)])
        crossing = np.abs(chords[0, :, 0] - chords[1, :, 0]) > self._period / 2
        points = [self.place(xyz[used])]
        angles = np.arctan2(np.linalg.norm(np.cross(first, last), axis=1), (first * last).sum(axis=1))
        for i in np.flatnonzero(angles > _STEP):
            t = np.linspace(0, 1, int(angles[i] / _STEP) + 2)[:, None]
            # By angle: what is near to the camera is not a straight way to what is far.
            directions = first[i] / np.linalg.norm(first[i]) * (1 - t) + last[i] / np.linalg.norm(last[i]) * t
            along = self.place(directions)
            crossing[i] = (np.abs(np.diff(along[:, 0])) > self._period / 2).any()
            points.append(along)
        places = np.concatenate(points)
        low, high = places.min(axis=0), places.max(axis=0)
        corners = np.asarray(xyz[triangles], np.float64)
        if self.model == "FISHEYE_EQUIDISTANT":
            if _contains(corners, axis=2, sign=1).any():  # what is right behind is all of the rim
                low, high = np.full(2, 0.5 - pi / self.fov) - self.shift, np.full(2, 0.5 + pi / self.fov) - self.shift
            return np.concatenate([low, high])
        south, north = (self.place(np.array([[0.0, sign, -1e-9]]))[0, 1] for sign in (-1, 1))
        above, below = _contains(corners, axis=1, sign=1).any(), _contains(corners, axis=1, sign=-1).any()
        if crossing.any() or above or below:
            low[0], high[0] = 0.5 - self._period / 2, 0.5 + self._period / 2
        if above:
            high[1] = north
        if below:
            low[1] = south
        return np.concatenate([low, high])


def described(lens: Any) -> dict[str, Any]:
    """All that says what a camera's data show, if it is panoramic, of whatever model."""
    settings = _settings(lens)
    names = [prop.identifier for prop in settings.bl_rna.properties if prop.identifier.startswith(_DESCRIBING)]
    own = ("type", "shift_x", "shift_y", "lens", "clip_start", "clip_end")
    return {name: getattr(settings, name) for name in names} | {name: getattr(lens, name) for name in own}


def _settings(lens: Any) -> Any:
    """Before 5.0 they are properties of Cycles, and Blender does not notice when they change: evaluated copies are late."""
    return lens if hasattr(lens, "panorama_type") else lens.original.cycles


def _contains(corners: NDArray[np.float64], *, axis: int, sign: int) -> NDArray[np.bool_]:
    """Which triangles (T, 3, 3) half of an axis goes through."""
    u, v = (i for i in range(3) if i != axis)
    a, b, c = (corners[:, i] for i in range(3))

    def side(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(p[:, u] * q[:, v] - p[:, v] * q[:, u])

    weights = np.stack([side(b, c), side(c, a), side(a, b)], axis=1)
    inside = (weights >= 0).all(axis=1) | (weights <= 0).all(axis=1)
    total = weights.sum(axis=1)
    height = (weights * corners[:, :, axis]).sum(axis=1)
    return np.asarray(inside & (total != 0) & (sign * height * total > 0))
