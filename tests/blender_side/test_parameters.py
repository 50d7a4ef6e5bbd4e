"""What a trainer sets while Blender renders, and which of it a picture shows."""

from typing import Any

import numpy as np

from torch_side import BlenderLauncher, Parameters, RemoteIterableDataset

from .conftest import CUBE_BLEND, SCRIPTS


def test_a_picture_shows_the_parameters_whose_version_it_carries(a_blender: Any) -> None:
    with (
        BlenderLauncher(
            CUBE_BLEND,
            SCRIPTS / "parameters.py",
            named_sockets=["DATA", "PARAMS"],
            blender=a_blender.argument,
            progress=False,
        ) as launcher,
        Parameters(launcher.launch_info.addresses["PARAMS"]) as parameters,
    ):
        scales = {parameters.set(scale=np.full(3, 1.0)): 1.0}
        pictures: dict[int, set[bytes]] = {}
        dataset = RemoteIterableDataset(launcher.launch_info.addresses["DATA"], latest=True, output="numpy")
        for item in dataset:
            version = item["parameters_version"]
            np.testing.assert_allclose(item["scale"], scales[version], rtol=1e-6)
            pictures.setdefault(version, set()).add(item["image"].tobytes())
            if version == 4:
                break
            if version == parameters.version:
                scale = 1.0 + 0.3 * version
                scales[parameters.version + 1] = scale
                parameters.set(scale=np.full(3, scale))
        assert all(len(alike) == 1 for alike in pictures.values())
        assert len({picture for alike in pictures.values() for picture in alike}) == len(pictures) >= 3
