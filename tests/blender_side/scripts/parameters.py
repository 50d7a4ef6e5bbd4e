"""A cube as large as the trainer says."""

import bpy

import blendtorch.btb as btb

args, _ = btb.parse_blendtorch_args()
parameters = btb.Parameters(args.btsockets["PARAMS"], args.btid)
publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid, parameters=parameters)
cube = bpy.data.objects["Cube"]
renderer = btb.OffScreenRenderer(btb.Camera(shape=(48, 64)), mode="rgb")
renderer.set_render_style("SOLID", overlays=False)
animation = btb.AnimationController()


def move() -> None:
    parameters.update()
    cube.rotation_euler = 0, 0, 0
    cube.scale = parameters["scale"]


def publish() -> None:
    publisher.publish(image=renderer.render(), scale=cube.matrix_world.to_scale())


animation.pre_frame.add(move)
animation.post_frame.add(publish)
parameters.wait()
animation.play(frame_range=(0, 10), num_episodes=-1, use_physics=False)
