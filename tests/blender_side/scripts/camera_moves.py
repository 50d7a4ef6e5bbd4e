"""Moves cameras in all the ways that a script can, and writes down where pictures and labels say that a small cube is."""

import bpy
import numpy as np
from mathutils import Matrix

import blendtorch.btb as btb
from blender_side import compat, overrides, utils
from blendtorch_shm.errors import ConfigurationError

out = btb.parse_blendtorch_args()[1][0]
SHAPE = HEIGHT, WIDTH = 48, 64
scene, layer = bpy.context.scene, bpy.context.view_layer
cube = bpy.data.objects["Cube"]
bpy.data.objects["Floor"].hide_viewport = bpy.data.objects["Floor"].hide_render = True
cube.animation_data_clear()
cube.location, cube.rotation_euler, cube.scale = (0, 0, 0), (0, 0, 0), (0.3, 0.3, 0.3)
scene.world.color = (0, 0, 0)
scene.world.node_tree.nodes["Background"].inputs["Strength"].default_value = 0
scene.display.render_aa = "8"
for shading in (scene.display.shading, utils.find_first_view3d()[1].shading):
    shading.light, shading.color_type, shading.single_color = "FLAT", "SINGLE", (1, 1, 1)
    shading.background_type, shading.background_color = "VIEWPORT", (0, 0, 0)
    for name in ("show_object_outline", "show_cavity", "show_shadows", "show_specular_highlight"):
        setattr(shading, name, False)
white = bpy.data.materials.new("White")
white.use_nodes = True
emission = white.node_tree.nodes.new("ShaderNodeEmission")
white.node_tree.links.new(emission.outputs[0], white.node_tree.nodes["Material Output"].inputs["Surface"])
cube.data.materials.clear()
cube.data.materials.append(white)
scene.cycles.samples, scene.cycles.use_denoising = 4, False
results = {}


def made(name, data=None, *, linked=True):
    obj = bpy.data.objects.new(name, data)
    if linked:
        scene.collection.objects.link(obj)
    return obj


def animate(owner, path, *values):
    """At frames 1, 11, 21, ..., and back to the first."""
    for i, value in enumerate(values):
        setattr(owner, path, value)
        owner.keyframe_insert(path, frame=1 + 10 * i)
    scene.frame_set(1)


def centroid(picture):
    light = picture.max(axis=2).astype(float)
    y, x = np.mgrid[: light.shape[0], : light.shape[1]] + 0.5
    return [(light * x).sum() / light.sum(), (light * y).sum() / light.sum()] if light.sum() else [np.nan, np.nan]


WAYS = []


def way(function):
    """A generator: what is before its ``yield`` makes the scene, what comes after it is what the script does then."""
    WAYS.append(function)
    return function


class Place:
    """A camera 10 m above the cube, and what it hangs on."""

    def __init__(self):
        scene.frame_set(1)
        self.eye = made("Eye", bpy.data.cameras.new("Eye"))
        self.eye.location = (0, 0, 10)
        self.rig = made("Rig")
        self.camera = btb.Camera(self.eye, shape=SHAPE)


@way
def parent(at):
    at.eye.parent = at.rig
    animate(at.rig, "location", (0, 0, 0), (5, 5, 5))
    yield
    at.rig.location = (1, 0.5, 0)


@way
def grandparent(at):
    middle = made("Middle")
    at.eye.parent, middle.parent, at.eye.location.x = middle, at.rig, 1
    animate(at.rig, "rotation_euler", (0, 0, 0), (1, 1, 1))
    yield
    at.rig.rotation_euler.z = 0.7


@way
def constraint(at):
    copy = at.eye.constraints.new("COPY_LOCATION")
    copy.target, copy.use_z = at.rig, False
    animate(at.rig, "location", (0, 0, 0), (5, 5, 5))
    yield
    at.rig.location.x = 1


