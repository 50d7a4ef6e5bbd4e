"""A number of a slot is 24 bytes, and nothing else is one."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from blendtorch_shm.memory.layout import MAX_RINGS, MAX_SLOTS
from blendtorch_shm.message import token
from blendtorch_shm.message.token import Token

GOLDEN = bytes.fromhex("8877665544332211 02000000 ff0f0000 0900000000000000")


def test_a_token_is_byte_for_byte_as_documented() -> None:
    assert token.pack(0x1122334455667788, 2, 4095, 9) == GOLDEN
    assert token.unpack(GOLDEN) == Token(key=0x1122334455667788, ring=2, slot=4095, sequence=9)


words = st.integers(0, 2**64 - 1)


@given(words, st.integers(0, MAX_RINGS - 1), st.integers(0, MAX_SLOTS - 1), words)
def test_every_slot_has_a_token(key: int, ring: int, slot: int, sequence: int) -> None:
    assert token.unpack(token.pack(key, ring, slot, sequence)) == (key, ring, slot, sequence)


@pytest.mark.parametrize(
    "data", [b"", GOLDEN[:-1], GOLDEN + b"\0", GOLDEN * 2, bytes(12) + b"\0\x10\0\0" + bytes(8), b"\xff" * 24], ids=repr
)
def test_what_is_no_token_is_none(data: bytes) -> None:
    assert token.unpack(data) is None
