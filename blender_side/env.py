"""Environments: scenes that an agent acts in, episode after episode."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import bpy
import mathutils
import numpy as np

from blendtorch_shm.errors import ConfigurationError

from .animation import AnimationController
from .arguments import parse_blendtorch_args
from .remote_agent import Command, RemoteControlledAgent, Restart, State
from .spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple, plain

if TYPE_CHECKING:
    from .offscreen import OffScreenRenderer

__all__ = [
    "BaseEnv",
    "Box",
    "Command",
    "Dict",
    "Discrete",
    "MultiBinary",
    "MultiDiscrete",
    "RemoteControlledAgent",
    "Restart",
    "State",
    "Tuple",
]

#: Episodes end where the agent ends them, not with the scene's frames.
_LAST_FRAME = 2_147_483_647


class BaseEnv:
    """An environment: a scene, and three hooks that say what acting in it means.

    An episode, frame by frame::

        _env_reset()                    before the first frame: set the scene up
        [frame 1 is evaluated]          here Blender simulates
        _env_post_step()                look at the scene: observation, reward, whether the episode is over
            agent(env, **ctx)           asked before each later frame: step with an action, or begin a new episode
        _env_prepare_step(action)       let the action act on the scene
        [frame 2 is evaluated]
        _env_post_step()
            ...

    An agent is a callable ``agent(env, **ctx)``. It returns ``(BaseEnv.CMD_STEP, action)``, or ``(BaseEnv.CMD_RESTART, None)``;
    instead of that None, it may return a :class:`Restart` with a seed and options. :class:`RemoteControlledAgent` asks a training
    process. What an agent gets, `ctx`, is of one episode:

    ====================================== ===========================================================================
    what the hooks returned                the newest value of each key; `obs` and `reward` are for the trainer
    `time`                                 int, the frame that is to be played
    `done`, `terminated`, `truncated`      bool; see :meth:`_env_post_step`
    `prev_action`                          the last action. None: there was none
    `rgb_array`                            (H, W, 3) uint8, if :meth:`attach_default_renderer` drew the last frame
    ====================================== ===========================================================================

    Attributes:
        events: the :class:`AnimationController` that plays; ``events.frameid`` is the number of the frame.
        agent: the agent.
        ctx: what the agent gets; its `rgb_array` is the newest picture of the episode.
        state: `STATE_INIT` until the agent chose the first step of an episode, then `STATE_RUN`.
        frame_range: first and last frame of an episode. At the last one it is truncated, but goes on until the agent ends it.
        renderer, render_every: what :meth:`attach_default_renderer` made, or None.
        seed: what the trainer said as it began this episode. None: nothing.
        options: likewise.
        np_random: `numpy.random.Generator`, for all that is random. It begins with the instance's seed (``-btseed``), anew where
            an episode is given a seed (as do `random`, `numpy.random` and `mathutils.noise` then), and goes on otherwise.
        observation_space, action_space: to be set by a class or its instances, for trainers that want spaces: ``btb.env.Box``,
            ``Discrete``, ``MultiDiscrete``, ``MultiBinary``, ``Dict``, ``Tuple``, or gymnasium's own.

    Example::

        class Turn(btb.env.BaseEnv):
            observation_space = btb.env.Box(-np.pi, np.pi, shape=(1,))
            action_space = btb.env.Box(-0.1, 0.1, shape=(1,))

            def _env_reset(self, seed, options):
                self.cube = bpy.data.objects["Cube"]
                self.cube.rotation_euler.z = self.np_random.uniform(-1, 1)

            def _env_prepare_step(self, action):
                self.cube.rotation_euler.z += action[0]

            def _env_post_step(self):
                angle = self.cube.rotation_euler.z
                return {"obs": np.float32([angle]), "reward": -abs(angle), "terminated": abs(angle) > 3}

        args, _ = btb.parse_blendtorch_args()
        Turn(btb.env.RemoteControlledAgent(args.btsockets["GYM"])).run(frame_range=(1, 200))
    """

    STATE_INIT = State.INIT
    STATE_RUN = State.RUN
    CMD_RESTART = Command.RESTART
    CMD_STEP = Command.STEP

    observation_space: Any = None
    action_space: Any = None

    def __init__(self, agent: Callable[..., tuple[Any, Any]]) -> None:
        self.events = AnimationController()
        self.events.pre_animation.add(self._pre_animation)
        self.events.pre_frame.add(self._pre_frame)
        self.events.post_frame.add(self._post_frame)
        self.agent = agent
        self.ctx: dict[str, Any] = {}
        self.renderer: OffScreenRenderer | None = None
        self.render_every: int | None = None
        self.frame_range: tuple[int, int] | None = None
        self.state = State.INIT
        self.seed: int | None = None
        self.options: dict[str, Any] | None = None
        self.np_random = np.random.default_rng(parse_blendtorch_args()[0].btseed)
        self._restart: Restart | None = Restart()
        """How the next episode is to begin, once the one before is given up."""
        self._drew = False
        """Whether the renderer drew the last frame."""
        self._reset_takes = _keywords(self._env_reset, ("seed", "options"))

    def _env_reset(self) -> Mapping[str, Any] | None:
        """Set the scene up for an episode. It may have parameters `seed` and `options`, or one of them: what the trainer said.

        Returns:
            what `ctx` shall have beside what :meth:`_env_post_step` says of the first frame. None: nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} has no _env_reset().")

    def _env_prepare_step(self, action: Any) -> None:
        """Let an action act on the scene, before the next frame is evaluated."""
        raise NotImplementedError(f"{type(self).__name__} has no _env_prepare_step(action).")

    def _env_post_step(self) -> Mapping[str, Any]:
        """Say what came of it, now that the frame is evaluated.

        Returns:
            `obs`, `reward`, and whatever the trainer shall find in its ``info``. `terminated` says that the episode is over by
            its own rules, `truncated` that it was cut short. `done` alone means terminated. Without any of the three, it goes on.
        """
        raise NotImplementedError(f"{type(self).__name__} has no _env_post_step().")

    def attach_default_renderer(self, every_nth: int | None = 1) -> None:
        """Have the scene's camera render into `ctx`, as `rgb_array`, before :meth:`_env_post_step`.

        Args:
            every_nth: the first frame of an episode, and every nth from there. None: no frame.

        Raises:
            ConfigurationError: `every_nth` is less than 1; or as `OffScreenRenderer`.
        """
        if every_nth is not None and every_nth < 1:
            raise ConfigurationError(f"every_nth={every_nth} is less than 1; None renders nothing.")
        self.renderer = None
        if every_nth is not None:
            from .offscreen import OffScreenRenderer

            self.renderer = OffScreenRenderer(mode="rgb")
        self.render_every = every_nth

    def run(self, frame_range: tuple[int, int] | None = None, use_animation: bool = True) -> None:
        """Play episodes for as long as the agent likes.

        Args:
            frame_range: first and last frame of an episode. None: the scene's own range.
            use_animation: with a window, return at once and play from Blender's event loop.

        Raises:
            ConfigurationError: as `AnimationController.play`; or the agent returned something else than a command.
            and what hooks and agent raise. From the event loop, that ends the instance.
        """
        self.frame_range = AnimationController.setup_frame_range(frame_range)
        self.events.play((self.frame_range[0], _LAST_FRAME), num_episodes=-1, use_animation=use_animation)

    def describe(self) -> dict[str, Any]:
        """What a trainer is told before anything else.

        Returns:
            `spaces` (`observation` and `action`, plain data or None), `fps` (float, frames played a second, in real time) and
            `has_renderer` (bool).

        Raises:
            ConfigurationError: a declared space is none.
        """
        return {
            "spaces": {"observation": plain(self.observation_space), "action": plain(self.action_space)},
            "fps": 1 / self.frame_interval_s,
            "has_renderer": self.renderer is not None,
        }

    @property
    def frame_interval_s(self) -> float:
        """The scene's time from one frame that is played to the next, in seconds."""
        scene = bpy.context.scene
        return float(scene.frame_step * scene.render.fps_base / scene.render.fps)

    def _pre_animation(self) -> None:
        restart, self._restart = self._restart or Restart(), None
        self.state = State.INIT
        self.seed, self.options = restart.seed, restart.options
        if self.seed is not None:
            self._begin_randomness(self.seed)
        self.ctx = {"prev_action": None, "done": False, "terminated": False, "truncated": False}
        given = {"seed": self.seed, "options": self.options}
        self._note(self._env_reset(**{name: given[name] for name in self._reset_takes}), "_env_reset")

    def _pre_frame(self) -> None:
        assert self.frame_range is not None
        frame = self.events.frameid
        self.ctx["time"] = frame
        if frame >= self.frame_range[1]:
            self.ctx.update(done=True, truncated=True)
        if frame == self.frame_range[0]:
            return
        ctx = self.ctx if self._drew else {key: value for key, value in self.ctx.items() if key != "rgb_array"}
        command, action = self.agent(self, **ctx)
        if command is Command.RESTART:
            self._restart = action if isinstance(action, Restart) else Restart()
            self.events.rewind()
        elif command is Command.STEP:
            if action is not None:
                self._env_prepare_step(action)
                self.ctx["prev_action"] = action
            self.state = State.RUN
        else:
            raise ConfigurationError(
                f"The agent returned {command!r} as its command; it has to be BaseEnv.CMD_STEP or CMD_RESTART."
            )

    def _post_frame(self) -> None:
        if self._restart is not None:
            return  # this frame is of no episode
        self._drew = self._is_drawn()
        if self._drew:
            assert self.renderer is not None
            self.ctx["rgb_array"] = self.renderer.render()
        self._note(self._env_post_step(), "_env_post_step")

    def _is_drawn(self) -> bool:
        assert self.frame_range is not None
        if self.renderer is None or self.render_every is None:
            return False
        return (self.events.frameid - self.frame_range[0]) % self.render_every == 0

    def _note(self, said: Mapping[str, Any] | None, hook: str) -> None:
        """Take what a hook returned into `ctx`, and make its words about the episode's end one statement."""
        if said is None:
            return
        if not isinstance(said, Mapping):
            raise ConfigurationError(f"{type(self).__name__}.{hook} returned {said!r}; it has to be a dict, or None.")
        self.ctx.update(said)
        if not said.keys() & {"done", "terminated", "truncated"}:
            return
        truncated = bool(said.get("truncated", False))
        terminated = bool(said.get("terminated", said.get("done", False) and not truncated))
        self.ctx.update(done=terminated or truncated, terminated=terminated, truncated=truncated)

    def _begin_randomness(self, seed: int) -> None:
        self.np_random = np.random.default_rng(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        mathutils.noise.seed_set(seed % (2**31 - 1) + 1)  # 0 would be the time


def _keywords(function: Callable[..., Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that can be given to `function` as keyword arguments."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return names
    return tuple(name for name in names if name in parameters)
