"""Signals: callables that are invoked one after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


class Signal:
    """Something that callables can be connected to.

    What a callable needs is bound when it is added; what the invocation passes comes after it::

        finished = Signal()
        finished.add(print, 'finished:', sep='\\t')
        finished.invoke('episode 3')  # prints "finished:<tab>episode 3"
    """

    def __init__(self) -> None:
        self._connected: list[partial[Any]] = []

    def add(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> partial[Any]:
        """Connect `fn`, to be called as `fn(*args, *invoked, **kwargs)`.

        Returns:
            a handle for `remove`.
        """
        handle = partial(fn, *args, **kwargs)
        self._connected.append(handle)
        return handle

    def remove(self, handle: partial[Any]) -> None:
        """Disconnect what `add` returned `handle` for.

        Raises:
            ValueError: it is not connected.
        """
        self._connected.remove(handle)

    def invoke(self, *args: Any, **kwargs: Any) -> None:
        """Call everything connected, in the order of `add`. An exception ends that and reaches whoever invoked."""
        for handle in tuple(self._connected):
            handle(*args, **kwargs)
