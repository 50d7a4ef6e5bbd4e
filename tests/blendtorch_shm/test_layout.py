"""The bytes in shared memory, to the letter: both sides may be different builds."""

import numpy as np

from blendtorch_shm.memory import layout
from blendtorch_shm.memory.ring import Ring
from blendtorch_shm.memory.segment import private
from blendtorch_shm.memory.states import State


def test_a_ring_segment_is_byte_for_byte_as_documented() -> None:
    segment = private(layout.ring_nbytes(3, 4096))
    ring = Ring.format(segment, key=0x1122334455667788, number=2, num_slots=3, slot_nbytes=4096)
    assert ring.loan() == 0
    assert ring.loan() == 1
    ring.memory(1)[:3] = b"abc"
    ring.commit(1, sequence=9, payload_nbytes=3, header=b"header", flags=1)
    assert ring.claim(1, owner=5)

    def words(*values: int) -> bytes:
        return np.array(values, "<u8").tobytes()

    expected = bytearray(4096 + 3 * 4096)
    expected[0:48] = b"bt--ring" + words(6, 0x1122334455667788, 2, 3, 4096)
    expected[64:67] = bytes([State.LOANED, State.LEASED, State.FREE])
    expected[192:240] = words(1, 9, 5, 3, 6, 1)
    expected[8192:8195] = b"abc"
    expected[8256:8262] = b"header"
    assert bytes(segment.view) == bytes(expected)


def test_the_control_segment_has_the_documented_fields() -> None:
    def offsets(record: np.dtype[np.void]) -> dict[str, int]:
        return {name: record.fields[name][1] for name in record.names}

    assert layout.VERSION == 6, "what follows pins version 6"
    assert offsets(layout.STREAM_HEADER) == {
        "magic": 0, "version": 8, "key": 16, "epoch": 24, "first_ring": 32, "next_ring": 40, "lock_file": 48, "waiting": 64,
        "closed": 72, "published": 128, "stalled_ns": 136, "reclaimed": 144, "last_published_ns": 152,
        "unreachable": 184,
    }  # fmt: skip
    assert offsets(layout.CONSUMER_RECORD) == {
        "pid": 0, "delivered": 8, "released": 16, "copied": 24, "rejected": 32, "reclaimed": 40,
        "redelivered": 48, "remote": 56, "skipped": 64,
    }  # fmt: skip
    assert layout.ASLEEP_OFFSET == 256
    assert layout.consumer_word(2, "copied") * 8 == 256 + 256 * 8 + 2 * 128 + 24
    assert layout.CONTROL_NBYTES == 256 + 256 * 8 + 256 * 128


def test_everything_starts_on_a_cache_line_and_slots_on_a_page() -> None:
    for num_slots in (1, 16, 63, 64, 65, 1000):
        assert layout.records_offset(num_slots) % layout.CACHE_LINE == 0
        assert layout.records_offset(num_slots) >= layout.STATES_OFFSET + num_slots
        assert layout.slots_offset(num_slots) % layout.PAGE == 0
        assert layout.slots_offset(num_slots) >= layout.records_offset(num_slots) + 64 * num_slots
