"""Labels scenes whose answers are known by other means, and saves both as one .npz file.

Rasters of depth and numbers come from one ray through the middle of each pixel, so nothing here needs a GPU.
"""

import itertools
import math
import sys

import bmesh
import bpy
import numpy as np
from mathutils import Vector

import blendtorch.btb as btb
from blender_side import compat
from blender_side.evaluation import Evaluation
from blender_side.ground_truth.labels import (
    Keypoints,
    Points,
    boxes_3d,
    full_boxes,
    project,
    tight_boxes,
)
from blender_side.ground_truth.scene import Row, SceneReader
from blendtorch_shm.errors import ConfigurationError

out = btb.parse_blendtorch_args()[1][0]
scene = bpy.context.scene
cube, floor = bpy.data.objects["Cube"], bpy.data.objects["Floor"]
bpy.data.objects.remove(floor)
lens = scene.camera.data
reader = SceneReader(None, None)
results = {}


def read() -> list:
    return reader.read(
        bpy.context.evaluated_depsgraph_get(), Evaluation(False, compat.WORKBENCH, "SOLID"), normals=False
    )


def add(name: str, data: object, **placed: object) -> object:
    made = bpy.data.objects.new(name, data)
    scene.collection.objects.link(made)
    for attribute, value in placed.items():
        setattr(made, attribute, value)
    return made


def mesh_of(name: str, make: object, **arguments: object) -> object:
    shape = bmesh.new()
    make(shape, **arguments)
    mesh = bpy.data.meshes.new(name)
    shape.to_mesh(mesh)
    return mesh


def look(look_from: tuple, look_at: tuple = (0, 0, 0), shape: tuple = (72, 96), **settings: object) -> btb.Camera:
    defaults = dict(type="PERSP", lens=50, ortho_scale=7, shift_x=0, shift_y=0, clip_start=0.1, clip_end=100)
    for name, value in {**defaults, **settings}.items():
        setattr(lens, name, value)
    camera = btb.Camera(shape=shape)
    camera.look_at(look_at, look_from=look_from)
    return camera


def only(*shown: object) -> None:
    for obj in scene.objects:
        obj.hide_viewport = obj.type in ("MESH", "FONT") and obj not in shown
    bpy.context.view_layer.update()


def cast(camera: btb.Camera) -> tuple[np.ndarray, np.ndarray, list]:
    """Depth, numbers of what is seen, and what is drawn."""
    drawn = read()
    numbers = {thing.object: thing.id for thing in drawn}
    depsgraph = bpy.context.evaluated_depsgraph_get()
    height, width = camera.shape
    depth, mask = np.full(camera.shape, np.inf, np.float32), np.zeros(camera.shape, np.uint16)
    to_world = np.linalg.inv(camera.extrinsics())
    ways = np.linalg.inv(camera.intrinsics) @ [0.5, 0.5, 1], np.linalg.inv(camera.intrinsics)
    near, far = camera.clip_range
    for row, column in itertools.product(range(height), range(width)):
        x, y, _ = ways[1] @ (column + 0.5, row + 0.5, 1)
        if camera.type == "ORTHO":
            start, stop = np.array((x, y, near)), np.array((x, y, far))
        else:
            start, stop = np.array((x, y, 1)) * near, np.array((x, y, 1)) * far
        origin, end = ((to_world @ (*point, 1))[:3] for point in (start, stop))
        hit, place, _, _, obj, _ = scene.ray_cast(
            depsgraph, origin, end - origin, distance=np.linalg.norm(end - origin)
        )
        if hit:
            depth[row, column] = camera.world_to_ndc(place, return_depth=True)[1][0]
            mask[row, column] = numbers[obj]
    return depth, mask, drawn


def rows(things: list) -> list:
    """Each thing by itself; None: a row of what is not there."""
    return [Row(i, str(i), 0, [] if thing is None else [thing]) for i, thing in enumerate(things)]


def located(keypoints: Keypoints, drawn: list) -> Points:
    return keypoints.locate(drawn, reader.shown, bpy.context.evaluated_depsgraph_get())


