"""``render``: the last picture of an environment, or a window that shows it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from blendtorch_shm.errors import ConfigurationError

from ..colors import gamma
from ..env_rendering import Viewer, create_renderer


class Screen:
    """A window that shows pictures, opened with the first one."""

    def __init__(self, backend: str | None = None, gamma_coeff: float = 1.0) -> None:
        self._backend = backend
        self._gamma = gamma_coeff
        self._viewer: Viewer | None = None

    def show(self, picture: npt.NDArray[Any]) -> None:
        """Show a picture, (H, W, 3) uint8.

        Raises:
            ConfigurationError: there is no display, or nothing that opens a window.
        """
        if self._viewer is None:
            if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
                raise ConfigurationError(
                    "render_mode='human' opens a window, and there is no display here (DISPLAY is not set). Use "
                    "render_mode='rgb_array', which returns pictures; or run it under xvfb-run."
                )
            self._viewer = create_renderer(self._backend)
        self._viewer.imshow(picture if self._gamma == 1.0 else np.asarray(gamma(picture, self._gamma)))

    def close(self) -> None:
        """Close the window, if one was opened."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None


def no_picture(script: str) -> ConfigurationError:
    """The error of who asks for a picture where none was drawn."""
    return ConfigurationError(
        f"The environment has drawn no picture yet. {script} has to call attach_default_renderer() before run(), or to "
        f"return 'rgb_array' from _env_post_step()."
    )
