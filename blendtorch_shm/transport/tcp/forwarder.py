"""The producer's end of TCP: a consumer of its own stream that sends what it takes to consumers elsewhere.

It leases a slot when a consumer has room, and sends from the slot without a copy. So it competes fairly with the consumers that
share the memory. What is said, and when, is in protocol.py. Consumers are unknown programs until they have greeted properly;
where a launcher made keys, they are not even heard without those (CURVE, launch/keys.py).

A port that cannot be bound is an error for a script that was started by hand: its readers would wait in vain. An instance of a
launch is read in shared memory, too, so it goes on without the port, says so, and tries again and again.

A slot is released when the consumer says that it has taken the message. ZeroMQ may hold on to the memory a little longer, but no
longer sends from it: a consumer says so only when it has the whole message, and messages of one connection come in order. (An
earlier connection that broke may send on from a slot that has a new message by now. Nobody listens there: a consumer closes a
connection before it greets on the next one.)
"""

from __future__ import annotations

import errno
import logging
import operator
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import zmq
import zmq.utils.garbage  # now: it registers with atexit, and who publishes must be closed before

from ...closing import Closable
from ...errors import ConfigurationError, PortInUse, SegmentError
from ...launch.address import Address, is_loopback
from ...launch.keys import ServerKeys
from ...memory.locks import PRODUCER_LOCK, Locks
from ...stream.bell import private_bell
from ...stream.consumer import Consumer
from ...stream.lease import Claimed
from ...stream.place import Place
from .inlet import Inlet
from .protocol import Action, Deliver, GiveBack, ProducerSession, Release, Send, Tell
from .sockets import CONNECTION_ENDS, MAX_MESSAGE_NBYTES, limit_silence, monitor, next_event, readable, stop_monitor

log = logging.getLogger("blendtorch.tcp")

_PATIENCE_S = 120
"""The other host is gone when it acknowledges no packet for so long; see lane.py."""
_CLOSING_PATIENCE_S = 5.0
"""How long a producer that closes waits for a message to be taken that is on its way to a consumer."""
_LAST_CHANCE_S = 120.0
"""How long it waits where messages are left that only consumers elsewhere may ever come for."""
_WAIT_IN_SILENCE_S = 2.0
"""A producer that closes says after so long what it waits for."""
_BIND_EVERY_S = 1.0
"""A port that another program has is tried again this often."""
_LOOK_EVERY_MS = 100
"""While consumers are connected: lost ones, dead ones and messages that somebody else gave back need a look this often."""
_MAX_GREETING_NBYTES = 2**16
_MAX_HEARD = 256
"""Greetings and the like that are heard before messages are sent again, so that nobody keeps a producer busy by talking."""
_ZAP_DOMAIN = b"blendtorch"
_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)  # plain ints: this is the hot path


