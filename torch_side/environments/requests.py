"""What is asked of the environments of some instances, and what they answer.

Each environment has one request at a time. ``blender_side/remote_agent.py`` says what requests and answers look like. An instance
that is started again is another one, with a *nonce* of its own: what was asked of the one before is not answered any more.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from blendtorch_shm.closing import Closable
from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.launch.address import Address
from blendtorch_shm.transport.channel import Channel, connect_channels

from ..waiting import LOOK_EVERY_S, ChannelReader, Watch

_ASK_AGAIN_S = 0.5
_LOOK_AT_LEAST_EVERY_S = 1.0


class Answer(NamedTuple):
    """What an environment said."""

    env: int
    """Which one, from 0."""
    ctx: dict[str, Any] | None
    """What its hooks returned, of the frame that the request was for. None: the instance was started again meanwhile."""
    is_final: bool = False
    """It is of an episode's last frame; the answer proper, of the next one's first frame, follows."""


class Refused(ConfigurationError):
    """An environment refused what it was asked, or said what it may not."""

    def __init__(self, env: int, why: str) -> None:
        super().__init__(f"Environment {env} refused what it was asked: {why}")
        self.env = env


@dataclass
class _Environment:
    watch: Watch
    nonce: int = 0
    """Of the instance; 0: not known yet."""
    request: int = 0
    """The one that is not answered yet; 0: none."""
    greeted_at: float = 0.0
    """When it was last asked who it is; 0: never."""
    is_replaced: bool = False
    """Whether the instance was started again since something was asked of it."""
    asked_at: float = 0.0
    description: dict[str, Any] = field(default_factory=dict)


class Requests(Closable):
    """The environments of some instances, one of each.

    Args:
        addresses: of the instances' sockets, such as ``launch_info.addresses['GYM']``.
        timeoutms: patience for each answer, in milliseconds.

    Raises:
        ConfigurationError: no address, or another program is connected.
    """

    def __init__(self, addresses: Sequence[Address], timeoutms: int) -> None:
        self._timeout_s = timeoutms / 1000
        self._channel: Channel = connect_channels(addresses, timeout_s=self._timeout_s)
        readers = [ChannelReader((address,), timeoutms) for address in addresses]
        self._environments = [_Environment(Watch(reader, self._channel.source)) for reader in readers]
        self._next = secrets.randbits(48) + 1
        self._by_request: dict[int, int] = {}  # those of `hello` as well
        self._strangers: set[int] = set()  # nonces of instances that said hello; which ones these are is not known yet
        self._ready: deque[Answer] = deque()
        self._looked_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._environments)

    def describe(self, env: int) -> dict[str, Any]:
        """What an environment says of itself: `spaces`, `fps`, `has_renderer`. Waits until it runs.

        Raises:
            StreamTimeout: it did not say so in time.
            InstanceDied: it ended; or it failed before it ever ran, though it is started again.
        """
        environment = self._environments[env]
        environment.asked_at = time.monotonic()
        while not environment.nonce:
            for each, other in enumerate(self._environments):
                since_s = time.monotonic() - other.greeted_at
                # An earlier question may have reached a predecessor.
                if not other.nonce and since_s > (
                    _ASK_AGAIN_S if self._strangers or not other.greeted_at else math.inf
                ):
                    self._greet(each)
            self._hear(LOOK_EVERY_S, env)
        return environment.description

    def ask(self, env: int, cmd: str, **content: Any) -> None:
        """Ask something of an environment that has answered everything so far. Waits until it runs.

        Raises:
            StreamTimeout, InstanceDied: as for :meth:`next`.
        """
        environment = self._environments[env]
        if not environment.nonce:
            self.describe(env)
        if environment.request:
            raise ConfigurationError(
                f"Environment {env} has not answered yet: receive its answer first (step and reset do; or recv, after send)."
            )
        is_replaced, environment.is_replaced = environment.is_replaced, False
        if is_replaced and cmd != "reset":
            self._ready.append(Answer(env, None))
            return
        number = self._number(env)
        environment.request, environment.asked_at = number, time.monotonic()
        self._channel.send({"cmd": cmd, "request": number, "to": environment.nonce, **content}, to=env)

    def next(self, timeout_s: float) -> Answer | None:
        """The next answer of any environment, or None if none comes within `timeout_s`.

        Raises:
            StreamTimeout: an environment did not answer within the patience for answers.
            InstanceDied: one ended, and is not started again; says how, and the end of its log.
            Refused: one refused what it was asked.
        """
        if self._ready:
            return self._ready.popleft()
        until = time.monotonic() + timeout_s
        while True:
            remaining_s = until - time.monotonic()
            answer = self._hear(max(0.0, remaining_s), None)
            if answer is not None or remaining_s <= 0:
                return answer

    def wait(self) -> Answer:
        """The next answer of any environment, however long it takes within the patience; raises as :meth:`next`."""
        while (answer := self.next(1.0)) is None:
            pass
        return answer

    def forget(self, env: int) -> None:
        """What was asked of an environment is of no interest any more. Its answer is dropped when it comes."""
        environment = self._environments[env]
        self._by_request.pop(environment.request, None)
        environment.request = 0
        self._ready = deque(answer for answer in self._ready if answer.env != env)

    def close(self) -> None:
        """Ask nothing any more. What was asked and has not arrived elsewhere, nobody needs."""
        self._channel.close(patient=False)

    # -- what comes ---------------------------------------------------------------------------------------------

    def _hear(self, timeout_s: float, described: int | None) -> Answer | None:
        """What one message says, or None. `described` is an environment that is to say who it is."""

        def look() -> None:
            self._look(described)

        if time.monotonic() - self._looked_at > _LOOK_AT_LEAST_EVERY_S:  # while others answer
            look()
        message = self._channel.receive(timeout_s, look)
        if message is None:
            if time.monotonic() - self._looked_at > LOOK_EVERY_S:  # many short waits are a long one
                look()
            return None
        number = message.pop("btanswers", 0)
        env = self._by_request.pop(number, None)
        nonce = message.pop("bthello", 0)
        if env is None:  # an instance that has just started says hello by itself; or it is an answer to somebody else
            if "btenv" in message and all(nonce != environment.nonce for environment in self._environments):
                self._strangers.add(nonce)
                self._ask_who_they_are()
            return None
        environment = self._environments[env]
        if "btenv" in message:
            return self._meet(env, nonce, message["btenv"])
        if number != environment.request:
            return None
        del message["btid"], message["btmid"]
        if message.pop("btfinal", False):
            self._by_request[number] = env  # there is more to come
            return Answer(env, message, is_final=True)
        environment.request = 0
        if "bterror" in message:
            raise Refused(env, message["bterror"])
        return Answer(env, message)

    def _meet(self, env: int, nonce: int, description: dict[str, Any]) -> Answer | None:
        """An instance has said who it is."""
        environment = self._environments[env]
        environment.description = description
        if nonce == environment.nonce:
            return None
        is_replaced, environment.nonce = environment.nonce != 0, nonce
        self._strangers.discard(nonce)
        self._ask_who_they_are()
        if not is_replaced:
            return None
        if not environment.request:
            environment.is_replaced = True
            return None
        self.forget(env)
        return Answer(env, None)

    def _ask_who_they_are(self) -> None:
        """Instances have said hello by themselves: which ones these are, their answers will tell. As long as there are some that
        were asked and have not answered, it is probably those.
        """
        if self._strangers and all(environment.nonce for environment in self._environments):
            self._strangers.clear()
            for env in range(len(self)):
                self._greet(env)

    def _greet(self, env: int) -> None:
        """Ask an instance who it is."""
        self._environments[env].greeted_at = time.monotonic()
        self._channel.send({"cmd": "hello", "request": self._number(env)}, to=env)

    def _number(self, env: int) -> int:
        self._next += 1
        self._by_request[self._next] = env
        return self._next

    def _look(self, described: int | None) -> None:
        """See whether waiting on makes sense."""
        self._looked_at = now = time.monotonic()
        for env, environment in enumerate(self._environments):
            if not environment.request and env != described:
                continue
            waited_s = now - environment.asked_at
            progress = f"environment {env} has not answered; everything asked before"
            environment.watch.look_for_the_end(progress)
            if not environment.nonce:
                environment.watch.look_for_a_false_start()
            if waited_s > self._timeout_s:
                raise environment.watch.timeout(progress, waited_s)

    def __repr__(self) -> str:
        waiting = sum(environment.request != 0 for environment in self._environments)
        return f"<Requests to {len(self)} environments, {waiting} not answered>"
