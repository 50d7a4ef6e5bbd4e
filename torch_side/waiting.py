"""Waiting for a message that does not come: what is said meanwhile, and when waiting on makes no sense."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from blendtorch_shm.errors import InstanceDied, SegmentError, StreamTimeout
from blendtorch_shm.launch.address import SHARED_MEMORY, Address, Twin, is_signed, streams_path
from blendtorch_shm.launch.directory import is_abandoned
from blendtorch_shm.launch.notes import InstanceReport, instance_reports, log_path, state_of
from blendtorch_shm.stream.control import RECLAIM_EVERY_S, activity
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.stats import ConsumerStats, StreamStats, stats_of_instance
from blendtorch_shm.wording import counted

from .launching.instance import describe_exit

log = logging.getLogger("blendtorch")

LOOK_EVERY_S = 0.25
"""How often whoever waits calls :meth:`Watch.look`."""
_TELL_EVERY_S = 10.0
_LAST_MESSAGES_S = 2 * RECLAIM_EVERY_S
"""After the last instance has ended: time to find what a consumer that died had held."""
_LINES_OF_A_REPORT, _LINES_OF_AN_ERROR = 2, 8
"""Of each instance's log."""

_Instance = tuple[str, int]
"""Its launch directory and its number."""


class Reader(Protocol):
    """Whose messages are waited for: a dataset, or one end of a channel."""

    @property
    def addresses(self) -> Sequence[Address]:
        """Of the instances."""

    @property
    def timeoutms(self) -> float:
        """Patience for the next message, in milliseconds."""

    @property
    def max_items(self) -> int:
        """How many messages it takes in all; 0: as many as come."""

    def heard_at(self) -> int:
        """When it last received a message over TCP, in this or in another process."""


@dataclass(frozen=True)
class ChannelReader:
    """The :class:`Reader` at one end of a channel. Without `timeoutms`, its patience is what each call is told."""

    addresses: tuple[Address, ...]
    timeoutms: float = math.inf
    max_items: int = 0

    def heard_at(self) -> int:
        return 0


