"""Recording a stream while it goes on, and replaying it, whole or cut off at any byte."""

import contextlib
import gc
import io
import json
import logging
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis.extra import numpy as npst
from torch.utils import data

import torch_side.recordings.archive
import torch_side.recordings.reader
import torch_side.recordings.recorder
from blendtorch_shm.errors import ConfigurationError, RecordingError, RecordingNotFound
from torch_side import (
    FileDataset,
    FileReader,
    FileRecorder,
    RemoteIterableDataset,
    SingleFileDataset,
    verify_recording,
)
from torch_side.recordings.recorder import WorkerRecorder

from ..interruption import everywhere
from .conftest import Missing, killed_worker, launch


def item_number(i: int, shape: tuple[int, ...] = (10, 12, 3)) -> dict[str, Any]:
    return {"btid": 0, "image": np.full(shape, i % 256, np.uint8), "xy": np.full((8, 2), float(i)), "frameid": i}


def check(item: dict[str, Any], i: int) -> None:
    assert item["frameid"] == i
    assert (np.asarray(item["image"]) == i % 256).all()
    assert (np.asarray(item["xy"]) == i).all()


def record(path: Path, count: int, shape: tuple[int, ...] = (10, 12, 3), start: int = 0) -> None:
    with FileRecorder(path) as recorder:
        for i in range(start, start + count):
            recorder.save(item_number(i, shape))


def same(a: Any, b: Any) -> bool:
    """Equal in value and type, at every depth; NaN equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and np.ascontiguousarray(a).tobytes() == b.tobytes()
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, key_) and same(v, w) for (k, v), (key_, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


# -- items ------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["$array", "$x", "a.b", "json"]
)
numbers = st.integers() | st.floats() | st.booleans() | st.none()
arrays = npst.arrays(
    npst.scalar_dtypes(),
    npst.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=40),
)
scalars = st.sampled_from(
    [
        np.float32(0.1),
        np.float64("nan"),
        np.int8(-3),
        np.bool_(True),
        np.complex64(1j),
        np.datetime64("2020-01-01T00", "s"),
    ]
)
hashable = texts | numbers | scalars.filter(lambda s: s == s)
values = st.recursive(
    texts | numbers | st.binary(max_size=5000) | scalars | arrays,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(texts, inner, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(item=st.dictionaries(texts, values, max_size=5))
def test_what_is_read_is_what_was_saved(tmp_path: Path, item: dict[str, Any]) -> None:
    path = tmp_path / "a_00.tar"
    path.unlink(missing_ok=True)
    with FileRecorder(path) as recorder:
        recorder.save(item)
        recorder.save(item)
    with FileReader(path) as reader:
        assert len(reader) == 2
        assert same(item, reader[0])
        assert same(item, reader[-1])


@pytest.mark.parametrize("nbytes", [10, 3000, 100_000])
def test_every_kind_of_array_arrives_aligned_and_writable(tmp_path: Path, nbytes: int) -> None:
    dtype = np.dtype([("größe", "<f4"), ("p", [("s", "S3"), ("t", "<M8[us]")], (2,))])
    item = {
        "odd": np.zeros(nbytes + 1, np.uint8),
        "wide": np.arange(nbytes // 8 + 1, dtype=np.float64),
        "fortran": np.asfortranarray(np.arange(nbytes, dtype=np.int16).reshape(2, -1)),
        "backwards": np.arange(nbytes)[::-1],
        "swapped": np.arange(nbytes, dtype=">i4"),
        "records": np.zeros(nbytes // dtype.itemsize + 1, dtype),
        "times": np.arange(nbytes).astype("M8[s]"),
        "texts": np.array(["ä", "bc"] * (nbytes // 8)),
        "empty": np.zeros((0, nbytes)),
        "point": np.array(5.0),
        "Odd": np.ones(nbytes, np.uint8),
        "a/b": np.ones(nbytes),
    }
    with FileRecorder(tmp_path / "a_00.tar") as recorder:
        recorder.save({"btid": 1})
        recorder.save(item)
    found = FileReader(tmp_path / "a_00.tar")[1]
    assert list(found) == list(item)
    for name, array in item.items():
        assert same(array, found[name]), name
        assert found[name].flags.writeable
        assert found[name].flags.aligned
        if array.nbytes > 2048:
            assert found[name].ctypes.data % 16 == 0
        found[name][...] = array


def test_a_tensor_is_recorded_as_an_array(tmp_path: Path) -> None:
    with FileRecorder(tmp_path / "a_00.tar") as recorder:
        recorder.save({"image": torch.arange(3000.0, requires_grad=True)})
    assert same(FileReader(tmp_path / "a_00.tar")[0]["image"], np.arange(3000, dtype=np.float32))


def test_tar_numpy_and_json_read_the_file(tmp_path: Path) -> None:
    """The format is a promise to other programs."""
    item = {"btid": 2, "image": np.arange(6000).reshape(60, 100), "mesh": {"v": [np.eye(3)]}, "t": (1, float("inf"))}
    with FileRecorder(tmp_path / "a_00.tar") as recorder:
        recorder.save(item)
        recorder.save({"jpeg": bytes(3000), "raw": b"\0\1", "n": np.float32(0.5), "big": -(2**64), 3: "x"})
    with tarfile.open(tmp_path / "a_00.tar") as archive:
        content = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert list(content) == [
        "__recording__",
        "00000000.image.npy",
        "00000000.mesh.v.0.npy",
        "00000000.json",
        "00000001.jpeg.bin",
        "00000001.json",
        "__index__",
    ]
    assert json.loads(content["__recording__"])["format"] == 1
    assert same(np.load(io.BytesIO(content["00000000.image.npy"])), item["image"])
    assert same(np.load(io.BytesIO(content["00000000.mesh.v.0.npy"])), np.eye(3))
    assert json.loads(content["00000000.json"]) == {
        "btid": 2,
        "image": {"$array": "image.npy"},
        "mesh": {"v": [{"$array": "mesh.v.0.npy"}]},
        "t": {"$tuple": [1, {"$float": "inf"}]},
    }
    assert json.loads(content["00000001.json"]) == {
        "$dict": [
            ["jpeg", {"$file": "jpeg.bin"}],
            ["raw", {"$bytes": "AAE="}],
            ["n", {"$scalar": ["<f4", 0.5]}],
            ["big", {"$int": "-0x10000000000000000"}],
            [3, "x"],
        ]
    }
    assert np.load(io.BytesIO(content["__index__"])).tolist()[0] == 1024
    listed = subprocess.run(["tar", "-tf", tmp_path / "a_00.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == list(content)
    assert not listed.stderr


def test_a_member_beyond_8_gib_has_a_size_that_tar_understands() -> None:
    from torch_side.recordings.item import has_checksum, member_header, parse_header

    for nbytes in (0, 5, 2**33 - 1, 2**33, 2**40):
        block = member_header(b"00000012", "image.npy", nbytes, 1_700_000_000)
        assert parse_header(block) == ("00000012.image.npy", nbytes)
        assert has_checksum(block)
        assert not has_checksum(block[:5] + b"3" + block[6:])
        assert tarfile.TarInfo.frombuf(block, "ascii", "strict").size == nbytes


class Setting:
    """Something that only pickle can carry."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_a_pickle_is_read_only_where_it_is_allowed(tmp_path: Path) -> None:
    with FileRecorder(tmp_path / "a_00.tar") as recorder:
        recorder.save({"setting": Setting(5), "image": np.zeros(9000)})
        recorder.save({"image": np.ones(9000)})
    for source in (
        FileReader(tmp_path / "a_00.tar"),
        SingleFileDataset(tmp_path / "a_00.tar"),
        FileDataset(tmp_path / "a"),
    ):
        with pytest.raises(RecordingError, match=r"Item 0 of .*a_00.tar.*\bSetting\).*allow_pickle=True"):
            source[0]
        assert source[1]["image"][0] == 1
    assert FileReader(tmp_path / "a_00.tar", allow_pickle=True)[0]["setting"].value == 5
    assert FileDataset(tmp_path / "a", allow_pickle=True)[0]["setting"].value == 5


