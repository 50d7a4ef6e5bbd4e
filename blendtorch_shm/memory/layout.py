"""Where every byte of shared memory lies. Pinned by a golden-byte test; a change here raises :data:`VERSION`.

A *stream* (one socket of one instance) has one control segment and one or more rings::

    control segment   [ StreamHeader | asleep word × MAX_CONSUMERS | ConsumerRecord × MAX_CONSUMERS ]
    ring segment      [ RingHeader | state byte × num_slots | SlotRecord × num_slots | slot × num_slots ]
    slot              [ array, array, ... (each 64-byte aligned) | message header (see wire.py) ]

All integers are little-endian and 8 bytes wide, so that every word is written in one store and has one writer at a time. Slot
states are single bytes, side by side, so that one copy of a few bytes shows them all. Everything starts on a cache line; slots
start on a page.

Plain stores carry the protocol: who sees a slot READY must see its message, too. x86-64 keeps the order of stores; ARM does not,
and Python has no memory fences. So shared memory is refused on other processors (:func:`~.segment.attach`).
"""

from __future__ import annotations

import numpy as np

VERSION = 6
"""Of the memory layout and of the wire format: one number for both."""
CACHE_LINE = 64
PAGE = 4096
MAX_CONSUMERS = 256
"""Consumers that can be attached to one stream at a time: readers, and the producer's forwarder."""
FORWARDER = MAX_CONSUMERS - 1
"""The consumer record that is kept for the producer's forwarder: however many readers wait, a producer can start again."""
MAX_SLOTS = 4096
"""Slots in one ring."""
FOR_A_SLOT = MAX_SLOTS
"""What the word `waiting` of a stream holds while the producer waits for a FREE slot, and not for fewer READY ones."""
RESERVE = 3
"""Slots per ring that consumers leave to the producer: at more leases than the rest, messages are handed out as copies."""
MAX_RINGS = 2**32
"""Rings of one stream, over its life."""
MAX_RINGS_AT_ONCE = 64
"""Of these, how many can exist at one time: each has larger slots than the one before, by half at least."""

STREAM_MAGIC = int.from_bytes(b"btstream", "little")
RING_MAGIC = int.from_bytes(b"bt--ring", "little")


def _words(names: dict[int, str], nbytes: int) -> np.dtype[np.void]:
    return np.dtype(
        {"names": list(names.values()), "formats": ["<u8"] * len(names), "offsets": list(names), "itemsize": nbytes}
    )


STREAM_HEADER = _words(
    {
        0: "magic",
        8: "version",
        16: "key",  # random; its rings carry it
        24: "epoch",  # how many producers have owned this stream
        32: "first_ring",  # rings first_ring .. next_ring-1 may exist
        40: "next_ring",
        48: "lock_file",  # its inode: by whose locks the members of this stream tell who lives
        64: "waiting",  # the producer sleeps until fewer messages than this are READY (FOR_A_SLOT: one is FREE); 0: it is awake
        72: "closed",  # the producer finished in good order
        128: "published",  # messages committed = the next sequence number
        136: "stalled_ns",  # time the producer spent waiting for room
        144: "reclaimed",  # leases of dead consumers made READY again, by the producer
        152: "last_published_ns",  # CLOCK_MONOTONIC
        184: "unreachable",  # the producer serves this host alone: it could not bind its port (yet)
    },
    4 * CACHE_LINE,
)
CONSUMER_RECORD = _words(
    {
        0: "pid",  # for people; liveness is the lock
        8: "delivered",
        16: "released",
        24: "copied",  # handed out as copies because the process held too many slots
        32: "rejected",  # messages whose record or header made no sense; the producer's own: connections, too
        40: "reclaimed",
        48: "redelivered",  # delivered, after another consumer had it and did not finish
        56: "remote",  # consumers elsewhere that this one sends to (the producer's own, for TCP)
        64: "skipped",  # delivered, and dropped unread, since a newer one was there; of consumers that want the newest alone
    },
    2 * CACHE_LINE,
)
RING_HEADER = _words(
    {
        0: "magic",
        8: "version",
        16: "key",
        24: "number",
        32: "num_slots",
        40: "slot_nbytes",
    },
    CACHE_LINE,
)
SLOT_RECORD = _words(
    {
        0: "generation",  # counts commits of this slot: a release names the generation it means
        8: "sequence",  # of the message in it, unbroken per stream
        16: "owner",  # consumer record of the lease, plus one
        24: "payload_nbytes",  # arrays
        32: "header_nbytes",  # message header, right after the arrays (64-byte aligned)
        40: "flags",
    },
    CACHE_LINE,
)

FLAG_LOCAL_ONLY = 1
"""The message contains a pickle, and must not leave this host."""
FLAG_AGAIN = 2
"""Another consumer had the message, and did not finish with it."""

ASLEEP_OFFSET = STREAM_HEADER.itemsize
"""Byte offset, in the control segment, of the words that say since when each consumer sleeps (CLOCK_MONOTONIC, ns; 0: awake)."""
_CONSUMERS_OFFSET = ASLEEP_OFFSET + MAX_CONSUMERS * 8
CONTROL_NBYTES = _CONSUMERS_OFFSET + MAX_CONSUMERS * CONSUMER_RECORD.itemsize


STATES_OFFSET = RING_HEADER.itemsize
"""Byte offset of the state bytes in a ring segment."""


def word(record: np.dtype[np.void], field: str) -> int:
    """Index of `field` in a ``memoryview.cast('Q')`` that starts where the record starts."""
    fields = record.fields
    if fields is None:
        raise TypeError(f"{record} is not a record")
    return fields[field][1] // 8


def align(nbytes: int, to: int = CACHE_LINE) -> int:
    """`nbytes` rounded up to a multiple of `to`."""
    return -(-nbytes // to) * to


def consumer_word(index: int, field: str) -> int:
    """Word index of a field of consumer record `index` in the control segment."""
    return (_CONSUMERS_OFFSET + index * CONSUMER_RECORD.itemsize) // 8 + word(CONSUMER_RECORD, field)


def records_offset(num_slots: int) -> int:
    """Byte offset of the slot records in a ring segment."""
    return STATES_OFFSET + align(num_slots)


def slots_offset(num_slots: int) -> int:
    """Byte offset of the first slot in a ring segment."""
    return align(records_offset(num_slots) + num_slots * SLOT_RECORD.itemsize, PAGE)


def ring_nbytes(num_slots: int, slot_nbytes: int) -> int:
    """Size of a ring segment; `slot_nbytes` is a multiple of :data:`PAGE`."""
    return slots_offset(num_slots) + num_slots * slot_nbytes
