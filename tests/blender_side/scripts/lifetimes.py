"""Keeps ground truth across opened files, undo, and reloaded libraries, and asks for things by what they are part of."""

import tempfile

import bpy
import numpy as np

import blendtorch.btb as btb
from blender_side import compat, lifetime, utils
from blendtorch_shm.errors import ConfigurationError

out = btb.parse_blendtorch_args()[1][0]
folder = tempfile.mkdtemp()
results: dict = {}


def refuses(call: object) -> str:
    try:
        call()
    except ConfigurationError as error:
        return str(error)
    return ""


def box(name: str, size: tuple, **placed: object) -> object:
    mesh = bpy.data.meshes.new(name)
    corners = [(x * size[0], y * size[1], z * size[2]) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    mesh.from_pydata(corners, [], faces)
    made = bpy.data.objects.new(name, mesh)
    for attribute, value in placed.items():
        setattr(made, attribute, value)
    bpy.context.scene.collection.objects.link(made)
    return made


def empty_scene() -> object:
    for obj in list(bpy.data.objects):
        bpy.data.objects.remove(obj)
    scene = bpy.context.scene
    scene.camera = bpy.data.objects.new("Camera", bpy.data.cameras.new("Camera"))
    scene.camera.location.z = 20
    scene.collection.objects.link(scene.camera)
    return scene


# ---- by what things are part of

scene = empty_scene()
car, wheel_parent, lonely = (bpy.data.objects.new(name, None) for name in ("car", "axle", "lonely"))
for empty in (car, wheel_parent, lonely):
    scene.collection.objects.link(empty)
wheel_parent.parent = car
car.location.x = 1
body = box("body", (4, 2, 1), parent=car)
wheels = [box(f"wheel{i}", (1, 1, 1), parent=wheel_parent, location=(3 * i, -1, 0)) for i in (0, 1)]
hub = box("hub", (0.5, 0.5, 0.5), parent=wheels[0], location=(0, -1, 0))
tree = box("tree", (1, 1, 3), location=(-4, 0, 0))
forest, inner = bpy.data.collections.new("forest"), bpy.data.collections.new("inner")
scene.collection.children.link(forest)
forest.children.link(inner)
inner.objects.link(tree)
camera = btb.Camera(shape=(48, 64))
passes = ("boxes_3d",)


def names_of(**options: object) -> list:
    made = btb.GroundTruth(camera, passes, **options).render()
    return [
        f"{n}:{made['category_names'][c]}" for n, c in zip(made["instance_names"], made["category_ids"], strict=True)
    ]


results["an empty"] = names_of(objects=[car], categories={"vehicle": [car], "wheel": [wheel_parent]})
results["a collection"] = names_of(objects=[forest], categories={"plant": forest})
results["a mesh"] = names_of(objects=[wheels[0]])
truth = btb.GroundTruth(camera, passes, objects={"car": car, "green": forest}, categories={"vehicle": [car]})
made = truth.render()
results["one number"] = made["instance_names"]
results["one number: ids"] = made["instance_ids"]
results["one number: sizes"] = np.ptp(made["boxes_3d"], axis=1)
car["category"], forest["category"], inner["category"] = "car", "plants", "pines"
results["by property"] = names_of()
other = bpy.data.collections.new("other")
scene.collection.children.link(other)
other.objects.link(tree)
other["category"] = "props"
results["disagreement"] = refuses(lambda: names_of())
bpy.data.collections.remove(other)
results["no surface"] = refuses(lambda: btb.GroundTruth(camera, passes, objects=[lonely]))
results["no surface in a collection"] = refuses(
    lambda: btb.GroundTruth(camera, passes, categories={"x": bpy.data.collections.new("none")})
)
results["a light"] = refuses(lambda: btb.GroundTruth(camera, passes, objects=[scene.camera]))

# ---- arguments that make no sense, or that it takes a decision to understand

WRONG = {
    "two names": {"objects": {"x": body, "y": [hub, body]}},
    "two categories": {"categories": {"x": [forest], "y": forest}},
    "an empty group": {"objects": {"x": []}},
    "an empty name": {"objects": {"": body}},
    "an empty category": {"categories": {"": [body]}},
    "a number": {"objects": 5},
}
for name, options in WRONG.items():
    results[f"wrong: {name}"] = refuses(lambda options=options: btb.GroundTruth(camera, passes, **options))
results["one object"] = names_of(objects=tree, categories={})
tree["category"] = ""
results["an empty property"] = names_of(objects=[tree])
balls = [bpy.data.objects.new("ball", bpy.data.metaballs.new("ball")) for _ in range(2)]
for i, ball in enumerate(balls):
    ball.data.elements.new().radius = 1
    ball.location = 3 * i, 6, 0
    scene.collection.objects.link(ball)
results["wrong: metaballs"] = refuses(lambda: btb.GroundTruth(camera, passes, objects=balls))
results["metaballs"] = names_of(objects=[balls[0]], categories={})
for ball in balls:
    bpy.data.objects.remove(ball)

# ---- a row is called what it was asked for by

truth = btb.GroundTruth(camera, passes, objects=[body, hub], keypoints=None)
sizes = []
for body.name, hub.name in (("body", "hub"), ("renamed", "body"), ("hub", "body")):
    made = truth.render()
    sizes.append([*made["instance_ids"], *np.ptp(made["boxes_3d"], axis=1)[:, 0]])
    results["renamed"] = made["instance_names"]
results["renamed: sizes"] = sizes
hub.name = "other"
body.name, hub.name = "body", "hub"

# ---- what is nowhere

hub.location.x = np.nan
made = btb.GroundTruth(
    camera, (*passes, "keypoints"), objects={"car": car, "hub": hub}, keypoints={"hub": hub, "body": body}
).render()
results["nowhere"], results["nowhere: keypoints"] = np.ptp(made["boxes_3d"], axis=1), made["keypoints"][:, 2]
hub.location.x = 0
scene.camera.location.x = np.nan
results["nowhere: camera"] = refuses(lambda: names_of())
scene.camera.location.x = 0

# ---- boxes of what is evaluated

rounded = box("rounded", (2, 2, 2))
rounded.modifiers.new("Round", "SUBSURF").levels = 3
results["rounded"] = np.ptp(utils.bbox_world_coordinates(rounded), axis=0)
results["rounded: vertices"] = np.ptp(utils.world_coordinates(rounded), axis=0)
rounded.modifiers.new("Outwards", "DISPLACE").strength = 0.1
results["outwards"] = np.ptp(utils.bbox_world_coordinates(rounded), axis=0)
results["outwards: vertices"] = np.ptp(utils.world_coordinates(rounded), axis=0)
results["of an empty"] = refuses(lambda: utils.bbox_world_coordinates(car))

# ---- dtypes

results["draws off-screen"] = compat.draws_off_screen()
if compat.draws_off_screen():
    for dtypes in ({}, {"instance": "uint8", "category": "int32"}, {"instance": np.uint16, "category": np.uint16}):
        made = btb.GroundTruth(camera, ("instance", "category"), dtypes=dtypes).render()
        key = ", ".join(f"{made[name].dtype}" for name in ("instance", "category", "instance_ids", "category_ids"))
        results[f"dtypes: {key}"] = [int((made["instance"] > 0).sum()), int(made["instance"].max())]
    many: dict = {f"category {i:03}": [] for i in range(256)}
    many["category 255"] = [tree]
    made = btb.GroundTruth(camera, ("category",), categories=many, objects=[tree]).render()
    results["dtypes: 256 categories"] = str(made["category"].dtype)
    few = btb.GroundTruth(camera, ("category",), categories=many, dtypes={"category": "uint8"})
    results["dtypes: too small"] = refuses(few.render)
results["dtypes: of depth"] = refuses(lambda: btb.GroundTruth(camera, passes, dtypes={"depth": "int32"}))

# ---- the axes of a group, whose object moves with a rig while it is hidden in some way


def set_each(objects: list, name: str, frame: int | None = None) -> None:
    for obj in objects:
        setattr(obj, name, True)
        if frame is not None:
            obj.keyframe_insert(name, frame=frame)


def animated_away(objects: list) -> None:
    set_each(objects, "hide_viewport", frame=1)
    set_each(objects, "hide_render", frame=1)


WAYS = {  # takes the objects, their collection and its place in the view layer
    "shown": lambda objects, home, child: None,
    "with its eye shut": lambda objects, home, child: [obj.hide_set(True) for obj in objects],
    "hidden in viewports": lambda objects, home, child: set_each(objects, "hide_viewport"),
    "hidden in renders": lambda objects, home, child: set_each(objects, "hide_render"),
    "hidden by an animation": lambda objects, home, child: animated_away(objects),
    "in a collection with its eye shut": lambda objects, home, child: setattr(child, "hide_viewport", True),
    "in a collection hidden in viewports": lambda objects, home, child: setattr(home, "hide_viewport", True),
    "in a collection hidden in renders": lambda objects, home, child: setattr(home, "hide_render", True),
    "in an excluded collection": lambda objects, home, child: setattr(child, "exclude", True),
    "in no scene": lambda objects, home, child: bpy.context.scene.collection.children.unlink(home),
}


def axes_of_groups(way: str) -> None:
    scene = empty_scene()
    home = bpy.data.collections.new("home")
    scene.collection.children.link(home)
    rig, wagon = (bpy.data.objects.new(name, None) for name in ("rig", "wagon"))
    scene.collection.objects.link(rig)
    for frame, angle in ((1, 0), (11, 1)):
        rig.rotation_euler.z = angle
        rig.keyframe_insert("rotation_euler", frame=frame)
    wagon.parent = rig
    box("load", (1, 1, 1), parent=wagon)
    brick = box("brick", (1, 1, 1), parent=box("corners", (3, 3, 3), parent=rig, instance_type="VERTS"))
    scene.collection.objects.unlink(brick)
    for obj in (wagon, brick):
        home.objects.link(obj)
    scene.frame_set(1)
    WAYS[way]((wagon, brick), home, bpy.context.view_layer.layer_collection.children[home.name])
    off = btb.OffScreenRenderer(btb.Camera(shape=(48, 64)))
    off.set_render_style("SOLID")
    for name, renderer in {"SOLID": off, "F12": btb.FinalRenderer(off.camera, engine="WORKBENCH")}.items():
        truth = btb.GroundTruth(None, passes, objects={"wagon": wagon, "bricks": brick}, renderer=renderer)
        for frame in (1, 6):
            scene.frame_set(frame)
            corners = truth.render()["boxes_3d"]
        x, y, _ = (corners[:, 4] - corners[:, 0]).T
        results[f"axes {name} {way}"] = np.arctan2(-y, x) - rig.rotation_euler.z
    bpy.data.collections.remove(home)


for way in WAYS:
    axes_of_groups(way)

# ---- across files

for name, size in (("a", (2, 2, 2)), ("b", (1, 1, 0.5))):
    empty_scene()
    for i in range(8):
        box(f"Thing{i}", size, location=(3 * (i % 4) - 6, 3 * (i // 4) - 3, 0))
    bpy.ops.wm.save_as_mainfile(filepath=f"{folder}/{name}.blend")
empty_scene()
bpy.ops.wm.save_as_mainfile(filepath=f"{folder}/none.blend")

bpy.ops.wm.open_mainfile(filepath=f"{folder}/a.blend")
kept = btb.GroundTruth(btb.Camera(shape=(48, 64)), passes)
asked = btb.GroundTruth(
    kept.camera,
    ("boxes_3d", "keypoints"),
    objects={"third": bpy.data.objects["Thing2"]},
    keypoints={"corner": (bpy.data.objects["Thing1"], 7)},
)
sizes, points = [], []
for i in range(12):
    if i % 3 == 0:  # as scripts do to be run again
        bpy.app.handlers.load_post.clear()
    bpy.ops.wm.open_mainfile(filepath=f"{folder}/{'ab'[i % 2]}.blend")
    made, mine = kept.render(), asked.render()
    sizes.append(np.ptp(made["boxes_3d"], axis=1))
    points.append([*np.ptp(mine["boxes_3d"][0], axis=0), mine["keypoints"][0, 2]])
results["across files"], results["across files: by name"] = sizes, points
results["across files: numbers"] = made["instance_ids"]
bpy.ops.wm.open_mainfile(filepath=f"{folder}/none.blend")
results["across files: gone"] = refuses(asked.render)
results["across files: nothing there"] = kept.render()["instance_names"]
bpy.context.scene.camera.name = "Another"
results["a camera that was renamed"] = kept.camera.bpy_camera.name
bpy.ops.wm.open_mainfile(filepath=f"{folder}/a.blend")
results["a camera that is not there"] = refuses(lambda: kept.camera.view_matrix)
kept.camera = asked.camera = btb.Camera(shape=(48, 64))

# ---- meshes that change while nobody listens, since a script has cleared Blender's handlers

bpy.ops.wm.open_mainfile(filepath=f"{folder}/a.blend")
thing = bpy.data.objects["Thing0"]
sizes = [np.ptp(kept.render()["boxes_3d"][0], axis=0)]
bpy.app.handlers.depsgraph_update_post.clear()
for vertex in thing.data.vertices:
    vertex.co *= 2
thing.data.update()
sizes.append(np.ptp(kept.render()["boxes_3d"][0], axis=0))
thing.shape_key_add(name="as it is")
key = thing.shape_key_add(name="smaller")
for point in key.data:
    point.co *= 0.5
for frame in (1, 5):
    key.value = frame == 5
    key.keyframe_insert("value", frame=frame)
for frame in (1, 5):
    bpy.app.handlers.frame_change_post.clear()
    bpy.context.scene.frame_set(frame)
    sizes.append(np.ptp(kept.render()["boxes_3d"][0], axis=0))
results["handlers cleared"] = sizes

# ---- undo, and a library that is reloaded

bpy.ops.wm.open_mainfile(filepath=f"{folder}/a.blend")
before = lifetime.generation()
windows = bpy.context.window_manager.windows
with bpy.context.temp_override(**({"window": windows[0]} if windows else {})):  # 3.4 wants to know which one
    bpy.ops.ed.undo_push(message="as it was")
    for obj in bpy.data.objects:
        if obj.type == "MESH":
            obj.scale = 2, 2, 2
    bpy.ops.ed.undo_push(message="larger")
    results["undo: larger"] = np.ptp(asked.render()["boxes_3d"][0], axis=0)
    bpy.ops.ed.undo()
results["undo: undone"] = np.ptp(asked.render()["boxes_3d"][0], axis=0)
results["undo: counted"] = lifetime.generation() != before

bpy.ops.wm.open_mainfile(filepath=f"{folder}/none.blend")
with bpy.data.libraries.load(f"{folder}/b.blend", link=True) as (_, wanted):
    wanted.objects = ["Thing0"]
linked = wanted.objects[0]
bpy.context.scene.collection.objects.link(linked)
follower = btb.GroundTruth(btb.Camera(shape=(48, 64)), passes, objects=[linked])
sizes = []
for _ in range(3):
    sizes.append(np.ptp(follower.render()["boxes_3d"][0], axis=0))
    bpy.data.libraries[0].reload()
results["reloaded"] = sizes

np.savez(out, **results)
