"""What a script set on animated properties, in final renders.

A script may change what is animated: jitter a camera that hangs on an animated rig, say, or scale an animated lens. In the
viewport, that holds until the next frame. A final render evaluates all animation anew, and afterwards Blender has the viewport
do so, too: the picture would not show what the script set, and what comes after the picture would not find it any more. So for
the time of a render, F-curves of properties that have another value do not count.

But not all that has another value was set by the script. What Blender does not evaluate, because the view layer shows nothing
that depends on it, has the values of some frame before; there, the animation counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import bpy

from . import compat


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


class State(NamedTuple):
    """How data-blocks stand to their animation at this frame.

    Attributes:
        overrides: what the script set.
        at_rest: data-blocks that Blender does not evaluate, since nothing that the view layer shows depends on them: they have
            the values of some frame before.
    """

    overrides: list[_Override]
    at_rest: list[Any]


@contextmanager
def kept() -> Iterator[None]:
    """Have final renders show, and leave, what the script set.

    Not where actions are blended (NLA): who depends on it has to look whether it was shown.
    """
    overrides = read().overrides
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


def read() -> State:
    """Compare what is animated in this file with its animation, in the current view layer's evaluation."""
    depsgraph, frame = bpy.context.evaluated_depsgraph_get(), bpy.context.scene.frame_current_final
    blocks = list(_animated())
    is_known = [bool(block.evaluated_get(depsgraph).is_evaluated) for block in blocks]
    at_rest = [block for block, known in zip(blocks, is_known, strict=True) if not known]
    overrides = [o for block, known in zip(blocks, is_known, strict=True) if known for o in _differing(block, frame)]
    idle = _idle(overrides)
    return State([o for o in overrides if o.block not in idle], [*at_rest, *idle])


def _idle(overrides: list[_Override]) -> set[Any]:
    """Data-blocks that the evaluation has, and does not evaluate; such as what only a modifier needs that viewports leave out.

    Nothing says so but that their animation does not change them.
    """
    doubtful = [o for o in overrides if not (isinstance(o.block, bpy.types.Object) and o.block.visible_get())]
    if not doubtful:
        return set()
    for block in {o.block for o in doubtful}:
        block.update_tag(refresh={"TIME"})
    depsgraph = bpy.context.evaluated_depsgraph_get()
    changed = {o.block for o in doubtful if _value(o.block.evaluated_get(depsgraph), o.curve) != o.value}
    for override in doubtful:
        if override.block in changed:
            override.put_back()
    return {o.block for o in doubtful} - changed


def _differing(block: Any, frame: float) -> Iterator[_Override]:
    """What about a data-block has another value than its animation says."""
    animation = block.animation_data
    if animation.action is None or (animation.use_nla and animation.nla_tracks):
        return
    for curve in compat.curves(animation):
        value = None if curve.mute else _value(block, curve)
        if value is not None:
            owner, name = _place(block, curve)
            if _differs(owner, name, value, curve.evaluate(frame)):
                yield _Override(block, curve, owner, name, value)


def _value(block: Any, curve: Any) -> Any:
    """What a curve animates of a data-block, or None."""
    try:
        value = block.path_resolve(curve.data_path)
        return value[curve.array_index] if _is_array(value) else value
    except (ValueError, IndexError):  # nothing is there that it animates
        return None


def _is_array(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str)


def _differs(owner: Any, name: str | int, value: Any, curve: float) -> bool:
    """Whether a property has not the very value that Blender gives it where its curve has this one."""
    if isinstance(value, str):
        choices = owner.bl_rna.properties[name].enum_items if name in owner.bl_rna.properties else {}
        return value in choices and choices[value].value != int(curve)
    if isinstance(value, float):
        return value != curve
    return isinstance(value, int) and value != int(curve)


def _place(block: Any, curve: Any) -> tuple[Any, str | int]:
    """Where a property is, and its name: of ``'pose.bones["a"].location'`` that vector and an index."""
    path = curve.data_path
    value = block.path_resolve(path)
    if _is_array(value):
        return value, curve.array_index
    if path.endswith('"]'):
        before, _, name = path.rpartition('["')
        return (block.path_resolve(before) if before else block), f'["{name}'
    before, _, name = path.rpartition(".")
    return (block.path_resolve(before) if before else block), name


def _animated() -> Iterator[Any]:
    """The data-blocks of this file that have animation or drivers, each once."""
    seen = set()
    for kind in (p.identifier for p in bpy.data.bl_rna.properties if p.type == "COLLECTION"):
        blocks = [block for block in getattr(bpy.data, kind) if hasattr(block, "animation_data")]
        if blocks and hasattr(blocks[0], "node_tree"):
            blocks += [block.node_tree for block in blocks if getattr(block, "node_tree", None)]
        for block in blocks:
            if block.animation_data and block.as_pointer() not in seen:
                seen.add(block.as_pointer())
                yield block
