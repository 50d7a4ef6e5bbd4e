"""TCP: whole messages, for consumers that do not share the producer's memory.

=============  =====================================================================================================
protocol.py    what is said, and what follows from it, without I/O: theory of operation, states, what is promised
forwarder.py   the producer's end: a thread that takes messages from the ring and sends them (ROUTER)
lane.py        the consumer's end: a connection to one producer (DEALER)
inlet.py       the way back of a channel: where an instance finds what was posted to it
frames.py      the memory of received messages
sockets.py     what both ends ask of ZeroMQ
=============  =====================================================================================================

Keys (CURVE) are in launch/keys.py.
"""

from .forwarder import TcpForwarder
from .lane import Demand, TcpLane

__all__ = ["Demand", "TcpForwarder", "TcpLane"]
