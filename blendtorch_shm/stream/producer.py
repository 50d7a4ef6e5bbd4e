"""The producer's half of a stream: loan a slot, fill it, commit it, tell a consumer that sleeps, wait for room.

A message goes through :meth:`Producer.publish` once: take it apart, wait for room, find its slot, choose where its arrays lie,
copy those that are not there yet, commit.

An interrupt is treated as a small death. A call that is cut short leaves a mark; the next one finds it and does what the
successor of a dead producer does (:meth:`Producer._recover`): it aborts what is LOANED, and counts what is READY.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..closing import Closable
from ..errors import BlendtorchError, ConfigurationError, OutOfSharedMemory, SegmentError, SegmentMissing, StreamClosed
from ..memory.layout import FLAG_LOCAL_ONLY, FOR_A_SLOT, MAX_SLOTS, PAGE, RESERVE, align, ring_nbytes
from ..memory.locks import PRODUCER_LOCK
from ..memory.own_pages import Window
from ..memory.ring import Bytes, Ring
from ..memory.states import State
from ..message.dtypes import Array
from ..message.values import SMALL_NBYTES
from ..message.wire import Encoder, Parts
from ..process import forks, interrupts
from .control import RECLAIM_EVERY_S, Control
from .lending import Loan, keep_lent
from .place import Place
from .reclaim import reclaim_dead
from .rings import Rings
from .waiting import Sleepers, Spin

log = logging.getLogger("blendtorch.stream")

DEFAULT_SEND_HWM = 10
"""Messages that may wait to be taken before publishing stalls."""
_IN_USE = 6
"""Slots beyond those that wait, so that consumers can hold a few messages each meanwhile."""
_MIN_SLOTS = RESERVE + 1
AFTER_FORK = (
    "A publisher that was made before a fork belongs to the parent: make one in the child, with a socket of its own."
)
_LOOK_EVERY_S = 0.1
"""A producer that waits looks at the slot tables itself this often."""
_STILL_LOCKED_S = 1.0
"""A child that a killed producer has just forked holds a copy of its locks, until it closes that first of all: for no longer."""
_EXPLAIN_EVERY_S = 30.0


class ProducerAlive(SegmentError):
    """A stream has a producer, which lives."""


class Sink(Protocol):
    """Takes messages; each is received exactly once, in order where there is one consumer."""

    def publish(self, fields: Mapping[str, Any]) -> bool:
        """Send one message, waiting for room as long as it takes.

        Returns:
            whether a message is out. A sink that gathers them (see clip.py) says so when it has sent one.

        Raises:
            PublishError: a value cannot travel on this connection; nothing was sent.
        """

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array | None:
        """An uninitialised C-contiguous array that the next :meth:`publish` sends without a copy, if there is room for one."""

    def close(self, *, patient: bool = True) -> None:
        """Send no more. What was published is still delivered.

        Args:
            patient: wait for those consumers who can come for it only now. Not needed where a successor goes on with the stream.
        """


class Forwarder(Protocol):
    """A consumer in the producer's process that passes messages on to consumers elsewhere."""

    waits: bool
    """Whether it sleeps until there is a message."""

    def wake(self) -> None:
        """There is a message. May be called in any thread."""

    def close(self, *, patient: bool = True) -> None:
        """The producer is done; for `patient` see :meth:`Sink.close`."""