def both(name: str, camera: btb.Camera, points: dict) -> None:
    """Keypoints by raster and by rays."""
    depth, _, drawn = cast(camera)
    keypoints = Keypoints(points)
    points = located(keypoints, drawn)
    xyz = points.xyz
    results[f"{name}: by raster"] = project(points, camera, drawn, depth)
    results[f"{name}: by rays"] = project(points, camera, drawn, None)
    results[f"{name}: in view"] = seen = camera.in_view(xyz)
    results[f"{name}: xy in view"] = camera.ndc_to_pixel(camera.world_to_ndc(xyz[seen]))


def vertices_of(obj: object) -> dict:
    return {f"{obj.name} {i}": (obj, i) for i in range(len(obj.data.vertices))}


def cosines(camera: btb.Camera, obj: object, normals: np.ndarray) -> np.ndarray:
    """Between the surface's normals at the vertices of an unrotated object and the way to the camera."""
    eye = np.array(camera.view_matrix.inverted())
    towards = (
        eye[:3, 3] - btb.utils.world_coordinates(obj)
        if camera.type == "PERSP"
        else np.tile(eye[:3, 2], (len(normals), 1))
    )
    return (towards * normals).sum(axis=1) / np.linalg.norm(towards, axis=1)


# Cube corners.

cube.location = cube.rotation_euler = (0, 0, 0)
only(cube)
for kind, (name, eye) in itertools.product(
    ("PERSP", "ORTHO"), {"three faces": (4, -5, 3), "two faces": (5, -6, 0.3), "one face": (0.2, -9, 0.1)}.items()
):
    if kind == "ORTHO" and name != "three faces":
        continue  # there, hidden corners are where visible ones are
    camera = look(eye, type=kind)
    both(f"{name}, {kind}", camera, vertices_of(cube))
    sides = np.sign(btb.utils.world_coordinates(cube))
    eye_at = np.array(camera.view_matrix.inverted())[:3, 3 if kind == "PERSP" else 2]
    faces = sides * eye_at > (1 if kind == "PERSP" else 0)
    results[f"{name}, {kind}: is visible"] = faces.any(axis=1)

# Something else before them.

wall = add(
    "Wall", mesh_of("Wall", bmesh.ops.create_grid, size=1), location=(1, -4, 0), rotation_euler=(math.pi / 2, 0, 0)
)
only(cube, wall)
both("half behind a wall", look((0.2, -9, 0.1)), vertices_of(cube))
x, y, _ = btb.utils.world_coordinates(cube).T
results["half behind a wall: is visible"] = (x < 0) & (y < 0)
wall.hide_viewport = True
both("behind a hidden wall", look((0.2, -9, 0.1)), vertices_of(cube))

# Curved and steep.

sphere = add("Sphere", mesh_of("Sphere", bmesh.ops.create_uvsphere, u_segments=32, v_segments=16, radius=1))
only(sphere)
for kind in ("PERSP", "ORTHO"):
    camera = look((3, -4, 2), type=kind)
    both(f"sphere, {kind}", camera, vertices_of(sphere))
    results[f"sphere, {kind}: cosine"] = cosines(camera, sphere, btb.utils.object_coordinates(sphere))

ground = add("Ground", mesh_of("Ground", bmesh.ops.create_grid, x_segments=20, y_segments=20, size=5))
only(ground)
both("ground at a grazing angle", look((0, -8, 0.3)), vertices_of(ground))
both("ground from below", look((0, -8, -0.3)), vertices_of(ground))

room = add("Room", mesh_of("Room", bmesh.ops.create_cube, size=1), scale=(6, 8, 3))
outside = [
    add(f"Outside {i}", None, location=(x, y, z))
    for i, (x, y, z) in enumerate([(3.6, 2, 0), (0, 4.6, 0), (0, 2, -2.1)])
]
inside = [add(f"Inside {i}", None, location=place) for i, place in enumerate([(2.9, 2, 0), (0, 3.9, 0), (0, 2, -1.4)])]
only(room)
camera = look((0.4, -3.5, 0.3), (0, 4, 0), lens=18)
both("inside a room", camera, vertices_of(room) | {obj.name: obj for obj in [*inside, *outside]})

# Not in view.

