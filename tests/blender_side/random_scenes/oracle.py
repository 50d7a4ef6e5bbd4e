"""What is right, by Blender's own final renders (F12), inside Blender. Knows nothing of the product.

Two renders with files of their own: the picture, by the engine in question, and rasters, by Cycles with one sample in the middle
of each pixel. ``reading.py`` reads them, outside. For boxes around whole objects, each is rendered alone, finer and with more
samples.
"""

from __future__ import annotations

from typing import Any

import bpy
import numpy as np

from . import building
from .pixels import FINER


def right(pictured: dict[str, Any], labelled: dict[str, Any], standing: dict[str, Any], path: str) -> dict[str, Any]:
    """All that is right, by three descriptions; where they are the same, one scene serves.

    Args:
        pictured: whose final render shows what the product's picture is to show: `path`.exr (light), `path`.png (as displayed).
        labelled: the same for a final render of Cycles, for rasters: `path`.rasters.exr, and for each object alone `path`.3.exr.
        standing: with everything shown, for where camera and objects are.
    """
    _open(standing)
    found = _poses()
    if pictured != standing:
        _open(pictured)
    _render_picture(path)
    if labelled != pictured:
        _open(labelled)
    return found | _render_rasters(path)


def _open(description: dict[str, Any]) -> None:
    building.build(description)
    building.go_on(description)


def _render_picture(path: str) -> None:
    scene = bpy.context.scene
    _multilayer(scene.render.image_settings)
    scene.render.filepath = f"{path}.exr"
    bpy.ops.render.render(write_still=True)
    settings = scene.render.image_settings
    if hasattr(settings, "media_type"):
        settings.media_type = "IMAGE"
    settings.file_format, settings.color_mode, settings.color_depth = "PNG", "RGBA", "8"
    bpy.data.images["Render Result"].save_render(f"{path}.png")


def _render_rasters(path: str) -> dict[str, Any]:
    numbers = {
        obj.name: obj.pass_index for obj in bpy.data.objects if obj.pass_index and not obj.name.startswith("original")
    }
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.render.film_transparent, scene.render.use_motion_blur = True, False
    override = bpy.data.materials.new("override")
    if not override.node_tree:
        override.use_nodes = True
    nodes = override.node_tree.nodes
    nodes.clear()
    info, out = nodes.new("ShaderNodeObjectInfo"), nodes.new("ShaderNodeOutputAOV")
    out.aov_name = "Place"
    links = override.node_tree.links
    links.new(info.outputs["Location"], out.inputs["Color"])
    # What reflects has its normals turned to the viewer where they would reflect light from below the surface.
    links.new(nodes.new("ShaderNodeEmission").outputs[0], nodes.new("ShaderNodeOutputMaterial").inputs["Surface"])
    for layer in scene.view_layers:
        layer.material_override = override
        layer.use_pass_object_index = layer.use_pass_z = layer.use_pass_normal = layer.use_pass_position = True
        aov = layer.aovs.add()
        aov.name, aov.type = "Place", "COLOR"
    _multilayer(scene.render.image_settings)
    scene.render.filepath = f"{path}.rasters.exr"
    bpy.ops.render.render(write_still=True)
    scene.render.resolution_x *= FINER
    scene.render.resolution_y *= FINER
    scene.cycles.samples, scene.cycles.pixel_filter_type = 16, "BOX"  # all over the pixel, or it would miss tips
    camera_sees = {obj: obj.visible_camera for obj in bpy.data.objects if obj.pass_index}
    alone = []
    for name, number in numbers.items():
        chosen = bpy.data.objects[name]
        if not camera_sees[chosen]:
            continue
        for obj in camera_sees:
            obj.visible_camera = obj.pass_index == number
        scene.render.filepath = f"{path}.{number}.exr"
        bpy.ops.render.render(write_still=True)
        alone.append(number)
    layer = next(layer.name for layer in scene.view_layers if layer.use)
    return {"numbers": numbers, "layer": layer, "alone": alone}


def _poses() -> dict[str, Any]:
    scene = bpy.context.scene
    depsgraph = bpy.context.evaluated_depsgraph_get()
    data, render = scene.camera.evaluated_get(depsgraph).data, scene.render
    return {
        "camera": np.array(scene.camera.evaluated_get(depsgraph).matrix_world, np.float64),
        "lens": {
            "type": data.type, "lens": data.lens, "ortho_scale": data.ortho_scale, "fit": data.sensor_fit,
            "sensor": (data.sensor_width, data.sensor_height), "shift": (data.shift_x, data.shift_y),
            "aspect": (render.pixel_aspect_x, render.pixel_aspect_y), "clip": (data.clip_start, data.clip_end),
        },
        "objects": {
            obj.name: np.array(obj.evaluated_get(depsgraph).matrix_world, np.float64)
            for obj in bpy.data.objects
            if obj.name.startswith("object ")
        },
    }  # fmt: skip


def _multilayer(settings: Any) -> None:
    if hasattr(settings, "media_type"):
        settings.media_type = "MULTI_LAYER_IMAGE"
    settings.file_format = "OPEN_EXR_MULTILAYER"
    settings.color_depth, settings.exr_codec = "32", "NONE"
