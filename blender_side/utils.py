"""Coordinates of objects, and the viewport that off-screen drawing borrows."""

from __future__ import annotations

from typing import Any

import bpy
import numpy as np
from numpy.typing import ArrayLike, NDArray

from blendtorch_shm.errors import ConfigurationError


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


def object_coordinates(*objs: Any, depsgraph: Any = None) -> NDArray[np.float64]:
    """Vertices of objects as evaluated (modifiers and shape keys applied), each in its object's own coordinates.

    Args:
        objs: objects with a mesh, or with something Blender can turn into one (curves, text, metaballs).
        depsgraph: the evaluation to read. None: the current one, brought up to date.

    Returns:
        (N, 3) array of all vertices, object after object.
    """
    depsgraph = depsgraph or bpy.context.evaluated_depsgraph_get()
    return np.concatenate([_vertices(obj.evaluated_get(depsgraph)) for obj in objs])


def world_coordinates(*objs: Any, depsgraph: Any = None) -> NDArray[np.float64]:
    """Like `object_coordinates`, in world coordinates."""
    depsgraph = depsgraph or bpy.context.evaluated_depsgraph_get()
    evaluated = [obj.evaluated_get(depsgraph) for obj in objs]
    return np.concatenate([_transform(obj.matrix_world, _vertices(obj)) for obj in evaluated])


def bbox_world_coordinates(*objs: Any, depsgraph: Any = None) -> NDArray[np.float64]:
    """Corners of the objects' own, oriented bounding boxes in world coordinates.

    Returns:
        (8 N, 3) array: eight corners for each of the N objects, in the order of `bpy.types.Object.bound_box`.
    """
    depsgraph = depsgraph or bpy.context.evaluated_depsgraph_get()
    evaluated = [obj.evaluated_get(depsgraph) for obj in objs]
    return np.concatenate([_transform(obj.matrix_world, np.array(obj.bound_box, np.float64)) for obj in evaluated])


def hom(x: ArrayLike, v: float = 1.0) -> NDArray[Any]:
    """(N, D) coordinates made homogeneous: (N, D + 1), the last one `v`."""
    x = np.atleast_2d(x)
    return np.concatenate([x, np.full((len(x), 1), v, x.dtype)], axis=-1)


def dehom(x: ArrayLike) -> NDArray[Any]:
    """(N, D + 1) homogeneous coordinates divided by the last one: (N, D)."""
    x = np.asarray(x)
    return np.asarray(x[..., :-1] / x[..., -1:])


def _vertices(evaluated: Any) -> NDArray[np.float64]:
    mesh = evaluated.data if evaluated.type == "MESH" else evaluated.to_mesh()
    coordinates = np.empty(3 * len(mesh.vertices), np.float32)
    mesh.vertices.foreach_get("co", coordinates)
    if evaluated.type != "MESH":
        evaluated.to_mesh_clear()
    return coordinates.reshape(-1, 3).astype(np.float64)


def _transform(matrix: Any, xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    m = np.array(matrix, np.float64)
    return xyz @ m[:3, :3].T + m[:3, 3]
