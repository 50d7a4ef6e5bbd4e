"""Pictures of one scene by each renderer, with films, view transforms and viewports of all kinds, as one .npz file."""

import sys

import bpy
import numpy as np

import blendtorch.btb as btb
from blender_side import compat, utils
from blendtorch_shm.errors import ConfigurationError

out = btb.parse_blendtorch_args()[1][0]
HEIGHT, WIDTH = 24, 48
scene = bpy.context.scene
layer = bpy.context.view_layer
for obj in list(bpy.data.objects):
    if obj.type != "CAMERA":
        bpy.data.objects.remove(obj)
scene.render.engine = compat.EEVEE
scene.eevee.taa_samples = scene.eevee.taa_render_samples = 1
scene.cycles.samples, scene.cycles.use_denoising = 1, False
scene.render.dither_intensity = 0
scene.view_settings.view_transform, scene.view_settings.look = "Standard", "None"
if scene.world is None:
    scene.world = bpy.data.worlds.new("World")
scene.world.use_nodes = True
scene.world.node_tree.nodes["Background"].inputs["Color"].default_value = (0.05, 0.1, 0.2, 1)
results = {"off_screen": compat.draws_off_screen(), "has_alpha": compat.draws_without_background()}


def patch(x, other, strength, fraction=None):
    """A square of a colour of light, mixed with (or, without a fraction, added to) another shader."""
    bpy.ops.mesh.primitive_plane_add(size=1, location=(x, 0, 0))
    material = bpy.data.materials.new("Patch")
    material.use_nodes = True
    if hasattr(material, "blend_method"):
        material.blend_method = "BLEND"
    nodes, links = material.node_tree.nodes, material.node_tree.links
    emission, clear = nodes.new("ShaderNodeEmission"), nodes.new(other)
    emission.inputs["Color"].default_value = (1, 0.5, 0.25, 1)
    emission.inputs["Strength"].default_value = strength
    both = nodes.new("ShaderNodeAddShader" if fraction is None else "ShaderNodeMixShader")
    if fraction is not None:
        both.inputs[0].default_value = fraction
    links.new(clear.outputs[0], both.inputs[-2])
    links.new(emission.outputs[0], both.inputs[-1])
    links.new(both.outputs[0], nodes["Material Output"].inputs["Surface"])
    layer.objects.active.data.materials.append(material)


patch(-1.5, "ShaderNodeBsdfTransparent", 2, 0.4)
patch(0, "ShaderNodeBsdfTransparent", 0.5)
patch(1.5, "ShaderNodeHoldout", 1, 0.4)
scene.camera.data.type, scene.camera.data.ortho_scale = "ORTHO", 6
camera = btb.Camera(shape=(HEIGHT, WIDTH))
camera.look_at((0, 0, 0), look_from=(0, 0, 5))
results["xy"] = camera.ndc_to_pixel(camera.world_to_ndc([(-1.5, 0, 0), (0, 0, 0), (1.5, 0, 0), (0, 0.9, 0)]))


def off(key, mode="rgba", color_space="linear", style="RENDERED", later=False):
    renderer = btb.OffScreenRenderer(camera, mode=mode, color_space=color_space)
    renderer.set_render_style(style)
    try:
        results[key] = renderer.render_later().read() if later else renderer.render()
    except ConfigurationError as error:
        results[key] = str(error)


for transparent in (False, True):
    scene.render.film_transparent = transparent
    for engine in ("CYCLES", "EEVEE"):
        key = f"{transparent} {engine}"
        results[f"{key} light"] = btb.FinalRenderer(camera, engine=engine, dtype="float32").render()
        if engine == "CYCLES":
            results[f"{key} linear"] = btb.FinalRenderer(camera, engine=engine).render()
            results[f"{key} srgb"] = btb.FinalRenderer(camera, engine=engine, color_space="srgb").render()
    key = f"{transparent} off"
    off(f"{key} linear")
    off(f"{key} srgb", color_space="srgb")
    if compat.draws_off_screen():  # else each is a final render, and takes seconds
        off(f"{key} linear rgb", mode="rgb")
        off(f"{key} srgb rgb", mode="rgb", color_space="srgb")
        off(f"{key} srgb later", color_space="srgb", later=True)
    off(f"{key} solid", style="SOLID")
    off(f"{key} solid srgb", style="SOLID", color_space="srgb")
scene.render.film_transparent = False

# A scene with lights, seen through whatever viewport.
for obj in list(bpy.data.objects):
    if obj.type == "MESH":
        bpy.data.objects.remove(obj)
bpy.ops.mesh.primitive_uv_sphere_add()
for polygon in layer.objects.active.data.polygons:
    polygon.use_smooth = True
