"""What a picture shows: every mesh in it, where it stands, and what it is called.

Read from the evaluated depsgraph, so modifiers, instances and animation count. Curves, text, surfaces and metaballs
come as the meshes that Blender draws for them.
"""

from __future__ import annotations

import difflib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Generic, TypeVar

import bpy
import numpy as np
from bpy.app.handlers import persistent
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError

from .. import compat, poses
from ..evaluation import Evaluation
from ..final import Changes
from ..lifetime import Reference, generation, is_a, listen
from ..utils import find_first_view3d, type_switches

T = TypeVar("T")

_NO_INDEX = 2**31 - 1  # fills up `persistent_id`
_SURFACE_TYPES = ("MESH", "CURVE", "SURFACE", "FONT", "META")


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


class Look(Enum):
    """How a picture shows an object."""

    NOT_AT_ALL = auto()
    AS_IT_IS = auto()
    IN_FRONT = auto()  # of everything else, wherever it is
    AS_A_HOLE = auto()  # the background appears in its place, whatever is behind it


@dataclass(eq=False, slots=True)
class Drawn:
    """One mesh in the picture: an object, or one instance of an object.

    Attributes:
        id: its number in masks, from 1 on, always the same for one name; 0: not asked for, only in the way of others.
        name: the object's name; of an instance 'INSTANCER/OBJECT#INDEX', or 'OBJECT#INDEX' of what geometry nodes instance;
            or the name that it was asked for by.
        category: its category's number, 0: none.
        object: the original (not evaluated) object; of an instance, the one that is instanced.
        matrix_world: (4, 4) float64, object to world coordinates.
        geometry: its surface, in object coordinates.
        look: how the picture shows it.
        is_instance: it is not the object itself, and may have another surface: geometry nodes instance what they made.
        previous: the same thing as it was drawn the time before, or None.
    """

    id: int
    name: str
    category: int
    object: Any
    matrix_world: NDArray[np.float64]
    geometry: Geometry
    look: Look = Look.AS_IT_IS
    is_instance: bool = False
    previous: Drawn | None = None


Key = tuple[str, str, tuple[int, ...]]
"""Instancer, object and index; the first and the last are empty where nothing is instanced."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of what labels come in.

    Attributes:
        id, name, category: as in `Drawn`.
        parts: what is drawn of it; none: it was asked for and is not in the picture.
        axes: (4, 4) float64: the coordinates along whose axes its box lies, to world coordinates. None: those of its only part.
    """

    id: int
    name: str
    category: int
    parts: list[Drawn]
    axes: NDArray[np.float64] | None = None


