"""The rings of a stream, as its control segment counts them."""

from __future__ import annotations

from ..errors import OutOfSharedMemory, SegmentError
from ..memory.layout import MAX_RINGS_AT_ONCE, STREAM_HEADER, word
from ..memory.ring import Ring
from .control import Control
from .place import Place

_FIRST_RING, _NEXT_RING = word(STREAM_HEADER, "first_ring"), word(STREAM_HEADER, "next_ring")


class Rings:
    """The rings of the stream at `place`, attached when they are first seen. Makes nobody a member.

    Args:
        place: where they are.
        control: the stream's control segment.
        own: attach their slots as pages of our own: others do not see what is changed there.

    Attributes:
        unattached: why the last of them that should exist could not be attached; "" if all could.
        no_room: likewise, if it is that this process may not map as much.

    Example::

        for ring in Rings(place, Control.attach(place)).now():
            print(ring)
    """

    def __init__(self, place: Place, control: Control, *, own: bool = False) -> None:
        self._place = place
        self._control = control
        self._own = own
        self._known: dict[int, Ring] = {}
        self._current: list[Ring] = []
        self.unattached = ""
        self.no_room = ""
        self._first = self._next = 0  # what the control segment said when those were attached

    def now(self) -> list[Ring]:
        """Those that exist, oldest first."""
        words = self._control.words
        if words[_NEXT_RING] != self._next or words[_FIRST_RING] != self._first:
            self._attach()
        return self._current

    def forget(self) -> None:
        """Unmap them; arrays that lie in them keep what they need."""
        self._known.clear()
        self._current = []
        self._first = self._next = 0

    def __repr__(self) -> str:
        return f"<Rings of {self._place.name}, {self._current}>"

    def _attach(self) -> None:
        first, following = self._control.first_ring, self._control.next_ring
        following = min(following, first + MAX_RINGS_AT_ONCE)
        self.no_room = ""
        self._known = {number: ring for number, ring in self._known.items() if number >= first}
        for number in range(first, following):
            if number not in self._known:
                try:
                    segment = self._place.attach(f".{number}", own=self._own)
                    self._known[number] = Ring.attach(segment, self._control.key, number)
                except SegmentError as error:  # removed meanwhile, as all its messages have been consumed, or a failure
                    self.unattached = str(error)
                    if isinstance(error, OutOfSharedMemory):
                        self.no_room = str(error)
        self._current = [self._known[number] for number in sorted(self._known)]
        if len(self._current) == following - first:  # else try again: not every failure means that it was removed
            self._first, self._next = first, following
            self.unattached = ""
