"""Environments in each Blender: which hook is called when, what agents are told, and an episode that a trainer plays."""

import json
from typing import Any

import numpy as np
import pytest

from torch_side import BlenderLauncher
from torch_side.duplex import DuplexChannel

from .conftest import CUBE_BLEND, IN_EACH_BLENDER, SCRIPTS, Runner

PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def played(run_script: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("environments") / "environments.json"
    run = run_script("environments.py", out)
    assert run.exit_code == 0, run.log
    saved: dict[str, Any] = json.loads(out.read_text())
    return saved


@IN_EACH_BLENDER
def test_the_scene_is_evaluated_between_action_and_observation_and_a_restart_plays_no_frame(
    played: dict[str, Any],
) -> None:
    first = [["reset", 1], ["post", 1, 0.0]]
    assert played["calls"] == [
        *first,
        *(["prepare", 2, 0.25], ["post", 2, 0.25]),
        ["post", 3, 0.25],  # a step without an action
        *first,
        *(["prepare", 2, 0.5], ["post", 2, 0.5]),
        *first,
        *(["prepare", 2, 0.75], ["post", 2, 0.75]),
    ]


@IN_EACH_BLENDER
def test_an_agent_is_told_of_this_episode_alone(played: dict[str, Any]) -> None:
    same = {"reward": 0.5, "done": False, "terminated": False, "truncated": False, "mark": 1}
    fresh = {**same, "obs": 1, "time": 2, "prev_action": None, "state": "INIT"}
    assert played["told"] == [
        fresh,
        {**same, "obs": 2, "time": 3, "prev_action": 0.25, "state": "RUN"},
        {**same, "obs": 3, "time": 4, "prev_action": 0.25, "state": "RUN"},
        fresh,
        {**same, "obs": 2, "time": 3, "prev_action": 0.5, "state": "RUN"},
        fresh,
        {**same, "obs": 2, "time": 3, "prev_action": 0.75, "state": "RUN"},
    ]


@IN_EACH_BLENDER
def test_at_the_end_of_its_frames_an_episode_is_truncated_but_goes_on(played: dict[str, Any]) -> None:
    assert played["truncated"] == [
        [4, False, False, False],
        [5, True, False, True],
        [6, True, False, True],
        [7, True, False, True],
        [8, True, False, True],
        [4, False, False, False],
        [5, True, False, True],
    ]


@IN_EACH_BLENDER
def test_what_a_hook_says_of_the_end_is_one_statement(played: dict[str, Any]) -> None:
    no, terminated, truncated, both = [False] * 3, [True, True, False], [True, False, True], [True] * 3
    assert played["words"] == [
        no,
        terminated,
        terminated,
        no,
        terminated,
        truncated,
        truncated,
        terminated,
        both,
        no,
    ]
    assert played["bools"] == ["bool"]


@IN_EACH_BLENDER
def test_a_seed_makes_the_same_randomness_and_without_one_it_goes_on(played: dict[str, Any]) -> None:
    first, three, on, again, huge, zero = played["random"]
    assert [call["given"] for call in played["random"]] == [
        [None, None, None, None],
        [3, None, 3, None],
        [None, {"a": 1}, None, {"a": 1}],
        [3, None, 3, None],
        [2**70 + 5, None, 2**70 + 5, None],
        [0, None, 0, None],
    ]
    assert first["drawn"][0] == played["instance seed"]
    assert three["drawn"][0] == np.random.default_rng(3).random()
    assert three["drawn"] == again["drawn"]
    for place in range(4):
        assert len({call["drawn"][place] for call in (first, three, on, huge, zero)}) == 5
    assert played["all keywords"] == [{"seed": None, "options": None}, {"seed": 1, "options": {"b": 2}}]


@IN_EACH_BLENDER
def test_what_makes_no_sense_is_an_error_that_says_so(played: dict[str, Any]) -> None:
    said = played["said"]
    assert "Undecided._env_post_step returned 3" in said["no dict"]
    assert "returned 'left' as its command" in said["no command"]
    assert said["no hooks"] == "NotImplementedError: BaseEnv has no _env_reset()."
    assert "'all' is no space" in said["no space"]
    assert "every_nth=0" in said["every 0"]


@IN_EACH_BLENDER
def test_a_trainer_is_told_the_pace_of_frames_and_whether_there_are_pictures(played: dict[str, Any]) -> None:
    described = played["described"]
    assert described == {
        "spaces": {"observation": None, "action": None},
        "fps": pytest.approx(30 / 1.001 / 2),
        "has_renderer": False,
    }
    assert played["unseen"] == [True, False, False]


@IN_EACH_BLENDER
def test_pictures_are_of_their_frame_and_an_old_one_is_not_told_again(played: dict[str, Any]) -> None:
    if not played["draws"]:
        pytest.skip("this Blender draws nothing off-screen in background")
    seen = played["seen"]
    assert seen["shape"] == [24, 32, 3, "uint8"]
    # Frames 1, 3 and 5 are drawn; ctx keeps the newest, and a new episode begins with a picture of its own first frame.
    assert seen["in ctx"] == [[1, 0], [2, 0], [3, 1], [4, 1], [5, 2], [1, 0], [2, 0]]
    assert seen["told"] == [0, None, 1, None, 2, 0, None]
    assert seen["has_renderer"]


@IN_EACH_BLENDER
def test_an_exception_in_a_hook_ends_the_instance(run_script: Runner) -> None:
    run = run_script("broken_environment.py")
    assert run.exit_code == 1
    assert "RuntimeError: boom" in run.log


def test_a_trainer_plays_an_episode(blender: Any) -> None:
    """As blendtorch's trainers do: the first frame was played before the reset is answered, the second is the first step's."""
    with (
        BlenderLauncher(
            CUBE_BLEND, SCRIPTS / "environment.py", named_sockets=["GYM"], blender=blender.argument, progress=False
        ) as bl,
        DuplexChannel(bl.launch_info.addresses["GYM"][0]) as channel,
    ):

        def ask(number: int, **request: Any) -> dict[str, Any]:
            channel.send(request=number, **request)
            while (answer := channel.recv(PATIENCE_MS)) is not None:
                if answer.get("btanswers") == number:
                    return answer
                assert "btenv" in answer
            raise AssertionError("no answer")

        assert ask(1, cmd="reset")["count"] == 1
        for number in (2, 3, 4):
            ctx = ask(number, cmd="step", action=0.1 * number)
            assert ctx["count"] == number
            assert ctx["obs"] == pytest.approx(0.1 * number)
            assert ctx["done"] == ctx["terminated"] == (number == 4)
        assert ask(5, cmd="reset")["count"] == 1
        hello = ask(6, cmd="hello")
        assert hello["btenv"]["spaces"]["action"] == {
            "type": "Box",
            "low": -4.0,
            "high": 4.0,
            "shape": [],
            "dtype": "float32",
        }
        assert "no command" in ask(7, cmd="jump")["bterror"]
