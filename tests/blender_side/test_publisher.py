"""What a script in a real Blender publishes, received."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blender_side import DataPublisher
from blendtorch_shm.errors import SegmentError
from blendtorch_shm.launch.address import Address
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.transport import open_source
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


# -- one after the other, without Blender ------------------------------------------------------------------------------


@pytest.fixture
def address() -> Iterator[Address]:
    """Of an instance's socket."""
    directory = LaunchDirectory()
    try:
        yield Address("tcp://127.0.0.1:*", directory.create().twin("DATA", 0))
    finally:
        directory.remove()


def numbers(address: Address, count: int) -> list[int]:
    with open_source([address]) as source:
        messages = [source.receive(30) for _ in range(count)]
        return [message.fields["number"] for message in messages if message is not None]


def test_a_forgotten_publisher_gives_its_socket_to_the_next_one_and_nothing_is_lost(address: Address) -> None:
    publisher = DataPublisher(address)
    for number in range(3):
        publisher.publish(number=number, image=np.zeros(5000))
    del publisher
    in_a_cycle = {}
    in_a_cycle["publisher"], in_a_cycle["itself"] = DataPublisher(address), in_a_cycle
    in_a_cycle["publisher"].publish(number=3)
    del in_a_cycle
    with DataPublisher(address) as publisher:
        publisher.publish(number=4, image=np.zeros(50_000))
        assert numbers(address, 5) == [0, 1, 2, 3, 4]


def test_a_second_publisher_beside_the_first_is_an_error_that_says_whose_the_first_is(address: Address) -> None:
    with DataPublisher(address) as publisher:
        with pytest.raises(SegmentError, match=r"This very process .* DATA already.*close\(\)"):
            DataPublisher(address)
        publisher.publish(number=0)
    with DataPublisher(address) as publisher:
        publisher.publish(number=1)
        assert numbers(address, 2) == [0, 1]
