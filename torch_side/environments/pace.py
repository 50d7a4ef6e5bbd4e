"""Whether environments or their trainer are what takes the time: what ``BlenderVectorEnv.stats()`` counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple


class EnvStats(NamedTuple):
    """Counters since the environments were made. Of the names that TorchRL's pools have, each means the same.

    Attributes:
        batches: how many were returned, by ``step`` and by ``recv``.
        avg_batch_size: environments in each.
        batch_fill_ratio: `avg_batch_size` as a part of all environments.
        partial_batch_fraction: the part of batches that had less than all environments.
        avg_observation_to_batch_ms: from an answer's arrival until the batch that it is in was returned.
        avg_batch_to_action_ms: from a batch's return until something was asked of an environment in it.
        consumer_busy_fraction: the part of the time that the trainer did not wait here.
        copied_batches: those that were copied: too many were kept, or their rows come from several.
        restarts: instances that were started again in the middle of an episode.
    """

    batches: int
    avg_batch_size: float
    batch_fill_ratio: float
    partial_batch_fraction: float
    avg_observation_to_batch_ms: float
    avg_batch_to_action_ms: float
    consumer_busy_fraction: float
    copied_batches: int
    restarts: int


class Pace:
    """Counts for :class:`EnvStats`."""

    def __init__(self, num_envs: int) -> None:
        self._num_envs = num_envs
        self._began = time.monotonic()
        self._waited_s = 0.0
        self._batches = self._partial = self._answers = self._actions = 0
        self._until_batch_s = self._until_action_s = 0.0
        self._arrived: list[float] = [0.0] * num_envs
        self._returned: list[float] = [0.0] * num_envs
        self.copied = 0
        self.restarts = 0

    def asked(self, env: int) -> None:
        """Something was asked of an environment."""
        if self._returned[env]:
            self._actions += 1
            self._until_action_s += time.monotonic() - self._returned[env]
            self._returned[env] = 0.0

    def arrived(self, env: int) -> None:
        """It has answered."""
        self._arrived[env] = time.monotonic()

    def waited(self, since: float) -> None:
        """The trainer has waited here."""
        self._waited_s += time.monotonic() - since

    def returned(self, envs: Sequence[int]) -> None:
        """A batch of these is returned."""
        now = time.monotonic()
        self._batches += 1
        self._partial += len(envs) < self._num_envs
        self._answers += len(envs)
        for env in envs:
            self._until_batch_s += now - self._arrived[env]
            self._returned[env] = now

    def stats(self) -> EnvStats:
        """As it is now."""
        batches = max(1, self._batches)
        size = self._answers / batches
        return EnvStats(
            batches=self._batches,
            avg_batch_size=size,
            batch_fill_ratio=size / self._num_envs,
            partial_batch_fraction=self._partial / batches,
            avg_observation_to_batch_ms=1000 * self._until_batch_s / max(1, self._answers),
            avg_batch_to_action_ms=1000 * self._until_action_s / max(1, self._actions),
            consumer_busy_fraction=1 - self._waited_s / max(1e-9, time.monotonic() - self._began),
            copied_batches=self.copied,
            restarts=self.restarts,
        )
