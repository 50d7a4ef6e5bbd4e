"""What a socket may be called, and the files that it has then."""

import os

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.launch.address import SHARED_MEMORY, Twin, is_socket_name

names = st.text(min_size=1, max_size=8) | st.text("a-.0%2/", min_size=1, max_size=12)


def files_of(name: str, btid: int) -> set[str]:
    twin = Twin("/tmp/logs", "01234567", "0" * 32, name, btid)
    shared = {SHARED_MEMORY + twin.prefix + suffix for suffix in ("", ".0", ".12")}
    return shared | {twin.lock_path, twin.bell_path} | {twin.inbox_path(consumer) for consumer in (0, 12)}


@given(names, names, st.sampled_from([0, 1, 10, 99999]), st.sampled_from([0, 1, 10]))
def test_two_sockets_never_meet_in_a_file(one: str, other: str, btid: int, others: int) -> None:
    assume(is_socket_name(one) and is_socket_name(other) and (one, btid) != (other, others))
    assert not files_of(one, btid) & files_of(other, others)
    for path in files_of(one, btid):
        folder, file = os.path.split(path)
        assert folder in (SHARED_MEMORY, f"{SHARED_MEMORY}/blendtorch-01234567")
        assert len(path.encode()) <= 107  # what ZeroMQ can bind
        assert file.isascii()
        assert file.isprintable()
        assert " " not in file


@pytest.mark.parametrize("name", ["DATA", "cam-1", "a.b", "left eye", "a/b", "..", "50%", "摄像头", "x" * 48])
def test_sockets_may_be_called_what_people_call_them(name: str) -> None:
    assert is_socket_name(name)
    assert len(files_of(name, 0)) == 7


@pytest.mark.parametrize("name", ["", "a=b", "-btid", "a\nb", "a\0b", "\ud800", "x" * 49, " " * 17])
def test_what_could_not_be_told_to_an_instance_is_no_name(name: str) -> None:
    assert not is_socket_name(name)
    with pytest.raises(ConfigurationError, match="not the name of a socket"):
        files_of(name, 0)
