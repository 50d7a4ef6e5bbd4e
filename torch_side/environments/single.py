"""One environment in Blender, for gymnasium."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import gymnasium
import numpy.typing as npt
from gymnasium import spaces

from blendtorch_shm.arguments import integer
from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.launch.address import checked

from ..constants import DEFAULT_TIMEOUTMS
from .description import Description, info_of, is_over, plain_action, reward_of
from .launch import launched, name_of
from .pictures import Screen, no_picture
from .requests import Requests


class BlenderEnv(gymnasium.Env[Any, Any]):
    """An environment that runs in a Blender instance of its own: a ``btb.env.BaseEnv`` in a script.

    Spaces are those that the script declares. Observations lie in shared memory, where the script has rendered them, and stay as
    they are for as long as somebody has them. An instance that ends is started again; its episode is truncated then, and ``info``
    has ``restarted=True``.

    Args:
        scene, script: as for :class:`~torch_side.BlenderLauncher`.
        address: of an instance that runs already, instead of these.
        render_mode: ``"rgb_array"``: :meth:`render` returns the last picture. ``"human"``: a window shows each one.
        observation_space, action_space: where the script declares none.
        timeoutms: patience for each answer, in milliseconds.
        background: as for the launcher.
        launch_args: what else the launcher is told, such as ``{"blender": "python", "seed": 7}``. Without ``"restart"`` in it, an
            instance is started again when it fails.
        **kwargs: arguments of the script: ``render_every=10`` becomes ``--render-every 10``.

    Raises:
        ConfigurationError: an argument that cannot work; or no space is declared.
        InstanceDied: the script failed before its environment ran.
        StreamTimeout: its environment did not run in time.

    Example::

        env = btt.env.BlenderEnv("cartpole.blend", "cartpole.blend.py")
        observation, info = env.reset(seed=7)
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        env.close()
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": 24}  # noqa: RUF012  # as its base has it

    def __init__(
        self,
        scene: str | os.PathLike[str] | None = None,
        script: str | os.PathLike[str] | None = None,
        *,
        address: str | None = None,
        render_mode: str | None = None,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        timeoutms: int = DEFAULT_TIMEOUTMS,
        background: bool = True,
        launch_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigurationError(f"render_mode={render_mode!r} is not known; use 'human', 'rgb_array' or None.")
        self.render_mode = render_mode
        self._script = script
        self._screen = Screen()
        self._picture: npt.NDArray[Any] | None = None
        self._last: Any = None
        self._is_closed = self._was_reset = False
        self._open = contextlib.ExitStack()
        try:
            if address is not None:
                if scene is not None or script is not None or launch_args or kwargs:
                    raise ConfigurationError(
                        "address= is of an instance that runs; scene, script and others launch one."
                    )
                addresses = checked(address)
            else:
                if scene is None or script is None:
                    raise ConfigurationError("Say scene= and script=, or address=.")
                addresses = list(
                    self._open.enter_context(
                        launched(scene, script, 1, background, {"restart": "on-failure", **(launch_args or {})}, kwargs)
                    )
                )
            self._requests = self._open.enter_context(Requests(addresses, integer("timeoutms", timeoutms)))
            said = self._requests.describe(0)
            self._description = Description(said, script, observation_space, action_space)
        except BaseException:
            self._open.close()
            raise
        self.observation_space = self._description.observation_space
        self.action_space = self._description.action_space
        self.metadata = {**self.metadata, "render_fps": self._description.fps}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of all that is random in the script from now on. None: it goes on.
            options: what the script's ``_env_reset`` gets.

        Returns:
            the observation of the first frame, and what else the script says of it.

        Raises:
            ConfigurationError: this was closed; or the observation is none of its space.
            StreamTimeout: no answer in time.
            InstanceDied: the instance ended, and is not started again.
        """
        super().reset(seed=seed)
        ctx = None
        while ctx is None:  # an instance that is started again meanwhile is asked, too
            ctx = self._ask("reset", anew=True, seed=seed, options=options)
        self._last = self._description.observation(ctx)
        self._was_reset = True
        return self._last, info_of(ctx)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act, and let the scene play one frame.

        Returns:
            observation, reward, whether the episode is terminated, whether it is truncated, and what else the script says.

        Raises:
            ConfigurationError: as for :meth:`reset`, and if that was not called yet.
            StreamTimeout, InstanceDied: as for :meth:`reset`.
        """
        if not (self._was_reset or self._is_closed):
            raise ConfigurationError("No episode has begun: call reset() first.")
        ctx = self._ask("step", action=plain_action(action))
        if ctx is None:
            return self._last, 0.0, False, True, {"restarted": True}
        self._last = self._description.observation(ctx)
        return self._last, reward_of(ctx), *is_over(ctx), info_of(ctx)

    def render(self) -> Any:
        """The last picture that the script drew, (H, W, 3) uint8; with ``render_mode="human"``, its window shows it.

        Raises:
            ConfigurationError: there is none, or no window is possible.
        """
        if self.render_mode is None:
            gymnasium.logger.warn("render() needs a render_mode: BlenderEnv(..., render_mode='rgb_array').")
            return None
        if self._picture is None:
            raise no_picture(name_of(self._script))
        if self.render_mode == "human":
            self._screen.show(self._picture)
            return None
        return self._picture

    def close(self) -> None:
        """End the instance, if it was launched here. What was handed out stays valid."""
        self._is_closed = True
        self._screen.close()
        self._open.close()

    def _ask(self, cmd: str, **content: Any) -> dict[str, Any] | None:
        if self._is_closed:
            raise ConfigurationError("This environment is closed.")
        requests = self._requests
        requests.forget(0)  # an exception may have come in between
        requests.ask(0, cmd, **content)
        answer = requests.wait()
        if answer.ctx is not None and answer.ctx.get("rgb_array") is not None:
            self._picture = answer.ctx["rgb_array"]
            if self.render_mode == "human":
                self._screen.show(self._picture)
        return answer.ctx
