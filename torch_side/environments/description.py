"""What environments say of themselves, and the spaces that follow from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.message.leaves import Leaf, leaves_of

from .launch import name_of
from .spaces import assemble, to_gymnasium, to_plain


class Description:
    """The spaces of an environment.

    Args:
        said: what it says of itself.
        script: that it is of, for messages.
        observation_space, action_space: of gymnasium's, where the script declares none.

    Attributes:
        observation_space, action_space: gymnasium's.
        observations: the former, as plain data.
        leaves: the arrays that an observation consists of.
        fps: frames a second, in real time.

    Raises:
        ConfigurationError: a space is declared nowhere.
    """

    def __init__(
        self,
        said: Mapping[str, Any],
        script: str | os.PathLike[str] | None,
        observation_space: spaces.Space[Any] | None,
        action_space: spaces.Space[Any] | None,
    ) -> None:
        declared = said["spaces"]
        name = name_of(script)
        if observation_space is None and declared["observation"] is None:
            raise ConfigurationError(_undeclared(name, "observation"))
        if action_space is None and declared["action"] is None:
            raise ConfigurationError(_undeclared(name, "action"))
        self.observations: Mapping[str, Any] = (
            declared["observation"] if observation_space is None else to_plain(observation_space)
        )
        self.observation_space: spaces.Space[Any] = observation_space or to_gymnasium(self.observations)
        self.action_space: spaces.Space[Any] = action_space or to_gymnasium(declared["action"])
        self.leaves: list[Leaf] = leaves_of(self.observations)
        self.fps = float(said["fps"])

    def observation(self, ctx: Mapping[str, Any]) -> Any:
        """The observation of an answer, as the space has it.

        Raises:
            ConfigurationError: it is another one than the space says.
        """
        return self.batch([leaf.of(ctx.get("obs")) for leaf in self.leaves])

    def batch(self, arrays: list[Any]) -> Any:
        """A batch of observations of their leaves."""
        return assemble(self.observations, list(arrays))


def _undeclared(name: str, kind: str) -> str:
    return (
        f"{name} declares no {kind}_space. Give its environment one, as in {kind}_space = btb.env.Box(-1, 1, shape=(3,)); or say "
        f"{kind}_space= here."
    )


def reward_of(ctx: Mapping[str, Any]) -> float:
    """The reward of an answer; 0 where the script says none.

    Raises:
        ConfigurationError: it is no number.
    """
    reward = ctx.get("reward")
    try:
        return 0.0 if reward is None else float(reward)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"A reward is a number; the script says {reward!r:.200}.") from error


def is_over(ctx: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether an answer's episode was terminated, and whether it was truncated."""
    return bool(ctx.get("terminated", ctx.get("done", False))), bool(ctx.get("truncated", False))


_NO_INFO = frozenset({"obs", "reward", "done", "terminated", "truncated", "rgb_array"})


def info_of(ctx: Mapping[str, Any]) -> dict[str, Any]:
    """What else an answer has."""
    return {key: value for key, value in ctx.items() if key not in _NO_INFO}


def plain_action(action: Any) -> Any:
    """An action as it can be published: a tensor becomes an array, a number of NumPy's one of Python's."""
    if isinstance(action, Mapping):
        return {key: plain_action(value) for key, value in action.items()}
    if isinstance(action, (tuple, list)):
        return [plain_action(value) for value in action]
    if hasattr(action, "detach"):
        action = action.detach().cpu().numpy()
    if isinstance(action, np.generic) or (
        isinstance(action, np.ndarray) and action.dtype.kind in "iu" and not action.shape
    ):
        return action.item()
    return action
