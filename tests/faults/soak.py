"""A long run without faults: two producers, four consumers (one of them over TCP), and nothing that grows.

Each process looks at itself when a tenth is done and when all is. The last line on standard output is what they saw, as JSON::

    python tests/faults/soak.py --frames 1000000 --shape 32 32
    python tests/faults/soak.py --frames 50000 --shape 1080 1920
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from director import end_with_parent, free_port
from ledger import Board

from blendtorch_shm.address import Address
from blendtorch_shm.launch_directory import LaunchDirectory
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
        self.board = Board(f"{self.folder}/board")
        self.launch = LaunchDirectory.create()
        self.addresses = [
            Address(f"tcp://127.0.0.1:{free_port()}", self.launch.twin("DATA", i)) for i in range(PRODUCERS)
        ]

    def run(self) -> dict[str, Any]:
        """All of it; the report."""
        start = time.monotonic()
        producers = {self._fork(self._produce, i): f"producer {i}" for i in range(PRODUCERS)}
        consumers = {
            self._fork(self._consume, i, i >= LOCAL): f"consumer {i}{' (TCP)' if i >= LOCAL else ''}"
            for i in range(LOCAL + REMOTE)
        }
        failed = [who for pid, who in producers.items() if os.waitpid(pid, 0)[1]]
        self.board.order("consumer")
        failed += [who for pid, who in consumers.items() if os.waitpid(pid, 0)[1]]
        seconds = time.monotonic() - start
        seen = sum(np.load(file).astype(int) for file in Path(self.folder).glob("seen-*.npy"))
        names = [*producers.values(), *consumers.values()]
        report = {
            "frames": self.each * PRODUCERS,
            "seconds": seconds,
            "failed": failed,
            "lost": int((seen == 0).sum()),
            "repeated": int((seen > 1).sum()),
            "samples": {who: json.loads(Path(self.folder, who).read_text()) for who in names if who not in failed},
        }
        self.launch.remove()
        shutil.rmtree(self.folder)
        return report

    def _fork(self, play: Any, *arguments: Any) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            end_with_parent()
            play(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)

    def _note(self, who: str, samples: list[Sample]) -> None:
        Path(self.folder, who).write_text(json.dumps([asdict(sample) for sample in samples]))

    def _produce(self, number: int) -> None:
        sink = open_sink(self.addresses[number])
        samples = []
        image = np.zeros(self.shape, np.uint32)
        for i in range(self.each):
            image[0, 0] = image[-1, -1] = i
            sink.publish({"image": image, "who": (number, i)})
            if i == self.each // 10 or i == self.each - 1:
                samples.append(Sample.now())
        sink.close()
        self._note(f"producer {number}", samples)

    def _consume(self, number: int, remote: bool) -> None:
        source = open_source([Address(str(a)) if remote else a for a in self.addresses], queue_size=4)
        seen = np.ones((PRODUCERS, self.each), np.uint8)
        seen[...] = 0
        samples: list[Sample] = []
        while True:
            over = self.board.is_over("consumer")
            message = source.receive(0.1)
            if message is None:
                if over:
                    break
                continue
            producer, i = message.fields["who"]
            image = message.fields["image"]
            if message.sequence != i or image.shape != self.shape or image[0, 0] != i or image[-1, -1] != i:
                raise ValueError(f"message {message.sequence} of producer {producer} is not what was published")
            del image, message
            seen[producer, i] += 1
            if not samples and i >= self.each // 10:
                samples.append(Sample.now())
        samples.append(Sample.now())
        source.close()
        np.save(f"{self.folder}/seen-{number}.npy", seen)
        self._note(f"consumer {number}{' (TCP)' if remote else ''}", samples)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--shape", type=int, nargs=2, required=True)
    arguments = parser.parse_args()
    print(json.dumps(Soak(arguments.frames, tuple(arguments.shape)).run()))


if __name__ == "__main__":
    sys.exit(main())
