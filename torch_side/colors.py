"""From amounts of light to what a display is sent, and back. Also known as ``btt.colors``.

Pictures of ``OffScreenRenderer`` are linear unless it was told ``color_space="srgb"``: their values are proportional to light.
On a screen they look too dark; files, and networks that were trained on photographs, expect values encoded as sRGB.

The functions take tensors, on any device, and ndarrays, of any shape: images, batches, clips. They return a new one of the
same kind, dtype and shape. In floating point 1.0 is white, values above 1 are converted too, and gradients pass. In uint8 255 is
white, and the result is the nearest of the 256 values, by a table. Rounding makes some of them one: where that matters, convert
to floating point first, ``x.float() / 255``.

Where the axis of the channels has four entries, the fourth is alpha, which is a coverage and no light, and stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError

__all__ = ["gamma", "linear_to_srgb", "srgb_to_linear"]

Pixels = TypeVar("Pixels", NDArray[Any], torch.Tensor)


def gamma(x: Pixels, coeff: float = 2.2, *, channel_axis: int | None = -1) -> Pixels:
    """Encode light with a power law: ``x ** (1 / coeff)``. Negative values count as 0.

    For sRGB, :func:`linear_to_srgb` is exact; 2.2 comes within 0.034 of it. With ``1 / coeff`` it decodes.

    Args:
        x: uint8, where 255 is white, or floating point, where 1.0 is.
        coeff: the exponent of the display, above 0.
        channel_axis: where channels are, alpha perhaps among them: -1 for (..., H, W, C), -3 for (..., C, H, W). None: convert
            every value.

    Raises:
        ConfigurationError: `x` is of another type, or `coeff` is not above 0.
    """
    if not coeff > 0:
        raise ConfigurationError(f"coeff={coeff!r} is not above 0; displays have one of about 2.2.")
    converted: Pixels = _convert(x, channel_axis, _power, 1 / coeff)
    return converted


def linear_to_srgb(x: Pixels, *, channel_axis: int | None = -1) -> Pixels:
    """Encode light as sRGB does (IEC 61966-2-1): linear up to 0.0031308, a power law with an offset beyond.

    Arguments and errors are those of :func:`gamma`.
    """
    converted: Pixels = _convert(x, channel_axis, _encode)
    return converted


def srgb_to_linear(x: Pixels, *, channel_axis: int | None = -1) -> Pixels:
    """Decode sRGB into light: the inverse of :func:`linear_to_srgb`.

    Arguments and errors are those of :func:`gamma`.
    """
    converted: Pixels = _convert(x, channel_axis, _decode)
    return converted


# Each takes an array or tensor of floating point, and the module that has its functions.


def _power(x: Any, xp: Any, exponent: float) -> Any:
    return xp.clip(x, 0, None) ** exponent


def _encode(x: Any, xp: Any) -> Any:
    # Both branches are computed everywhere: where the power is not used, it must not be NaN, nor its gradient.
    return xp.where(x <= 0.0031308, 12.92 * x, 1.055 * xp.clip(x, 0.0031308, None) ** (1 / 2.4) - 0.055)


def _decode(x: Any, xp: Any) -> Any:
    return xp.where(x <= 0.04045, x / 12.92, ((xp.clip(x, 0.04045, None) + 0.055) / 1.055) ** 2.4)


def _convert(x: Any, channel_axis: int | None, function: Callable[..., Any], *parameters: float) -> Any:
    """Apply one of the functions above to everything but alpha."""
    if not isinstance(x, (torch.Tensor, np.ndarray)):
        raise ConfigurationError(f"A {type(x).__name__} has no colours to convert; expected a tensor or an ndarray.")
    xp: Any = torch if isinstance(x, torch.Tensor) else np
    if x.dtype == xp.uint8:
        converted = _look_up(x, _table(function, *parameters))
    elif x.is_floating_point() if isinstance(x, torch.Tensor) else x.dtype.kind == "f":
        converted = function(x, xp, *parameters)
        if isinstance(converted, np.generic):  # what NumPy makes of an array without axes
            converted = np.asarray(converted)
    else:
        raise ConfigurationError(f"Colours are uint8 or floating point, not {x.dtype}.")
    if channel_axis is not None and x.ndim and x.shape[channel_axis] == 4:
        converted.swapaxes(channel_axis, -1)[..., 3] = x.swapaxes(channel_axis, -1)[..., 3]
    return converted


@functools.lru_cache(maxsize=64)
def _table(function: Callable[..., Any], *parameters: float) -> NDArray[np.uint8]:
    """What each uint8 becomes."""
    table: NDArray[np.uint8] = np.rint(255 * function(np.arange(256) / 255, np, *parameters)).astype(np.uint8)
    return table


def _look_up(x: Any, table: NDArray[np.uint8]) -> Any:
    if isinstance(x, np.ndarray):
        return np.asarray(np.take(table, x, mode="clip"))  # faster than "raise", and nothing is out of range
    if x.device.type == "cpu":  # NumPy is faster: torch makes an index of four bytes for each value first
        return torch.from_numpy(_look_up(x.numpy(), table))
    return torch.from_numpy(table).to(x.device).index_select(0, x.reshape(-1).int()).reshape(x.shape)
