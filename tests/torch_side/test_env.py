"""One environment: as gymnasium has it, as blendtorch had it, in Blender, and with others' launches."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit

from blendtorch_shm.errors import ConfigurationError
from torch_side import BlenderLauncher, LaunchInfo
from torch_side.env import BlenderEnv, BlenderVectorEnv, OpenAIRemoteEnv, RemoteEnv, launch_env
from torch_side.environments import pictures
from torch_side.environments.launch import flags

from .conftest import eventually
from .pixels import PIXELS, check, launch, who

CUBE_BLEND = Path(__file__).parents[2] / "examples" / "datagen" / "cube.blend"
TURNING = PIXELS.with_name("turning.py")
PYTHON = {"blender": "python", "progress": False}


@pytest.fixture(scope="module")
def running() -> Iterator[BlenderLauncher]:
    """An instance whose environment draws, and one that has other observations."""
    with launch([["--draws", "--least", "5", "--keeps"], ["--kind", "tuple"]]) as launcher:
        for address in launcher.launch_info.addresses["GYM"]:
            with contextlib.closing(BlenderEnv(address=address)) as env:
                env.reset()
                env.step(1)
        yield launcher


@pytest.fixture
def address(running: BlenderLauncher) -> Any:
    return running.launch_info.addresses["GYM"][0]


# -- gymnasium's -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_here", [True, False])
def test_it_is_what_gymnasium_checks(address: Any, is_here: bool) -> None:
    where = address if is_here else address.elsewhere()
    with contextlib.closing(BlenderEnv(address=where, render_mode="rgb_array")) as env:
        assert env.observation_space == gymnasium.spaces.Box(0, 255, (20, 30, 3), np.uint8)
        assert env.metadata["render_fps"] == 24
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Not able to test alternative render modes.*")
            check_env(env, skip_render_check=True)


def test_an_episode_is_of_its_seed_and_options_and_stays(address: Any) -> None:
    with contextlib.closing(BlenderEnv(address=address)) as env:
        with pytest.raises(ConfigurationError, match=r"call reset\(\) first"):
            env.step(1)
        episodes = []
        for _ in range(2):
            observation, info = env.reset(seed=3, options={"length": 60, "color": "red"})
            assert "'color': 'red'" in info["options"]
            kept, rewards = [observation], []
            for step in range(1, 61):
                observation, reward, terminated, truncated, info = env.step(step)
                kept.append(observation)
                rewards.append(reward)
                assert (terminated or truncated) == (step == 60)
                assert info["step"] == step
            for step, picture in enumerate(kept):
                check(picture, 0, 0, step, step)
            episodes.append((rewards, terminated, truncated))
            assert who(env.reset()[0]) == [0, 1, 0, 0]  # it goes on
        assert episodes[0] == episodes[1]
    with pytest.raises(ConfigurationError, match="closed"):
        env.step(1)
    with pytest.raises(ConfigurationError, match="closed"):
        env.reset()
    check(kept[60], 0, 0, 60, 60)
    env.close()


def test_observations_are_as_their_space_says(running: BlenderLauncher) -> None:
    for where in (running.launch_info.addresses["GYM"][1], running.launch_info.addresses["GYM"][1].elsewhere()):
        with contextlib.closing(BlenderEnv(address=where)) as env:
            assert env.reset(seed=1)[0] in env.observation_space
            observation = env.step(2)[0]
            assert observation in env.observation_space
            assert isinstance(observation, tuple)
            assert observation[2] == 1


def test_wrappers_work_on_top(address: Any) -> None:
    env = RecordEpisodeStatistics(TimeLimit(BlenderEnv(address=address), 3))
    with contextlib.closing(env):
        env.reset(seed=0, options={"length": 100})
        for _ in range(3):
            *_, truncated, info = env.step(env.action_space.sample())
        assert truncated
        assert info["episode"]["l"] == 3


def test_render_gives_the_last_picture(address: Any) -> None:
    with contextlib.closing(BlenderEnv(address=address, render_mode="rgb_array")) as env:
        with pytest.raises(ConfigurationError, match="drawn no picture yet"):
            env.render()
        env.reset(seed=0)
        env.step(1)
        env.step(1)
        assert env.render().tolist() == np.full((4, 6, 3), 2).tolist()
    with pytest.raises(ConfigurationError, match="render_mode='ascii' is not known"):
        BlenderEnv(address=address, render_mode="ascii")


def test_a_window_needs_a_display_and_is_opened_where_there_is_one(
    address: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        contextlib.closing(BlenderEnv(address=address, render_mode="human")) as env,
        pytest.raises(ConfigurationError, match="no display here.*rgb_array.*xvfb-run"),
    ):
        env.reset(seed=0)
    with RemoteEnv(address) as old:
        old.reset()
        old.step(1)
        with pytest.raises(ConfigurationError, match="no display here"):
            old.render()
    monkeypatch.setenv("DISPLAY", ":none")
    shown: list[Any] = []
    monkeypatch.setattr(pictures, "create_renderer", lambda backend: Recorder(shown))
    with contextlib.closing(BlenderEnv(address=address, render_mode="human")) as env:
        env.reset(seed=0)
        assert shown[-1] == 0
        env.step(1)
        env.step(1)
        assert shown[-1] == 2
        env.render()
    assert shown == [0, 1, 2, 2, "closed"]


class Recorder:
    """In the place of a window, which test_env_rendering.py opens."""

    def __init__(self, shown: list[Any]) -> None:
        self._shown = shown

    def imshow(self, picture: Any) -> None:
        assert picture.shape == (4, 6, 3)
        self._shown.append(int(picture[0, 0, 0]))

    def close(self) -> None:
        self._shown.append("closed")


def test_arguments_that_cannot_work_are_told(address: Any) -> None:
    for arguments, said in [
        ({}, "Say scene= and script=, or address="),
        ({"address": address, "script": PIXELS}, "address= is of an instance that runs"),
        ({"address": address, "length": 3}, "address= is of an instance that runs"),
        ({"address": "here"}, "here"),
        ({"address": address, "timeoutms": 0}, "timeoutms=0"),
        ({"scene": "", "script": PIXELS, "launch_args": {"num_instances": 2}}, "launch_args has 'num_instances'"),
    ]:
        with pytest.raises(ConfigurationError, match=re.escape(said)):
            BlenderEnv(**arguments)


# -- blendtorch's ------------------------------------------------------------------------------------------------------


def test_arguments_of_scripts_are_flags() -> None:
    assert flags({"render_every": 10, "real_time": False, "fast": True, "name": None, "x": 0.5}) == [
        *("--render-every", "10"),
        "--no-real-time",
        "--fast",
        *("--x", "0.5"),
    ]


def test_blendtorchs_environment_has_its_values(address: Any) -> None:
    for where in (address, address.elsewhere()):
        with RemoteEnv(where) as env:
            assert env.env_time is None
            assert env.render("rgb_array") is None
            observation, info = env.reset()
            assert who(observation)[2] == 0
            assert info["done"] is False
            observation, reward, done, info = env.step(7)
            assert who(observation)[2:] == [1, 7]
            assert isinstance(reward, float)
            assert done is False
            assert info["step"] == 1
            assert not info.keys() & {"obs", "reward", "done", "rgb_array"}
            assert env.render("rgb_array").tolist() == np.ones((4, 6, 3)).tolist()
            while not done:
                *_, done, info = env.step(8)
            assert who(env.reset()[0])[2] == 0


class Old(OpenAIRemoteEnv):
    def __init__(self, **options: Any) -> None:
        super().__init__(version="1.2.3")
        self.launch("", PIXELS, launch_args=PYTHON, **options)


def test_an_environment_of_the_old_gym_is_launched_by_its_class() -> None:
    env = Old(least=5, draws=True)
    assert env.__version__ == "1.2.3"
    assert isinstance(env, gymnasium.Env)
    assert who(env.reset())[2] == 0
    observation, _, done, info = env.step(7)
    assert (who(observation)[2:], done, info["step"]) == ([1, 7], False, 1)
    assert env.render(mode="rgb_array").shape == (4, 6, 3)
    with pytest.raises(ConfigurationError, match="was launched before"):
        env.launch("", PIXELS)
    with pytest.raises(NotImplementedError, match="BlenderEnv"):
        env.seed(1)
    env.close()
    env.close()
    for misuse in (env.reset, lambda: env.step(1), env.render, lambda: env.env_time):
        with pytest.raises(ConfigurationError, match="does not run"):
            misuse()
    with pytest.raises(ConfigurationError, match="was launched before"):
        env.launch("", PIXELS)


# -- a launch of its own -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_trainers_come_and_go_while_blendtorch_launch_runs(tmp_path: Path) -> None:
    """One after the other, the first is killed; nothing is left when the launch has ended."""
    before = set(os.listdir("/dev/shm"))
    (tmp_path / "launch.json").write_text(
        json.dumps({"scene": "", "script": str(PIXELS), "num_instances": 2, "named_sockets": ["GYM"], **PYTHON})
    )
    command = [sys.executable, "-m", "torch_side.apps.launch", "launch.json"]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, stderr=subprocess.PIPE
    ) as program:
        try:
            info = tmp_path / "launch_info.json"
            eventually(lambda: info.exists() and info.read_text().endswith("}\n"))
            addresses = LaunchInfo.load_json(info).addresses["GYM"]
            launch_id = addresses[0].twin.launch
            for is_last in (False, True):
                child = os.fork()
                if child == 0:
                    status = 1
                    try:
                        envs = BlenderVectorEnv(addresses=addresses)
                        observations, _ = envs.reset(seed=0, options={"length": 9})
                        assert [who(each)[1:] for each in observations] == [[0, 0, 0]] * 2
                        for step in range(1, 4):
                            observations, *_ = envs.step([step, step])
                            assert [who(each)[2:] for each in observations] == [[step, step]] * 2
                        envs.send([1, 1])
                        if not is_last:
                            os.kill(os.getpid(), signal.SIGKILL)
                        envs.close()
                        status = 0
                    finally:
                        os._exit(status)
                assert os.waitpid(child, 0)[1] == (0 if is_last else signal.SIGKILL)
        finally:
            program.send_signal(signal.SIGINT)
            program.communicate()
    assert not [name for name in set(os.listdir("/dev/shm")) - before if launch_id in name]


# -- in Blender --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_in_blender_it_is_what_gymnasium_checks(blender: Any) -> None:
    options = {"background": blender.form == "module", "launch_args": {"blender": blender.argument, "progress": False}}
    with contextlib.closing(BlenderEnv(CUBE_BLEND, TURNING, **options)) as env:
        check_env(env, skip_render_check=True)
        reset_picture, _ = env.reset(seed=1)
        kept = []
        for _ in range(2):
            for _ in range(3):
                picture, _, terminated, _, info = env.step(0.5)
                assert (picture != reset_picture).any()
                kept.append((picture, picture.copy()))
            assert not terminated
            assert info["angle"] == pytest.approx(1.5)
            assert env.step(0.5)[2]
            np.testing.assert_array_equal(env.reset()[0], reset_picture)
        for picture, copy in kept:
            np.testing.assert_array_equal(picture, copy)


@pytest.mark.timeout(300)
def test_the_first_picture_of_each_episode_is_of_the_reset_scene(a_blender: Any) -> None:
    launch_args = {"blender": a_blender.argument, "progress": False}
    options = {"background": a_blender.form == "module", "launch_args": launch_args, "length": 3}
    with contextlib.closing(BlenderVectorEnv(CUBE_BLEND, TURNING, 2, autoreset_mode="SAME_STEP", **options)) as envs:
        first, _ = envs.reset(seed=0)
        np.testing.assert_array_equal(first[0], first[1])
        kept = []
        for step in range(1, 25):
            pictures, rewards, terminated, _, infos = envs.step(np.float32([0.5, 1]))
            kept.append((pictures, pictures.copy()))
            number = (step - 1) % 3 + 1
            assert rewards.tolist() == pytest.approx([0.5 * number, number])
            assert terminated.tolist() == [number == 3] * 2
            if number == 3:
                np.testing.assert_array_equal(pictures, first)
                assert all((final != first[0]).any() for final in infos["final_obs"])
                assert infos["final_info"]["angle"].tolist() == pytest.approx([1.5, 3])
            else:
                assert (pictures[0] != first[0]).any()
                assert (pictures[0] != pictures[1]).any()
        for pictures, copy in kept:
            np.testing.assert_array_equal(pictures, copy)


def test_launch_env_connects_and_ends(a_blender: Any) -> None:
    with launch_env(
        CUBE_BLEND,
        TURNING,
        background=a_blender.form == "module",
        launch_args={"blender": a_blender.argument, "progress": False},
        real_time=False,
        draws=True,
        length=2,
    ) as env:
        observation, info = env.reset()
        assert env.env_time == 2  # the frame that comes next, as blendtorch has it
        assert info["prev_action"] is None
        _, reward, done, info = env.step(0.25)
        assert (reward, done, info["prev_action"]) == (pytest.approx(0.25), False, 0.25)
        assert env.step(0.25)[2]
        assert env.render("rgb_array").shape == (48, 64, 3)
        np.testing.assert_array_equal(env.reset()[0], observation)
