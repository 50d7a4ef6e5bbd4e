"""The agent that a trainer controls, without Blender: what each request makes of it, and what the trainer is told.

Trainer and agent are in one process here: a request is sent before the agent is asked, so it need not wait.
"""

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from blender_side import remote_agent
from blender_side.remote_agent import Command, RemoteControlledAgent, Restart, Schedule, State
from blendtorch_shm.errors import ConfigurationError, StreamTimeout
from torch_side.duplex import DuplexChannel

from ..blendtorch_shm.conftest import free_port

PATIENCE_MS = 20_000
CTX = {"obs": 0.5, "reward": 1.0, "done": False}
HELLO = {"spaces": {"observation": None, "action": None}, "fps": 25.0, "has_renderer": False}


@dataclass
class Loop:
    """An environment that is a loop in Python."""

    state: State = State.INIT
    frame_interval_s: float = 0.0
    hello: dict[str, Any] = field(default_factory=lambda: HELLO)

    def describe(self) -> dict[str, Any]:
        return self.hello


class Ends:
    """An agent, the environment that asks it, and the trainer who controls it."""

    def __init__(self, **options: Any) -> None:
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.agent = RemoteControlledAgent(self.address, **options)
        self.trainer = DuplexChannel(self.address)
        self.env = Loop()

    def ask(self, **ctx: Any) -> tuple[Command, Any]:
        return self.agent(self.env, **{**CTX, **ctx})

    def request(self, **content: Any) -> None:
        self.trainer.send(**content)

    def answer(self) -> dict[str, Any]:
        message = self.trainer.recv(PATIENCE_MS)
        assert message is not None
        ours = {key.removeprefix("bt"): message.pop(key) for key in list(message) if key.startswith("bt")}
        del ours["id"], ours["mid"]
        return {**ours, "ctx": message} if message else ours

    def begin(self) -> int:
        """Have the first step asked for; the agent's nonce."""
        self.request(cmd="step", request=1, action=0.1)
        assert self.ask() == (Command.STEP, 0.1)
        self.env.state = State.RUN
        return int(self.answer()["hello"])

    def close(self) -> None:
        self.trainer.close()
        self.agent.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


@pytest.fixture
def ends_in_real_time() -> Iterator[Ends]:
    ends = Ends(real_time=True)
    yield ends
    ends.close()


def test_it_says_hello_first_and_a_step_is_answered_at_the_next_frame(ends: Ends) -> None:
    ends.request(cmd="step", request=7, action=[1, 2], time=None)
    assert ends.ask() == (Command.STEP, [1, 2])
    hello = ends.answer()
    assert hello == {"hello": hello["hello"], "env": HELLO}
    assert hello["hello"] > 0
    ends.env.state = State.RUN
    ends.request(cmd="step", request=8, action=None)
    assert ends.ask(obs=0.75) == (Command.STEP, None)
    assert ends.answer() == {"answers": 7, "hello": hello["hello"], "ctx": {**CTX, "obs": 0.75}}


def test_a_reset_is_answered_at_once_where_nothing_was_done_yet(ends: Ends) -> None:
    ends.request(cmd="reset", request=1)
    ends.request(cmd="reset", request=2, seed=None, options=None, anew=False)
    nonce = ends.begin()
    for number in (1, 2):
        assert ends.answer() == {"answers": number, "hello": nonce, "ctx": CTX}


@pytest.mark.parametrize(
    "words", [{"anew": True}, {"seed": 5}, {"options": {"angle": 0.1}}, {"seed": 0, "options": {}, "anew": True}]
)
def test_a_reset_that_says_how_begins_anew_in_any_case(ends: Ends, words: dict[str, Any]) -> None:
    ends.request(cmd="reset", request=1, **words)
    assert ends.ask() == (Command.RESTART, Restart(words.get("seed"), words.get("options")))
    ends.request(cmd="step", request=2, action=0)
    assert ends.ask(obs="anew") == (Command.STEP, 0)
    nonce = ends.answer()["hello"]
    assert ends.answer() == {"answers": 1, "hello": nonce, "ctx": {**CTX, "obs": "anew"}}


def test_a_reset_ends_an_episode_that_runs(ends: Ends) -> None:
    ends.begin()
    ends.request(cmd="reset", request=2)
    assert ends.ask() == (Command.RESTART, Restart())


def test_it_says_hello_again_when_it_is_asked(ends: Ends) -> None:
    nonce = ends.begin()
    ends.request(cmd="hello", request=2)
    ends.request(cmd="step", request=3, action=0.2)
    assert ends.ask() == (Command.STEP, 0.2)
    assert ends.answer()["answers"] == 1
    assert ends.answer() == {"answers": 2, "hello": nonce, "env": HELLO}


