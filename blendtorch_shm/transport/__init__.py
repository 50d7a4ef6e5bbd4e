"""The ways a message travels, behind one :class:`~..stream.producer.Sink` and one :class:`~..stream.merge.Source`.

==================  =====================  =========================================  ==================================
transport           the ring lives in      who takes a message                        the payload travels
==================  =====================  =========================================  ==================================
shared memory       shared memory          the consumer; while it sleeps, it is       not at all
                                           pushed the number of a slot
``tcp``             either                 a thread of the producer, which sends it   over ``tcp://``, sent from the slot
                                           to whoever has room                        without a copy
``local``           one process's memory   the consumer, likewise                     not at all
==================  =====================  =========================================  ==================================

:func:`open_sink` and :func:`open_source` choose by address.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigurationError
from ..launch.address import Address
from ..process import descriptors
from ..stream.lease import Calls
from ..stream.merge import Source
from ..stream.newest import Newest
from ..stream.place import PrivatePlace, SharedPlace
from ..stream.producer import DEFAULT_SEND_HWM, Producer
from ..wording import counted
from .tcp import Demand, TcpForwarder, TcpLane

__all__ = ["open_sink", "open_source"]

_PER_SINK, _FOR_KEYS = 64, 6
"""File descriptors: 28 to begin with, arrays that were lent, and connections to some consumers, here and elsewhere; what looks
at keys.
"""
_PER_TWIN, _FOR_TWINS = 9, 16
"""Of each stream its lock file, bell, inbox, control segment and two rings, mapped twice (a mapping keeps its file open), and a
connection; with the first stream ZeroMQ's threads.
"""
_PER_REMOTE, _FOR_REMOTE = 5, 24
"""Sockets of ZeroMQ's for each instance elsewhere, and with the first one its threads."""


def open_sink(
    address: Address, *, send_hwm: int = DEFAULT_SEND_HWM, num_slots: int | None = None, lingerms: int = 0
) -> Producer:
    """A sink that serves `address` over TCP, and its shared-memory twin if it has one.

    Args:
        address: where to listen.
        send_hwm: messages that may wait, unclaimed, before publishing stalls.
        num_slots: slots per ring; default `send_hwm` + 6.
        lingerms: extra milliseconds that closing may wait for TCP consumers to take what is left.

    Raises:
        PortInUse: somebody else listens there, and the address has no twin.
        OutOfDescriptors: this process has too many files open.
        SegmentError: no shared memory, or another living process publishes to the same twin.

    Example::

        with open_sink(Address("tcp://127.0.0.1:11000")) as sink:
            sink.publish({"image": image, "frame": 3})
    """
    descriptors.require(_PER_SINK + (_FOR_KEYS if address.keys is not None else 0), f"publishing on {address}")
    place = SharedPlace(address.twin) if address.twin is not None else PrivatePlace(str(address))
    trusted = address.twin is not None or address.keys is not None
    sink = Producer(place, send_hwm=send_hwm, num_slots=num_slots, trusted=trusted)
    try:
        sink.forwarder = TcpForwarder(place, address, lingerms=lingerms)
    except BaseException:
        sink.close(patient=False)
        raise
    return sink


def open_source(
    addresses: Sequence[Address],
    *,
    queue_size: int = 10,
    count: int = 2**31,
    changes: bool = True,
    newest: Newest | None = None,
) -> Source:
    """A source of all `addresses`: shared memory for those with a twin, TCP for the others.

    Args:
        addresses: any mixture; the producers need not exist yet.
        queue_size: messages that may queue up here per instance, over TCP; in shared memory they wait in their slots.
        count: messages that will be taken in all: over TCP, no more are asked for than that, for others wait for them.
        changes: arrays may be changed in place. False for who only reads them, which is a little faster: what it changed all the
            same, another consumer could get, after this one was killed.
        newest: as for :class:`~..stream.merge.Source`. Over TCP, each message is asked for when it is wanted; nothing queues up.

    Raises:
        ConfigurationError: not an endpoint.
        OutOfDescriptors: this process has too many files open.

    Example::

        with open_source(launch_info.addresses["DATA"]) as source:
            message = source.receive(timeout_s=10.0)
    """
    places = [SharedPlace(twin) for twin in dict.fromkeys(a.twin for a in addresses if a.twin is not None)]
    remote = list(dict.fromkeys(a for a in addresses if a.twin is None))
    descriptors.require(
        _PER_TWIN * len(places)
        + (_FOR_TWINS if places else 0)
        + _PER_REMOTE * len(remote)
        + (_FOR_REMOTE if remote else 0),
        f"reading from {counted(len(addresses), 'instance')}",
    )
    if not remote:
        return Source(places, own=changes, newest=newest)
    demand = Demand(len(remote), queue_size=queue_size, count=count)
    calls = Calls()
    lanes: list[TcpLane] = []
    try:
        for address in remote:
            lanes.append(TcpLane(address, demand, calls, newest))
        return Source(places, lanes, calls, own=changes, newest=newest)
    except BaseException as error:
        # To end a context waits for all its sockets, and an interrupt may have left one half made.
        demand.is_abandoned = not isinstance(error, ConfigurationError)
        for lane in lanes:
            lane.close()
        demand.close()
        raise
