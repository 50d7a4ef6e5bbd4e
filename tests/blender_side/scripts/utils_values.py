"""Asks the helpers about scenes whose answers are known, and writes the answers down as JSON."""

import importlib
import json
import os
import sys

import bpy
import numpy as np

import blendtorch.btb as btb
from blendtorch_shm.errors import ConfigurationError

out, folder = btb.parse_blendtorch_args()[1]
scene = bpy.context.scene
cube, floor = bpy.data.objects["Cube"], bpy.data.objects["Floor"]
cube.rotation_euler = (0, 0, 0)
cube.location = (0, 0, 0)
floor.hide_viewport = True
results = {}


def refusal(call: object, *args: object) -> str:
    try:
        call(*args)
    except ConfigurationError as error:
        return str(error)
    return ""


def new_object(name: str, data: object, **placed: object) -> object:
    made = bpy.data.objects.new(name, data)
    scene.collection.objects.link(made)
    for attribute, value in placed.items():
        setattr(made, attribute, value)
    return made


def new_plane(name: str, size: float, **placed: object) -> object:
    """A square across the y axis."""
    mesh = bpy.data.meshes.new(name)
    r = size / 2
    mesh.from_pydata([(-r, 0, -r), (r, 0, -r), (r, 0, r), (-r, 0, r)], [], [(0, 1, 2, 3)])
    return new_object(name, mesh, **placed)


# Random places.

np.random.seed(5)
places = [btb.utils.random_spherical_loc((2, 3), (0.1, 0.2), (1.0, 1.5)).tolist() for _ in range(200)]
np.random.seed(5)
results["random places"] = places
results["draws"] = np.random.uniform((2, 0.1, 1.0), (3, 0.2, 1.5), (200, 3)).tolist()
results["default places"] = [btb.utils.random_spherical_loc().tolist() for _ in range(500)]

# Visibility.

bpy.context.view_layer.update()
camera = btb.Camera(shape=(120, 160))
camera.look_at((0, 0, 0), look_from=(0, -10, 0))
lens = camera.bpy_camera.data
seen = results["seen"] = {}


def look(name: str, obj: object = cube, **options: object) -> None:
    seen[name] = btb.utils.compute_object_visibility(obj, camera, **{"N": 1000, **options})


look("alone", N=25)
look("alone, beyond dist", dist=5)
look("alone, within dist", dist=20.0)
look("in another scene", scene=bpy.data.scenes.new("Empty"))
look("in a view layer", view_layer=scene.view_layers[0])
wall = new_plane("Wall", 3.6, location=(0, -3, 0))
look("behind a wall")
look("the wall itself", wall)
wall.location.x = 2
look("half behind a wall")
lens.type, lens.ortho_scale = "ORTHO", 8
camera.update_proj_matrix()
look("half behind a wall, ortho")
wall.location.x = 0
look("behind a wall, ortho")
lens.type = "PERSP"
camera.update_proj_matrix()
lens.clip_start = 8
camera.update_proj_matrix()
look("behind a wall that is nearer than the clip range")
lens.clip_start = 0.1
camera.update_proj_matrix()
wall.hide_viewport = True
look("behind a hidden wall")
look("the hidden wall", wall)
wall.location = (0, -20, 0)
wall.hide_viewport = False
look("behind the camera", wall)
wall.location, wall.scale = (0, -1.002, 0), (0.6, 1, 0.6)
look("close behind a wall")
wall.location, wall.scale = (0, -1, 0), (0.5, 1, 0.5)
look("a wall that lies on a face", wall)
bpy.data.objects.remove(wall)
lens.clip_end = 10
camera.update_proj_matrix()
look("half beyond the clip range", N=5000)
lens.clip_end = 100
camera.update_proj_matrix()
cube.location.x = 10 / lens.lens * 18  # the middle of the cube on the edge of the image
look("half outside", N=5000)
cube.location.x = 100
look("outside", N=100)
cube.location.x = 0
text = bpy.data.curves.new("Text", "FONT")
text.body = "O"
look("a text", new_object("Text", text, rotation_euler=(np.pi / 2, 0, 0), location=(0, -4, 0)))
look("an object without faces", new_object("Points", bpy.data.meshes.new("Points")))
empty = new_object("Nothing", None)
results["visibility of an empty"] = refusal(btb.utils.compute_object_visibility, empty, camera)

