"""What recording costs a stream, and what replaying costs against pickles, in one run."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torch_side import FileDataset, FileRecorder, RemoteIterableDataset

from .conftest import Row
from .receivers import ENDLESS, Shape, launch, name
from .test_batches import SHAPES
from .test_frames import MIDDLE, unless

# -- a stream with and without recording ------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [False, True], ids=["stream", "recorded"])
@pytest.mark.parametrize("pace", [unless(pace, None) for pace in (100, 200, None)])
def test_stream(row: Row, tmp_path: Path, pace: int | None, recorded: bool) -> None:
    """One producer, one consumer, no workers. The trainer's CPU time is that of the process which records."""
    x = "as fast as it goes" if pace is None else f"{pace} frames/s"
    row.named("recording", x, "recorded" if recorded else "stream")
    with launch("ring", MIDDLE, interval_s=1 / pace if pace else 0.0) as launcher:
        messages = iter(
            RemoteIterableDataset(
                launcher.launch_info.addresses["DATA"],
                max_items=ENDLESS,
                record_path_prefix=tmp_path / "a" if recorded else None,
            )
        )
        row.time_messages(messages.__next__, math.prod(MIDDLE), seconds=0.3 if pace else 0.1)
        messages.close()  # type: ignore[attr-defined]
    for path in tmp_path.glob("*.tar"):
        path.unlink()  # pytest would keep it


# -- replaying against pickles ----------------------------------------------------------------------------------


def items(shape: Shape, count: int) -> Iterator[dict[str, Any]]:
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


@pytest.mark.parametrize("kept", [Pickles, recording], ids=["pickles", "recording"])
@pytest.mark.parametrize("use", ["replay", "replay, all bytes read"])
@pytest.mark.parametrize("shape", [unless(shape, MIDDLE, name(shape)) for shape in SHAPES])
def test_replay(
    row: Row,
    tmp_path: Path,
    shape: Shape,
    use: str,
    kept: Callable[[Path, Iterator[dict[str, Any]]], Any],
) -> None:
    """In random order, from a file that the system has in memory."""
    row.named(use, name(shape), kept.__name__.lower())
    count = 50 if row.short else min(1000, 200_000_000 // math.prod(shape))
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

    row.time_messages(receive, math.prod(shape))
    for path in tmp_path.iterdir():
        path.unlink()


@pytest.mark.parametrize("how", ["with its index", "without"])
def test_open_ten_thousand_items(row: Row, tmp_path: Path, how: str) -> None:
    row.named("opening a recording", "10 000 items", how)
    path = tmp_path / "a_00.tar"
    recorder = FileRecorder(path)
    with recorder:
        for item in items((16, 16, 3), 10_000):
            recorder.save(item)
    if how == "without":
        with open(path, "r+b") as file:
            file.truncate(path.read_bytes().rindex(b"__index__"))
    dataset = row.benchmark.pedantic(lambda: FileDataset(tmp_path / "a"), rounds=5)
    if row.benchmark.stats is not None:
        row.note(ms=row.benchmark.stats.stats.median * 1e3)
    assert len(dataset) == 10_000
