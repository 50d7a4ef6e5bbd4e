"""Inside Blender: turn the cube and place the camera at random, publish a picture and where the cube's corners are in it."""

import bpy
import numpy as np

import blendtorch.btb as btb


def main() -> None:
    args, _ = btb.parse_blendtorch_args()
    rng = np.random.default_rng(args.btseed)
    cube = bpy.data.objects["Cube"]

    camera = btb.Camera()
    renderer = btb.OffScreenRenderer(camera, mode="rgb", color_space="srgb")
    renderer.set_render_style(shading="RENDERED", overlays=False)
    publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid)
    animation = btb.AnimationController()

    def move() -> None:
        cube.rotation_euler = rng.uniform(0, 2 * np.pi, size=3)
        angle = rng.uniform(0, 2 * np.pi)
        camera.look_at((0, 0, 0), look_from=(9 * np.cos(angle), 9 * np.sin(angle), rng.uniform(3, 6)))

    def publish() -> None:
        publisher.publish(image=renderer.render(), xy=camera.object_to_pixel(cube), frameid=animation.frameid)

    animation.pre_frame.add(move)
    animation.post_frame.add(publish)
    animation.play(frame_range=(0, 100), num_episodes=-1)


main()