class SceneReader:
    """Lists what is drawn, frame after frame, and remembers numbers and where everything was.

    An object with a surface stands for itself; one without, such as an Empty or an armature, for its children and theirs; a
    collection for what is in it. Whatever instances others stands for these, too. Where several stand for one thing, the
    nearest counts: the object itself, its parents, its instancer and that one's parents, collections from the inside out.

    Args:
        objects: what gets numbers: objects and collections, each surface that they stand for its own; or, by names, one or
            several of them, that share one number. None: everything.
        categories: names of categories and the objects and collections in each. None: the custom property "category" of
            objects and collections.

    Attributes:
        category_names: by number; the first is "", for what has no category.
        shown: names of the objects that the picture shows, whether they have a surface or not.

    Raises:
        ConfigurationError: something has no surface, and stands for nothing that has.
    """

    def __init__(
        self,
        objects: Iterable[Any] | Mapping[str, Any] | None,
        categories: Mapping[str, Iterable[Any]] | None,
    ) -> None:
        self._ids: dict[Key, tuple[int, str]] = {}
        self._asked: list[tuple[Reference, str]] | None = None
        """What was asked for, and the name that it shares a number by, or ""."""
        self._lasting: list[tuple[Key, list[Reference]]] = []
        """What always has a row, and what it was asked for by."""
        if isinstance(objects, Mapping):
            groups = _named("objects", objects)
            for name, blocks in groups.items():
                if not blocks:
                    raise ConfigurationError(f"objects={{{name!r}: ...}} is empty: name an object or a collection.")
            self._asked = [(block, name) for name, blocks in groups.items() for block in blocks]
            self._lasting = [(_group_key(name), blocks) for name, blocks in groups.items()]
        elif objects is not None:
            self._asked = [(_reference(block), "") for block in _as_list(objects)]
            surfaces = {obj.name_full: obj for block, _ in self._asked for obj in _surfaces(block.get())}
            self._lasting = [((_SURFACE, name, ()), [Reference(obj)]) for name, obj in surfaces.items()]
        for key, _ in self._lasting:
            self._id(key)
        self._categories = None
        if categories is not None:
            self._categories = _named("categories", categories)
        self.category_names = ["", *(_categories_in_file() if categories is None else categories)]
        self._category_ids = {name: i for i, name in enumerate(self.category_names)}
        self._drawn: dict[Key, Drawn] = {}
        self._axes: dict[str, NDArray[np.float64]] = {}
        self._final_geometries: dict[Any, Geometry] = {}
        self._generation = generation()
        self.shown: set[str] = set()

    @property
    def highest_id(self) -> int:
        return len(self._ids)

    def forget(self) -> None:
        """Let nothing that comes have a `previous`. Numbers stay."""
        self._drawn = {}

    def wanted(self) -> list[poses.Wanted]:
        """What has to be evaluated, whether the picture shows it or not: the objects of groups."""
        return [poses.Wanted(obj) for _, obj in self._objects_of_groups() if obj is not None]

    def read(self, depsgraph: Any, evaluation: Evaluation, *, normals: bool) -> list[Drawn]:
        """What the scene shows now.

        Args:
            depsgraph: the scene as evaluated.
            evaluation: which one it is.
            normals: fill in `Geometry.normals`.
        """
        if self._generation != generation():  # a name means something else now
            self.forget()
            self._generation = generation()
        self._read_axes(depsgraph)
        kind_of = _Kinds(self, depsgraph, evaluation, normals=normals)
        instances = depsgraph.object_instances
        count = len(instances)
        matrices, persistent_ids = np.empty((count, 4, 4), np.float32), np.empty((count, 8), np.int32)
        instances.foreach_get("matrix_world", matrices.reshape(-1))
        instances.foreach_get("persistent_id", persistent_ids.reshape(-1))
        to_world = matrices.swapaxes(1, 2).astype(np.float64)  # Blender has them column by column
        indices = persistent_ids.tolist()
        is_somewhere = np.isfinite(to_world).all(axis=(1, 2)).tolist()
        asked: dict[Key, tuple[int, str]] = {
            ("", blocks[0].key[1], ()): self._id(key) for key, blocks in self._lasting if not _is_group(key)
        }  # by the names that they have now
        before, self._drawn, known = self._drawn, {}, self._ids
        for i, instance in enumerate(instances):
            kind = kind_of(instance) if instance.show_self and is_somewhere[i] else None
            if kind is None:
                continue
            key: Key = "", kind.name, ()
            if kind.is_instance:
                index = tuple([number for number in indices[i] if number != _NO_INDEX])
                if not kind.is_itself or len(index) > 1:
                    key = kind.instancer, kind.name, index
            id_, name = kind.number or asked.get(key) or known.get(key) or self._id(key)
            self._drawn[key] = Drawn(
                id_,
                name,
                kind.category,
                kind.original,
                to_world[i],
                kind.geometry,
                kind.look,
                bool(key[2]),
                before.get(key),
            )
        self._forget_renumbered(before, kind_of.renumbered)
        self.shown, self._final_geometries = kind_of.shown, kind_of.meshes.final
        drawn = list(self._drawn.values())
        for thing in drawn:
            if thing.previous is not None:
                thing.previous.previous = None  # or nothing would ever be forgotten
        return drawn

    def _forget_renumbered(self, before: Mapping[Key, Drawn], kinds: set[tuple[str, str]]) -> None:
        """Where there are more or fewer instances than there were, an index means another one."""
        counts, counts_before = (Counter(key[:2] for key in things) for things in (self._drawn, before))
        changed = {kind for kind in kinds if counts[kind] != counts_before[kind]}
        if changed:
            for key, thing in self._drawn.items():
                if key[:2] in changed:
                    thing.previous = None

    def rows(self, drawn: list[Drawn]) -> list[Row]:
        """What was asked for, in that order; then everything else that has a number, in the order of numbers."""
        parts: dict[int, list[Drawn]] = {}
        for thing in drawn:
            if thing.id:
                parts.setdefault(thing.id, []).append(thing)
        category_of = self._category_lookup()
        rows = []
        for key, blocks in self._lasting:
            id_, name = self._id(key)
            found = parts.pop(id_, [])
            categories = {thing.category for thing in found}
            if not found:
                obj = blocks[0].get()
                categories = {0 if obj is None else category_of(obj, None)}
            axes = self._axes[name] if _is_group(key) else None
            rows.append(Row(id_, name, categories.pop() if len(categories) == 1 else 0, found, axes))
        rows += [Row(id_, things[0].name, things[0].category, things) for id_, things in sorted(parts.items())]
        return rows

    def numbers(self) -> Callable[[Any, Any], tuple[int, str] | None]:
        """What says number and name of all instances of an object by an instancer (or None); None: each has its own."""
        if self._asked is None:
            return lambda obj, instancer: None
        names = {reference.key: name for reference, name in self._asked}
        owners = _Owners(lambda block: names.get(_block_key(block)))

        def number_of(obj: Any, instancer: Any) -> tuple[int, str] | None:
            name = owners.find(obj, instancer)
            return (0, "") if name is None else self._id(_group_key(name)) if name else None

        return number_of

    def _read_axes(self, depsgraph: Any) -> None:
        """Groups have their box along the axes of the one object that they were asked for by, or of the world."""
        for name, obj in self._objects_of_groups():
            matrix = np.eye(4) if obj is None else np.array(poses.evaluated(obj, depsgraph).matrix_world, np.float64)
            is_regular = np.isfinite(matrix).all() and np.linalg.matrix_rank(matrix) == 4
            self._axes[name] = matrix if is_regular else np.eye(4)

    def _objects_of_groups(self) -> Iterator[tuple[str, Any]]:
        """Each group's name, and the one object that it was asked for by; None: there is no such one."""
        for key, blocks in self._lasting:
            if _is_group(key):
                obj = blocks[0].get() if len(blocks) == 1 else None
                yield key[1], obj if isinstance(obj, bpy.types.Object) else None

    def _id(self, key: Key) -> tuple[int, str]:
        known = self._ids.get(key)
        if known is None:
            instancer, name, index = key
            path = name if instancer in ("", name, _GROUP, _SURFACE) else f"{instancer}/{name}"
            full_name = f"{path}#{'.'.join(map(str, index))}" if index else path
            known = self._ids[key] = (len(self._ids) + 1, full_name)
        return known

    def _category_lookup(self) -> Callable[[Any, Any], int]:
        """What says the category of an object and of its instancer (or None)."""
        if self._categories is None:
            by_property = _Owners(self._category_by_property)
            return lambda obj, instancer: by_property.find(obj, instancer) or 0
        known = {
            reference.key: self._category_ids[category]
            for category, references in self._categories.items()
            for reference in references
        }
        given = _Owners(lambda block: known.get(_block_key(block)))
        return lambda obj, instancer: given.find(obj, instancer) or 0

    def _category_by_property(self, block: Any) -> int | None:
        value = block.get("category")
        if value is None:
            return None
        name = str(value)
        id_ = self._category_ids.get(name)
        if id_ is None:
            id_ = self._category_ids[name] = len(self.category_names)
            self.category_names.append(name)
        return id_