@way
def track_to(at):
    track = at.eye.constraints.new("TRACK_TO")
    track.target, track.track_axis, track.up_axis = at.rig, "TRACK_NEGATIVE_Z", "UP_Y"
    animate(at.rig, "location", (0, 0, 0), (5, 5, 5))
    yield
    at.rig.location = (1, 1, 0)


@way
def influence(at):
    copy = at.eye.constraints.new("COPY_LOCATION")
    copy.target, copy.use_z, at.rig.location.x = at.rig, False, 2
    animate(copy, "influence", 0.0, 1.0)
    yield
    copy.influence = 0.5


@way
def its_own_location(at):
    animate(at.eye, "location", (0, 0, 10), (5, 5, 5))
    yield
    at.eye.location.x = -1


@way
def its_own_quaternion(at):
    at.eye.rotation_mode = "QUATERNION"
    animate(at.eye, "rotation_quaternion", (1, 0, 0, 0), (0, 1, 0, 0))
    yield
    at.eye.rotation_quaternion = (0.998, 0.05, 0.02, 0)


@way
def looking_at(at):
    animate(at.eye, "rotation_euler", (0, 0, 0), (1, 1, 1))
    yield
    at.camera.look_at((0.5, 0.5, 0), look_from=(2, -3, 9))


@way
def lens(at):
    at.eye.location.x = 1
    animate(at.eye.data, "lens", 50.0, 100.0)
    yield
    at.eye.data.lens = 70


@way
def shift(at):
    animate(at.eye.data, "shift_x", 0.0, 1.0)
    yield
    at.eye.data.shift_x = 0.2


@way
def ortho_scale(at):
    at.eye.location.x, at.eye.data.type = 1, "ORTHO"
    animate(at.eye.data, "ortho_scale", 6.0, 12.0)
    yield
    at.eye.data.ortho_scale = 9.0


@way
def driven_by_an_animated_property(at):
    at.rig["some.thing"] = 0.0
    at.rig.keyframe_insert('["some.thing"]', frame=1)
    drive = at.eye.driver_add("location", 0).driver
    drive.type = "SUM"
    variable = drive.variables.new()
    variable.targets[0].id, variable.targets[0].data_path = at.rig, '["some.thing"]'
    scene.frame_set(1)
    yield
    at.rig["some.thing"] = 1.0
    at.rig.update_tag()


@way
def bone(at):
    armature = made("Armature", bpy.data.armatures.new("Armature"))
    layer.objects.active = armature
    bpy.ops.object.mode_set(mode="EDIT")
    new = armature.data.edit_bones.new("The.Bone")
    new.head, new.tail = (0, 0, 0), (0, 0, 1)
    bpy.ops.object.mode_set(mode="OBJECT")
    at.eye.parent, at.eye.parent_type, at.eye.parent_bone = armature, "BONE", "The.Bone"
    at.eye.matrix_world = Matrix.Translation((0, 0, 10))
    animate(armature.pose.bones["The.Bone"], "location", (0, 0, 0), (1, 2, 3))
    yield
    armature.pose.bones["The.Bone"].location.x = 1


@way
def a_sheared_parent(at):
    middle = made("Middle")
    middle.parent, at.eye.parent, at.eye.location.x = at.rig, middle, 1
    at.rig.scale, middle.rotation_euler = (1, 1.5, 1), (0, 0, 0.5)
    yield
    at.rig.location = (0.5, -1, 0)


@way
def a_view_matrix_that_is_sheared(at):
    yield
    shear = Matrix.Identity(4)
    shear[0][1] = 0.3
    at.camera.view_matrix = (Matrix.Translation((1, 1, 10)) @ shear).normalized().inverted()


@way
def a_mirrored_parent(at):
    at.eye.parent, at.rig.scale, at.eye.location.x = at.rig, (-1, 1, 1), 1
    yield
    at.eye.location.x = 1.5


@way
def hidden_from_viewports(at):
    at.eye.parent, at.eye.hide_viewport = at.rig, True
    yield
    at.rig.location.x = 1


