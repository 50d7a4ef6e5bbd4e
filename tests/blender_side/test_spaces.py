"""Spaces as plain data, made without gymnasium; whoever has gymnasium may give its own."""

from typing import Any

import numpy as np
import pytest

from blender_side import spaces
from blendtorch_shm.errors import ConfigurationError


def test_a_box_has_the_shape_of_its_limits_unless_one_is_given() -> None:
    assert spaces.Box(0, 255, shape=(4, 5, 3), dtype=np.uint8) == {
        "type": "Box",
        "low": 0,
        "high": 255,
        "shape": [4, 5, 3],
        "dtype": "uint8",
    }
    box = spaces.Box([-1, -2], 3)
    assert box["shape"] == [2]
    assert box["low"].tolist() == [-1, -2]
    assert box["high"] == 3
    assert box["dtype"] == "float32"
    assert spaces.Box(-np.inf, np.inf)["shape"] == []


def test_limits_that_are_all_the_same_travel_as_one_number() -> None:
    box = spaces.Box(np.zeros((480, 640, 3), np.uint8), np.full((480, 640, 3), 255, np.uint8), dtype=np.uint8)
    assert (box["low"], box["high"], box["shape"]) == (0, 255, [480, 640, 3])


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (dict(low=[1, 2], high=[3, 4, 5]), "do not fit each other"),
        (dict(low=[1, 2], high=3, shape=(3,)), "do not fit each other"),
        (dict(low=0, high=1, shape=(2.5,)), "do not fit each other"),
        (dict(low=[0, 2], high=1), "above"),
        (dict(low=np.nan, high=1), "above"),
    ],
)
def test_a_box_whose_limits_make_no_sense_is_refused(limits: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        spaces.Box(**limits)


def test_the_other_spaces_are_their_arguments() -> None:
    assert spaces.Discrete(3) == {"type": "Discrete", "n": 3, "start": 0}
    assert spaces.Discrete(np.int64(3), start=-1) == {"type": "Discrete", "n": 3, "start": -1}
    assert spaces.MultiDiscrete([2, 5]) == {"type": "MultiDiscrete", "nvec": [2, 5]}
    assert spaces.MultiBinary(4) == {"type": "MultiBinary", "n": 4}
    assert spaces.MultiBinary((2, 3)) == {"type": "MultiBinary", "n": [2, 3]}
    inner = spaces.Discrete(2)
    assert spaces.Dict(a=inner, b=spaces.Tuple(inner)) == {
        "type": "Dict",
        "spaces": {"a": inner, "b": {"type": "Tuple", "spaces": [inner]}},
    }


@pytest.mark.parametrize("make", [lambda: spaces.Discrete(0), lambda: spaces.MultiDiscrete([3, 0])])
def test_a_space_without_a_value_is_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError, match="less than 1"):
        make()


def test_what_is_no_space_is_refused_and_told_what_is() -> None:
    for thing in (3, "Box", {"type": "Sphere"}, {"a": spaces.Discrete(2)}, np.zeros(2)):
        with pytest.raises(ConfigurationError, match="is no space.*Box.*Discrete"):
            spaces.plain(thing)
    with pytest.raises(ConfigurationError, match="is no space"):
        spaces.Dict(a=3)
    assert spaces.plain(None) is None


def test_gymnasiums_spaces_say_the_same() -> None:
    gymnasium = pytest.importorskip("gymnasium").spaces
    theirs = gymnasium.Dict(
        image=gymnasium.Box(0, 255, (4, 4, 3), np.uint8),
        rest=gymnasium.Tuple(
            (gymnasium.Discrete(3, start=1), gymnasium.MultiBinary(2), gymnasium.MultiDiscrete([2, 3]))
        ),
    )
    ours = spaces.Dict(
        image=spaces.Box(0, 255, (4, 4, 3), np.uint8),
        rest=spaces.Tuple(spaces.Discrete(3, start=1), spaces.MultiBinary(2), spaces.MultiDiscrete([2, 3])),
    )
    assert spaces.plain(theirs) == ours
    with pytest.raises(ConfigurationError, match="start elsewhere"):
        spaces.plain(gymnasium.MultiDiscrete([2, 3], start=[1, 0]))
    with pytest.raises(ConfigurationError, match="is no space"):
        spaces.plain(gymnasium.Text(3))
