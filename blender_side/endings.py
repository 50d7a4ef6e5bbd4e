"""What this process has open, publishers and channels, and how each is closed: by its owner, by a successor, or at the end."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import weakref
from typing import Protocol

import blendtorch_shm.transport  # noqa: F401  # now: pyzmq registers with atexit, and what is open must be closed before
from blendtorch_shm.errors import SegmentError
from blendtorch_shm.launch.address import Twin

from . import bootstrap


class Open(Protocol):
    """Something that is closed."""

    def close(self, *, patient: bool = True) -> None:
        """Send no more. What was sent is still delivered; if `patient`, also to those elsewhere who take it only now."""


_open: dict[Open, tuple[Twin | str, weakref.ref[object]]] = {}
"""Where each sends, and for whom. Also those of forgotten owners: what they sent may be on its way."""
os.register_at_fork(after_in_child=_open.clear)  # they are the parent's


def note(opened: Open, place: Twin | str, owner: object) -> None:
    """`owner` has opened something that sends from `place`."""
    _open[opened] = place, weakref.ref(owner)


def forget(opened: Open) -> None:
    """It is closed."""
    _open.pop(opened, None)


def take_over(place: Twin | str) -> None:
    """Close what this process has open at a place, if its owner was forgotten.

    Raises:
        SegmentError: the owner is in use.
    """
    for opened, (taken, owner) in list(_open.items()):
        if taken != place or str(taken).endswith((":*", ":0")):  # those are other ports each time
            continue
        if owner() is not None:
            gc.collect()  # it may only hang in a traceback
        if (living := owner()) is not None:
            name = place.name if isinstance(place, Twin) else place
            raise SegmentError(
                f"This very process has a {type(living).__name__} on {name} already. Use that one, or close() it before "
                f"another is made. For two streams, give each a socket of its own (named_sockets)."
            )
        opened.close(patient=not isinstance(place, Twin))  # in shared memory, messages wait for consumers without us
        _open.pop(opened, None)


@atexit.register  # later than pyzmq's own, so this runs before it
def _close_all() -> None:
    last = None if hasattr(sys, "ps1") else getattr(sys, "last_type", None)  # in a session, that may be long ago
    for opened in list(_open):
        opened.close(patient=is_patient(last))


def is_patient(error: type[BaseException] | None) -> bool:
    """Whether to wait for slow consumers while closing because of `error`."""
    return not bootstrap.is_recycling() and (error is None or not issubclass(error, KeyboardInterrupt))
