"""Of which arrays an observation consists, and what is said of one that is none of its space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blender_side import spaces
from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.message.leaves import Leaf, heard, leaves_of, said

IMAGE = spaces.Box(0, 255, shape=(2, 3), dtype=np.uint8)
NESTED = spaces.Dict(
    image=IMAGE,
    rest=spaces.Tuple(spaces.Discrete(5, 2), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary((2, 2))),
    flags=spaces.MultiBinary(3),
)
LEAVES = [
    Leaf(("image",), (2, 3), np.dtype(np.uint8)),
    Leaf(("rest", 0), (), np.dtype(np.int64)),
    Leaf(("rest", 1), (2,), np.dtype(np.int64)),
    Leaf(("rest", 2), (2, 2), np.dtype(np.int8)),
    Leaf(("flags",), (3,), np.dtype(np.int8)),
]


def test_leaves_are_in_the_order_of_their_space_and_travel_as_plain_data() -> None:
    assert leaves_of(NESTED) == LEAVES
    assert heard(said(LEAVES)) == LEAVES
    assert [leaf.nbytes for leaf in LEAVES] == [6, 8, 16, 4, 3]


def test_a_leaf_is_found_and_is_the_very_array() -> None:
    image = np.zeros((2, 3), np.uint8)
    observation = {"flags": [0, 1, 1], "image": image, "rest": (3, np.array([1, 2]), np.zeros((2, 2), np.int8))}
    found = [leaf.of(observation) for leaf in LEAVES]
    assert found[0] is image
    assert [(array.shape, array.dtype) for array in found] == [(leaf.shape, leaf.dtype) for leaf in LEAVES]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (3, np.float32),
        (0.5, np.float32),
        (np.float64(0.5), np.float32),
        (True, np.int8),
        (255, np.uint8),
        (np.int64(7), np.uint8),
        (np.int16(-3), np.float16),
    ],
)
def test_values_that_are_the_same_in_the_spaces_dtype_are_converted(value: Any, dtype: Any) -> None:
    array = Leaf((), (), np.dtype(dtype)).of(value)
    assert array.dtype == dtype
    assert array == value


@pytest.mark.parametrize(
    ("leaf", "observation", "message"),
    [
        (LEAVES[0], {"image": np.zeros((3, 2), np.uint8)}, r"\['image'\].*shape \(3, 2\), its space has \(2, 3\)"),
        (LEAVES[0], {"image": np.zeros((2, 3))}, r"\['image'\].*dtype float64, its space has uint8"),
        (LEAVES[0], {}, r"no \['image'\], which its space has"),
        (LEAVES[0], None, r"no \['image'\], which its space has: None"),
        (LEAVES[2], {"rest": (1,)}, r"no \['rest'\]\[1\], which its space has"),
        (Leaf((), (), np.dtype(np.uint8)), 256, "The array.*int64.*uint8"),
        (Leaf((), (), np.dtype(np.uint8)), -1, "The array.*int64.*uint8"),
        (Leaf((), (), np.dtype(np.uint8)), np.uint16(300), "The array.*uint16.*uint8"),
        (Leaf((), (), np.dtype(np.int8)), 300, "The array.*int64.*int8"),
        (Leaf((), (1,), np.dtype(np.int32)), [2**40], "The array.*int64.*int32"),
        (Leaf((), (), np.dtype(np.int64)), 0.5, "The array.*float64.*int64"),
        (Leaf((), (3,), np.dtype(np.int64)), None, r"The array.*shape \(\)"),
        (Leaf((), (2,), np.dtype(np.float32)), ["a", "b"], "The array.*dtype <U1"),
    ],
)
def test_an_observation_that_is_none_of_the_space_is_told(leaf: Leaf, observation: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        leaf.of(observation)


@pytest.mark.parametrize(
    "space",
    [{}, {"type": "Sphere"}, {"type": "Box"}, {"type": "Box", "shape": 3, "dtype": "u1"}, {"type": "Dict"}, None, 3],
)
def test_what_is_no_space_is_told(space: Any) -> None:
    with pytest.raises(ConfigurationError, match="is no space"):
        leaves_of(space)
