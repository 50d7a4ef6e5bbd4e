"""What counts: which objects a picture shows, and how. The table of it is in docs/ground_truth.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Any

import bpy

from blendtorch_shm.errors import ConfigurationError

from .. import compat
from ..changes import Changes
from ..evaluation import Evaluation
from ..utils import find_first_view3d, type_switches


class Look(Enum):
    """How a picture shows an object."""

    NOT_AT_ALL = auto()
    AS_IT_IS = auto()
    IN_FRONT = auto()  # of everything else, wherever it is
    AS_A_HOLE = auto()  # the background appears in its place, whatever is behind it


def looks(evaluation: Evaluation, depsgraph: Any) -> Callable[[Any, Any], Look]:
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
        if engine == compat.EEVEE:  # of instancers, it asks the collections alone
            is_holdout = obj.is_holdout or _is_held_out_by_a_collection(host.original, layer)
        else:
            is_holdout = host.is_holdout or host.original.holdout_get(view_layer=layer)
        return Look.AS_A_HOLE if is_holdout else Look.AS_IT_IS

    return look


def _is_held_out_by_a_collection(obj: Any, layer: Any) -> bool:
    """Whether a collection that has this object is a holdout in the view layer. One further out does not count."""
    if not obj.holdout_get(view_layer=layer):
        return False
    return not obj.is_holdout or any(
        one.holdout and not one.exclude and obj.name in one.collection.objects
        for one in _all_below(layer.layer_collection)
    )


def _all_below(layer_collection: Any) -> Iterator[Any]:
    yield layer_collection
    for child in layer_collection.children:
        yield from _all_below(child)


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
