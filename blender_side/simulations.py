"""What Blender simulates frame by frame, and remembers: rigid bodies, cloth, soft bodies, particles, dynamic paint, fluids.

A change of the scene makes Blender forget what it simulated before. That fails where the frame changes in the same evaluation and
what changed acts from elsewhere (a force field, a collider): whether the change or the new frame reaches a simulation first is
chance, and the second of the two no longer counts. So what simulates is said to have changed itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import bpy

_MODIFIERS = ("CLOTH", "SOFT_BODY", "DYNAMIC_PAINT", "FLUID")


def limit(scene: Any, first: int, last: int) -> None:
    """Let everything be simulated over frames `first` to `last`, with memory of its own; what was baked stays.

    All of the file's: what instances show need not be an object of the scene.
    """
    for owner in _limited(scene):
        owner.frame_start, owner.frame_end = first, last
        if (
            isinstance(owner, bpy.types.PointCache)
            and owner.use_disk_cache
            and not (owner.is_baked or owner.use_external)
        ):
            owner.use_disk_cache = False  # instances of one file would share it
    for modifier in _modifiers("FLUID"):
        domain = modifier.domain_settings
        if modifier.fluid_type == "DOMAIN" and domain.cache_type == "REPLAY":
            domain.cache_frame_start, domain.cache_frame_end = first, last
            name = os.path.basename(os.path.normpath(domain.cache_directory))
            domain.cache_directory = os.path.join(bpy.app.tempdir, name)


def forget(scene: Any) -> None:
    """Have everything simulated anew from the frame that is evaluated next."""
    world = scene.rigidbody_world
    simulated = set(world.collection.objects if world and world.collection else ())
    simulated |= {modifier.id_data for modifier in _modifiers(*_MODIFIERS)}
    simulated |= {obj for obj in bpy.data.objects if obj.particle_systems}
    for obj in simulated:
        obj.update_tag(refresh={"OBJECT"})


def _limited(scene: Any) -> Iterator[Any]:
    """What has a range of frames of its own."""
    if scene.rigidbody_world:
        yield scene.rigidbody_world.point_cache
    for modifier in _modifiers("CLOTH", "SOFT_BODY"):
        yield modifier.point_cache
    for modifier in _modifiers("DYNAMIC_PAINT"):
        for surface in modifier.canvas_settings.canvas_surfaces if modifier.canvas_settings else ():
            yield from (surface, surface.point_cache)
    for obj in bpy.data.objects:
        for system in obj.particle_systems:
            yield system.point_cache


def _modifiers(*types: str) -> Iterator[Any]:
    return (modifier for obj in bpy.data.objects for modifier in obj.modifiers if modifier.type in types)
