"""Where messages of a trainer elsewhere arrive in an instance: the way back of a channel.

The forwarder's thread puts in what it hears, the script's thread takes it. What the script has taken, the forwarder tells the
trainer, which keeps it until then. So what was posted to an instance that dies is posted to its successor.
"""

from __future__ import annotations

import functools
from collections import deque

import numpy as np

from ...errors import WireError
from ...message.wire import Decoder, Message
from ...stream.bell import Bell, private_bell
from ...stream.lease import Calls
from .protocol import Deliver, Inbound


class Inlet:
    """A lane whose messages another thread of this process puts in.

    Args:
        forwarder: its bell, which tells it that something was taken.
        title: where this is, for people.
        trusted: whether messages may contain pickles.

    Attributes:
        sockets: one of them is readable when :meth:`take` may have something, for a ``zmq.Poller``.
        calls: those of the source that this becomes a lane of.
    """

    def __init__(self, forwarder: Bell, title: str, *, trusted: bool) -> None:
        self.calls = Calls()
        self._forwarder = forwarder
        self._title = title
        self._trusted = trusted
        self._decoder = Decoder(trusted=trusted)
        self._bell = private_bell()
        self.sockets = [self._bell.fd]
        self._inbound = Inbound()
        self._arrived: deque[Deliver] = deque()
        self._received: deque[tuple[bytes, int]] = deque()
        self._heard = self._rejected = 0

    # -- in the forwarder's thread ------------------------------------------------------------------------------

    def put(self, post: Deliver) -> bool:
        """A message came. False: it was taken before, and its trainer has not heard that."""
        self._heard += 1
        if self._inbound.is_new(post):
            self._arrived.append(post)
            self._bell.ring()
            return True
        return not self._inbound.was_received(post)

    def next_received(self) -> tuple[bytes, int] | None:
        """The session and the sequence number of what was taken next, and not told yet; None: all is told."""
        if not self._received:
            return None
        session, sequence = self._received.popleft()
        self._inbound.received(session, sequence)
        return session, sequence

    # -- in the script's thread ---------------------------------------------------------------------------------

    def take(self) -> Message | None:
        """The next message, if there is one that can be opened."""
        self._bell.clear()
        while self._arrived:
            post = self._arrived[0]
            try:
                payload = np.frombuffer(bytearray(post.payload), np.uint8)  # writable
                message = Message(post.sequence, self._decoder.decode(post.header, payload))
            except WireError as error:
                self._accept(post)
                self._rejected += 1
                if self._trusted:
                    self.calls.note_unreadable(self._title, error)
                    return None
                continue
            self.calls.note(message, functools.partial(self._accept, post))
            return message
        return None

    def take_many(self, count: int) -> list[Message]:
        """The messages that are here already, `count` at most."""
        messages: list[Message] = []
        while len(messages) < count and (message := self.take()) is not None:
            messages.append(message)
        return messages

    def _accept(self, post: Deliver) -> None:
        """It was taken. May be called again."""
        if self._arrived and self._arrived[0] is post:
            self._received.append((post.session, post.sequence))
            self._arrived.popleft()  # last: an interrupt may come before
        self._forwarder.ring()

    def is_answered(self) -> bool:
        """Whether anything has ever come."""
        return self._heard > 0

    def explain(self) -> str:
        """What came, in one line, for messages to people."""
        rejected = f"; {self._rejected} messages were rejected" if self._rejected else ""
        return f"{self._title}: {self._heard} messages came over TCP{rejected}"

    def close(self) -> None:
        """Take no more. What was not taken, the trainer has still."""
        self._arrived.clear()

    def __repr__(self) -> str:
        return f"<Inlet, {self.explain()}>"
