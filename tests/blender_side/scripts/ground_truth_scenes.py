"""Everything that a viewport can show, appears, vanishes, is renamed and deformed; saves what ground truth says about it."""

import math
import random
import sys

import bmesh
import bpy
import numpy as np

import blendtorch.btb as btb
from blender_side import compat, utils
from blender_side.evaluation import Evaluation
from blender_side.ground_truth.scene import SceneReader
from blendtorch_shm.errors import ConfigurationError

RASTERS = ("depth", "distance", "normals", "instance", "category", "flow_backward", "flow_forward")
out = btb.parse_blendtorch_args()[1][0]
scene = bpy.context.scene
for obj in [obj for obj in scene.objects if obj.type == "MESH"]:
    bpy.data.objects.remove(obj)
lens = scene.camera.data
lens.lens, lens.clip_end = 40, 100
results = {"off_screen": compat.draws_off_screen()}


def add(name: str, data: object = None, collection: object = None, **placed: object) -> object:
    made = bpy.data.objects.new(name, data)
    (collection or scene.collection).objects.link(made)
    for attribute, value in placed.items():
        setattr(made, attribute, value)
    return made


def mesh_of(name: str, make: object, smooth: bool = False, **arguments: object) -> object:
    shape = bmesh.new()
    make(shape, **arguments)
    mesh = bpy.data.meshes.new(name)
    shape.to_mesh(mesh)
    for polygon in mesh.polygons:
        polygon.use_smooth = smooth
    return mesh


def curve(name: str, kind: str, **settings: object) -> object:
    made = bpy.data.curves.new(name, kind)
    for attribute, value in settings.items():
        setattr(made, attribute, value)
    return made


def looking(look_from: tuple, shape: tuple = (240, 320), look_at: tuple = (0, 0, 0)) -> btb.Camera:
    camera = btb.Camera(shape=shape)
    camera.look_at(look_at, look_from=look_from)
    return camera


def clear() -> None:
    for obj in [obj for obj in bpy.data.objects if obj != scene.camera]:
        bpy.data.objects.remove(obj)


def read(reader: SceneReader, normals: bool = False) -> list:
    evaluation = Evaluation(False, compat.WORKBENCH, "SOLID")
    return reader.read(bpy.context.evaluated_depsgraph_get(), evaluation, normals=normals)


def refuses(call: object) -> str:
    try:
        call()
    except ConfigurationError as error:
        return str(error)
    return ""


box = mesh_of("Box", bmesh.ops.create_cube, size=1)
ball = mesh_of("Ball", bmesh.ops.create_icosphere, smooth=True, subdivisions=4, radius=0.5)


# ---- one of each kind, against the picture


