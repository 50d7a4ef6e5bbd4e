"""Some instances here, some elsewhere: one source over both kinds."""

from __future__ import annotations

import time

from ..memory.segment import Segment
from ..message.wire import Message
from ..stream.source import IDLE_S, RingSource
from .tcp import TcpSource


class MixedSource:
    """Takes from both kinds in proportion to their instances, and sleeps until either has something.

    Args:
        ring: the instances whose memory is shared. It sleeps with the poller of `tcp`. Closed with this source.
        num_rings: how many they are.
        tcp: the others. Closed with this source.
        num_tcp: how many they are.
    """

    def __init__(self, ring: RingSource, num_rings: int, tcp: TcpSource, num_tcp: int) -> None:
        self._ring = ring
        self._tcp = tcp
        turns = [((i + 0.5) / n, source) for source, n in ((ring, num_rings), (tcp, num_tcp)) for i in range(n)]
        self._turns: list[RingSource | TcpSource] = [source for _, source in sorted(turns, key=lambda turn: turn[0])]
        self._turn = 0

    def receive(self, timeout_s: float) -> Message | None:
        deadline = time.monotonic() + timeout_s
        while True:
            for _ in self._turns:
                self._turn = (self._turn + 1) % len(self._turns)
                message = self._turns[self._turn].take()
                if message is not None:
                    return message
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return None
            message = self._ring.take_or_sleep(min(IDLE_S, remaining_s))
            if message is not None:
                return message

    def receive_many(self, count: int, timeout_s: float) -> list[Message]:
        first = self.receive(timeout_s)
        if first is None:
            return []
        messages = [first]
        for remaining in range(len(self._turns), 0, -1):
            self._turn = (self._turn + 1) % len(self._turns)
            messages += self._turns[self._turn].take_many(-(-(count - len(messages)) // remaining))
        return messages

    def segments(self) -> list[Segment]:
        return self._ring.segments()

    def explain(self) -> str:
        return f"{self._ring.explain()}\n{self._tcp.explain()}"

    def close(self) -> None:
        self._ring.close()
        self._tcp.close()
