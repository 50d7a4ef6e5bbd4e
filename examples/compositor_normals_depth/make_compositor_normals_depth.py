"""Makes compositor_normals_depth.blend: a floor, a camera above it, and a compositor that writes normals and depth.

    blender --background --factory-startup --python make_compositor_normals_depth.py

Run it with Blender 3.4, the oldest version supported: what it saves opens in every later one.
"""

from pathlib import Path

import bpy
from mathutils import Vector


def add_floor() -> None:
    bpy.ops.mesh.primitive_plane_add(size=40)
    bpy.context.active_object.name = "Floor"


def add_camera() -> None:
    bpy.ops.object.camera_add(location=(0, -7.5, 9))
    camera = bpy.context.active_object
    camera.name = "Camera"
    camera.data.lens = 40
    camera.rotation_euler = (Vector((0, -0.2, 0)) - camera.location).to_track_quat("-Z", "Y").to_euler()
    bpy.context.scene.camera = camera


def add_compositor(scene: bpy.types.Scene) -> None:
    """The render's depth and normals lead to slots of a File Output node. Scripts find both by their names."""
    view_layer = scene.view_layers[0]
    view_layer.use_pass_z = view_layer.use_pass_normal = True
    scene.use_nodes = True
    nodes, links = scene.node_tree.nodes, scene.node_tree.links
    nodes.clear()
    rendered = nodes.new("CompositorNodeRLayers")
    output = nodes.new("CompositorNodeOutputFile")
    output.name = output.label = "Geometry"
    output.location = (400, 0)
    output.format.file_format, output.format.color_depth = "OPEN_EXR_MULTILAYER", "32"
    output.base_path = "//tmp/geometry_####"
    output.layer_slots.clear()
    for slot, source in {"Normals": "Normal", "Depth": "Depth"}.items():
        output.layer_slots.new(slot)
        links.new(rendered.outputs[source], output.inputs[slot])


def main() -> None:
    bpy.ops.object.select_all(action="SELECT")
    bpy.ops.object.delete()
    bpy.ops.outliner.orphans_purge(do_recursive=True)
    add_floor()
    add_camera()

    scene = bpy.context.scene
    scene.name = "Supershapes"
    add_compositor(scene)
    # One ray through the middle of each pixel is all that geometry needs. On software OpenGL EEVEE takes far longer.
    scene.render.engine = "CYCLES"
    scene.cycles.samples, scene.cycles.use_denoising, scene.cycles.max_bounces = 1, False, 0
    scene.cycles.pixel_filter_type, scene.cycles.filter_width = "BOX", 0.01
    scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = 320, 240, 100
    bpy.ops.wm.save_as_mainfile(filepath=str(Path(__file__).with_name("compositor_normals_depth.blend")), compress=True)


main()