@way
def hidden_with_what_it_hangs_on(at):
    at.eye.parent, at.eye.hide_viewport, at.rig.hide_viewport = at.rig, True, True
    animate(at.rig, "location", (0, 0, 0), (10, 0, 0))
    animate(at.eye.data, "shift_y", 0.0, 1.0)
    yield
    scene.frame_set(3)


@way
def excluded(at):
    collection = bpy.data.collections.new("Excluded")
    scene.collection.children.link(collection)
    collection.objects.link(at.eye)
    scene.collection.objects.unlink(at.eye)
    layer.layer_collection.children[collection.name].exclude = True
    at.eye.parent = at.rig
    yield
    at.rig.location.x = 1


@way
def in_no_collection(at):
    scene.collection.objects.unlink(at.eye)
    at.eye.parent = at.rig
    yield
    at.rig.location.x = 1


@way
def resolution(at):
    at.camera, at.eye.location.x = btb.Camera(at.eye), 1
    scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = 64, 48, 100
    yield
    scene.render.resolution_x, scene.render.resolution_percentage = 160, 50


@way
def pixel_aspect(at):
    at.eye.location = (1, 1, 10)
    yield
    scene.render.pixel_aspect_x = 1.5


@way
def a_view_matrix(at):
    animate(at.eye, "location", (0, 0, 10), (5, 5, 5))
    yield
    at.camera.view_matrix = Matrix.Translation((1, 0.5, -9)) @ Matrix.Rotation(0.1, 4, "Y")
    at.eye.location.x = 7


@way
def a_view_matrix_in_place(at):
    yield
    at.camera.view_matrix[0][3] += 1


@way
def k_of_a_calibration(at):
    yield
    fx, fy, cx, cy = 90.0, 70.0, 27.0, 30.0
    for row, values in enumerate(
        [(2 * fx / WIDTH, 0, 1 - 2 * cx / WIDTH, 0), (0, 2 * fy / HEIGHT, 2 * cy / HEIGHT - 1, 0)]
    ):
        at.camera.proj_matrix[row] = values
    at.eye.location = (0.5, 0.5, 10)
    results["k"] = at.camera.intrinsics


@way
def k_in_a_portrait(at):
    at.camera.shape = (64, 48)
    at.eye.data.sensor_fit = "VERTICAL"
    yield
    at.camera.proj_matrix[0][2] = 0.3
    at.camera.proj_matrix[1][1] *= 1.2


@way
def an_orthographic_projection(at):
    at.eye.location.x = 1
    yield
    at.camera.proj_matrix = [(0.3, 0, 0, 0.1), (0, 0.5, 0, -0.2), (0, 0, -0.02, -1.002), (0, 0, 0, 1)]


@way
def k_of_an_animated_camera(at):
    at.eye.parent = at.rig
    animate(at.rig, "location", (0, 0, 0), (10, 0, 0))
    animate(at.eye.data, "lens", 50.0, 100.0)
    yield
    at.camera.proj_matrix[0][2] = 0.5
    scene.frame_set(2)


@way
def a_marker_that_switches_cameras(at):
    scene.timeline_markers.new("Cut", frame=1).camera = made("Other", bpy.data.cameras.new("Other"))
    yield
    at.eye.location.x = 1


@way
def a_camera_of_the_scene_that_comes_later(at):
    scene.camera = made("Other", bpy.data.cameras.new("Other"))
    yield
    at.eye.location.x = 1


@way
def a_handler(at):
    bpy.app.handlers.frame_change_pre.append(lambda *_: setattr(at.eye.location, "x", 0))
    scene.frame_set(2)
    yield
    at.eye.location.x = 1


# Errors, unless picture and labels agree.


def blend_actions(rig):
    """Of an animated location: it is lost in renders what a script sets there."""
    track = rig.animation_data.nla_tracks.new()
    track.strips.new("Strip", 1, rig.animation_data.action)
    rig.animation_data.action = None
    scene.frame_set(1)


