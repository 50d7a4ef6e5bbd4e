"""The three ways a message travels, behind ``Sink`` (stream/sink.py) and ``Source`` (stream/source.py).

==================  =====================  =========================================  ==================================
transport           the ring lives in      who takes a message                        the payload travels
==================  =====================  =========================================  ==================================
shared memory       shared memory          the consumer                               not at all
``tcp``             either                 a thread of the producer, which sends it   over ``tcp://``, sent from the slot
                                           to whoever has room                        without a copy
``local``           one process's memory   the consumer                               not at all
==================  =====================  =========================================  ==================================

:func:`open_sink` and :func:`open_source` choose by address.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..launch.address import Address
from ..process import descriptors
from ..stream.place import PrivatePlace, SharedPlace
from ..stream.sink import RingSink
from ..stream.source import RingSource, Source
from ..stream.writer import Writer
from .mixed import MixedSource
from .tcp import TcpForwarder, TcpSource

__all__ = ["open_sink", "open_source"]

_PER_SINK = 40
"""File descriptors: 16 to begin with, and the bells of some consumers, and connections of those elsewhere."""
_PER_TWIN = 6
"""Its lock file, two bells, its control segment and two rings: a mapping keeps its file open."""
_PER_REMOTE, _FOR_REMOTE = 5, 24
"""Sockets of ZeroMQ's for each instance elsewhere, and with the first one its threads."""


def open_sink(address: Address, *, send_hwm: int = 10, num_slots: int | None = None, lingerms: int = 0) -> RingSink:
    """A sink that serves `address` over TCP, and its shared-memory twin if it has one.

    Args:
        address: where to listen.
        send_hwm: messages that may wait, unclaimed, before publishing stalls.
        num_slots: slots per ring; default `send_hwm` + 6.
        lingerms: extra milliseconds that closing may wait for TCP consumers to take what is left.

    Raises:
        PortInUse: somebody else listens there.
        OutOfDescriptors: this process has too many files open.
        SegmentError: no shared memory, or another living process publishes to the same twin.
    """
    descriptors.require(_PER_SINK, f"publishing on {address}")
    place = SharedPlace(address.twin) if address.twin is not None else PrivatePlace(str(address))
    writer = Writer(place, max_ready=send_hwm, num_slots=num_slots)
    forwarder = None
    try:
        forwarder = TcpForwarder(place, address, lingerms=lingerms)
        return RingSink(writer, forwarder, trusted=address.twin is not None or address.keys is not None)
    except BaseException:
        if forwarder is not None:
            forwarder.close(patient=False)
        writer.close()
        raise


def open_source(addresses: Sequence[Address], *, queue_size: int = 10, count: int = 2**31) -> Source:
    """A source of all `addresses`: shared memory for those with a twin, TCP for the others.

    Args:
        addresses: any mixture; the producers need not exist yet.
        queue_size: messages that may queue up here per instance, over TCP; in shared memory they wait in their slots.
        count: messages that will be taken in all.

    Raises:
        OutOfDescriptors: this process has too many files open.
    """
    places = [SharedPlace(twin) for twin in dict.fromkeys(a.twin for a in addresses if a.twin is not None)]
    remote = list(dict.fromkeys(a for a in addresses if a.twin is None))
    descriptors.require(
        _PER_TWIN * len(places) + _PER_REMOTE * len(remote) + (_FOR_REMOTE if remote else 0),
        f"reading from {len(addresses)} instances",
    )
    if not remote:
        return RingSource(places)
    tcp = TcpSource(remote, queue_size=queue_size, count=count)
    if not places:
        return tcp
    return MixedSource(RingSource(places, tcp.poller), len(places), tcp, len(remote))
