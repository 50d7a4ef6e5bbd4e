"""What a script set on animated properties, in final renders.

A script may change what is animated: jitter a camera that hangs on an animated rig, say, or scale an animated lens. In the
viewport, that holds until the next frame. A final render evaluates all animation anew, and afterwards Blender has the viewport
do so, too: the picture would not show what the script set, and what comes after the picture would not find it any more. So for
the time of a render, F-curves of properties that have another value do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import bpy

from . import compat, poses


class _Override(NamedTuple):
    """A value that differs from what the animation says."""

    block: Any
    curve: Any
    owner: Any
    name: str | int
    value: Any

    def put_back(self) -> None:
        if isinstance(self.name, str) and not self.name.startswith('["'):
            setattr(self.owner, self.name, self.value)
        else:
            self.owner[self.name if isinstance(self.name, int) else self.name[2:-2]] = self.value
        self.block.update_tag()  # of a custom property Blender does not notice it


@contextmanager
def kept() -> Iterator[None]:
    """Have final renders show, and leave, what the script set.

    Not where actions are blended (NLA): who depends on it has to look whether it was shown.
    """
    overrides = list(_overrides(bpy.context.scene.frame_current_final))
    try:
        for override in overrides:
            override.curve.mute = True
        yield
    finally:
        if overrides:
            for override in overrides:
                override.curve.mute = False
            bpy.context.evaluated_depsgraph_get()  # in which Blender evaluates those curves
            for override in overrides:
                override.put_back()


def _overrides(frame: float) -> Iterator[_Override]:
    for block in filter(poses.is_evaluated, poses.animated()):  # others have the values of some frame before
        animation = block.animation_data
        if animation.action is None or (animation.use_nla and animation.nla_tracks):
            continue
        for curve in compat.curves(animation):
            if curve.mute:
                continue
            try:
                value = block.path_resolve(curve.data_path)
                is_array = hasattr(value, "__len__") and not isinstance(value, str)
                single = value[curve.array_index] if is_array else value
            except (ValueError, IndexError):  # nothing is there that it animates
                continue
            owner, name = (value, curve.array_index) if is_array else _place(block, curve.data_path)
            if _differs(owner, name, single, curve.evaluate(frame)):
                yield _Override(block, curve, owner, name, single)


def _differs(owner: Any, name: str | int, value: Any, curve: float) -> bool:
    """Whether a property has not the very value that Blender gives it where its curve has this one."""
    if isinstance(value, str):
        choices = owner.bl_rna.properties[name].enum_items if name in owner.bl_rna.properties else {}
        return value in choices and choices[value].value != int(curve)
    if isinstance(value, float):
        return value != curve
    return isinstance(value, int) and value != int(curve)


def _place(block: Any, path: str) -> tuple[Any, str | int]:
    """Where a property is, and its name: of ``'pose.bones["a"].location'`` that bone and ``'location'``."""
    if path.endswith('"]'):
        before, _, name = path.rpartition('["')
        return (block.path_resolve(before) if before else block), f'["{name}'
    before, _, name = path.rpartition(".")
    return (block.path_resolve(before) if before else block), name
