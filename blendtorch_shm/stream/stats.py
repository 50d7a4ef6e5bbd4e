"""The counters of a stream, read from outside.

They lie in shared memory, each written by one process alone, so reading them costs a stream nothing and needs no
membership in it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ..errors import SegmentError
from ..launch.address import Address, Twin
from ..memory.layout import MAX_CONSUMERS, consumer_word
from ..memory.locks import PRODUCER_LOCK, consumer_lock
from ..memory.states import State
from .control import Activity, Control
from .place import SharedPlace
from .rings import Rings


@dataclass(frozen=True)
class ConsumerStats:
    """One consumer's place at a stream. Its counters go on when another process takes the place over, so nothing is forgotten.

    Attributes:
        pid: of the process that has the place, or had it last.
        alive: whether it has it still.
        remote: consumers elsewhere that it sends to, over TCP; such a place is the producer's own.
        delivered: messages received.
        released: of these, how many are no longer in use.
        copied: handed out as copies, because too many slots were in use.
        redelivered: received after another consumer had them and did not finish.
        rejected: messages that could not be opened (or, over TCP, connections that made no sense).
        reclaimed: messages taken back from dead consumers, by this one.
        skipped: of the messages received, those that were dropped unread, since a newer one was there (``latest=True``).
        leased: messages that it holds now.
    """

    pid: int
    alive: bool
    remote: int
    delivered: int
    released: int
    copied: int
    redelivered: int
    rejected: int
    reclaimed: int
    skipped: int = 0
    leased: int = 0


@dataclass(frozen=True)
class StreamStats:
    """One socket of one instance.

    Attributes:
        name: of the socket, such as ``DATA``.
        btid: number of the instance.
        producer: ``alive``, ``finished`` (closed in good order), ``gone`` (died), ``absent`` (published nothing yet) or ``lost``
            (alive, but somebody has removed the stream's shared memory, and the counters with it).
        starts: how many producers have owned the stream, one after the other.
        published: messages; a clip is one.
        stalled_s: seconds for which publishing waited for room.
        waits: whether publishing waits for room now.
        silence_s: seconds since the last message or frame of a clip; None before the first.
        ready: messages that wait to be taken.
        leased: messages that consumers hold.
        slots: messages that there is memory for.
        nbytes: of that memory.
        delivered, released, copied, redelivered, rejected, reclaimed, skipped: sums over all consumers, see
            :class:`ConsumerStats`.
        reachable: whether readers elsewhere can connect: False while the port of the instance is another program's.
        consumers: those that are there or were.
    """

    name: str
    btid: int
    producer: Literal["alive", "finished", "gone", "absent", "lost"] = "absent"
    starts: int = 0
    published: int = 0
    stalled_s: float = 0.0
    waits: bool = False
    silence_s: float | None = None
    ready: int = 0
    leased: int = 0
    slots: int = 0
    nbytes: int = 0
    delivered: int = 0
    released: int = 0
    copied: int = 0
    redelivered: int = 0
    rejected: int = 0
    reclaimed: int = 0
    skipped: int = 0
    reachable: bool = True
    consumers: Sequence[ConsumerStats] = ()


_SUMS = ("delivered", "released", "copied", "redelivered", "rejected", "reclaimed", "skipped")


def stats_of_instance(twin: Twin) -> list[StreamStats]:
    """The counters of all sockets of the instance that has this one, as they are now; of those that a publisher has opened."""
    return [_stats(other) for other in twin.sockets()]


def stats(addresses: str | Iterable[str]) -> list[StreamStats]:
    """The counters of the streams at `addresses`, as they are now.

    Args:
        addresses: such as ``launch_info.addresses['DATA']``. Those without a shared-memory twin here are left out: their counters
            are on the host of the instances.

    Returns:
        in the order of the addresses.
    """
    each = [addresses] if isinstance(addresses, str) else addresses
    return [_stats(a.twin) for a in each if isinstance(a, Address) and a.twin is not None]


def _stats(twin: Twin) -> StreamStats:
    place = SharedPlace(twin)
    try:
        control = Control.attach(place)
    except SegmentError:
        return StreamStats(twin.name, twin.btid, "lost" if _is_lost(place) else "absent")
    is_held: Callable[[int], bool] = partial(place.is_locked_in, control.lock_file)
    with contextlib.ExitStack() as opened:
        with contextlib.suppress(SegmentError):
            locks = opened.enter_context(place.open_locks())
            if locks.inode() == control.lock_file:  # else that of the members was removed
                is_held = locks.is_held
        words = control.words
        rings = Rings(place, control).now()
        seen = Activity.of(control)
        holders = Counter(
            ring.owner[slot] for ring in rings for slot, state in enumerate(ring.states()) if state == State.LEASED
        )
        consumers = [
            ConsumerStats(
                pid=pid,
                alive=is_held(consumer_lock(index)),
                remote=words[consumer_word(index, "remote")],
                leased=holders[index + 1],
                **{name: words[consumer_word(index, name)] for name in _SUMS},
            )
            for index in range(MAX_CONSUMERS)
            if (pid := words[consumer_word(index, "pid")])
        ]
        sums = {name: sum(getattr(consumer, name) for consumer in consumers) for name in _SUMS}
        sums["reclaimed"] += control.reclaimed
        return StreamStats(
            name=twin.name,
            btid=twin.btid,
            producer=control.producer_state(is_held),
            starts=control.epoch,
            published=seen.published,
            stalled_s=seen.stalled_ns / 1e9,
            waits=control.is_waited_in(is_held),
            silence_s=seen.silence_s(),
            ready=sum(ring.count(State.READY) for ring in rings),
            leased=holders.total(),
            slots=sum(ring.num_slots for ring in rings),
            nbytes=control.segment.nbytes + sum(ring.segment.nbytes for ring in rings),
            reachable=not control.unreachable,
            consumers=consumers,
            **sums,
        )


def _is_lost(place: SharedPlace) -> bool:
    """Whether a producer lives, although its stream's control segment was removed."""
    with contextlib.suppress(SegmentError), place.open_locks() as locks:
        return locks.is_held(PRODUCER_LOCK)
    return False
