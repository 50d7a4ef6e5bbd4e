"""Inside Blender: cubes fall, and each picture of them is published with all that can be known about it."""

import colorsys

import bpy
import numpy as np

import blendtorch.btb as btb

PASSES = ("depth", "normals", "instance", "category", "flow_backward", "boxes_2d", "boxes_3d", "keypoints", "camera")
EVERY = 5


def main() -> None:
    args, _ = btb.parse_blendtorch_args()
    rng = np.random.default_rng(args.btseed)
    cubes = [obj for obj in bpy.data.objects if obj.name.startswith("Cube")]
    camera = btb.Camera()
    renderer = btb.OffScreenRenderer(camera, mode="rgb", color_space="srgb")
    renderer.set_render_style(shading="RENDERED", overlays=False)
    truth = btb.GroundTruth(
        camera,
        PASSES,
        categories={"cube": cubes, "floor": [bpy.data.objects["Floor"]]},
        keypoints={f"{cube.name}/{i}": (cube, i) for cube in cubes for i in range(8)},  # their corners
    )
    publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid)
    animation = btb.AnimationController()

    def throw() -> None:
        cells = rng.permutation(np.stack(np.unravel_index(range(8), (2, 2, 2)), axis=-1))
        for cube, cell in zip(cubes, cells, strict=False):
            cube.location = 1.6 * (cell - (0.5, 0.5, -0.7))  # far enough apart to turn any way
            cube.rotation_euler = rng.uniform(0, 2 * np.pi, 3)
            cube.scale = (0.8, 0.8, 0.8)
            cube.color = (*colorsys.hsv_to_rgb(rng.random(), 0.9, 0.8), 1)
        truth.forget()  # from the end of one episode to the begin of the next is no motion

    def publish() -> None:
        if animation.frameid % EVERY == 0:
            publisher.publish(image=renderer.render(), **truth.render(), frameid=animation.frameid)

    animation.pre_animation.add(throw)
    animation.post_frame.add(publish)
    animation.play(frame_range=(0, 60), num_episodes=-1)


if __name__ == "__main__":
    main()