@dataclass(frozen=True)
class _Kind:
    """What all instances of one object by one instancer have in common.

    Attributes:
        is_instance: an object that nobody instances has no index.
        is_itself: curves, text, surfaces and metaballs instance their own mesh.
        number: and the name that goes with it. None: each has its own.
    """

    instancer: str
    name: str
    is_instance: bool
    is_itself: bool
    original: Any
    geometry: Geometry
    look: Look
    category: int
    number: tuple[int, str] | None


class _Kinds:
    """Looks once at all instances of one object by one instancer: there may be many, and to look takes long."""

    def __init__(self, reader: SceneReader, depsgraph: Any, evaluation: Evaluation, *, normals: bool) -> None:
        self._known: dict[tuple[int, int, int], _Kind | None] = {}
        self._look_of = _looks(evaluation, depsgraph)
        self._category_of = reader._category_lookup()
        self._number_of = reader.numbers()
        self.meshes = _Meshes(evaluation, reader._final_geometries, normals=normals)
        self.shown: set[str] = set()
        self.renumbered: set[tuple[str, str]] = set()
        """Instancers and objects whose instances are numbered anew in each frame; particles keep their numbers."""

    def __call__(self, instance: Any) -> _Kind | None:
        """None: it is not in the picture, or has no surface."""
        evaluated = instance.object
        original, data = evaluated.original, evaluated.data
        instancer = instance.parent if instance.is_instance else None
        place = (
            original.as_pointer(),
            0 if data is None else data.as_pointer(),
            0 if instancer is None else instancer.as_pointer(),
        )
        if place not in self._known:
            self._known[place] = self._look_at(evaluated, original, instancer)
        return self._known[place]

    def _look_at(self, evaluated: Any, original: Any, instancer: Any) -> _Kind | None:
        look = self._look_of(evaluated, instancer)
        if look is Look.NOT_AT_ALL:
            return None
        name = original.name_full
        if (instancer is None or instancer.original == original) and look is not Look.AS_A_HOLE:
            self.shown.add(name)
        if evaluated.type != "MESH":
            return None
        by = None if instancer is None else instancer.original
        instancer_name = "" if by is None else by.name_full
        # The mesh of geometry nodes, and of what is no mesh itself, lies in the object that it was made for.
        is_own = instancer_name == name or original.type != "MESH"
        geometry = self.meshes.read(evaluated, name, is_own=is_own)
        if geometry is None:
            return None
        if instancer is not None and not len(instancer.particle_systems):
            self.renumbered.add((instancer_name, name))
        is_hole = look is Look.AS_A_HOLE
        return _Kind(
            instancer_name,
            name,
            by is not None,
            by == original and original.type != "MESH",
            original,
            geometry,
            look,
            0 if is_hole else self._category_of(original, by),
            (0, "") if is_hole else self._number_of(original, by),
        )


