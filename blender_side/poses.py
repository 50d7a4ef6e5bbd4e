"""Objects as evaluated, whether the scene shows them or not.

Blender evaluates what a view layer shows, and what that depends on. An object that is hidden from viewports, whose collection is
excluded, or that is in no collection at all is not evaluated: its `matrix_world` is what it was when it was last, although its
parents move. Final renders show it moving. Here is the one way to ask for it, hidden or not.

What Blender is to evaluate besides, a driver names in its variables. It stands in a data-block that is no object, that a property
of the scene makes part of the scene's evaluation, and on which nothing depends: so nothing changes for those who look at the
scene's objects, and there can be no cycle. It stays from frame to frame: whenever something is added, Blender builds its
dependency graph anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import bpy

from blendtorch_shm.errors import ConfigurationError

from . import overrides
from .lifetime import gone

_NAME = "blendtorch evaluates"


class Wanted(NamedTuple):
    """What is to be evaluated.

    Attributes:
        obj: the object (`bpy.types.Object`). Of a camera, its `data`, too.
        geometry: what the object is made of, too (`to_mesh`, `bound_box`).
        bone: the bone of an armature, too.
    """

    obj: Any
    geometry: bool = False
    bone: str = ""


def evaluated(obj: Any, depsgraph: Any = None, *, geometry: bool = False, bone: str = "") -> Any:
    """An object as it is now, with what was changed up to now.

    Args:
        obj, geometry, bone: as in `Wanted`.
        depsgraph: the evaluation to look into. None: that of the current view layer, brought up to date.

    Returns:
        its copy in the evaluation, for example for its `matrix_world`.

    Raises:
        ObjectGone: the object was deleted, or another file was opened.
        ConfigurationError: the evaluation is finished, or another scene's, and lacks the object; see `include`.
    """
    if depsgraph is None:
        depsgraph = bpy.context.evaluated_depsgraph_get()
    try:
        is_missing = depsgraph.mode == "VIEWPORT" and not obj.visible_get(view_layer=depsgraph.view_layer)
    except ReferenceError as error:
        raise gone(error) from error
    if is_missing and include([Wanted(obj, geometry, bone)]):
        depsgraph.update()
    found = obj.evaluated_get(depsgraph)
    if not found.is_evaluated:
        raise ConfigurationError(
            f"The object {obj.name!r} is not part of this evaluation ({depsgraph.mode.lower()}, scene"
            f" {depsgraph.scene.name!r}, view layer {depsgraph.view_layer.name!r}), so nobody knows where it is there."
        )
    return found


def include(wanted: Iterable[Wanted]) -> bool:
    """See to it that objects are part of all evaluations of the scene that begin or are updated from now on.

    Returns:
        whether that had to be said to Blender.
    """
    targets = {name: target for one in wanted for name, target in _targets(one)}
    variables = _variables()
    missing = {name: target for name, target in targets.items() if not _points_at(variables.get(name), target)}
    if not missing:
        return False
    at_rest = overrides.read().at_rest
    for variable in [v for v in variables if v.name in missing or v.targets[0].id is None]:
        variables.remove(variable)  # it points at something deleted, which was at the same address
    for name, target in missing.items():
        variable = variables.new()
        variable.name, variable.type = name, "SINGLE_PROP" if "data_path" in target else "TRANSFORMS"
        for key, value in target.items():
            setattr(variable.targets[0], key, value)
    depsgraph = bpy.context.evaluated_depsgraph_get()
    for block in at_rest:
        if block.evaluated_get(depsgraph).is_evaluated:
            block.update_tag(refresh={"TIME"})  # otherwise its animation would count from the next frame on
    return True


def _targets(wanted: Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of the driver's variables, and what each points at."""
    obj, address = wanted.obj, f"{wanted.obj.as_pointer():x}"
    yield f"pose_{address}", {"id": obj}
    if obj.type == "CAMERA":
        yield f"camera_{address}", {"id_type": "CAMERA", "id": obj.data, "data_path": "lens"}
    if wanted.geometry:
        yield f"geometry_{address}", {"id": obj, "data_path": "dimensions[0]"}
    if wanted.bone:
        yield f"bone_{address}_{obj.pose.bones.find(wanted.bone)}", {"id": obj, "bone_target": wanted.bone}


def _points_at(variable: Any, target: dict[str, Any]) -> bool:
    return variable is not None and all(getattr(variable.targets[0], key) == value for key, value in target.items())


def _variables() -> Any:
    """The variables of the driver."""
    scene = bpy.context.scene
    if scene.get(_NAME) is None:
        block = bpy.data.linestyles.new(_NAME)  # any kind that can be driven will do
        block[_NAME] = 0.0
        block.driver_add(f'["{_NAME}"]').driver.type = "SUM"  # which needs no Python, and so no trust in the file
        scene[_NAME] = block
    return scene[_NAME].animation_data.drivers[0].driver.variables