only(cube)
camera = look((0, -5, 0), clip_start=2, clip_end=9)
places = {
    "in view": (0, -2, 0),
    "left of the image": (-3, 0, 0),
    "above the image": (0, 0, 3),
    "behind the camera": (0, -8, 0),
    "in the camera": (0, -5, 0),
    "nearer than the clip range": (0, -3.5, 0),
    "beyond the clip range": (0, 6, 0),
}
empties = {name: add(name, None, location=place) for name, place in places.items()}
both("in and out", camera, empties)
results["in and out: names"] = list(places)

# Kinds of points.

camera = look((4, -5, 3))
cube.location, cube.rotation_euler, cube.scale = (0.3, 0.2, -0.1), (0.2, 0.4, 0.6), (1, 0.7, 1.2)
subdivided = cube.modifiers.new("Subdivided", "SUBSURF")
subdivided.subdivision_type, subdivided.levels = "SIMPLE", 1
armature = add("Armature", bpy.data.armatures.new("Armature"), location=(0.5, 0, 1))
bpy.context.view_layer.objects.active = armature
bpy.ops.object.mode_set(mode="EDIT")
upper, lower = armature.data.edit_bones.new("Upper"), armature.data.edit_bones.new("Lower")
upper.head, upper.tail = (0, 0, 0), (0, 0, 1)
lower.head, lower.tail, lower.parent = (0, 0, 1), (0, 0, 2), upper
bpy.ops.object.mode_set(mode="OBJECT")
armature.pose.bones["Upper"].rotation_mode = "XYZ"
armature.pose.bones["Upper"].rotation_euler = (0, 0, math.pi / 2)  # to the left: a bone points along its own y
armature.pose.bones["Upper"].scale = (1, 0.5, 1)
helper = add("Helper", None, location=(0.7, 0.8, 0.9))
points = Keypoints(
    {
        "vertex": (cube, 3),
        "vertex that a modifier made": (cube, np.int64(25)),
        "place": (cube, (1, 0.5, -0.5)),
        "empty": helper,
        "bone": (armature, "Lower"),
    }
)
bpy.context.view_layer.update()
_, _, drawn = cast(camera)
vertices = btb.utils.world_coordinates(cube)
results["kinds: names"] = points.names
results["kinds: with what is drawn"] = located(points, drawn).xyz
results["kinds: without"] = located(points, []).xyz
results["kinds: expected"] = [
    vertices[3],
    vertices[25],
    cube.matrix_world @ Vector((1, 0.5, -0.5)),
    (0.7, 0.8, 0.9),
    (0, 0, 1),
]

wrong = {
    "a string": {"nose": "Cube"},
    "no such bone": {"elbow": (armature, "Middle")},
    "a bone of a mesh": {"elbow": (cube, "Lower")},
    "two numbers": {"nose": (cube, (1, 2))},
    "no such vertex": {"nose": (cube, 26)},
    "a negative vertex": {"nose": (cube, -1)},
    "a vertex of an empty": {"nose": (helper, 0)},
}
for name, point in wrong.items():
    for how, things in {"": drawn, ", not drawn": []}.items():
        try:
            located(Keypoints(point), things)
        except ConfigurationError as error:
            results[f"wrong: {name}{how}"] = str(error)

doomed = add("Doomed", None, location=(0, 0, 2))
pencils = getattr(bpy.data, "grease_pencils_v3", bpy.data.grease_pencils)  # which 4.3 to 4.5 have beside annotations
pencil = add("Pencil", pencils.new("Pencil"), location=helper.location)
points = Keypoints({"hidden": (cube, 3), "hidden empty": helper, "doomed": doomed, "pencil": pencil})
drawn = read()
results["hidden: before"] = project(located(points, drawn), camera, drawn, None)
cube.hide_viewport = helper.hide_viewport = pencil.hide_viewport = True
bpy.data.objects.remove(doomed)
results["hidden: after"] = project(located(points, drawn := read()), camera, drawn, None)
results["hidden: no points"] = project(located(Keypoints({}), drawn), camera, drawn, None)

# Boxes.

