"""Windows that show pictures while training goes on."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

from blendtorch_shm.errors import ConfigurationError


class Viewer(Protocol):
    """A window that shows one picture after another."""

    def imshow(self, rgb: npt.NDArray[Any]) -> None:
        """Show a picture, (H, W, 3), uint8 or floats up to 1."""

    def close(self) -> None:
        """Close the window. It may be closed already."""


class MatplotlibRenderer:
    """A window of Matplotlib's. Where it has no display, it draws, and nobody sees it."""

    def __init__(self, **kwargs: Any) -> None:
        """Open a window; `kwargs` are those of ``matplotlib.pyplot.subplots``."""
        try:
            import matplotlib.pyplot
        except ImportError as error:
            raise ConfigurationError(f"Showing pictures needs Matplotlib: pip install matplotlib ({error}).") from error
        self._pyplot = matplotlib.pyplot
        self.fig, self.ax = matplotlib.pyplot.subplots(**kwargs)
        self.ax.set_axis_off()
        self.img: Any = None

    def imshow(self, rgb: npt.NDArray[Any]) -> None:
        """Show a picture."""
        if self.img is None or self.img.get_array().shape != rgb.shape:
            self.ax.clear()
            self.ax.set_axis_off()
            self.img = self.ax.imshow(rgb)
            self._pyplot.show(block=False)
        self.img.set_data(rgb)
        self.fig.canvas.draw_idle()
        self.fig.canvas.flush_events()

    def close(self) -> None:
        """Close the window."""
        self._pyplot.close(self.fig)


RENDER_BACKENDS: dict[str, type[Viewer]] = {"matplotlib": MatplotlibRenderer}
"""Kinds of windows by their names. Others may be added."""
LOOKUP_ORDER = ["matplotlib"]
"""Which is taken where none is named."""


def create_renderer(backend: str | None = None, **kwargs: Any) -> Viewer:
    """Open a window for pictures.

    Args:
        backend: a name in :data:`RENDER_BACKENDS`. None: the first of :data:`LOOKUP_ORDER` that is there.
        **kwargs: what the window is made with.

    Raises:
        ConfigurationError: there is no such backend, or what it needs is not installed.
    """
    name = backend or next((name for name in LOOKUP_ORDER if name in RENDER_BACKENDS), None)
    if name not in RENDER_BACKENDS:
        raise ConfigurationError(f"backend={backend!r} is not known; there are: {', '.join(RENDER_BACKENDS)}.")
    return RENDER_BACKENDS[name](**kwargs)
