"""The agent that asks a training process what to do. Works without Blender.

Requests and answers are messages of a :class:`~blender_side.DuplexChannel`. This side says once, and whenever it is asked::

    {"bthello": nonce, "btenv": {"spaces": {"observation": ..., "action": ...}, "fps": float, "has_renderer": bool}}

The trainer asks, one request after the other, and each but those to somebody else is answered::

    {"cmd": "reset", "request": int, "anew": bool, "seed": int | None, "options": dict | None, "to": nonce, "rows": rows}
    {"cmd": "step", "request": int, "action": ..., "to": nonce, "rows": rows, "autoreset": bool, "is_last": bool}
    {"cmd": "hello", "request": int}

    {"btanswers": request, "bthello": nonce, ...}   what the environment says of the frame that was played since
    {"btanswers": request, "bthello": nonce, "btfinal": True, ...}
                                                    likewise, of the last frame of an episode; the answer is the next one's first
                                                    frame, for the request said `autoreset`
    {"btanswers": request, "bthello": nonce, "bterror": text}
                                                    the request makes no sense, and nothing was done; or the observation is none
                                                    of the space

``nonce`` is of this agent: a request ``to`` another one was for an instance that has ended since, and is dropped. A ``reset`` is
answered at once in an episode in which nothing was done, unless a seed or options are given, or ``anew`` is true. ``rows`` says
where the observation goes (:class:`~blendtorch_shm.memory.rows.RowWriter`): name and inode of a segment, offsets in it, and the
leaves that the trainer's space has; the observation is not in the answer then. ``is_last`` says that the trainer truncates the
episode after this step.
"""

from __future__ import annotations

import enum
import logging
import operator
import secrets
import time
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from blendtorch_shm.errors import ConfigurationError, SegmentMissing, StreamTimeout
from blendtorch_shm.memory.rows import RowWriter
from blendtorch_shm.message.leaves import Leaf, heard

from .duplex import DuplexChannel
from .publisher import lends, note_lender

log = logging.getLogger("blendtorch")

#: A trainer that says nothing for so long is mentioned in the log, once per wait.
_PATIENCE_MS = 30_000
#: In real time, an environment that is behind its schedule by more than this does not hurry to catch up.
_LONGEST_CATCH_UP_S = 0.25


class State(enum.Enum):
    """Where an episode stands."""

    INIT = enum.auto()
    """Its first frame was played, and the agent has not been asked, or has not chosen a step yet."""
    RUN = enum.auto()


class Command(enum.Enum):
    """What an agent wants: the first of the two that it returns."""

    RESTART = enum.auto()
    """Begin a new episode. The other may be a :class:`Restart`."""
    STEP = enum.auto()
    """Play on. The other is the action, or None: play on without one."""


@dataclass(frozen=True)
class Restart:
    """How an agent wants the next episode to begin; it may return this beside `Command.RESTART`.

    Args:
        seed: of the episode's randomness. None: what is random goes on.
        options: what ``_env_reset`` gets as its `options`.
    """

    seed: int | None = None
    options: dict[str, Any] | None = None


class Environment(Protocol):
    """What the agent has to know of an environment. :class:`~blender_side.env.BaseEnv` is one."""

    state: Any

    def describe(self) -> dict[str, Any]:
        """What is to be said in the hello."""

    @property
    def frame_interval_s(self) -> float:
        """The time from frame to frame, in real time."""


class Schedule:
    """Gives each frame its time. What one is late does not make the next one late."""

    def __init__(self) -> None:
        self._due: float | None = None

    def begin(self) -> None:
        """The next frame is due when it comes."""
        self._due = None

    def wait(self, interval_s: float) -> None:
        """Sleep until the next frame is due, `interval_s` after the one before; not at all if it is late."""
        now = time.monotonic()
        if self._due is None or now > self._due + interval_s + _LONGEST_CATCH_UP_S:
            self._due = now
            return
        self._due += interval_s
        if self._due > now:
            time.sleep(self._due - now)


