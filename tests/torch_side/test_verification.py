"""Damaged recordings: each item is right or an error, and :func:`verify_recording` says which."""

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import torch_side.recordings.recorder
from blendtorch_shm.errors import RecordingError, RecordingNotFound
from torch_side import FileDataset, FileReader, FileRecorder, verify_recording
from torch_side.apps import verify


def item(i: int, nbytes: int) -> dict[str, Any]:
    rng = np.random.default_rng(i)
    return {"i": i, "image": rng.integers(0, 256, nbytes, np.uint8), "xy": rng.random((8, 2)), "text": "x" * (i * 7)}


def is_right(found: dict[str, Any], i: int, nbytes: int) -> bool:
    expected = item(i, nbytes)
    return list(found) == list(expected) and all(np.array_equal(found[name], expected[name]) for name in expected)


def record(path: Path, count: int, nbytes: int) -> bytes:
    with FileRecorder(path) as recorder:
        for i in range(count):
            recorder.save(item(i, nbytes))
    return path.read_bytes()


def spoil(content: bytes, how: str, rng: random.Random) -> bytes:
    spoilt = bytearray(content)
    at = rng.randrange(len(content))
    if how == "flip":
        spoilt[at] ^= 1 << rng.randrange(8)
    elif how == "cut off":
        del spoilt[at:]
    elif how == "zeros":  # a sector, or a page, that the disk has lost
        size = rng.choice([512, 4096])
        at -= at % size
        spoilt[at : at + size] = bytes(len(spoilt[at : at + size]))
    else:  # a block that landed in the wrong place
        other = rng.randrange(len(content) // 512) * 512
        spoilt[at - at % 512 : at - at % 512 + 512] = content[other : other + 512]
    return bytes(spoilt)


@pytest.mark.parametrize("how", ["flip", "cut off", "zeros", "misplaced block"])
@pytest.mark.parametrize("nbytes", [300, 8000, 100_000], ids=["small", "middle", "mapped"])
def test_each_item_of_a_damaged_file_is_right_or_an_error(tmp_path: Path, nbytes: int, how: str) -> None:
    path = tmp_path / "a_00.tar"
    content = record(path, 6, nbytes)
    rng = random.Random(f"{nbytes} {how}")
    for _ in range(150):
        spoilt = spoil(content, how, rng)
        path.write_bytes(spoilt)
        failed: set[int | None] = set()
        try:
            dataset = FileDataset(tmp_path / "a", output="numpy")
        except RecordingError:
            assert verify_recording(path).damage
            continue
        for i in range(len(dataset)):
            try:
                assert is_right(dataset[i], i, nbytes), (i, spoilt == content)
            except RecordingError:
                failed.add(i)
        found = verify_recording(tmp_path / "a")
        assert {damage.item for damage in found.damage} - {None} == failed
        assert found.num_items == len(dataset)
        if len(dataset) < 6:
            assert None in {damage.item for damage in found.damage}


def test_a_damaged_index_costs_no_item(tmp_path: Path) -> None:
    path = tmp_path / "a_00.tar"
    content = record(path, 6, 300)
    start = content.index(b"__index__") + 512
    end = len(content) - 1024
    for at in range(start + 64, end):
        if content[at] != ord(" "):
            path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
            with FileReader(path) as reader:
                assert [reader[i]["i"] for i in range(len(reader))] == list(range(6)), at


def test_what_changed_while_it_was_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum of other bytes than those in the file, whatever the reason."""
    changing = np.zeros(10_000, np.uint8)
    write = torch_side.recordings.recorder.write

    def change_and_write(fd: int, buffers: list[Any], at: int) -> None:
        changing[5000] = 1
        write(fd, buffers, at)

    with FileRecorder(tmp_path / "a_00.tar") as recorder:
        monkeypatch.setattr(torch_side.recordings.recorder, "write", change_and_write)
        recorder.save({"image": changing})
        monkeypatch.undo()
    with FileReader(tmp_path / "a_00.tar") as reader, pytest.raises(RecordingError, match="checksum"):
        reader[0]


def test_who_asks_for_it_reads_without_verifying(tmp_path: Path) -> None:
    path = tmp_path / "a_00.tar"
    content = record(path, 1, 100_000)
    at = content.index(item(0, 100_000)["image"].tobytes()[:100])
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(RecordingError, match="do not have the checksum that was written"):
        FileDataset(tmp_path / "a")[0]
    assert FileDataset(tmp_path / "a", verify=False, output="numpy")[0]["image"][0] == content[at] ^ 1


@pytest.mark.parametrize("nbytes", [300, 100_000], ids=["small", "mapped"])
def test_an_item_in_the_place_of_another_is_damage(tmp_path: Path, nbytes: int) -> None:
    """Its checksum is right: a write went to the wrong place, or the file was put together wrong."""
    path = tmp_path / "a_00.tar"
    with FileRecorder(path) as recorder:
        for i in range(3):
            recorder.save({"i": i, "image": np.full(nbytes, i, np.uint8)})
    with FileReader(path) as reader:
        (first, end), (second, _), _ = reader._ranges.tolist()
    content = path.read_bytes()
    path.write_bytes(content[:second] + content[first:end] + content[second + end - first :])
    dataset = FileDataset(tmp_path / "a")
    assert [dataset[0]["i"], dataset[2]["i"]] == [0, 2]
    with pytest.raises(RecordingError, match="another item"):
        dataset[1]
    assert [damage.item for damage in verify_recording(path).damage] == [1]


@pytest.mark.parametrize("first", [1016, 1000, 600])
def test_a_beginning_that_has_lost_its_checksum_does_not_keep_items_from_being_verified(
    tmp_path: Path, first: int
) -> None:
    path = tmp_path / "a_00.tar"
    content = bytearray(record(path, 3, 8000))
    content[first:1024] = bytes(1024 - first)
    content[FileReader.read_offsets(path).tolist()[1] + 3000] ^= 4
    path.write_bytes(content)
    found = verify_recording(path)
    assert [damage.item for damage in found.damage] == [None, 1]
    assert not found.num_unverified
    with pytest.raises(RecordingError, match="checksum"):
        FileDataset(tmp_path / "a")[1]


def test_what_is_no_ordinary_file_is_no_recording_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a_00.tar")
    os.symlink("/dev/zero", tmp_path / "a_01.tar")
    (tmp_path / "a_02.tar").mkdir()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(RecordingError, match="no ordinary file"):
            FileReader(path)
    with pytest.raises(RecordingError, match="no ordinary file"):
        FileDataset(tmp_path / "a")
    assert len(verify_recording(tmp_path / "a").damage) == 3
    assert "no ordinary file" in str(verify_recording(tmp_path / "a_00.tar"))


def test_recordings_without_checksums_are_read_and_counted(tmp_path: Path) -> None:
    """As earlier versions wrote them, or another program packed them: zeros where the checksums would be."""
    path = tmp_path / "a_00.tar"
    content = bytearray(record(path, 3, 8000))
    with FileReader(path) as reader:
        assert reader.has_checksums
        ends = [1024, *reader._ranges[:, 1].tolist()]
    for end in ends:
        content[end - 8 : end] = bytes(8)
    path.write_bytes(content)
    with FileReader(path) as reader:
        assert not reader.has_checksums
        assert all(is_right(reader[i], i, 8000) for i in range(3))
    found = verify_recording(path)
    assert (found.num_items, found.num_unverified, found.damage) == (3, 3, [])
    assert "3 of them without a checksum" in str(found)


@pytest.mark.parametrize("length", [0, 100, 4000, 5000, 70_000])
def test_an_item_with_much_text_is_whole_without_an_index(tmp_path: Path, length: int) -> None:
    """Its text is the last of it, however long."""
    path = tmp_path / "a_00.tar"
    for spaces in range(480, 520):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with FileRecorder(path) as recorder:
            recorder.save({"text": "x" * (length + spaces), "xy": np.arange(4)})
            with FileReader(path) as reader:
                assert reader[0]["xy"].tolist() == [0, 1, 2, 3]
                assert len(reader[0]["text"]) == length + spaces


def test_the_command_names_the_damaged_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "a_00.tar", 3, 8000)
    record(tmp_path / "a_01.tar", 3, 8000)
    assert verify.main([str(tmp_path / "a")]) == 0
    assert "6 items in 2 files; damaged: 0." in capsys.readouterr().out
    path = tmp_path / "a_01.tar"
    content = bytearray(path.read_bytes())
    content[FileReader.read_offsets(path).tolist()[1] + 3000] ^= 4
    path.write_bytes(content)
    assert verify.main([str(tmp_path / "a"), str(tmp_path / "a_00.tar")]) == 1
    output = capsys.readouterr().out
    assert f"Item 1 of {path} cannot be read" in output
    assert "; damaged: 1." in output
    assert verify.main([str(tmp_path / "b")]) == 1
    assert "There is no recording" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "said"),
    [("| head -c 0", "Broken pipe"), ("> /dev/full", "No space left"), ("> /dev/null", ""), (">&-", "")],
)
def test_the_command_says_that_it_cannot_print(tmp_path: Path, output: str, said: str) -> None:
    path = tmp_path / os.fsdecode(b"\xff_00.tar")
    content = bytearray(record(path, 200, 300))
    for at in FileReader.read_offsets(path).tolist():
        content[at + 600] ^= 4
    path.write_bytes(content)
    command = f"{sys.executable} -m torch_side.apps.verify {path} {output}"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    ran = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, check=False)
    assert b"Traceback" not in ran.stderr
    assert b"Exception" not in ran.stderr
    assert said.encode() in ran.stderr
    assert ran.returncode == (0 if "|" in output else 1)


def test_ctrl_c_ends_the_command_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    record(tmp_path / "a_00.tar", 1, 300)
    monkeypatch.setattr(FileReader, "verify_item", interrupt)
    assert verify.main([str(tmp_path / "a")]) == 130
    assert capsys.readouterr().err == "blendtorch-verify: interrupted\n"


def test_recordings_of_blendtorch_have_none(tmp_path: Path) -> None:
    (tmp_path / "a_00.btr").write_bytes(b"\x80\x03N.")
    for path in (tmp_path / "a", tmp_path / "a_00.btr"):
        with pytest.raises(RecordingError, match="blendtorch-convert"):
            verify_recording(path)
    with pytest.raises(RecordingNotFound):
        verify_recording(tmp_path / "b")
