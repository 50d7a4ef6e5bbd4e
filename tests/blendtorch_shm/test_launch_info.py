"""The file that tells a reader where the instances are."""

import dataclasses
import io
import json
import os
import secrets
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from blendtorch_shm.errors import ConfigurationError, InstanceDied, SocketNotFound
from blendtorch_shm.launch.address import Address, Twin, sign_of_launch, sign_of_port
from blendtorch_shm.launch.info import LaunchInfo
from blendtorch_shm.launch.keys import make_keys
from blendtorch_shm.memory.layout import VERSION

KEYS = make_keys()[1]


def launch_info(twin: Twin | None = None) -> LaunchInfo:
    twin = twin or Twin("/run/blendtorch-01234567", "01234567", "cafe", "DATA", 0)
    address = Address("tcp://10.0.0.1:11000", twin, KEYS)
    return LaunchInfo({"DATA": [address], "CTRL": []}, ["blender --python x.py"])


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    LaunchInfo.save_json(tmp_path / "info.json", launch_info())
    loaded = LaunchInfo.load_json(str(tmp_path / "info.json"))
    assert loaded.addresses == {"DATA": ["tcp://10.0.0.1:11000"], "CTRL": []}
    assert loaded.addresses["DATA"][0].keys == KEYS
    assert loaded.commands == ["blender --python x.py"]
    assert loaded.processes is None


def test_an_address_has_its_twin_where_the_launchs_shared_memory_is(tmp_path: Path, twin: Twin) -> None:
    for name, found in [("here", twin), ("elsewhere", dataclasses.replace(twin, nonce="0" * 32))]:
        LaunchInfo.save_json(tmp_path / name, launch_info(found))
    assert LaunchInfo.load_json(tmp_path / "here").addresses["DATA"][0].twin == twin
    assert LaunchInfo.load_json(tmp_path / "elsewhere").addresses["DATA"][0].twin is None


LAUNCH = secrets.token_hex(4)


def on_loopback(tmp_path: Path, port: int, count: int = 1) -> Path:
    """A file about a launch whose shared memory is nowhere, and that can be reached over loopback alone."""
    twins = [Twin(f"/run/blendtorch-{LAUNCH}", LAUNCH, "cafe", "DATA", btid) for btid in range(count)]
    addresses = [Address(f"tcp://127.0.0.1:{port + twin.btid}", twin) for twin in twins]
    LaunchInfo.save_json(tmp_path / "info.json", LaunchInfo({"DATA": addresses}, ["blender"] * count))
    return tmp_path / "info.json"


def test_a_launch_that_is_over_is_an_error_at_once_that_says_so(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens there, and nobody else gets it
        path = on_loopback(tmp_path, free.getsockname()[1])
        with pytest.raises(InstanceDied) as caught:
            LaunchInfo.load_json(path)
    message = str(caught.value)
    assert all(text in message for text in (str(path), LAUNCH, "127.0.0.1", "not running", "Start it again"))


def test_a_launch_in_a_container_that_shares_loopback_alone_is_not_over(tmp_path: Path) -> None:
    """Its instances listen, or it lives and they are about to."""
    with socket.create_server(("127.0.0.1", 0)) as instance:
        path = on_loopback(tmp_path, instance.getsockname()[1] - 1, count=2)
        assert len(LaunchInfo.load_json(path).addresses["DATA"]) == 2
    with socket.socket() as port, socket.socket(socket.AF_UNIX) as sign:
        port.bind(("127.0.0.1", 0))
        sign.bind(f"\0{sign_of_launch(LAUNCH)}")
        path = on_loopback(tmp_path, port.getsockname()[1])
        assert LaunchInfo.load_json(path).addresses["DATA"][0].twin is None


def test_another_launch_on_the_same_port_is_not_taken_for_the_one_that_is_over(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as instance, socket.socket(socket.AF_UNIX) as sign:
        port = instance.getsockname()[1]
        sign.bind(f"\0{sign_of_port('127.0.0.1', port)}")
        with pytest.raises(InstanceDied, match=f"not running.*127.0.0.1:{port}"):
            LaunchInfo.load_json(on_loopback(tmp_path, port))


def test_a_file_of_plain_blendtorch_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    path.write_text('{"addresses": {"DATA": ["tcp://10.0.0.1:11000"]}, "commands": ["blender"]}')
    address = LaunchInfo.load_json(path).addresses["DATA"][0]
    assert (address, address.twin, address.keys) == ("tcp://10.0.0.1:11000", None, None)


def test_plain_strings_can_be_saved(tmp_path: Path) -> None:
    LaunchInfo.save_json(tmp_path / "info.json", LaunchInfo({"DATA": ["tcp://10.0.0.1:11000"]}, []))  # type: ignore[list-item]
    assert LaunchInfo.load_json(tmp_path / "info.json").addresses == {"DATA": ["tcp://10.0.0.1:11000"]}


def test_secrets_are_not_shown() -> None:
    assert KEYS.client_secret not in repr(launch_info())


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
    addresses = LaunchInfo.load_json(path).addresses
    assert addresses["DATA"] == ["tcp://10.0.0.1:11000"]
    with pytest.raises(SocketNotFound, match=r"no socket 'IMAGE': it has 'DATA'.*named_sockets=\['IMAGE'\]"):
        addresses["IMAGE"]
    assert os.listdir(tmp_path) == ["info.json"]


TWIN = {"directory": "", "launch": "01234567", "nonce": "", "name": "DATA", "btid": 0}


def with_details(**details: Any) -> str:
    return json.dumps({"version": VERSION, "addresses": {"DATA": ["tcp://x"]}, "details": {"tcp://x": details}})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "`object`, got `array`"),
        ("{}", "`addresses`"),
        ('{"addresses": {"DATA": "tcp://x"}}', r"`array`, got `str` - at `\$.addresses"),
        ('{"addresses": {"DATA": [1]}}', r"`str`, got `int` - at `\$.addresses"),
        ('{"addresses": {}, "commands": 3}', r"at `\$.commands"),
        (json.dumps({"version": VERSION, "addresses": {}, "details": 3}), r"at `\$.details"),
        (with_details(twin={"launch": 3}), r"at `\$.details.*twin"),
        (with_details(twin={**TWIN, "launch": "../../etc"}), r"launch. - at `\$.details"),
        (with_details(twin={**TWIN, "name": "a=b"}), r"name of a socket. - at `\$.details"),
        (with_details(keys={**dataclasses.asdict(KEYS), "client_secret": "y"}), "client_secret"),
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


def test_launch_information_of_another_version_is_an_error_that_names_both(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    LaunchInfo.save_json(path, launch_info())
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": VERSION + 1}))
    with pytest.raises(ConfigurationError, match=rf"written by version {VERSION + 1} .* understands {VERSION}:"):
        LaunchInfo.load_json(path)


def test_launch_information_of_version_2_which_named_none_is_that_error_too(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    LaunchInfo.save_json(path, launch_info())
    content = json.loads(path.read_text())
    del content["version"]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=rf"written by version 2 .* understands {VERSION}:"):
        LaunchInfo.load_json(path)
