"""What recording costs a stream, and what replaying costs against pickles, in one run."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torch_side import BlenderLauncher, FileDataset, FileRecorder, RemoteIterableDataset

from .conftest import Stream

FOLDER = Path(__file__).parent
SHAPES = [(64, 64, 3), (480, 640, 3), (1080, 1920, 4)]


def name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# -- a stream with and without recording ------------------------------------------------------------------------


@pytest.mark.parametrize("pace", ["100", "200", "as fast as it goes"])
@pytest.mark.parametrize("recorded", [False, True], ids=["stream", "recorded"])
def test_stream(stream: Stream, tmp_path: Path, pace: str, recorded: bool) -> None:
    """One producer, one consumer, no workers. The CPU time is that of the consumer, which records."""
    shape = (480, 640, 3)
    stream.benchmark.group = f"{name(shape)} at {pace}"
    if pace.isdigit():
        script, arguments = FOLDER / "paced.py", [pace, *map(str, shape)]
    else:
        script, arguments = FOLDER / "producer.py", ["ring", *map(str, shape)]
    with BlenderLauncher(
        "", script, 1, ["DATA"], instance_args=[arguments], blender="python", progress=False
    ) as launcher:
        messages = iter(
            RemoteIterableDataset(
                launcher.launch_info.addresses["DATA"],
                max_items=10**9,
                record_path_prefix=tmp_path / "a" if recorded else None,
            )
        )
        stream.measure(messages.__next__, math.prod(shape), seconds=0.3 if pace.isdigit() else 0.1)
        messages.close()  # type: ignore[attr-defined]
    for path in tmp_path.glob("*.tar"):
        path.unlink()  # pytest would keep it


# -- replaying against pickles ----------------------------------------------------------------------------------


def items(shape: tuple[int, ...], count: int) -> Iterator[dict[str, Any]]:
    images = np.random.default_rng(0).integers(0, 255, (4, *shape), np.uint8)
    for i in range(count):
        yield {"btid": 0, "image": images[i % 4], "xy": np.full((8, 2), float(i)), "frameid": i}


class Pickles:
    """A file of pickles and where each begins, as blendtorch 0.4 keeps recordings."""

    def __init__(self, path: Path, recorded: Iterator[dict[str, Any]]) -> None:
        self._offsets = []
        with open(path, "wb") as file:
            for item in recorded:
                self._offsets.append(file.tell())
                pickle.dump(item, file)
        self._file = open(path, "rb")  # noqa: SIM115

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Any:
        self._file.seek(self._offsets[index])
        return pickle.load(self._file)


def recording(path: Path, recorded: Iterator[dict[str, Any]]) -> FileDataset:
    with FileRecorder(FileRecorder.filename(path, 0)) as recorder:
        for item in recorded:
            recorder.save(item)
    return FileDataset(path, output="numpy")


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("use", ["replay", "replay, all bytes read"])
@pytest.mark.parametrize("kept", [Pickles, recording], ids=["pickles", "recording"])
def test_replay(
    stream: Stream,
    tmp_path: Path,
    shape: tuple[int, ...],
    use: str,
    kept: Callable[[Path, Iterator[dict[str, Any]]], Any],
) -> None:
    """In random order, from a file that the system has in memory."""
    stream.benchmark.group = f"{name(shape)} {use}"
    count = 50 if stream.short else min(1000, 200_000_000 // math.prod(shape))
    dataset = kept(tmp_path / "a", items(shape, count))
    order = np.random.default_rng(0).permutation(count).tolist()

    replayed = 0

    def receive() -> dict[str, Any]:
        nonlocal replayed
        index = order[replayed % count]
        item = dataset[index]
        if item["frameid"] != index:
            raise AssertionError(f"item {item['frameid']} instead of {index}")
        if use != "replay":
            item["image"].reshape(-1).view(np.uint64).sum()  # as little as possible with each byte
        replayed += 1
        return {"frameid": replayed}

    stream.measure(receive, math.prod(shape))
    for path in tmp_path.iterdir():
        path.unlink()


@pytest.mark.parametrize("how", ["with its index", "without"])
def test_open_ten_thousand_items(benchmark: Any, tmp_path: Path, how: str) -> None:
    benchmark.group = "open a file of 10 000 items"
    path = tmp_path / "a_00.tar"
    recorder = FileRecorder(path)
    with recorder:
        for item in items((16, 16, 3), 10_000):
            recorder.save(item)
    if how == "without":
        with open(path, "r+b") as file:
            file.truncate(path.read_bytes().rindex(b"__index__"))
    dataset = benchmark.pedantic(lambda: FileDataset(tmp_path / "a"), rounds=5)
    assert len(dataset) == 10_000
