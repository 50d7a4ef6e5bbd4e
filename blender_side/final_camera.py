"""What final renders look through: the camera of the labels, from the same place, with the same lens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bpy
import numpy as np
from mathutils import Matrix

from blendtorch_shm.errors import ConfigurationError

from . import overrides
from .camera import Camera, inverse, is_same_pose, is_same_projection, world_to_camera
from .changes import Changes
from .panorama import described

_FARTHEST = 1e9
_AXES = 1e-4
"""What the length of a camera's axes may differ from 1."""


def look_through(changes: Changes, camera: Camera) -> None:
    """Make a render show what `camera` sees, in its size, and what the script set on animated properties.

    Blender's own camera makes the picture, so that its motion blur and rolling shutter are in it. Only a matrix that the script
    set needs a stand-in.

    Raises:
        ConfigurationError: a final render cannot have that projection, or Blender renders no picture of that size. At the end of
            `changes`: the picture was made from elsewhere.
    """
    scene, render = bpy.context.scene, bpy.context.scene.render
    height, width = camera.shape
    changes.enter_context(_agreeing(camera))
    changes.enter_context(overrides.kept())
    for marker in scene.timeline_markers:
        if marker.camera is not None:  # it would take over at its frame
            changes.set(scene, camera=scene.camera)  # which 5.2 changes with the marker
            changes.set(marker, camera=None)
    bpy_camera = camera.bpy_camera
    if camera.has_own_view:
        bpy_camera = _standing(changes, camera)
    if camera.has_own_projection:
        _project(changes, camera, bpy_camera)
    if scene.camera != bpy_camera:  # to set it, changed or not, costs Blender the building of its dependency graph anew
        changes.set(scene, camera=bpy_camera)
    changes.set(render, resolution_x=width, resolution_y=height, resolution_percentage=100, use_border=False)
    if (render.resolution_y, render.resolution_x) != (height, width):
        raise ConfigurationError(
            f"Blender renders no picture of {height} x {width} (height, width), the camera's shape: the nearest that it can is"
            f" {render.resolution_y} x {render.resolution_x}."
        )
    changes.set(render, use_multiview=False, use_sequencer=False)
    if render.use_single_layer:  # by which Blender means one layer in some renders, and another, or all, in others
        for layer in scene.view_layers:
            changes.set(layer, use=layer == bpy.context.view_layer)
        changes.set(render, use_single_layer=False)


def _standing(changes: Changes, camera: Camera) -> Any:
    """A camera with the same data that stands where the script has put it; sheared, if need be, as under a scaled parent."""
    name, data = camera.bpy_camera.name, camera.bpy_camera.data
    pose = inverse(camera.extrinsics("blender"))
    lengths = np.linalg.norm(pose[:3, :3], axis=0)
    if (np.abs(lengths - 1) > _AXES).any() or (np.abs(pose[3] - (0, 0, 0, 1)) > _AXES).any():
        raise ConfigurationError(
            "A final render cannot have this view_matrix: the camera's axes have length 1, what it sees is neither scaled nor"
            f" projected.\n{camera.view_matrix}"
        )
    foot, standing = bpy.data.objects.new(name, None), bpy.data.objects.new(name, data)
    changes.callback(bpy.data.batch_remove, (standing, foot))
    standing.parent, standing.matrix_parent_inverse = foot, Matrix(pose)
    return standing


