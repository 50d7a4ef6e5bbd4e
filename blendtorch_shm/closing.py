"""``with`` for what owns something until it is closed."""

from __future__ import annotations

from typing import TypeVar

_Owner = TypeVar("_Owner", bound="Closable")


class Closable:
    """Is closed at the end of a ``with`` block."""

    def close(self) -> None:
        """Let go of what it owns. Closing twice does no harm."""
        raise NotImplementedError

    def __enter__(self: _Owner) -> _Owner:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
