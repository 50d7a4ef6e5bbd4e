"""A lease: a consumer's hold on a slot, for as long as any view of the slot's memory lives."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ..errors import UnreadableMessage
from ..memory.ring import Bytes, Ring
from ..message.wire import Message


class Lease(weakref.ref[Bytes]):
    """Ends when the array that it refers to, on which all arrays of a message are built, has gone; in whatever thread."""

    __slots__ = ("call", "generation", "ring", "slot")
    ring: Ring
    slot: int
    generation: int
    call: int
    """In which call of ``receive`` it was made, see :class:`Calls`."""


class Claimed(NamedTuple):
    """A message that one consumer alone has, as bytes."""

    header: bytes
    payload: Bytes
    """(n,) uint8. Either the slot itself, leased until the last view of this array has gone, or a copy."""
    sequence: int
    """Number of the message within its stream."""
    lease: Lease | None
    """None if the payload is a copy."""


class Calls:
    """Which call of a source's ``receive`` runs, and which was the last that handed its messages over.

    An interrupt is treated as a small death: a message of a call that never returned was not received, and is put back. A call
    that is cut short leaves `number` and `handed` different; the next one finds that, and reconciles the consumer with the slot
    table. To hand over is one store, the last thing that ``receive`` does, so there is no moment in between.

    A message that holds no slot (a copy, one without large arrays, one that came over TCP) cannot be put back. A lane notes it
    here before it lets go of the original, and the next call hands it out first.
    """

    __slots__ = ("cut", "given", "handed", "loose", "number", "source", "unreadable")

    def __init__(self) -> None:
        self.number = 0
        self.handed = 0
        self.cut = False
        """Whether an exception ended the current call."""
        self.loose: list[tuple[Message, Callable[[], object]]] = []
        """Messages of this call, and of earlier ones that were cut short, that hold no slot; and what lets go of the original."""
        self.given = 0
        """How many of these this call hands out."""
        self.source: Callable[[], object] | None = None
        """A weak reference to the source whose calls these are."""
        self.unreadable: deque[UnreadableMessage] = deque()
        """What could not be opened, and has let go of its slot. The source raises it in its turn."""

    def note(self, message: Message, let_go: Callable[[], object]) -> None:
        """Note a message that this call hands out and that holds no slot; then let go of the original.

        Args:
            message: it.
            let_go: releases the slot that it was in, or tells its producer elsewhere that it was taken. May be called again.
        """
        self.loose.append((message, let_go))
        self.given += 1
        let_go()

    def note_unreadable(self, where: str, error: Exception) -> None:
        """Note that a message could not be opened. Its slot is, or will be, FREE: it is lost.

        Args:
            where: it came from, for people.
            error: why. As text: the frames of its traceback hold the message.
        """
        self.unreadable.append(UnreadableMessage(f"A message from {where} cannot be opened, and is lost. {error}"))

    def settle(self) -> None:
        """After a call that was cut short: let go of the original of the last message that it noted, perhaps once more."""
        if self.loose:
            self.loose[-1][1]()