cube.modifiers.clear()
cube.scale = (0.7, 0.5, 0.6)
cube.location = (-1.6, 0, 0.8)
ball = add("Ball", sphere.data, location=(1.5, 0.5, 0.9), scale=(0.5, 0.8, 0.5), rotation_euler=(0.4, 0.8, 0))
text = bpy.data.curves.new("Text", "FONT")
text.body, text.extrude = "b", 0.1
letter = add("Letter", text, location=(-0.8, 0, -1.9), rotation_euler=(1.2, 0.2, 0.1), scale=(2, 2, 2))
loose = bpy.data.meshes.new("Loose")
loose.from_pydata([(0, 0, 0), (1, 0, 0), (0, 1, 0), (9, 9, 9)], [], [(0, 1, 2)])
triangle = add("Triangle", loose, location=(1, -1, -1), rotation_euler=(0.5, 0.2, -0.3))
for kind in ("PERSP", "ORTHO"):
    only(cube, ball, triangle, letter)
    camera = look((0.5, -9, 1), type=kind, shift_x=0.02, shape=(120, 160))
    depth, mask, drawn = cast(camera)
    results[f"boxes, {kind}: names"] = [thing.name for thing in drawn]
    results[f"boxes, {kind}: mask"], results[f"boxes, {kind}: ids"] = mask, [thing.id for thing in drawn] + [99]
    results[f"boxes, {kind}: tight"] = tight_boxes(mask, np.array(results[f"boxes, {kind}: ids"]))
    results[f"boxes, {kind}: full"] = full_boxes(rows([*drawn, None]), camera)
    results[f"boxes, {kind}: 3d"] = boxes_3d(rows([*drawn, None]), camera)
    results[f"boxes, {kind}: K"] = camera.intrinsics
    for obj in (cube, ball):
        corners = np.c_[btb.utils.bbox_world_coordinates(obj), np.ones(8)]
        results[f"boxes, {kind}: corners of {obj.name}"] = (corners @ camera.extrinsics().T)[:, :3]

camera = look((0.5, -9, 1), (6, 0, 2), type="PERSP")  # some are partly, some wholly outside
only(cube, ball)
drawn = read()
results["outside: full"] = full_boxes(rows(drawn), camera)
for thing in drawn:
    results[f"outside: xy of {thing.name}"] = camera.object_to_pixel(thing.object)
results["outside: names"] = [thing.name for thing in drawn]

# What crosses the camera's plane.

ground.location, ground.rotation_euler = (0, 0, -1), (0.1, 0.2, 0.3)
cube.location, cube.scale = (0, -15, 0), (1, 1, 1)
only(ground, cube)
for kind in ("PERSP", "ORTHO"):
    camera = look((0.3, -2, 0.4), (0, 3, 0), type=kind, clip_start=0.5)
    drawn = {thing.name: thing for thing in read()}
    results[f"crossing, {kind}: full"] = full_boxes(rows([drawn["Ground"], drawn["Cube"]]), camera)
    shape = bmesh.new()
    shape.from_mesh(ground.data)
    shape.transform(ground.matrix_world)
    eye = camera.view_matrix.inverted()
    bmesh.ops.bisect_plane(
        shape,
        geom=[*shape.verts, *shape.edges, *shape.faces],
        plane_co=eye @ Vector((0, 0, -0.5)),
        plane_no=-eye.col[2].xyz,
        clear_inner=True,
        dist=1e-7,
    )
    results[f"crossing, {kind}: kept xy"] = camera.ndc_to_pixel(camera.world_to_ndc([v.co[:] for v in shape.verts]))

# Masks as such.

random = np.random.default_rng(1)
for dtype in ("uint16", "uint32"):
    high = 60 if dtype == "uint16" else 70000
    numbers = np.array([0, *random.choice(np.arange(1, high), 40, replace=False)], dtype)
    mask = numbers[random.integers(0, 41, (9, 7))].repeat(5, axis=0).repeat(6, axis=1)
    mask[random.random(mask.shape) < 0.05] = numbers[7]
    results[f"random {dtype}: mask"], results[f"random {dtype}: ids"] = mask, [*numbers[1:], 65, 66, 69999]
    results[f"random {dtype}: tight"] = tight_boxes(mask, np.array(results[f"random {dtype}: ids"]))
    results[f"empty {dtype}: tight"] = tight_boxes(np.zeros((4, 5), dtype), np.array([1, 2]))
    full = np.full((4, 5), 7, dtype)
    results[f"full {dtype}: tight"] = tight_boxes(full, np.array([7], np.uint32))

np.savez(out, **results)
print("labelled", file=sys.stderr)
