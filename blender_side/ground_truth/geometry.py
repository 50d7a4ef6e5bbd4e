"""Surfaces of meshes as evaluated, each read once for as long as it stays what it is."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import bpy
import numpy as np
from bpy.app.handlers import persistent
from numpy.typing import NDArray

from .. import compat
from ..evaluation import Evaluation
from ..lifetime import generation, listen


@dataclass(eq=False)
class Geometry:
    """The surface of a mesh as evaluated; shared by everything that is drawn with this mesh.

    A *corner* is a vertex of one face: normals belong to corners, because flat faces meet at their vertices.

    Attributes:
        vertices: (V, 3) float32, object coordinates.
        corners: (C,) int32, the vertex at each corner.
        triangles: (T, 3) int32, the corners of each triangle; counter-clockwise as seen from outside.
        normals: (C, 3) float32 unit vectors, object coordinates, as shaded; None: nobody asked for them.
        sources: names of the objects that this mesh was made for.
        stale: Blender has evaluated it anew since.
    """

    vertices: NDArray[np.float32]
    corners: NDArray[np.int32]
    triangles: NDArray[np.int32]
    normals: NDArray[np.float32] | None
    sources: set[str] = field(default_factory=set)
    stale: bool = False

    def corresponds_to(self, other: Geometry) -> bool:
        """Whether both are one mesh, at most deformed, so that vertex i of one is vertex i of the other."""
        if self.corners is other.corners and self.triangles is other.triangles:
            return True
        same = (
            len(self.vertices) == len(other.vertices)
            and np.array_equal(self.corners, other.corners)
            and np.array_equal(self.triangles, other.triangles)
        )
        if same:  # from now on this is seen at a glance
            self.corners, self.triangles = other.corners, other.triangles
        return same

    def equals(self, other: Geometry) -> bool:
        """Whether both have the same surface."""
        if not self.corresponds_to(other) or not np.array_equal(self.vertices, other.vertices):
            return False
        if self.normals is None or other.normals is None:
            return self.normals is other.normals
        return np.array_equal(self.normals, other.normals)


_geometries: weakref.WeakValueDictionary[tuple[int, str], Geometry] = weakref.WeakValueDictionary()
"""Of the viewport's evaluation: by the mesh's address, and its owner where it is no object's. They live as long as something is
drawn with them."""


_geometries_of = generation()


def _known_geometries() -> weakref.WeakValueDictionary[tuple[int, str], Geometry]:
    global _geometries_of
    knows_changes = listen(_mark_stale, "depsgraph_update_post", "frame_change_post")
    if not knows_changes or _geometries_of != generation():  # or an address means something else now
        _geometries.clear()
        _geometries_of = generation()
    return _geometries


class Meshes:
    """Reads the surfaces of evaluated objects of type MESH, each mesh once.

    Args:
        evaluation: the viewport's lasts, and says what it has evaluated anew. That of a final render is made anew each time.
        before: what was read from the last final render: the same mesh is the same `Geometry` again.
        normals: are wanted.

    Attributes:
        final: what was read from this final render.
    """

    def __init__(self, evaluation: Evaluation, before: Mapping[Any, Geometry], *, normals: bool) -> None:
        self._is_final = evaluation.is_final
        self._known: Any = {} if evaluation.is_final else _known_geometries()
        self._before = before
        self._normals = normals
        self._counts: Counter[str] = Counter()
        self.final: dict[Any, Geometry] = {}

    def read(self, evaluated: Any, name: str, *, is_own: bool) -> Geometry | None:
        """The surface of an evaluated object of that name; None if it has no faces.

        Args:
            is_own: its mesh is in no file, and was made for it alone.
        """
        place = (evaluated.data.as_pointer(), name if is_own else "")
        geometry = self._known.get(place)
        if geometry is None or geometry.stale or (self._normals and geometry.normals is None):
            geometry = _read(evaluated, normals=self._normals)
            if self._is_final:
                number = (name, self._counts[name])
                self._counts[name] += 1
                before = self._before.get(number)
                geometry = before if before is not None and before.equals(geometry) else geometry
                self.final[number] = geometry
            self._known[place] = geometry
        geometry.sources.add(name)
        return geometry if len(geometry.triangles) else None


def _read(evaluated: Any, *, normals: bool) -> Geometry:
    mesh = evaluated.to_mesh()  # not `data`, which lacks a subdivision that is left to the GPU
    try:
        found = compat.corner_normals(mesh) if normals else None
        mesh.calc_loop_triangles()
        vertices = np.empty((len(mesh.vertices), 3), np.float32)
        corners = np.empty(len(mesh.loops), np.int32)
        triangles = np.empty((len(mesh.loop_triangles), 3), np.int32)
        mesh.vertices.foreach_get("co", vertices.reshape(-1))
        mesh.loops.foreach_get("vertex_index", corners)
        mesh.loop_triangles.foreach_get("loops", triangles.reshape(-1))
        return Geometry(vertices, corners, triangles, found)
    finally:
        evaluated.to_mesh_clear()


@persistent  # type: ignore[untyped-decorator]
def _mark_stale(scene: Any, depsgraph: Any) -> None:
    """Note which meshes were evaluated anew."""
    names, places = set(), set()
    for update in depsgraph.updates:
        if update.is_updated_geometry and isinstance(update.id, bpy.types.Object):
            names.add(update.id.name_full)
            if update.id.data is not None:  # another mesh may have been at that address
                places.add((update.id.data.as_pointer(), ""))
    if names:
        for place, geometry in _geometries.items():
            if place in places or not names.isdisjoint(geometry.sources):
                geometry.stale = True