class TcpForwarder(Closable):
    """Sends the messages of a stream to consumers elsewhere.

    Its thread works also while the script renders, and sleeps while nobody is connected.

    Args:
        place: the stream to take messages from.
        address: ``tcp://`` endpoint to bind, with its keys if connections are to be authenticated.
        lingerms: extra milliseconds that closing may wait for consumers, connected or not.
        is_channel: whether one consumer, a trainer, may send messages back: see `inlet`.

    Attributes:
        inlet: where these arrive; None where this is no channel.
        waits: whether it wants to know of the next commit: the producer calls :meth:`wake` then.

    Raises:
        PortInUse: somebody else listens there, and nobody can read the stream in shared memory.
        ConfigurationError: not an endpoint that can be bound, or one beyond loopback without keys.

    Example::

        producer.forwarder = TcpForwarder(producer.place, Address("tcp://127.0.0.1:11000"))
    """

    def __init__(self, place: Place, address: Address, *, lingerms: int = 0, is_channel: bool = False) -> None:
        keys = address.keys if isinstance(address.keys, ServerKeys) else None
        _check_reach(address, keys)
        self.waits = False
        self.authenticated = keys is not None
        self._address = address
        self._lingerms = lingerms
        self._returned: deque[Claimed] = deque()  # copies that somebody did not take
        self._complained: set[str] = set()
        self._closing = False
        self._patient = True
        self._told_what_is_left = False
        self._bell = private_bell()
        self._context = zmq.Context()
        self._authenticator: Any = None
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.router_mandatory = 1  # a route that is gone is an error
        self._socket.rcvhwm = 1000
        self._socket.sndhwm = 0  # what is on its way is limited per consumer, in messages
        self._socket.linger = 0
        self._socket.maxmsgsize = MAX_MESSAGE_NBYTES if is_channel else _MAX_GREETING_NBYTES
        self._socket.handshake_ivl = 10_000
        limit_silence(self._socket, _PATIENCE_S)
        self._monitor = monitor(self._socket, CONNECTION_ENDS)
        try:
            if keys is not None:
                self._authenticate(keys)
            self._is_bound = self._try_bind()
            self._tried_at = time.monotonic()
            self._consumer = Consumer(place, forwards=True)
            self._consumer.say_unreachable(not self._is_bound)
        except BaseException:
            self._shut()
            raise
        self.inlet = Inlet(self._bell, f"{address}", trusted=self.authenticated) if is_channel else None
        launch = int(address.launch or "0", 16)
        self._session: ProducerSession = ProducerSession(
            self._consumer.key, launch, is_channel=is_channel, is_taken=self._has_trainer_here
        )
        self._poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._bell.fd):
            self._poller.register(source, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name=f"blendtorch {address}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """A message was committed. From any thread."""
        self.waits = False  # first: whoever finds it False may rely on the bell
        self._bell.ring()

    def close(self, *, patient: bool = True) -> None:
        """If `patient`, wait until consumers have taken what there is, for as long as they do take it; then stop."""
        self._patient = patient
        self._closing = True
        self._bell.ring()
        self._thread.join()

    def __repr__(self) -> str:
        return f"<TcpForwarder {self._address}, {len(self._session.peers)} consumers{', closing' if self._closing else ''}>"

    def _authenticate(self, keys: ServerKeys) -> None:
        from zmq.auth.thread import ThreadAuthenticator  # here: it imports asyncio

        self._authenticator = ThreadAuthenticator(self._context, log=logging.getLogger("blendtorch.zap"))
        self._authenticator.start()
        expected = keys.client_public.encode()
        readers = SimpleNamespace(callback=lambda domain, key: secrets.compare_digest(key, expected))
        self._authenticator.configure_curve_callback(_ZAP_DOMAIN.decode(), readers)
        self._socket.zap_domain = _ZAP_DOMAIN
        self._socket.zap_enforce_domain = 1
        keys.secure(self._socket)

    def _try_bind(self) -> bool:
        """Listen for consumers; False if that is not possible now, and the stream can do without them."""
        try:
            self._socket.bind(self._address)
            return True
        except zmq.ZMQError as error:
            is_taken = error.errno == errno.EADDRINUSE
            if self._address.twin is not None and (is_taken or error.errno == errno.EADDRNOTAVAIL):
                why = "another program listens there" if is_taken else "this host does not have that address now"
                self._warn_once(
                    f"Readers elsewhere cannot reach {self._address}: {why}. Readers on this host that share its memory go on. "
                    f"The port is tried again each second."
                )
                return False
            if is_taken:
                raise PortInUse(
                    f"Cannot publish on {self._address}: another program listens there. Stop it, or choose another port "
                    f"(start_port= of BlenderLauncher)."
                ) from error
            raise ConfigurationError(
                f"Cannot publish on {str(self._address)!r}: {error}. Expected tcp://ADDRESS:PORT."
            ) from error

    def _bind_later(self) -> None:
        if self._is_bound or time.monotonic() - self._tried_at < _BIND_EVERY_S:
            return
        self._is_bound = self._try_bind()
        self._tried_at = time.monotonic()
        if self._is_bound:
            self._consumer.say_unreachable(False)
            log.warning("Readers elsewhere can reach %s now.", self._address)

    def _shut(self, linger_ms: int = 0) -> None:
        stop_monitor(self._socket)
        for socket in (self._monitor, self._socket):
            socket.close(linger=linger_ms)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    # -- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        progress = 0.0  # when a consumer took something, while closing
        try:
            while True:
                wants_more = self._send()
                if self._closing:
                    progress = progress or time.monotonic()
                    idle_s = time.monotonic() - progress
                    if self._is_done(idle_s):
                        break
                    if idle_s > _WAIT_IN_SILENCE_S:
                        self._say_what_is_left()
                if wants_more:
                    self.waits = True
                    self._send()  # what was committed before the producer saw that we wait
                taken = self._wait()
                self.waits = False
                self._bind_later()
                if taken:
                    progress = 0.0
                self._perform(self._session.time_passed(time.monotonic()))
        except Exception:
            log.exception("Consumers elsewhere get nothing more from %s.", self._address)
        finally:
            self.waits = False
            self._say_what_was_received()  # else a successor would get it again
            is_on_its_way = self._patient and any(peer.sent for peer in self._session.peers)  # large, on a slow link
            self._perform(self._session.end())
            self._perform(self._session.dismiss_unreachable())
            self._say_what_is_lost()
            linger_s = _LAST_CHANCE_S if is_on_its_way else _WAIT_IN_SILENCE_S
            self._shut(linger_ms=int(linger_s * 1000) + self._lingerms)
            self._consumer.close()
            self._consumer.finish()  # what is sent is its consumers'

    def _is_done(self, idle_s: float) -> bool:
        """Whether closing need not wait any longer, `idle_s` seconds after a consumer took something."""
        patience_s = 0.0
        if not self._patient:
            return True
        peers = self._session.peers
        if self._returned or self._consumer.has_ready(local=self.authenticated):
            if peers or not is_loopback(self._address):
                patience_s = _LAST_CHANCE_S
        elif any(peer.sent for peer in peers):
            patience_s = _CLOSING_PATIENCE_S
        elif not self._consumer.has_ready():  # nor what only readers on this host may take; they may still come
            return True
        return idle_s >= patience_s + self._lingerms / 1000

    def _say_what_is_left(self) -> None:
        if not self._told_what_is_left:
            self._told_what_is_left = True
            log.warning(
                "%s closes, and waits for up to %.0f s until its last messages are taken; %d consumers are connected.",
                self._address,
                _LAST_CHANCE_S + self._lingerms / 1000,
                len(self._session.peers),
            )

    def _say_what_is_lost(self) -> None:
        if self._returned:
            log.warning(
                "%s closed: %d messages that were sent and not taken are lost.", self._address, len(self._returned)
            )
        if self._patient and self._address.twin is None and self._consumer.has_ready(local=self.authenticated):
            log.warning("%s closed: messages that nobody came for are lost.", self._address)

    def _wait(self) -> bool:
        """Sleep until there is something to do; whether a consumer took a message."""
        timeout_ms = None if self._is_bound else int(_BIND_EVERY_S * 1000)
        events = dict(self._poller.poll(_LOOK_EVERY_MS if self._session.peers or self._closing else timeout_ms))
        if self._bell.fd in events:
            self._bell.clear()
            self._say_what_was_received()
        if self._monitor in events:
            self._hear_of_connections()
        if not events:
            self._consumer.look_after()
        return self._socket in events and self._hear()

    def _hear(self) -> bool:
        """Hear what consumers say; whether one took a message."""
        taken = False
        for _ in range(_MAX_HEARD):
            try:
                route, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            actions = self._session.hear(route, frames)
            taken = taken or any(isinstance(action, Release) for action in actions)
            self._perform(actions)
        return taken

    def _has_trainer_here(self) -> bool:
        """Whether a program that shares the memory has the other end of this channel."""
        twin = self._address.twin
        if twin is None:
            return False
        try:
            with Locks(twin.back().lock_path, create=False) as locks:
                return locks.is_held(PRODUCER_LOCK)
        except SegmentError:  # nobody has ever had it
            return False

    def _say_what_was_received(self) -> None:
        while self.inlet is not None and (received := self.inlet.next_received()) is not None:
            self._perform(self._session.say_received(*received))

    def _hear_of_connections(self) -> None:
        while readable(self._monitor):
            event = next_event(self._monitor)
            if event == zmq.EVENT_DISCONNECTED:
                self._session.connection_ended(time.monotonic())
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._complain(f"A program that does not have the keys of this launch was refused at {self._address}.")
            else:
                self._complain(f"A program was refused at {self._address}: it does not speak as consumers here do.")

    def _send(self) -> bool:
        """Send what there is to those who have room; whether one of them waits for more."""
        self._perform(self._session.send_again())
        # Of the slots, so that who takes nothing starves nobody.
        share = max(1, self._consumer.leasable() // max(1, len(self._session.peers)))
        while (peer := self._session.hungriest(share)) is not None:
            claimed = self._take_newest() if peer.newest else self._take(copy=not peer.sent)
            if claimed is None:
                return True
            self._perform(self._session.assign(peer, claimed))
        return False

    def _take(self, *, copy: bool) -> Claimed | None:
        """The next message. `copy`: whether a copy will do, which would die with this process; so only for who has nothing."""
        return self._returned.popleft() if self._returned else self._claim(copy=copy)

    def _take_newest(self) -> Claimed | None:
        """The newest message; older ones are skipped, copies too."""
        claimed = self._claim(newest=True)
        if claimed is None and self._returned:
            claimed = max(self._returned, key=operator.attrgetter("sequence"))
            self._returned.remove(claimed)
        if claimed is not None and self._returned:
            self._consumer.count_skipped(len(self._returned))
            self._returned.clear()
        return claimed

    def _claim(self, *, copy: bool = True, newest: bool = False) -> Claimed | None:
        try:
            return self._consumer.claim(copy=copy, local=self.authenticated, newest=newest)
        except SegmentError as error:
            self._complain(f"A message was not sent: {error}")
            return None

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._try_send(action.route, action.stamp, action.message.header, action.message.payload)
            elif isinstance(action, Tell):
                self._try_send(action.route, action.remark)
            elif isinstance(action, Release):
                if action.message.lease is not None:
                    self._consumer.end(action.message.lease)
            elif isinstance(action, GiveBack):
                if action.message.lease is not None:
                    self._consumer.give_back(action.message.lease)
                    self._consumer.pass_on()
                else:
                    self._returned.append(action.message)
            elif isinstance(action, Deliver):
                if self.inlet is not None and not self.inlet.put(action):
                    self._perform(self._session.say_received(action.session, action.sequence))
            else:
                self._complain(f"A program at {self._address} was refused, or made no sense: {action.why!r}.")
        self._consumer.count_remote(len(self._session.peers))

    def _try_send(self, route: bytes, *frames: Any) -> None:
        """Like pyzmq's ``send_multipart(copy=False)``, which also makes a ``Frame`` of each part that it copies.

        If the route is gone, its own frame is refused, and nothing is sent.
        """
        send = self._socket.send
        try:
            send(route, _MORE)
            for frame in frames[:-1]:
                send(frame, _MORE, len(frame) < zmq.COPY_THRESHOLD)
            send(frames[-1], _LAST, len(frames[-1]) < zmq.COPY_THRESHOLD)
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self._session.unreachable(route, time.monotonic())

    def _complain(self, text: str) -> None:
        """Count, and log each text once."""
        self._consumer.reject()
        self._warn_once(text, " Later ones are counted silently.")

    def _warn_once(self, text: str, more: str = "") -> None:
        if text not in self._complained and len(self._complained) < 16:
            self._complained.add(text)
            log.warning("%s%s", text, more)


def _check_reach(address: Address, keys: ServerKeys | None) -> None:
    """See whether strangers could connect, and were meant to."""
    if keys is None and not is_loopback(address):
        if not address.unauthenticated:
            raise ConfigurationError(
                f"Publishing on {address} would let every program that reaches this host read from it. Start the script "
                f"through BlenderLauncher, which makes keys, or say allow_unauthenticated=True."
            )
        log.warning("%s is open to every program that reaches this host: connections are not authenticated.", address)