class Watch:
    """Waits with the user: says what the instances do meanwhile, and when waiting on makes no sense.

    Patience counts from the last message that anybody took from these instances: of those that share their memory, whatever
    consumer on this host it was; of others, any process of this reader.

    Args:
        reader: whose messages are waited for.
        source: what they are received from.
    """

    def __init__(self, reader: Reader, source: Source) -> None:
        self._reader = reader
        self._timeout_s = reader.timeoutms / 1000
        self._twins = list(dict.fromkeys(a.twin for a in reader.addresses if a.twin is not None))
        self._source = source
        self._progress = ""
        self._start = self._told = 0.0
        self._taken: object = None
        self._exited_at: float | None = None
        self._has_told = False
        self._said: set[str] = set()
        """Lines that were in a report: they are not repeated."""
        torch_data = sys.modules.get("torch.utils.data")  # where nobody imported it, this is no worker of a DataLoader
        worker = None if torch_data is None else torch_data.get_worker_info()
        self._tells = worker is None or worker.id == 0  # one voice for all

    def begin(self, progress: str, *, anew: bool = True) -> None:
        """A wait has begun, :data:`LOOK_EVERY_S` ago.

        Args:
            progress: how much had arrived before, for messages to people.
            anew: whether anything has arrived since the last wait.
        """
        self._progress = progress
        self._start = self._told = time.monotonic() - LOOK_EVERY_S
        self._taken = self._taken_by_anybody()
        if anew:
            self._exited_at = None

    def look(self) -> None:
        """Raises StreamTimeout when patience has run out, InstanceDied when nobody is left who could send, and SegmentError when
        files of a stream that is not open here were removed.
        """
        now = time.monotonic()
        taken = self._taken_by_anybody()
        if taken != self._taken:
            self._taken = taken
            self._start = self._told = now
        waited_s = now - self._start
        reports = self._reports()
        self._require_files(reports)
        self._require_anybody(now, reports)
        if waited_s > self._timeout_s:
            raise StreamTimeout(self._why_nothing_came(waited_s, reports))
        if self._tells and now - self._told > _TELL_EVERY_S:
            self._told = now
            log.warning("%s", self._report(waited_s, reports))

    def look_for_the_end(self, progress: str) -> None:
        """Raises InstanceDied when nobody is left who could send, or take what is sent; for `progress` see :meth:`begin`."""
        self._progress = progress
        self._require_anybody(time.monotonic(), self._reports())

    def look_for_a_false_start(self) -> None:
        """Raises InstanceDied when an instance has failed before it sent anything, though it is started again."""
        for instance, report in self._reports().items():
            if (report.restarts or report.state == "restarting") and not self._published(instance):
                lines = [f"Instance {report.btid} failed before it said anything{report.error and f': {report.error}'}"]
                lines += [f"It is {self._state(instance, report)}. Its log: {report.kept_log or log_path(*instance)}"]
                raise InstanceDied("\n".join([*lines, *(f"    {line}" for line in _tail(report, _LINES_OF_AN_ERROR))]))

    def timeout(self, progress: str, waited_s: float) -> StreamTimeout:
        """The error of who has waited for `waited_s` in vain; for `progress` see :meth:`begin`."""
        self._progress = progress
        return StreamTimeout(self._why_nothing_came(waited_s, self._reports()))

    def _require_anybody(self, now: float, reports: dict[_Instance, InstanceReport]) -> None:
        if self._exited_at is not None and now - self._exited_at > _LAST_MESSAGES_S:
            raise InstanceDied(self._how_they_ended(reports))
        if not self._all_exited(reports):
            self._exited_at = None  # also if it only looked so, for somebody had removed the launch's files
        elif self._exited_at is None:
            self._exited_at = now

    def _require_files(self, reports: dict[_Instance, InstanceReport]) -> None:
        absent = {place.twin for place in self._source.absent() if isinstance(place, SharedPlace)}
        for twin in self._twins:
            report = reports.get((twin.directory, twin.btid))
            if twin in absent and report is not None and twin.name in report.lost:
                raise SegmentError(
                    f"The shared memory of {twin.name!r} of instance {twin.btid} ({SHARED_MEMORY}{twin.prefix}, or the lock file "
                    f"{twin.lock_path}) was removed while the instance publishes there. Nobody can begin to read it; readers "
                    f"that had it open go on. {self._progress.capitalize()} had arrived. Have the instance started again "
                    f"(with restart='on-failure': kill {report.pid}), or launch anew. docs/removed_files.md says what removes "
                    f"such files, and how to keep it from doing so."
                )

    def _taken_by_anybody(self) -> object:
        """Something that changes when anybody takes a message."""
        return self._source.delivered(), self._reader.heard_at()

    # -- what is known of the instances -------------------------------------------------------------------------

    def _all_exited(self, reports: dict[_Instance, InstanceReport]) -> bool:
        """Whether no instance is left. Nothing is known of those without a shared-memory twin."""
        return all(a.twin is not None for a in self._reader.addresses) and all(
            reports[twin.directory, twin.btid].state == "exited" or is_abandoned(twin.launch) or _is_swept(twin.launch)
            if (twin.directory, twin.btid) in reports
            else not (twin.is_here() or is_signed(twin.launch))
            for twin in self._twins
        )

    def _reports(self) -> dict[_Instance, InstanceReport]:
        """By instance, in the order of their numbers."""
        wanted = {(twin.directory, twin.btid) for twin in self._twins}
        found = {
            (directory, report.btid): report
            for directory in sorted({directory for directory, _ in wanted})
            for report in instance_reports(directory)
        }
        return {instance: report for instance, report in found.items() if instance in wanted}

    def _twins_of(self, instance: _Instance) -> list[Twin]:
        return [twin for twin in self._twins if (twin.directory, twin.btid) == instance]

    def _published(self, instance: _Instance) -> int:
        """Messages on the sockets that are read here."""
        seen = [activity(SharedPlace(twin)) for twin in self._twins_of(instance)]
        return sum(each.published for each in seen if each is not None)

    # -- what is said -------------------------------------------------------------------------------------------

    def _why_nothing_came(self, waited_s: float, reports: dict[_Instance, InstanceReport]) -> str:
        advice = self._obstacles(reports) or [
            "If the instances only need longer (a first EEVEE frame compiles shaders), raise timeoutms."
        ]
        lines = [
            f"No message arrived for {waited_s:.1f} s (timeoutms={self._timeout_s * 1000:.0f}), {self._progress} had arrived.",
            *advice,
            self._source.explain(),
        ]
        for instance, report in reports.items():
            lines.append(f"instance {report.btid}: {self._state(instance, report)}; it last logged:")
            lines += [f"    {line}" for line in _tail(report, _LINES_OF_AN_ERROR) or ["(nothing)"]]
        if not reports and not self._source.is_answered():
            lines.append(
                f"Nothing is known about the instances at {', '.join(self._reader.addresses)}: do they run, and can this host "
                f"reach those ports?"
            )
        return "\n".join(lines)

    def _report(self, waited_s: float, reports: dict[_Instance, InstanceReport]) -> str:
        """The first one tells all, later ones what is new."""
        alike = _alike({instance: self._state(instance, report) for instance, report in reports.items()})
        states = [f"{_name(instances)}: {state}" for state, instances in alike.items()]
        details = [*self._obstacles(reports), *self._source.explain(brief=True).splitlines()]
        for report in reports.values():
            details += [f"instance {report.btid} logged: {line}" for line in _tail(report, _LINES_OF_A_REPORT)]
        news = [line for line in details if line not in self._said]
        if self._has_told:
            first = [". ".join([f"Still waiting, for {waited_s:.0f} s", *states])]
        else:
            first = [f"Waiting for a message for {waited_s:.0f} s ({self._progress} had arrived).", *states]
        self._has_told = True
        self._said.update(details)
        return "\n".join([*first, *news])

    def _how_they_ended(self, reports: dict[_Instance, InstanceReport]) -> str:
        arrived = f"{self._progress} had arrived."
        if not reports:
            return f"Their launch is over: its directory was removed. {arrived}"
        if any(report.state != "exited" for report in reports.values()):
            return f"{_name(reports).capitalize()} ended with their launcher, which was killed. {arrived} Launch again."
        published = sum(map(self._published, reports))
        if not any(report.exit_code for report in reports.values()):
            whose, them = ("its script", "it") if len(reports) == 1 else ("their scripts", "them")
            remedy = f", set max_items={published}" if 0 < published < self._reader.max_items else ""
            return (
                f"{_name(reports).capitalize()} came to the end of {whose} after {counted(published, 'message')}; {arrived} "
                f"Let {them} run on{remedy}, or have {them} started again: BlenderLauncher(..., restart='always')."
            )
        alike = _alike({instance: report.error for instance, report in reports.items()})
        lines = [f"{_name(instances)}: {error}" for error, instances in alike.items() if error]
        lines.append(f"{'It has' if len(reports) == 1 else 'All have'} ended; {arrived}")
        for instance, report in reports.items():
            state, after = self._state(instance, report), counted(self._published(instance), "message")
            lines.append(
                f"instance {report.btid}: {state}, after {after}. Its log: {report.kept_log or log_path(*instance)}"
            )
            if not report.error:
                lines += [f"    {line}" for line in _tail(report, _LINES_OF_AN_ERROR)]
        return "\n".join([*lines, *self._source.explain(brief=True).splitlines()])

    def _state(self, instance: _Instance, report: InstanceReport) -> str:
        """What an instance does, and when it last published."""
        state: str = report.state
        if report.state == "starting":
            state = "still starting"
        if report.state == "exited":
            state = f"exited, {describe_exit(report.exit_code or 0)}"
        if report.is_stopped():
            state = f"STOPPED (SIGSTOP, or a debugger; kill -CONT {report.pid} lets it go on)"
        if report.restarts:
            state += f", started again {counted(report.restarts, 'time')}"
        if report.state in ("running", "restarting"):
            for twin in self._twins_of(instance):
                seen = activity(SharedPlace(twin))
                silence_s = None if seen is None else seen.silence_s()
                state += f"; {twin.name}: "
                state += "no message yet" if silence_s is None else f"last message {silence_s:.1f} s ago"
        return state

    def _obstacles(self, reports: dict[_Instance, InstanceReport]) -> list[str]:
        """For whom instances wait: those that read their sockets, these and others."""
        return [
            _whom_it_waits_for(stream, report)
            for instance, report in reports.items()
            for stream in stats_of_instance(self._twins_of(instance)[0])
            if stream.waits
        ]


