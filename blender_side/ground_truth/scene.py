"""What a picture shows: every mesh in it, where it stands, and what it is called.

Read from the evaluated depsgraph, so modifiers, instances and animation count. Curves, text, surfaces and metaballs
come as the meshes that Blender draws for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import bpy
import numpy as np
from bpy.app.handlers import persistent
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError

from .. import compat
from ..evaluation import Evaluation
from ..utils import find_first_view3d

_NO_INDEX = 2**31 - 1  # fills up `persistent_id`


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


@dataclass(eq=False)
class Drawn:
    """One mesh in the picture: an object, or one instance of an object.

    Attributes:
        id: its number in masks, from 1 on, always the same for one name; 0: not asked for, only in the way of others.
        name: the object's name; of an instance 'INSTANCER/OBJECT#INDEX', or 'OBJECT#INDEX' of what geometry nodes instance.
        category: its category's number, 0: none.
        object: the original (not evaluated) object; of an instance, the one that is instanced.
        matrix_world: (4, 4) float64, object to world coordinates.
        geometry: its surface, in object coordinates.
        previous: the same thing as it was drawn the time before, or None.
    """

    id: int
    name: str
    category: int
    object: Any
    matrix_world: NDArray[np.float64]
    geometry: Geometry
    previous: Drawn | None = None


Key = tuple[str, str, tuple[int, ...]]
"""Instancer, object and index; the first and the last are empty where nothing is instanced."""


@dataclass(frozen=True)
class Row:
    """One row of what labels come in; `drawn` is None for an object that was asked for and is not in the picture."""

    id: int
    name: str
    category: int
    drawn: Drawn | None


class SceneReader:
    """Lists what is drawn, frame after frame, and remembers numbers and where everything was.

    Args:
        objects: what gets numbers, with all that it instances. None: everything.
        categories: names of categories and the objects in each, or what instances them. None: the custom property "category"
            of an object, or else of what instances it, is its category.

    Attributes:
        category_names: by number; the first is "", for what has no category.
        shown: names of the objects that the picture does not leave out, whether they have a surface or not.
    """

    def __init__(self, objects: Iterable[Any] | None, categories: Mapping[str, Iterable[Any]] | None) -> None:
        self._asked = None if objects is None else [_Reference(obj) for obj in objects]
        self._categories = None
        if categories is not None:
            self._categories = {name: [_Reference(obj) for obj in members] for name, members in categories.items()}
        self.category_names = ["", *(_categories_in_file() if categories is None else categories)]
        self._category_ids = {name: i for i, name in enumerate(self.category_names) if i}
        self._ids: dict[Key, tuple[int, str]] = {}
        self._drawn: dict[Key, Drawn] = {}
        self.shown: set[str] = set()
        _listen()

    @property
    def highest_id(self) -> int:
        return len(self._ids)

    def forget(self) -> None:
        """Let nothing that comes have a `previous`. Numbers stay."""
        self._drawn = {}

    def read(self, depsgraph: Any, evaluation: Evaluation, *, normals: bool) -> list[Drawn]:
        """What the scene shows now.

        Args:
            depsgraph: the scene as evaluated.
            evaluation: which one it is.
            normals: fill in `Geometry.normals`.
        """
        asked = None if self._asked is None else {reference.name for reference in self._asked}
        category_of = self._category_lookup()
        is_hidden = _hiding(evaluation)
        geometry_of = _Meshes(evaluation, normals=normals)
        shown = set()
        before, self._drawn = self._drawn, {}
        matrices: list[tuple[float, ...]] = []
        for instance in depsgraph.object_instances:
            evaluated = instance.object
            if not instance.show_self or is_hidden(evaluated, instance.parent if instance.is_instance else None):
                continue
            original = evaluated.original
            if not instance.is_instance:
                shown.add(original.name_full)
            if evaluated.type != "MESH":
                continue
            instancer = instance.parent.original if instance.is_instance else None
            key = _key(instance, original, instancer)
            geometry = geometry_of(evaluated, key)
            if geometry is None:
                continue
            id_, name = self._id(key)
            if asked is not None and original.name_full not in asked and key[0] not in asked:
                id_ = 0
            x, y, z, w = instance.matrix_world
            matrices.append((*x, *y, *z, *w))
            category = category_of(original, instancer)
            self._drawn[key] = Drawn(id_, name, category, original, _NOWHERE, geometry, before.get(key))
        self.shown = shown
        drawn = list(self._drawn.values())
        for thing, matrix in zip(drawn, np.array(matrices, np.float64).reshape(-1, 4, 4), strict=True):
            thing.matrix_world = matrix
            if thing.previous is not None:
                thing.previous.previous = None  # or nothing would ever be forgotten
        return drawn

    def rows(self, drawn: list[Drawn]) -> list[Row]:
        """Everything that has a number, in the order of numbers; or first the objects asked for, in their order, then what they
        instance."""
        with_id = {thing.id: thing for thing in drawn if thing.id}
        rows = []
        category_of = self._category_lookup()
        for reference in self._asked or ():
            if reference.has_surface:
                id_, name = self._id(("", reference.name, ()))
                thing = with_id.pop(id_, None)
                obj = reference.object
                category = thing.category if thing else category_of(obj, None) if obj is not None else 0
                rows.append(Row(id_, name, category, thing))
        rows += [Row(thing.id, thing.name, thing.category, thing) for _, thing in sorted(with_id.items())]
        return rows

    def _id(self, key: Key) -> tuple[int, str]:
        known = self._ids.get(key)
        if known is None:
            instancer, name, index = key
            path = name if instancer in ("", name) else f"{instancer}/{name}"
            full_name = f"{path}#{'.'.join(map(str, index))}" if index else path
            known = self._ids[key] = (len(self._ids) + 1, full_name)
        return known

    def _category_lookup(self) -> Callable[[Any, Any], int]:
        """What says the category of an object and of its instancer (or None)."""
        by_name = None
        if self._categories is not None:
            by_name = {
                reference.name: self._category_ids[category]
                for category, references in self._categories.items()
                for reference in references
            }

        def category_of(obj: Any) -> int:
            if by_name is not None:
                return by_name.get(obj.name_full, 0)
            name = obj.get("category")
            return 0 if name is None else self._category_id(str(name))

        return lambda obj, instancer: category_of(obj) or (0 if instancer is None else category_of(instancer))

    def _category_id(self, name: str) -> int:
        id_ = self._category_ids.get(name)
        if id_ is None:
            id_ = self._category_ids[name] = len(self.category_names)
            self.category_names.append(name)
        return id_


class _Reference:
    """An object of the user's, who may rename or delete it."""

    def __init__(self, obj: Any) -> None:
        if not isinstance(obj, bpy.types.Object):
            raise ConfigurationError(f"{obj!r} is not an object (bpy.types.Object), such as bpy.data.objects['Cube'].")
        self._object = obj
        self._name = str(obj.name_full)
        self.has_surface = obj.type in _SURFACE_TYPES

    @property
    def object(self) -> Any:
        """None: it was deleted."""
        try:
            self._name = str(self._object.name_full)
            return self._object
        except ReferenceError:
            return None

    @property
    def name(self) -> str:
        """Its name now, or the last one it had."""
        _ = self.object
        return self._name


