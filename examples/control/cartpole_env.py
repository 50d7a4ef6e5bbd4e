"""The cart-pole for gymnasium: importing this registers ``BlenderCartPole-v0``, for `make` and `make_vec`.

gymnasium.make("cartpole_env:BlenderCartPole-v0", render_mode="rgb_array")
gymnasium.make_vec("cartpole_env:BlenderCartPole-v0", num_envs=4)
"""

from pathlib import Path
from typing import Any

import gymnasium

import blendtorch.btt as btt

ID = "BlenderCartPole-v0"
SCENE = Path(__file__).with_name("cartpole.blend")
SCRIPT = Path(__file__).with_name("cartpole.blend.py")


def _arguments(render_mode: str | None, pixels: bool, **others: Any) -> dict[str, Any]:
    """Of the environments below. A Blender that renders gets a window, a virtual one where there is no display."""
    return dict(
        render_mode=render_mode,
        pixels=pixels,
        render_every=None if render_mode is None else 1,
        background=not (pixels or render_mode),
        **others,
    )


class CartPoleEnv(btt.env.BlenderEnv):
    """A cart-pole in an instance of its own.

    Args:
        render_mode: as of `btt.env.BlenderEnv`.
        pixels: observe what the camera sees, (64, 128, 3) uint8, instead of four numbers.
        **kwargs: `real_time`, `steps` (after so many an episode is truncated), and what `btt.env.BlenderEnv` takes.
    """

    def __init__(self, render_mode: str | None = None, pixels: bool = False, **kwargs: Any) -> None:
        super().__init__(SCENE, SCRIPT, **_arguments(render_mode, pixels, **kwargs))


class CartPoleVectorEnv(btt.env.BlenderVectorEnv):
    """`num_envs` of them, stepped at once. Arguments as of `CartPoleEnv`, and of `btt.env.BlenderVectorEnv`."""

    def __init__(self, num_envs: int = 1, render_mode: str | None = None, pixels: bool = False, **kwargs: Any) -> None:
        super().__init__(SCENE, SCRIPT, num_envs, **_arguments(render_mode, pixels, **kwargs))


if ID not in gymnasium.registry:
    gymnasium.register(ID, entry_point=f"{__name__}:CartPoleEnv", vector_entry_point=f"{__name__}:CartPoleVectorEnv")