def build_one_of_each() -> None:
    add("Cube", box, rotation_euler=(0.3, 0.4, 0.5))
    monkey = add("Monkey", mesh_of("Monkey", bmesh.ops.create_monkey), location=(1.5, 0, 0), scale=(0.6, 0.6, 0.6))
    monkey.modifiers.new("Subdivision", "SUBSURF").levels = 2
    add("Mirrored", monkey.data.copy(), location=(0, 0, -3), scale=(-0.6, 0.6, 0.6))
    add("Ball", ball, location=(3, 0, 0))
    pipe = curve("Pipe", "CURVE", dimensions="3D", bevel_depth=0.1)
    line = pipe.splines.new("POLY")
    line.points.add(2)
    for point, xyz in zip(line.points, [(0, 0, 0), (1, 0, 0), (1, 0, 1)], strict=True):
        point.co = (*xyz, 1)
    add("Pipe", pipe, location=(-2, 0, 0))
    add("Wire curve", curve("Wire", "CURVE"), location=(-2, 0, 1)).data.splines.new("POLY").points.add(1)
    add(
        "Text", curve("Text", "FONT", body="Hi", extrude=0.1), location=(-3.5, 0, 0), rotation_euler=(math.pi / 2, 0, 0)
    )
    for name, x in [("Meta", -3.0), ("Meta.001", -2.4)]:
        meta = bpy.data.metaballs.new(name)
        meta.elements.new().radius = 0.65
        add(name, meta, location=(x, 0, 1.7))
    things = bpy.data.collections.new("Things")
    inner = add("Inner", box, things, scale=(0.3, 0.3, 0.3))
    add("Inner ball", ball, things, location=(0, 0, 0.4), scale=(0.4, 0.4, 0.4))
    for i in range(2):
        add(f"Group{i}", location=(i - 1, 0, 1.6), instance_type="COLLECTION", instance_collection=things)
    corners = add("On corners", box, location=(1.5, 0, 1.6), instance_type="VERTS", show_instancer_for_viewport=False)
    add("Child", box, parent=corners, scale=(0.15, 0.15, 0.15))
    emitter = add("Emitter", mesh_of("Plane", bmesh.ops.create_grid, size=0.5), location=(-1.5, 0, -1.6))
    emitter.rotation_euler.x = 1.2
    emitter.modifiers.new("Particles", "PARTICLE_SYSTEM")
    emission = emitter.particle_systems[0].settings
    emission.count, emission.frame_start, emission.frame_end, emission.physics_type = 12, 1, 1, "NO"
    emission.render_type, emission.instance_object, emission.particle_size = "OBJECT", inner, 0.5
    add("Flat", box, location=(1.5, 0, -3), scale=(1, 1, 0), rotation_euler=(1, 0, 0))
    add("Not rendered", box, location=(-3, 0, -1.6), hide_render=True)
    add("As wire", box, location=(1.5, 0, -1.6), display_type="WIRE")
    add("As bounds", box, location=(3, 0, -1.6), display_type="BOUNDS")
    add("Hidden", box, location=(0, 0, -1.6), hide_viewport=True)
    add("Eye shut", box, location=(0, 0, -1.6)).hide_set(True)
    hidden = bpy.data.collections.new("Hidden")
    scene.collection.children.link(hidden)
    hidden.hide_viewport = True
    add("In hidden collection", box, hidden, location=(0, 0, -1.6))
    excluded = bpy.data.collections.new("Excluded")
    scene.collection.children.link(excluded)
    bpy.context.view_layer.layer_collection.children["Excluded"].exclude = True
    add("In excluded collection", box, excluded, location=(0, 0, -1.6))
    colors = random.Random(3)
    for obj in bpy.data.objects:
        obj.color = (*(colors.randint(40, 255) / 255 for _ in "rgb"), 1)
    scene.frame_set(2)


def flat_colors() -> object:
    """Solid shading that shows nothing but the colours of objects; returns the viewport."""
    _, space, _ = utils.find_first_view3d()
    shading = space.shading
    shading.light, shading.color_type, shading.background_type = "FLAT", "OBJECT", "VIEWPORT"
    shading.background_color = (0, 0, 0)
    for name in ("show_object_outline", "show_cavity", "show_shadows", "show_specular_highlight", "show_xray"):
        setattr(shading, name, False)
    return space


def one_of_each() -> None:
    build_one_of_each()
    space = flat_colors()
    camera = looking((0, -12, 0), (480, 640))
    renderer = btb.OffScreenRenderer(camera, mode="rgb")
    renderer.set_render_style("SOLID")
    note = {"solid": renderer.render()}
    truth = btb.GroundTruth(camera, RASTERS)
    note |= truth.render()
    objects = [bpy.data.objects[name.partition("/")[0].partition("#")[0]] for name in note["instance_names"]]
    note["colors"] = np.rint(255 * np.array([obj.color[:3] for obj in objects]))
    renderer.set_render_style("RENDERED")
    renderer.render()
    note["names when rendered"] = truth.render()["instance_names"]
    renderer.set_render_style("SOLID")
    renderer.render()
    if compat.HAS_WINDOW:
        area, _, region = utils.find_first_view3d()
        bpy.data.objects["Cube"].select_set(True)
        with bpy.context.temp_override(area=area, region=region):
            bpy.ops.view3d.localview(frame_selected=False)
        plain = btb.OffScreenRenderer(camera, renderer.mode)  # one with a style leaves local view
        truth = btb.GroundTruth(camera, RASTERS, renderer=plain)
        note["names in local view"] = truth.render()["instance_names"]
        note["picture in local view"] = plain.render()
        note["instance in local view"] = truth.render()["instance"]
        with bpy.context.temp_override(area=area, region=region):
            bpy.ops.view3d.localview(frame_selected=False)
    for key, value in note.items():
        results[f"one of each {key}"] = value
    space.shading.color_type = "MATERIAL"
    clear()


# ---- normals