def test_what_cannot_be_recorded_is_refused_and_the_next_item_is_not(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with FileRecorder(tmp_path / "a_00.tar") as recorder:
        for value, why in ((loop, "64 levels"), (lambda: 0, "cannot be pickled"), ("\ud800", "surrogates")):
            with pytest.raises(RecordingError, match=why):
                recorder.save({"value": value})
        recorder.save(item_number(0))
    check(FileReader(tmp_path / "a_00.tar")[0], 0)


def test_max_messages_and_pickled_messages_as_in_blendtorch(tmp_path: Path) -> None:
    path = FileRecorder.filename(tmp_path / "a", 3)
    assert path == f"{tmp_path}/a_03.tar"
    with FileRecorder(path, max_messages=2, update_header=1) as recorder:
        for i in range(4):
            recorder.save(pickle.dumps(item_number(i)), is_pickled=True)
    assert (recorder.outpath, recorder.capacity, recorder.update_header) == (Path(path), 2, 1)
    assert recorder.num_messages == 2
    assert FileRecorder().outpath == Path("blendtorch.mpkl")
    assert len(SingleFileDataset(path).reader) == 2
    with FileReader(path) as reader:
        assert len(reader) == 2
        assert FileReader.read_offsets(path).tolist() == reader.offsets.tolist()
        assert reader.offsets[0] == 1024
        check(reader[1], 1)
        with pytest.raises(IndexError):
            reader[2]
    with pytest.raises(RecordingError, match="closed"):
        reader[0]
    with pytest.raises(RecordingError, match="not open"):
        recorder.save(item_number(0))


# -- cut off, damaged, foreign -----------------------------------------------------------------------------------


def test_a_file_cut_off_at_any_byte_replays_up_to_the_last_whole_item(tmp_path: Path) -> None:
    path = tmp_path / "a_00.tar"
    record(path, 3, (30, 50, 3))
    begins = [*FileReader.read_offsets(path).tolist(), path.read_bytes().index(b"__index__")]
    for nbytes in range(path.stat().st_size, begins[2] - 1, -1):
        os.truncate(path, nbytes)
        with FileReader(path) as reader:
            assert len(reader) == (3 if nbytes >= begins[3] else 2)
            check(reader[-1], len(reader) - 1)
    for nbytes in (begins[1], 1024, 0):
        os.truncate(path, nbytes)
        assert len(SingleFileDataset(path)) == (1 if nbytes > 1024 else 0)


def test_what_stands_behind_the_last_whole_item_is_written_over(tmp_path: Path) -> None:
    """As when a worker is killed, and its successor goes on."""
    for spoil in (0, 1, 700, 3000):
        first = FileRecorder.for_worker(str(tmp_path / "a"), f"one {spoil}", 0, 1)
        for i in range(3):
            first.save(item_number(i))
        first.close()
        path = tmp_path / "a_00.tar"
        os.truncate(path, path.stat().st_size - spoil)
        whole = len(FileReader(path))
        second = FileRecorder.for_worker(str(tmp_path / "a"), f"one {spoil}", 0, 1)
        second.save(item_number(whole))
        second.save({})
        with FileReader(path) as reader:  # while it is written
            assert len(reader) == whole + 2
        second.close()
        reader = FileReader(path)
        for i in range(whole + 1):
            check(reader[i], i)
        assert reader[-1] == {}


_WRITE_UNTIL_KILLED = """
import os, sys
import numpy as np
from torch_side.recordings.recorder import FileRecorder
with FileRecorder(sys.argv[1], max_messages=10**9) as recorder:
    i = 0
    while True:
        shape = (10 + i * 37 % 300, 100, 3)
        recorder.save({"frameid": i, "image": np.full(shape, i % 256, np.uint8), "xy": np.full((8, 2), float(i))})
        i += 1
        os.write(1, i.to_bytes(8, "little"))
"""


@pytest.mark.parametrize("after", [1, 50, 333, 1234])
def test_after_kill_9_the_items_that_were_saved_replay(tmp_path: Path, after: int) -> None:
    path = tmp_path / "a_00.tar"
    writer = subprocess.Popen([sys.executable, "-c", _WRITE_UNTIL_KILLED, path], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.read(8 * after)
    writer.kill()
    told = after + len(writer.stdout.read()) // 8
    writer.wait()
    writer.stdout.close()
    dataset = FileDataset(tmp_path / "a", output="numpy")
    assert told <= len(dataset) <= told + 1
    for i, item in enumerate(dataset):
        check(item, i)
        assert item["image"].shape == (10 + i * 37 % 300, 100, 3)


def test_damage_is_named_and_what_is_before_it_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record(tmp_path / "a_00.tar", 4)
    path = tmp_path / "a_00.tar"
    content = bytearray(path.read_bytes())
    begin = FileReader.read_offsets(path).tolist()[2]
    content[begin] ^= 1
    path.write_bytes(content[: content.index(b"__index__")])
    assert len(FileReader(path)) == 2
    assert [r.message for r in caplog.records] == [
        f"{path} is damaged at byte {begin} (its checksum is another); 2 items before that can be read."
    ]


@pytest.mark.parametrize("verify", [True, False])
@given(changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(changes=[(124, 0xC0), (125, 0x78)])  # a size that tarfile itself refuses
def test_whatever_bytes_are_damaged_what_is_raised_is_a_recording_error(
    tmp_path: Path, changes: list[tuple[int, int]], verify: bool
) -> None:
    path = tmp_path / "a_00.tar"
    path.unlink(missing_ok=True)
    with FileRecorder(path) as recorder:
        recorder.save({"image": np.zeros(3), "t": (1, {2: b"x"}), "times": [np.zeros(4, "M8[s]")], "n": np.float32(2)})
    content = bytearray(path.read_bytes())
    for at, value in changes:
        content[1024 + at if at < 4000 else -1] = value
    path.write_bytes(content)
    with contextlib.suppress(RecordingError), FileReader(path, verify=verify) as reader:
        for i in range(len(reader)):
            with contextlib.suppress(RecordingError):
                reader[i]


def test_an_index_that_does_not_fit_the_file_is_not_believed(tmp_path: Path) -> None:
    record(tmp_path / "a_00.tar", 4)
    with FileReader(tmp_path / "a_00.tar") as reader:
        cut = reader.read_offsets(tmp_path / "a_00.tar").tolist()
    content = (tmp_path / "a_00.tar").read_bytes()
    (tmp_path / "b_00.tar").write_bytes(content[: cut[1]] + content[cut[2] :])  # as `tar --delete` does
    with FileReader(tmp_path / "b_00.tar") as reader:
        assert [item["frameid"] for item in map(reader.__getitem__, range(len(reader)))] == [0, 2, 3]


def test_what_is_not_a_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="b_00.tar, nor one with another number") as caught:
        FileDataset(tmp_path / "b")
    assert isinstance(caught.value, ConfigurationError)
    with pytest.raises(RecordingNotFound, match="No such file"):
        FileReader(tmp_path / "b_00.tar")
    with tarfile.open(tmp_path / "b_00.tar", "w") as archive:
        archive.add(__file__, "test.py")
    for content in (b"x" * 5000, (tmp_path / "b_00.tar").read_bytes()):
        (tmp_path / "b_00.tar").write_bytes(content)
        with pytest.raises(RecordingError, match="not a recording"):
            FileDataset(tmp_path / "b")
    record(tmp_path / "c_00.tar", 1)
    content = (tmp_path / "c_00.tar").read_bytes()
    (tmp_path / "c_00.tar").write_bytes(content.replace(b'"format":1', b'"format":2'))
    with pytest.raises(RecordingError, match=r"format 2.*reads format 1"):
        FileReader(tmp_path / "c_00.tar")
    with pytest.raises(ConfigurationError, match="output='jax'"):
        FileDataset(tmp_path / "c", output="jax")


def test_a_file_cut_off_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path) -> None:
    record(tmp_path / "a_00.tar", 2, (300, 300, 3))
    with FileReader(tmp_path / "a_00.tar") as reader:
        os.truncate(tmp_path / "a_00.tar", 200_000)
        with pytest.raises(RecordingError, match=r"Item 0 of .* cannot be read: the file ends"):
            reader[0]
        with pytest.raises(RecordingError, match="Item 1 of .* cannot be read: the file ends"):
            reader[1]


# -- replaying --------------------------------------------------------------------------------------------------


def record_three_workers(prefix: Path) -> None:
    for worker in range(3):
        record(Path(FileRecorder.filename(prefix, worker)), 7 + worker, (150, 150, 3), start=10 * worker)


EXPECTED = [*range(7), *range(10, 18), *range(20, 29)]


def test_the_files_of_all_workers_are_one_dataset_in_their_order(tmp_path: Path) -> None:
    record_three_workers(tmp_path / "a[1]_x")
    record(tmp_path / "a[1]_x_100.tar", 1, start=99)
    record(tmp_path / "a[1]_x_y_00.tar", 1)
    dataset = FileDataset(tmp_path / "a[1]_x")
    assert len(dataset) == 25
    assert [item["frameid"] for item in dataset] == [*EXPECTED, 99]
    check(dataset[-2], 28)
    assert isinstance(dataset[0]["image"], torch.Tensor)
    assert isinstance(FileDataset(tmp_path / "a[1]_x", output="numpy")[0]["image"], np.ndarray)


def brighten(item: dict[str, Any]) -> tuple[Any, int]:
    item["image"] += 1
    return item["image"], item["frameid"]


@pytest.mark.timeout(300)  # each spawned worker imports torch
@pytest.mark.parametrize(("num_workers", "method"), [(0, None), (2, "fork"), (2, "spawn")])
def test_any_number_of_workers_shuffle_and_transform(tmp_path: Path, num_workers: int, method: str | None) -> None:
    record_three_workers(tmp_path / "a")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    dataset = FileDataset(tmp_path / "a", item_transform=brighten)
    dataset[3]  # a reader is open already when the workers begin
    loader = data.DataLoader(
        dataset,
        4,
        shuffle=True,
        num_workers=num_workers,
        multiprocessing_context=method,
        persistent_workers=num_workers > 0,
    )
    orders = []
    for _ in range(2):  # what a transform writes does not come back in the next epoch
        order = []
        for images, frames in loader:
            assert (images == frames.reshape(-1, 1, 1, 1) + 1).all()
            order += frames.tolist()
        assert sorted(order) == EXPECTED
        orders.append(order)
    assert orders[0] != orders[1]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


class Halved(FileDataset):
    def _item(self, item: dict[str, Any]) -> Any:
        return item["image"][::2]


def test_item_may_be_overridden(tmp_path: Path) -> None:
    record_three_workers(tmp_path / "a")
    assert Halved(tmp_path / "a")[0].shape == (75, 150, 3)


def test_pickling_a_dataset_carries_where_it_reads_and_nothing_of_it(tmp_path: Path) -> None:
    record_three_workers(tmp_path / "a")
    dataset = FileDataset(tmp_path / "a", item_transform=brighten)
    dataset[0]
    carried = pickle.dumps(dataset)
    assert len(carried) < 2000
    assert [frame for _, frame in pickle.loads(carried)] == EXPECTED
    check(pickle.loads(pickle.dumps(FileReader(tmp_path / "a_01.tar")))[0], 10)


def test_what_is_written_into_an_item_reaches_neither_the_file_nor_the_item_read_again(tmp_path: Path) -> None:
    for shape in ((300, 300, 3), (40, 40, 3), (4, 4, 3)):
        record(tmp_path / "a_00.tar", 2, shape)
        dataset = SingleFileDataset(tmp_path / "a_00.tar")
        first = dataset[1]
        first["image"].zero_()
        again = dataset[1]
        assert (again["image"] == 1).all()
        again["image"] += 7
        assert (first["image"] == 0).all()
        check(FileReader(tmp_path / "a_00.tar")[1], 1)


def test_a_tensor_is_an_index_like_any_other(tmp_path: Path) -> None:
    """As in ``for i in torch.randperm(n)``. Items of equal indices do not share memory."""
    record(tmp_path / "a_00.tar", 3, (300, 300, 3))
    for dataset in (SingleFileDataset(tmp_path / "a_00.tar"), FileDataset(tmp_path / "a")):
        for index in (torch.tensor(1), np.int64(1), 1, torch.tensor(1)):
            item = dataset[index]  # type: ignore[index]
            check(item, 1)
            item["image"].zero_()
    with FileReader(tmp_path / "a_00.tar") as reader, pytest.raises(TypeError):
        reader[1.0]  # type: ignore[index]


def test_an_item_is_as_recorded_whatever_was_written_into_any_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where neighbours share a page of memory, and from several threads."""
    monkeypatch.setattr(torch_side.recordings.reader, "_ITEMS_OF_WINDOW", 5)
    record(tmp_path / "a_00.tar", 9, (150, 151, 3))
    dataset = SingleFileDataset(tmp_path / "a_00.tar")

    def read_and_spoil(seed: int) -> None:
        kept: list[Any] = []
        for index in np.random.default_rng(seed).integers(0, 9, 300).tolist():
            item = dataset[index]
            check(item, index)
            item["image"][:] = 255
            kept = [*kept[-3:], item]
            assert all((other["image"] == 255).all() for other in kept)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(read_and_spoil, range(3)))


def test_items_outlive_their_dataset_and_the_file(tmp_path: Path) -> None:
    record(tmp_path / "a_00.tar", 2, (300, 300, 3))
    dataset = FileDataset(tmp_path / "a")
    item = dataset[1]
    del dataset
    gc.collect()
    record(tmp_path / "a_00.tar", 5, (10, 10, 3))
    check(item, 1)


_READ_ALL = """
import os, sys
from torch_side import FileReader

def resident_mb():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

reader = FileReader(sys.argv[1])
for i in range(5):
    reader[i]["image"].sum()
before = resident_mb()
peak = 0
for i in range(len(reader)):
    reader[i]["image"].sum()
    peak = max(peak, resident_mb())
print(peak - before)
"""


def test_resident_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    record(tmp_path / "a_00.tar", 200, (480, 640, 3))  # 184 MB
    done = subprocess.run([sys.executable, "-c", _READ_ALL, tmp_path / "a_00.tar"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20


_KEEP_ALL = """
import resource, sys
from torch_side import FileReader
reader = FileReader(sys.argv[1])
reader[0]
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
items = [reader[i] for i in range(len(reader))]
assert all((item["image"] == item["frameid"] % 256).all() for item in items)
print(len(items))
"""


def test_items_that_are_kept_take_no_file_descriptors(tmp_path: Path) -> None:
    record(tmp_path / "a_00.tar", 100, (160, 160, 3))
    done = subprocess.run([sys.executable, "-c", _KEEP_ALL, tmp_path / "a_00.tar"], capture_output=True, text=True)
    assert done.stdout == "100\n", done.stderr


def test_without_room_for_another_mapping_items_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "a_00.tar", 2, (160, 160, 3))

    def refuse(fd: int, nbytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(torch_side.recordings.reader, "Window", refuse)
    check(FileDataset(tmp_path / "a")[1], 1)


# -- recording a stream -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[str]]:
    with launch() as launcher:
        found = launcher.launch_info.addresses["DATA"]
        for address in found:  # they run, and have made all that they will
            assert len(list(RemoteIterableDataset(address, max_items=2))) == 2
        yield found


def spoil(item: dict[str, Any]) -> dict[str, Any]:
    kept = dict(item, image=item["image"].copy(), xy=item["xy"].copy())
    item["image"][...] = 0
    return kept


def key(item: dict[str, Any]) -> tuple[int, int]:
    return int(item["btid"]), int(item["frameid"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("num_workers", "method"), [(0, None), (2, "fork")])
def test_the_items_of_a_stream_replay_as_they_came(
    addresses: list[str], tmp_path: Path, num_workers: int, method: str | None
) -> None:
    prefix = tmp_path / "not" / "there" / "yet"
    dataset = RemoteIterableDataset(addresses, max_items=19, item_transform=spoil, record_path_prefix=prefix)
    assert prefix.parent.is_dir()
    loader = data.DataLoader(dataset, batch_size=None, num_workers=num_workers, multiprocessing_context=method)
    items = {key(item): item for item in loader}
    assert len(items) == 19
    paths = [prefix.with_name(f"yet_{worker:02d}.tar") for worker in range(max(num_workers, 1))]
    assert sorted(prefix.parent.iterdir()) == paths
    for path in paths:
        with tarfile.open(path) as archive:
            assert archive.getnames()[-1] == "__index__"
    replayed = {key(item): item for item in FileDataset(prefix)}
    assert replayed.keys() == items.keys()
    for name, item in items.items():
        assert list(item) == list(replayed[name])
        for field, value in item.items():
            other = replayed[name][field]
            assert type(value) is type(other)
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype
                assert torch.equal(value, other)
            else:
                assert value == other


_PUBLISH_ALL_SORTS = """
import numpy as np
import blendtorch.btb as btb
from collections import OrderedDict
btargs, _ = btb.parse_blendtorch_args()
pub = btb.DataPublisher(btargs.btsockets["DATA"], btargs.btid)
for i in range(6):
    item = {
        "mesh": {"v": np.arange(3000.0).reshape(-1, 3), "f": [np.arange(6), (1, None, "ü")]},
        "ids": {3: "cube", 4: np.float32(0.5)}, "raw": b"\\0" * (i * 1000), "big": 2**80, "$odd": float("nan"),
        "records": np.zeros(300, [("x", "<f4"), ("n", "S4", (2,))]), "image": np.full((50 + i, 50, 3), i, np.uint8),
    }
    if i % 2:
        del item["mesh"]
    if i == 5:
        item["order"] = OrderedDict(a=1)
    pub.publish(**item)
pub.close()
"""


def test_fields_come_and_go_and_change_their_shapes(
    script: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with launch(num_instances=1, script=script(_PUBLISH_ALL_SORTS)) as launcher:
        dataset = RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=6, output="numpy")
        dataset.enable_recording(str(tmp_path / "a"))
        items = list(dataset)
    replay = FileDataset(tmp_path / "a", output="numpy", allow_pickle=True)
    assert all(map(same, items, replay))
    assert type(replay[5]["order"]) is OrderedDict
    with pytest.raises(RecordingError, match="OrderedDict"):
        FileDataset(tmp_path / "a")[5]
    assert same(FileDataset(tmp_path / "a", output="numpy")[4], items[4])


def has_index(path: Path) -> bool:
    with tarfile.open(path) as archive:
        return archive.getnames()[-1] == "__index__"


def test_the_file_is_complete_when_the_iteration_ends_in_any_way(addresses: list[str], tmp_path: Path) -> None:
    dataset = RemoteIterableDataset(addresses, max_items=5, record_path_prefix=tmp_path / "a")
    left = iter(dataset)
    next(left)
    next(left)
    assert len(FileDataset(tmp_path / "a")) == 2  # in the middle of it
    assert not has_index(tmp_path / "a_00.tar")
    left.close()  # type: ignore[attr-defined]
    assert has_index(tmp_path / "a_00.tar")

    dataset = RemoteIterableDataset(addresses, max_items=5, record_path_prefix=tmp_path / "b")
    collected = iter(dataset)
    next(collected)
    del collected
    gc.collect()
    assert has_index(tmp_path / "b_00.tar")

    dataset = RemoteIterableDataset(addresses, max_items=2, record_path_prefix=tmp_path / "c")
    just_enough = iter(dataset)
    next(just_enough)
    next(just_enough)
    assert has_index(tmp_path / "c_00.tar")

    dataset.stream_length(4)
    loader = data.DataLoader(dataset, batch_size=None, num_workers=2)
    for _ in loader:
        break
    del loader, just_enough
    gc.collect()
    assert len(FileDataset(tmp_path / "c")) >= 3


def test_iterating_again_adds_to_the_recording(addresses: list[str], tmp_path: Path) -> None:
    dataset = RemoteIterableDataset(addresses, max_items=5, record_path_prefix=tmp_path / "a")
    frames = [key(item) for _ in range(3) for item in dataset]
    loader = data.DataLoader(dataset, batch_size=None, num_workers=2)
    more = [key(item) for item in loader]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a_00.tar", "a_01.tar"]
    replayed = [key(item) for item in FileDataset(tmp_path / "a")]
    assert replayed[:15] == frames
    assert sorted(replayed) == sorted(frames + more)


def test_two_iterations_at_once_write_two_files(addresses: list[str], tmp_path: Path) -> None:
    dataset = RemoteIterableDataset(addresses, max_items=3, record_path_prefix=tmp_path / "a")
    pairs = [(key(a), key(b)) for a, b in zip(dataset, dataset, strict=True)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a_00.tar", "a_01.tar"]
    assert [key(item) for item in FileDataset(tmp_path / "a")] == [a for a, _ in pairs] + [b for _, b in pairs]


def test_a_new_recording_replaces_all_files_of_the_old_one(
    addresses: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record_three_workers(tmp_path / "a")
    old = FileDataset(tmp_path / "a")
    kept = old[-1]
    dataset = RemoteIterableDataset(addresses, max_items=2, record_path_prefix=tmp_path / "a")
    assert len(FileDataset(tmp_path / "a")) == 24  # nothing has arrived yet
    items = [key(item) for item in dataset]
    assert [key(item) for item in FileDataset(tmp_path / "a")] == items
    told = " ".join(r.getMessage() for r in caplog.records)
    assert all(f"a_0{worker}.tar" in told for worker in range(3))
    check(kept, 28)
    check(old[0], 0)  # whoever has it open reads on


def test_an_instance_that_never_sends_costs_no_recording(tmp_path: Path) -> None:
    record(tmp_path / "a_00.tar", 2)
    dataset = RemoteIterableDataset("tcp://127.0.0.1:9", timeoutms=300, record_path_prefix=tmp_path / "a")
    with pytest.raises(TimeoutError):
        next(iter(dataset))
    assert len(FileDataset(tmp_path / "a")) == 2


def test_what_somebody_else_writes_or_owns_is_not_touched(tmp_path: Path) -> None:
    with FileRecorder(tmp_path / "a_01.tar") as recorder:
        recorder.save(item_number(0))
        with pytest.raises(ConfigurationError, match=r"a_01.tar is just being written"):
            RemoteIterableDataset("tcp://127.0.0.1:9", record_path_prefix=tmp_path / "a")
        with pytest.raises(ConfigurationError, match="is just being written"), FileRecorder(tmp_path / "a_01.tar"):
            pass
        recorder.save(item_number(1))
    assert len(FileDataset(tmp_path / "a")) == 2
    RemoteIterableDataset("tcp://127.0.0.1:9", record_path_prefix=tmp_path / "a")
    (tmp_path / "b_00.tar").write_bytes(b"my thesis")
    with pytest.raises(ConfigurationError, match="is not a recording, so it is not overwritten"):
        RemoteIterableDataset("tcp://127.0.0.1:9", record_path_prefix=tmp_path / "b")
    with pytest.raises(ConfigurationError, match="not overwritten"), FileRecorder(tmp_path / "b_00.tar"):
        pass
    assert (tmp_path / "b_00.tar").read_bytes() == b"my thesis"


def test_what_is_no_ordinary_file_is_neither_written_nor_removed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a_00.tar")
    for path in (tmp_path / "a_00.tar", tmp_path, Path("/dev/null")):
        with pytest.raises(ConfigurationError, match="cannot be written|not overwritten"), FileRecorder(path):
            pass
        assert path.exists()
    with pytest.raises(ConfigurationError, match="Nothing can be recorded"):
        RemoteIterableDataset("tcp://127.0.0.1:9", record_path_prefix=tmp_path / "a")


def test_a_prefix_may_end_with_a_slash_or_be_empty_or_have_any_letters(
    tmp_path: Path, addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for prefix, path in (("new/", "new/_00.tar"), ("", "_00.tar"), ("ä b/日本", "ä b/日本_00.tar")):
        items = list(RemoteIterableDataset(addresses, max_items=2, record_path_prefix=prefix))
        assert len(FileReader(path)) == len(items) == 2
        assert len(FileReader(FileRecorder.filename(prefix, 0))) == 2
        assert [key(item) for item in FileDataset(prefix)] == [key(item) for item in items]


@pytest.mark.parametrize("prefix", ["file/rec", "/proc/nowhere/rec", "/proc/rec", "x" * 250])
def test_a_place_that_cannot_be_written_is_named_at_once(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"The folder .* cannot be made|Nothing can be recorded"):
        RemoteIterableDataset("tcp://127.0.0.1:9", record_path_prefix=tmp_path / prefix)


def test_a_forked_child_leaves_the_file_alone(tmp_path: Path) -> None:
    with FileRecorder(tmp_path / "a_00.tar") as recorder:
        recorder.save(item_number(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads
            pid = os.fork()
        if pid == 0:
            with contextlib.suppress(RecordingError):
                recorder.save(item_number(7))
            recorder.close()
            os._exit(0)
        os.waitpid(pid, 0)
        recorder.save(item_number(1))
    assert [item["frameid"] for item in FileDataset(tmp_path / "a")] == [0, 1]


def test_a_worker_killed_while_it_records_leaves_what_it_had_received(addresses: list[str], tmp_path: Path) -> None:
    dataset = RemoteIterableDataset(addresses, max_items=10**6, record_path_prefix=tmp_path / "a")
    loader = iter(data.DataLoader(dataset, batch_size=None, num_workers=2))
    received = [key(next(loader)) for _ in range(40)]
    with killed_worker(loader):
        with pytest.raises((RuntimeError, OSError, EOFError)):  # as torch happens to notice it
            while True:
                received.append(key(next(loader)))
        del loader
    gc.collect()
    replayed = [key(item) for item in FileDataset(tmp_path / "a")]
    assert set(received) <= set(replayed)
    assert len(replayed) == len(set(replayed))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root can mount a small disk")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this place does not let root mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_full_disk_stops_the_recording_and_not_the_stream(
    small_disk: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], num_workers: int
) -> None:
    with launch("--shape", "100", "100", "3", num_instances=1) as launcher:
        dataset = RemoteIterableDataset(
            launcher.launch_info.addresses["DATA"], max_items=100, record_path_prefix=small_disk / "a"
        )
        with caplog.at_level(logging.ERROR):
            items = [key(item) for item in data.DataLoader(dataset, batch_size=None, num_workers=num_workers)]
        assert len(set(items)) == 100
        replay = FileDataset(small_disk / "a")
        assert 20 < len(replay) < 40
        assert {key(item) for item in replay} <= set(items)
        for item in replay:
            assert (item["image"] == item["value"]).all()
    if num_workers == 0:  # a worker logs in its own process
        (told,) = [r.getMessage() for r in caplog.records]
        assert f"a_00.tar stops after {len(replay)} items" in told
        assert "No space left on device" in told
        assert "Make room" in told
        assert "Training goes on" in told
    del replay, item


def test_a_disk_that_is_full_from_the_start_is_no_error_of_the_stream(
    small_disk: Path, addresses: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    dataset = RemoteIterableDataset(addresses, max_items=5, record_path_prefix=small_disk / "a")
    with contextlib.suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    with caplog.at_level(logging.ERROR):
        assert len(list(dataset)) == 5
    (told,) = [r.getMessage() for r in caplog.records]
    assert "does not begin" in told
    (small_disk / "ballast").unlink()
    assert len(list(dataset)) == 5
    assert len(FileDataset(small_disk / "a")) == 5


_HOLD = """
import os, signal, sys
from torch_side.recordings.recorder import FileRecorder
with FileRecorder(sys.argv[1]) as recorder:
    recorder.save({"frameid": 0})
    print("begun", flush=True)
    signal.pause()
"""


def test_the_lock_of_a_killed_recorder_is_gone_with_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, tmp_path / "a_00.tar"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"begun\n"
    with pytest.raises(ConfigurationError, match="being written"), FileRecorder(tmp_path / "a_00.tar"):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    record(tmp_path / "a_00.tar", 3)
    assert len(FileReader(tmp_path / "a_00.tar")) == 3


def test_ctrl_c_anywhere_in_save_leaves_a_whole_file_with_that_item_or_without(tmp_path: Path) -> None:
    path = tmp_path / "a_00.tar"
    tried: list[int] = []
    saved: list[int] = []
    with FileRecorder(path) as recorder:

        def save() -> None:
            tried.append(len(tried))
            recorder.save(item_number(tried[-1]))
            saved.append(tried[-1])

        save()
        modules = [str(module.__file__) for module in (torch_side.recordings.recorder, torch_side.recordings.archive)]
        for where in everywhere(save, modules, stride=1):
            if len(recorder) > len(saved):  # it came when all was done
                saved.append(tried[-1])
            assert len(recorder) == len(saved), where
        save()
    assert len(tried) > 2 * len(saved)
    assert [item["frameid"] for item in FileDataset(tmp_path / "a")] == saved
    assert not verify_recording(path).damage


def test_many_small_arrays_are_written_in_more_than_one_piece(tmp_path: Path) -> None:
    count = resource.getpagesize() // 2
    with FileRecorder(tmp_path / "a_00.tar") as recorder:
        recorder.save({"all": [np.full(5000, i, np.uint16) for i in range(count)]})
    found = FileReader(tmp_path / "a_00.tar")[0]["all"]
    assert [int(array[-1]) for array in found] == list(range(count))


def test_who_records_is_told_once_that_training_waits_for_the_disk(
    addresses: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_side.recordings.recorder, "_SLOW_S", -1.0)
    list(RemoteIterableDataset(addresses, max_items=3, record_path_prefix=tmp_path / "a"))
    (told,) = [message for message in caplog.messages if "Training waits for the disk" in message]
    assert str(tmp_path / "a_00.tar") in told


def test_an_object_that_cannot_be_made_here_is_an_error_that_names_it(tmp_path: Path) -> None:
    with FileRecorder(tmp_path / "a_00.tar") as recorder:
        recorder.save({"image": np.zeros(9000), "pose": {"of": [Missing()]}})
    words = r"Item 0 of .*a_00.tar.*Field 'pose': a .*\bMissing cannot.*'no_such_module'.*pip install"
    with pytest.raises(RecordingError, match=words):
        FileDataset(tmp_path / "a", allow_pickle=True)[0]


def test_threads_may_save_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "many.tar"

    def save(number: int) -> None:
        for i in range(100):
            recorder.save({"thread": number, "i": i, "image": np.full(9000 + 13 * i, number, np.uint8)})

    with FileRecorder(path, max_messages=1000) as recorder:
        threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert 0 <= len(recorder) <= 400
    items = list(SingleFileDataset(path, output="numpy"))
    assert sorted((item["thread"], item["i"]) for item in items) == [(t, i) for t in range(4) for i in range(100)]
    assert all((item["image"] == item["thread"]).all() for item in items)


def test_a_save_in_the_middle_of_another_one_is_an_error_and_harms_nothing(tmp_path: Path) -> None:
    path = tmp_path / "nested.tar"
    with FileRecorder(path) as recorder:

        class Saves:
            def __reduce__(self) -> Any:
                with pytest.raises(RecordingError, match="in the middle of another save"):
                    recorder.save({"i": 1})
                return int, ()

        recorder.save({"i": 0, "object": Saves()})
        recorder.save({"i": 2})
    assert [item["i"] for item in SingleFileDataset(path, allow_pickle=True)] == [0, 2]


@pytest.mark.parametrize("handler_of", ["save", "close"])
def test_a_signals_handler_may_close_the_recorder(tmp_path: Path, handler_of: str) -> None:
    """As one of SIGTERM does, which then exits."""
    path = tmp_path / "closed.tar"
    recorder = FileRecorder(path).__enter__()
    for i in range(3):
        recorder.save({"i": i, "image": np.zeros(9000, np.uint8)})
    run = recorder.close if handler_of == "close" else lambda: recorder.save({"i": 3})
    code = FileRecorder._close.__code__ if handler_of == "close" else FileRecorder._save.__code__

    def trace(frame: Any, event: str, _: object) -> Any:
        if event == "call" and frame.f_code is code:
            sys.settrace(None)
            recorder.close()
            raise SystemExit
        return None

    tracing = sys.gettrace()
    try:
        sys.settrace(trace)
        with pytest.raises(SystemExit):
            run()
    finally:
        sys.settrace(tracing)
    assert [item["i"] for item in SingleFileDataset(path)] == [0, 1, 2]
    assert not verify_recording(path).damage


def test_what_a_signals_handler_raises_while_an_item_is_written_does_not_stop_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = WorkerRecorder(str(tmp_path / "a"), "0" * 32, 0, 1)
    recorder.save({"i": 0}, lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(torch_side.recordings.recorder, "write", raises_time_out)
        with pytest.raises(TimeoutError):
            recorder.save({"i": 1}, lambda: None)
    recorder.save({"i": 2}, lambda: None)
    recorder.close()
    assert [item["i"] for item in FileDataset(tmp_path / "a")] == [0, 2]


def raises_time_out(*_: object) -> None:
    raise TimeoutError


def test_a_tensor_that_numpy_does_not_know_ends_the_recording_and_not_the_stream(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = WorkerRecorder(str(tmp_path / "a"), "0" * 32, 0, 1)
    recorder.save({"i": 0}, lambda: None)
    recorder.save({"i": 1, "pose": torch.zeros(3, dtype=torch.bfloat16)}, lambda: None)
    assert "has a value that cannot be recorded" in caplog.text
    recorder.close()
    assert [item["i"] for item in FileDataset(tmp_path / "a")] == [0]


def test_an_item_without_its_end_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cut.tar"
    with FileRecorder(path) as recorder:
        for i in range(3):
            recorder.save({"i": i, "image": np.full(9000, i, np.uint8)})
    whole = path.read_bytes()
    at = whole.index(b"00000001.json")
    path.write_bytes(whole[:at] + whole[at + 1024 : whole.index(b"__index__")])
    assert [item["i"] for item in SingleFileDataset(path)] == [0, 2]
    assert "item 00000001 has no end there" in caplog.text
