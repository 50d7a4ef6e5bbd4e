"""blendtorch's interface to one environment, with its names and its values."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from blendtorch_shm.arguments import integer
from blendtorch_shm.errors import ConfigurationError, InstanceDied
from blendtorch_shm.launch.address import checked

from ..constants import DEFAULT_TIMEOUTMS
from .launch import launched
from .pictures import Screen
from .requests import Requests

if TYPE_CHECKING:
    Base: Any = object
else:
    try:  # so that gymnasium's wrappers and `make` take it; it works without
        from gymnasium import Env as Base
    except ImportError:
        Base = object


class RemoteEnv:
    """One environment in an instance, as blendtorch has it. :class:`~torch_side.env.BlenderEnv` is gymnasium's.

    Args:
        address: of the instance, such as ``launch_info.addresses['GYM'][0]``.
        timeoutms: patience for each answer, in milliseconds.

    Attributes:
        env_time: number of the frame of the last answer; None: there was none.
        rgb_array: (H, W, 3) uint8, linear colours: what the default renderer drew of the last answer's frame. None: nothing.

    Raises:
        ConfigurationError: not an address, or another program is connected.

    Example::

        with btt.env.launch_env("cartpole.blend", "cartpole.blend.py", render_every=10) as env:
            obs, info = env.reset()
            obs, reward, done, info = env.step(0.5)
    """

    def __init__(self, address: str, timeoutms: int = DEFAULT_TIMEOUTMS) -> None:
        self._requests = Requests(checked(address), integer("timeoutms", timeoutms))
        self.env_time: int | None = None
        self.rgb_array: npt.NDArray[Any] | None = None
        self._screens: dict[tuple[str | None, float], Screen] = {}

    def reset(self) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; one in which nothing was done yet is taken as it is.

        Returns:
            what the script calls `obs`, and the rest of what it returned, with `prev_action`, `done` and `time`.

        Raises:
            StreamTimeout: no answer in time.
            InstanceDied: the instance ended.
        """
        ctx = self._ask("reset")
        return ctx.pop("obs", None), ctx

    def step(self, action: Any) -> tuple[Any, Any, bool, dict[str, Any]]:
        """Act, and let the scene play one frame.

        Args:
            action: anything that can be published, for the script's ``_env_prepare_step``.

        Returns:
            `obs`, `reward` and `done` as the script calls them, and the rest.

        Raises:
            StreamTimeout: no answer in time.
            InstanceDied: the instance ended; or it was started again meanwhile, and needs a :meth:`reset`.
        """
        ctx = self._ask("step", action=action)
        return ctx.pop("obs", None), ctx.pop("reward", 0.0), ctx.pop("done", False), ctx

    def render(
        self, mode: str = "human", backend: str | None = None, gamma_coeff: float = 2.2
    ) -> npt.NDArray[Any] | None:
        """The last picture, as `rgb_array` has it; or, with ``mode="human"``, a window that shows it.

        Args:
            mode: ``"rgb_array"`` or ``"human"``.
            backend: of the window, see :func:`torch_side.env_rendering.create_renderer`.
            gamma_coeff: what the window's colours are corrected with.
        """
        if mode == "rgb_array" or self.rgb_array is None:
            return self.rgb_array
        screen = self._screens.setdefault((backend, gamma_coeff), Screen(backend, gamma_coeff))
        screen.show(self.rgb_array)
        return None

    def close(self) -> None:
        """Close the window and the connection. The instance goes on."""
        for screen in self._screens.values():
            screen.close()
        self._screens.clear()
        self._requests.close()

    def __enter__(self) -> RemoteEnv:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _ask(self, cmd: str, **content: Any) -> dict[str, Any]:
        requests = self._requests
        requests.forget(0)  # an exception may have come in between
        requests.ask(0, cmd, **content)
        answer = requests.wait()
        if answer.ctx is None:
            if cmd == "reset":
                return self._ask(cmd, **content)
            raise InstanceDied(
                "The instance was started again in the middle of a step. Its episode is over: call reset()."
            )
        self.env_time = answer.ctx.get("time")
        self.rgb_array = answer.ctx.pop("rgb_array", None)
        return {key: value for key, value in answer.ctx.items() if key not in ("terminated", "truncated")}


@contextlib.contextmanager
def launch_env(
    scene: str | os.PathLike[str],
    script: str | os.PathLike[str],
    background: bool = False,
    *,
    timeoutms: int = DEFAULT_TIMEOUTMS,
    launch_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Iterator[RemoteEnv]:
    """Launch an instance, and connect to its environment, for a ``with`` block.

    Args:
        scene, script, background: as for :class:`~torch_side.BlenderLauncher`.
        timeoutms: as for :class:`RemoteEnv`.
        launch_args: what else the launcher is told.
        **kwargs: arguments of the script: ``render_every=10`` becomes ``--render-every 10``, ``real_time=False``
            ``--no-real-time``.
    """
    with launched(scene, script, 1, background, launch_args, kwargs) as addresses:
        env = RemoteEnv(addresses[0], timeoutms)
        try:
            yield env
        finally:
            env.close()


class OpenAIRemoteEnv(Base):  # type: ignore[misc]
    """blendtorch's base for environments of the old gym: ``reset`` returns an observation, ``step`` four values.

    For scripts that subclass it. New ones use :class:`~torch_side.env.BlenderEnv`.

    Args:
        version: of the environment, kept as ``__version__``.
    """

    metadata = {"render.modes": ["rgb_array", "human"], "render_modes": ["rgb_array", "human"], "render_fps": 24}  # noqa: RUF012

    def __init__(self, version: str = "0.0.1") -> None:
        self.__version__ = version
        self._launch: contextlib.ExitStack | None = contextlib.ExitStack()
        self._env: RemoteEnv | None = None

    def launch(
        self, scene: str | os.PathLike[str], script: str | os.PathLike[str], background: bool = False, **kwargs: Any
    ) -> None:
        """Launch the instance; see :func:`launch_env`.

        Raises:
            ConfigurationError: it runs already, or was closed.
        """
        if self._env is not None or self._launch is None:
            raise ConfigurationError("This environment was launched before. Make another one.")
        self._env = self._launch.enter_context(launch_env(scene, script, background, **kwargs))

    def step(self, action: Any) -> Any:
        """Act; see :meth:`RemoteEnv.step`."""
        return self._running().step(action)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode; the observation. `seed` and `options` are gymnasium's, and mean nothing here."""
        return self._running().reset()[0]

    def seed(self, seed: int | None = None) -> None:
        """As in blendtorch: not possible."""
        raise NotImplementedError("OpenAIRemoteEnv cannot be seeded; BlenderEnv.reset(seed=...) can.")

    def render(self, mode: str = "human") -> Any:
        """The last picture; see :meth:`RemoteEnv.render`."""
        return self._running().render(mode=mode)

    @property
    def env_time(self) -> int | None:
        """Number of the frame of the last answer."""
        return self._running().env_time

    def close(self) -> None:
        """End the instance."""
        launch, self._launch, self._env = self._launch, None, None
        if launch is not None:
            launch.close()

    def _running(self) -> RemoteEnv:
        if self._env is None:
            raise ConfigurationError("This environment does not run: call launch() first.")
        return self._env

    def __del__(self) -> None:
        if getattr(self, "_launch", None) is not None:
            self.close()