def shaded() -> None:
    camera = looking((0, -4, 0), look_at=(0, 0, 0))
    smooth = add("Smooth", ball, location=(0.6, 0, 0))
    flat = add("Flat", mesh_of("Flat", bmesh.ops.create_icosphere, subdivisions=2, radius=0.5), location=(-0.6, 0, 0))
    made = btb.GroundTruth(camera, ("normals", "depth", "instance")).render()
    view = np.array(camera.view_matrix)
    results["shaded projection"] = np.array(camera.proj_matrix)
    results["shaded centers"] = [(view @ (*obj.location, 1))[:3] for obj in (smooth, flat)]
    results["shaded ids"] = [made["instance_ids"][made["instance_names"].index(obj.name)] for obj in (smooth, flat)]
    for key in ("normals", "depth", "instance"):
        results[f"shaded {key}"] = made[key]
    clear()


# ---- names and numbers, cameras, sizes


def numbers() -> None:
    camera = looking((0, -12, 0), (60, 80))
    truth = btb.GroundTruth(camera, ("instance", "flow_backward"))
    seen = []

    def look() -> dict[str, int]:
        made = truth.render()
        table = dict(zip(made["instance_names"], made["instance_ids"].tolist(), strict=True))
        assert set(np.unique(made["instance"])) - {0} <= set(table.values())
        flow = made["flow_backward"]
        unknown = {name for name, i in table.items() if np.isnan(flow[made["instance"] == i]).any()}
        seen.append((sorted(table.items()), sorted(unknown)))
        return table

    a = add("A", box, location=(-2, 0, 0))
    add("B", box, location=(0, 0, 0))
    look()
    c = add("C", box, location=(2, 0, 0))
    look()
    a.hide_viewport = True
    look()
    a.hide_viewport = False
    look()
    c.name = "Renamed"
    look()
    bpy.data.objects.remove(a)
    look()
    add("A", ball, location=(-2, 0, 0))
    look()
    bpy.data.objects["B"].data = ball
    look()
    look()
    truth.forget()
    look()
    results["numbers"] = repr(seen)

    wide = btb.GroundTruth(looking((5, -9, 3), (90, 160)), ("depth", "flow_forward"))
    first = wide.render()["depth"]
    other = truth.render()["instance"]
    results["two at once"] = first.shape == (90, 160) and other.shape == (60, 80)
    wide.camera.shape = (40, 50)
    wide.camera.update_proj_matrix()
    small = wide.render()
    results["resized"] = [*small["depth"].shape, *small["flow_forward"].shape, np.isnan(small["flow_forward"]).all()]
    results["resized shows"] = np.isfinite(small["depth"]).sum()
    wide.camera.shape = (90, 160)
    wide.camera.update_proj_matrix()
    results["resized back"] = np.array_equal(wide.render()["depth"], first)
    results["again"] = not np.isnan(wide.render()["flow_forward"][np.isfinite(first)]).any()
    clear()


def chosen() -> None:
    camera = looking((0, -12, 0), (60, 80))
    red, blue, wall = (add(name, box, location=(x, 0, 0)) for name, x in [("Red", -2), ("Blue", 1.5), ("Wall", 1.9)])
    wall.location.y = -1.5
    red["category"], blue["category"] = "warm", "cold"
    things = bpy.data.collections.new("Pair")
    for name, x in [("Left", -0.5), ("Right", 0.5)]:
        add(name, ball, things, location=(x, 0, 0))
    pair = add("Pair", location=(0, 0, 2), instance_type="COLLECTION", instance_collection=things)
    pair["category"] = "pairs"
    gone = add("Gone", box, hide_viewport=True)
    passes = ("instance", "category", "boxes_2d", "boxes_2d_full", "boxes_3d", "depth", "keypoints", "camera")
    points = {"red": red, "corner": (blue, 0)}
    truth = btb.GroundTruth(camera, passes, objects=[blue, pair, gone, red], keypoints=points)
    made = truth.render()
    for key, value in made.items():
        if key != "camera":
            results[f"chosen {key}"] = value
    results["chosen camera"] = sorted(made["camera"])
    results["chosen all"] = btb.GroundTruth(camera, ("instance",)).render()["instance"]
    results["chosen wall"] = [camera.object_to_pixel(wall).min(0), camera.object_to_pixel(wall).max(0)]
    given = btb.GroundTruth(camera, ("category",), categories={"b": [blue, wall], "a": [red], "c": [pair]}).render()
    results["given names"], results["given ids"] = given["category_names"], given["category_ids"]
    results["given instances"], results["given category"] = given["instance_names"], given["category"]
    bpy.data.objects.remove(blue)
    after = truth_of_deleted(camera, red, pair)
    results["deleted"] = after
    clear()


