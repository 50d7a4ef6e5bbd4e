"""Inside Blender: renders a moving cube, in blocks of frames that are published and blocks that are not, in turn.

Arguments: blocks of each kind, frames of a block. Last, it publishes the seconds that each block took.
"""

import time

import bpy
import numpy as np

import blendtorch.btb as btb
from blender_side import publisher

btargs, arguments = btb.parse_blendtorch_args()
blocks, frames = map(int, arguments)
bpy.context.scene.render.engine = "BLENDER_WORKBENCH"
cube = bpy.data.objects["Cube"]
renderer = btb.OffScreenRenderer(btb.Camera(shape=(480, 640)), mode="rgb")
renderer.set_render_style(shading="SOLID", overlays=False)
pub = btb.DataPublisher(btargs.btsockets["DATA"], btargs.btid)
seconds: dict[bool, list[float]] = {False: [], True: []}


def render(published: bool) -> None:
    for _ in range(frames):
        cube.rotation_euler.z += 0.01
        image = renderer.render()
        if published:
            pub.publish(image=image, frameid=0)


for block in range(2 * (blocks + 1)):
    # Which kind goes first alternates as well.
    is_published = (block % 4) in (1, 2)
    publisher._lenders.clear()  # else a picture that is not published would be rendered into a slot, too
    time.sleep(0.1)  # the consumer has taken what there was
    render(is_published)  # untimed: caches, and a publisher that lends its slots
    start = time.perf_counter()
    render(is_published)
    if block >= 2:
        seconds[is_published].append(time.perf_counter() - start)

pub.publish(alone=np.array(seconds[False]), published=np.array(seconds[True]), version=bpy.app.version_string)
pub.close()