class RemoteControlledAgent:
    """Does what a training process says, through a channel that this instance binds.

    In lockstep (the default) no frame is played before the trainer has said what to do, as long as that takes: a trainer may
    update its policy for minutes. In real time, the environment goes on while nothing comes, one frame after the other at the
    scene's frame rate, with a window and without; only a new episode waits for its first step.

    Args:
        address: where to listen, as found in ``btargs.btsockets``.
        real_time: do not wait for the trainer within an episode.
        timeoutms: patience in lockstep, in milliseconds. None: no end of it; the log says once what it waits for.

    Raises:
        ConfigurationError: `timeoutms` is negative.
        and what :class:`~blender_side.DuplexChannel` raises.

    Example::

        args, _ = btb.parse_blendtorch_args()
        agent = btb.env.RemoteControlledAgent(args.btsockets["GYM"])
        env = MyEnv(agent)
        env.run(frame_range=(1, 500))
    """

    def __init__(self, address: str, real_time: bool = False, timeoutms: int | None = None) -> None:
        if timeoutms is not None and timeoutms < 0:
            raise ConfigurationError(f"timeoutms={timeoutms}: a time-out is not negative.")
        self.real_time = real_time
        self.timeoutms = timeoutms
        self._address = str(address)
        self._nonce: Final = secrets.randbits(62) + 1
        self._channel = DuplexChannel(address)
        self._schedule = Schedule()
        self._said_hello = False
        self._request: dict[str, Any] | None = None
        """The one that is to be answered."""
        self._rows = RowWriter()
        self._leaves: list[Leaf] = []
        self._said: Any = None
        """What the trainer said of them."""

    def __call__(self, env: Environment, /, **ctx: Any) -> tuple[Command, Any]:
        """Answer what was asked before this frame was played, and get the next command.

        Args:
            env: the environment.
            **ctx: what it says of the frame.

        Returns:
            the command, and the action or a :class:`Restart`. In real time ``(STEP, None)`` while there is none.

        Raises:
            StreamTimeout: nothing came within `timeoutms`. Nothing was done: an environment never steps without a trainer's word.
        """
        if not self._said_hello:
            self._said_hello = True
            self._say_hello(env)
        if self._must_reset_first(ctx):
            return Command.RESTART, Restart()
        self._answer(env, ctx)
        if self._goes_on(env):
            self._schedule.wait(env.frame_interval_s)
        while (request := self._receive(env)) is not None:
            if request.get("to") not in (None, self._nonce):
                continue
            self._request = request
            try:
                decided = self._decide(env, request)
            except _Unreasonable as error:
                self._reply({"bterror": str(error)})
                continue
            try:
                self._begin_row(request)
            except SegmentMissing:  # so the trainer that asked has gone
                self._request = None
                continue
            if decided is not None:
                return decided
            if request["cmd"] == "hello":
                self._say_hello(env)
            else:
                self._answer(env, ctx)
        return Command.STEP, None

    def close(self) -> None:
        """Hear nothing any more."""
        self._channel.close()

    def _decide(self, env: Environment, request: dict[str, Any]) -> tuple[Command, Any] | None:
        """What a request asks of the environment. None: nothing, it can be answered at once."""
        match request.get("cmd"):
            case "hello":
                return None
            case "step":
                if "action" not in request:
                    raise _Unreasonable("A step needs an action: the request has none.")
                if env.state is State.INIT:
                    self._schedule.begin()
                return Command.STEP, request["action"]
            case "reset":
                restart = Restart(_seed(request.get("seed")), _options(request.get("options")))
                if env.state is State.INIT and not request.get("anew") and restart == Restart():
                    return None
                return Command.RESTART, restart
            case other:
                raise _Unreasonable(f"There is no command {other!r}: an environment knows reset, step and hello.")

    def _goes_on(self, env: Environment) -> bool:
        """Whether the environment does not wait for the trainer now."""
        return self.real_time and env.state is State.RUN

    def _receive(self, env: Environment) -> dict[str, Any] | None:
        """The next request. None: there is none, and the environment goes on."""
        if self._goes_on(env):
            return self._channel.recv(timeoutms=0)
        if self.timeoutms is None:
            request = self._channel.recv(timeoutms=_PATIENCE_MS)
            if request is None:
                log.warning(
                    "%s: for %d s the trainer has not said what to do. The environment waits for its step or reset.",
                    self._address,
                    _PATIENCE_MS // 1000,
                )
                request = self._channel.recv(timeoutms=None)
        else:
            request = self._channel.recv(timeoutms=self.timeoutms)
        if request is None:
            raise StreamTimeout(
                f"{self._address}: the trainer has not said what to do for {self.timeoutms} ms. In lockstep an environment does"
                " not step without an action. Give RemoteControlledAgent a longer timeoutms, or none; or real_time=True, if the"
                " scene shall go on by itself."
            )
        return request

    def _say_hello(self, env: Environment) -> None:
        self._reply({"btenv": env.describe()})

    def _must_reset_first(self, ctx: dict[str, Any]) -> bool:
        """Whether the step that was asked for ended the episode, and its answer is the next one's first frame. Then the last
        frame is sent now.
        """
        request = self._request
        if request is None or not request.get("autoreset") or not (ctx["done"] or request.get("is_last")):
            return False
        request["autoreset"] = False
        self._channel.send(**{**ctx, "btanswers": request.get("request"), "bthello": self._nonce, "btfinal": True})
        if request.get("rows") is not None:  # it is written anew: what lies there is the script's own now
            self._rows.abandon()
            self._begin_row(request)
        return True

    def _begin_row(self, request: dict[str, Any]) -> None:
        """The answer's observation is rendered into the row that the request names, if it names one."""
        if request.get("rows") is None:
            return
        name, inode, offsets, leaves = msgspec.msgpack.decode(request["rows"])
        if leaves != self._said:
            self._leaves, self._said = heard(leaves), leaves
        kinds = [(leaf.shape, leaf.dtype) for leaf in self._leaves]
        self._rows.begin(name, inode, offsets, kinds)
        for kind in kinds:
            lends(self._rows, kind)

    def _answer(self, env: Environment, ctx: dict[str, Any]) -> None:
        """Answer the request, if there is one, with what the environment says."""
        if self._request is None:
            return
        if self._request.get("rows") is not None:
            observation = ctx.get("obs")
            try:
                values = [leaf.of(observation) for leaf in self._leaves]
            except ConfigurationError as error:
                self._rows.abandon()
                self._reply({"bterror": str(error)})
                return
            self._rows.write(values)
            ctx = {key: value for key, value in ctx.items() if key != "obs"}
        self._reply(ctx)
        note_lender(self._channel, ctx.values())

    def _reply(self, content: dict[str, Any]) -> None:
        request, self._request = self._request, None
        answers = {} if request is None else {"btanswers": request.get("request")}
        self._channel.send(**{**content, **answers, "bthello": self._nonce})


class _Unreasonable(Exception):
    """A request that cannot be done; the trainer is told."""


def _seed(given: Any) -> int | None:
    if given is None:
        return None
    try:
        seed = operator.index(given)
    except TypeError:
        seed = -1
    if seed < 0:
        raise _Unreasonable(f"seed={given!r}: a seed is a whole number from 0 on, or None.")
    return seed


def _options(given: Any) -> dict[str, Any] | None:
    if given is not None and not isinstance(given, dict):
        raise _Unreasonable(f"options={given!r}: options are a dict, or None.")
    return given
