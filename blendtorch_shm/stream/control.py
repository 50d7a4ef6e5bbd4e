"""The control segment of a stream, by the names of its words; and what they say about the stream to people.

A stream is one socket of one instance. Its producer (producer.py) fills slots, consumers (consumer.py) lease them. Both see it
through a :class:`~.place.Place`: shared memory, or the memory of one process.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from ..errors import SegmentError
from ..memory import layout
from ..memory.layout import ASLEEP_OFFSET, CONTROL_NBYTES, FLAG_LOCAL_ONLY, MAX_CONSUMERS, STREAM_MAGIC, VERSION, word
from ..memory.locks import PRODUCER_LOCK, Locks
from ..memory.ring import Ring, check_header
from ..memory.segment import Segment
from ..memory.states import State
from ..wording import counted
from .place import Place

_RECORD_WORDS = layout.CONSUMER_RECORD.itemsize // 8
_FIRST_DELIVERED = layout.consumer_word(0, "delivered")
RECLAIM_EVERY_S = 0.5
"""How often whoever has nothing better to do looks for leases of dead consumers."""


def _word(name: str) -> property:
    at = word(layout.STREAM_HEADER, name)

    def read(control: Control) -> int:
        return control.words[at]

    def write(control: Control, value: int) -> None:
        control.words[at] = value

    return property(read, write)


class Control:
    """The control segment of a stream. Each attribute is a word in it that one member at a time writes.

    Attributes:
        key: random; the stream's rings carry it.
        epoch: how many producers have owned the stream.
        lock_file: inode of the lock file that the members have.
        first_ring, next_ring: rings first_ring .. next_ring-1 may exist.
        waiting: the producer sleeps until fewer messages than this are READY, or, with ``FOR_A_SLOT``, until a slot is FREE;
            0: it is awake.
        closed: the producer finished in good order.
        published: messages committed, so the next sequence number.
        stalled_ns: time that the producer spent waiting for room.
        reclaimed: leases of dead consumers that the producer made READY again.
        last_published_ns: CLOCK_MONOTONIC of the last message, or frame of a clip; 0: none yet.
        unreachable: the producer's forwarder could not bind its port, so there are no readers elsewhere.
        words: all of them, as unsigned 64-bit integers.
        asleep: of each consumer, since when it sleeps (CLOCK_MONOTONIC, ns); 0: it is awake.

    Example::

        print(Control.attach(place).published)
    """

    key = _word("key")
    epoch = _word("epoch")
    first_ring = _word("first_ring")
    next_ring = _word("next_ring")
    lock_file = _word("lock_file")
    waiting = _word("waiting")
    closed = _word("closed")
    published = _word("published")
    stalled_ns = _word("stalled_ns")
    reclaimed = _word("reclaimed")
    last_published_ns = _word("last_published_ns")
    unreachable = _word("unreachable")

    def __init__(self, memory: Segment) -> None:
        self.segment = memory
        self.words = memory.words
        self.asleep = memory.view[ASLEEP_OFFSET : ASLEEP_OFFSET + 8 * MAX_CONSUMERS].cast("Q")

    @classmethod
    def create(cls, place: Place, locks: Locks, first_ring: int = 0) -> Control:
        """Make the control segment of a new stream, in place of one that its creator never finished, or that nobody can use.

        Args:
            place: where.
            locks: of its lock file.
            first_ring: number of its first ring; those below are another stream's.

        Raises:
            OutOfSharedMemory: no room for it.
        """
        place.unlink("")
        memory = place.create("", CONTROL_NBYTES)
        control = cls(memory)
        control.key = secrets.randbits(64) | 1  # never 0
        control.lock_file = locks.inode()
        control.first_ring = control.next_ring = first_ring
        memory.words[word(layout.STREAM_HEADER, "version")] = VERSION
        memory.words[word(layout.STREAM_HEADER, "magic")] = STREAM_MAGIC  # last: a half-written header is no stream
        return control

    @classmethod
    def attach(cls, place: Place) -> Control:
        """The control segment of the stream at `place`.

        Raises:
            SegmentMissing: there is none.
            SegmentError: it is of another version.
        """
        memory = place.attach("")
        check_header(memory, STREAM_MAGIC)
        if memory.nbytes < CONTROL_NBYTES:
            raise SegmentError(f"{memory.name} has {memory.nbytes} bytes, a control segment has {CONTROL_NBYTES}.")
        return cls(memory)

    def producer_state(self, is_held: Callable[[int], bool]) -> Literal["alive", "finished", "gone"]:
        """Whether the stream has a producer: one that lives, one that closed it in good order, or one that died.

        Args:
            is_held: whether anybody alive holds a byte of the lock file that the members have.
        """
        return "finished" if self.closed else "alive" if is_held(PRODUCER_LOCK) else "gone"

    def delivered(self) -> int:
        """How many messages its consumers have received, all together; less what they put back."""
        return sum(self.words[_FIRST_DELIVERED : _FIRST_DELIVERED + MAX_CONSUMERS * _RECORD_WORDS : _RECORD_WORDS])

    def is_waited_in(self, is_held: Callable[[int], bool]) -> bool:
        """Whether a producer lives that waits for room now; for `is_held` see :meth:`producer_state`."""
        return self.waiting != 0 and is_held(PRODUCER_LOCK)

    def explain(self, name: str, rings: Iterable[Ring], locks: Locks) -> str:
        """The state of the stream in one line, for messages to people."""
        seen = Activity.of(self)
        silence_s = seen.silence_s()
        slots = [(ring, slot, state) for ring in rings for slot, state in enumerate(ring.states())]
        ready = [(ring, slot) for ring, slot, state in slots if state == State.READY]
        leased = sum(state == State.LEASED for _, _, state in slots)
        pickled = sum(bool(ring.flags[slot] & FLAG_LOCAL_ONLY) for ring, slot in ready)
        state = self.producer_state(locks.is_held)
        producer = "has finished" if state == "finished" else f"is {state}"
        if not slots:
            return f"{name}: its producer {producer} and has published nothing yet"
        last = "" if silence_s is None else f", the last one {silence_s:.1f} s ago"
        return (
            f"{name}: its producer {producer} and has published {counted(seen.published, 'message')}{last}; of "
            f"{counted(len(slots), 'slot')}, {len(ready)} hold messages that nobody has taken"
            f"{f' ({pickled} of them contain pickles, which only consumers on this host may take)' if pickled else ''} "
            f"and {leased} are in use by consumers"
        )

    def __repr__(self) -> str:
        return f"<Control {self.segment.name or 'private'}, {self.published} published>"


class Activity(NamedTuple):
    """What a stream's producer has done so far. It stays the same while the producer hangs, and only then: one that waits
    for room says so again and again, in `stalled_ns`.
    """

    published: int
    """Messages."""
    stalled_ns: int
    """Time spent waiting for room."""
    last_published_ns: int
    """When the last message was published, or the last frame of a clip, CLOCK_MONOTONIC; 0: none was."""

    @classmethod
    def of(cls, control: Control) -> Activity:
        """That of the stream with this control segment."""
        return cls(control.published, control.stalled_ns, control.last_published_ns)

    def silence_s(self) -> float | None:
        """Seconds since the last message or frame of a clip, or None if there was none."""
        return (time.monotonic_ns() - self.last_published_ns) / 1e9 if self.last_published_ns else None


def activity(place: Place) -> Activity | None:
    """What the producer of the stream at `place` has done so far, or None if there is no such stream (yet)."""
    try:
        return Activity.of(Control.attach(place))
    except SegmentError:
        return None