def _looks(evaluation: Evaluation, depsgraph: Any) -> Callable[[Any, Any], Look]:
    """What says how the picture shows an evaluated object, or an instance by its object and instancer.

    The depsgraph has left out already what is hidden from all viewports, or from all final renders. The table is in
    docs/ground_truth.md; the engines differ in what they ask the object for, and what its instancer.
    """
    engine = evaluation.engine
    layer = bpy.context.scene.view_layers[depsgraph.view_layer.name]
    is_left_out = _left_out(evaluation)
    has_surfaces = layer.use_solid or not compat.heeds_layers_surfaces(engine)

    def look(obj: Any, instancer: Any) -> Look:
        host = instancer or obj
        if is_left_out(obj, instancer) or (obj.type == "MESH" and not has_surfaces):
            return Look.NOT_AT_ALL
        if engine == compat.WORKBENCH:
            return Look.IN_FRONT if obj.show_in_front else Look.AS_IT_IS
        asked = {obj} if engine == compat.EEVEE else {obj, host}
        if compat.hides_from_camera(engine) and not all(one.visible_camera for one in asked):
            return Look.NOT_AT_ALL
        if engine != compat.EEVEE:
            if host.original.indirect_only_get(view_layer=layer):
                return Look.NOT_AT_ALL
            if any(one.is_shadow_catcher for one in asked):
                return Look.AS_A_HOLE
        is_holdout = (obj if engine == compat.EEVEE else host).is_holdout or host.original.holdout_get(view_layer=layer)
        return Look.AS_A_HOLE if is_holdout else Look.AS_IT_IS

    return look


