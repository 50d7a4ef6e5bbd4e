"""Environments: one, in lockstep, beside blendtorch's way; and four at once, beside gymnasium's AsyncVectorEnv."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import zmq
from gymnasium.vector import AsyncVectorEnv

from torch_side import BlenderEnv, BlenderVectorEnv

from .conftest import Row
from .environment import STATE, Shape, World

SCRIPT = Path(__file__).with_name("environment.py")
PICTURES = {"84x84x3": (84, 84, 3), "480x640x3": (480, 640, 3), "1080x1920x4": (1080, 1920, 4)}
SIZES: dict[str, Shape] = {"no pictures": None, **PICTURES}


def few(sizes: Iterable[str]) -> list[Any]:
    """Some are long."""
    return [
        pytest.param(each, marks=[pytest.mark.long] if each in ("84x84x3", "1080x1920x4") else []) for each in sizes
    ]


LAUNCH = {"blender": "python", "progress": False}
Stepping = Callable[[], Any]


def arguments(shape: Shape, render_ms: float = 0) -> dict[str, Any]:
    return {"shape": None if shape is None else ",".join(map(str, shape)), "render_ms": render_ms}


@contextlib.contextmanager
def req_rep_pickle(shape: Shape) -> Iterator[Stepping]:
    endpoint = "tcp://127.0.0.1:11990"
    flags = [] if shape is None else ["--shape", ",".join(map(str, shape))]
    with (
        subprocess.Popen([sys.executable, str(SCRIPT), "--req-rep", endpoint, *flags]) as process,
        zmq.Context() as context,
        context.socket(zmq.REQ) as socket,
    ):
        socket.connect(endpoint)

        def step() -> Any:
            socket.send_pyobj({"cmd": "step", "action": 1, "time": 0})
            return socket.recv_pyobj()["obs"]

        yield step
        process.kill()


@contextlib.contextmanager
def blender_env(shape: Shape) -> Iterator[Stepping]:
    env = BlenderEnv("", SCRIPT, launch_args=LAUNCH, **arguments(shape))
    env.reset()
    yield lambda: env.step(1)[0]
    env.close()


@pytest.mark.parametrize("way", [req_rep_pickle, blender_env])
@pytest.mark.parametrize("size", few(SIZES))
def test_lockstep(row: Row, size: str, way: Callable[[Shape], contextlib.AbstractContextManager[Stepping]]) -> None:
    row.named("lockstep", size, way.__name__)
    with way(SIZES[size]) as step:
        row.time_steps(step, SIZES[size] or (STATE,))


class OfGymnasium(gymnasium.Env[Any, Any]):
    """The same environment, in a worker of gymnasium's."""

    def __init__(self, shape: Shape, render_ms: float) -> None:
        self._world = World(shape, render_ms)
        self._place = np.empty(*self._world.kind())
        self.observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self._world.observe(self._place), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._world.observe(self._place), 1.0, False, False, {}


NUM_ENVS = 4


@contextlib.contextmanager
def async_vector_env(shape: Shape, render_ms: float) -> Iterator[Any]:
    make = functools.partial(OfGymnasium, shape, render_ms)
    envs = AsyncVectorEnv([make] * NUM_ENVS, shared_memory=True, context="forkserver")
    yield envs
    envs.close()


@contextlib.contextmanager
def blender_vector_env(shape: Shape, render_ms: float) -> Iterator[Any]:
    envs = BlenderVectorEnv("", SCRIPT, NUM_ENVS, launch_args=LAUNCH, **arguments(shape, render_ms))
    yield envs
    envs.close()


@pytest.mark.parametrize("way", [async_vector_env, blender_vector_env])
@pytest.mark.parametrize(
    "render_ms", [pytest.param(0, marks=pytest.mark.long), 5, pytest.param(30, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("size", few(PICTURES))
def test_vector(
    row: Row, size: str, render_ms: float, way: Callable[..., contextlib.AbstractContextManager[Any]]
) -> None:
    row.named("four environments", f"{size}, {render_ms} ms", way.__name__)
    with way(PICTURES[size], render_ms) as envs:
        envs.reset()
        actions = np.ones(NUM_ENVS, np.int64)
        row.time_steps(lambda: envs.step(actions)[0], (NUM_ENVS, *PICTURES[size]))
