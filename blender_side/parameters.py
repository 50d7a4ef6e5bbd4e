"""Parameters that the trainer sets while instances render: this is the instance's end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from blendtorch_shm.closing import Closable

from .duplex import DuplexChannel

log = logging.getLogger("blendtorch")


class _Set(NamedTuple):
    """What the trainer has set."""

    trainer: int
    """Random, another one for each ``btt.Parameters``."""
    version: int
    values: dict[str, Any]


class _Channel(DuplexChannel):
    """A channel on which only the last message matters."""

    def supersede(self, **kwargs: Any) -> bool:
        """See :meth:`blendtorch_shm.transport.channel.Channel.supersede`."""
        return self._channel.supersede(kwargs)


class Parameters(Mapping[str, Any], Closable):
    """The newest parameters that have arrived, by their names: :class:`torch_side.parameters.Parameters` sets them.

    They change in :meth:`update` and :meth:`wait` alone, so one frame sees one version. An instance that starts later, or again,
    gets the newest. They stay as they are when the trainer has gone; one that comes after it may begin again with version 1.

    Args:
        address: a socket of its own, as found in ``btargs.btsockets``.
        btid: number of this instance.
        allow_unauthenticated: as for :class:`~.publisher.DataPublisher`.

    Raises:
        PortInUse, ConfigurationError, SegmentError: as for :class:`~.publisher.DataPublisher`.

    Example::

        parameters = btb.Parameters(btargs.btsockets["PARAMS"], btargs.btid)
        publisher = btb.DataPublisher(btargs.btsockets["DATA"], btargs.btid, parameters=parameters)
        parameters.wait()
        while True:
            parameters.update()
            cube.scale = parameters["scale"]
            publisher.publish(image=renderer.render())  # and parameters_version
    """

    def __init__(self, address: str, btid: int | None = None, *, allow_unauthenticated: bool = False) -> None:
        self._newest = _Set(0, 0, {})
        self._channel = _Channel(address, btid, allow_unauthenticated=allow_unauthenticated)
        self._has_asked = False
        self._ask()

    @property
    def version(self) -> int:
        """Of these parameters, as ``set`` of the trainer returned it; 0: none have arrived yet."""
        return self._newest.version

    def update(self) -> bool:
        """Take the newest parameters that have arrived; never waits.

        Returns:
            whether they are newer than those before.
        """
        before = self._newest
        self._ask()
        while (message := self._channel.recv(timeoutms=0)) is not None:
            self._take(message)
        return self._newest is not before

    def wait(self, timeoutms: int | None = None) -> bool:
        """Wait until some parameters have arrived, for a script that needs them before it begins.

        Args:
            timeoutms: patience in milliseconds; None: for as long as it takes.

        Returns:
            whether some have.
        """
        until = math.inf if timeoutms is None else time.monotonic() + timeoutms / 1000
        self.update()
        while self.version == 0 and (remaining_s := until - time.monotonic()) > 0:
            message = self._channel.recv(None if timeoutms is None else math.ceil(remaining_s * 1000))
            if message is not None:
                self._take(message)
                self.update()
        return self.version > 0

    def close(self) -> None:
        """Take no more. Happens by itself when the process ends in good order."""
        self._channel.close()

    def __getitem__(self, name: str) -> Any:
        if name not in self._newest.values and self.version == 0:
            raise KeyError(f"{name!r}: no parameters have arrived yet. wait() waits for the first ones")
        return self._newest.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._newest.values)

    def __len__(self) -> int:
        return len(self._newest.values)

    def __repr__(self) -> str:
        return f"<Parameters, version {self.version}: {', '.join(self)}>"

    def _ask(self) -> None:
        """Ask for the newest, once: a predecessor may have taken them with it."""
        if not self._has_asked:
            self._has_asked = self._channel.supersede(asks=True)

    def _take(self, message: dict[str, Any]) -> None:
        try:
            found = _Set(message["trainer"], message["version"], message["parameters"])
        except KeyError:
            log.warning(
                "What is connected to the socket of btb.Parameters is no btt.Parameters: a message was dropped."
            )
            return
        if found.trainer != self._newest.trainer or found.version > self._newest.version:
            self._newest = found
