"""Renders the cube in many ways and saves pictures, what the camera says about them, and what must hold, as one .npz file."""

import sys

import bpy
import numpy as np

import blendtorch.btb as btb
from blender_side import compat, publisher, readback, utils

out = btb.parse_blendtorch_args()[1][0]
scene = bpy.context.scene
cube = bpy.data.objects["Cube"]
bpy.data.objects["Floor"].hide_viewport = bpy.data.objects["Floor"].hide_render = True
scene.render.resolution_x, scene.render.resolution_y = 160, 120
scene.render.use_stamp = True  # for files only
_, space, _ = utils.find_first_view3d()
space.shading.light, space.shading.color_type = "FLAT", "MATERIAL"
space.shading.background_type, space.shading.background_color = "VIEWPORT", (0.0, 0.0, 0.0)
for name in ("show_object_outline", "show_cavity", "show_shadows", "show_specular_highlight"):
    setattr(space.shading, name, False)
results = {"off_screen": compat.draws_off_screen(), "colors": [m.diffuse_color[:3] for m in cube.data.materials]}


def shoot(name: str, camera: btb.Camera, shading: str = "SOLID", **options: str) -> np.ndarray:
    """Render, and note where the corners are and which faces are seen where."""
    renderer = btb.OffScreenRenderer(camera, **options)
    renderer.set_render_style(shading, overlays=False)
    image = renderer.render()
    results[name] = image
    results[f"{name} xy"] = camera.object_to_pixel(cube)
    world = np.array(cube.matrix_world)
    normals = np.array([p.normal for p in cube.data.polygons]) @ world[:3, :3].T
    centers = np.array([p.center for p in cube.data.polygons]) @ world[:3, :3].T + world[:3, 3]
    eye = np.array(camera.view_matrix.inverted())
    towards = eye[:3, 2] if camera.type == "ORTHO" else eye[:3, 3] - centers
    results[f"{name} faces xy"] = camera.ndc_to_pixel(camera.world_to_ndc(centers))
    results[f"{name} faces seen"] = (normals * towards).sum(-1) / np.linalg.norm(np.atleast_2d(towards), axis=-1) > 0.25
    results[f"{name} faces material"] = [p.material_index for p in cube.data.polygons]
    return image


cube.rotation_euler = (0.3, 0.5, 0.9)
cube.location = (0.4, -0.3, 0.2)
bpy.context.view_layer.update()
camera = btb.Camera()
shoot("persp linear", camera, mode="rgb")
shoot("persp srgb", camera, mode="rgba", color_space="srgb")
shoot("lower left", camera, mode="rgb", origin="lower-left")

lens = scene.camera.data
lens.shift_x, lens.shift_y, lens.sensor_fit, lens.lens = 0.12, -0.08, "VERTICAL", 35
scene.render.pixel_aspect_x = 1.5
camera.update_proj_matrix()
shoot("shifted", camera, mode="rgb")
lens.shift_x, lens.shift_y, lens.sensor_fit, lens.lens, scene.render.pixel_aspect_x = 0, 0, "AUTO", 50, 1.0

scene.camera.data.type, lens.ortho_scale = "ORTHO", 6
camera.update_proj_matrix()
shoot("ortho", camera, mode="rgb")
_, results["ortho depth"] = camera.world_to_ndc(cube.location, return_depth=True)
lens.type = "PERSP"

tall = btb.Camera(shape=(96, 64))
tall.look_at(cube.location, look_from=(-6, 3, -2))
shoot("looked at", tall, mode="rgb")
ndc, results["look_at depth"] = tall.world_to_ndc(cube.location, return_depth=True)
results["look_at xy"] = tall.ndc_to_pixel(ndc)
results["look_at xy lower"] = tall.ndc_to_pixel([[-1, 1, 0]], origin="lower-left")
results["bbox xy"] = np.sort(tall.bbox_object_to_pixel(cube), axis=0)
results["corners xy"] = np.sort(tall.object_to_pixel(cube), axis=0)

# A picture goes where the publisher says, and two pictures never share memory.
lent = np.full((96, 64, 3), 7, np.uint8)
publisher.lend_array = lambda shape, dtype: lent
renderer = btb.OffScreenRenderer(tall, mode="rgb")
renderer.set_render_style("SOLID")
results["lent is returned"] = renderer.render() is lent
results["lent"] = lent.copy()
pending = renderer.render_later()
lent[...] = 7
results["lent is filled later"] = pending.read() is lent and np.abs(lent - results["lent"].astype(int)).max() <= 1
publisher.lend_array = lambda shape, dtype: None
results["fresh memory"] = not np.shares_memory(renderer.render(), renderer.render())


def turn(i: int) -> None:
    cube.rotation_euler = (0.3 + 0.1 * i, 0.5, 0.9)
    bpy.context.view_layer.update()


# Pictures that are read later are of the scene as it was, in whatever order, of whatever size.
results["can be read later"] = compat.draws_off_screen() and readback.is_available()
small = btb.Camera(shape=(33, 47))
small.look_at(cube.location, look_from=(-6, 3, -2))
for i, (mode, origin) in enumerate((("rgb", "upper-left"), ("rgba", "lower-left"))):
    renderers = [btb.OffScreenRenderer(camera, mode=mode, origin=origin) for camera in (tall, small)]
    for each in renderers:
        each.set_render_style("SOLID")
    now, later = [], []
    for step in range(3):
        for each in renderers:
            turn(step)
            now.append(each.render())
            later.append(each.render_later())
            each.render_later()  # of this one, nobody wants to know
    turn(3)
    for number in (4, 0, 5, 1, 3, 2):
        results[f"later {i} {number}"], results[f"now {i} {number}"] = later[number].read(), now[number]
    results[f"same array {i}"] = later[0].read() is later[0].read()
turn(0)

if compat.draws_off_screen():
    compat.flips_on_gpu = lambda: True
    shoot("flipped on gpu", tall, mode="rgb")
    renderer = btb.OffScreenRenderer(tall, mode="rgb")
    renderer.set_render_style("SOLID")
    results["flipped on gpu, read later"] = renderer.render_later().read()

# What an emitter shines with is what the picture holds.
glow = bpy.data.materials.new("Glow")
glow.use_nodes = True
emission = glow.node_tree.nodes.new("ShaderNodeEmission")
emission.inputs["Color"].default_value = (0.5, 0.1, 0.02, 1)
glow.node_tree.links.new(emission.outputs[0], glow.node_tree.nodes["Material Output"].inputs["Surface"])
cube.data.materials.clear()
cube.data.materials.append(glow)
for space_name in ("linear", "srgb"):
    results[f"glow {space_name}"] = btb.OffScreenRenderer(tall, mode="rgb", color_space=space_name)
    results[f"glow {space_name}"].set_render_style("RENDERED")
    results[f"glow {space_name}"] = results[f"glow {space_name}"].render()
np.savez(out, **results)
print("renders", sorted(results), file=sys.stderr)
