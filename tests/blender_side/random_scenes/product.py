"""What the product makes of a scene, inside Blender."""

from __future__ import annotations

import inspect
import os
from typing import Any

import bpy
import numpy as np

import blendtorch.btb as btb
from blendtorch_shm.errors import BlendtorchError

from . import building

RASTERS = ("depth", "distance", "normals", "instance")
LABELS = ("boxes_2d", "boxes_2d_full", "boxes_3d", "keypoints", "camera")


class Made:
    """The objects that a script keeps."""

    def __init__(self, description: dict[str, Any]) -> None:
        renderer = description["renderer"]
        self.camera = btb.Camera()
        if renderer.endswith("final"):
            self.renderer = btb.FinalRenderer(self.camera, color_space="srgb")
        else:
            self.renderer = btb.OffScreenRenderer(self.camera, color_space="linear" if renderer == "SOLID" else "srgb")
            self.renderer.set_render_style("SOLID" if renderer == "SOLID" else "RENDERED")
        self.light = btb.FinalRenderer(self.camera, dtype="float32") if renderer.endswith("final") else None
        keypoints = {obj.name: obj for obj in bpy.data.objects if obj.name.startswith("object ")}
        panoramic = self.camera.type == "PANO"
        passes = (*RASTERS, *(name for name in LABELS if not (panoramic and name == "camera")))
        options = {"renderer": self.renderer} if "renderer" in inspect.signature(btb.GroundTruth).parameters else {}
        self.truth = btb.GroundTruth(self.camera, passes, keypoints=keypoints, **options)


def make(description: dict[str, Any], folder: str, position: Any) -> dict[str, Any]:
    """Pictures, labels and projections of the last frame; or what the product said against it."""
    file = description["file"]
    building.build(description)
    try:
        if file:
            path = os.path.join(folder, "scene.blend")
            bpy.ops.wm.save_as_mainfile(filepath=path)
            if file == "kept across a load":
                others = [
                    {**obj, "kind": "cone" if obj["kind"] == "cube" else "cube"} for obj in description["objects"]
                ]
                building.build({**description, "objects": others})
                made = Made(description)
                made.truth.render()
                made.renderer.render()
            bpy.ops.wm.open_mainfile(filepath=path)
        if file == "kept across a load":
            made.camera = made.truth.camera = made.renderer.camera = btb.Camera()
            if made.light:
                made.light.camera = made.camera
        else:
            made = Made(description)
        _own_projection(made.camera, description["camera"]["own_shift"])
        if description["episodes"] > 1:
            _play(description)
        else:
            building.go_on(description)
        found: dict[str, Any] = {"picture": np.array(made.renderer.render())}
        found |= {name: _own(value) for name, value in made.truth.render().items()}
        if made.light:
            found["light"] = np.array(made.light.render())
        found["again"] = np.array(made.truth.render()["instance"])
        found["pixels"] = (
            made.camera.ndc_to_pixel(made.camera.world_to_ndc(position)) if len(position) else np.empty((0, 2))
        )
        found["in view"] = made.camera.in_view(position) if len(position) else np.empty(0, bool)
        return found
    except BlendtorchError as error:
        return {"refused": f"{type(error).__name__}: {error}"}


_RIGHT = btb.GroundTruth.render, btb.FinalRenderer.render


def plant(mistake: str) -> None:
    """Make the product wrong, so that it can be seen that this is found; "none" makes it right again."""
    render, draw = _RIGHT
    before: list[dict[str, Any]] = []

    def wrong_labels(truth: Any) -> dict[str, Any]:
        found = render(truth)
        if mistake == "mask one pixel aside":
            found["instance"] = np.roll(found["instance"], 1, axis=1)
        elif mistake == "depth 1 % off":
            found["depth"] = found["depth"] * 1.01
        elif mistake == "normals of the world":
            found["normals"] = found["normals"] @ np.array(truth.camera.view_matrix)[:3, :3]
        elif mistake == "boxes of half the size":
            found["boxes_3d"] = 0.75 * found["boxes_3d"] + 0.25 * found["boxes_3d"].mean(axis=1, keepdims=True)
        elif mistake == "keypoints half a pixel aside":
            found["keypoints"][:, 0] += 0.5
        elif mistake == "labels of the frame before":
            before.append(found)
            found = before.pop(0) if len(before) > 2 else found  # the scene's own is made twice
        return found

    def wrong_picture(renderer: Any) -> Any:
        picture = draw(renderer)
        return picture[:, ::-1] if mistake == "picture turned around" else picture

    btb.GroundTruth.render, btb.FinalRenderer.render = wrong_labels, wrong_picture


def _play(description: dict[str, Any]) -> None:
    """Play episodes to the last frame, each with a field of its own; labels are made after the last one."""
    animation, fields = btb.AnimationController(), iter(building.EPISODES)
    animation.pre_animation.add(lambda: building.set_field(next(fields)))
    animation.play((1, description["frames"][-1]), num_episodes=len(building.EPISODES), use_animation=False)
    building.touch(description)


def _own_projection(camera: Any, shift: tuple[float, float]) -> None:
    """Move the principal point, as for a measured camera, in units of the sensor's fit (see ``comparison.project``)."""
    if not any(shift):
        return
    projection, render, data = camera.proj_matrix.copy(), bpy.context.scene.render, camera.bpy_camera.data
    wide, high = building.WIDTH * render.pixel_aspect_x, building.HEIGHT * render.pixel_aspect_y
    length = wide if data.sensor_fit == "HORIZONTAL" or (data.sensor_fit == "AUTO" and wide >= high) else high
    for row, (part, size) in enumerate(zip(shift, (wide, high), strict=True)):
        if data.type == "ORTHO":
            projection[row][3] -= 2 * part * length / size
        else:
            projection[row][2] += 2 * part * length / size
    camera.proj_matrix = projection


def _own(value: Any) -> Any:
    return np.array(value) if isinstance(value, np.ndarray) else value
