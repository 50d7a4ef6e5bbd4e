"""What a script in a real Blender publishes, received."""

from typing import Any

import numpy as np

from torch_side import BlenderLauncher, RemoteIterableDataset

from .conftest import CUBE_BLEND, SCRIPTS


def test_blenders_values_arrive_as_arrays_and_pictures_are_rendered_into_the_slot(blender: Any) -> None:
    with BlenderLauncher(
        CUBE_BLEND, SCRIPTS / "values.py", named_sockets=["DATA"], blender=blender.argument, progress=False
    ) as launcher:
        dataset = RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=5, output="numpy")
        values, *pictures = list(dataset)
    np.testing.assert_array_equal(values["vector"], [1, 2, 3])
    np.testing.assert_array_equal(values["matrix"], np.diag([1, 2, 3, 4]))
    np.testing.assert_array_equal(values["nested"]["euler"][0], [0.5, 0, 0])
    np.testing.assert_array_equal(values["nested"]["color"][0], [0.25, 0.5, 1])
    np.testing.assert_array_equal(values["quaternion"], [1, 0, 0, 0])
    np.testing.assert_array_equal(values["location"], [1, 2, 3])
    assert values["matrix_world"].shape == (4, 4)
    assert values["dimensions"].shape == (3,)
    np.testing.assert_array_equal(values["buffer"], np.arange(3200).reshape(20, 40, 4))
    assert [picture["lent"] for picture in pictures] == [False, True, True, True]
    for picture in pictures:
        assert picture["image"].shape == (48, 64, 3)
        assert picture["image"].sum() == picture["sum"]
