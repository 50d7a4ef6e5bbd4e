"""Publishing from Blender: a message of arrays and anything else, once per frame."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from blendtorch_shm.launch.address import Address, resolve
from blendtorch_shm.memory.rows import Kind
from blendtorch_shm.stream import clip
from blendtorch_shm.stream.clip import ClipSink
from blendtorch_shm.stream.producer import Sink
from blendtorch_shm.transport import open_sink

from . import bootstrap, endings

if TYPE_CHECKING:
    from .parameters import Parameters


class Lender(Protocol):
    """Who has a place in shared memory for an array."""

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any] | None:
        """An array there that is not initialised, or None: there is no room now."""


_lenders: dict[Kind, weakref.ref[Lender]] = {}
"""By shape and dtype, who last sent such an array: a renderer's next one will go there."""


class DataPublisher:
    """Sends messages to whoever consumes this instance's socket; each to exactly one consumer.

    On this host a message's arrays lie in shared memory and are never sent: an array made by
    ``OffScreenRenderer.render()`` is there already, any other one is copied there once. Consumers elsewhere get it over TCP.
    Works without Blender.

    Args:
        bind_address: where to listen, as found in ``btargs.btsockets``; also any plain ``tcp://ADDRESS:PORT``.
        btid: number of this instance; part of each message.
        send_hwm: messages that may wait to be taken before :meth:`publish` stalls. None: 10; of clips, about ten frames, but two
            clips at least.
        lingerms: milliseconds that :meth:`close` may spend on sending to TCP consumers, beyond what those already connected need.
        num_slots: messages that shared memory has room for, those in use by consumers included; default `send_hwm` + 6, of
            clips `send_hwm` + 4.
        frames_per_clip: gather so many frames, and send them as one message: a clip. What one :meth:`publish` gives is a frame
            then; `docs/clips.md` says what becomes of its fields. None: each is a message of its own.
        parameters: what the trainer says; each message, or each frame of a clip, then has a field ``parameters_version``: that of
            those that :meth:`Parameters.update <.parameters.Parameters.update>` gave last.
        allow_unauthenticated: beyond loopback, let everybody who can reach `bind_address` read, if the launcher made no
            keys for it. On loopback without a launcher, every user of this host can read in any case.

    A publisher that is forgotten (``del publisher``, say) gives its socket to the next one that asks for it. What it has
    published still arrives, before what the next one publishes; without a launcher, only what consumers that are connected take.

    Raises:
        PortInUse: another program listens on that port, and there is no launcher. With one, readers on this host are served, and
            the port is tried again and again.
        ConfigurationError: an address beyond loopback, without keys; no frames in a clip.
        SegmentError: shared memory is not available, or another publisher, of this process or another one, has this socket.
    """

    def __init__(
        self,
        bind_address: str,
        btid: int | None = None,
        send_hwm: int | None = None,
        lingerms: int = 0,
        *,
        num_slots: int | None = None,
        frames_per_clip: int | None = None,
        parameters: Parameters | None = None,
        allow_unauthenticated: bool = False,
    ) -> None:
        self.btid = btid
        self._parameters = parameters
        self._socket = str(bind_address)
        address = resolve(bind_address)
        if allow_unauthenticated:
            address = Address(address, address.twin, address.keys, unauthenticated=True)
        if frames_per_clip is not None:
            send_hwm, num_slots = clip.limits(frames_per_clip, send_hwm, num_slots)
        elif send_hwm is None:
            send_hwm = 10
        place = address.twin or str(address)
        endings.take_over(place)
        sink = open_sink(address, send_hwm=send_hwm, num_slots=num_slots, lingerms=lingerms)
        self._clips = None if frames_per_clip is None else ClipSink(sink, frames_per_clip, once=("btid",))
        self._sink: Sink = self._clips or sink
        endings.note(self._sink, place, self)

    def publish(self, **kwargs: Any) -> None:
        """Send one message, or add one frame to a clip; waits for as long as consumers leave no room for it.

        Args:
            **kwargs: ndarrays of any shape and dtype, Blender's vectors, matrices and buffers (they arrive as ndarrays), NumPy
                scalars, numbers, strings, bytes, None, and lists, tuples and dicts of all these. Other objects must be
                picklable, and reach consumers on this host, and those elsewhere that have keys. A lent array is its
                consumer's afterwards, and read-only.

        Raises:
            PublishError: a value cannot be sent; names its key. Nothing was sent.
            SystemExit: this instance has published as many messages as one process may (``recycle_after`` of the launcher; a
                clip is one message), and is started afresh. Nothing was sent.
        """
        bootstrap.recycle_if_due(self._socket)
        if self._parameters is not None:
            kwargs = {"parameters_version": self._parameters.version, **kwargs}
        if self._sink.publish({"btid": self.btid, **kwargs}):
            bootstrap.count_published(self._socket)
        note_lender(self, kwargs.values())

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any] | None:
        """An uninitialised array that the next :meth:`publish` sends without a copy, or None: then allocate an ordinary one."""
        return self._sink.lend(shape, dtype)

    def end_clip(self) -> None:
        """Send the clip that was begun, shorter than others, so that the next frame begins a new one: an episode is over, say.

        Does nothing where no clip was begun.
        """
        if self._clips is not None and self._clips.end_clip():
            bootstrap.count_published(self._socket)

    def close(self) -> None:
        """Publish no more. What was published is still delivered, a clip that was begun included.

        Happens by itself when the process ends in good order. On the way out after Ctrl-C it does not wait for TCP consumers to
        take what they have not.
        """
        self._sink.close(patient=endings.is_patient(sys.exc_info()[0]))
        endings.forget(self._sink)

    def __enter__(self) -> DataPublisher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def note_lender(lender: Lender, values: Iterable[Any]) -> None:
    """`lender` sent these values, or sends such as these next: arrays like them may lie in its memory."""
    for value in values:
        if type(value) is np.ndarray:
            lends(lender, (value.shape, value.dtype))


def lends(lender: Lender, kind: Kind) -> None:
    """The next array of this kind may lie in `lender`'s memory."""
    known = _lenders.get(kind)
    if known is None or known() is not lender:
        _lenders[kind] = weakref.ref(lender)


def lend_array(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any] | None:
    """An array in the slot that the next publish will use, or None: then allocate an ordinary one.

    It belongs to whoever last sent an array of this shape and dtype, or is about to.

    Args:
        shape: of the array.
        dtype: of its elements.

    Returns:
        an uninitialised, C-contiguous, writable ndarray; never one that is written to behind its holder's back. Once it is
        published it is read-only; what is written through a view of it that was kept reaches nobody. A read into it with
        ``O_DIRECT``, or a device's copy, has to end before.
    """
    known = _lenders.get((shape, np.dtype(dtype)))
    lender = None if known is None else known()
    return None if lender is None else lender.lend(shape, dtype)


def allocate(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array in the slot that the next publish will use, else an ordinary one."""
    lent = lend_array(shape, dtype)
    return np.empty(shape, dtype) if lent is None else lent
