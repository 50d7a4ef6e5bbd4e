"""One instance of a launch: what to run, what became of it, and whether it is started again."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from blendtorch_shm.launch.address import Twin
from blendtorch_shm.launch.notes import InstanceState, Note
from blendtorch_shm.stream.control import activity
from blendtorch_shm.stream.place import SharedPlace

from .bound import BoundProcess
from .config import LaunchConfig

RAN_WELL_S = 60.0
"""An instance that ran for so long before it failed is not failing again and again: its restarts are counted anew."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
"""Between a failure and the restart; doubled with each further failure in a row."""


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ""
    if -code == signal.SIGKILL:
        hint = ", which is also what the kernel sends when memory runs out"
    return f"killed by {name}{hint}"


@dataclass(eq=False)
class Instance:
    """One instance: what to run, and what became of it."""

    btid: int
    command: Callable[[int], list[str]]
    """Its command line, by the number of restarts before."""
    env: Mapping[str, str]
    streams: Sequence[Twin] = ()
    """Those of its sockets."""
    process: BoundProcess | None = None
    """The current one, or the last."""
    started_at: float = 0.0
    state: InstanceState = "starting"
    exit_code: int | None = None
    renderer: str = ""
    obituary: str = ""
    """How it ended: exit code, age, and the tail of its log."""
    kept_log: str = ""
    """Where its log lies when the launch is over, if it failed."""
    restarts: int = 0
    failures: int = 0
    """Ends in a row that were answered by a restart."""
    due_at: float = 0.0
    """When to start it again."""
    published_before: int = 0
    """Messages, when its current process was started."""
    signs: object = None
    """What was last seen of its life: while it lives this changes."""
    silent_s: float = 0.0
    """For how long it has not."""
    listened_at: float = 0.0
    """When that was last looked at."""
    stuck: str = ""
    """Why it was killed."""
    said: dict[Note, str] = field(default_factory=dict)
    """Its notes."""
    opened: set[str] = field(default_factory=set)
    """Sockets whose files were seen while its current process ran."""
    lost: Sequence[str] = ()
    """Sockets that it publishes on, and whose files somebody has removed."""

    def has_exited(self) -> bool:
        """Whether its process is gone for good, and its obituary written."""
        return self.state == "exited"

    def published(self) -> int:
        """How many messages it has published, since its first start."""
        return sum(seen.published for twin in self.streams if (seen := activity(SharedPlace(twin))) is not None)

    def decide(
        self, config: LaunchConfig, code: int, age_s: float, *, is_recycled: bool = False
    ) -> tuple[float | None, str]:
        """Decide after an end whether it is started again, and count its failures in a row.

        Args:
            config: of the launch.
            code: exit code of its process.
            age_s: seconds that its process ran for.
            is_recycled: whether it ended because it had published `recycle_after` messages.

        Returns:
            the pause before it is started again in seconds, None if it is not; and a sentence about it.
        """
        if is_recycled:
            self.failures = 0
            return (
                0.0,
                f" It had published as much as one process may (recycle_after); start {self.restarts + 2} follows.",
            )
        if config.restart == "never" or (config.restart == "on-failure" and code == 0):
            return None, ""
        worked = code == 0 and self.published() > self.published_before
        if worked or age_s - self.silent_s > RAN_WELL_S:
            self.failures = 0
        if worked:
            return 0.0, f" It is started again (restart={config.restart!r})."
        if self.failures >= config.max_restarts:
            return None, (
                f" It is not started again: it was {self.failures} times in a row (max_restarts={config.max_restarts}), "
                f"without running for {RAN_WELL_S:.0f} s once."
            )
        pause_s = min(_FIRST_PAUSE_S * 2.0**self.failures, _LONGEST_PAUSE_S)
        self.failures += 1
        return (
            pause_s,
            f" It is started again in {pause_s:g} s ({self.failures} of {config.max_restarts} times in a row).",
        )