@way
def blended_actions(at):
    animate(at.rig, "location", (0, 0, 0), (5, 5, 5))
    at.eye.parent = at.rig
    blend_actions(at.rig)
    yield
    at.rig.location.x = 1


@way
def blended_actions_far_away(at):
    animate(at.eye, "location", (1e5, 0, 10))
    blend_actions(at.eye)
    yield
    at.eye.location.x += 0.5


@way
def blended_actions_in_a_tiny_scene(at):
    animate(at.eye, "location", (0, 0, 4e-5))
    blend_actions(at.eye)
    yield
    at.eye.location.x = 1e-5


@way
def blended_actions_of_the_clip_range(at):
    animate(at.eye.data, "clip_end", 100.0)
    blend_actions(at.eye.data)
    yield
    at.eye.data.clip_end = 100.5


@way
def blended_actions_of_a_large_scene(at):
    at.eye.data.type = "ORTHO"
    animate(at.eye.data, "ortho_scale", 1e4)
    blend_actions(at.eye.data)
    yield
    at.eye.data.ortho_scale = 1.02e4


@way
def skew(at):
    yield
    at.camera.proj_matrix[0][1] = 0.1


@way
def a_mirrored_projection(at):
    yield
    at.camera.proj_matrix[0][0] *= -1


@way
def a_scaled_view(at):
    yield
    at.camera.view_matrix = Matrix.Scale(2, 4) @ at.camera.view_matrix


ALSO_BY_CYCLES = (
    parent,
    lens,
    a_sheared_parent,
    a_view_matrix_that_is_sheared,
    a_mirrored_parent,
    excluded,
    k_of_a_calibration,
    an_orthographic_projection,
)


def count():
    return len(bpy.data.objects), len(bpy.data.cameras), len(scene.objects)


results["ways"] = [function.__name__ for function in WAYS]
for function in WAYS:
    name = function.__name__
    handlers = list(bpy.app.handlers.frame_change_pre)
    at = Place()
    steps = function(at)
    next(steps)
    camera = at.camera
    results[f"{name} unmoved"] = camera.object_to_pixel(cube).mean(axis=0)
    next(steps, None)
    results[f"{name} before"] = camera.object_to_pixel(cube).mean(axis=0)
    off = btb.OffScreenRenderer(camera, mode="rgb")
    off.set_render_style("SOLID")
    blocks = count()
    try:
        for engine in ("WORKBENCH", "CYCLES") if function in ALSO_BY_CYCLES else ("WORKBENCH",):
            results[f"{name} {engine}"] = centroid(btb.FinalRenderer(camera, mode="rgb", engine=engine).render())
        results[f"{name} after"] = camera.object_to_pixel(cube).mean(axis=0)
        results[f"{name} off-screen"] = centroid(off.render())
    except ConfigurationError as error:
        results[f"{name} error"] = str(error)
    results[f"{name} left"] = np.subtract(count(), blocks)
    bpy.app.handlers.frame_change_pre[:] = handlers
    scene.timeline_markers.clear()
    scene.render.pixel_aspect_x = 1


# The same of what is not a camera: an animated cube that the script has moved, and one that viewports do not show.
cube.location.y = 1.5
hidden = made("Hidden", cube.data)
hidden.location.y, hidden.scale, hidden.hide_viewport = -1.5, cube.scale, True
for obj in (cube, hidden):
    animate(obj, "location", (-2, obj.location.y, 0), (2, obj.location.y, 0))
at = Place()
renderer = btb.FinalRenderer(at.camera, mode="rgb", engine="WORKBENCH")
for frame in (1, 6, 11):
    scene.frame_set(frame)
    cube.location.x = 1
    results[f"objects {frame}"] = renderer.render()
    results[f"objects {frame} after"] = np.array(cube.location)
bpy.data.objects.remove(hidden)
cube.animation_data_clear()
cube.location = (0, 0, 0)