def _project(changes: Changes, camera: Camera, bpy_camera: Any) -> None:
    """Give a camera data of its own, and the scene's pixels a shape, that make up the projection that the script set."""
    render = bpy.context.scene.render
    height, width = camera.shape
    is_orthographic = camera.type == "ORTHO"
    wanted = np.array(camera.proj_matrix, np.float64)
    wanted /= wanted[3, 3] if is_orthographic else -wanted[3, 2]
    a, b = wanted[0, 0], wanted[1, 1]
    near, far = camera.clip_range
    if not (a > 0 and b > 0 and 0 < near < far):
        raise _cannot_project(camera)
    lens = bpy_camera.data.copy()
    changes.callback(bpy.data.cameras.remove, lens)
    lens.animation_data_clear()
    aspect = a * width / (b * height)
    shift_x, shift_y = -wanted[:2, 3] / 2 if is_orthographic else wanted[:2, 2] / 2
    if is_orthographic:
        lens.ortho_scale = 2 / a
    else:
        sensor = lens.sensor_width
        if (
            lens.type == "PERSP"
        ):  # what it is across the picture; so the lens stays as it is where only the middle moves
            sensor = 2 * lens.lens / camera.proj_from_bpy(bpy_camera, camera.shape)[0][0]
        lens.sensor_width, lens.lens = sensor, a * sensor / 2
    lens.type, lens.sensor_fit = camera.type, "HORIZONTAL"
    lens.shift_x, lens.shift_y = shift_x, shift_y * aspect * height / width
    lens.clip_start, lens.clip_end = near, min(far, _FARTHEST)
    changes.set(bpy_camera, data=lens)
    changes.set(render, pixel_aspect_x=max(1.0, 1 / aspect), pixel_aspect_y=max(1.0, aspect))
    if not is_same_projection(camera.proj_from_bpy(bpy_camera, camera.shape), camera.proj_matrix):
        raise _cannot_project(camera)


def _cannot_project(camera: Camera) -> ConfigurationError:
    return ConfigurationError(
        "A final render cannot have this proj_matrix: a lens, a shift, a clip range and pixels of one shape do not make it up"
        f" (no skew, nothing mirrored, a clip range above 0).\n{camera.proj_matrix}"
    )


@contextmanager
def _agreeing(camera: Camera) -> Iterator[None]:
    """Look whether the renders within the context are made from where the camera is, and leave it there.

    Blender evaluates the frame anew for a render, and then once more for the viewport.
    """
    scene = bpy.context.scene
    frame = scene.frame_current_final
    height, width = camera.shape
    is_panoramic = camera.type not in ("PERSP", "ORTHO")
    view, projection = camera.extrinsics("blender"), None if is_panoramic else camera.proj_matrix.copy()
    clip_range = None if camera.has_own_projection else camera.clip_range
    lens = described(camera.bpy_camera.data)
    agree = []

    def look(of: Any, depsgraph: Any) -> None:
        if of == scene and depsgraph.mode == "RENDER" and scene.frame_current_final == frame:
            aspect = {"scale_x": scene.render.pixel_aspect_x, "scale_y": scene.render.pixel_aspect_y}
            eye = depsgraph.scene_eval.camera
            agree.append(is_same_pose(world_to_camera(eye), view))
            agree.append(clip_range in (None, (eye.data.clip_start, eye.data.clip_end)))
            if projection is None:
                agree.append(described(eye.data) == lens)
            else:
                found = eye.calc_matrix_camera(depsgraph, x=width, y=height, **aspect)
                agree.append(is_same_projection(found, projection))

    bpy.app.handlers.frame_change_post.append(look)
    try:
        yield
    finally:
        bpy.app.handlers.frame_change_post.remove(look)
    agree.append(is_same_pose(camera.extrinsics("blender"), view))
    agree.append(clip_range in (None, camera.clip_range))
    if projection is None:
        agree.append(described(camera.bpy_camera.data) == lens)
    else:
        agree.append(is_same_projection(camera.proj_matrix, projection))
    if not all(agree):
        raise ConfigurationError(
            f"Blender did not render from where the camera {camera.bpy_camera.name!r} was, or it was elsewhere afterwards: it"
            " evaluates the frame anew for a render. What the script has changed about the camera, or what the camera depends"
            " on, is lost if actions are blended there (NLA). To keep it, set it as the script's own: camera.view_matrix ="
            " camera.view_matrix, and likewise proj_matrix."
        )
