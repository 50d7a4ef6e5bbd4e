"""Members of streams that tests need as processes or threads of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import zmq

from blendtorch_shm.memory.ring import Ring
from blendtorch_shm.message.token import unpack
from blendtorch_shm.stream import merge
from blendtorch_shm.stream.control import Control
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import Place, SharedPlace
from blendtorch_shm.stream.producer import Producer

PATIENCE_S = 100.0
"""How long a test waits for what must come; no test is about how long it takes."""
NEVER_S = 600.0
"""As long as no test lasts."""


def wait_until(condition: Callable[[], object]) -> None:
    """Return when `condition` holds."""
    while not condition():
        time.sleep(0.001)


def when(condition: Callable[[], object], action: Callable[[], object]) -> Thread:
    """A thread that waits for `condition`, then does `action`."""

    def run() -> None:
        wait_until(condition)
        action()

    thread = Thread(target=run)
    thread.start()
    return thread


def asleep(place: Place) -> dict[int, int]:
    """The consumers of a stream that sleep, and since when; {} if there is none."""
    return inspect(place).asleep


class Heard(NamedTuple):
    """A message at an inbox; what one ``recv`` returned."""

    data: bytes
    more: bool


class Claim(NamedTuple):
    """A slot that was claimed."""

    key: int
    ring: int
    slot: int
    sequence: int


class Result(NamedTuple):
    """What a consumer received, as it was told to."""

    fields: list[dict[str, Any]]
    """Of each message; in place of an array, its smallest and largest element. No message is held."""
    heard: list[Heard | Claim]
    """What was heard and claimed since the last result, in this order."""


class ConsumerProcess:
    """A process that consumes streams, as it is told to.

    Args:
        places: of the streams, which exist already.
        idle_s: after how long a sleeper that hears nothing looks by itself.
        holds: whether it keeps what it receives.

    Attributes:
        pid: of the process.
        index: its number among the first stream's consumers.
    """

    def __init__(self, *places: SharedPlace, idle_s: float = NEVER_S, holds: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._place = places[0]
        theirs, self._commands = context.Pipe(duplex=False)  # pipes, not sockets: tests look at the sockets
        self._answers, answers = context.Pipe(duplex=False)
        known = set(inspect(places[0]).consumers)
        self.process = context.Process(target=_consume, args=(places, idle_s, holds, theirs, answers))
        self.process.start()
        self.pid: int = self.process.pid or 0
        theirs.close()
        answers.close()
        self._hear()
        (self.index,) = set(inspect(places[0]).consumers) - known

    def begin(self, count: int = 1) -> None:
        """Let it receive so many messages, one after the other."""
        self._commands.send(count)

    def result(self) -> Result:
        """What it received. Waits for it."""
        found: Result = self._hear()
        return found

    def has_result(self) -> bool:
        """Whether :meth:`result` would return at once."""
        return self._answers.poll()

    def sleeps(self) -> bool:
        """Whether it has said so, and since then waits in a call of the system (it waits in no other than that for its inbox)."""
        return self.index in asleep(self._place) and state_of(self.pid) in "ST"

    def wait_until_asleep(self) -> None:
        """Return when it sleeps at its inbox."""
        wait_until(self.sleeps)

    def stop(self) -> None:
        """Stop it, as Ctrl-Z does."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: state_of(self.pid) == "T")

    def go_on(self) -> None:
        """Let it run again."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill it, and bury it."""
        self.process.kill()
        self.process.join()

    def end(self) -> None:
        """Let it close its source and end."""
        self._commands.send(0)
        self.process.join(PATIENCE_S)
        assert self.process.exitcode == 0

    def _hear(self) -> Any:
        assert self._answers.poll(PATIENCE_S), "the consumer says nothing"
        return self._answers.recv()


class ProducerProcess:
    """A process that publishes to a stream, as it is told to.

    Attributes:
        pid: of the process.
    """

    def __init__(self, place: SharedPlace) -> None:
        context = multiprocessing.get_context("spawn")
        theirs, self._commands = context.Pipe(duplex=False)
        answers, theirs_too = context.Pipe(duplex=False)
        self.process = context.Process(target=_produce, args=(place, theirs, theirs_too))
        self.process.start()
        self.pid: int = self.process.pid or 0
        assert answers.poll(PATIENCE_S), "the producer says nothing"
        answers.recv()
        for end in (theirs, theirs_too, answers):
            end.close()

    def begin(self, count: int, shape: tuple[int, ...], pattern: bytes) -> None:
        """Let it publish so many frames of this shape, filled with a pattern; every other one when a consumer sleeps."""
        self._commands.send((count, shape, pattern))

    def end(self) -> None:
        """Let it close its sink and end."""
        self._commands.send(None)
        self.process.join(PATIENCE_S)
        assert self.process.exitcode == 0


def _produce(place: SharedPlace, commands: Any, answers: Any) -> None:
    with Producer(place, trusted=True) as sink:
        answers.send("ready")
        while command := commands.recv():
            count, shape, pattern = command
            image = np.resize(np.frombuffer(pattern, np.uint8), shape)
            for i in range(count):
                if i % 2:
                    wait_until(lambda: asleep(place))
                sink.publish({"i": i, "image": image})


def state_of(pid: int) -> str:
    """The state of a process's first thread, as ``/proc`` says: R, S, T, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _consume(places: Sequence[SharedPlace], idle_s: float, holds: bool, commands: Any, answers: Any) -> None:
    merge.IDLE_S = idle_s
    held = []
    record: list[Heard | Claim] = []
    _record_numbers(record)
    _record_claims(record, places)
    with Source(places) as source:
        answers.send("ready")
        while count := commands.recv():
            fields = []
            for _ in range(count):
                message = source.receive(NEVER_S)
                assert message is not None
                if holds:
                    held.append(message)
                fields.append({name: _plain(value) for name, value in message.fields.items()})
                del message
            answers.send(Result(fields, list(record)))
            record.clear()


def _plain(value: Any) -> Any:
    return (int(value.min()), int(value.max())) if isinstance(value, np.ndarray) else value


def _record_numbers(record: list[Heard | Claim]) -> None:
    receive = zmq.Socket.recv

    def recv(socket: zmq.Socket[bytes], *args: Any, **kwargs: Any) -> Any:
        data = receive(socket, *args, **kwargs)
        record.append(Heard(data, socket.rcvmore))
        return data

    zmq.Socket.recv = recv  # type: ignore[assignment,method-assign]


def _record_claims(record: list[Heard | Claim], places: Iterable[Place]) -> None:
    keys = {place.name: Control.attach(place).key for place in places}
    claim = Ring.claim

    def recorded(ring: Ring, slot: int, owner: int) -> bool:
        claimed = claim(ring, slot, owner)
        if claimed:
            stream = ring.segment.name.rpartition(".")[0]
            record.append(Claim(keys[stream], ring.number, slot, ring.sequence[slot]))
        return claimed

    Ring.claim = recorded  # type: ignore[assignment,method-assign]


def numbers(result: Result) -> list[Claim]:
    """The slot numbers among what was heard."""
    tokens = [unpack(heard.data) for heard in result.heard if isinstance(heard, Heard) and not heard.more]
    return [Claim(*token) for token in tokens if token is not None]


def claims(result: Result) -> list[Claim]:
    """What was claimed."""
    return [entry for entry in result.heard if isinstance(entry, Claim)]
