"""Waiting for a message that does not come: what is said meanwhile, and when waiting on makes no sense."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from torch.utils import data

from blendtorch_shm.errors import InstanceDied, StreamTimeout
from blendtorch_shm.launch.address import Address
from blendtorch_shm.launch.notes import InstanceReport, instance_reports
from blendtorch_shm.stream.control import RECLAIM_EVERY_S, activity
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace

from .launching.supervisor import describe_exit

log = logging.getLogger("blendtorch")

LOOK_EVERY_S = 0.25
"""How often whoever waits calls :meth:`Watch.look`."""
_TELL_EVERY_S = 10.0
_LAST_MESSAGES_S = 2 * RECLAIM_EVERY_S
"""After the last instance has ended: time to find what a consumer that died had held."""


class Watch:
    """Waits with the user: says what the instances do meanwhile, and when waiting on makes no sense.

    Args:
        addresses: of the instances.
        timeoutms: patience, in milliseconds.
        source: what messages are received from.
        progress: how much had arrived, for messages to people.
    """

    def __init__(self, addresses: Sequence[Address], timeoutms: int, source: Source, progress: str) -> None:
        self._timeout_s = timeoutms / 1000
        self._addresses = addresses
        self._twins = {a.twin for a in addresses if a.twin is not None}
        self._source = source
        self._progress = progress
        self._start = self._told = time.monotonic() - LOOK_EVERY_S
        self._exited_at: float | None = None
        worker = data.get_worker_info()
        self._tells = worker is None or worker.id == 0  # one voice for all

    def look(self) -> None:
        """Raises StreamTimeout when patience has run out, InstanceDied when nobody is left who could send."""
        now = time.monotonic()
        waited_s = now - self._start
        reports = self._reports()
        if self._exited_at is not None and now - self._exited_at > _LAST_MESSAGES_S:
            raise InstanceDied(
                f"All {len(self._addresses)} instances have ended, {self._progress} had arrived.\n"
                f"{self._describe(reports) or 'Their launch is over: its directory was removed.'}"
            )
        if self._exited_at is None and self._all_exited(reports):
            self._exited_at = now
        if waited_s > self._timeout_s:
            raise StreamTimeout(
                f"No message arrived for {waited_s:.1f} s (timeoutms={self._timeout_s * 1000:.0f}), {self._progress} had. "
                f"If the instances only need longer (a first EEVEE frame compiles shaders), raise timeoutms.\n"
                f"{self._source.explain()}\n{self._describe(reports) or self._remote()}"
            )
        if self._tells and now - self._told > _TELL_EVERY_S:
            self._told = now
            log.warning(
                "Waiting for a message for %.0f s (%s had arrived).\n%s\n%s",
                waited_s,
                self._progress,
                self._source.explain(),
                self._describe(reports, lines=2),
            )

    def _all_exited(self, reports: dict[tuple[str, int], InstanceReport]) -> bool:
        """Whether no instance is left. Nothing is known of those without a shared-memory twin."""
        return all(a.twin is not None for a in self._addresses) and all(
            reports[twin.directory, twin.btid].state == "exited"
            if (twin.directory, twin.btid) in reports
            else not twin.is_here()
            for twin in self._twins
        )

    def _reports(self) -> dict[tuple[str, int], InstanceReport]:
        """By launch directory and btid."""
        wanted = {(twin.directory, twin.btid) for twin in self._twins}
        found = {
            (directory, report.btid): report
            for directory in {directory for directory, _ in wanted}
            for report in instance_reports(directory)
        }
        return {instance: report for instance, report in found.items() if instance in wanted}

    def _remote(self) -> str:
        return (
            f"Nothing is known about the instances at {', '.join(self._addresses)}: do they run, and can this host reach "
            f"those ports?"
        )

    def _describe(self, reports: dict[tuple[str, int], InstanceReport], lines: int = 8) -> str:
        """What each instance does, when it last published, and the last `lines` lines of its log."""
        text = []
        for (directory, btid), report in sorted(reports.items()):
            state: str = report.state
            if report.state == "exited":
                state = f"exited, {describe_exit(report.exit_code or 0)}"
            if report.is_stopped():
                state = f"STOPPED (SIGSTOP, or a debugger; kill -CONT {report.pid} lets it go on)"
            if report.restarts:
                state += f", started again {report.restarts} times"
            for twin in self._twins:
                if (twin.directory, twin.btid) == (directory, btid):
                    seen = activity(SharedPlace(twin))
                    silence_s = None if seen is None else seen.silence_s()
                    age = "no message yet" if silence_s is None else f"last message {silence_s:.1f} s ago"
                    state += f"; {twin.name}: {age}"
            text.append(f"instance {btid}: {state}; it last logged:")
            text.extend(f"    {line}" for line in report.log_tail.splitlines()[-lines:] or ["(nothing)"])
        return "\n".join(text)