def truth_of_deleted(camera: btb.Camera, red: object, pair: object) -> list[str]:
    doomed = add("Doomed", box)
    truth = btb.GroundTruth(camera, ("boxes_2d", "category"), objects=[doomed, red], categories={"x": [doomed, pair]})
    truth.render()
    bpy.data.objects.remove(doomed)
    made = truth.render()
    return [*made["instance_names"], str(np.isnan(made["boxes_2d"][0]).all())]


def many() -> None:
    side = 257
    grid = mesh_of("Grid", bmesh.ops.create_grid, x_segments=side - 1, y_segments=side - 1, size=10)
    holder = add(
        "Grid", grid, instance_type="VERTS", show_instancer_for_viewport=False, rotation_euler=(math.pi / 2, 0, 0)
    )
    dot = mesh_of("Dot", bmesh.ops.create_grid, x_segments=1, y_segments=1, size=0.03)
    add("Dot", dot, parent=holder)
    camera = looking((0, -25, 0), (600, 600))
    made = btb.GroundTruth(camera, ("instance",)).render()
    results["many dtype"], results["many number"] = str(made["instance"].dtype), len(made["instance_ids"])
    wrong = []
    ids = dict(zip(made["instance_names"], made["instance_ids"].tolist(), strict=True))
    for index in (0, 1, 300, 65534, 65535, 65536, len(grid.vertices) - 1):
        x, y = camera.ndc_to_pixel(camera.world_to_ndc(holder.matrix_world @ grid.vertices[index].co))[0]
        if made["instance"][int(y), int(x)] != ids[f"Grid/Dot#{index}"]:
            wrong.append(index)
    results["many wrong"] = wrong
    clear()


# ---- geometry that changes


def geometry_follows(seed: int, steps: int) -> list[str]:
    """Change meshes at random; after each change, is what a reader has what Blender has?"""
    chance = random.Random(seed)
    reader, second = SceneReader(None, None), SceneReader(None, None)
    meshes = [box, ball]
    wrong = []

    def some() -> object:
        return chance.choice([obj for obj in scene.objects if obj.type == "MESH"])

    def create() -> str:
        return f"create {add('Made', chance.choice(meshes)).name}"

    def create_own() -> str:
        meshes.append(chance.choice(meshes).copy())
        return f"create own {add('Own', meshes[-1]).name}"

    def remove() -> str:
        if len([obj for obj in scene.objects if obj.type == "MESH"]) > 2:
            bpy.data.objects.remove(some())
        return "remove"

    def edit() -> str:
        mesh = some().data
        mesh.vertices[0].co.x += 0.1
        mesh.update()
        return f"edit {mesh.name}"

    def rebuild() -> str:
        mesh = some().data
        shape = bmesh.new()
        bmesh.ops.create_icosphere(shape, subdivisions=chance.randint(1, 3), radius=chance.random())
        shape.to_mesh(mesh)
        mesh.update()
        return f"rebuild {mesh.name}"

    def swap() -> str:
        obj = some()
        if not obj.data.shape_keys:
            obj.data = chance.choice(meshes)
        return f"swap {obj.name}"

    def modify() -> str:
        obj = some()
        kind = chance.choice(["SUBSURF", "WAVE", "DECIMATE", "ARRAY"])
        obj.modifiers.new(kind, kind)
        return f"{kind} on {obj.name}"

    def unmodify() -> str:
        obj = some()
        obj.modifiers.clear()
        return f"no modifiers on {obj.name}"

    def tune() -> str:
        for obj in scene.objects:
            for modifier in obj.modifiers:
                if modifier.type == "ARRAY":
                    modifier.count = chance.randint(1, 4)
        return "tune"

    def frame() -> str:
        scene.frame_set(chance.randint(1, 50))
        return f"frame {scene.frame_current}"

    def undo_purge() -> str:
        bpy.data.orphans_purge()
        meshes[:] = [mesh for mesh in meshes if mesh in list(bpy.data.meshes)]
        return "purge"

    create(), create_own()
    actions = [create, create_own, remove, edit, rebuild, swap, modify, unmodify, tune, frame, frame, undo_purge]
    for step in range(steps):
        done = [chance.choice(actions)() for _ in range(chance.randint(1, 3))]
        normals = chance.random() < 0.5
        for which in (reader, second) if chance.random() < 0.5 else (reader,):
            for thing in read(which, normals):
                evaluated = thing.object.evaluated_get(bpy.context.evaluated_depsgraph_get())
                mesh = evaluated.to_mesh()
                vertices = np.empty(3 * len(mesh.vertices), np.float32)
                mesh.vertices.foreach_get("co", vertices)
                evaluated.to_mesh_clear()
                if not np.array_equal(vertices, thing.geometry.vertices.reshape(-1)):
                    wrong.append(f"step {step}: {thing.name} after {done}")
    clear()
    return wrong


