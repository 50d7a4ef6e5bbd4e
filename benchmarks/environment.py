"""An environment without Blender: a loop that fills a picture, and takes as long as a renderer. Run by a launcher, by itself with
blendtorch's way of answering, or inside gymnasium's workers.

Arguments: --shape H,W,C or none, --render-ms, --req-rep ENDPOINT.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

Shape = tuple[int, ...] | None
STATE = 4  # numbers that an environment without pictures observes


class World:
    """What all ways have to show."""

    def __init__(self, shape: Shape, render_ms: float) -> None:
        self.shape = shape
        self.render_s = render_ms / 1000
        self.steps = 0

    def kind(self) -> tuple[tuple[int, ...], npt.DTypeLike]:
        return ((STATE,), np.float32) if self.shape is None else (self.shape, np.uint8)

    def observe(self, place: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One step further, shown in `place`."""
        self.steps += 1
        if self.render_s:
            time.sleep(self.render_s)
        place.fill(self.steps % 251)
        return place


def serve_req_rep(endpoint: str, world: World) -> None:
    """As blendtorch's agent does: the whole context, pickled, for each action."""
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(endpoint)
    while True:
        asked = socket.recv_pyobj()
        obs = world.observe(np.empty(*world.kind()))
        ctx = {"obs": obs, "reward": 1.0, "done": False, "time": world.steps, "prev_action": asked.get("action")}
        socket.send_pyobj(ctx)


def serve_agent(world: World) -> None:
    """As an instance does."""
    import blendtorch.btb as btb
    from blender_side.publisher import allocate
    from blender_side.remote_agent import Command, RemoteControlledAgent, State

    class Environment:
        state = State.INIT
        frame_interval_s = 1 / 24

        def describe(self) -> dict[str, Any]:
            shape, dtype = world.kind()
            limits = (0, 255) if dtype == np.uint8 else (-np.inf, np.inf)
            observations = btb.spaces.Box(*limits, shape=shape, dtype=dtype)
            spaces = {"observation": observations, "action": btb.spaces.Discrete(2)}
            return {"spaces": spaces, "fps": 24.0, "has_renderer": False}

    args, _ = btb.parse_blendtorch_args()
    agent = RemoteControlledAgent(args.btsockets["GYM"])
    env, action = Environment(), None
    while True:
        obs = world.observe(allocate(*world.kind()))
        command, action = agent(
            env,
            obs=obs,
            reward=1.0,
            done=False,
            terminated=False,
            truncated=False,
            time=world.steps,
            prev_action=action,
        )
        env.state = State.RUN if command is Command.STEP else State.INIT
        del obs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape")
    parser.add_argument("--render-ms", type=float, default=0)
    parser.add_argument("--req-rep")
    options, _ = parser.parse_known_args([argument for argument in sys.argv[1:] if argument != "--"])
    shape = None if options.shape is None else tuple(map(int, options.shape.split(",")))
    world = World(shape, options.render_ms)
    if options.req_rep:
        serve_req_rep(options.req_rep, world)
    else:
        serve_agent(world)


if __name__ == "__main__":
    main()