bpy.ops.mesh.primitive_plane_add(size=12, location=(0, 0, -1))
bpy.ops.object.light_add(type="SUN", rotation=(0.5, 0.3, 0))
sun = layer.objects.active
sun.data.energy = 3
camera.bpy_camera.data.type = "PERSP"
camera.look_at((0, 0, 0), look_from=(4, -4, 3))
camera.update_proj_matrix()
if compat.VERSION >= (4, 0, 0):
    scene.view_settings.view_transform = "AgX"
lens = camera.bpy_camera.data
lens.dof.use_dof, lens.dof.focus_distance, lens.dof.aperture_fstop = True, 3, 0.5


def final(key):
    results[key] = btb.FinalRenderer(camera, color_space="srgb", engine="EEVEE").render()


off("plain", color_space="srgb")
final("plain f12")
if compat.VERSION >= (4, 0, 0):  # earlier ones know no such display
    scene.view_settings.view_transform = "Standard"
    scene.display_settings.display_device = "Display P3"
    scene.view_settings.view_transform, scene.view_settings.exposure = "Standard", 0.5
    off("wide", color_space="srgb")
    final("wide f12")
    scene.display_settings.display_device, scene.view_settings.exposure = "sRGB", 0
    scene.view_settings.view_transform = "AgX"

area, space, region = utils.find_first_view3d()
if compat.draws_off_screen():
    # The other camera, and what of the viewport could get into the picture.
    other = bpy.data.objects.new("Other", bpy.data.cameras.new("Other"))
    other.data.dof.use_dof, other.data.dof.focus_distance = True, 0.1
    scene.collection.objects.link(other)
    space.use_local_camera, space.camera = True, other
    space.region_3d.view_perspective = "CAMERA"
    scene.render.use_border, scene.render.border_min_x = True, 0.5
    space.use_render_border, space.render_border_min_x = True, 0.5
    space.use_local_collections = True
    space.show_object_viewport_mesh = space.show_object_viewport_light = False
    space.shading.use_scene_lights_render = space.shading.use_scene_world_render = False
    space.shading.use_scene_lights = space.shading.use_scene_world = False
    space.shading.render_pass = "NORMAL"
    space.overlay.show_overlays = True
    for window in bpy.context.window_manager.windows:
        if area in list(window.screen.areas):
            with bpy.context.temp_override(window=window, area=area, region=region):
                bpy.ops.view3d.localview(frame_selected=False)
    results["was in local view"] = space.local_view is not None
    off("disturbed", color_space="srgb")
    results["viewport as it was"] = (
        space.camera == other,
        space.region_3d.view_perspective == "CAMERA",
        scene.render.use_border,
    )

# A renderer that is kept while files are opened, and undone, draws what is there then.
names = ("SOLID", "RENDERED") if compat.draws_off_screen() else ("SOLID",)
kept = {style: btb.OffScreenRenderer(btb.Camera(shape=(HEIGHT, WIDTH)), mode="rgb") for style in names}
kept["final"] = btb.FinalRenderer(btb.Camera(shape=(HEIGHT, WIDTH)), mode="rgb", engine="CYCLES")
pending = []


def draw(name):
    scene = bpy.context.scene
    scene.eevee.taa_samples, scene.cycles.samples, scene.cycles.use_denoising = 1, 1, False
    fresh = btb.Camera(shape=(HEIGHT, WIDTH))
    for style, renderer in kept.items():
        renderer.camera = fresh
        if style != "final":
            renderer.set_render_style(style)
            pending.append((f"{name} {style} now", renderer.render_later()))
        results[f"{name} {style}"] = renderer.render()


def undo(name, **options):
    """With a window, Blender wants to know in which."""
    windows = bpy.context.window_manager.windows
    with bpy.context.temp_override(**({"window": windows[0]} if windows and not bpy.app.background else {})):
        getattr(bpy.ops.ed, name)(**options)


here = bpy.data.filepath
draw("opened 0")
bpy.ops.wm.open_mainfile(filepath=here)
draw("opened 1")
bpy.context.preferences.edit.use_global_undo = True
undo("undo_push", message="before")
bpy.data.objects["Cube"].location.x = 3
undo("undo_push", message="after")
draw("moved")
undo("undo")
draw("undone")
for key, picture in pending:
    results[key] = picture.read()

# A final render by Cycles with a grease pencil takes the GPU context away, in background.
add = bpy.ops.object.grease_pencil_add if compat.VERSION >= (4, 3, 0) else bpy.ops.object.gpencil_add
add(type="STROKE")
for number in range(2):
    draw(f"pencil {number}")

np.savez(out, **results)
print("styles", sorted(results), file=sys.stderr)
