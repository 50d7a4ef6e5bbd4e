"""Messages both ways between a trainer and an instance: this is the trainer's end."""

from __future__ import annotations

import math
import time
from typing import Any

from blendtorch_shm.arguments import integer
from blendtorch_shm.closing import Closable
from blendtorch_shm.launch.address import check_endpoint, find
from blendtorch_shm.transport.channel import connect_channels
from blendtorch_shm.wording import counted

from .constants import DEFAULT_TIMEOUTMS
from .waiting import LOOK_EVERY_S, ChannelReader, Watch


class DuplexChannel(Closable):
    """A channel to one instance: :class:`blender_side.duplex.DuplexChannel` is its other end.

    On this host arrays lie in shared memory both ways, and nothing but slot numbers travels; an instance elsewhere is reached by
    one TCP connection. An instance that is restarted goes on with what its predecessor had not taken. One trainer at a time.

    Args:
        address: of the instance, such as ``launch_info.addresses['CTRL'][0]``. It need not run yet.
        btid: part of each message that is sent; None, as blendtorch has it, says that it is the trainer's.
        lingerms: milliseconds that :meth:`close` may wait, beyond some seconds, for an instance elsewhere to receive what was
            sent.
        timeoutms: patience of :meth:`send`, in milliseconds, while ten messages wait for the instance.

    Raises:
        ConfigurationError: not an address, or another program of this host is connected.

    Example::

        channel = btt.DuplexChannel(launch_info.addresses["CTRL"][0])
        number = channel.send(location=np.zeros(3))
        reply = channel.recv(timeoutms=10_000)
    """

    def __init__(
        self, address: str, btid: int | None = None, lingerms: int = 0, timeoutms: int = DEFAULT_TIMEOUTMS
    ) -> None:
        check_endpoint(address)
        self.address = find(address)
        self._channel = connect_channels(
            [self.address],
            btid=btid,
            timeout_s=integer("timeoutms", timeoutms, 0) / 1000,
            lingerms=integer("lingerms", lingerms, 0),
        )
        reader = ChannelReader((self.address,))
        self._for_messages = Watch(reader, self._channel.source)
        self._for_room = Watch(reader, self._channel.source)  # by another thread, perhaps
        self._received = 0
        self._begun = False  # the wait of this call
        self._anew = True  # whether anything has arrived since the last look
        self._looked = -math.inf

    @property
    def btid(self) -> int | None:
        """Part of each message that is sent."""
        return self._channel.btid

    def send(self, **kwargs: Any) -> int:
        """Send a message to the instance; waits while ten that were sent before have not been taken.

        Args:
            **kwargs: anything that can be published: ndarrays, numbers, texts, dicts and lists of these.

        Returns:
            number of the message: ``btmid`` of what the instance receives.

        Raises:
            StreamTimeout: no room for longer than the patience.
            InstanceDied: no room, and the instance is gone for good.
            PublishError: a value cannot be sent; names its key. Nothing was sent.
        """
        return self._channel.send(kwargs, self._look_for_the_end)

    def recv(self, timeoutms: int | None = None) -> dict[str, Any] | None:
        """The next message of the instance, or None if none came in time.

        Args:
            timeoutms: patience in milliseconds. 0: only look. None: for as long as it takes.

        Returns:
            a dict: ``btid`` and ``btmid`` (ints), and what was sent. Its ndarrays lie in the slot of the message, are writable,
            and stay as they are for as long as they live.

        Raises:
            InstanceDied: while it waited, the instance was found to be gone for good, and nothing is left of what it sent. Says
                how it ended, with the end of its log. Not of an instance elsewhere, of which this host does not know that.
            UnreadableMessage: the next message cannot be opened here, and is lost.
        """
        self._begun = False
        message = self._channel.receive(math.inf if timeoutms is None else timeoutms / 1000, self._look)
        if message is not None:  # no calls here: Ctrl-C would cost the message
            self._received += 1
            self._anew = True
        elif timeoutms and time.monotonic() - self._looked > LOOK_EVERY_S:  # short waits, one after the other
            self._looked = time.monotonic()
            if self._anew:
                self._begin()
            self._for_messages.look_for_the_end(self._progress())
        return message

    def _look(self) -> None:
        """Nothing has come for a while."""
        self._looked = time.monotonic()
        if not self._begun:
            self._begun = True
            self._begin()
        self._for_messages.look()

    def _begin(self) -> None:
        self._for_messages.begin(self._progress(), anew=self._anew)
        self._anew = False

    def _look_for_the_end(self) -> None:
        """There is no room for a message."""
        self._for_room.look_for_the_end(self._progress())

    def _progress(self) -> str:
        return counted(self._received, "message")

    def close(self) -> None:
        """Close this end. What was sent is still delivered; arrays that were received stay valid."""
        self._channel.close()

    def __del__(self) -> None:
        channel = getattr(self, "_channel", None)
        if channel is not None:
            channel.close(patient=False)
