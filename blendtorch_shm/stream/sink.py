"""Where a producer puts messages: the protocol, and the one implementation over a ring.

:class:`RingSink` lays a message into a slot, commits it, and wakes a consumer. What differs between transports is where the ring
lives, and whether a :class:`Forwarder` is among its consumers.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import StreamClosed
from ..memory.layout import FLAG_LOCAL_ONLY, align
from ..memory.ring import Bytes
from ..memory.states import State
from ..message.wire import SMALL_NBYTES, Array, Parts, arrange, copy_arrays, encode_header, take_apart
from .writer import Loan, Writer

_T = TypeVar("_T")
_U = TypeVar("_U")


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
    """A consumer in the producer's process that passes messages on."""

    @property
    def index(self) -> int:
        """Which of the stream's consumers it is."""

    def close(self, *, patient: bool = True) -> None:
        """The producer is done; for `patient` see :meth:`Sink.close`."""


class RingSink:
    """A sink over a ring.

    Args:
        writer: the producer's half of the stream; closed with this sink.
        forwarder: of this stream, if it has one; closed with this sink.
        trusted: whether messages may contain pickles.
    """

    def __init__(self, writer: Writer, forwarder: Forwarder | None = None, *, trusted: bool) -> None:
        self.trusted = trusted
        self._writer = writer
        self._forwarder = forwarder
        writer.companion = None if forwarder is None else forwarder.index
        self._loan: Loan | None = None  # the slot that lent arrays are in, for the next publish
        self._lent: list[tuple[weakref.ref[Array], int]] = []  # those arrays, and where in the slot
        self._lock = threading.RLock()  # a signal handler may close in the middle of publish
        self._closed = False
        self._depth = 0  # calls in the middle of their work
        self._is_in_doubt = False  # whether one of them was interrupted
        self._pid = os.getpid()

    def publish(self, fields: Mapping[str, Any], *, wait: bool = True) -> bool:
        """See :class:`Sink`. With `wait` False, send although as many messages as may wait already do, if a slot is free."""
        with self._lock:
            if self._closed:
                raise StreamClosed("publish() after close().")
            parts = take_apart(fields, trusted=self.trusted)
            if wait:
                self._writer.wait_for_room()
            self._try(self._publish, parts)
            return True

    def _publish(self, parts: Parts) -> None:
        writer = self._writer
        loan, lent = self._loan_for(parts.large)
        if loan is not None and lent:
            arrange(parts, lent, loan.used)
        header = encode_header(writer.published, parts)
        if loan is not None and align(parts.nbytes) + len(header) > loan.ring.slot_nbytes:
            self._abandon(loan)  # too small: what was lent from it is copied, this once
            loan, lent = None, {}
            arrange(parts, lent, 0)
            header = encode_header(writer.published, parts)
        if loan is None:
            loan = writer.loan(align(parts.nbytes) + len(header))
        for i in lent:  # its consumer's now: a late write is an error, not a torn frame
            parts.large[i].flags.writeable = False
        copy_arrays(parts, loan.ring.memory(loan.slot), lent)
        writer.commit(loan, parts.nbytes, header, FLAG_LOCAL_ONLY if parts.pickled else 0)
        if loan is self._loan:
            self._loan = None
        writer.wake_a_consumer()

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array | None:
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes <= SMALL_NBYTES or dtype.hasobject:  # whatever lies there would be taken for pointers
            return None
        with self._lock:
            if self._closed:
                return None
            lent = self._try(self._lend, nbytes)
        if lent is None:
            return None
        root, offset = lent
        array: Array = np.ndarray(shape, dtype, root, offset)
        self._lent = [entry for entry in self._lent if entry[0]() is not None] + [(weakref.ref(array), offset)]
        return array

    def shorten(self, lent: Array, length: int) -> Array:
        """The first rows of an array that :meth:`lend` gave, to be published in its stead; the others are not used any more."""
        rows = lent[:length]
        with self._lock:
            loan = self._loan
            offset = next((offset for ref, offset in self._lent if ref() is lent), None)
            if loan is not None and offset is not None and lent.base is loan.root():
                self._lent.append((weakref.ref(rows), offset))
                if offset + lent.nbytes == loan.used:
                    loan.used -= lent.nbytes - rows.nbytes
        return rows

    def wait_for_room(self) -> None:
        """Return when :meth:`publish` need not wait; if what it publishes was lent, when as much can be lent again afterwards."""
        self._writer.wait_for_room()
        if self._loan is not None:
            self._writer.wait_for_slot()

    def wait_for_slot(self, patience_s: float) -> None:
        """Return when :meth:`publish` finds a slot, or after `patience_s`."""
        if self._loan is None:
            self._writer.wait_for_slot(patience_s)

    def stop_waiting(self) -> None:
        """Let whatever waits for room in another thread raise StreamClosed, now and from now on."""
        self._writer.stop_waiting()

    def show_life(self) -> None:
        """Let those who watch know that a message is on its way."""
        self._writer.show_life()

    def close(self, *, patient: bool = True) -> None:
        if os.getpid() != self._pid:
            return  # a forked child, on its way out perhaps: the stream is its parent's
        self._writer.stop_waiting()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._loan is not None:
                self._abandon(self._loan)
        try:
            if self._forwarder is not None:
                self._forwarder.close(patient=patient)
        finally:  # also when Ctrl-C ends its patience
            self._writer.close()

    def _loan_for(self, arrays: list[Array]) -> tuple[Loan | None, dict[int, int]]:
        """The current loan if this message should use it, and the offsets of the arrays that already are in it."""
        loan = self._loan
        root = None if loan is None else loan.root()
        if loan is None or root is None:
            return loan, {}
        lent: dict[int, int] = {}
        for ref, offset in self._lent:
            array = ref()
            # The very array that was lent, and once: views of it, which would stay writable, are copied.
            number = next((i for i, candidate in enumerate(arrays) if candidate is array), None)
            if array is not None and number is not None and array.base is root:
                lent[number] = offset
        # Lent arrays that are alive but not in this message: the script still needs them, so take another slot.
        return (loan, lent) if lent else (None, {})

    def _lend(self, nbytes: int) -> tuple[Bytes, int] | None:
        if self._loan is None:
            self._loan = self._writer.try_loan(nbytes) if self._writer.can_lend() else None
        return self._loan.lend(nbytes) if self._loan is not None else None

    def _try(self, step: Callable[[_T], _U], argument: _T) -> _U:
        """Take a step. If it fails anywhere, as after Ctrl-C, no slot stays LOANED for ever: but not while the same thread is in
        the middle of another one, from which a signal's handler came here.
        """
        if self._is_in_doubt and not self._depth:
            self._recover()  # Ctrl-C came twice
        self._depth += 1
        try:
            return step(argument)
        except BaseException:
            self._is_in_doubt = True
            raise
        finally:
            self._depth -= 1
            if self._is_in_doubt and not self._depth:
                self._recover()

    def _recover(self) -> None:
        """No loan is current any more; what was lent and still lives is copied when it is published."""
        if not self._closed:  # by a signal's handler, and the stream may have another producer already
            self._loan = None
            self._writer.recover()
        self._is_in_doubt = False

    def _abandon(self, loan: Loan) -> None:
        if loan.ring.info(loan.slot).state == State.LOANED:  # not closed by a signal handler meanwhile
            loan.ring.abort(loan.slot)
        if loan is self._loan:
            self._loan = None