def _left_out(evaluation: Evaluation) -> Callable[[Any, Any], bool]:
    """What says whether the viewport leaves out an evaluated object, or an instance."""
    if evaluation.is_final:
        return lambda obj, instancer: False
    try:
        _, space, _ = find_first_view3d()
    except ConfigurationError:  # then no picture is drawn
        return lambda obj, instancer: False
    shows_wires = compat.shades_wire_objects(evaluation.shading)

    has_types = all(getattr(space, name) for name in type_switches())

    def shows_instances_of(instancer: Any) -> bool:
        if instancer.visible_in_viewport_get(space):
            return True
        if has_types:
            return False
        with Changes() as changes:  # a type that the viewport does not show still instances
            changes.set(space, **dict.fromkeys(type_switches(), True))
            return bool(instancer.visible_in_viewport_get(space))

    def is_left_out(obj: Any, instancer: Any) -> bool:
        if not shows_wires and {obj.display_type, (instancer or obj).display_type} & {"WIRE", "BOUNDS"}:
            return True
        if instancer is None:
            return not obj.visible_in_viewport_get(space)
        # Blender asks the object that is instanced whether it is hidden, and its surface for its type, which is that of meshes.
        return obj.hide_viewport or not space.show_object_viewport_mesh or not shows_instances_of(instancer)

    return is_left_out


# -------------------------------------------------------------------------------------- what stands for what


class _Owners(Generic[T]):
    """Finds what stands for an object: itself, or something above it.

    Args:
        look: what an object or a collection says about what it stands for; None: nothing.
    """

    def __init__(self, look: Callable[[Any], T | None]) -> None:
        self._look = look
        self._homes: dict[str, list[Any]] = {}  # by name of an object
        self._above: dict[str, list[Any]] = {}  # by name of a collection
        collections = [*bpy.data.collections, *(scene.collection for scene in bpy.data.scenes)]
        if any(look(collection) is not None for collection in collections):
            for collection in collections:
                for obj in collection.objects:
                    self._homes.setdefault(obj.name_full, []).append(collection)
                for child in collection.children:
                    self._above.setdefault(child.name_full, []).append(collection)

    def find(self, obj: Any, instancer: Any = None) -> T | None:
        """What the nearest says that stands for an object, or for an instance.

        Args:
            obj: the original object.
            instancer: what instances it, or None.

        Raises:
            ConfigurationError: two collections that are equally near say different things.
        """
        line = [*_line(obj), *(() if instancer is None else _line(instancer))]
        for block in line:
            found = self._look(block)
            if found is not None:
                return found
        level = [home for block in line for home in self._homes.get(block.name_full, ())] if self._homes else []
        while level:
            said = {one.name_full: found for one in level if (found := self._look(one)) is not None}
            if len(set(said.values())) > 1:
                raise ConfigurationError(
                    f"The object {obj.name!r} is in the collections {', '.join(map(repr, said))}, and they say different things"
                    " about it: say it of the object itself."
                )
            for found in said.values():
                return found
            level = [above for one in level for above in self._above.get(one.name_full, ())]
        return None


def _line(obj: Any) -> Iterator[Any]:
    """An object, and those of its parents that stand for it because they have no surface themselves."""
    yield obj
    while (obj := obj.parent) is not None:
        if obj.type not in _SURFACE_TYPES:
            yield obj


def _surfaces(block: Any) -> Iterator[Any]:
    """The objects with a surface that an object or a collection stands for; not what they instance."""
    if isinstance(block, bpy.types.Collection):
        for obj in block.all_objects:
            yield from _surfaces(obj)
    elif block.type in _SURFACE_TYPES:
        if _owner_of_surface(block) == block:
            yield block
    else:
        yield from (
            child
            for child in block.children_recursive
            if child.type in _SURFACE_TYPES and _owner_of_surface(child) == child
        )


def _owner_of_surface(obj: Any) -> Any:
    """The object that a surface belongs to. Metaballs whose names differ in the number at the end only have one together.

    It is that of the lowest number (Blender's `BKE_mball_basis_find`).
    """
    if obj.type != "META":
        return obj
    stem, _ = _numbered(obj)
    family = [one for one in bpy.context.scene.objects if one.type == "META" and _numbered(one)[0] == stem]
    return min([obj, *family], key=lambda one: _numbered(one)[1])


def _numbered(obj: Any) -> tuple[str, int]:
    """The name of an object without the number at its end, and that: ('Ball', 1) of 'Ball.001', ('Ball', 0) of 'Ball'."""
    stem, dot, digits = obj.name.rpartition(".")
    return (stem, int(digits)) if dot and digits.isdecimal() else (obj.name, 0)


