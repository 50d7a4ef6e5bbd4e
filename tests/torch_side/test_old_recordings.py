"""Recordings of earlier versions, and of blendtorch, stay readable. The file in data/ was written by commit 98c0429."""

import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blendtorch_shm.errors import RecordingError, RecordingNotFound
from torch_side import FileDataset, FileReader, SingleFileDataset
from torch_side.apps import convert

PREFIX = Path(__file__).with_name("data") / "recorded_by_98c0429"


def test_a_recording_of_an_earlier_version_has_every_value_still() -> None:
    items = FileDataset(PREFIX, output="numpy")
    assert len(items) == 3
    for i in range(3):
        expected = {
            "btid": 0,
            "i": i,
            "image": np.full((24, 32, 3), i, np.uint8),
            "xy": np.arange(4.0).reshape(2, 2) + i,
            "text": "Würfel",
            "huge": 2**70,
            "none": None,
            "nested": {"deep": [(np.arange(1000, dtype=np.int16) + i, {1: "one"})]},
            "scalar": np.float32(i) / 2,
            "big": np.arange(700, dtype=">f8"),
            "records": np.array([(1, 2.5)], [("id", "<i4"), ("w", "<f8")]),
            "raw": b"\0\1",
            "many": [True, (1, 2)],
        }
        item = items[i]
        assert list(item) == list(expected)
        np.testing.assert_equal(item, expected)
        assert {key: type(value) for key, value in item.items()} == {
            key: type(value) for key, value in expected.items()
        }
        for key in ("image", "xy", "big", "records"):
            assert item[key].dtype == expected[key].dtype  # type: ignore[attr-defined]


# -- of blendtorch ----------------------------------------------------------------------------------------------


def message(i: int) -> dict[str, Any]:
    return {"btid": 0, "frameid": i, "image": np.full((4, 5, 3), i, np.uint8), "names": ["a", ("b", i)]}


def record_as_blendtorch(path: Path, numbers: range, how: str = "arrived", *, closed: bool = True) -> None:
    """Write pickles behind an array that says where each begins.

    Args:
        how: ``arrived``: each message is a pickle of its own, as it was sent. ``saved``: one pickler wrote them all, as it does
            those that are given to a recorder as they are, and they refer to what it wrote before. ``both``, in turn.
        closed: the writer lived to write down where they begin.
    """
    with path.open("wb") as file:
        pickler = pickle.Pickler(file, protocol=3)
        offsets = np.full(50, -1, np.int64)
        pickler.dump(offsets)
        for at, i in enumerate(numbers):
            offsets[at] = file.tell()
            if how == "arrived" or (how == "both" and i % 2):
                file.write(pickle.dumps(message(i), protocol=3 + i % 3))
            else:
                pickler.dump(message(i))
        if closed:
            file.seek(0)
            pickle.Pickler(file, protocol=3).dump(offsets)


def check(items: Any, numbers: list[int]) -> None:
    assert len(items) == len(numbers)
    for at in reversed(range(len(numbers))):
        np.testing.assert_equal(items[at], message(numbers[at]))
    with pytest.raises(IndexError):
        items[len(numbers)]


@pytest.mark.parametrize("how", ["arrived", "saved", "both"])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
def test_what_blendtorch_recorded_is_read_where_it_is_trusted(tmp_path: Path, how: str, closed: bool) -> None:
    record_as_blendtorch(tmp_path / "old_00.btr", range(4), how, closed=closed)
    record_as_blendtorch(tmp_path / "old_01.btr", range(4, 6))
    items = FileDataset(tmp_path / "old", output="numpy", allow_pickle=True)
    check(items, [0, 1, 2, 3, 4, 5])


def test_a_reader_of_one_old_file_says_where_its_messages_begin(tmp_path: Path) -> None:
    record_as_blendtorch(tmp_path / "old.mpkl", range(3))
    with FileReader(tmp_path / "old.mpkl", allow_pickle=True) as reader:
        check(reader, [0, 1, 2])
        assert FileReader.read_offsets(reader.path, allow_pickle=True).tolist() == reader.offsets.tolist()
        with open(reader.path, "rb") as file:
            file.seek(int(reader.offsets[2]))
            assert pickle.load(file)["frameid"] == 2
    record_as_blendtorch(tmp_path / "none.btr", range(0))
    assert len(FileReader(tmp_path / "none.btr", allow_pickle=True)) == 0


class Harmful:
    def __reduce__(self) -> Any:
        return exit, ("this was not to be read",)


@pytest.mark.parametrize(
    "read",
    [
        lambda old: FileDataset(old),
        lambda old: SingleFileDataset(f"{old}_00.btr"),
        lambda old: FileReader(f"{old}_00.btr"),
    ],
    ids=["FileDataset", "SingleFileDataset", "FileReader"],
)
def test_what_blendtorch_recorded_is_not_read_unless_trusted_and_the_error_says_how_to_convert_it(
    tmp_path: Path, read: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "my old"
    (tmp_path / "my old_00.btr").write_bytes(pickle.dumps(Harmful(), protocol=3))
    with pytest.raises(RecordingError, match="my old_00.btr.*allow_pickle=True") as caught:
        read(old)
    record_as_blendtorch(tmp_path / "my old_00.btr", range(3))
    command, *arguments = shlex.split(str(caught.value).splitlines()[-1])
    assert command == "blendtorch-convert"
    assert convert.main(arguments) == 0
    assert capsys.readouterr().out.split("\n") == [f"{old}_00.tar", ""]
    check(FileDataset(old, output="numpy"), [0, 1, 2])


def test_a_recording_is_converted_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_as_blendtorch(tmp_path / "old_00.btr", range(3))
    record_as_blendtorch(tmp_path / "old_07.btr", range(3, 5), "saved")
    assert convert.main([str(tmp_path / "old")]) == 0
    check(FileDataset(tmp_path / "old", output="numpy"), [0, 1, 2, 3, 4])
    assert convert.main([str(tmp_path / "old")]) == 1
    assert "old_00.tar exists already" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "nothing")]) == 1
    assert "nothing_00.btr" in capsys.readouterr().err
    shutil.copy(tmp_path / "old_00.btr", tmp_path / "bad_00.btr")
    (tmp_path / "bad_01.btr").write_bytes(pickle.dumps("no array"))
    assert convert.main([str(tmp_path / "bad")]) == 1
    assert "bad_01.btr is not a recording" in capsys.readouterr().err
    with pytest.raises(RecordingNotFound):
        FileDataset(tmp_path / "no")
    assert not list(tmp_path.glob("bad_*.tar*"))


def test_a_message_that_cannot_be_opened_here_is_named(tmp_path: Path) -> None:
    record_as_blendtorch(tmp_path / "old_00.btr", range(2))
    data = (tmp_path / "old_00.btr").read_bytes()
    (tmp_path / "old_00.btr").write_bytes(data.replace(b"ndarray", b"nothing"))
    with pytest.raises(RecordingError, match="not a recording"):  # its first pickle is an array, too
        FileDataset(tmp_path / "old", allow_pickle=True)
    at = data.rindex(b"ndarray")
    (tmp_path / "old_00.btr").write_bytes(data[:at] + b"nothing" + data[at + 7 :])
    items = FileDataset(tmp_path / "old", output="numpy", allow_pickle=True)
    assert items[0]["frameid"] == 0
    with pytest.raises(RecordingError, match=r"Item 1 of .*old_00.btr cannot be read.*nothing"):
        items[1]
