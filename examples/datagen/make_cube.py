"""Makes cube.blend: a cube with six colours above a round floor, a sun, a sky and a camera.

    blender --background --factory-startup --python make_cube.py

Run it with Blender 3.4, the oldest version supported: what it saves opens in every later one.
"""

from math import radians
from pathlib import Path

import bpy
from mathutils import Vector

# One material per face, as display (sRGB) colours, in the order of the outward normals +x, -x, +y, -y, +z, -z.
FACES = {
    "Red": (0.85, 0.12, 0.10),
    "Cyan": (0.10, 0.70, 0.75),
    "Green": (0.15, 0.65, 0.20),
    "Magenta": (0.75, 0.15, 0.65),
    "Blue": (0.12, 0.25, 0.85),
    "Yellow": (0.95, 0.75, 0.10),
}
NORMALS = [Vector(v) for v in [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]]


def linear(srgb: float) -> float:
    """IEC 61966-2-1."""
    return srgb / 12.92 if srgb <= 0.04045 else ((srgb + 0.055) / 1.055) ** 2.4


def material(name: str, srgb: tuple[float, float, float]) -> bpy.types.Material:
    """A matt surface; a plain diffuse shader takes software OpenGL half the time that the Principled one does."""
    made = bpy.data.materials.new(name)
    made.use_nodes = True
    nodes, links = made.node_tree.nodes, made.node_tree.links
    color = (*map(linear, srgb), 1.0)
    surface = nodes.new("ShaderNodeBsdfDiffuse")
    surface.inputs["Color"].default_value = color
    links.new(surface.outputs["BSDF"], nodes["Material Output"].inputs["Surface"])
    nodes.remove(nodes["Principled BSDF"])
    made.diffuse_color = color  # what solid shading shows
    return made


def look_at(obj: bpy.types.Object, target: Vector) -> None:
    obj.rotation_euler = (target - obj.location).to_track_quat("-Z", "Y").to_euler()


def add_cube() -> None:
    bpy.ops.mesh.primitive_cube_add(size=2)
    cube = bpy.context.active_object
    cube.name = cube.data.name = "Cube"
    for name, srgb in FACES.items():
        cube.data.materials.append(material(name, srgb))
    for polygon in cube.data.polygons:
        polygon.material_index = max(range(6), key=lambda i: polygon.normal.dot(NORMALS[i]))
    cube.rotation_euler = (radians(20), radians(15), radians(25))


def add_floor() -> None:
    bpy.ops.mesh.primitive_circle_add(
        vertices=96, radius=3.4, fill_type="NGON", location=(0, 0, -1.8)
    )  # the cube turns freely above it
    floor = bpy.context.active_object
    floor.name = floor.data.name = "Floor"
    floor.data.materials.append(material("Floor", (0.78, 0.76, 0.72)))


def add_sun() -> None:
    bpy.ops.object.light_add(type="SUN", location=(2.5, -3.5, 6))
    sun = bpy.context.active_object
    sun.name = sun.data.name = "Sun"
    sun.data.energy = 2.2
    look_at(sun, Vector((0, 0, 0)))


def add_camera() -> None:
    bpy.ops.object.camera_add(location=(5.7, -7.0, 4.8))
    camera = bpy.context.active_object
    camera.name = camera.data.name = "Camera"
    camera.data.lens = 50
    look_at(camera, Vector((0, 0, -0.15)))
    bpy.context.scene.camera = camera


def main() -> None:
    bpy.ops.object.select_all(action="SELECT")
    bpy.ops.object.delete()
    bpy.ops.outliner.orphans_purge(do_recursive=True)

    add_floor()
    add_sun()
    add_camera()
    add_cube()

    scene = bpy.context.scene
    scene.world.node_tree.nodes["Background"].inputs["Color"].default_value = (*map(linear, (0.52, 0.60, 0.70)), 1.0)
    scene.world.node_tree.nodes["Background"].inputs["Strength"].default_value = 0.9
    scene.view_settings.view_transform = "Standard"
    scene.render.engine = "BLENDER_EEVEE"
    scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = 640, 480, 100
    scene.eevee.taa_samples = scene.eevee.taa_render_samples = 1  # many times faster on software OpenGL
    scene.frame_start, scene.frame_end = 0, 100
    bpy.ops.wm.save_as_mainfile(filepath=str(Path(__file__).with_name("cube.blend")), compress=True)


main()
