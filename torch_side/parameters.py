"""Parameters that the trainer sets while instances render: this is the trainer's end."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from blendtorch_shm.arguments import integer
from blendtorch_shm.closing import Closable
from blendtorch_shm.errors import OutOfSharedMemory, StreamClosed, UnreadableMessage
from blendtorch_shm.launch.address import Address, checked
from blendtorch_shm.launch.keys import ClientKeys
from blendtorch_shm.message.wire import Decoder, Encoder
from blendtorch_shm.process import forks, leaving
from blendtorch_shm.stream.producer import AFTER_FORK
from blendtorch_shm.transport.channel import connect_channels

log = logging.getLogger("blendtorch")

_NEAR_S, _FAR_S = 0.25, 0.02
"""What could not be sent is tried again this often. To an instance elsewhere nothing is sent while something is on its way."""


class Parameters(Closable):
    """Sets parameters of all instances: :class:`blender_side.parameters.Parameters` has the newest.

    Each instance gets the newest ones when it asks for them, and never those before. So :meth:`set` does not wait, however many
    times it is called while an instance renders one frame, or is not there. An instance that starts later, or again, gets the
    newest, too.

    On this host an instance sees what was set at once, elsewhere as soon as it has taken what was on its way: with its update
    after the next, at most. One trainer at a time.

    Args:
        addresses: of the instances, a socket of its own: ``launch_info.addresses['PARAMS']``. They need not run yet.
        version: to go on from: that of the checkpoint that a training goes on from, say.

    Raises:
        ConfigurationError: not an address, or another program of this host has connected there.

    Example::

        with btt.Parameters(launch_info.addresses["PARAMS"]) as parameters:
            version = parameters.set(scale=np.full(3, 1.5), name="wood")
            for item in dataset:
                if item["parameters_version"] == version:
                    ...
    """

    def __init__(self, addresses: str | Iterable[str], *, version: int = 0) -> None:
        found = checked(addresses)
        is_trusted = all(address.twin is not None or isinstance(address.keys, ClientKeys) for address in found)
        self._encoder, self._decoder = Encoder(trusted=is_trusted), Decoder(trusted=is_trusted)
        self._sender = _Sender(found, integer("version", version, 0))

    @property
    def version(self) -> int:
        """The one that was set last."""
        return self._sender.newest.version

    def set(self, **values: Any) -> int:
        """Set parameters, in place of all that were set before.

        Args:
            **values: as for ``DataPublisher.publish``, without ``btid``. They are copied.

        Returns:
            their version: 1, 2, 3, ...

        Raises:
            PublishError: a value cannot be sent; names its key. Nothing was set.
            StreamClosed: after :meth:`close`, or in a forked child.
        """
        parts = self._encoder.take_apart(values)
        payload = np.empty(parts.nbytes, np.uint8)
        parts.copy_into(payload)
        return self._sender.set(self._decoder.decode(parts.header(), payload))

    def close(self) -> None:
        """Set no more. Instances keep the newest that they have."""
        self._sender.close()

    def __del__(self) -> None:
        sender = getattr(self, "_sender", None)
        if sender is not None:
            sender.close(patient=False)

    def __repr__(self) -> str:
        return f"<Parameters, version {self.version}>"


class _Newest(NamedTuple):
    """What was set last."""

    version: int
    values: dict[str, Any] | None
    """None: nothing has been set here."""


class _Sender:
    """Sends what was set last: when it is set, and when an instance asks, which a thread hears.

    Args:
        addresses: of the instances.
        version: to go on from.

    Attributes:
        newest: what was set last.
    """

    def __init__(self, addresses: list[Address], version: int) -> None:
        twins = [address.twin for address in addresses]
        self._near = [i for i, twin in enumerate(twins) if twin is not None]
        self._all = range(len(twins))
        self._addresses = addresses
        self._without_room: set[int] = set()
        self._trainer = secrets.randbits(62) | 1
        self._lock = threading.RLock()
        self.newest = _Newest(version, None)
        self._unsent: set[int] = set()
        """Numbers of those that do not have the newest, and were not sent it."""
        self._closed = self._is_copy = False
        self._patience_s = _NEAR_S if len(self._near) == len(twins) else _FAR_S
        forks.register(self)
        leaving.join(self)  # first: at the end of the process, the thread stops before what it uses
        try:
            self._channel = connect_channels(addresses, timeout_s=0.0)
        except BaseException:
            leaving.leave(self)
            raise
        self._thread = threading.Thread(target=self._run, name="blendtorch parameters", daemon=True)
        self._thread.start()

    def set(self, values: dict[str, Any]) -> int:
        with self._lock:
            if self._closed:
                raise StreamClosed(AFTER_FORK if self._is_copy else "set() after close().")
            self._unsent.update(self._all)  # first: whatever Ctrl-C cuts short, the thread does
            self.newest = newest = _Newest(self.newest.version + 1, values)
            self._send(self._near)  # the others by the thread, which has their connections
        return newest.version

    def _send(self, to: Iterable[int]) -> None:
        version, values = self.newest
        if values is None:
            return
        message = {"trainer": self._trainer, "version": version, "parameters": values}
        for i in to:
            try:
                if i in self._unsent and self._channel.supersede(message, to=i):
                    self._unsent.discard(i)
            except OutOfSharedMemory as error:  # others get theirs
                if i not in self._without_room:
                    self._without_room.add(i)
                    log.error("Parameters could not be sent to %s: %s It is tried again.", self._addresses[i], error)

    def _run(self) -> None:
        while not self._closed:
            try:
                message = self._channel.receive(self._patience_s)
                with self._lock:
                    if message is not None:
                        self._unsent.update(self._all)  # an instance asks; who has the newest drops it
                    if not self._closed:
                        self._send(self._all)
            except StreamClosed:
                return
            except UnreadableMessage as error:
                log.warning("%s", error)
            except Exception:
                log.exception("Instances that start from now on do not get the parameters that were set last.")
                return

    def close(self, *, patient: bool = True) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        leaving.leave(self)
        self._channel.close(patient=patient)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def finish(self) -> None:
        """Close: the process is about to exit."""
        self.close(patient=False)

    def in_child(self) -> None:
        """In a forked child: it is its parent's."""
        self._closed = self._is_copy = True
        self._lock = threading.RLock()
