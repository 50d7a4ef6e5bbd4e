"""Boxes around what is drawn, and keypoints on it."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import bpy
import numpy as np
from mathutils.bvhtree import BVHTree
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError

from .. import poses
from ..camera import Camera
from ..lifetime import Reference, is_a
from ..utils import IS_UPPER, RAY_TOLERANCE, evaluated_mesh, sight_lines
from .geometry import Geometry
from .scene import Drawn, Row

_VISIBLE, _OCCLUDED = 2, 1  # as in COCO
_DEPTH_TOLERANCE = 1e-4
"""Of a keypoint's depth: how far a surface may be before it and still be taken for its own. Rasters have this precision."""
_AT_ONCE = 2**20  # vertices
_NEVER_IN_A_PICTURE = ("EMPTY", "ARMATURE", "LATTICE", "CAMERA", "LIGHT", "LIGHT_PROBE", "SPEAKER")


def tight_boxes(mask: NDArray[np.integer[Any]], ids: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """Boxes around the pixels that show something.

    Args:
        mask: (H, W) array of numbers, 0: nothing.
        ids: (N,) numbers to look for.

    Returns:
        (N, 4) x and y of the upper-left corner, x and y of the lower-right one, in pixels: of a thing that only the pixel in
        column c and row r shows, c, r, c + 1, r + 1. NaN for what no pixel shows.
    """
    width = mask.shape[1]
    # Everything happens on runs of equal pixels in a row: there are far fewer of them than pixels.
    is_start = np.empty(mask.shape, np.bool_)
    is_start[:, 0] = True
    np.not_equal(mask[:, 1:], mask[:, :-1], out=is_start[:, 1:])
    starts = np.flatnonzero(is_start)
    stops = np.append(starts[1:], mask.size)
    values = mask.reshape(-1)[starts]
    shown = np.flatnonzero(values)
    order = shown[np.argsort(values[shown], kind="stable")]  # by number, and for each number from top to bottom
    values, starts, stops = values[order], starts[order], stops[order]
    firsts = np.flatnonzero(np.diff(values, prepend=0))
    boxes = np.full((len(ids), 4), np.nan, np.float32)
    if not len(firsts):
        return boxes
    rows, columns = np.divmod(starts, width)
    found = np.empty((len(firsts), 4), np.float32)
    found[:, 0] = np.minimum.reduceat(columns, firsts)
    found[:, 1] = rows[firsts]
    found[:, 2] = np.maximum.reduceat(columns + stops - starts, firsts)
    found[:, 3] = rows[np.append(firsts[1:], len(rows)) - 1] + 1
    numbers = values[firsts]
    places = np.minimum(np.searchsorted(numbers, ids), len(numbers) - 1)
    is_shown = numbers[places] == ids
    boxes[is_shown] = found[places[is_shown]]
    return boxes


def full_boxes(rows: Sequence[Row], camera: Camera) -> NDArray[np.float32]:
    """Boxes around the whole of things in the image plane: what others hide and what is outside the image included.

    What is nearer to the camera than its clip range does not count; what is farther away does.

    Args:
        rows: N things.
        camera: that looks at them.

    Returns:
        (N, 4) as in `tight_boxes`. NaN for what is not there, or wholly before the clip range, so also behind the camera.
    """
    height, width = camera.shape
    lower, upper = np.full((len(rows), 2), np.inf), np.full((len(rows), 2), -np.inf)
    (_enclose_in_panorama if camera.panorama else _enclose)(lower, upper, rows, camera)
    boxes = np.full((len(rows), 4), np.nan, np.float32)
    shown = np.isfinite(lower[:, 0])
    (left, bottom), (right, top) = lower[shown].T, upper[shown].T
    boxes[shown] = np.stack([(left + 1) * width, (1 - top) * height, (right + 1) * width, (1 - bottom) * height], 1) / 2
    return boxes


def _enclose(lower: NDArray[np.float64], upper: NDArray[np.float64], rows: Sequence[Row], camera: Camera) -> None:
    """Make boxes in NDC, of which (N, 2) corners are given, reach around things."""
    to_clip = np.array(camera.proj_matrix, np.float64) @ camera.extrinsics("blender")
    for geometry, places, matrices in _by_geometry(rows):
        extent = _extent(geometry)
        at_once = max(1, _AT_ONCE // len(extent.vertices))
        for start in range(0, len(places), at_once):
            some = np.array(places[start : start + at_once])
            clip = _transformed(extent.vertices, to_clip @ matrices[start : start + at_once])
            inside = clip[:, 2] + clip[:, 3] >= 0
            whole = inside.all(axis=1)
            _widen(lower, upper, some[whole], clip[whole])
            for i in np.flatnonzero(~whole & inside.any(axis=1)):
                cut = np.concatenate([clip[i][:, inside[i]], _crossings(clip[i], extent.triangles)], axis=1)
                _widen(lower, upper, some[i : i + 1], cut[None])


def _enclose_in_panorama(
    lower: NDArray[np.float64], upper: NDArray[np.float64], rows: Sequence[Row], camera: Camera
) -> None:
    """As `_enclose`, for panoramic cameras."""
    view, (near, _) = camera.extrinsics("blender"), camera.clip_range
    assert camera.panorama is not None
    for geometry, places, matrices in _by_geometry(rows):
        extent = _extent(geometry)
        for place, matrix in zip(places, matrices, strict=True):
            xyz = _transformed(extent.vertices, (view @ matrix)[None])[0, :3].T
            if (np.linalg.norm(xyz, axis=1) >= near).any():
                low_x, low_y, high_x, high_y = 2 * camera.panorama.extent(xyz, extent.triangles) - 1
                lower[place] = np.minimum(lower[place], (low_x, low_y))
                upper[place] = np.maximum(upper[place], (high_x, high_y))


def _widen(
    lower: NDArray[np.float64], upper: NDArray[np.float64], places: NDArray[np.intp], clip: NDArray[np.float32]
) -> None:
    """Make the boxes at some places reach around points in clip coordinates (N, 4, V)."""
    if len(places):
        ndc = clip[:, :2] / clip[:, 3:]
        np.minimum.at(lower, places, ndc.min(axis=2))
        np.maximum.at(upper, places, ndc.max(axis=2))


def boxes_3d(rows: Sequence[Row], camera: Camera) -> NDArray[np.float32]:
    """Boxes around the surface of each thing, along the axes of its own coordinates.

    Args:
        rows: N things.
        camera: whose coordinates are wanted.

    Returns:
        (N, 8, 3) corners in OpenCV's camera coordinates, in scene units; in the order of `bpy.types.Object.bound_box`, so
        corner 0 is the one with the least x, y, z of the thing's own, and 4, 3, 1 are its neighbours along x, y, z. NaN for what
        is not there.
    """
    to_camera = camera.extrinsics("opencv")
    corners = np.full((len(rows), 8, 3), np.nan, np.float32)
    for geometry, places, matrices in _by_geometry(row for row in rows if row.axes is None):
        extent = _extent(geometry)
        own = np.where(IS_UPPER, extent.upper, extent.lower)
        corners[places] = _transformed(own, to_camera @ matrices)[:, :3].swapaxes(1, 2)
    for box, row in zip(corners, rows, strict=True):
        if row.axes is not None and row.parts:
            to_axes = np.linalg.inv(row.axes)
            xyz = np.concatenate(
                [
                    _transformed(_extent(part.geometry).vertices, (to_axes @ part.matrix_world)[None])[0, :3]
                    for part in row.parts
                ],
                axis=1,
            )
            own = np.where(IS_UPPER, xyz.max(axis=1), xyz.min(axis=1))
            box[:] = _transformed(own.astype(np.float32), (to_camera @ row.axes)[None])[0, :3].T
    return corners


class _Extent(NamedTuple):
    """What a mesh takes up in its own coordinates: the vertices that some face has, since others are not drawn."""

    vertices: NDArray[np.float32]
    triangles: NDArray[np.int64]
    lower: NDArray[np.float32]
    upper: NDArray[np.float32]


_extents: weakref.WeakKeyDictionary[Geometry, _Extent] = weakref.WeakKeyDictionary()


def _extent(geometry: Geometry) -> _Extent:
    known = _extents.get(geometry)
    if known is None:
        used = np.zeros(len(geometry.vertices), np.bool_)
        used[geometry.corners] = True
        places = np.cumsum(used) - 1
        vertices = geometry.vertices if used.all() else geometry.vertices[used]
        triangles = places[geometry.corners[geometry.triangles]]
        known = _extents[geometry] = _Extent(vertices, triangles, vertices.min(axis=0), vertices.max(axis=0))
    return known


def _by_geometry(rows: Iterable[Row]) -> Iterator[tuple[Geometry, list[int], NDArray[np.float64]]]:
    """What is drawn with the same mesh: that, the places of their rows, and their (N, 4, 4) matrices to the world."""
    groups: dict[Geometry, tuple[list[int], list[NDArray[np.float64]]]] = {}
    for place, row in enumerate(rows):
        for part in row.parts:
            places, matrices = groups.setdefault(part.geometry, ([], []))
            places.append(place)
            matrices.append(part.matrix_world)
    for geometry, (places, matrices) in groups.items():
        yield geometry, places, np.array(matrices)


def _transformed(xyz: NDArray[np.float32], matrices: NDArray[np.float64]) -> NDArray[np.float32]:
    """(N, 4, V) homogeneous coordinates; single precision will do once the matrices are one, and is quick on large meshes."""
    m = matrices.astype(np.float32)
    return np.asarray(m[:, :, :3] @ xyz.T + m[:, :, 3:])


def _crossings(clip: NDArray[np.float32], triangles: NDArray[np.int64]) -> NDArray[np.float32]:
    """Where edges of triangles meet the plane at which the clip range begins, in clip coordinates (4, M)."""
    beyond = clip[2] + clip[3]
    ends = np.concatenate([triangles[:, (0, 1)], triangles[:, (1, 2)], triangles[:, (2, 0)]]).T
    first, second = ends[:, (beyond[ends[0]] < 0) != (beyond[ends[1]] < 0)]
    return np.asarray(
        (clip[:, first] * beyond[second] - clip[:, second] * beyond[first]) / (beyond[second] - beyond[first])
    )


class Keypoints:
    """Named points that move with objects.

    Attributes:
        names: of the points, in their order.
    """

    def __init__(self, keypoints: Mapping[str, Any]) -> None:
        """Take points by name. Each is one of

        - ``object``: its origin; for Empties, among others;
        - ``(object, 5)``: vertex 5 of its mesh as evaluated (modifiers and shape keys applied);
        - ``(object, (x, y, z))``: a place in the object's own coordinates;
        - ``(armature, "Bone")``: the head of a bone, as posed.

        Raises:
            ConfigurationError: a point is none of these.
        """
        self.names = list(keypoints)
        self._targets = [_target(name, keypoint) for name, keypoint in keypoints.items()]

    def wanted(self) -> list[poses.Wanted]:
        """What has to be evaluated, whether the picture shows it or not."""
        objects = [(reference.get(), place) for reference, place in self._targets]
        return [
            poses.Wanted(obj, geometry=isinstance(place, int), bone=place if isinstance(place, str) else "")
            for obj, place in objects
            if obj is not None
        ]

    def locate(self, drawn: Sequence[Drawn], shown: Container[str], depsgraph: Any) -> Points:
        """Where the points are now. Within a render, whose pictures are smaller than the camera's: it is asked for later.

        Args:
            drawn: what is drawn; saves reading those meshes anew.
            shown: names of the objects that the picture does not leave out.
            depsgraph: the scene as evaluated.

        Raises:
            ConfigurationError: the mesh of an object has no such vertex any more.
        """
        objects = [reference.get() for reference, _ in self._targets]
        xyz = self._world_coordinates(objects, drawn, depsgraph)
        return Points(xyz, np.array([_is_shown(obj, shown) for obj in objects], np.bool_))

    def _world_coordinates(self, objects: Sequence[Any], drawn: Iterable[Drawn], depsgraph: Any) -> NDArray[np.float64]:
        """(M, 3) array; NaN where the object was deleted."""
        with_vertex = {obj for obj, (_, place) in zip(objects, self._targets, strict=True) if isinstance(place, int)}
        geometries = {
            thing.object: thing.geometry
            for thing in drawn
            if with_vertex and not thing.is_instance and thing.object in with_vertex
        }
        xyz = np.full((len(objects), 3), np.nan)
        for i, (obj, (_, place)) in enumerate(zip(objects, self._targets, strict=True)):
            if obj is None:
                continue
            needs_mesh = isinstance(place, int) and obj not in geometries
            bone = place if isinstance(place, str) else ""
            evaluated = poses.evaluated(obj, depsgraph, geometry=needs_mesh, bone=bone)
            if isinstance(place, int):
                local = _vertex(self.names[i], evaluated, place, geometries.get(obj))
            elif isinstance(place, str):
                local = np.array(evaluated.pose.bones[place].head)
            else:
                local = place
            matrix = np.array(evaluated.matrix_world)
            xyz[i] = matrix[:3, :3] @ local + matrix[:3, 3]
        return xyz


def nothing_before(xyz: NDArray[np.float64], camera: Camera, drawn: Iterable[Drawn]) -> NDArray[np.bool_]:
    """(M,) whether rays from a camera to (M, 3) points in its view, in world coordinates, meet nothing that is drawn before.

    Blender's own `ray_cast` of a scene meets what the viewport shows, whatever picture is meant.
    """
    origins, ways = sight_lines(camera, xyz)
    is_free = np.ones(len(xyz), np.bool_)
    for thing in drawn:
        if np.linalg.matrix_rank(thing.matrix_world) < 4:  # it is flat, and a ray would have to be, too
            continue
        to_thing = np.linalg.inv(thing.matrix_world)
        tree = _tree(thing.geometry)
        for i in np.flatnonzero(is_free):
            origin = to_thing[:3, :3] @ origins[i] + to_thing[:3, 3]
            way = to_thing[:3, :3] @ ways[i]
            length = float(np.linalg.norm(way)) * (1 - RAY_TOLERANCE)
            is_free[i] = length == 0 or tree.ray_cast(origin, way, length)[0] is None
    return is_free


_trees: weakref.WeakKeyDictionary[Geometry, BVHTree] = weakref.WeakKeyDictionary()


def _tree(geometry: Geometry) -> BVHTree:
    known = _trees.get(geometry)
    if known is None:
        triangles = geometry.corners[geometry.triangles].tolist()
        known = _trees[geometry] = BVHTree.FromPolygons(geometry.vertices.tolist(), triangles, all_triangles=True)
    return known


class Points(NamedTuple):
    """Where M keypoints are.

    Attributes:
        xyz: (M, 3) world coordinates; NaN: its object was deleted.
        is_shown: (M,) whether its object is in the picture, or never in one.
    """

    xyz: NDArray[np.float64]
    is_shown: NDArray[np.bool_]


def project(
    points: Points, camera: Camera, drawn: Iterable[Drawn], depth: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Where points are in the image, and whether they are seen.

    A point on or before the first surface in its direction is seen. The raster decides this to about a pixel: next to the
    outline of what hides it, a point may still count as seen. A point inside an object is occluded.

    Args:
        points: M of them.
        camera: that looks.
        drawn: what is drawn.
        depth: (H, W) distances along the viewing direction, inf: nothing there, upper-left origin. None, where there is no
            raster, or none that is exact: rays are cast through what is drawn, which takes some microseconds for each point and
            object.

    Returns:
        (M, 3) x, y in pixels from the upper left, and 2: visible, 1: occluded, 0: outside the image or the clip range, or of
        an object that was deleted or, if it has geometry, is not in the picture; x and y are 0 then, too, as in COCO.
    """
    keypoints = np.zeros((len(points.xyz), 3), np.float32)
    inside = points.is_shown & camera.in_view(points.xyz)
    if not inside.any():
        return keypoints
    ndc, depths = camera.world_to_ndc(points.xyz[inside], return_depth=True)
    pixels = camera.ndc_to_pixel(ndc)
    if depth is None:
        visible = nothing_before(points.xyz[inside], camera, drawn)
    else:
        visible = _visible_in_raster(pixels, depths, depth)
    keypoints[inside, :2] = pixels
    keypoints[inside, 2] = np.where(visible, _VISIBLE, _OCCLUDED)
    return keypoints


def _target(name: str, keypoint: Any) -> tuple[Reference, int | str | NDArray[np.float64]]:
    """The object, and its vertex, bone or place in its coordinates."""
    obj, place = keypoint if is_a(tuple, keypoint) and len(keypoint) == 2 else (keypoint, (0.0, 0.0, 0.0))
    if not is_a(bpy.types.Object, obj):
        raise ConfigurationError(
            f"Keypoint {name!r} is {keypoint!r}: it can be an object, (object, vertex index), (object, (x, y, z)) in the"
            " object's own coordinates, or (armature, bone name)."
        )
    if isinstance(place, str):
        if obj.pose is None or place not in obj.pose.bones:
            raise ConfigurationError(f"Keypoint {name!r}: the object {obj.name!r} has no bone {place!r}.")
        return Reference(obj), place
    if isinstance(place, (int, np.integer)):
        return Reference(obj), int(place)
    try:
        xyz = np.array(place, np.float64)
    except (TypeError, ValueError):
        xyz = np.empty(0)
    if xyz.shape != (3,):
        raise ConfigurationError(
            f"Keypoint {name!r}: on the object {obj.name!r}, {place!r} is neither the index of a vertex nor a bone's name nor"
            " x, y, z."
        )
    return Reference(obj), xyz


def _vertex(name: str, evaluated: Any, index: int, geometry: Geometry | None) -> NDArray[np.float64]:
    if geometry is not None:
        count = len(geometry.vertices)
        if 0 <= index < count:
            return np.asarray(geometry.vertices[index], np.float64)
    else:
        with evaluated_mesh(evaluated) as mesh:
            count = len(mesh.vertices)
            if 0 <= index < count:
                return np.array(mesh.vertices[index].co, np.float64)
    raise ConfigurationError(
        f"Keypoint {name!r}: the object {evaluated.name!r} has {count} vertices as evaluated, and none with index {index}."
    )


def _is_shown(obj: Any, shown: Container[str]) -> bool:
    """Whether an object is in the picture, or is one of those that never are and only say where something is."""
    return obj is not None and (obj.type in _NEVER_IN_A_PICTURE or obj.name_full in shown)


def _visible_in_raster(
    pixels: NDArray[np.float64], depths: NDArray[np.float64], raster: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Whether points are not behind what is drawn in the four pixels whose middles surround them.

    On a plane through the point one of the four is at least as deep as the point, however steep the plane, and where the
    surface ends there, at a corner or an outline, one of them shows something farther away. Only where the surface is
    hollow, as in the corner of a room, all four can be nearer. By how much follows from the pixels around the four: the
    surface falls away from the point to both sides.
    """
    height, width = raster.shape
    first = np.floor(pixels - 0.5).astype(np.int64) - 1
    columns = np.clip(first[:, :1] + np.arange(4), 0, width - 1)
    rows = np.clip(first[:, 1:] + np.arange(4), 0, height - 1)
    around = raster[rows[:, :, None], columns[:, None, :]].astype(np.float64)
    hollowness = _hollowness(around[:, 1:3]) + _hollowness(around[:, :, 1:3].swapaxes(1, 2))
    farthest = around[:, 1:3, 1:3].max(axis=(1, 2))
    return np.asarray(farthest >= depths * (1 - _DEPTH_TOLERANCE) - hollowness)


def _hollowness(lines: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far a surface comes nearer within a pixel to both sides of the middle of lines of four depths: (M, 2, 4) to (M,)."""
    with np.errstate(invalid="ignore"):  # background minus background
        left, right = lines[..., 1] - lines[..., 0], lines[..., 2] - lines[..., 3]
    both = np.minimum(np.nan_to_num(left, nan=0.0, posinf=0.0), np.nan_to_num(right, nan=0.0, posinf=0.0))
    return np.asarray(np.maximum(both, 0.0).max(axis=1))
