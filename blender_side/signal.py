"""Signals: lists of callables that are invoked one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Signal:
    """Something that callables can be connected to.

    What a callable needs is bound when it is added; whoever invokes the signal may pass further arguments, which come first::

        finished = Signal()
        finished.add(print, 'episodes', sep=': ')
        finished.invoke('cube')  # prints "cube: episodes"
    """

    def __init__(self) -> None:
        self._slots: list[Callable[..., Any]] = []

    def add(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Connect `fn`, called as `fn(*invoked, *args, **kwargs)`.

        Returns:
            a handle to give to `remove`.
        """

        def bound(*invoked: Any) -> Any:
            return fn(*invoked, *args, **kwargs)

        self._slots.append(bound)
        return bound

    def remove(self, handle: Callable[..., Any]) -> None:
        """Disconnect what `add` returned `handle` for.

        Raises:
            ValueError: it is not connected.
        """
        self._slots.remove(handle)

    def invoke(self, *args: Any) -> None:
        """Call what is connected, in the order it was added. An exception stops there and reaches the caller."""
        for bound in list(self._slots):
            bound(*args)
