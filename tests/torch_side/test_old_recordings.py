"""Recordings of earlier versions stay readable. The file in data/ was written by commit 98c0429."""

from pathlib import Path

import numpy as np

from torch_side import FileDataset

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
