"""What may not have happened in a round: something lost, something twice to the living, something broken, something left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy.typing as npt
from ledger import What


@dataclass
class Life:
    """One process of the round, as the director knows it.

    Args:
        actor: its number.
        role: "producer", "consumer", "remote" or "drainer".
        stream: which it published to, if it is a producer.
        killed: whether it was, by whomever.
    """

    actor: int
    role: str
    stream: int
    killed: bool = False


def judge(
    records: npt.NDArray[Any], lives: Mapping[int, Life], drained: list[dict[str, Any]], *, queue_size: int, alone: bool
) -> tuple[dict[str, int], list[str]]:
    """Figures, and what is wrong.

    Args:
        records: the ledger.
        lives: by number, all processes of the round.
        drained: what the drainer said about each stream.
        queue_size: messages that may be on their way to a remote consumer.
        alone: whether there never was a second consumer, so that messages had to arrive in order.
    """
    wrong: list[str] = []
    rows = records.tolist()
    taken: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # message -> [(row, actor)]
    read: dict[tuple[int, int], tuple[int, int]] = {}  # message -> (producer, number)
    announced: set[tuple[int, int]] = set()
    begun: dict[tuple[int, int], int] = {}  # (producer, number) -> row
    dropped: set[tuple[int, int, int]] = set()
    takes: dict[tuple[int, int], list[int]] = defaultdict(list)  # (actor, stream) -> sequence numbers, in order
    deaths: dict[int, int] = {}  # producers' -> row
    forked = 0
    for row, (what, actor, stream, sequence, producer, number) in enumerate(rows):
        if what == What.WILL_PUBLISH:
            begun[actor, number] = row
        elif what == What.PUBLISHED:
            announced.add((actor, number))
        elif what == What.TAKEN:
            taken[stream, sequence].append((row, actor))
            takes[actor, stream].append(sequence)
        elif what == What.READ:
            if read.setdefault((stream, sequence), (producer, number)) != (producer, number):
                wrong.append(f"message {sequence} of stream {stream} had two contents")
        elif what == What.DROPPED:
            dropped.add((actor, stream, sequence))
        elif what == What.BROKEN:
            wrong.append(f"consumer {actor} found message {sequence} of stream {stream} broken")
        elif what == What.FORKED:
            forked += 1
        elif what == What.MISUSED:
            wrong.append(f"a forked child of {lives[actor].role} {actor} could use what is its parent's, or failed")
        elif what == What.DIED and lives[actor].role == "producer":
            deaths[actor] = row

    # A remote consumer says that it has a message before it writes that down: killed in between, it takes one along.
    taken_along = sum(life.killed and life.role == "remote" for life in lives.values())
    gone = 0
    for stream, state in enumerate(drained):
        sequences = {sequence for of, sequence in taken if of == stream}
        lost = sorted(set(range(state["published"])) - sequences)
        invented = sorted(sequences - set(range(state["published"])))
        gone += len(lost)
        if gone > taken_along:
            wrong.append(f"stream {stream} lost {len(lost)}: {lost[:20]} of {state['published']}")
        if invented:
            wrong.append(f"stream {stream} delivered {invented[:10]}, and published only {state['published']}")
        for what in ("not free", "held locks", "surplus segments"):
            if state[what]:
                wrong.append(f"stream {stream}: {what}: {state[what]}")

    contents = set(read.values())
    if len(contents) != len(read):
        wrong.append(f"{len(read) - len(contents)} messages arrived under two sequence numbers")
    unread = sorted(announced - contents)
    # A remote consumer that is killed between taking and reading leaves only the sequence number behind.
    if len(unread) > gone + sum(key not in read for key in taken):
        wrong.append(f"published and never read, (producer, number): {unread[:10]}")
    if contents - begun.keys():
        wrong.append(f"read and never published: {sorted(contents - begun.keys())[:10]}")
    by_producer: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for (_, sequence), (producer, number) in read.items():
        by_producer[producer].append((sequence, number))
    for producer, numbers in by_producer.items():
        ordered = [number for _, number in sorted(numbers)]
        if ordered != sorted(ordered):
            wrong.append(f"the sequence numbers of producer {producer} are not in its order")

    figures = {
        "messages": len(taken),
        "forked children": forked,
        "taken along by a killed remote": gone,
        "again after a killed consumer": 0,
        "again after a killed producer": 0,
    }
    for (stream, sequence), entries in taken.items():
        by_tcp = any(lives[actor].role == "remote" for _, actor in entries)
        published = begun.get(read.get((stream, sequence), (0, 0)), 0)
        for row, actor in entries[:-1]:
            life = lives[actor]
            if life.role == "remote":
                held = sequence in takes[actor, stream][-queue_size:]
            else:
                held = (actor, stream, sequence) not in dropped
            if life.killed and held:
                figures["again after a killed consumer"] += 1
            elif by_tcp and _producer_died_since(published, stream, lives, deaths):
                # A remote consumer has it, from a producer that did not live to hear that.
                figures["again after a killed producer"] += 1
            else:
                wrong.append(
                    f"{life.role} {actor} ({'killed' if life.killed else 'living'}) had message {sequence} of stream {stream} "
                    f"(row {row}), and it came again: {entries}"
                )
    if alone:
        figures["late after a killed consumer"] = 0
        for stream in range(len(drained)):
            figures["late after a killed consumer"] += _check_order(stream, takes, lives, wrong)
    return figures, wrong


def judge_removed(
    records: npt.NDArray[Any], lives: Mapping[int, Life], drained: list[dict[str, Any]]
) -> tuple[dict[str, int], list[str]]:
    """As :func:`judge`, where files of the streams were removed, and no consumer was remote.

    Streams begin anew then, with sequence numbers from 0, so messages are known by their contents here. What an earlier stream
    had may be lost; what was published by producers that began after the last removal may not.
    """
    wrong: list[str] = []
    # (producer, number) -> [(actor, its which)]
    takes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    count: dict[int, int] = defaultdict(int)  # actor -> messages read
    dropped: dict[int, int] = defaultdict(int)  # actor -> messages, the first ones that it read
    begun: set[tuple[int, int]] = set()
    announced: set[tuple[int, int]] = set()
    last = removals = forked = 0
    for what, actor, stream, sequence, producer, number in records.tolist():
        if what == What.WILL_PUBLISH:
            begun.add((actor, number))
        elif what == What.PUBLISHED:
            announced.add((actor, number))
        elif what == What.READ:
            takes[producer, number].append((actor, count[actor]))
            count[actor] += 1
        elif what == What.DROPPED:
            dropped[actor] += 1
        elif what == What.BROKEN:
            wrong.append(f"consumer {actor} found message {sequence} of stream {stream} broken")
        elif what == What.FORKED:
            forked += 1
        elif what == What.MISUSED:
            wrong.append(f"a forked child of {lives[actor].role} {actor} could use what is its parent's, or failed")
        elif what == What.REMOVED:
            last, removals = number, removals + 1
    again = 0
    for message, entries in takes.items():
        for actor, which in entries[:-1]:
            if lives[actor].killed and which >= dropped[actor]:
                again += 1
            else:
                wrong.append(f"{lives[actor].role} {actor} had message {message}, and it came again: {entries}")
    if takes.keys() - begun:
        wrong.append(f"read and never published: {sorted(takes.keys() - begun)[:10]}")
    unread = announced - takes.keys()
    if lost := sorted(message for message in unread if message[0] > last):
        wrong.append(f"published after the last removal and never read, (producer, number): {lost[:10]}")
    for stream, state in enumerate(drained):
        wrong += [f"stream {stream}: {what}: {state[what]}" for what in ("not free", "held locks") if state[what]]
    figures = {
        "removals": removals,
        "messages where files are removed": len(takes),
        "lost with an earlier stream": len(unread),
        "forked children": forked,
        "again after a killed consumer": again,
    }
    return figures, wrong


def _producer_died_since(row: int, stream: int, lives: Mapping[int, Life], deaths: Mapping[int, int]) -> bool:
    return any(died > row and lives[actor].stream == stream and lives[actor].killed for actor, died in deaths.items())


def _check_order(
    stream: int, takes: Mapping[tuple[int, int], list[int]], lives: Mapping[int, Life], wrong: list[str]
) -> int:
    """Where there is one consumer at a time, only what an earlier one had when it was killed may be late; how often it was.

    Each killed one may have had one message that it could not write down any more.
    """
    late = 0
    highest, killed = -1, 0
    for actor, of in sorted(takes):
        if of != stream:
            continue
        mine = takes[actor, of]
        new = [sequence for sequence in mine if sequence > highest + killed]
        if new != sorted(new):
            wrong.append(f"consumer {actor} was alone, and got {mine[:20]}... of stream {stream}, after {highest}")
        late += sum(before > after for before, after in pairwise(mine))
        highest = max(highest, *mine)
        killed = sum(life.killed and life.role == "consumer" and life.actor <= actor for life in lives.values())
    return late