class Producer(Closable):
    """The one producer of a stream.

    Args:
        place: where the stream lives.
        send_hwm: messages that may wait, unclaimed, before publishing stalls.
        num_slots: slots per ring; default `send_hwm` + 6.
        trusted: whether messages may contain pickles.

    Raises:
        ConfigurationError: more slots than a ring can have.
        SegmentError: another living process is the producer of this stream.
        OutOfSharedMemory: no room for the control segment.

    Example::

        with open_sink(address) as sink:
            sink.publish({"image": image, "frame": 3})
    """

    def __init__(
        self, place: Place, *, send_hwm: int = DEFAULT_SEND_HWM, num_slots: int | None = None, trusted: bool
    ) -> None:
        self.place = place
        self.trusted = trusted
        self.forwarder: Forwarder | None = None
        """Of this stream, if it has one; closed with this sink."""
        max_ready = max(1, send_hwm)
        if not 0 < max_ready + (num_slots or 0) <= MAX_SLOTS - _IN_USE:
            raise ConfigurationError(
                f"send_hwm={send_hwm}, num_slots={num_slots}: a ring has {MAX_SLOTS} slots at most."
            )
        self.num_slots = max(_MIN_SLOTS, max_ready + _IN_USE if num_slots is None else num_slots)
        self._max_ready = min(max_ready, self.num_slots - 1)
        self._encoder = Encoder(trusted=trusted)
        self._loan: Loan | None = None  # the slot that lent arrays are in, for the next publish
        self._lock = threading.RLock()
        self._is_in_call = False  # also left behind by a call that was cut short
        self._running = threading.Lock()  # held while a call runs: a call by a signal's handler finds it locked
        self._closed = self._stopping = self._is_copy = False
        self._spin = Spin()
        self._locks = place.open_locks(create=True)
        if not _becomes_true(lambda: self._locks.hold(PRODUCER_LOCK)):
            self._locks.close()
            raise ProducerAlive(
                f"Another living process publishes as {place.name}. One instance owns a socket: give each publisher "
                f"a socket name of its own (named_sockets), or close the first."
            )
        try:
            self._bell = place.open_bell()
            self._control = self._adopt_or_create()
            self._sleepers = Sleepers(place, self._control)
            self._adopt_rings()
        except BaseException:
            self._locks.close()
            raise
        forks.register(self)

    def _adopt_or_create(self) -> Control:
        try:
            control = Control.attach(self.place)
            if control.lock_file != self._locks.inode():
                lock_file = control.lock_file
                if not _becomes_true(lambda: not self.place.is_locked_in(lock_file, PRODUCER_LOCK)):
                    raise ProducerAlive(
                        f"Another living process publishes as {self.place.name}, although its lock file was removed. End that "
                        f"one first; or give each publisher a socket name of its own (named_sockets)."
                    )
                control = self._begin_anew(control)
        except SegmentMissing:  # none yet, or one that its creator never finished
            control = Control.create(self.place, self._locks, first_ring=self.place.next_ring())
        control.epoch += 1
        control.closed = 0
        return control

    def _begin_anew(self, control: Control) -> Control:
        """A new stream in place of one whose lock file was removed: nobody can tell who of its members lives. Its consumers take
        what is READY there, and then come here. Its rings stay for them until the launch ends.
        """
        ready = sum(ring.count(State.READY) for ring in Rings(self.place, control).now())
        log.warning(
            "The lock file of %s was removed while the stream was in use, so the stream begins anew. %d messages wait in the old "
            "one: readers that use it take them, and then follow. Without such a reader, they are lost.",
            self.place.title,
            ready,
        )
        return Control.create(self.place, self._locks, first_ring=max(control.next_ring, self.place.next_ring()))

    def _adopt_rings(self) -> None:
        """The rings of an earlier producer, whose READY messages stay for the consumers.

        It may have died anywhere: a ring that was removed is no longer looked for, and one that was not finished is removed.
        """
        self._rings = list(Rings(self.place, self._control).now())  # the last one is current; earlier ones drain
        self.place.unlink(f".{self._control.next_ring}")
        self._recover()
        if self._rings:
            self._control.first_ring = self._rings[0].number
            self._max_ready = min(self._max_ready, self._rings[-1].num_slots - 1)
            self._sleepers.pass_on(self._rings)  # of what was READY, and nobody was told

    # -- publishing ---------------------------------------------------------------------------------------------

    def publish(self, fields: Mapping[str, Any], *, wait: bool = True) -> bool:
        """See :class:`Sink`. With `wait` False, send although as many messages as may wait already do, if a slot is free.

        Raises:
            BlendtorchError: called by a signal's handler in the middle of another call.
        """
        with self._lock:
            parts = self._encoder.take_apart(fields)
            self._begin("publish")
            with self._running:
                if wait:
                    self._wait_for_room()
                loan, in_place = self._find_slot(parts)
                for i in in_place:  # its consumer's now: a late write is an error, and has no effect by way of a view
                    parts.large[i].flags.writeable = False
                loan.seal()
                parts.copy_into(loan.ring.memory(loan.slot))
                self._commit(loan, parts)
            self._is_in_call = False
        return True

    def _begin(self, name: str) -> None:
        """A call begins. The caller holds the lock, runs the call ``with self._running``, and then clears the mark."""
        check_alone(self._running, name)
        if self._closed:
            raise StreamClosed(AFTER_FORK if self._is_copy else f"{name}() after close().")
        interrupts.raise_kept()
        if self._is_in_call:  # the last one was cut short
            self._recover()
            self._sleepers.pass_on(self._rings)
        self._is_in_call = True

    def _find_slot(self, parts: Parts) -> tuple[Loan, dict[int, int]]:
        """The slot that the message is sent from, and where in it those of its arrays lie that are in place already; all others
        get their places.
        """
        loan = self._loan
        if loan is not None and loan.root() is not None:
            in_place = loan.in_place(parts.large)
            if in_place:
                parts.place(in_place, loan.used)
                if _slot_nbytes(parts) <= loan.ring.slot_nbytes:
                    return loan, in_place
                parts.place({}, 0)  # too small for the rest: what was lent is copied, this once
                self._abandon(loan)
            loan = None  # else lent arrays are alive and not in this message: the script still needs them
        elif loan is not None and _slot_nbytes(parts) > loan.ring.slot_nbytes:
            self._abandon(loan)
            loan = None
        return loan or self._loan_slot(_slot_nbytes(parts)), {}

    def _commit(self, loan: Loan, parts: Parts) -> None:
        """Make the message READY, and tell who waits for one."""
        if self._closed:
            raise StreamClosed("close() in the middle of publish().")
        control = self._control
        sequence = control.published
        flags = FLAG_LOCAL_ONLY if parts.pickled else 0
        loan.ring.commit(loan.slot, sequence, parts.nbytes, parts.header(), flags)
        if loan is self._loan:
            self._loan = None
        control.published = sequence + 1
        control.last_published_ns = time.monotonic_ns()
        if len(self._rings) > 1:
            self._retire_rings()
        if self._sleepers.anyone():
            self._sleepers.tell(loan.ring, loan.slot)
        forwarder = self.forwarder
        if forwarder is not None and forwarder.waits:
            forwarder.wake()

    # -- slots --------------------------------------------------------------------------------------------------

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array | None:
        """See :class:`Sink`. None, too, where too much that was lent is kept, or where a handler of a signal asks amid a call."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes <= SMALL_NBYTES or dtype.hasobject:  # whatever lies there would be taken for pointers
            return None
        with self._lock:
            if self._closed or self._running.locked():
                return None
            self._begin("lend")
            with self._running:
                if self._loan is None and self._rings and self._rings[-1].pinned() < RESERVE - 1:
                    self._loan = self._try_loan(nbytes)
                lent = None if self._loan is None else self._loan.lend(shape, dtype)
            self._is_in_call = False
        return lent

    def part(self, lent: Array, start: int, nbytes: int) -> tuple[Window, Bytes] | None:
        """A window of its own on some bytes of an array that :meth:`lend` gave, and these bytes; None if that cannot be."""
        with self._lock:
            return None if self._loan is None else self._loan.part(lent, start, nbytes)

    def shorten(self, lent: Array, length: int) -> Array:
        """The first rows of an array that :meth:`lend` gave, to be published in its stead; the others are not used any more."""
        with self._lock:
            return lent[:length] if self._loan is None else self._loan.shorten(lent, length)

    def _try_loan(self, nbytes: int) -> Loan | None:
        """A slot with room for `nbytes`, if the current ring's slots are large enough and one is free now."""
        if not self._rings or nbytes > self._rings[-1].slot_nbytes:
            return None
        ring = self._rings[-1]
        slot = ring.loan()
        return None if slot is None else Loan(ring, slot)

    def _loan_slot(self, nbytes: int) -> Loan:
        """A slot with room for `nbytes`, waiting for one as long as it takes; opens a larger ring if needed.

        Raises:
            OutOfSharedMemory: a larger ring is needed, and does not fit into shared memory.
            StreamClosed: closed meanwhile.
        """
        while (loan := self._try_loan(nbytes)) is None:
            if not self._rings or nbytes > self._rings[-1].slot_nbytes:
                self._open_ring(nbytes)
            else:
                self._wait(self._rings[-1].has_free, wake_below=FOR_A_SLOT)
        return loan

    def _abandon(self, loan: Loan) -> None:
        """Give a loaned slot back unused."""
        if loan.ring.info(loan.slot).state == State.LOANED:  # not closed by a signal's handler meanwhile
            loan.ring.abort(loan.slot)
        if loan is self._loan:
            self._loan = None

    def _recover(self) -> None:
        """After the end of an earlier producer, or a call that was cut short: abort what is LOANED, and count what is READY."""
        self._loan = None
        self._control.waiting = 0
        self._locks.unlock_slots()  # one that was just being reclaimed; nobody else could have the slot
        # A ring that was made and not yet counted is empty, and consumers do not know it: another one takes its place.
        self._rings = [ring for ring in self._rings if ring.number < self._control.next_ring]
        for ring in self._rings:
            self._control.published = max(self._control.published, ring.next_sequence())
            ring.abort_all()

    # -- rings --------------------------------------------------------------------------------------------------

    def _open_ring(self, nbytes: int) -> None:
        """Open a ring for messages of `nbytes`. Its slots are larger by half at least than the last ring's: messages that grow
        slowly then open few rings.
        """
        slot_nbytes = align(nbytes + nbytes // 16, PAGE)
        if self._rings:
            slot_nbytes = max(slot_nbytes, align(self._rings[-1].slot_nbytes * 3 // 2, PAGE))
        number = self._control.next_ring
        num_slots = self.num_slots
        self.place.unlink(f".{number}")  # an interrupt came when it was nearly made
        while True:
            try:
                memory = self.place.create(f".{number}", ring_nbytes(num_slots, slot_nbytes))
                break
            except OutOfSharedMemory as error:
                if num_slots == _MIN_SLOTS:
                    raise
                num_slots = max(_MIN_SLOTS, num_slots // 2)
                log.warning("%s Trying with %d slots, which lets the producer run less far ahead.", error, num_slots)
        ring = Ring.format(memory, self._control.key, number, num_slots, slot_nbytes)
        self._rings = [*self._rings, ring]
        self._max_ready = min(self._max_ready, num_slots - 1)
        self._control.next_ring = number + 1
        self._retire_rings()

    def _retire_rings(self) -> None:
        """Remove earlier rings whose messages have all been consumed."""
        for ring in self._rings[:-1]:
            if ring.count(State.FREE) == ring.num_slots:
                self.place.unlink(f".{ring.number}")
                self._rings.remove(ring)
        self._control.first_ring = self._rings[0].number

    # -- waiting ------------------------------------------------------------------------------------------------

    def wait_for_room(self) -> None:
        """Return when :meth:`publish` need not wait. If arrays are lent, wait for a FREE slot, too, so that :meth:`lend` finds
        one after the next :meth:`publish`.
        """
        with self._lock:
            self._wait_for_room()
            if self._loan is not None:
                self._wait_for_slot(math.inf)

    def gets_room(self, patience_s: float, meanwhile: Callable[[], object] | None = None) -> bool:
        """Whether :meth:`publish` need not wait, now or within `patience_s`.

        Args:
            patience_s: seconds.
            meanwhile: called several times a second while it waits; may raise.
        """
        until = time.monotonic() + patience_s
        with self._lock:
            self._wait_for_room(patience_s, meanwhile)
            if self._loan is not None or not self._has_room():
                return self._has_room()
            self._wait_for_slot(max(0.0, until - time.monotonic()), meanwhile)
            return not self._rings or self._rings[-1].has_free()

    def has_room(self) -> bool:
        """Whether :meth:`publish` need not wait."""
        with self._lock:
            is_ready = self._loan is not None or not self._rings or self._rings[-1].has_free()
            return self._has_room() and is_ready

    def note_waited(self, seconds: float) -> None:
        """Time that was spent waiting for the other end to say what to do: it counts as that spent waiting for room, and shows
        those who watch that we live.
        """
        self._control.stalled_ns += int(seconds * 1e9)

    def wait_for_slot(self, patience_s: float) -> None:
        """Return when :meth:`publish` finds a slot, or after `patience_s`."""
        with self._lock:
            if self._loan is None:
                self._wait_for_slot(patience_s)

    def _has_room(self) -> bool:
        """Whether a message may be committed now: fewer than may wait do wait."""
        ready = 0
        for ring in self._rings:
            ready += ring.count(State.READY)
        return ready < self._max_ready

    def _wait_for_room(self, patience_s: float = math.inf, meanwhile: Callable[[], object] | None = None) -> None:
        if not self._has_room():
            self._wait(self._has_room, (self._max_ready + 1) // 2, patience_s, meanwhile)

    def _wait_for_slot(self, patience_s: float, meanwhile: Callable[[], object] | None = None) -> None:
        if self._rings and not self._rings[-1].has_free():
            self._wait(self._rings[-1].has_free, FOR_A_SLOT, patience_s, meanwhile)

    def _wait(
        self,
        enough: Callable[[], bool],
        wake_below: int,
        patience_s: float = math.inf,
        meanwhile: Callable[[], object] | None = None,
    ) -> None:
        """Return when `enough`, or after `patience_s`; `meanwhile` is called now and then.

        Consumers ring when fewer than `wake_below` messages are READY. To ring for every message taken would cost two
        switches between processes each; to ring only when none is left would leave the consumers waiting.
        """
        control = self._control
        start = explained = counted = time.monotonic()
        reclaimed = start
        self._spin.begin()
        try:
            while not enough():
                self._check_open()
                if self._spin.goes_on():
                    continue
                control.waiting = wake_below
                if enough():
                    break
                self._bell.wait(_LOOK_EVERY_S)
                self._check_open()
                now = time.monotonic()
                control.stalled_ns += int((now - counted) * 1e9)  # as it goes: by this, who watches knows that we live
                counted = now
                if now - start > patience_s:
                    break
                if meanwhile is not None:
                    meanwhile()
                if now - reclaimed > RECLAIM_EVERY_S:
                    reclaimed = now
                    self._look_after()
                if now - explained > _EXPLAIN_EVERY_S:
                    explained = now
                    log.warning("Publishing has waited for room for %.0f s. %s.", now - start, self.explain())
        finally:
            control.waiting = 0
            control.stalled_ns += int((time.monotonic() - counted) * 1e9)
            self._spin.end()

    def _look_after(self) -> None:
        """Reclaim what dead consumers held, and tell a sleeper of it."""
        self._sleepers.forget_dead(self._locks)
        reclaimed = reclaim_dead(self._rings, self._locks)
        if reclaimed:
            self._control.reclaimed += reclaimed
            self._sleepers.pass_on(self._rings)

    def _check_open(self) -> None:
        if self._stopping:
            raise StreamClosed(f"{self.place.name} was closed while publishing waited for room.")

    def show_life(self) -> None:
        """Let those who watch know that a message is on its way."""
        self._control.last_published_ns = time.monotonic_ns()

    def explain(self) -> str:
        """The state of the stream in one line, for messages to people."""
        return self._control.explain(self.place.title, self._rings, self._locks)

    # -- the end ------------------------------------------------------------------------------------------------

    def stop_waiting(self) -> None:
        """Let whatever waits for room in another thread raise StreamClosed, now and from now on."""
        self._stopping = True
        self._bell.ring()

    def close(self, *, patient: bool = True) -> None:
        """See :class:`Sink`. READY messages stay for the consumers; the launcher removes the memory."""
        if self._locks.fd < 0:  # closed; or a forked child's copy of its parent's
            if self.forwarder is not None and not self._is_copy:
                self.forwarder.close(patient=patient)  # once more: an interrupt may have cut that short
            return
        self.stop_waiting()
        with self._lock:
            self._closed = True
        try:
            if self.forwarder is not None:
                self.forwarder.close(patient=patient)
        finally:  # also when Ctrl-C ends its patience
            with self._lock:
                if self._locks.fd >= 0:  # else it is closed already, and the stream may be a successor's
                    try:  # a successor, perhaps in this very process, uses the same slots
                        for ring in self._rings:
                            keep_lent(ring)
                    finally:
                        self._recover()
                        self._control.closed = 1
                        self._sleepers.close()
                        self._locks.close()

    def in_child(self) -> None:
        """In a forked child: the stream is its parent's."""
        self._closed = self._is_copy = True
        self._lock, self._running = threading.RLock(), threading.Lock()  # a thread of the parent may have held them

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._control.published} published"
        return f"<Producer of {self.place.name}, {state}>"


def _becomes_true(condition: Callable[[], bool]) -> bool:
    """Whether it is true now, or within a moment."""
    deadline = time.monotonic() + _STILL_LOCKED_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def check_alone(running: threading.Lock, name: str) -> None:
    """Refuse a call while another one of this thread runs: it comes from a signal's handler, or from a finalizer.

    Raises:
        BlendtorchError: `running` is held.
    """
    if running.locked():
        raise BlendtorchError(
            f"{name}() was called in the middle of another call, by a signal's handler or an object's finalizer (__del__). "
            f"Set a flag there, and publish from the script's loop."
        )


def _slot_nbytes(parts: Parts) -> int:
    """How large a slot the message needs: the header lies right behind the arrays."""
    return align(parts.nbytes) + parts.header_nbytes