def _is_swept(launch: str) -> bool:
    """Whether somebody has swept a dead launch's shared memory. Its reports may lie where that one did not look."""
    return not os.path.exists(streams_path(launch)) and not is_signed(launch)


def _whom_it_waits_for(stream: StreamStats, report: InstanceReport) -> str:
    alive = [consumer for consumer in stream.consumers if consumer.alive]
    readers = list(
        dict.fromkeys(_who(consumer, report) for consumer in alive if consumer.remote or consumer.pid != report.pid)
    )
    text = f"Instance {stream.btid} waits for room on its socket {stream.name!r}: "
    waiting = f"{counted(stream.ready, 'message')} {'waits' if stream.ready == 1 else 'wait'} there"
    if stream.ready and not readers:
        return f"{text}{waiting}, and nobody reads that socket. Read it, too, or do not publish on it."
    if stream.ready:
        return f"{text}{waiting} for {' and '.join(readers)}."
    holders = [f"{consumer.leased} by {_who(consumer, report)}" for consumer in stream.consumers if consumer.leased]
    return f"{text}all {counted(stream.slots, 'slot')} are in use: {', '.join(holders)}."


def _who(consumer: ConsumerStats, report: InstanceReport) -> str:
    if consumer.remote:
        return counted(consumer.remote, "reader") + " over TCP"
    states = {"T": ", which is stopped", "t": ", which a debugger has stopped", "D": ", which waits for a disk"}
    who = "its own forwarder" if consumer.pid == report.pid else f"process {consumer.pid}"
    return f"{who}{states.get(state_of(consumer.pid), '')}"


def _tail(report: InstanceReport, lines: int) -> list[str]:
    return [line for line in report.log_tail.splitlines() if line.strip()][-lines:]


def _alike(texts: dict[_Instance, str]) -> dict[str, list[_Instance]]:
    """The instances of which the same is to be said, by what that is."""
    alike: dict[str, list[_Instance]] = {}
    for instance, text in texts.items():
        alike.setdefault(text, []).append(instance)
    return alike


def _name(instances: Iterable[_Instance]) -> str:
    numbers = [str(btid) for _, btid in instances]
    if len(numbers) == 1:
        return f"instance {numbers[0]}"
    return f"instances {', '.join(numbers[:-1])} and {numbers[-1]}"
