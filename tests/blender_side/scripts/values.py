"""Publishes Blender's own kinds of values, and pictures that were rendered into the slot; says which were."""

import os
import sys

import bpy
import gpu
import mathutils
import numpy as np
import of_the_user

import blendtorch.btb as btb
from blender_side import compat

btargs, _ = btb.parse_blendtorch_args()
publisher = btb.DataPublisher(btargs.btsockets["left eye"], btargs.btid)
try:
    btargs.btsockets["DATA"]
except KeyError as error:
    no_such_socket = str(error)
other = bpy.data.scenes.new("Other")
btb.Camera().set_as_active_camera(other)
places = [sys.path.index(os.path.dirname(of_the_user.__file__)), sys.path.index(os.path.dirname(np.__path__[0]))]
cube = bpy.data.objects["Cube"]
cube.location = (1, 2, 3)
numbers = np.arange(3200, dtype=np.float32).reshape(20, 40, 4)
buffer = numbers  # where there is no GPU context, there are no such buffers
if compat.draws_off_screen():
    buffer = gpu.types.Buffer("FLOAT", numbers.shape, numbers.tolist())
render = bpy.context.scene.render
render.resolution_x, render.resolution_y, render.resolution_percentage = 64, 48, 100
renderer = btb.OffScreenRenderer(mode="rgb", color_space="srgb")
publisher.publish(
    **{
        "from PYTHONPATH": [of_the_user.WHERE, os.environ["PYTHONPATH"]],
        "is behind Blender's own": places[0] > places[1],
        "no such socket": no_such_socket,
        "camera of another scene": other.camera.name,
        "viewport": (renderer.shape, renderer.area.type, renderer.space.type, renderer.region.type),
    },
    vector=mathutils.Vector((1, 2, 3)),
    matrix=mathutils.Matrix.Diagonal((1, 2, 3, 4)),
    nested={"euler": [mathutils.Euler((0.5, 0, 0))], "color": (mathutils.Color((0.25, 0.5, 1)),)},
    quaternion=mathutils.Quaternion((1, 0, 0, 0)),
    location=cube.location,
    matrix_world=cube.matrix_world.copy(),
    dimensions=cube.dimensions,
    buffer=buffer,
)
renderer.set_render_style("SOLID")
for _ in range(4):
    image = renderer.render()
    lent = image.base is not None
    publisher.publish(image=image, sum=int(image.sum()), lent=lent)
publisher.close()
