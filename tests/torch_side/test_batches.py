"""Batches against those of torch's default collation."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from blendtorch_shm.errors import FieldMissing
from torch_side.batch_memory import HostMemory
from torch_side.batches import Batch, collate_here
from torch_side.dataset import to_tensors

Pose = namedtuple("Pose", ["image", "angle"])
LARGE = np.arange(3000, dtype=np.int32).reshape(30, 100)

ITEMS: dict[str, Callable[[int], Any]] = {
    "message": lambda i: {"btid": i % 2, "image": np.full((48, 64, 3), i, np.uint8), "xy": np.full((8, 2), 1.5 * i)},
    "numbers": lambda i: {"n": i, "x": 0.5 * i, "b": i > 1, "f": np.float32(i), "u": np.uint16(i), "big": 2**40 + i},
    "texts": lambda i: {"name": f"cube {i}", "raw": bytes([i]), "mixed": [f"a{i}", i]},
    "nested": lambda i: {"a": {"b": [LARGE + i, {"c": (LARGE * 0.5, i)}]}, "a.b": LARGE * i},
    "namedtuple": lambda i: Pose(LARGE + i, 0.1 * i),
    "tuple": lambda i: (LARGE + i, LARGE[:2] + i, i),
    "one array": lambda i: LARGE + i,
    "one number": lambda i: i,
    "flipped": lambda i: {"image": (LARGE + i)[::-1, ::2], "small": np.arange(9.0)[::-1] * i},
    "big endian": lambda i: {"image": (LARGE + i).astype(">i4"), "small": np.arange(3, dtype=">f8")},
    "read only": lambda i: {
        "image": np.frombuffer((LARGE + i).tobytes(), np.int32),
        "small": np.frombuffer(b"abc", np.int8),
    },
    "transposed": lambda i: {"image": np.asfortranarray(LARGE + i), "chw": np.zeros((20, 30, 4)).transpose(2, 0, 1)},
    "scalars": lambda i: {"zero": np.array(2.5 * i), "none": np.empty((0, 4), np.float32)},
    "dtypes": lambda i: {
        str(np.dtype(t)): (LARGE + i).astype(t) for t in (bool, "u2", "u4", "u8", "i8", "f2", "f4", "f8", "c8", "c16")
    },
    "tensors": lambda i: {
        "image": torch.from_numpy(LARGE + i),
        "half": torch.full((3000,), i, dtype=torch.bfloat16),
        "grad": torch.full((3000,), 1.0 * i, requires_grad=True),
        "small": torch.arange(3) + i,
    },
    "lazy tensors": lambda i: {
        "conjugate": torch.from_numpy(LARGE * 1j + i).conj(),
        "negative": torch.from_numpy(LARGE * 1j + i).conj().imag,
        "small": torch.full((3,), 1j * i).conj(),
    },
}


@pytest.mark.parametrize("copy_threads", [1, 3])
@pytest.mark.parametrize("kind", ITEMS)
@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_batch_is_that_of_the_default_collation(kind: str, copy_threads: int, count: int) -> None:
    items = [ITEMS[kind](i) for i in range(count)]
    memory = HostMemory(copy_threads, spares=2)
    batch = Batch(memory, size=5)
    for start in range(0, count, 2):
        batch.add(items[start : start + 2])
    result = batch.collate()
    memory.hand_over(result, [mark for mark in [memory.mark()] if mark is not None])
    memory.close()
    check_equal(result, default_collate([to_tensors(item) for item in items]))


@pytest.mark.parametrize("count", [1, 3])
def test_a_table_of_texts_stays_one_list_and_is_not_transposed(count: int) -> None:
    table = {"instance_names": ["car", "tree", "road"], "nested": {"category_names": ["", "car"]}}
    items = [{**table, "names": [f"a{i}", "b"], "none": [], "image": LARGE + i} for i in range(count)]
    batch = Batch(HostMemory(1, spares=2), size=count)
    batch.add(items)
    for made in (batch.collate(), collate_here([to_tensors(item) for item in items])):
        assert made["instance_names"] == ["car", "tree", "road"]
        assert made["nested"] == {"category_names": ["", "car"]}
        assert made["image"].shape == (count, 30, 100)
        assert made["none"] == []
        if count > 1:  # they differ: as the default collation has it
            assert made["names"] == [("a0", "a1", "a2"), ("b", "b", "b")]


def check_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            check_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check_equal(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("items", "error", "words"),
    [
        (
            [{"depth": np.zeros((40, 60))}, {"depth": np.zeros((40, 61))}],
            RuntimeError,
            [r"'depth'", r"\(40, 60\)", r"\(40, 61\) \(float64\) in item 1"],
        ),
        ([{"a": [np.zeros((40, 60))]}, {"a": [np.zeros(3000)]}], RuntimeError, [r"'a.0'", r"\(3000,\)"]),
        ([{"xy": np.zeros(3)}, {"xy": np.zeros(4)}], RuntimeError, [r"'xy'", r"\(3,\)", r"\(4,\)"]),
        ([{"names": ["a"]}, {"names": ["a", "b"]}], RuntimeError, [r"'names'", "equal size"]),
        ([{"xy": np.zeros(3)}, {}], KeyError, ["'xy' is in 1 of 2", "missing"]),
        ([{"xy": np.zeros(3000)}, {"xy": "none"}], TypeError, [r"'xy'", "str"]),
        ([{"xy": None}, {"xy": None}], TypeError, [r"'xy'", "NoneType"]),
        ([{"at": np.zeros(3000, "M8[s]")}] * 2, TypeError, [r"'at'", "datetime64"]),
    ],
)
def test_what_makes_no_batch_is_the_default_collations_error_with_the_name_of_the_field(
    items: list[Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error):
        default_collate([to_tensors(item) for item in items])
    batch = Batch(HostMemory(1, spares=2), size=2)
    with pytest.raises(error) as raised:
        batch.add(items)
        batch.collate()
    for word in words:
        raised.match(word)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([{"i": 1}, {"i": 2, "xy": np.zeros(3000)}], "Field 'xy' is in 1 of 2 items"),
        ([{"i": 1}, {"i": 2, "xy": "text"}], "Field 'xy' is in 1 of 2 items"),
        ([{"i": 1, "xy": 0}, {"xy": 0}], "Field 'i' is in 1 of 2 items"),
        ([{"a": {"b": {}}}, {"a": {"b": {"xy": 3}}}], "In field 'a': Field 'xy' is in 1 of 2 items"),
        ([[{"xy": 3}], [{"xy": 3, "z": 3}]], "Field 'z' is in 1 of 2 items"),
    ],
)
def test_a_field_that_only_some_items_have_is_an_error_that_names_it(items: list[Any], words: str) -> None:
    """The default collation leaves out what the first item lacks."""
    batch = Batch(HostMemory(1, spares=2), size=2)
    batch.add(items)
    for collated in (batch.collate, lambda: collate_here([to_tensors(item) for item in items])):
        with pytest.raises(FieldMissing, match=words):
            collated()


def test_batches_without_workers_name_the_field_too() -> None:
    for value, words in ((None, "NoneType"), ({1}, "set"), ([1, 2], "equal size")):
        with pytest.raises((TypeError, RuntimeError), match=f"Field 'xy' makes no batch: .*{words}.*transform"):
            collate_here([{"xy": value}, {"xy": value if value != [1, 2] else [1]}])


@pytest.mark.parametrize(
    ("first", "later", "what"),
    [
        ("none", np.zeros(3000), "'at' is an array in 1 of 2 items, and str"),
        (b"none", np.zeros(3), "'at' is an array in 1 of 2 items, and bytes"),
        (3, np.zeros(3), "'at' is an array in 1 of 2 items, and int"),
        (["a", "b"], [np.zeros(3000), "b"], "'at.0' is an array in 1 of 2 items"),
        ({"x": "a"}, {"x": np.zeros(3000)}, "'at.x' is an array in 1 of 2 items"),
    ],
)
def test_what_is_an_array_in_some_items_only_makes_no_batch(first: Any, later: Any, what: str) -> None:
    """The default collation would make a list of texts and tensors of some of these."""
    batch = Batch(HostMemory(1, spares=2), size=2)
    batch.add([{"at": first}, {"at": later}])
    with pytest.raises(TypeError, match=f"Field 'at' makes no batch: {what}"):
        batch.collate()


def test_tuples_of_which_some_have_arrays_make_no_batch() -> None:
    batch = Batch(HostMemory(1, spares=2), size=2)
    batch.add([("a", 1), (np.zeros(3000), 1)])
    with pytest.raises(TypeError, match="'0' is an array in 1 of 2 items"):
        batch.collate()


def test_frames_of_different_dtypes_make_no_batch() -> None:
    """The default collation would turn them all into the larger one."""
    batch = Batch(HostMemory(1, spares=2), size=2)
    with pytest.raises(RuntimeError, match="'depth'.*float64.*float32"):
        batch.add([{"depth": np.zeros((40, 60))}, {"depth": np.zeros((40, 60), np.float32)}])


def test_what_was_collated_keeps_nothing_of_its_items() -> None:
    slot = np.zeros((2, 5000), np.uint8)
    item = {"image": slot[0], "part": slot[1, :10], "nested": [slot[1]], "row": torch.from_numpy(slot[0, :100])}
    batch = Batch(HostMemory(1, spares=2), size=2)
    batch.add([item, item])
    result = batch.collate()
    slot[:] = 1
    assert not any(tensor.any() for tensor in (result["image"], result["part"], result["nested"][0], result["row"]))
