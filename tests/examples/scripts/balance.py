"""Plays episodes of cartpole.blend.py without a trainer and without rendering; saves all states, by episode, as .npz."""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np

import blendtorch.btb as btb

_, (script, out) = btb.parse_blendtorch_args()
sys.path.insert(0, str(Path(script).parent))
from controller import balance  # noqa: E402

STEP, RESTART = btb.env.BaseEnv.CMD_STEP, btb.env.BaseEnv.CMD_RESTART
EPISODES = [  # name, seed, options, steps, action
    ("fall", 1, {"angle": 0.1, "position": 0.5}, 20, lambda state, i: 0.0),
    ("push", 2, {"angle": 0.0, "position": 0.0}, 8, lambda state, i: 0.4),
    ("first", 3, None, 500, lambda state, i: balance(state)),
    ("other", 4, None, 500, lambda state, i: balance(state)),
    ("again", 3, None, 500, lambda state, i: balance(state)),
    ("swing", 5, None, 60, lambda state, i: np.sin(i / 3)),
    ("swing again", 5, None, 60, lambda state, i: np.sin(i / 3)),
    ("corner", 6, {"angle": 0.2, "position": 1.0}, 500, lambda state, i: balance(state)),
]
states: dict[str, list[list[float]]] = {}
ends: dict[str, list[bool]] = {}
to_come = iter(EPISODES)
episode: Any = None


class Enough(Exception):
    """All episodes were played."""


def agent(env: Any, state: Any, reward: float, terminated: bool, truncated: bool, **ctx: Any) -> Any:
    global episode
    if episode is not None:
        name, _, _, steps, action = episode
        played = states.setdefault(name, [])
        played.append([*state, reward])
        ends[name] = [terminated, truncated]
        if len(played) <= steps and not terminated:
            return STEP, [action(state, len(played))]
    episode = next(to_come, None)
    if episode is None:
        raise Enough
    return RESTART, btb.env.Restart(seed=episode[1], options=episode[2])


try:
    runpy.run_path(script)["CartPole"](agent).run(frame_range=(1, 502), use_animation=False)
except Enough:
    np.savez(
        out,
        **{name: np.array(played) for name, played in states.items()},
        **{f"end of {name}": end for name, end in ends.items()},
    )
