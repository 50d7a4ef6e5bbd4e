"""An environment that a trainer plays: the action is the cube's angle, and the fourth frame is the last."""

import bpy

import blendtorch.btb as btb


class Turn(btb.env.BaseEnv):
    action_space = btb.env.Box(-4, 4)

    def _env_reset(self):
        self.count = 0
        bpy.data.objects["Cube"].rotation_euler.z = 0

    def _env_prepare_step(self, action):
        bpy.data.objects["Cube"].rotation_euler.z = action

    def _env_post_step(self):
        self.count += 1
        angle = bpy.data.objects["Cube"].rotation_euler.z
        return {"obs": angle, "reward": -abs(angle), "done": self.count > 3, "count": self.count}


args, _ = btb.parse_blendtorch_args()
Turn(btb.env.RemoteControlledAgent(args.btsockets["GYM"])).run(frame_range=(1, 100))
