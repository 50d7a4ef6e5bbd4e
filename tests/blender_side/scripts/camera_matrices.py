"""Puts a small cube at known places, and writes down where the camera's matrices say it is and where the picture shows it."""

import sys

import bpy
import numpy as np

import blendtorch.btb as btb
from blender_side import utils
from blendtorch_shm.errors import ConfigurationError

out = btb.parse_blendtorch_args()[1][0]
scene = bpy.context.scene
lens = scene.camera.data
cube = bpy.data.objects["Cube"]
bpy.data.objects["Floor"].hide_viewport = bpy.data.objects["Floor"].hide_render = True
cube.scale = (0.2, 0.2, 0.2)
_, space, _ = utils.find_first_view3d()
space.shading.light, space.shading.color_type, space.shading.single_color = "FLAT", "SINGLE", (1.0, 1.0, 1.0)
space.shading.background_type, space.shading.background_color = "VIEWPORT", (0.0, 0.0, 0.0)
for name in ("show_object_outline", "show_cavity", "show_shadows", "show_specular_highlight"):
    setattr(space.shading, name, False)

LANDSCAPE, PORTRAIT = (120, 160), (160, 120)
DEFAULTS = dict(type="PERSP", sensor_fit="AUTO", lens=50, shift_x=0, shift_y=0, ortho_scale=7)
SHOTS = {
    "landscape": (LANDSCAPE, (1, 1), {}),
    "portrait": (PORTRAIT, (1, 1), {}),
    "horizontal fit, portrait": (PORTRAIT, (1, 1), dict(sensor_fit="HORIZONTAL", lens=40)),
    "vertical fit, landscape": (LANDSCAPE, (1, 1), dict(sensor_fit="VERTICAL", lens=28)),
    "shift": (LANDSCAPE, (1, 1), dict(shift_x=0.15, shift_y=-0.1)),
    "shift, portrait, vertical fit": (
        PORTRAIT,
        (1, 1),
        dict(shift_x=-0.1, shift_y=0.2, sensor_fit="VERTICAL", lens=35),
    ),
    "wide pixels": (LANDSCAPE, (1.5, 1), dict(shift_x=0.05)),
    "high pixels": (PORTRAIT, (1, 1.25), dict(shift_y=0.1, sensor_fit="HORIZONTAL", lens=35)),
    "ortho": (LANDSCAPE, (1, 1), dict(type="ORTHO")),
    "ortho, portrait, shift": (PORTRAIT, (1, 1), dict(type="ORTHO", shift_x=0.1, shift_y=-0.05)),
    "ortho, vertical fit, wide pixels": (LANDSCAPE, (2, 1), dict(type="ORTHO", sensor_fit="VERTICAL", shift_y=0.1)),
}
TARGET = (0.5, -0.2, 0.3)
PLACES = np.array([(0.5, -0.2, 0.3), (1.4, 0.2, 0.0), (0.0, -1.0, 1.2)])

results = {"shots": list(SHOTS), "places": PLACES}
for shot, (shape, (scene.render.pixel_aspect_x, scene.render.pixel_aspect_y), settings) in SHOTS.items():
    for name, value in {**DEFAULTS, **settings}.items():
        setattr(lens, name, value)
    camera = btb.Camera(shape=shape)
    camera.look_at(TARGET, look_from=(5, -6, 4))
    renderer = btb.OffScreenRenderer(camera, mode="rgb")
    renderer.set_render_style("SOLID")
    shown, projected = [], []
    for place in PLACES:
        cube.location = place
        picture = renderer.render().max(axis=2).astype(float)
        y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
        shown.append(((picture * x).sum() / picture.sum(), (picture * y).sum() / picture.sum()))
        projected.append(camera.object_to_pixel(cube))
    results[f"{shot} K"] = camera.intrinsics
    results[f"{shot} opencv"] = camera.extrinsics()
    results[f"{shot} blender"] = camera.extrinsics("blender")
    results[f"{shot} view matrix"] = camera.view_matrix
    results[f"{shot} shown"] = shown
    results[f"{shot} vertices xy"] = projected
    results[f"{shot} in view"] = camera.in_view(PLACES)
    results[f"{shot} depth"] = camera.world_to_ndc(PLACES, return_depth=True)[1]
