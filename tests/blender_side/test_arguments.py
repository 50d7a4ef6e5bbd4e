"""What a script finds of the launcher's arguments."""

import pickle

import pytest

from blender_side.arguments import parse_blendtorch_args
from blendtorch_shm.errors import ConfigurationError, SocketNotFound


@pytest.mark.parametrize(
    ("arguments", "there"),
    [(["-btsockets", "left eye=tcp://127.0.0.1:1", "DATA=tcp://127.0.0.1:2"], "'left eye', 'DATA'"), ([], "none")],
)
def test_a_socket_that_is_not_there_is_an_error_that_lists_those_that_are(arguments: list[str], there: str) -> None:
    sockets = parse_blendtorch_args(["--", *arguments])[0].btsockets
    with pytest.raises(KeyError) as caught:
        sockets["DAT"]
    assert isinstance(caught.value, SocketNotFound)
    assert isinstance(caught.value, ConfigurationError)
    assert f"no socket 'DAT': it has {there}." in str(caught.value)
    assert "named_sockets=['DAT']" in str(caught.value)
    assert "DAT" not in sockets
    assert sockets.get("DAT") is None


def test_sockets_are_an_ordinary_dict_wherever_they_are_sent() -> None:
    sockets = parse_blendtorch_args(["--", "-btsockets", "DATA=tcp://127.0.0.1:2"])[0].btsockets
    arrived = pickle.loads(pickle.dumps(sockets))
    assert type(arrived) is dict
    assert arrived == {"DATA": "tcp://127.0.0.1:2"}
