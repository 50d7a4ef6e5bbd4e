"""Makes the ground truth of boxes that are placed, mirrored, sheared, deformed and instanced, and saves it with their matrices.

Each box is the cube from -1 to 1, times a matrix that is noted beside what was drawn: the test casts its own rays at it.
"""

import sys

import bpy
import numpy as np
from mathutils import Matrix

import blendtorch.btb as btb
from blender_side import compat

ALL = ("depth", "distance", "normals", "instance", "category", "flow_backward", "flow_forward", "boxes_2d")
out = btb.parse_blendtorch_args()[1][0]
scene = bpy.context.scene
mesh = bpy.data.objects["Cube"].data
for obj in [obj for obj in scene.objects if obj.type == "MESH"]:
    bpy.data.objects.remove(obj)
mesh.materials.clear()
lens = scene.camera.data
results = {"off_screen": compat.draws_off_screen()}


def add(name: str, data: object, collection: object = None, **placed: object) -> object:
    made = bpy.data.objects.new(name, data)
    (collection or scene.collection).objects.link(made)
    for attribute, value in placed.items():
        setattr(made, attribute, value)
    return made


def instance_on_points(size: float) -> object:
    """Geometry nodes that put a box on each vertex, and nothing else."""
    tree = bpy.data.node_groups.new("Scatter", "GeometryNodeTree")
    if hasattr(tree, "interface"):
        for direction in ("INPUT", "OUTPUT"):
            tree.interface.new_socket("Geometry", in_out=direction, socket_type="NodeSocketGeometry")
    else:
        tree.inputs.new("NodeSocketGeometry", "Geometry")
        tree.outputs.new("NodeSocketGeometry", "Geometry")
    nodes, links = tree.nodes, tree.links
    points, box, put, result = (
        nodes.new(kind)
        for kind in ("NodeGroupInput", "GeometryNodeMeshCube", "GeometryNodeInstanceOnPoints", "NodeGroupOutput")
    )
    box.inputs["Size"].default_value = (size, size, size)
    links.new(points.outputs[0], put.inputs["Points"])
    links.new(box.outputs["Mesh"], put.inputs["Instance"])
    links.new(put.outputs[0], result.inputs[0])
    return tree


# ---- the boxes, and the matrices from the cube to the world

turned = add("Turned", mesh)
mirrored = add("Mirrored", mesh, scale=(-0.6, 0.8, 0.5))
bent = add("Bent", None, scale=(1.5, 0.5, 0.8))
sheared = add("Sheared", mesh, parent=bent, scale=(0.5, 0.5, 0.5))
stretched = add("Stretched", mesh.copy(), scale=(0.4, 0.4, 0.4))
stretched.shape_key_add(name="Basis")
for point in stretched.shape_key_add(name="Long").data:
    point.co.x *= 2
rig = bpy.data.armatures.new("Rig")
armature = add("Armature", rig)
rigged = add("Rigged", mesh.copy(), scale=(0.5, 0.4, 0.6))
bpy.context.view_layer.objects.active = armature
bpy.ops.object.mode_set(mode="EDIT")
bone = rig.edit_bones.new("Bone")
bone.head, bone.tail = (0, 0, 0), (0.3, 0.2, 1)
bpy.ops.object.mode_set(mode="OBJECT")
rigged.vertex_groups.new(name="Bone").add(range(8), 1, "REPLACE")
rigged.modifiers.new("Armature", "ARMATURE").object = armature
things = bpy.data.collections.new("Things")
inner = add("Inner", mesh, things, scale=(0.3, 0.5, 0.4), rotation_euler=(0.5, 0.2, 0))
group = add("Group", None, instance_type="COLLECTION", instance_collection=things)
vertex = bpy.data.meshes.new("Vertex")
vertex.from_pydata([(0.5, 0.2, -0.1)], [], [])
scattered = add("Scattered", vertex)
scattered.modifiers.new("Nodes", "NODES").node_group = instance_on_points(0.8)


def matrices() -> dict[str, np.ndarray]:
    bpy.context.view_layer.update()
    pose = armature.pose.bones["Bone"]
    of_armature = (
        armature.matrix_world @ pose.matrix @ pose.bone.matrix_local.inverted() @ armature.matrix_world.inverted()
    )
    found = {obj.name: obj.matrix_world for obj in (turned, mirrored, sheared)}
    found["Stretched"] = stretched.matrix_world @ Matrix.Diagonal(
        (1 + stretched.data.shape_keys.key_blocks[1].value, 1, 1, 1)
    )
    found["Rigged"] = of_armature @ rigged.matrix_world
    found["Group/Inner#0"] = group.matrix_world @ inner.matrix_world
    found["Scattered#0.0"] = scattered.matrix_world @ Matrix.Translation((0.5, 0.2, -0.1)) @ Matrix.Scale(0.4, 4)
    return {name: np.array(matrix) for name, matrix in found.items()}


