"""Spaces of gymnasium, and the same as plain data, as ``blender_side/spaces.py`` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.message.leaves import leaves_of


def to_gymnasium(plain: Mapping[str, Any]) -> spaces.Space[Any]:
    """The space that a script has declared.

    Raises:
        ConfigurationError: it is none.
    """
    leaves_of(plain)  # names what is wrong
    match plain["type"]:
        case "Box":
            dtype = np.dtype(plain["dtype"])
            low, high = (_bound(plain[name], plain["shape"], dtype) for name in ("low", "high"))
            return spaces.Box(low, high, tuple(plain["shape"]), dtype.type)
        case "Discrete":
            return spaces.Discrete(plain["n"], start=plain["start"])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(plain["nvec"])
        case "MultiBinary":
            n = plain["n"]
            return spaces.MultiBinary(n if isinstance(n, int) else tuple(n))
        case "Dict":
            return spaces.Dict({key: to_gymnasium(space) for key, space in plain["spaces"].items()})
        case _:
            return spaces.Tuple([to_gymnasium(space) for space in plain["spaces"]])


def _bound(value: Any, shape: Any, dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "f":
        return np.broadcast_to(np.asarray(value, dtype), tuple(shape))
    exact = np.broadcast_to(np.asarray(value), tuple(shape))
    if dtype.kind not in "iu":
        return exact.astype(dtype)
    limits = np.iinfo(dtype)
    bounds = [
        min(max(each, limits.min), limits.max) for each in exact.ravel().tolist()
    ]  # exact, also if one is infinite
    return np.array(bounds, dtype).reshape(exact.shape)


def to_plain(space: spaces.Space[Any]) -> dict[str, Any]:
    """A space of gymnasium's, as plain data.

    Raises:
        ConfigurationError: of a kind that observations in Blender cannot have.
    """
    match space:
        case spaces.Box():
            return {
                "type": "Box",
                "low": space.low,
                "high": space.high,
                "shape": list(space.shape),
                "dtype": np.dtype(space.dtype).name,
            }
        case spaces.Discrete():
            return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {"type": "MultiDiscrete", "nvec": space.nvec.tolist()}
        case spaces.MultiBinary():
            return {"type": "MultiBinary", "n": list(space.shape)}
        case spaces.Dict():
            return {"type": "Dict", "spaces": {key: to_plain(inner) for key, inner in space.spaces.items()}}
        case spaces.Tuple():
            return {"type": "Tuple", "spaces": [to_plain(inner) for inner in space.spaces]}
    raise ConfigurationError(
        f"{space!r} is no space that an environment in Blender can have: use Box, Discrete, MultiDiscrete, MultiBinary, Dict or "
        f"Tuple."
    )


def assemble(plain: Mapping[str, Any], leaves: list[Any]) -> Any:
    """An observation, or a batch of them, of its leaves in the order of :func:`~blendtorch_shm.message.leaves.leaves_of`.

    Args:
        plain: the space.
        leaves: the arrays; they are taken out of the list.
    """
    match plain["type"]:
        case "Dict":
            return {key: assemble(space, leaves) for key, space in plain["spaces"].items()}
        case "Tuple":
            return tuple(assemble(space, leaves) for space in plain["spaces"])
        case "Discrete":
            return leaves.pop(0)[()]  # of one observation: a number, no array
    return leaves.pop(0)