# What a script sets on animated properties counts by its own size: far from the world's origin, and in a tiny scene.
at = Place()
renderer = btb.FinalRenderer(at.camera, mode="rgb", engine="CYCLES")
for name, origin, size in (("far", 1e5, 1.0), ("tiny", 0.0, 1e-5)):
    at.eye.location, at.eye.data.clip_start, cube.scale = (origin, 0, 10 * size), 0.1 * size, [0.3 * size] * 3
    animate(cube, "location", (origin, 0, 0), (origin + 5 * size, 0, 0))
    cube.location.x = origin + size
    results[f"{name} before"] = at.camera.object_to_pixel(cube).mean(axis=0)
    results[f"{name} CYCLES"] = centroid(renderer.render())
    results[f"{name} after"] = at.camera.object_to_pixel(cube).mean(axis=0)
    cube.animation_data_clear()
cube.location, cube.scale, at.eye.data.type = (0, 0, 0), (0.3, 0.3, 0.3), "PERSP"
at.eye.animation_data_clear()
animate(at.eye.data, "type", "PERSP", "ORTHO")
at.eye.location, at.eye.data.clip_start, at.eye.data.type = (1, 0, 10), 0.1, "ORTHO"
results["type before"] = at.camera.object_to_pixel(cube).mean(axis=0)
results["type CYCLES"] = centroid(renderer.render())
results["type after"] = at.camera.object_to_pixel(cube).mean(axis=0)

# Nobody has changed what has the value of its animation, whatever value, at whatever time.
animate(cube, "location", (0.1, 1e5, 3e-7), (4.3, -1e5, 5e-6))
animate(at.eye.data, "lens", 35.3, 80.1)
cube["number"], cube["count"] = 0.3, 1
for path in ('["number"]', '["count"]', "hide_render"):
    cube.keyframe_insert(path, frame=1)
cube["number"], cube["count"], cube.hide_render = 7.7, 9, True
for path in ('["number"]', '["count"]', "hide_render"):
    cube.keyframe_insert(path, frame=23)
results["not overridden"] = []
for frame, subframe in ((1, 0), (2, 0), (5, 0.37), (12, 0), (17, 0.9), (30, 0)):
    scene.frame_set(frame, subframe=subframe)
    results["not overridden"].append(len(overrides.read().overrides))
scene.frame_set(1)
for owner in (cube, at.eye.data):
    owner.animation_data_clear()
cube.location, cube.hide_render = (0, 0, 0), False

# A camera and what it sees, near the world's origin and far from it: what is computed is the same.
passes = (
    ("instance", "depth", "keypoints", "boxes_2d_full", "boxes_3d") if compat.draws_off_screen() else ("keypoints",)
)
for name, origin in (("near", 0), ("distant", 65536)):
    at = Place()
    cube.location, cube.rotation_euler = (origin + 0.5, origin - 0.25, 0), (0.3, 0.2, 0.1)
    at.eye.location, at.eye.rotation_euler = (origin + 1.5, origin - 2.25, 2), (0.8, 0.1, 0.4)
    off, points = btb.OffScreenRenderer(at.camera), {"corner": (cube, 3), "middle": cube}
    truth = btb.GroundTruth(at.camera, passes, keypoints=points, renderer=off)
    for label, array in truth.render().items():
        results[f"{name} {label}"] = array
    results[f"{name} pixels"] = at.camera.object_to_pixel(cube)
    results[f"{name} in_view"] = at.camera.in_view(utils.world_coordinates(cube))
cube.location = cube.rotation_euler = (0, 0, 0)

# A slab that lies on the floor 20 m away, seen by a camera whose clip range begins at its nose.
floor = made("Ground", cube.data)
floor.scale = (40, 40, 1e-3)
at = Place()
at.eye.location, at.eye.data.clip_end = (0, -14, 14), 1000
at.camera.look_at((0, 0, 0))
for above in (0.01, 0.002) if compat.draws_off_screen() else ():
    cube.location, cube.scale = (0, 0, above), (2, 2, 1e-3)
    for near in (0.1, 1e-3, 1e-4):
        at.eye.data.clip_start = near
        truth = btb.GroundTruth(at.camera, ("instance",), objects=[cube], renderer=off)
        results[f"slab {above} m above, clip start {near}"] = truth.render()["instance"]
