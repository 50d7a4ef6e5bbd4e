"""The file that tells a reader where the instances are."""

import io
import os
import stat
from pathlib import Path

import pytest

from blendtorch_shm.address import Address, Twin
from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.launch_info import LaunchInfo


def launch_info() -> LaunchInfo:
    twin = Twin("/run/blendtorch-01234567", "01234567", "DATA", 0)
    return LaunchInfo({"DATA": [Address("tcp://10.0.0.1:11000", twin)], "CTRL": []}, ["blender --python x.py"])


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    LaunchInfo.save_json(tmp_path / "info.json", launch_info())
    loaded = LaunchInfo.load_json(str(tmp_path / "info.json"))
    assert loaded.addresses == {"DATA": ["tcp://10.0.0.1:11000"], "CTRL": []}
    assert loaded.addresses["DATA"][0].twin is None
    assert loaded.commands == ["blender --python x.py"]
    assert loaded.processes is None


def test_file_objects_work_too() -> None:
    file = io.StringIO()
    LaunchInfo.save_json(file, launch_info())
    assert LaunchInfo.load_json(io.StringIO(file.getvalue())).addresses["DATA"] == ["tcp://10.0.0.1:11000"]


def test_only_this_user_can_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    path.write_text("old")
    path.chmod(0o644)
    LaunchInfo.save_json(path, launch_info())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["info.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    LaunchInfo.save_json(path, launch_info())
    with pytest.raises(TypeError):
        LaunchInfo.save_json(path, LaunchInfo({}, [b"not text"]))  # type: ignore[list-item]
    assert LaunchInfo.load_json(path).addresses["DATA"] == ["tcp://10.0.0.1:11000"]
    assert os.listdir(tmp_path) == ["info.json"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "a list, not an object"),
        ("{}", "'addresses' must map"),
        ('{"addresses": {"DATA": "tcp://x"}}', "'addresses' must map"),
        ('{"addresses": {"DATA": [1]}}', "'addresses' must map"),
        ('{"addresses": {}, "commands": 3}', "'commands' must be"),
    ],
)
def test_a_file_that_is_something_else_is_a_clear_error(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "info.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        LaunchInfo.load_json(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.json.*No such file"):
        LaunchInfo.load_json(tmp_path / "none.json")
