"""Renders the turning cube, frame by frame and then the same frames again into clips. Arguments: where to save the former.

Each frame of a clip says whether it was rendered into the memory that the clip is sent from.
"""

from pathlib import Path

import bpy
import numpy as np

import blendtorch.btb as btb
from blender_side import utils

NUM_FRAMES = 11

btargs, (out,) = btb.parse_blendtorch_args()
scene, cube = bpy.context.scene, bpy.data.objects["Cube"]
scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = 64, 48, 100
space = utils.find_first_view3d()[1]
space.shading.light, space.shading.color_type = "FLAT", "MATERIAL"
space.shading.background_type, space.shading.background_color = "VIEWPORT", (0.0, 0.0, 0.0)
renderer = btb.OffScreenRenderer(mode="rgb", color_space="srgb")
renderer.set_render_style("SOLID")


def turn(i: int) -> None:
    cube.rotation_euler = (0.2 * i, 0.1 * i, 0.3 * i)
    bpy.context.view_layer.update()


alone = []
for i in range(NUM_FRAMES):
    turn(i)
    alone.append(renderer.render())
np.save(out, alone)

publisher = btb.DataPublisher(btargs.btsockets["DATA"], btargs.btid, frames_per_clip=4)


def is_in_a_slot(image: np.ndarray) -> bool:
    """Whether an array lies in shared memory, which consumers map, too."""
    address = image.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < end:
            return "/dev/shm/" in line
    return False


for _ in range(3):
    for i in range(NUM_FRAMES):
        turn(i)
        image = renderer.render()
        in_slot = is_in_a_slot(image)
        publisher.publish(image=image, in_slot=in_slot, frame=i, rotation=cube.rotation_euler, name=f"frame {i}")
    publisher.end_clip()
publisher.close()