bpy.data.objects.remove(floor)
cube.location, cube.scale = (0, 0, 0), (0.3, 0.3, 0.3)

# A handler that moves things whenever it is called, as scripts do that make each frame another.
at = Place()
called = []


def move_on(*_):
    called.append(scene.frame_current)
    cube.location.x = len(called) % 5 - 2


times = ("frame_change_pre", "frame_change_post", "render_init", "render_pre", "render_post", "render_complete")
for name in times:
    getattr(bpy.app.handlers, name).append(move_on)
renderer = btb.FinalRenderer(at.camera, mode="rgb", engine="WORKBENCH")
truth = btb.GroundTruth(at.camera, ("keypoints",), keypoints={"middle": cube}, renderer=renderer)
for frame in (2, 3, 4):
    scene.frame_set(frame)
    results[f"handled {frame}"] = at.camera.object_to_pixel(cube).mean(axis=0)
    results[f"handled {frame} before"] = truth.render()["keypoints"][0, :2]
    results[f"handled {frame} WORKBENCH"] = centroid(renderer.render())
    results[f"handled {frame} after"] = truth.render()["keypoints"][0, :2]
results["handled"] = called
for name in times:
    getattr(bpy.app.handlers, name).remove(move_on)
cube.location = (0, 0, 0)
scene.frame_set(1)

# Nothing is rendered without a view layer.
layer.use = False
try:
    renderer.render()
except ConfigurationError as error:
    results["no layer"] = str(error)
layer.use = True

# What hangs on an animated rig that viewports do not show, and evaluate for nobody: only a modifier needs it that they leave out.
rig = made("Hidden")
animate(rig, "location", (0, 0, 0), (2, 0, 0))
rig.scale, rig.hide_viewport = cube.scale, True
copy = cube.modifiers.new("Copy", "ARRAY")
copy.use_relative_offset, copy.use_object_offset, copy.offset_object, copy.show_viewport = False, True, rig, False
at = Place()
at.camera.shape = (24, 64)
renderer = btb.FinalRenderer(at.camera, mode="rgb", engine="WORKBENCH")
truth = btb.GroundTruth(at.camera, ("boxes_2d_full",), objects=[cube], renderer=renderer)
for frame in (1, 6, 11):
    scene.frame_set(frame)
    results[f"copies {frame}"], results[f"copies {frame} box"] = renderer.render(), truth.render()["boxes_2d_full"]
at.eye.parent, at.eye.hide_viewport, scene.camera = rig, True, made("Other", bpy.data.cameras.new("Other"))
scene.frame_set(6)
results["on a hidden rig"] = np.linalg.inv(at.camera.view_matrix)[0, 3]
cube.modifiers.clear()

# A camera that moves past a high wall, 4 m a frame, seen with the shutter open for a quarter of a frame.
cube.scale = (0.3, 2, 0.3)
scene.render.use_motion_blur, scene.render.motion_blur_shutter, scene.cycles.samples = True, 0.25, 64
at = Place()
at.eye.parent = at.rig
animate(at.rig, "location", (-20, 0, 0), (20, 0, 0))
for curve in compat.curves(at.rig.animation_data):
    for point in curve.keyframe_points:
        point.interpolation = "LINEAR"
scene.frame_set(6)
renderer = btb.FinalRenderer(at.camera, mode="rgb", engine="CYCLES")
results["blurred"] = renderer.render()
scene.cycles.rolling_shutter_type, scene.cycles.rolling_shutter_duration = "TOP", 0.01
results["rolling"] = renderer.render()
scene.cycles.rolling_shutter_type = "NONE"
at.camera.view_matrix = at.camera.view_matrix
results["held"] = renderer.render()

np.savez(out, **results)