_NOWHERE = np.zeros((4, 4))
_SURFACE_TYPES = ("MESH", "CURVE", "SURFACE", "FONT", "META")


def _key(instance: Any, original: Any, instancer: Any) -> Key:
    name = original.name_full
    if instancer is None:
        return "", name, ()
    index = tuple(i for i in instance.persistent_id if i != _NO_INDEX)
    if instancer == original and original.type != "MESH" and len(index) == 1:
        return "", name, ()  # Blender lets curves, text, surfaces and metaballs instance their own mesh
    return instancer.name_full, name, index


def _hiding(evaluation: Evaluation) -> Callable[[Any, Any], bool]:
    """What says whether the picture leaves out an evaluated object, or an instance by its object and instancer.

    The depsgraph has left out already what is hidden from all viewports, or from final renders.
    """
    if evaluation.is_final:
        return lambda obj, instancer: False
    try:
        _, space, _ = find_first_view3d()
    except ConfigurationError:  # then no picture is drawn
        return lambda obj, instancer: False
    shows_wires = compat.shades_wire_objects(evaluation.shading)
    is_restricted = bool(space.local_view or space.use_local_collections or not space.show_object_viewport_mesh)

    def is_hidden(obj: Any, instancer: Any) -> bool:
        if not shows_wires and obj.display_type in ("WIRE", "BOUNDS"):
            return True
        return is_restricted and not (instancer or obj).visible_in_viewport_get(space)

    return is_hidden


def _categories_in_file() -> list[str]:
    """Sorted, so that all instances that open one file number them alike."""
    return sorted({str(obj["category"]) for obj in bpy.data.objects if obj.get("category") is not None})


# ------------------------------------------------------------------------------------------------------- geometry

_geometries: weakref.WeakValueDictionary[tuple[int, str], Geometry] = weakref.WeakValueDictionary()
"""By the evaluated mesh's address, and its owner where it is no object's. They live as long as something is drawn with them."""


class _Meshes:
    """The surfaces of evaluated objects of type MESH, each mesh read once; None if it has no faces."""

    def __init__(self, evaluation: Evaluation, *, normals: bool) -> None:
        # An address means the same mesh for as long as its depsgraph lives, which final renders make anew.
        self._known: Any = {} if evaluation.is_final else _geometries
        self._normals = normals

    def __call__(self, evaluated: Any, key: Key) -> Geometry | None:
        instancer, name, _ = key
        owner = name if instancer == name or evaluated.original.type != "MESH" else ""
        place = (evaluated.data.as_pointer(), owner)
        geometry = self._known.get(place)
        if geometry is None or geometry.stale or (self._normals and geometry.normals is None):
            geometry = _read(evaluated, normals=self._normals)
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


def _listen() -> None:
    for handlers in (bpy.app.handlers.depsgraph_update_post, bpy.app.handlers.frame_change_post):
        if _mark_stale not in handlers:
            handlers.insert(0, _mark_stale)  # before handlers of the user's, which may render


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
