"""A long run without faults: two producers, four consumers (one of them over TCP), and nothing that grows.

Each process looks at itself when a tenth is done and when all is. Both times the producers pause until everything has been
taken and all are connected to all, so that whoever holds more the second time has kept it. The last line on standard
output is what they saw, as JSON::

    python tests/faults/soak.py --frames 1000000 --shape 32 32
    python tests/faults/soak.py --frames 50000 --shape 1080 1920
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from director import end_with_parent, free_port

from blendtorch_shm.launch.address import Address
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.stream.stats import stats
from blendtorch_shm.transport import open_sink, open_source

PRODUCERS, LOCAL, REMOTE = 2, 3, 1


@dataclass
class Sample:
    """What a process holds.

    Args:
        resident: memory, in bytes, with what it shares.
        private: memory, in bytes, without.
        files: open descriptors.
        mappings: of memory.
    """

    resident: int
    private: int
    files: int
    mappings: int

    @classmethod
    def now(cls) -> Sample:
        """Of this process, not counting what looking takes."""
        cls._look()
        return cls._look()

    @classmethod
    def _look(cls) -> Sample:
        gc.collect()
        process = psutil.Process()
        memory = process.memory_info()
        return cls(memory.rss, memory.rss - memory.shared, process.num_fds(), len(process.memory_maps(grouped=False)))


class Soak:
    """One run.

    Args:
        frames: of all producers together.
        shape: (H, W) of the frames, whose pixels have 4 bytes.
    """

    def __init__(self, frames: int, shape: tuple[int, int]) -> None:
        self.each = frames // PRODUCERS
        self.shape = shape
        self.folder = tempfile.mkdtemp(prefix="bt-soak-")
        self.launch = LaunchDirectory().create()
        self.twins = [self.launch.twin("DATA", i) for i in range(PRODUCERS)]
        self.ports = [free_port() for _ in range(PRODUCERS)]
        self.addresses = [
            Address(f"tcp://127.0.0.1:{port}", twin) for port, twin in zip(self.ports, self.twins, strict=True)
        ]
        self.processes: dict[int, str] = {}  # by pid
        # How often all have been asked to look at themselves, and how often each has done so.
        self.page = mmap.mmap(-1, 1 + PRODUCERS + LOCAL + REMOTE)

    def run(self) -> dict[str, Any]:
        """All of it; the report.

        Raises:
            RuntimeError: a process failed.
        """
        start = time.monotonic()
        try:
            for i in range(PRODUCERS):
                self._fork(f"producer {i}", self._produce)
            for i in range(LOCAL + REMOTE):
                self._fork(f"consumer {i}{' (TCP)' if i >= LOCAL else ''}", self._consume, i >= LOCAL)
            names = list(self.processes.values())
            for published in (self.each // 10, self.each):
                while not self._is_quiet(published):
                    self._bury(os.WNOHANG)
                    time.sleep(0.05)
                self.page[0] += 1
            while self.processes:
                self._bury()
            seen = sum(np.load(file).astype(int) for file in Path(self.folder).glob("seen-*.npy"))
            return {
                "frames": self.each * PRODUCERS,
                "seconds": time.monotonic() - start,
                "lost": int((seen == 0).sum()),
                "repeated": int((seen > 1).sum()),
                "samples": {who: json.loads(Path(self.folder, who).read_text()) for who in names},
            }
        finally:
            self.launch.remove()
            shutil.rmtree(self.folder)

    def _is_quiet(self, published: int) -> bool:
        """Whether so many messages of each producer were published, all were taken, and all are connected to all."""
        members = LOCAL + 1  # the producer is one, for those that do not share its memory
        if not all(
            (stream.published, stream.ready, stream.leased) == (published, 0, 0)
            and sum(consumer.alive for consumer in stream.consumers) == members
            for stream in stats(self.addresses)
        ):
            return False
        connections = psutil.net_connections("tcp")
        for port in self.ports:
            remote = sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in connections)
            if remote != REMOTE:
                return False
        return True

    def _bury(self, options: int = 0) -> None:
        """Wait for the end of a process. The others end with this one when it failed."""
        pid, status = os.waitpid(-1, options)
        if pid:
            who = self.processes.pop(pid)
            if status:
                raise RuntimeError(f"{who} ended with status {status}")

    def _fork(self, who: str, play: Callable[..., list[Sample]], *arguments: Any) -> None:
        number = len(self.processes)
        pid = os.fork()
        if pid:
            self.processes[pid] = who
            return
        code = 1
        try:
            end_with_parent()
            samples = play(number, *arguments)
            Path(self.folder, who).write_text(json.dumps([asdict(sample) for sample in samples]))
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)

    def _look(self, number: int) -> Sample:
        """At this process; then wait until each has looked at itself."""
        sample = Sample.now()
        self.page[1 + number] += 1
        while min(self.page[1:]) < self.page[1 + number]:
            time.sleep(0.005)
        return sample

    def _produce(self, number: int) -> list[Sample]:
        sink = open_sink(self.addresses[number])
        samples: list[Sample] = []
        image = np.zeros(self.shape, np.uint32)
        for i in range(self.each):
            image[0, 0] = image[-1, -1] = i
            sink.publish({"image": image, "who": (number, i)})
            if i + 1 in (self.each // 10, self.each):
                while self.page[0] == len(samples):
                    time.sleep(0.005)
                samples.append(self._look(number))
        sink.close()
        return samples

    def _consume(self, number: int, remote: bool) -> list[Sample]:
        source = open_source([Address(str(a)) if remote else a for a in self.addresses], queue_size=4)
        seen = np.ones((PRODUCERS, self.each), np.uint8)
        seen[...] = 0
        samples: list[Sample] = []
        while len(samples) < 2:
            message = source.receive(0.1)
            if message is None:
                if self.page[0] > len(samples):
                    samples.append(self._look(number))
                continue
            producer, i = message.fields["who"]
            image = message.fields["image"]
            if message.sequence != i or image.shape != self.shape or image[0, 0] != i or image[-1, -1] != i:
                raise ValueError(f"message {message.sequence} of producer {producer} is not what was published")
            del image, message
            seen[producer, i] += 1
        source.close()
        np.save(f"{self.folder}/seen-{number}.npy", seen)
        return samples


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--shape", type=int, nargs=2, required=True)
    arguments = parser.parse_args()
    print(json.dumps(Soak(arguments.frames, tuple(arguments.shape)).run()))


if __name__ == "__main__":
    sys.exit(main())
