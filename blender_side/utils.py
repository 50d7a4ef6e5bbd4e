"""Coordinates of objects and whether they are seen, places around them, and the viewport that off-screen drawing borrows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import bpy
import numpy as np
from numpy.typing import ArrayLike, NDArray

from blendtorch_shm.errors import ConfigurationError

from . import poses

if TYPE_CHECKING:
    from .camera import Camera

RAY_TOLERANCE = 1e-4
"""What a ray meets within this part of its length before a point is taken for the surface that the point lies on."""
IS_UPPER = np.array([(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1), (1, 1, 0)], np.bool_)
"""Which corners of a box have the greater x, y, z, in the order of `bpy.types.Object.bound_box`."""


def find_first_view3d() -> tuple[Any, Any, Any]:
    """The 3D viewport to draw with: the first of the current screen, else the first of any screen.

    Returns:
        its area, its space (`bpy.types.SpaceView3D`, which holds the shading) and its largest window region.

    Raises:
        ConfigurationError: the file has no 3D viewport in any of its workspaces.
    """
    current = bpy.context.screen
    screens = ([current] if current else []) + list(bpy.data.screens)
    for area in (area for screen in screens for area in screen.areas if area.type == "VIEW_3D"):
        region = max((region for region in area.regions if region.type == "WINDOW"), key=lambda region: region.width)
        return area, area.spaces.active, region
    raise ConfigurationError(
        "This file has no 3D viewport, and off-screen drawing borrows its settings:"
        " save it with a workspace that shows one, such as Layout."
    )


@cache
def type_switches() -> tuple[str, ...]:
    """The names of a 3D viewport's attributes (`bpy.types.SpaceView3D`) that each show or hide a type of objects."""
    names = bpy.types.SpaceView3D.bl_rna.properties.keys()
    return tuple(name for name in names if name.startswith("show_object_viewport_"))


def object_coordinates(*objs: Any, depsgraph: Any = None) -> NDArray[np.float64]:
    """Vertices of objects as evaluated (modifiers and shape keys applied), each in its object's own coordinates.

    Args:
        objs: objects with a mesh, or with something Blender can turn into one (curves, text, metaballs).
        depsgraph: the evaluation to read. None: the viewport's, brought up to date.

    Returns:
        (N, 3) array of all vertices, object after object.
    """
    return np.concatenate([_vertices(poses.evaluated(obj, depsgraph, geometry=True)) for obj in objs])


def world_coordinates(*objs: Any, depsgraph: Any = None) -> NDArray[np.float64]:
    """Like `object_coordinates`, in world coordinates."""
    evaluated = [poses.evaluated(obj, depsgraph, geometry=True) for obj in objs]
    return np.concatenate([_transform(obj.matrix_world, _vertices(obj)) for obj in evaluated])


def bbox_world_coordinates(*objs: Any, depsgraph: Any = None) -> NDArray[np.float64]:
    """Corners of the objects' own, oriented bounding boxes in world coordinates, as evaluated.

    Args:
        objs: objects.
        depsgraph: the evaluation to read. None: the viewport's, brought up to date.

    Returns:
        (8 N, 3) array: eight corners for each of the N objects, in the order of `bpy.types.Object.bound_box`.

    Raises:
        ConfigurationError: an object has no vertices, and so no box, such as an Empty or a lamp.
    """
    evaluated = [poses.evaluated(obj, depsgraph, geometry=True) for obj in objs]
    return np.concatenate([_transform(obj.matrix_world, _bound_box(obj)) for obj in evaluated])


def hom(x: ArrayLike, v: float = 1.0) -> NDArray[Any]:
    """(N, D) coordinates made homogeneous: (N, D + 1), the last one `v`."""
    x = np.atleast_2d(x)
    return np.concatenate([x, np.full((len(x), 1), v, x.dtype)], axis=-1)


def dehom(x: ArrayLike) -> NDArray[Any]:
    """(N, D + 1) homogeneous coordinates divided by the last one: (N, D)."""
    x = np.asarray(x)
    return np.asarray(x[..., :-1] / x[..., -1:])


def random_spherical_loc(
    radius_range: tuple[float, float] | None = None,
    theta_range: tuple[float, float] | None = None,
    phi_range: tuple[float, float] | None = None,
) -> NDArray[np.float64]:
    """A random place around the world's origin, in spherical coordinates that are uniform each in its range.

    Uniform angles are not uniform on the sphere: places gather at the poles. Draws from `numpy.random`, in this order.

    Args:
        radius_range: least and greatest distance from the origin. None: (1, 1).
        theta_range: least and greatest angle from the z axis, in radians. None: (0, pi).
        phi_range: least and greatest angle around the z axis, from the x axis on, in radians. None: (0, 2 pi).

    Returns:
        (3,) array, x, y, z.
    """
    radius = np.random.uniform(*((1, 1) if radius_range is None else radius_range))
    theta = np.random.uniform(*((0, np.pi) if theta_range is None else theta_range))
    phi = np.random.uniform(*((0, 2 * np.pi) if phi_range is None else phi_range))
    return radius * np.array([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)])


