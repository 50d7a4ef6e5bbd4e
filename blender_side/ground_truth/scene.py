"""What a picture shows: every mesh in it, where it stands, and what it is called.

Read from the evaluated depsgraph, so modifiers, instances and animation count. Curves, text, surfaces and metaballs
come as the meshes that Blender draws for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import bpy
import numpy as np
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError

from .. import poses
from ..evaluation import Evaluation
from ..lifetime import Reference, generation
from .geometry import Geometry, Meshes
from .looks import Look, looks
from .owners import Owners, as_list, block_key, categories_in_file, reference_to, references_by_name, surfaces_of

_NO_INDEX = 2**31 - 1  # fills up `persistent_id`


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


_GROUP, _SURFACE = "\0group", "\0surface"
"""Stand where a key has an instancer, and are no names: what was asked for has them."""


def _group_key(name: str) -> Key:
    return _GROUP, name, ()


def _is_group(key: Key) -> bool:
    return key[0] == _GROUP


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
            groups = references_by_name("objects", objects)
            for name, blocks in groups.items():
                if not blocks:
                    raise ConfigurationError(f"objects={{{name!r}: ...}} is empty: name an object or a collection.")
            self._asked = [(block, name) for name, blocks in groups.items() for block in blocks]
            self._lasting = [(_group_key(name), blocks) for name, blocks in groups.items()]
        elif objects is not None:
            self._asked = [(reference_to(block), "") for block in as_list(objects)]
            surfaces = {obj.name_full: obj for block, _ in self._asked for obj in surfaces_of(block.get())}
            self._lasting = [((_SURFACE, name, ()), [Reference(obj)]) for name, obj in surfaces.items()]
        for key, _ in self._lasting:
            self._id(key)
        self._categories = None
        if categories is not None:
            self._categories = references_by_name("categories", categories)
        self.category_names = ["", *(categories_in_file() if categories is None else categories)]
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
        owners = Owners(lambda block: names.get(block_key(block)))

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
            by_property = Owners(self._category_by_property)
            return lambda obj, instancer: by_property.find(obj, instancer) or 0
        known = {
            reference.key: self._category_ids[category]
            for category, references in self._categories.items()
            for reference in references
        }
        given = Owners(lambda block: known.get(block_key(block)))
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
        self._look_of = looks(evaluation, depsgraph)
        self._category_of = reader._category_lookup()
        self._number_of = reader.numbers()
        self.meshes = Meshes(evaluation, reader._final_geometries, normals=normals)
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
