"""Batches whose rows others write: what is used again when, whose memory it is, and that nothing is copied on the way."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from blendtorch_shm.errors import OutOfSharedMemory, SegmentError, SegmentMissing
from blendtorch_shm.memory import rows, segment
from blendtorch_shm.memory.rows import Batch, Batches, Kind, RowWriter

PICTURE: Kind = (50, 60, 3), np.dtype(np.uint8)
"""Its rows are no multiple of a page."""
SMALL: Kind = (4,), np.dtype(np.float32)


@pytest.fixture
def name() -> Iterator[str]:
    name = f"/bt-{secrets.token_hex(4)}-rows"
    yield name
    segment.unlink(name)


def taken(batches: Batches) -> Batch:
    batch = batches.take()
    assert batch is not None
    return batch


def place(batches: Batches, batch: Batch, row: int) -> tuple[str, int, list[int]]:
    return batches.name, batches.inode, batch.at(row)


def write(writer: RowWriter, where: tuple[str, int, list[int]], values: Sequence[Any], kinds: Sequence[Kind]) -> int:
    writer.begin(*where, kinds)
    return writer.write([np.full(*kind[:1], value, kind[1]) for kind, value in zip(kinds, values, strict=True)])


def lent(writer: RowWriter, kind: Kind, value: int) -> np.ndarray[Any, np.dtype[Any]]:
    array = writer.lend(*kind)
    assert array is not None
    array[:] = value
    return array


@pytest.mark.parametrize("kinds", [[PICTURE], [SMALL], [PICTURE, SMALL, PICTURE], [((), np.dtype(np.int64)), PICTURE]])
def test_each_row_is_what_its_writer_wrote(name: str, kinds: list[Kind]) -> None:
    batches = Batches(name, 3, kinds, 3)
    writers = [RowWriter() for _ in range(3)]
    kept = []
    for number in range(3):
        batch = taken(batches)
        for row in (2, 0, 1):
            values = [10 * number + 3 * row + place for place in range(len(kinds))]
            assert write(writers[row], place(batches, batch, row), values, kinds) == sum(map(rows._nbytes, kinds))
        kept.append(batch.arrays)
    assert batches.take() is None
    for number, arrays in enumerate(kept):
        for leaf, array in enumerate(arrays):
            assert (array.shape, array.dtype) == ((3, *kinds[leaf][0]), kinds[leaf][1])
            for row in range(3):
                assert (array[row] == 10 * number + 3 * row + leaf).all()
    batches.close()
    assert not os.path.exists(f"/dev/shm{name}")
    assert (kept[1][0][2] == 16).all()


def test_what_was_lent_is_there_without_a_copy(name: str) -> None:
    kinds = [PICTURE, SMALL, PICTURE]
    batches, writer = Batches(name, 2, kinds, 2), RowWriter()
    batch = taken(batches)
    writer.begin(*place(batches, batch, 1), kinds)
    first, second = lent(writer, PICTURE, 7), lent(writer, PICTURE, 8)
    assert writer.lend(*PICTURE) is None  # there are two
    assert writer.lend(*SMALL) is None  # to copy it costs less
    small = np.ones(4, np.float32)
    assert writer.write([first, small, second]) == small.nbytes
    assert [int(array[1].max()) for array in batch.arrays] == [7, 1, 8]
    second[:] = 9  # its own by now
    assert (batch.arrays[2][1] == 8).all()


def test_arrays_that_change_places_or_shape_or_are_not_used_are_right(name: str) -> None:
    kinds = [PICTURE, PICTURE]
    batches, writer = Batches(name, 2, kinds, 4), RowWriter()
    wholes = []
    for use in (
        lambda a, b: [b, a],
        lambda a, b: [a, a],
        lambda a, b: [a[:], b],
        lambda a, b: [np.full_like(a, 1), b],
    ):
        batch = taken(batches)
        writer.begin(*place(batches, batch, 0), kinds)
        first, second = lent(writer, PICTURE, 1), lent(writer, PICTURE, 2)
        expected = [array.copy() for array in use(first, second)]
        writer.write(use(first, second))
        for array, value in zip(batch.arrays, expected, strict=True):
            np.testing.assert_array_equal(array[0], value)
        assert ((first == 1).all(), (second == 2).all()) == (True, True)
        wholes.append(batch.arrays)


@pytest.mark.parametrize("changes", [False, True])
def test_what_a_script_keeps_stays_when_the_row_is_used_again(name: str, changes: bool) -> None:
    batches, writer = Batches(name, 1, [PICTURE], 2), RowWriter()
    kept = []
    for number in range(7):
        batch = taken(batches)
        writer.begin(*place(batches, batch, 0), [PICTURE])
        array = lent(writer, PICTURE, number)
        assert writer.write([array]) == 0
        if changes:
            array[0] = 100
        kept.append(array)
        assert (batch.arrays[0] == number).all()
        del batch
    for number, array in enumerate(kept):
        assert (array[1:] == number).all()
        assert (array[0] == (100 if changes else number)).all()


def test_what_a_script_renders_but_does_not_answer_with_is_its_own(name: str) -> None:
    batches, writer = Batches(name, 1, [PICTURE], 2), RowWriter()
    batch = taken(batches)
    writer.begin(*place(batches, batch, 0), [PICTURE])
    kept = lent(writer, PICTURE, 5)
    writer.abandon()
    write(writer, place(batches, batch, 0), [6], [PICTURE])
    assert (kept == 5).all()
    assert (batch.arrays[0] == 6).all()
    assert RowWriter().lend(*PICTURE) is None  # nothing was begun


def test_a_batch_is_used_again_when_its_last_view_and_its_last_writer_have_gone(name: str) -> None:
    batches = Batches(name, 2, [PICTURE], 2)
    first, second = taken(batches), taken(batches)
    assert (batches.free(), batches.take()) == (0, None)
    view = first.arrays[0][1, ::2]
    first.writers.update((0, 1))
    writers = first.writers
    del first
    assert batches.take() is None
    del view
    assert batches.take() is None  # somebody writes there still
    writers.clear()
    assert batches.free() == 1
    again = taken(batches)
    del again, second
    assert batches.free() == 2


def test_what_the_trainer_changes_nobody_else_sees(name: str) -> None:
    batches, writer = Batches(name, 2, [PICTURE], 1 + 1), RowWriter()
    other = taken(batches)
    for number in range(3):
        batch = taken(batches)
        for row in range(2):
            write(writer, place(batches, batch, row), [number + row], [PICTURE])
        assert [int(array.max()) for array in batch.arrays[0]] == [number, number + 1]
        batch.arrays[0][:] = 200
        assert [int(array.max()) for array in batch.shared[0]] == [number, number + 1]
        del batch
    assert other.arrays


def test_rows_of_instances_elsewhere_are_put(name: str) -> None:
    batches = Batches(name, 2, [PICTURE, SMALL], 2)
    batch = taken(batches)
    batch.put(1, [np.full(PICTURE[0], 3, np.uint8), np.arange(4, dtype=np.float32)])
    assert (batch.arrays[0][1] == 3).all()
    assert batch.arrays[1][1].tolist() == [0, 1, 2, 3]


def test_a_writer_follows_to_another_trainers_memory_and_never_writes_to_the_wrong_one(name: str) -> None:
    writer = RowWriter()
    batches = Batches(name, 1, [PICTURE], 2)
    batch = taken(batches)
    old = place(batches, batch, 0)
    writer.begin(*old, [PICTURE])
    kept = lent(writer, PICTURE, 1)
    writer.write([kept])
    others = Batches(name, 1, [PICTURE], 2)  # of the same name: the first trainer was killed
    other = taken(others)
    write(writer, place(others, other, 0), [2], [PICTURE])
    assert (other.arrays[0] == 2).all()
    assert (batch.arrays[0] == 1).all()
    assert (kept == 1).all()
    with pytest.raises(SegmentMissing, match="is another one by now"):
        writer.begin(*old, [PICTURE])
    others.close()
    with pytest.raises(SegmentMissing):
        RowWriter().begin(*old, [PICTURE])


def test_a_place_that_is_not_within_the_memory_is_an_error(name: str) -> None:
    batches = Batches(name, 1, [PICTURE], 2)
    for offset in (-1, 10**9):
        with pytest.raises(SegmentError, match="does not lie within"):
            RowWriter().begin(name, batches.inode, [offset], [PICTURE])


def test_where_there_is_little_memory_there_are_fewer_batches(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create, room = segment.create, 30_000

    def limited(name: str, nbytes: int) -> Any:
        if nbytes > room:
            raise OutOfSharedMemory("full")
        return create(name, nbytes)

    monkeypatch.setattr(rows.segment, "create", limited)
    with caplog.at_level(logging.WARNING, "blendtorch"):
        batches = Batches(name, 1, [PICTURE], 10)
    assert batches.free() == 2
    assert "there are 2" in caplog.text
    room = 10_000
    with pytest.raises(OutOfSharedMemory):
        Batches(name, 1, [PICTURE], 10)
