"""What observations and actions an environment has, as plain data: Blender's Python need not have gymnasium.

The training side makes gymnasium's spaces of it, of the same names and arguments. Works without Blender::

    class CartPole(btb.env.BaseEnv):
        observation_space = btb.env.Box(-np.inf, np.inf, shape=(4,))
        action_space = btb.env.Discrete(2)
"""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from blendtorch_shm.errors import ConfigurationError

Space: TypeAlias = dict[str, Any]
"""``"type"`` is the name of a class of gymnasium's; the rest are its arguments."""

_KINDS = ("Box", "Discrete", "MultiDiscrete", "MultiBinary", "Dict", "Tuple")


def Box(
    low: npt.ArrayLike, high: npt.ArrayLike, shape: tuple[int, ...] | None = None, dtype: npt.DTypeLike = np.float32
) -> Space:
    """Arrays with limits.

    Args:
        low: the least value of each element: a number, or an array of the space's shape. ``-np.inf``: none.
        high: the greatest, likewise.
        shape: of the arrays. None: that of `low` and `high`.
        dtype: of their elements.

    Returns:
        the space, as plain data.

    Raises:
        ConfigurationError: `low` and `high` do not fit the shape, or each other.

    Example::

        pictures = Box(0, 255, shape=(84, 84, 3), dtype=np.uint8)
    """
    given = np.asarray(low), np.asarray(high)
    try:
        whole = tuple(
            map(operator.index, np.broadcast_shapes(*(bound.shape for bound in given)) if shape is None else shape)
        )
        lows, highs = (np.broadcast_to(bound, whole) for bound in given)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"Box: low {given[0].shape}, high {given[1].shape} and shape={shape} do not fit each other: {error}."
        ) from None
    if not (lows <= highs).all():
        raise ConfigurationError(f"Box: low={low!r} is above high={high!r} somewhere.")
    return {
        "type": "Box",
        "low": _short(lows),
        "high": _short(highs),
        "shape": list(whole),
        "dtype": np.dtype(dtype).name,
    }


def _short(bounds: npt.NDArray[Any]) -> Any:
    """The limit that all elements have, as a number, or else the array."""
    flat = bounds.reshape(-1)
    return flat[0].item() if flat.size and (flat == flat[0]).all() else np.array(bounds)


def Discrete(n: int, start: int = 0) -> Space:
    """One of the `n` whole numbers from `start` on.

    Raises:
        ConfigurationError: there is none.
    """
    if n < 1:
        raise ConfigurationError(f"Discrete: n={n} is less than 1.")
    return {"type": "Discrete", "n": int(n), "start": int(start)}


def MultiDiscrete(nvec: npt.ArrayLike) -> Space:
    """An array of whole numbers, each from 0 to below the number that `nvec` has in its place.

    Raises:
        ConfigurationError: one of those numbers is less than 1.
    """
    numbers = np.asarray(nvec, np.int64)
    if not (numbers >= 1).all():
        raise ConfigurationError(f"MultiDiscrete: nvec={nvec!r} has numbers less than 1.")
    return {"type": "MultiDiscrete", "nvec": numbers.tolist()}


def MultiBinary(n: int | tuple[int, ...]) -> Space:
    """An array of zeros and ones: `n` is their number, or the array's shape."""
    return {"type": "MultiBinary", "n": n if isinstance(n, int) else list(n)}


def Dict(**spaces: Any) -> Space:
    """A dict: by key, the space of its value.

    Example::

        observations = Dict(image=Box(0, 255, (84, 84, 3), np.uint8), speed=Box(-np.inf, np.inf, ()))
    """
    return {"type": "Dict", "spaces": {name: plain(space) for name, space in spaces.items()}}


def Tuple(*spaces: Any) -> Space:
    """A tuple: in its order, the spaces of its values."""
    return {"type": "Tuple", "spaces": [plain(space) for space in spaces]}


def plain(space: Any) -> Space | None:
    """A space as plain data.

    Args:
        space: made by a function of this module, or a space of gymnasium's where a script has that. None: none is declared.

    Raises:
        ConfigurationError: it is another thing, or of a kind that the training side does not know.
    """
    if space is None:
        return None
    if isinstance(space, dict):
        if space.get("type") not in _KINDS:
            raise ConfigurationError(f"{space!r} is no space: its type has to be one of {', '.join(_KINDS)}.")
        return dict(space)
    for kind in type(space).__mro__:  # by name: gymnasium need not be there
        if kind.__name__ in _KINDS and kind.__module__.partition(".")[0] in ("gymnasium", "gym"):
            return _from_gymnasium(kind.__name__, space)
    raise ConfigurationError(
        f"{space!r} is no space: make it with btb.env.{', btb.env.'.join(_KINDS)}, or with gymnasium's classes of"
        " these names."
    )


def _from_gymnasium(kind: str, space: Any) -> Space:
    match kind:
        case "Box":
            return Box(space.low, space.high, space.shape, space.dtype)
        case "Discrete":
            return Discrete(space.n, space.start)
        case "MultiDiscrete":
            if np.any(getattr(space, "start", 0)):
                raise ConfigurationError(f"{space!r} has numbers that start elsewhere than at 0; use one from 0 on.")
            return MultiDiscrete(space.nvec)
        case "MultiBinary":
            return MultiBinary(space.n)
        case "Dict":
            return Dict(**space.spaces)
        case _:
            return Tuple(*space.spaces)
