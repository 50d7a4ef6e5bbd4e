"""A slot in the producer's hands, and the arrays in it that a script was lent.

A lent array lies in the slot that the next message is sent from, so to render into it is to render into shared memory. The
message finds it *in place* and copies nothing. It lies in a :class:`~..memory.own_pages.Window` on the slot, which the message
seals: what is written to it later, through views that were kept, reaches nobody.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np

from ..memory.layout import align
from ..memory.own_pages import Window
from ..memory.ring import Bytes, Ring
from ..message.dtypes import Array


class Pin(weakref.ref[Bytes]):
    """Knows until when arrays that a script was lent are alive; their slot is not loaned again before.

    It has no callback: an interrupt may hit one, and then the slot would stay pinned.
    """

    __slots__ = ("ring", "slot", "window")
    ring: Ring
    slot: int
    window: Window
    """That they lie in."""


def keep_lent(ring: Ring) -> None:
    """What this process was lent of a ring's slots, and still holds, becomes copies: the slots may be used again."""
    for pin in list(ring.pins.values()):
        if isinstance(pin, Pin) and pin() is not None:
            pin.window.keep()


class Loan:
    """A LOANED slot, until its message is committed.

    Attributes:
        ring, slot: which.
        used: bytes at its start that lent arrays occupy.
    """

    def __init__(self, ring: Ring, slot: int) -> None:
        self.ring = ring
        self.slot = slot
        self.used = 0
        self._pin: Pin | None = None
        self._window: Window | None = None  # that the lent arrays lie in
        self._lent: list[tuple[weakref.ref[Array], int]] = []  # arrays, and where in the slot

    def root(self) -> Bytes | None:
        """The array that all lent arrays are built on, while any of them is alive."""
        return None if self._pin is None else self._pin()

    def lend(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array | None:
        """An uninitialised array in the slot, or None if there is not so much room, or the process has used up what it may have
        of the kernel.
        """
        root = self.root()
        if root is None:  # what was lent before is gone
            self.used = 0
            self._lent = []
            if self._window is None:
                self.ring.memory(self.slot)  # mapped as a whole; the window takes that along
                try:
                    self._window = self.ring.window(self.slot)
                except OSError:
                    return None
            root = np.frombuffer(self._window.view, np.uint8)
        offset = align(self.used)
        nbytes = math.prod(shape) * dtype.itemsize
        if offset + nbytes > self.ring.slot_nbytes:
            return None
        if self._window is not None and self.root() is not root:
            pin = self._pin = Pin(root)
            pin.ring, pin.slot, pin.window = self.ring, self.slot, self._window
            self.ring.pins[self.slot] = pin
        self.used = offset + nbytes
        array: Array = np.ndarray(shape, dtype, root, offset)
        self._lent = [entry for entry in self._lent if entry[0]() is not None]
        self._lent.append((weakref.ref(array), offset))
        return array

    def part(self, lent: Array, start: int, nbytes: int) -> tuple[Window, Bytes] | None:
        """A window of its own on some bytes of an array that :meth:`lend` gave, and these bytes, which keep that array alive.

        None if the process has used up what it may have of the kernel, or it is no such array.
        """
        offset = next((offset for ref, offset in self._lent if ref() is lent), None)
        if offset is None or self._window is None or lent.base is not self.root():
            return None
        try:
            window, at = self._window.part(offset + start, nbytes)
        except OSError:
            return None
        return window, window.array(at, nbytes, lent)

    def seal(self) -> None:
        """What was lent is the script's own from now on; the message has what was written until now."""
        if self._window is not None:
            self._window.seal()

    def shorten(self, lent: Array, length: int) -> Array:
        """The first rows of an array that :meth:`lend` gave, to be published in its stead; the others are not used any more."""
        rows = lent[:length]
        offset = next((offset for ref, offset in self._lent if ref() is lent), None)
        if offset is not None and lent.base is self.root():
            self._lent.append((weakref.ref(rows), offset))
            if offset + lent.nbytes == self.used:
                self.used -= lent.nbytes - rows.nbytes
        return rows

    def in_place(self, arrays: Sequence[Array]) -> dict[int, int]:
        """Of a message's arrays, by number, the offsets of those that lie in the slot already.

        Only the very array that was lent counts, and once; views are copied. So is an array whose strides were changed: its
        elements do not lie in their order any more.
        """
        root = self.root()
        found: dict[int, int] = {}
        if root is not None:
            for ref, offset in self._lent:
                array = ref()
                number = next((i for i, candidate in enumerate(arrays) if candidate is array), None)
                if array is not None and number is not None and array.base is root and array.flags.c_contiguous:
                    found[number] = offset
        return found
