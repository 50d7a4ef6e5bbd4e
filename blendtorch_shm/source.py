"""Where a consumer gets messages: the protocol, and the implementation over rings."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from .errors import SegmentError, WireError
from .place import Place
from .reader import Reader
from .wire import Announcement, Message, decode

log = logging.getLogger("blendtorch")

IDLE_S = 0.05
"""A source that hears nothing looks at the slot tables itself this often."""
_LOOK_ANYWAY_S = 1.0


class Source(Protocol):
    """Hands out messages: each to one source only, those of one producer in order where it has one source."""

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None after `timeout_s` seconds without one."""

    def explain(self) -> str:
        """What this source is connected to, and what it could not reach and why; for error messages."""

    def close(self) -> None:
        """Receive no more. Arrays that were handed out stay valid."""


class Inbox(Protocol):
    """Where announcements arrive."""

    def get(self, timeout_s: float) -> bytes | None:
        """The next announcement, or None after `timeout_s` seconds."""

    def close(self) -> None:
        """Hear no more."""


class RingSource:
    """A source over the rings of any number of streams, some of which may not exist yet.

    Announcements say where to look. When none comes, and once a second anyway, the slot tables are looked at directly, which
    finds messages whose announcement went to somebody who died. A look that finds something is followed by another one, oldest
    message first, until there is nothing left to find.

    Args:
        places: where the streams live.
        inbox: where their announcements arrive; closed with this source.
    """

    def __init__(self, places: Sequence[Place], inbox: Inbox) -> None:
        self._absent: dict[Place, str] = dict.fromkeys(places, "not looked for yet")  # and why
        self._readers: dict[int, Reader] = {}  # by key, in the order in which they are looked at next
        self._inbox = inbox
        self._looking = True
        self._next_look = 0.0
        self._complained: set[str] = set()

    def receive(self, timeout_s: float) -> Message | None:
        now = time.monotonic()
        deadline = now + timeout_s
        while True:
            if self._looking or now >= self._next_look:
                message = self._look()
                if message is not None:
                    return message
            data = self._inbox.get(IDLE_S if timeout_s >= IDLE_S else timeout_s)
            if data is not None:
                message = self._redeem(data)
                if message is not None:
                    return message
            else:
                self._looking = True
                now = time.monotonic()
                if now >= deadline:
                    return None
                timeout_s = deadline - now

    def close(self) -> None:
        self._inbox.close()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._absent.clear()

    def explain(self) -> str:
        lines = [reader.explain() for reader in self._readers.values()]
        lines += [f"{place.name}: not attached. {why}" for place, why in self._absent.items()]
        return "\n".join(lines)

    def _look(self) -> Message | None:
        self._attach()
        for key, reader in list(self._readers.items()):
            self._readers[key] = self._readers.pop(key)  # to the end: instances take turns
            message = self._open(reader)
            if message is not None:
                self._looking = True
                return message
        self._looking = False
        self._next_look = time.monotonic() + _LOOK_ANYWAY_S
        return None

    def _attach(self) -> None:
        for place in list(self._absent):
            try:
                reader = Reader(place)
            except SegmentError as error:
                self._absent[place] = str(error)
                continue
            del self._absent[place]
            self._readers[reader.key] = reader

    def _redeem(self, data: bytes) -> Message | None:
        try:
            announcement = Announcement.decode(data)
        except WireError as error:
            self._complain("announcement", error)
            return None
        reader = self._readers.get(announcement.key)
        if reader is None:
            self._looking = True  # of a stream that has just begun: attach, and take its messages in order
            return None
        return self._open(reader, announcement)

    def _open(self, reader: Reader, announcement: Announcement | None = None) -> Message | None:
        """Take and decode the announced message, or the oldest one."""
        try:
            claimed = reader.take(announcement) if announcement else reader.take_oldest()
            return None if claimed is None else decode(claimed.header, claimed.payload, trusted=True)
        except (WireError, SegmentError) as error:
            reader.reject()
            self._complain(reader.place.name, error)
            return None

    def _complain(self, about: str, error: Exception) -> None:
        if about not in self._complained:
            self._complained.add(about)
            log.error("A message was dropped (later ones of the same origin are counted silently): %s", error)
