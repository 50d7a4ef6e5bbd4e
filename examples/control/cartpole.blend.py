"""Inside Blender: a cart with a pole on it, which a trainer balances by accelerating the cart.

    observation   (4,) float32: position (m) and speed (m/s) of the cart, angle (rad, 0 is upright) and angular speed of the pole;
                  with --pixels (H, W, 3) uint8, sRGB: what the camera sees
    action        (1,) float32 in -1 .. 1: the cart's acceleration, in units of 15 m/s²
    reward        1 for each step after which the pole is up
    terminated    the pole leans by more than 0.5 rad, or the cart is more than 4 m from the middle
    truncated     after --steps steps

A trainer may begin an episode with options: {"position": m, "angle": rad}. What it does not give is random.
"""

import argparse
from typing import Any

import bpy
import numpy as np
import numpy.typing as npt

import blendtorch.btb as btb

ACCELERATION = 15.0
LARGEST_ANGLE = 0.5
LARGEST_POSITION = 4.0


class CartPole(btb.env.BaseEnv):
    """The scene as an environment.

    Args:
        agent: what acts.
        camera: renders the observations. None: they are numbers.
    """

    action_space = btb.env.Box(-1.0, 1.0, shape=(1,))
    observation_space = btb.env.Box(-np.inf, np.inf, shape=(4,))

    def __init__(self, agent: Any, camera: btb.OffScreenRenderer | None = None) -> None:
        super().__init__(agent)
        self.cart, self.pole = bpy.data.objects["Cart"], bpy.data.objects["Pole"]
        self.motor = bpy.data.objects["Motor"].rigid_body_constraint
        self.camera = camera
        if camera is not None:
            self.observation_space = btb.env.Box(0, 255, shape=(*camera.shape, 3), dtype=np.uint8)

    def _env_reset(self, options: dict[str, float] | None) -> None:
        at_random = {"position": self.np_random.uniform(-1, 1), "angle": self.np_random.uniform(-0.2, 0.2)}
        begin = {**at_random, **(options or {})}
        for name in ("Cart", "PoleRotHelp", "Slider", "Motor", "Hinge"):
            bpy.data.objects[name].location.x = begin["position"]
        bpy.data.objects["PoleRotHelp"].rotation_euler.y = begin["angle"]
        self.motor.motor_lin_target_velocity = 0.0
        self.before: npt.NDArray[np.float64] | None = None

    def _env_prepare_step(self, action: Any) -> None:
        strength = float(np.clip(np.ravel(action)[0], -1, 1))
        self.motor.motor_lin_target_velocity += strength * ACCELERATION * self.frame_interval_s

    def _env_post_step(self) -> dict[str, Any]:
        depsgraph = bpy.context.evaluated_depsgraph_get()
        cart, pole = (obj.evaluated_get(depsgraph).matrix_world for obj in (self.cart, self.pole))
        now = np.array([cart.translation.x, pole.to_euler("XYZ").y])
        speed = np.zeros(2) if self.before is None else (now - self.before) / self.frame_interval_s
        self.before = now
        state = np.array([now[0], speed[0], now[1], speed[1]], np.float32)
        fallen = bool(abs(now[0]) > LARGEST_POSITION or abs(now[1]) > LARGEST_ANGLE)
        obs = state if self.camera is None else self.camera.render()
        return {"obs": obs, "state": state, "reward": float(not fallen), "terminated": fallen}


def main() -> None:
    args, own = btb.parse_blendtorch_args()
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500, help="after so many steps an episode is truncated")
    parser.add_argument("--pixels", action=argparse.BooleanOptionalAction, help="observe what the camera sees")
    parser.add_argument("--render-every", type=int, help="draw every nth frame for render()")
    parser.add_argument("--real-time", action=argparse.BooleanOptionalAction, help="go on while the trainer thinks")
    options = parser.parse_args(own)

    camera = None
    if options.pixels:
        camera = btb.OffScreenRenderer(btb.Camera(shape=(64, 128)), mode="rgb", color_space="srgb")
        camera.set_render_style("SOLID")
    agent = btb.env.RemoteControlledAgent(args.btsockets["GYM"], real_time=bool(options.real_time))
    env = CartPole(agent, camera)
    env.attach_default_renderer(every_nth=options.render_every)
    if env.renderer is not None:
        env.renderer.color_space = "srgb"
        env.renderer.set_render_style("SOLID")
    env.run(
        frame_range=(1, options.steps + 2)
    )  # the reset is answered before frame 2, and the last step before this one


if __name__ == "__main__":
    main()
