"""What a producer pushes to a consumer that sleeps: which slot became READY.

A token is a hint and gives no ownership: the slot table says who may claim what. It comes out of a socket, so whatever it says
is checked; see :func:`unpack`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..memory.layout import MAX_RINGS, MAX_SLOTS

_LAYOUT = struct.Struct("<QIIQ")
NBYTES = _LAYOUT.size


class Token(NamedTuple):
    """A slot in which a message lies."""

    key: int
    """Of the stream, 64 bits."""
    ring: int
    """Its number in the stream, less than :data:`~blendtorch_shm.memory.layout.MAX_RINGS`."""
    slot: int
    """Its number in the ring, less than :data:`~blendtorch_shm.memory.layout.MAX_SLOTS`."""
    sequence: int
    """Number of the message in its stream, 64 bits."""


def pack(key: int, ring: int, slot: int, sequence: int) -> bytes:
    """The bytes of a :class:`Token`: :data:`NBYTES`, little-endian.

    >>> unpack(pack(7, 0, 3, 12))
    Token(key=7, ring=0, slot=3, sequence=12)

    Raises:
        struct.error: a number has more bits than its place.
    """
    return _LAYOUT.pack(key, ring, slot, sequence)


def unpack(data: bytes) -> Token | None:
    """The token that these bytes are; None if they are none."""
    if len(data) != NBYTES:
        return None
    token = Token._make(_LAYOUT.unpack(data))
    return token if token.ring < MAX_RINGS and token.slot < MAX_SLOTS else None