def test_what_was_for_another_agent_is_dropped(ends: Ends) -> None:
    nonce = ends.begin()
    ends.request(cmd="reset", request=2, to=nonce + 1)
    ends.request(cmd="step", request=3, to=nonce, action=0.3)
    assert ends.ask() == (Command.STEP, 0.3)
    assert ends.answer()["answers"] == 1
    ends.request(cmd="step", request=4, action=0.4)
    ends.ask()
    assert ends.answer()["answers"] == 3


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"cmd": "jump"}, "no command 'jump'"),
        ({}, "no command None"),
        ({"cmd": "step"}, "needs an action"),
        ({"cmd": "reset", "seed": -1}, "seed=-1"),
        ({"cmd": "reset", "seed": 1.5}, "seed=1.5"),
        ({"cmd": "reset", "options": [1]}, r"options=\[1\]"),
    ],
)
def test_a_request_that_makes_no_sense_is_told_so_and_nothing_is_done(
    ends: Ends, request_: dict[str, Any], said: str
) -> None:
    ends.request(request=9, **request_)
    nonce = ends.begin()
    answer = ends.answer()
    assert answer.keys() == {"answers", "hello", "error"}
    assert (answer["answers"], answer["hello"]) == (9, nonce)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(answer["error"])


def test_in_lockstep_no_time_out_makes_a_step() -> None:
    ends = Ends(timeoutms=20)
    with pytest.raises(StreamTimeout, match="for 20 ms.*does not step without an action"):
        ends.ask()
    ends.begin()
    with pytest.raises(StreamTimeout, match="does not step without an action"):
        ends.ask()
    ends.close()
    with pytest.raises(ConfigurationError, match="timeoutms=-1"):
        RemoteControlledAgent(ends.address, timeoutms=-1)


def test_a_wait_that_gets_long_is_logged_once(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ends.begin()
    monkeypatch.setattr(remote_agent, "_PATIENCE_MS", 10)
    said = threading.Event()

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.set()

    def train() -> None:
        said.wait(PATIENCE_MS / 1000)
        ends.request(cmd="step", request=2, action=0.5)

    trainer = threading.Thread(target=train)
    trainer.start()
    told = Told()
    logging.getLogger("blendtorch").addHandler(told)
    try:
        with caplog.at_level(logging.WARNING, "blendtorch"):
            assert ends.ask() == (Command.STEP, 0.5)
    finally:
        logging.getLogger("blendtorch").removeHandler(told)
        trainer.join()
    assert [record.getMessage() for record in caplog.records if "has not said what to do" in record.getMessage()] == [
        f"{ends.address}: for 0 s the trainer has not said what to do. The environment waits for its step or reset."
    ]


def test_in_real_time_an_episode_goes_on_while_nothing_comes(ends_in_real_time: Ends) -> None:
    ends = ends_in_real_time
    ends.begin()
    for _ in range(3):
        assert ends.ask() == (Command.STEP, None)
    assert ends.answer()["answers"] == 1
    ends.request(cmd="reset", request=2)
    while (decided := ends.ask())[0] is Command.STEP:  # it comes a moment later
        assert decided == (Command.STEP, None)
    assert decided == (Command.RESTART, Restart())
    ends.env.state = State.INIT
    ends.request(cmd="step", request=3, action=1)
    assert ends.ask() == (Command.STEP, 1)  # a new episode waits for its first step
    assert ends.answer()["answers"] == 2


class Clock:
    """Time that passes only while somebody sleeps, or is busy."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.now += seconds

    def be_busy(self, seconds: float) -> None:
        self.now += seconds


def test_frames_keep_to_a_schedule_and_those_that_are_late_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(remote_agent, "time", clock)
    schedule = Schedule()
    begun = []
    for busy in (0.01, 0.03, 0.07, 0.005, 0.02, 5.0, 0.03, 0.01):
        schedule.wait(0.04)
        begun.append(round(clock.now - 100, 6))
        clock.be_busy(busy)
    # The third frame takes too long; the fourth follows at once and the fifth is in time again. After the long one, no hurry.
    assert begun == [0.0, 0.04, 0.08, 0.15, 0.16, 0.2, 5.2, 5.24]
    assert clock.slept == [0.03, 0.01, 0.005, 0.02, 0.01]
    schedule.begin()
    clock.be_busy(0.5)
    schedule.wait(0.04)
    assert clock.slept[5:] == []
