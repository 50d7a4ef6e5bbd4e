"""The memory of received messages, and where it is freed.

pyzmq looks for signals whenever it frees a ``Frame``. Python can only print what a signal's handler raises there: Ctrl-C would be
printed, and lost. A frame dies with the last array of its message, so anywhere in a training loop. Therefore it is kept until its
lane frees it, where the interrupt can be raised. No frame is kept beyond the lane: arrays that outlive the lane free theirs.

The memory itself is malloc's. What is freed should stay with the process, for the next message: each page that the kernel hands
out anew costs a fault.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
import zmq

from ...memory.ring import Bytes

_EXAMPLE_NBYTES = 2**25 - 2**13
"""The largest block that glibc's malloc learns from is 32 MiB, with what it adds."""


class _Kept(weakref.ref[Bytes]):
    """Refers to the array that all arrays of a message are built on, and keeps the frame that it lies in."""

    __slots__ = ("frame",)
    frame: zmq.Frame


class Frames:
    """The frames of one lane's messages.

    When an array has gone, in whatever thread, its reference is appended to a deque. That is a call of C, so no signal's handler
    runs in it.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}  # by id: references to arrays have no hash
        self._unused: deque[_Kept] = deque()
        # Made and freed at once: malloc learns that such blocks come and go. Until it returns memory to the kernel, twice as
        # much must be free now, and blocks of this size come from freed memory, too.
        np.empty(_EXAMPLE_NBYTES, np.uint8)

    def array(self, frame: zmq.Frame) -> Bytes:
        """The content of `frame`, (n,) uint8, without a copy."""
        array = np.frombuffer(frame.buffer, np.uint8)
        kept = _Kept(array, self._unused.append)
        kept.frame = frame
        self._kept[id(kept)] = kept
        return array

    def free(self) -> None:
        """Free the frames whose arrays have gone, and raise what a signal's handler raises meanwhile."""
        if not self._unused:
            return
        if threading.current_thread() is threading.main_thread():
            self._free_and_raise()
        else:  # signals interrupt the main thread only
            self._free()

    def close(self) -> None:
        """Free what is unused, and leave the frames of living arrays to these."""
        self.free()
        self._kept.clear()  # those arrays hold their frames too

    def _free(self) -> None:
        while self._unused:
            kept = self._unused[0]  # taken out last: an interrupt may come in between
            self._kept.pop(id(kept), None)
            self._unused.popleft()
            del kept

    def _free_and_raise(self) -> None:
        """pyzmq's extension prints an exception twice: through `sys.excepthook`, then through `sys.unraisablehook`, which gets a
        text where Python's own callers put an object.
        """
        raised: list[BaseException] = []
        thread = threading.get_ident()
        hook, unraisable_hook = sys.excepthook, sys.unraisablehook

        def skip(*error: Any) -> None:
            if threading.get_ident() != thread:
                hook(*error)

        def keep(unraisable: Any) -> None:
            if threading.get_ident() == thread and type(unraisable.object) is str and unraisable.exc_value is not None:
                raised.append(unraisable.exc_value)
            else:
                unraisable_hook(unraisable)

        try:
            sys.excepthook, sys.unraisablehook = skip, keep
            self._free()
        finally:
            sys.excepthook, sys.unraisablehook = hook, unraisable_hook
        if raised:
            raise raised[0]
