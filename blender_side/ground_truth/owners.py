"""What stands for what: objects and collections that labels are asked for, and the surfaces that belong to them.

An object with a surface stands for itself; one without, such as an Empty or an armature, for its children and theirs; a
collection for what is in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import bpy

from blendtorch_shm.errors import ConfigurationError

from ..lifetime import Reference, is_a

T = TypeVar("T")

_SURFACE_TYPES = ("MESH", "CURVE", "SURFACE", "FONT", "META")


class Owners(Generic[T]):
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


def surfaces_of(block: Any) -> Iterator[Any]:
    """The objects with a surface that an object or a collection stands for; not what they instance."""
    if isinstance(block, bpy.types.Collection):
        for obj in block.all_objects:
            yield from surfaces_of(obj)
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


def references_by_name(argument: str, mapping: Mapping[Any, Any]) -> dict[str, list[Reference]]:
    """What was asked for by name.

    Raises:
        ConfigurationError: a name is none, or one thing stands under two; or as `reference_to`.
    """
    named: dict[str, list[Reference]] = {}
    names: dict[tuple[bool, str], str] = {}
    for name, blocks in mapping.items():
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"{argument}={{{name!r}: ...}}: a name is a string that is not empty.")
        named[name] = [reference_to(block) for block in as_list(blocks)]
        for reference in named[name]:
            if names.setdefault(reference.key, name) != name:
                raise ConfigurationError(
                    f"{argument} has {reference.key[1]!r} under {names[reference.key]!r} and under {name!r}: it can belong to"
                    " one of them only."
                )
    return named


def reference_to(block: Any) -> Reference:
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
    if next(surfaces_of(block), None) is None and not any(map(_may_instance, _hierarchy(block))):
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


def as_list(blocks: Any) -> list[Any]:
    """What was given: one block, or several. What is neither is refused as a block."""
    is_one = isinstance(blocks, (bpy.types.ID, str)) or not isinstance(blocks, Iterable)
    return [blocks] if is_one else list(blocks)


def block_key(block: Any) -> tuple[bool, str]:
    return isinstance(block, bpy.types.Object), block.name_full


def categories_in_file() -> list[str]:
    """Sorted, so that all instances that open one file number them alike."""
    blocks = (*bpy.data.objects, *bpy.data.collections)
    return sorted({str(block["category"]) for block in blocks if block.get("category") not in (None, "")})