def _named(argument: str, mapping: Mapping[Any, Any]) -> dict[str, list[Reference]]:
    """What was asked for by name.

    Raises:
        ConfigurationError: a name is none, or one thing stands under two; or as `_reference`.
    """
    named: dict[str, list[Reference]] = {}
    names: dict[tuple[bool, str], str] = {}
    for name, blocks in mapping.items():
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"{argument}={{{name!r}: ...}}: a name is a string that is not empty.")
        named[name] = [_reference(block) for block in _as_list(blocks)]
        for reference in named[name]:
            if names.setdefault(reference.key, name) != name:
                raise ConfigurationError(
                    f"{argument} has {reference.key[1]!r} under {names[reference.key]!r} and under {name!r}: it can belong to"
                    " one of them only."
                )
    return named


def _reference(block: Any) -> Reference:
    """A reference to what was asked for.

    Raises:
        ConfigurationError: it is neither an object nor a collection, stands for nothing that has a surface, or is gone.
    """
    if is_a(str, block):
        raise ConfigurationError(_meant_by(block))
    if not is_a((bpy.types.Object, bpy.types.Collection), block):
        raise ConfigurationError(
            f"{block!r} is neither an object (bpy.types.Object), such as bpy.data.objects['Cube'], nor a collection."
        )
    reference = Reference(block)
    if isinstance(block, bpy.types.Object) and (owner := _owner_of_surface(block)) != block:
        raise ConfigurationError(
            f"The metaballs {owner.name!r} and {block.name!r} have one surface together, which belongs to {owner.name!r}: name"
            " that one, or give them names that differ in more than the number at the end."
        )
    if next(_surfaces(block), None) is None and not any(map(_may_instance, _hierarchy(block))):
        what = block.type if isinstance(block, bpy.types.Object) else "collection"
        raise ConfigurationError(
            f"{block.name!r} ({what}) has no surface, and nothing that belongs to it has one, so no pixel ever shows it. Meshes,"
            " curves, surfaces, text and metaballs have a surface; hair, point clouds, volumes and grease pencil have none here."
        )
    return reference


def _meant_by(name: str) -> str:
    """What to say where a name was given instead of what it names."""
    homes = {block.name: home for home in ("collections", "objects") for block in getattr(bpy.data, home)}
    if name in homes:
        return f"{name!r} is a name: give what it names, bpy.data.{homes[name]}[{name!r}]."
    nearest = difflib.get_close_matches(name, homes, 3, cutoff=0.5) or sorted(homes)[:8]
    listed = ", ".join(f"bpy.data.{homes[found]}[{found!r}]" for found in nearest)
    return f"No object and no collection is called {name!r} in this file. There is {listed or 'none at all'}."


def _hierarchy(block: Any) -> Iterator[Any]:
    for obj in block.all_objects if isinstance(block, bpy.types.Collection) else [block]:
        yield from (obj, *obj.children_recursive)


def _may_instance(obj: Any) -> bool:
    return bool(obj.instance_type != "NONE" or len(obj.modifiers) or len(obj.particle_systems))


def _as_list(blocks: Any) -> list[Any]:
    """What was given: one block, or several. What is neither is refused as a block."""
    is_one = isinstance(blocks, (bpy.types.ID, str)) or not isinstance(blocks, Iterable)
    return [blocks] if is_one else list(blocks)


def _block_key(block: Any) -> tuple[bool, str]:
    return isinstance(block, bpy.types.Object), block.name_full


_GROUP, _SURFACE = (
    "\0group",
    "\0surface",
)  # stand where a key has an instancer, and are no names: what was asked for has them


def _group_key(name: str) -> Key:
    return _GROUP, name, ()


def _is_group(key: Key) -> bool:
    return key[0] == _GROUP


def _categories_in_file() -> list[str]:
    """Sorted, so that all instances that open one file number them alike."""
    blocks = (*bpy.data.objects, *bpy.data.collections)
    return sorted({str(block["category"]) for block in blocks if block.get("category") not in (None, "")})


# ------------------------------------------------------------------------------------------------------- geometry

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


class _Meshes:
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
