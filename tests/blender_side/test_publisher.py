"""What a script in a real Blender publishes, received."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torch_side import BlenderLauncher, RemoteIterableDataset

from .conftest import CUBE_BLEND, SCRIPTS


def test_blenders_values_arrive_as_arrays_and_pictures_are_rendered_into_the_slot(
    blender: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("of_the_user.py").write_text("WHERE = __file__")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")
    with BlenderLauncher(
        CUBE_BLEND, SCRIPTS / "values.py", named_sockets=["left eye"], blender=blender.argument, progress=False
    ) as launcher:
        dataset = RemoteIterableDataset(launcher.launch_info.addresses["left eye"], max_items=5, output="numpy")
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
    assert values["from PYTHONPATH"] == [str(tmp_path / "of_the_user.py"), str(tmp_path)]
    assert values["is behind Blender's own"] == (blender.form == "executable")
    assert "'left eye'" in values["no such socket"]
    assert values["camera of another scene"] == "Camera"
    assert values["viewport"] == ((48, 64), "VIEW_3D", "VIEW_3D", "WINDOW")
    assert [picture["lent"] for picture in pictures] == [False, True, True, True]
    for picture in pictures:
        assert picture["image"].shape == (48, 64, 3)
        assert picture["image"].sum() == picture["sum"]
