"""Environments whose instances are killed, hang or fail, and trainers that are killed or interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import torch_side.launching.instance
from blendtorch_shm.errors import ConfigurationError, InstanceDied, StreamTimeout
from blendtorch_shm.memory import rows
from torch_side import BlenderLauncher
from torch_side.env import BlenderEnv, BlenderVectorEnv, RemoteEnv
from torch_side.environments import requests, single
from torch_side.environments import vector as vector_module

from ..interruption import everywhere
from .conftest import eventually
from .pixels import DTYPE, FAILS, KILLED, NOTHING, PIXELS, SHAPE, STUCK, check, elsewhere, launch, pid, who

LONG = {"length": 10**6}


ARGS = [["--shape", "30", "41", "3", "--keeps"]] * 3


@pytest.fixture(scope="module")
def running() -> Iterator[BlenderLauncher]:
    """Three instances to which no test does harm."""
    with launch(ARGS) as launcher:
        for address in addresses(launcher):  # the largest message, so that all shared memory is there
            with contextlib.closing(BlenderEnv(address=address)) as env:
                env.reset()
                with pytest.raises(ConfigurationError):
                    env.step(DTYPE)
        yield launcher


@pytest.fixture
def restarted(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlenderLauncher]:
    """Three instances that are started again at once."""
    monkeypatch.setattr(torch_side.launching.instance, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(torch_side.launching.instance, "_LONGEST_PAUSE_S", 0.02)
    with launch(ARGS, restart="on-failure", max_restarts=1000) as launcher:
        yield launcher


def addresses(launcher: BlenderLauncher) -> list[Any]:
    found: list[Any] = launcher.launch_info.addresses["GYM"]
    return found


@contextlib.contextmanager
def vector(launcher: BlenderLauncher, **options: Any) -> Iterator[BlenderVectorEnv]:
    with contextlib.closing(BlenderVectorEnv(addresses=addresses(launcher), **options)) as envs:
        yield envs


# -- an instance is killed ---------------------------------------------------------------------------------------------


def test_an_instance_that_is_killed_in_a_step_is_replaced_and_its_episode_truncated(restarted: BlenderLauncher) -> None:
    for mode in AutoresetMode:
        with vector(restarted, autoreset_mode=mode) as envs:
            _check_that_the_second_is_replaced(envs, mode)


def _check_that_the_second_is_replaced(envs: BlenderVectorEnv, mode: AutoresetMode) -> None:
    envs.reset(seed=0, options=LONG)
    before, *_ = envs.step([1, 1, 1])
    observations, rewards, terminated, truncated, infos = envs.step([2, KILLED, 2])
    assert truncated.tolist() == infos["restarted"].tolist() == [False, True, False]
    assert not terminated.any()
    assert rewards[1] == 0
    check(observations[0], 0, 0, 2, 2)
    check(observations[2], 2, 0, 2, 2)
    last = observations[1] if mode is not AutoresetMode.SAME_STEP else infos["final_obs"][1]
    check(last, 1, 0, 1, 1)
    if mode is AutoresetMode.DISABLED:
        with pytest.raises(ConfigurationError, match=r"episodes of environments \[1\] are over"):
            envs.step([3, 3, 3])
        observations, _ = envs.reset(options={**LONG, "reset_mask": truncated})
    elif mode is AutoresetMode.NEXT_STEP:
        observations, _, _, truncated, infos = envs.step([3, 3, 3])
        assert not truncated.any()
        assert "restarted" not in infos
    check(observations[1], 1, 1, 0, 0)  # the second episode of another process
    *_, infos = envs.step([4, 4, 4])
    assert infos["step"].tolist() == ([3, 1, 3] if mode is not AutoresetMode.NEXT_STEP else [4, 1, 4])
    assert envs.stats().restarts == 1
    check(before[1], 1, 0, 1, 1)


def test_an_instance_that_is_killed_in_a_reset_begins_that_episode_in_its_place(
    restarted: BlenderLauncher, tmp_path: Path
) -> None:
    with vector(restarted) as envs:
        envs.reset(seed=5, options=LONG)
        rewards = [envs.step([1, 1, 1])[1].tolist() for _ in range(3)]
        observations, _ = envs.reset(seed=5, options={**LONG, "dies_once": str(tmp_path / "dead")})
        assert [who(each)[:2] for each in observations] == [[0, 0], [1, 0], [2, 0]]
        assert [envs.step([1, 1, 1])[1].tolist() for _ in range(3)] == rewards
        assert envs.stats().restarts == 1


def test_an_instance_that_is_killed_while_nothing_was_asked_of_it_is_not_stepped_on(restarted: BlenderLauncher) -> None:
    with vector(restarted) as envs:
        envs.async_reset(seed=0, options=LONG)
        envs.recv(min_get=3)
        killed = pid(restarted, 2)
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: pid(restarted, 2) != killed)
        for _ in range(300):  # meanwhile the new one says hello, and who it is
            envs.send([1], [0])
            envs.recv()
        envs.send([1, 1], [1, 2])
        observations, _, _, truncated, infos = envs.recv(min_get=2)
        assert truncated.tolist() == [False, True]
        assert infos["restarted"].tolist() == [False, False, True]
        check(observations[1], 2, 0, 0, 0)
        envs.send([1], [2])
        assert who(envs.recv()[0][0]) == [2, 1, 0, 0]


def test_one_environment_goes_on_in_another_instance(restarted: BlenderLauncher) -> None:
    with contextlib.closing(BlenderEnv(address=addresses(restarted)[0])) as env:
        env.reset(seed=0, options=LONG)
        env.step(1)
        observation, reward, terminated, truncated, info = env.step(KILLED)
        check(observation, 0, 0, 1, 1)
        assert (reward, terminated, truncated, info) == (0.0, False, True, {"restarted": True})
        assert who(env.reset(options=LONG)[0])[1:] == [1, 0, 0]
        assert who(env.step(3)[0])[1:] == [1, 1, 3]
    with RemoteEnv(addresses(restarted)[0]) as old:
        old.reset()
        with pytest.raises(InstanceDied, match=r"started again in the middle of a step.*call reset"):
            old.step(KILLED)
        assert old.reset()[1]["number"] == 0


# -- for good ----------------------------------------------------------------------------------------------------------


def test_an_instance_that_ends_for_good_is_an_error_with_the_end_of_its_log() -> None:
    with launch([["--shape", "30", "41", "3"]] * 2) as launcher, vector(launcher) as envs:
        envs.reset(seed=0, options=LONG)
        kept = envs.step([1, 1])[0]
        with pytest.raises(InstanceDied, match=r"instance 1: RuntimeError: the scene is broken \(pixels.py:\d+\)"):
            envs.step([2, FAILS])
        with pytest.raises(ConfigurationError, match=r"Environments \[.*\] have not been received yet"):
            envs.step([3, 3])
        with pytest.raises(InstanceDied, match="the scene is broken"):
            envs.reset()
        envs.close()
        with pytest.raises(ConfigurationError, match="closed"):
            envs.reset()
        check(kept[1], 1, 0, 1, 1)
        with contextlib.closing(BlenderEnv(address=addresses(launcher)[0])) as env:
            env.reset()
            with pytest.raises(InstanceDied, match=r"exited, killed by SIGKILL"):
                env.step(KILLED)


def test_others_that_go_on_do_not_hide_the_end_of_one() -> None:
    with launch([["--shape", "30", "41", "3"]] * 2) as launcher, vector(launcher) as envs:
        envs.async_reset(seed=0, options=LONG)
        envs.recv(min_get=2)
        envs.send([1, FAILS])
        with pytest.raises(InstanceDied, match="the scene is broken"):
            while True:
                *_, infos = envs.recv()
                envs.send([1], infos["env_id"])


@pytest.mark.parametrize("restart", [{}, {"restart": "never"}])
def test_a_script_that_fails_at_once_is_an_error_at_once(restart: dict[str, Any]) -> None:
    arguments = [["--ms", "0"], ["--fails", "there is no such scene"]]
    launch_args = {"blender": "python", "progress": False, "instance_args": arguments, **restart}
    with pytest.raises(InstanceDied, match=r"(?i)instance 1.*LookupError: there is no such scene"):
        BlenderVectorEnv("", PIXELS, 2, launch_args=launch_args, length=9)


def test_an_instance_that_hangs_is_an_error_that_says_so(restarted: BlenderLauncher) -> None:
    with vector(restarted, timeoutms=60_000) as envs:
        envs.reset(seed=0, options=LONG)
        envs._requests._timeout_s = 0.6  # only now: to start may take any time
        with pytest.raises(StreamTimeout, match=r"environment 0 has not answered(?s:.*)instance 0: running"):
            envs.step([STUCK, 1, 1])
        observations, *_, infos = envs.recv(min_get=2, max_get=2)
        assert infos["env_id"].tolist() == [1, 2]
        check(observations[1], 2, 0, 1, 1)
        with pytest.raises(StreamTimeout, match="environment 0 has not answered"):
            envs.reset()
    killed = pid(restarted, 0)
    os.kill(killed, signal.SIGKILL)
    with vector(restarted) as envs:
        assert [who(each)[:2] for each in envs.reset(seed=0)[0]] == [[0, 0], [1, 0], [2, 0]]


@pytest.mark.parametrize("is_here", [True, False])
def test_an_observation_that_is_none_of_the_space_is_an_error_of_the_trainer(
    running: BlenderLauncher, is_here: bool
) -> None:
    which = addresses(running) if is_here else elsewhere(addresses(running))
    with (
        contextlib.closing(BlenderVectorEnv(addresses=which[1:])) as envs,
        contextlib.closing(BlenderEnv(address=which[0])) as env,
    ):
        for fault, said in [(SHAPE, r"shape \(3, 3\).*\(30, 41, 3\)"), (DTYPE, "float64.*uint8"), (NOTHING, "shape")]:
            for each, actions in ((envs, [1, fault]), (env, fault)):
                each.reset(seed=0, options=LONG)
                with pytest.raises(ConfigurationError, match=said):
                    each.step(actions)
        envs.reset(seed=0, options=LONG)
        envs.send([SHAPE], [1])
        with pytest.raises(ConfigurationError, match="shape"):
            envs.recv()
        with pytest.raises(ConfigurationError, match="nothing is under way"):
            envs.recv()
        observations, _ = envs.reset(seed=0, options=LONG)
        check(observations[1], 2, 0, 0, 0)
        assert envs.stats().restarts == 0


# -- the trainer -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_trainer_that_is_killed_between_send_and_recv_leaves_the_instances_to_the_next_one(
    running: BlenderLauncher,
) -> None:
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                envs = BlenderVectorEnv(addresses=addresses(running))
                envs.async_reset(seed=3)
                envs.recv(min_get=3)
                for _ in range(3):
                    envs.send([1, 2, 3])
                    envs.recv(min_get=3)
                envs.send([1, 2], [0, 2])
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with vector(running) as envs:
            observations, _ = envs.reset(seed=0, options=LONG)
            assert [who(each) for each in observations] == [[0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]]
            observations, *_ = envs.step([5, 6, 7])
            assert [who(each) for each in observations] == [[0, 0, 1, 5], [1, 0, 1, 6], [2, 0, 1, 7]]
            assert envs.stats().restarts == 0


def test_a_second_trainer_at_once_is_told_so(running: BlenderLauncher) -> None:
    with vector(running) as envs:
        envs.reset()
        with pytest.raises(ConfigurationError, match="Cannot connect"):
            BlenderVectorEnv(addresses=addresses(running))
        with pytest.raises(ConfigurationError, match="Cannot connect"):
            BlenderEnv(address=addresses(running)[1])
        envs.step([1, 1, 1])


@pytest.mark.long
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_an_interrupt_anywhere_in_a_step_leaves_environments_that_can_be_reset(
    running: BlenderLauncher, mode: AutoresetMode
) -> None:
    files = {str(module.__file__) for module in (vector_module, requests, rows)}
    with vector(running, autoreset_mode=mode, num_batches=2, timeoutms=20_000) as envs:

        def step() -> None:
            kept.append(envs.step([1, 2, 3])[0])

        kept: list[Any] = [None]
        envs.reset(seed=0)
        places = 0
        for _ in everywhere(step, files):
            places += 1
            del kept[:]
            observations, _ = envs.reset(seed=0, options=LONG)
            assert [who(each) for each in observations] == [[env, 0, 0, 0] for env in range(3)]
            observations, *_ = envs.step([4, 5, 6])
            assert [who(each) for each in observations] == [[env, 0, 1, 4 + env] for env in range(3)]
        assert places > 20
        del observations
        copied = envs.stats().copied_batches
        envs.step([4, 5, 6])
        envs.step([4, 5, 6])
        assert envs.stats().copied_batches == copied  # no batch was lost
        assert envs.stats().restarts == 0


@pytest.mark.long
def test_an_interrupt_anywhere_in_a_step_of_one_environment_leaves_it_to_be_reset(running: BlenderLauncher) -> None:
    with contextlib.closing(BlenderEnv(address=addresses(running)[0], timeoutms=20_000)) as env:
        env.reset(seed=0)
        for _ in everywhere(lambda: env.step(1), {str(single.__file__), str(requests.__file__)}):
            assert who(env.reset(seed=0, options=LONG)[0])[1:] == [0, 0, 0]
            assert who(env.step(9)[0])[1:] == [0, 1, 9]


def test_interrupted_environments_can_be_closed_in_good_order() -> None:
    with launch([["--shape", "30", "41", "3"]] * 2) as launcher:
        envs = BlenderVectorEnv(addresses=addresses(launcher))
        envs.reset(seed=0, options=LONG)
        np.testing.assert_array_equal(envs.step(np.array([1, 1]))[2], [False, False])
        envs.send([STUCK, STUCK])
        envs.close()
        envs.close()
