"""Inside Blender: move and turn the cube at random, render it, publish the picture and where the cube's corners are in it."""

import bpy
import numpy as np
from mathutils import Quaternion

import blendtorch.btb as btb

SHAPE = (96, 128)
"""Height and width of the pictures: small, so that many are rendered and learned from per second."""


def place(cube: bpy.types.Object, eye: np.ndarray, rng: np.random.Generator) -> None:
    """Put the cube anywhere above the floor, and turn it any way that shows two of its sides at least.

    One side alone looks the same after a quarter of a turn, so nobody could tell which corner is which.
    """
    while True:
        location = rng.uniform((-1.2, -1.2, 0.0), (1.2, 1.2, 0.5))
        rotation = Quaternion(rng.normal(size=4)).normalized()  # uniform over all rotations
        eye_from_cube = np.array(rotation.to_matrix()).T @ (eye - location)
        # The sides are at 1: each is seen from beyond, and not edge-on from 2.
        if np.sort(np.abs(eye_from_cube))[1] > 2:
            break
    cube.location, cube.rotation_quaternion = location, rotation


def main() -> None:
    args, _ = btb.parse_blendtorch_args()
    rng = np.random.default_rng(args.btseed)
    cube = bpy.data.objects["Cube"]
    cube.rotation_mode = "QUATERNION"

    camera = btb.Camera(shape=SHAPE)
    eye = np.array(camera.bpy_camera.matrix_world.translation)
    renderer = btb.OffScreenRenderer(camera, mode="rgb", color_space="srgb")
    renderer.set_render_style(shading="SOLID", overlays=False)
    publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid)
    animation = btb.AnimationController()

    def publish() -> None:
        publisher.publish(image=renderer.render(), xy=camera.object_to_pixel(cube).astype(np.float32))

    animation.pre_frame.add(lambda: place(cube, eye, rng))
    animation.post_frame.add(publish)
    animation.play(num_episodes=-1)


main()
