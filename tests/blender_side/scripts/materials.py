"""Renders a cube in the colours of its normals with both engines, and says which normals are seen where."""

import sys

import bpy
import numpy as np

import blendtorch.btb as btb
from blender_side import compat

out = btb.parse_blendtorch_args()[1][0]
scene = bpy.context.scene
cube = bpy.data.objects["Cube"]
bpy.data.objects["Floor"].hide_viewport = bpy.data.objects["Floor"].hide_render = True
cube.rotation_euler = (0.3, 0.5, 0.9)
cube.active_material_index = 0
cube.data.materials.clear()
material = btb.materials.create_normal_material("normals")
cube.active_material = material
camera = btb.Camera(shape=(60, 80))
scene.cycles.samples, scene.cycles.use_denoising = 1, False
scene.eevee.taa_samples = 1
camera.bpy_camera.scale = (2, 2, 2)
camera.look_at((0, 0, 0), look_from=(4, -5, 3))
pictures = {}
for engine, scene.render.engine in {"EEVEE": compat.EEVEE, "CYCLES": "CYCLES"}.items():
    renderer = btb.OffScreenRenderer(camera, mode="rgb")
    renderer.set_render_style("RENDERED")
    pictures[engine] = renderer.render()
world = np.array(cube.matrix_world)
centers = np.array([p.center for p in cube.data.polygons]) @ world[:3, :3].T + world[:3, 3]
normals = np.array([p.normal for p in cube.data.polygons]) @ world[:3, :3].T
view = camera.extrinsics("blender")
eye = np.linalg.inv(view)[:3, 3]
np.savez(
    out,
    **pictures,
    name=material.name,
    xy=camera.ndc_to_pixel(camera.world_to_ndc(centers)),
    normals=normals @ view[:3, :3].T,
    seen=((eye - centers) * normals).sum(axis=1) / np.linalg.norm(eye - centers, axis=1) > 0.2,
)
print("rendered", file=sys.stderr)
