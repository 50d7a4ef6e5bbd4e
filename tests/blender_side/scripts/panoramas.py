"""Labels of panoramic cameras beside what Cycles itself says: numbers, depths and normals, one sample in each pixel's middle."""

import sys
from math import pi

import bpy
import cycles
import numpy as np

import blendtorch.btb as btb
from blender_side import compat
from blendtorch_shm.errors import ConfigurationError

out = btb.parse_blendtorch_args()[1][0]
IS_4, IS_5 = bpy.app.version >= (4, 0, 0), bpy.app.version >= (5, 0, 0)
scene, layer = bpy.context.scene, bpy.context.view_layer
for obj in list(scene.objects):
    if obj.type != "CAMERA":
        bpy.data.objects.remove(obj)
scene.render.engine = "CYCLES"
scene.cycles.samples, scene.cycles.use_denoising = 1, False
scene.cycles.pixel_filter_type, scene.cycles.filter_width = "BOX", 0.01
layer.use_pass_z = layer.use_pass_normal = layer.use_pass_object_index = True
results, passes = {}, {}
# In 3.4 with a window, the first render takes the GPU context along if Cycles makes it: then nothing can be drawn afterwards.
btb.FinalRenderer(btb.Camera(shape=(8, 8)), engine="WORKBENCH").render()
original = cycles.CyclesRender.render


def render_and_note(self, depsgraph):
    original(self, depsgraph)
    size = scene.render.resolution_y, scene.render.resolution_x
    for made in self.get_result().layers[0].passes:
        pixels = np.empty((*size, made.channels), np.float32)
        flat = pixels.reshape(-1)
        made.rect.foreach_get(flat if IS_4 else flat.reshape(-1, made.channels))
        passes[made.name] = pixels[::-1]


cycles.CyclesRender.render = render_and_note

PLACES = {
    "front": (0.5, 4, 0.3),
    "right": (4, -0.5, 1),
    "behind": (-0.2, -5, 0.4),
    "above": (0.5, 0.3, 5),
    "left": (-3, 1, -1),
}
for name, place in PLACES.items():
    if name == "left":
        bpy.ops.mesh.primitive_uv_sphere_add(location=place)
        bpy.ops.object.shade_smooth()
    else:
        bpy.ops.mesh.primitive_cube_add(location=place, rotation=(0.2, 0.4, 0.1))
    bpy.context.object.name = name
    bpy.context.object.pass_index = len(bpy.data.objects)
bpy.ops.mesh.primitive_plane_add(size=30, location=(2, 3, -3))
bpy.context.object.name, bpy.context.object.pass_index = "floor", 99
objects = {obj.name: obj for obj in scene.objects if obj.type == "MESH"}
eye = scene.camera
eye.location, eye.rotation_euler = (0.1, -0.1, 0.2), (pi / 2 - 0.1, 0.05, 0.1)
eye.data.type, eye.data.clip_start, eye.data.clip_end = "PANO", 0.1, 12
settings = eye.data if hasattr(eye.data, "panorama_type") else eye.data.cycles

FULL = dict(longitude_min=-pi, longitude_max=pi, latitude_min=-pi / 2, latitude_max=pi / 2)
SHOTS = {
    "equirectangular": ((64, 128), "EQUIRECTANGULAR", FULL, (0, 0)),
    "part of it": (
        (64, 96),
        "EQUIRECTANGULAR",
        dict(longitude_min=-1, longitude_max=2, latitude_min=-0.6, latitude_max=1),
        (0.1, 0.05),
    ),
    "fisheye": ((96, 96), "FISHEYE_EQUIDISTANT", dict(fisheye_fov=pi), (0, 0)),
    "wide fisheye": ((72, 96), "FISHEYE_EQUIDISTANT", dict(fisheye_fov=5.2), (0.05, -0.03)),
}
RASTERS = ("depth", "distance", "normals", "instance") if compat.draws_off_screen() else ()
results["shots"], results["names"], results["draws"] = list(SHOTS), list(objects), bool(RASTERS)
results["indices"] = [obj.pass_index for obj in objects.values()]
for shot, (shape, model, values, (eye.data.shift_x, eye.data.shift_y)) in SHOTS.items():
    settings.panorama_type = model
    for name, value in values.items():
        setattr(settings, name, value)
    camera = btb.Camera(shape=shape)
    renderer = btb.FinalRenderer(camera, mode="rgb")
    truth = btb.GroundTruth(
        camera,
        (*RASTERS, *(("boxes_2d",) if RASTERS else ()), "boxes_2d_full", "boxes_3d", "keypoints"),
        objects=objects.values(),
        keypoints={name: (obj, (0, 0, 0)) for name, obj in objects.items()},
        renderer=renderer,
    )
    renderer.render()
    results[f"{shot} cycles depth"] = passes["Depth"][..., 0]
    results[f"{shot} cycles normal"] = passes["Normal"]
    results[f"{shot} cycles index"] = passes["Object Index" if IS_5 else "IndexOB"][..., 0].astype(int)
    for key, value in truth.render().items():
        results[f"{shot} {key}"] = value
    results[f"{shot} view"] = np.array(camera.view_matrix)
    results[f"{shot} in view"] = [camera.in_view(obj.location)[0] for obj in objects.values()]
    results[f"{shot} xy"] = camera.object_to_pixel(*objects.values())
    results[f"{shot} centers"] = camera.ndc_to_pixel(camera.world_to_ndc([obj.location for obj in objects.values()]))
    for name, obj in objects.items():  # alone, for its whole box
        for other in objects.values():
            other.hide_render = other is not obj
        renderer.render()
        results[f"{shot} alone {name}"] = passes["Object Index" if IS_5 else "IndexOB"][..., 0] > 0
    for other in objects.values():
        other.hide_render = False


def refused(name, wrong):
    try:
        wrong()
    except ConfigurationError as error:
        results[f"refused {name}"] = str(error)


camera = btb.Camera(shape=(48, 64))
refused("K", lambda: camera.intrinsics)
refused("camera pass", lambda: btb.GroundTruth(camera, ("camera",), renderer=renderer).render())
if RASTERS:
    refused("flow", lambda: btb.GroundTruth(camera, ("flow_backward",), renderer=renderer).render())
refused("workbench", lambda: btb.FinalRenderer(camera, engine="WORKBENCH").render())
refused("eevee", lambda: btb.FinalRenderer(camera, engine="EEVEE").render())
off = btb.OffScreenRenderer(camera)
off.set_render_style("SOLID")
refused("off-screen", lambda: off.render())
for model in ("MIRRORBALL", "FISHEYE_EQUISOLID", "FISHEYE_LENS_POLYNOMIAL"):
    settings.panorama_type = model
    refused(f"{model} points", lambda: camera.object_to_pixel(objects["front"]))
    refused(f"{model} in view", lambda: camera.in_view((0, 0, 0)))
    for label in (*RASTERS[:1], "boxes_2d_full", "keypoints"):
        points = {"a": objects["front"]} if label == "keypoints" else None
        labels = btb.GroundTruth(camera, (label,), keypoints=points, renderer=renderer)
        refused(f"{model} {label}", labels.render)
results["picture of another model"] = btb.FinalRenderer(camera, mode="rgb").render()

np.savez(out, **results)
print("saw", sorted(results), file=sys.stderr)