results["vertices"] = utils.object_coordinates(cube) @ np.array(cube.matrix_world.to_3x3()).T

for name, value in DEFAULTS.items():
    setattr(lens, name, value)
scene.render.pixel_aspect_x = scene.render.pixel_aspect_y = 1
lens.clip_start, lens.clip_end = 2, 9
camera = btb.Camera(shape=LANDSCAPE)
camera.look_at((0, 0, 0), look_from=(0, -5, 0))
results["in view"] = camera.in_view([(0, 0, 0), (0, -2.9, 0), (0, 3.9, 0), (1.7, 0, 0), (0, 0, 1.3)])
results["not in view"] = camera.in_view([(0, -3.1, 0), (0, 4.1, 0), (0, -8, 0), (0, -5, 0), (1.9, 0, 0), (0, 0, 1.5)])

results["array shape"] = [repr(btb.Camera(shape=shape).shape) for shape in ([120, 160], np.array(LANDSCAPE))]

eye = camera.bpy_camera
before = np.array(eye.matrix_world)
nan = float("nan")
refused = {
    "look at itself": lambda: camera.look_at((1, 2, 3), look_from=(1, 2, 3)),
    "look at nan": lambda: camera.look_at((nan, 0, 0), look_from=(1, 1, 1)),
    "look from nan": lambda: camera.look_at((0, 0, 0), look_from=(1, nan, 1)),
    "look at two numbers": lambda: camera.look_at((0, 0)),
}
for name, wrong in refused.items():
    try:
        wrong()
    except ConfigurationError as error:
        results[name] = str(error)
scene.view_layers[0].update()
results["left where it was"] = [before, np.array(eye.matrix_world)]
held = eye.constraints.new("COPY_LOCATION")
held.target = bpy.data.objects.new("Target", None)
scene.collection.objects.link(held.target)
held.target.location.x, held.use_y, held.use_z = 1.5e-4, False, False
for name, x in (("held", 1e-4), ("not held", 1.5e-4)):
    try:
        camera.look_at((0, 0, 0), look_from=(x, 2e-4, 1e-4))
        results[name] = camera.ndc_to_pixel(camera.world_to_ndc((0, 0, 0)))
    except ConfigurationError as error:
        results[name] = str(error)
eye.constraints.remove(held)
camera.look_at((1e6, 1e6, 0), look_from=(1e6 + 5, 1e6, 3))
results["far away"] = camera.ndc_to_pixel(camera.world_to_ndc((1e6, 1e6, 0)))
matrix = camera.extrinsics("blender") + np.eye(4) * 1e-12
camera.view_matrix = matrix
results["kept"] = [camera.extrinsics("blender"), matrix]
camera.view_matrix[0][3] += 1.0
results["changed"] = [camera.extrinsics("blender"), np.array(camera.view_matrix)]
camera.update_view_matrix()
for name, path, value in (("no scale", "scale", (0, 1, 1)), ("nowhere", "location", (nan, 0, 0))):
    good = getattr(eye, path).copy()
    setattr(eye, path, value)
    for how, ask in {
        "view": lambda: camera.view_matrix,
        "extrinsics": camera.extrinsics,
        "look_at": lambda: camera.look_at((0, 0, 0)),
        "off-screen": btb.OffScreenRenderer(camera).render,
        "final": btb.FinalRenderer(camera).render,
    }.items():
        try:
            ask()
        except ConfigurationError as error:
            results[f"{name}, {how}"] = str(error)
    setattr(eye, path, good)

lens.type = "PANO"
refused = {
    "panorama": lambda: camera.intrinsics,
    "convention": lambda: camera.extrinsics("opengl"),
    "no pixels": lambda: btb.Camera(shape=(0, 160)),
}
for name, wrong in refused.items():
    try:
        wrong()
    except ConfigurationError as error:
        results[name] = str(error)
np.savez(out, **results)
print("saw", sorted(results), file=sys.stderr)
