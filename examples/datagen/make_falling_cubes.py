"""Makes falling_cubes.blend from cube.blend: six cubes that are rigid bodies, above a floor that they can land on.

    blender --background --factory-startup --python make_falling_cubes.py

Run it with Blender 3.4, the oldest version supported: what it saves opens in every later one.
"""

from pathlib import Path

import bpy
from mathutils import Vector

HERE = Path(__file__).parent
NUM_CUBES = 6


def look_at(obj: bpy.types.Object, target: Vector) -> None:
    obj.rotation_euler = (target - obj.location).to_track_quat("-Z", "Y").to_euler()


def object_color() -> bpy.types.Material:
    """A matt surface in the colour of the object that has it, which a script sets without touching the material."""
    made = bpy.data.materials.new("Object color")
    made.use_nodes = True
    nodes, links = made.node_tree.nodes, made.node_tree.links
    surface, info = nodes.new("ShaderNodeBsdfDiffuse"), nodes.new("ShaderNodeObjectInfo")
    links.new(info.outputs["Color"], surface.inputs["Color"])
    links.new(surface.outputs["BSDF"], nodes["Material Output"].inputs["Surface"])
    nodes.remove(nodes["Principled BSDF"])
    return made


def add_rigid_body(obj: bpy.types.Object, kind: str, shape: str) -> None:
    bpy.context.view_layer.objects.active = obj
    bpy.ops.rigidbody.object_add(type=kind)
    obj.rigid_body.collision_shape = shape
    obj.rigid_body.friction = 0.7
    obj.rigid_body.restitution = 0.25


def add_cubes() -> None:
    material = object_color()
    for i in range(NUM_CUBES):
        bpy.ops.mesh.primitive_cube_add(size=1, location=(i % 3 - 1, i // 3 - 0.5, 2))
        cube = bpy.context.active_object
        cube.name = cube.data.name = f"Cube {i}"
        cube.data.materials.append(material)
        add_rigid_body(cube, "ACTIVE", "BOX")


def set_stage() -> None:
    floor = bpy.data.objects["Floor"]
    floor.location, floor.scale = (0, 0, 0), (1.6, 1.6, 1)
    add_rigid_body(floor, "PASSIVE", "MESH")
    floor.rigid_body.use_margin, floor.rigid_body.collision_margin = True, 0.0  # else cubes come to rest 4 cm above it
    camera = bpy.data.objects["Camera"]
    camera.location = (3.6, -6.9, 4.2)
    look_at(camera, Vector((0, 0, 1.3)))


def main() -> None:
    bpy.ops.wm.open_mainfile(filepath=str(HERE / "cube.blend"))
    bpy.data.objects.remove(bpy.data.objects["Cube"])
    bpy.ops.outliner.orphans_purge(do_recursive=True)
    bpy.ops.rigidbody.world_add()
    set_stage()
    add_cubes()
    bpy.ops.object.select_all(action="DESELECT")
    bpy.ops.wm.save_as_mainfile(filepath=str(HERE / "falling_cubes.blend"), compress=True)


main()