def compute_object_visibility(
    obj: Any, cam: Camera, N: int = 25, scene: Any = None, view_layer: Any = None, dist: float | None = None
) -> float:
    """How much of an object a camera sees, estimated with rays to random points of its surface.

    A point counts as seen if it is in the image and the clip range, and no other object stands before it. What an object
    hides of itself counts as seen, so one that nothing else covers has 1, as in blendtorch. Draws from `numpy.random`. Object and
    obstacles are as the viewport evaluates them, also where pictures are final renders.

    Args:
        obj: an object with faces. Without faces, or not shown in the viewport, nothing of it is seen.
        cam: the camera, at the place and with the lens that its matrices have.
        N: number of points, spread evenly over the surface as evaluated.
        scene: where other objects are looked for. None: the current one.
        view_layer: of the scene. None: the current one, or the first of a `scene` that was given.
        dist: points farther away from the camera's centre than this do not count as seen. None: no limit.

    Returns:
        the fraction of seen points, 0 to 1.
    """
    if view_layer is None:
        view_layer = bpy.context.view_layer if scene is None else scene.view_layers[0]
    view_layer.update()
    depsgraph = view_layer.depsgraph
    if not obj.visible_get(view_layer=view_layer):
        return 0.0
    points = _random_surface_points(obj.evaluated_get(depsgraph), N)
    points = points[cam.in_view(points)]
    if dist is not None:
        points = points[np.linalg.norm(_transform(cam.extrinsics("blender"), points), axis=1) <= dist]
    cast = (scene or bpy.context.scene).ray_cast
    num_seen = 0
    for origin, way in zip(*sight_lines(cam, points), strict=True):
        length = float(np.linalg.norm(way)) * (1 - RAY_TOLERANCE)
        num_seen += length == 0 or cast(depsgraph, origin, way, distance=length)[4] in (None, obj)
    return num_seen / N


def sight_lines(cam: Camera, xyz_world: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where a camera's clip range begins on the ways to (N, 3) points in its view, and the rest of these ways; both (N, 3)."""
    view = cam.extrinsics("blender")
    to_world = np.linalg.inv(view)
    xyz = _transform(view, xyz_world)
    near, _ = cam.clip_range
    if cam.panorama is not None:
        start = xyz * (near / np.linalg.norm(xyz, axis=1, keepdims=True))
    else:
        start = xyz * (1, 1, 0) - (0, 0, near) if cam.type == "ORTHO" else xyz * (near / -xyz[:, 2:])
    return _transform(to_world, start), (xyz - start) @ to_world[:3, :3].T


def scene_stats() -> dict[str, tuple[int, int]]:
    """How many data-blocks this file holds of each kind, to see what grows.

    Returns:
        for each collection of `bpy.data` that is not empty, e.g. 'meshes': how many of its data-blocks are used, and how
        many are orphans that nothing uses.
    """
    stats = {}
    for kind in (p.identifier for p in bpy.data.bl_rna.properties if p.type == "COLLECTION"):
        blocks = getattr(bpy.data, kind)
        used = sum(block.users > 0 for block in blocks)
        if len(blocks):
            stats[kind] = (used, len(blocks) - used)
    return stats


@contextmanager
def evaluated_mesh(evaluated: Any) -> Iterator[Any]:
    """The mesh (`bpy.types.Mesh`) that an evaluated object is drawn as; it lasts as long as the context.

    Raises:
        ConfigurationError: objects of this type have no geometry.
    """
    try:
        mesh = evaluated.to_mesh()  # not `data`, which lacks a subdivision that is left to the GPU
    except RuntimeError as error:
        raise ConfigurationError(
            f"The object {evaluated.name!r} ({evaluated.type}) has no vertices and faces."
        ) from error
    try:
        yield mesh
    finally:
        evaluated.to_mesh_clear()


def _vertices(evaluated: Any) -> NDArray[np.float64]:
    with evaluated_mesh(evaluated) as mesh:
        coordinates = np.empty(3 * len(mesh.vertices), np.float32)
        mesh.vertices.foreach_get("co", coordinates)
    return coordinates.reshape(-1, 3).astype(np.float64)


def _bound_box(evaluated: Any) -> NDArray[np.float64]:
    """(8, 3) corners in the object's coordinates. A mesh's `bound_box` lacks a subdivision that is left to the GPU.

    Raises:
        ConfigurationError: there is nothing to be in the box.
    """
    if evaluated.type == "MESH":
        vertices = _vertices(evaluated)
        if len(vertices):
            return np.where(IS_UPPER, vertices.max(axis=0), vertices.min(axis=0))
    corners = np.array(evaluated.bound_box, np.float64)
    if evaluated.type == "MESH" or (corners == corners[0]).all():  # which is what Blender says of what has no extent
        raise ConfigurationError(
            f"The object {evaluated.name!r} ({evaluated.type}) has no box, because it has no vertices as evaluated. Of an Empty,"
            " name the children, or ask GroundTruth(..., objects={name: empty}) for the box around them; all metaballs of one"
            " family belong to the first of them."
        )
    return corners


def _random_surface_points(evaluated: Any, count: int) -> NDArray[np.float64]:
    """(count, 3) points, evenly spread over the surface of an evaluated object, in world coordinates; none without faces."""
    with evaluated_mesh(evaluated) as mesh:
        mesh.calc_loop_triangles()
        indices = np.empty(3 * len(mesh.loop_triangles), np.int32)
        mesh.loop_triangles.foreach_get("vertices", indices)
    corners = _transform(evaluated.matrix_world, _vertices(evaluated))[indices.reshape(-1, 3)]
    sides = corners[:, 1:] - corners[:, :1]
    areas = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)
    if not areas.any():
        return np.empty((0, 3))
    chosen = np.random.choice(len(areas), count, p=areas / areas.sum())
    u, v = np.random.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return np.asarray(corners[chosen, 0] + u * sides[chosen, 0] + v * sides[chosen, 1])


def _transform(matrix: Any, xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    m = np.array(matrix, np.float64)
    return xyz @ m[:3, :3].T + m[:3, 3]
