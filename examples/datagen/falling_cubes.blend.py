"""Inside Blender: throw cubes onto a floor, again and again, and publish pictures of it with where the cubes' corners are.

The camera moves, too: labels are of where it is in each picture.
"""

import colorsys

import bpy
import numpy as np

import blendtorch.btb as btb

ROOM = 1.6
"""Each cube starts in a cell of this size, in which it can turn any way, so that no two overlap."""
EVERY = 5
"""From one frame to the next little moves, so every fifth is rendered."""


def throw(cubes: list[bpy.types.Object], rng: np.random.Generator) -> None:
    """Give each cube an edge of 0.5 to 0.9 m, a colour, and a pose above the floor, all at random."""
    cells = rng.permutation(np.stack(np.unravel_index(range(8), (2, 2, 2)), axis=-1))[: len(cubes)]
    for cube, cell in zip(cubes, cells, strict=True):
        edge = rng.uniform(0.5, 0.9)
        slack = (ROOM - np.sqrt(3) * edge) / 2
        cube.location = ROOM * (cell - (0.5, 0.5, -0.7)) + rng.uniform(-slack, slack, 3)
        cube.rotation_euler = rng.uniform(0, 2 * np.pi, 3)
        cube.scale = (edge, edge, edge)
        cube.rigid_body.mass = 100 * edge**3
        cube.color = (*colorsys.hsv_to_rgb(rng.random(), 0.9, 0.8), 1)


def main() -> None:
    args, _ = btb.parse_blendtorch_args()
    rng = np.random.default_rng(args.btseed)
    cubes = [obj for obj in bpy.data.objects if obj.name.startswith("Cube")]
    episode = -1

    camera = btb.Camera()
    renderer = btb.OffScreenRenderer(camera, mode="rgb", color_space="srgb")
    renderer.set_render_style(shading="RENDERED", overlays=False)
    publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid)
    animation = btb.AnimationController()

    def begin() -> None:
        nonlocal episode
        episode += 1
        throw(cubes, rng)
        camera.bpy_camera.data.lens = rng.uniform(45, 60)

    def come_nearer() -> None:
        nearer = 1 - 0.2 * animation.frameid / 100
        camera.bpy_camera.location = (3.6 * nearer, -6.9 * nearer, 1.3 + 2.9 * nearer)

    def publish() -> None:
        if animation.frameid % EVERY == 0:
            publisher.publish(
                image=renderer.render(),
                xy=camera.object_to_pixel(*cubes),  # eight rows for each cube
                episode=episode,
                frameid=animation.frameid,
            )

    animation.pre_animation.add(begin)
    animation.pre_frame.add(come_nearer)
    animation.post_frame.add(publish)
    animation.play(frame_range=(0, 100), num_episodes=-1, use_physics=True)


if __name__ == "__main__":
    main()
