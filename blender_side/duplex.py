"""Messages both ways between an instance and the trainer: this is the instance's end."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy.typing as npt

from blendtorch_shm.arguments import integer
from blendtorch_shm.closing import Closable
from blendtorch_shm.launch.address import Address, resolve
from blendtorch_shm.transport.channel import bind_channel

from . import endings
from .constants import DEFAULT_TIMEOUTMS


class DuplexChannel(Closable):
    """A channel to the program that trains: :class:`torch_side.duplex.DuplexChannel` is its other end.

    On this host arrays lie in shared memory both ways, and nothing but slot numbers travels; a trainer elsewhere is reached by
    one TCP connection. Each socket of an instance may be a channel or a stream. Works without Blender.

    Args:
        address: where to listen, as found in ``btargs.btsockets``; also any plain ``tcp://ADDRESS:PORT``.
        btid: number of this instance; part of each message.
        lingerms: milliseconds that :meth:`close` may wait for a trainer elsewhere, beyond what a connected one needs.
        timeoutms: patience of :meth:`send`, in milliseconds, while ten messages wait for the trainer. None: without end.
        allow_unauthenticated: as for :class:`~.publisher.DataPublisher`.

    Raises:
        PortInUse, ConfigurationError, SegmentError: as for :class:`~.publisher.DataPublisher`.

    Example::

        channel = btb.DuplexChannel(btargs.btsockets["CTRL"], btargs.btid)
        message = channel.recv(timeoutms=0)
        if message is not None:
            cube.location = message["location"]
            channel.send(done=message["btmid"])
    """

    def __init__(
        self,
        address: str,
        btid: int | None = None,
        lingerms: int = 0,
        timeoutms: int | None = DEFAULT_TIMEOUTMS,
        *,
        allow_unauthenticated: bool = False,
    ) -> None:
        self.btid = btid
        known = resolve(address)
        if allow_unauthenticated:
            known = Address(known, known.twin, known.keys, unauthenticated=True)
        timeout_s = math.inf if timeoutms is None else integer("timeoutms", timeoutms, 0) / 1000
        place = known.twin or str(known)
        endings.take_over(place)
        self._channel = bind_channel(known, btid=btid, timeout_s=timeout_s, lingerms=integer("lingerms", lingerms, 0))
        endings.note(self._channel, place, self)

    def send(self, **kwargs: Any) -> int:
        """Send a message to the trainer; waits while ten that were sent before have not been taken.

        Args:
            **kwargs: as for :meth:`DataPublisher.publish <.publisher.DataPublisher.publish>`.

        Returns:
            number of the message, a random one plus one for each: ``btmid`` of what the trainer receives.

        Raises:
            StreamTimeout: no room for longer than the patience.
            PublishError: a value cannot be sent; names its key. Nothing was sent.
        """
        return self._channel.send(kwargs)

    def recv(self, timeoutms: int | None = None) -> dict[str, Any] | None:
        """The next message of the trainer, or None if none came in time.

        Args:
            timeoutms: patience in milliseconds. 0: only look. None: for as long as it takes.

        Returns:
            a dict: ``btid`` (None), ``btmid`` (int), and what was sent. Its ndarrays are writable, and stay as they are.
        """
        return self._channel.receive(math.inf if timeoutms is None else timeoutms / 1000)

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any] | None:
        """An uninitialised array that the next :meth:`send` sends without a copy, or None: then allocate an ordinary one."""
        return self._channel.lend(shape, dtype)

    def close(self) -> None:
        """Close this end. What was sent is still delivered. Happens by itself when the process ends in good order."""
        self._channel.close(patient=endings.is_patient(sys.exc_info()[0]))
        endings.forget(self._channel)
