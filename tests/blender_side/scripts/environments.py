"""Plays environments with agents that are here, not elsewhere; writes what hooks and agents saw to a JSON file."""

import json
import random

import bpy
import mathutils
import numpy as np

import blendtorch.btb as btb
from blender_side import compat
from blendtorch_shm.errors import ConfigurationError

(out,) = btb.parse_blendtorch_args()[1]
STEP, RESTART = btb.env.BaseEnv.CMD_STEP, btb.env.BaseEnv.CMD_RESTART
results = {}


class Enough(Exception):
    """The agent has seen all that it wanted."""


def play(env, frame_range=(1, 1000)):
    try:
        env.run(frame_range=frame_range, use_animation=False)
    except Enough:
        return env
    raise AssertionError("run has returned")


class Script:
    """An agent that returns one command after the other, and keeps what it was told."""

    def __init__(self, *commands):
        self.commands = list(commands)
        self.told = []

    def __call__(self, env, **ctx):
        self.told.append({**ctx, "state": env.state.name})
        if not self.commands:
            raise Enough
        command = self.commands.pop(0)
        return command if isinstance(command, tuple) else (STEP, command)


class Cube(btb.env.BaseEnv):
    """Notes which hook is called at which frame, and says what it was made to say."""

    def __init__(self, agent, says=()):
        super().__init__(agent)
        self.cube = bpy.data.objects["Cube"]
        self.says = iter(says)
        self.calls = []

    def _env_reset(self):
        self.calls.append(["reset", self.events.frameid])
        self.cube.rotation_euler.z = 0
        return {"obs": "at first", "mark": 1}

    def _env_prepare_step(self, action):
        self.calls.append(["prepare", self.events.frameid, action])
        self.cube.rotation_euler.z = action

    def _env_post_step(self):
        evaluated = self.cube.evaluated_get(bpy.context.evaluated_depsgraph_get()).matrix_world.to_euler().z
        self.calls.append(["post", self.events.frameid, round(evaluated, 3)])
        return {"obs": self.events.frameid, "reward": 0.5, **next(self.says, {})}


agent = Script(0.25, None, (RESTART, None), 0.5, (RESTART, "no Restart"), 0.75)
env = play(Cube(agent))
results["calls"] = env.calls
results["told"] = agent.told

agent = Script(0, 0, 0, 0, (RESTART, None), 0)
play(Cube(agent), frame_range=(3, 5))
results["truncated"] = [[told[name] for name in ("time", "done", "terminated", "truncated")] for told in agent.told]

words = [
    {},
    {"done": True},
    {},
    {"done": False},
    {"terminated": np.bool_(True)},
    {"truncated": True},
    {"done": True, "truncated": True},
    {"done": True, "truncated": False},
    {"done": False, "terminated": True, "truncated": True},
    {"done": True, "terminated": False, "truncated": False},
]
agent = Script(*range(len(words) - 1))
play(Cube(agent, words))
results["words"] = [[told[name] for name in ("done", "terminated", "truncated")] for told in agent.told]
results["bools"] = sorted(
    {type(told[name]).__name__ for told in agent.told for name in ("done", "terminated", "truncated")}
)


class Random(Cube):
    def _env_reset(self, seed=None, *, options):
        given = [seed, options, self.seed, self.options]
        drawn = [self.np_random.random(), random.random(), float(np.random.random()), mathutils.noise.random()]
        self.calls.append({"given": given, "drawn": drawn})


begin = [
    btb.env.Restart(seed, options)
    for seed, options in [(3, None), (None, {"a": 1}), (3, None), (2**70 + 5, None), (0, None)]
]
env = play(Random(Script(*((RESTART, restart) for restart in begin))))
results["random"] = [call for call in env.calls if isinstance(call, dict)]
results["instance seed"] = np.random.default_rng(btb.parse_blendtorch_args()[0].btseed).random()


class Options(Cube):
    def _env_reset(self, **options):
        self.calls.append(options)


env = play(Options(Script((RESTART, btb.env.Restart(1, {"b": 2})))))
results["all keywords"] = [call for call in env.calls if isinstance(call, dict)]


class Undecided(Cube):
    def _env_post_step(self):
        return 3


class Inconsistent(Cube):
    observation_space = "all"


def said(call):
    try:
        call()
    except (ConfigurationError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


results["said"] = {
    "no dict": said(lambda: play(Undecided(Script()))),
    "no command": said(lambda: play(Cube(Script(("left", 1))))),
    "no hooks": said(lambda: play(btb.env.BaseEnv(Script()))),
    "no space": said(Inconsistent(Script()).describe),
    "every 0": said(lambda: Cube(Script()).attach_default_renderer(every_nth=0)),
}

scene = bpy.context.scene
scene.render.fps, scene.render.fps_base, scene.frame_step = 30, 1.001, 2
results["described"] = Cube(Script()).describe()
scene.render.fps, scene.render.fps_base, scene.frame_step = 25, 1.0, 1
unseen = Cube(Script(0.1))
unseen.attach_default_renderer(every_nth=None)
play(unseen)
results["unseen"] = [unseen.renderer is None, "rgb_array" in unseen.ctx, unseen.describe()["has_renderer"]]

results["draws"] = compat.draws_off_screen()
if results["draws"]:
    scene.render.resolution_x, scene.render.resolution_y = 32, 24
    pictures = []

    class Seen(Cube):
        def _env_post_step(self):
            pictures.append([self.events.frameid, self.ctx.get("rgb_array")])
            return super()._env_post_step()

    agent = Script(0.4, 0.6, 0.8, 1.0, (RESTART, None), 0.4)
    env = Seen(agent)
    env.attach_default_renderer(every_nth=2)
    env.renderer.set_render_style("SOLID")
    play(env)
    distinct = []
    for _, picture in pictures:
        if not any(np.array_equal(picture, other) for other in distinct):
            distinct.append(picture)

    def number(picture):
        return next(i for i, other in enumerate(distinct) if np.array_equal(picture, other))

    results["seen"] = {
        "shape": [*pictures[0][1].shape, str(pictures[0][1].dtype)],
        "in ctx": [[frame, number(picture)] for frame, picture in pictures],
        "told": [number(told["rgb_array"]) if "rgb_array" in told else None for told in agent.told],
        "has_renderer": env.describe()["has_renderer"],
    }

with open(out, "w") as target:
    json.dump(results, target, default=str)
