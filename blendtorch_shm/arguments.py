"""Checks of arguments, whose errors name the argument."""

from __future__ import annotations

from typing import Any

from .errors import ConfigurationError

MOST = 2**31 - 1
"""The largest number that ZeroMQ takes."""


def integer(name: str, value: Any, lowest: int = 1, highest: int = MOST) -> int:
    """`value` as an int.

    Raises:
        ConfigurationError: it is none, or not from `lowest` to `highest`.
    """
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise ConfigurationError(f"{name} must be an int, not {value!r}.")
    if not lowest <= value <= highest:
        raise ConfigurationError(f"{name}={value} is not between {lowest} and {highest}.")
    return int(value)
