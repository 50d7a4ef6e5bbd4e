"""An environment without Blender. Each of its arrays says which instance, episode, step and action it is of, in every element.

An episode ends by the episode's own dice. An action from 1 000 on is a fault: see FAULTS.
"""

import argparse
import contextlib
import os
import signal
import time
from typing import Any

import numpy as np

import blendtorch.btb as btb
from blender_side.publisher import allocate
from blender_side.remote_agent import Command, RemoteControlledAgent, Restart, State
from blender_side.spaces import Box, Dict, Discrete, Tuple

KILLED, STUCK, FAILS, SHAPE, DTYPE, NOTHING = FAULTS = range(1000, 1006)

btargs, remainder = btb.parse_blendtorch_args()
parser = argparse.ArgumentParser()
parser.add_argument("--kind", default="picture")
parser.add_argument("--shape", type=int, nargs="+", default=[20, 30, 3])
parser.add_argument("--length", type=int, default=8, help="of the longest episodes")
parser.add_argument("--least", type=int, default=1, help="of the shortest")
parser.add_argument("--ms", type=float, default=0.0, help="that a step takes")
parser.add_argument("--keeps", action="store_true", help="what it rendered, and writes to it later")
parser.add_argument("--plain", action="store_true", help="renders into arrays of its own")
parser.add_argument("--draws", action="store_true", help="an rgb_array")
parser.add_argument("--undeclared", action="store_true")
parser.add_argument("--fails", default="", help="at once, with this message")
args = parser.parse_args(remainder)
if args.fails:
    raise LookupError(args.fails)
shape = tuple(args.shape)


def mark(*numbers: int) -> int:
    """What these numbers make every element."""
    return sum(number * factor for number, factor in zip(numbers, (1, 7, 31, 101), strict=True)) % 251


def picture(shape: tuple[int, ...], *numbers: int) -> np.ndarray:
    """(instance, episode, step, action) as a picture; the first four elements are these numbers."""
    image = np.empty(shape, np.uint8) if args.plain else allocate(shape, np.uint8)
    image.fill(mark(*numbers))
    image.reshape(-1)[:4] = np.array(numbers) % 256
    return image


def vector(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.float32)


SPACES: dict[str, Any] = {
    "picture": (Box(0, 255, shape, np.uint8), lambda *who: picture(shape, *who)),
    "vector": (Box(-np.inf, np.inf, (4,)), vector),
    "dict": (
        Dict(
            left=Box(0, 255, shape, np.uint8),
            right=Box(0, 255, shape, np.uint8),
            pose=Dict(xyz=Box(-np.inf, np.inf, (4,)), step=Discrete(10**6)),
        ),
        # What is drawn first is not what the space has first.
        lambda *who: {
            "right": picture(shape, *who),
            "left": picture(shape, *who),
            "pose": {"step": who[2], "xyz": vector(*who)},
        },
    ),
    "tuple": (
        Tuple(Box(0, 255, shape, np.uint8), Box(-np.inf, np.inf, (3, 1000)), Box(-1000, 1000, (), np.int16)),
        lambda *who: (picture(shape, *who), np.full((3, 1000), mark(*who), np.float32), np.int16(who[2])),
    ),
}
space, observe = SPACES[args.kind]


class Env:
    state = State.INIT
    frame_interval_s = 1 / 24

    def describe(self) -> dict[str, Any]:
        spaces = {"observation": space, "action": Box(0, 255, (), np.int64)}
        if args.undeclared:
            spaces = dict.fromkeys(spaces)
        return {"spaces": spaces, "fps": 24.0, "has_renderer": args.draws}


env = Env()
agent = RemoteControlledAgent(btargs.btsockets["GYM"])
rng = np.random.default_rng(btargs.btid)
episode = -1
restart: Restart | None = Restart()
kept: list[tuple[tuple[int, ...], Any]] = []
ctx: dict[str, Any] = {}
length = step = 0


def first_arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [array for each in value for array in first_arrays(each)]
    return [value] if isinstance(value, np.ndarray) and value.dtype == np.uint8 else []


def observation(*who: int) -> Any:
    made = observe(*who)
    if args.keeps:
        for numbers, image in kept:  # it is as it was, or as it was changed
            assert (image[5:] == mark(*numbers)).all(), f"what was kept of {numbers} has changed"
        del kept[:-6]
        for _, image in kept[::2]:
            image[:5] = 255 - image[:5]
        kept.extend((who, image.reshape(-1)) for image in first_arrays(made))
    return made


while True:
    if restart is not None:
        if restart.seed is not None:
            rng, episode = np.random.default_rng(restart.seed), -1
        options = restart.options or {}
        episode, step, restart, env.state = episode + 1, 0, None, State.INIT
        if once := options.get("dies_once"):
            with contextlib.suppress(FileExistsError):  # another one has died
                open(once, "x").close()
                os.kill(os.getpid(), signal.SIGKILL)
        length = options.get("length") or int(rng.integers(args.least, args.length + 1))
        ctx = {}  # nobody else has what was observed before
        ctx = {
            "obs": observation(btargs.btid, episode, 0, 0),
            "reward": 0.0,
            "number": episode,
            "options": str(options),
        }
        ctx |= {"done": False, "terminated": False, "truncated": False}
        if args.draws:
            ctx["rgb_array"] = np.full((4, 6, 3), step, np.uint8)
    command, action = agent(env, **ctx)
    if command is Command.RESTART:
        restart = action
        continue
    env.state = State.RUN
    step += 1
    if action == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == STUCK:
        time.sleep(1000)
    elif action == FAILS:
        raise RuntimeError("the scene is broken")
    if args.ms:
        time.sleep(args.ms / 1000)
    over, cut = bool(step >= length), bool(rng.random() < 0.3)
    ctx = {}
    ctx = {
        "obs": observation(btargs.btid, episode, step, int(action)),
        "reward": float(rng.random()),
        "done": over,
        "terminated": over and not cut,
        "truncated": over and cut,
        "step": step,
        "array": np.full(3, step, np.float32),
        "nested": {"a": step, "name": f"step {step}"},
    }
    if step % 2:
        ctx["odd"] = True
    if action == SHAPE:
        ctx["obs"] = np.zeros((3, 3), np.uint8)
    elif action == DTYPE:
        ctx["obs"] = np.zeros(shape, np.float64) + 0.5
    elif action == NOTHING:
        del ctx["obs"]
    if args.draws:
        ctx["rgb_array"] = np.full((4, 6, 3), step, np.uint8)
