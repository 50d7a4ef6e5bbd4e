"""An environment in Blender: an action turns the cube, and the observation is a picture of it. It begins at angle 0."""

import argparse

import bpy
import numpy as np

import blendtorch.btb as btb

parser = argparse.ArgumentParser()
parser.add_argument("--length", type=int, default=4)
parser.add_argument("--draws", action="store_true")
parser.add_argument("--real-time", action="store_true")
parser.add_argument("--no-real-time", action="store_false", dest="real_time")
btargs, remainder = btb.parse_blendtorch_args()
args = parser.parse_args(remainder)


class Turn(btb.env.BaseEnv):
    observation_space = btb.env.Box(0, 255, shape=(48, 64, 3), dtype=np.uint8)
    action_space = btb.env.Box(-3, 3, shape=())

    def _env_reset(self):
        self.cube = bpy.data.objects["Cube"]
        self.cube.rotation_euler.z = 0

    def _env_prepare_step(self, action):
        self.cube.rotation_euler.z += action

    def _env_post_step(self):
        angle = self.cube.rotation_euler.z
        over = self.events.frameid > args.length
        return {"obs": off.render(), "reward": float(angle), "terminated": over, "angle": angle}


scene = bpy.context.scene
scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = 64, 48, 100
off = btb.OffScreenRenderer(mode="rgb")
off.set_render_style(shading="SOLID", overlays=False)
env = Turn(btb.env.RemoteControlledAgent(btargs.btsockets["GYM"], real_time=args.real_time))
if args.draws:
    env.attach_default_renderer()
env.run(frame_range=(1, 100))
