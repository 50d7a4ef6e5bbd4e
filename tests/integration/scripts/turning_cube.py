"""Renders the turning cube, the same pictures in each instance and each run, and publishes them. Argument: how many."""

import bpy
import numpy as np

import blendtorch.btb as btb

btargs, (count,) = btb.parse_blendtorch_args()
bpy.context.scene.render.resolution_x, bpy.context.scene.render.resolution_y = 96, 64
cube = bpy.data.objects["Cube"]
camera = btb.Camera()
renderer = btb.OffScreenRenderer(camera, mode="rgb")
renderer.set_render_style(shading="SOLID", overlays=False)
bpy.context.preferences.system.viewport_aa = "OFF"  # smoothed edges differ from run to run
with btb.DataPublisher(btargs.btsockets["DATA"], btargs.btid, lingerms=60_000) as publisher:
    for i in range(int(count)):
        cube.rotation_euler = (0.3 * i, 0.2 * i, 0.1 * i)
        bpy.context.view_layer.update()
        image = renderer.render()
        publisher.publish(image=image, xy=camera.object_to_pixel(cube), frameid=i, distinct=len(np.unique(image)))