# Coordinates.

cube.location, cube.rotation_euler, cube.scale = (1, 2, 3), (0, 0, np.pi / 2), (1, 2, 3)
subdivided = cube.modifiers.new("Subdivided", "SUBSURF")
subdivided.subdivision_type, subdivided.levels = "SIMPLE", 1
second = new_plane("Second", 2)
depsgraph = bpy.context.evaluated_depsgraph_get()
results["object coordinates"] = btb.utils.object_coordinates(cube).tolist()
results["world coordinates"] = btb.utils.world_coordinates(cube).tolist()
results["with a depsgraph"] = btb.utils.world_coordinates(cube, depsgraph=depsgraph).tolist()
results["bounding box"] = btb.utils.bbox_world_coordinates(cube).tolist()
results["bound_box"] = [list(cube.matrix_world @ type(cube.location)(c)) for c in cube.bound_box]
results["of two"] = [
    len(btb.utils.world_coordinates(cube, second)),
    len(btb.utils.bbox_world_coordinates(cube, second)),
]
elsewhere, without = bpy.data.collections.new("Elsewhere"), scene.view_layers.new("Without")
scene.collection.children.link(elsewhere)
for collection in cube.users_collection:
    collection.objects.unlink(cube)
elsewhere.objects.link(cube)
without.layer_collection.children["Elsewhere"].exclude = True
cube.location.x = 2
for layer in (without, bpy.data.scenes["Empty"].view_layers[0]):
    layer.update()
results["in a view layer without it"] = btb.utils.world_coordinates(cube, depsgraph=without.depsgraph).tolist()
results["with it"] = btb.utils.world_coordinates(cube).tolist()
results["in a scene without it"] = refusal(
    lambda: btb.utils.world_coordinates(cube, depsgraph=bpy.data.scenes["Empty"].view_layers[0].depsgraph)
)
results["of a text"] = len(btb.utils.world_coordinates(bpy.data.objects["Text"]))
lamp = new_object("Lamp", bpy.data.lights.new("Lamp", "POINT"))
balls = [new_object(name, bpy.data.metaballs.new("Ball"), location=(20, 0, 0)) for name in ("Ball", "Ball.001")]
for ball in balls:
    ball.data.elements.new()
without_box = {"Empty": empty, "lamp": lamp, "mesh": bpy.data.objects["Points"], "second metaball": balls[1]}
results["boxes of nothing"] = {name: refusal(btb.utils.bbox_world_coordinates, o) for name, o in without_box.items()}
results["boxes of nothing in pixels"] = {
    name: refusal(camera.bbox_object_to_pixel, o) for name, o in without_box.items()
}
results["box of a metaball"] = len(btb.utils.bbox_world_coordinates(balls[0]))
results["coordinates of an empty"] = refusal(btb.utils.object_coordinates, empty)
results["hom"] = btb.utils.hom(np.array([[1.0, 2.0], [3.0, 4.0]]), 2.0).tolist()
results["dehom"] = btb.utils.dehom(np.array([[1.0, 2.0, 2.0], [3.0, 4.0, 0.5]])).tolist()
area, space, region = btb.utils.find_first_view3d()
results["view"] = [area.type, space.type, region.type]

# Statistics.

before = btb.utils.scene_stats()
bpy.data.meshes.new("Orphan")
after = btb.utils.scene_stats()
results["stats"] = {"before": before, "after": after, "meshes": len(bpy.data.meshes), "scenes": len(bpy.data.scenes)}

# Modules beside the scene.

with open(os.path.join(folder, "lies_beside_the_scene.py"), "w") as file:
    file.write("VALUE = 42\n")
bpy.ops.wm.save_as_mainfile(filepath=os.path.join(folder, "moved.blend"), copy=False)
btb.add_scene_dir_to_path()
btb.add_scene_dir_to_path()
results["beside"] = importlib.import_module("lies_beside_the_scene").VALUE
results["times on the path"] = sys.path.count(folder)
results["last on the path"] = sys.path[-1] == folder
bpy.ops.wm.read_homefile(use_empty=True)
results["unsaved"] = refusal(btb.add_scene_dir_to_path)
with open(out, "w") as file:
    json.dump(results, file)