def deforming() -> None:
    """A wave runs through a grid; only what has changed is read anew."""
    camera = looking((0, -3, 7), (240, 320))
    grid = add("Waves", mesh_of("Waves", bmesh.ops.create_grid, x_segments=16, y_segments=16, size=2))
    wave = grid.modifiers.new("Wave", "WAVE")
    wave.height, wave.width, wave.time_offset = 0.2, 1.5, -20
    still = add("Still", box, location=(4, 0, 0))  # beside the grid, in the picture too
    scene.frame_set(10)
    reader = SceneReader(None, None)
    before = {thing.name: thing for thing in read(reader)}
    truth = (
        btb.GroundTruth(camera, ("flow_backward", "flow_forward", "instance")) if compat.draws_off_screen() else None
    )
    if truth:
        truth.render()
    scene.frame_set(12)
    still.location.x += 0.1
    after = {thing.name: thing for thing in read(reader)}
    results["read anew"] = [name for name in ("Waves", "Still") if before[name].geometry is not after[name].geometry]
    if truth:
        made = truth.render()
        for key in ("flow_backward", "flow_forward", "instance"):
            results[f"deforming {key}"] = made[key]
        numbers = dict(zip(made["instance_names"], made["instance_ids"], strict=True))
        results["deforming id"] = numbers["Waves"]
        past, now = (
            camera.ndc_to_pixel(camera.world_to_ndc(things["Waves"].geometry.vertices)) for things in (before, after)
        )
        results["deforming past"], results["deforming now"] = past, now
    clear()


# ---- what it says no to

camera = looking((0, -12, 0), (60, 80))
asked_for = add("Box", box)
results["unknown"] = refuses(lambda: btb.GroundTruth(camera, ("depth", "colour")))
results["misspelt"] = refuses(lambda: btb.GroundTruth(camera, ["depht", "boxes"]))
results["one text"] = refuses(lambda: btb.GroundTruth(camera, "depth"))
results["texts in one"] = refuses(lambda: btb.GroundTruth(camera, "depht, normals"))
results["nothing"] = refuses(lambda: btb.GroundTruth(camera, ()))
results["points"] = refuses(lambda: btb.GroundTruth(camera, ("keypoints",)))
results["no object"] = refuses(lambda: btb.GroundTruth(camera, ("boxes_3d",), objects=["Box"]))
results["raster"] = refuses(lambda: btb.GroundTruth(camera, ("camera", "depth", "boxes_2d")))
labels = btb.GroundTruth(
    camera, ("boxes_2d_full", "boxes_3d", "camera", "keypoints"), keypoints={"middle": asked_for}
).render()
results["labels"] = sorted(labels)
results["labels shapes"] = [*labels["boxes_2d_full"].shape, *labels["boxes_3d"].shape, *labels["keypoints"].shape]
clear()

deforming()
results["geometry"] = []
for seed in range(1, 11):  # seldom is a new mesh at the address of an old one
    results["geometry"] += geometry_follows(seed, 60)
    box = mesh_of("Box", bmesh.ops.create_cube, size=1)  # purged meanwhile
    ball = mesh_of("Ball", bmesh.ops.create_icosphere, smooth=True, subdivisions=4, radius=0.5)
if compat.draws_off_screen():
    one_of_each()
    shaded()
    numbers()
    chosen()
    many()
np.savez(out, **results)
print("renders", len(results), file=sys.stderr)
