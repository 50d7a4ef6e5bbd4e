"""Some instances here, some elsewhere: one source over several."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..source import IDLE_S, Source
from ..wire import Message


class MixedSource:
    """Takes from each source in turn.

    Args:
        sources: closed with this one.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)

    def receive(self, timeout_s: float) -> Message | None:
        deadline = time.monotonic() + timeout_s
        patience_s = 0.0
        while True:
            for source in list(self._sources):
                self._sources.append(self._sources.pop(0))
                message = source.receive(patience_s)
                if message is not None:
                    return message
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            patience_s = min(IDLE_S / 10, remaining)  # nothing anywhere: wait a little at each

    def explain(self) -> str:
        return "\n".join(source.explain() for source in self._sources)

    def close(self) -> None:
        for source in self._sources:
            source.close()