def pose(t: float) -> None:
    """Where everything is at time t."""
    turned.rotation_euler, turned.location = (0.3 + t, 0.5, 0.9), (0.4, -0.3 + t, 0.2)
    mirrored.rotation_euler, mirrored.location = (0.3, 0.2 - t, 0.1), (-2.4, 0.3, 0.6 - t)
    bent.rotation_euler, bent.location = (0.2, 0, 0.4), (2.6, 0.5 * t, 0.2)
    sheared.rotation_euler = (0.4, 0.6 + t, 0.5)
    stretched.location, stretched.data.shape_keys.key_blocks[1].value = (-1.0, 1.0, 1.8), 0.2 + 2 * t
    rigged.location = (1.4, 0.2, -1.6)
    armature.pose.bones["Bone"].location = (t, -0.5 * t, 0.3)
    armature.pose.bones["Bone"].rotation_euler, armature.pose.bones["Bone"].rotation_mode = (0, t, 0.1), "XYZ"
    group.location, group.rotation_euler = (-1.6 + t, -0.6, -1.5), (0, t, 0)
    scattered.location, scattered.rotation_euler = (1.0, 0, 2.0 - t), (t, 0.3, 0)


def place(camera: btb.Camera, look_from: tuple[float, float, float], **settings: object) -> None:
    defaults = dict(
        type="PERSP", lens=50, ortho_scale=8, shift_x=0, shift_y=0, sensor_fit="AUTO", clip_start=0.1, clip_end=100
    )
    aspect = settings.pop("aspect", 1.0)
    scene.render.pixel_aspect_x = aspect
    for name, value in {**defaults, **settings}.items():
        setattr(lens, name, value)
    camera.look_at((0, 0, 0.1), look_from=look_from)
    camera.update_proj_matrix()


def note(name: str, camera: btb.Camera, truth: dict[str, object], boxes: dict[str, np.ndarray]) -> None:
    for key, value in truth.items():
        results[f"{name} {key}"] = value
    results[f"{name} boxes"], results[f"{name} matrices"] = list(boxes), list(boxes.values())
    results[f"{name} view"], results[f"{name} projection"] = np.array(camera.view_matrix), np.array(camera.proj_matrix)


def shoot(name: str, shape: tuple[int, int], look_from: tuple[float, float, float], **settings: object) -> None:
    """Three frames: the things move, and the camera with another lens; then the camera alone."""
    camera = btb.Camera(shape=shape)
    truth = btb.GroundTruth(camera, ALL)
    pose(0)
    place(camera, look_from, **settings)
    note(f"{name} 0", camera, truth.render(), matrices())
    pose(0.1)
    x, y, z = look_from
    lens_now = {"lens": 1.1 * settings.get("lens", 50), "ortho_scale": 7.5}
    place(camera, (x + 0.3, y, z - 0.2), **{**settings, **lens_now})
    note(f"{name} 1", camera, truth.render(), matrices())
    place(camera, (x, y + 0.4, z), **settings)
    note(f"{name} 2", camera, truth.render(), matrices())


if compat.draws_off_screen():
    shoot("perspective", (150, 200), (4, -9, 3))
    shoot("shifted", (150, 200), (4, -9, 3), shift_x=0.12, shift_y=-0.08, sensor_fit="VERTICAL", lens=35, aspect=1.5)
    shoot("orthographic", (200, 150), (-5, -8, 2), type="ORTHO", shift_x=0.05)
    shoot("clipped", (150, 200), (4, -9, 3), clip_start=9.3, clip_end=11.5)

    # The face of a cube, looked at squarely.
    for obj in list(scene.objects):
        obj.hide_viewport = obj.type != "CAMERA"
    face = add("Face", mesh)
    for name, distance, settings in [
        ("4 m", 4, {}),
        ("50 m", 50, {"lens": 300}),
        ("500 m", 500, {"lens": 3000, "clip_end": 1000}),
        ("orthographic", 4, {"type": "ORTHO"}),
        ("orthographic 50 m", 50, {"type": "ORTHO"}),
    ]:
        camera = btb.Camera(shape=(120, 160))
        place(camera, (0, -1 - distance, 0), **settings)
        camera.look_at((0, 0, 0), look_from=(0, -1 - distance, 0))
        for key, value in btb.GroundTruth(camera, ("depth", "distance", "normals")).render().items():
            results[f"face {name} {key}"] = value
np.savez(out, **results)
print("renders", len(results), file=sys.stderr)
