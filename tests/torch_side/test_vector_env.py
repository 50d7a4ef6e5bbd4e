"""Many environments as one batch: that each row is of its own environment, episode, step and action, and stays so.

The instances need no Blender: scripts/pixels.py says which picture is of what. gymnasium's own SyncVectorEnv around single
environments of the same instances says what is to come.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import mmap
import os
import re
import signal
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from blendtorch_shm.errors import ConfigurationError, StreamTimeout
from blendtorch_shm.launch.address import Address
from blendtorch_shm.memory.own_pages import address_of
from torch_side import BlenderLauncher
from torch_side.env import BlenderEnv, BlenderVectorEnv

from .pixels import PIXELS, check, elsewhere, launch, mark, pid, who

PICTURES = 3
"""Instances whose observation is a picture; their rows are no multiple of a page."""
KINDS: list[list[str]] = [
    *[["--kind", "picture", "--shape", "20", "31", "5", "--keeps"]] * PICTURES,
    *[["--kind", "dict", "--shape", "20", "31", "5", "--keeps"]] * 2,
    *[["--kind", "tuple", "--shape", "40", "30", "3", "--keeps"]] * 2,
    *[["--kind", "vector"]] * 2,
    *[["--kind", "picture", "--shape", "20", "31", "5", "--plain", "--draws"]] * 2,
]
GROUPS = {
    "picture": slice(0, 3),
    "dict": slice(3, 5),
    "tuple": slice(5, 7),
    "vector": slice(7, 9),
    "plain": slice(9, 11),
}


@pytest.fixture(scope="module")
def running() -> Iterator[BlenderLauncher]:
    """Instances that each test connects to anew."""
    with launch(KINDS) as launcher:
        for group in GROUPS:  # all that lies in shared memory is there now, and no test has left it
            which = addresses(launcher, group)
            with contextlib.closing(SyncVectorEnv([lambda a=a: BlenderEnv(address=a) for a in which])) as envs:
                envs.reset()
                envs.step([0] * len(which))
        yield launcher


def addresses(launcher: BlenderLauncher, group: str = "picture") -> list[Address]:
    found: list[Address] = launcher.launch_info.addresses["GYM"][GROUPS[group]]
    return found


@contextlib.contextmanager
def vector(which: Sequence[str], **options: Any) -> Iterator[BlenderVectorEnv]:
    with contextlib.closing(BlenderVectorEnv(addresses=which, **options)) as envs:
        yield envs


def same(ours: Any, theirs: Any) -> None:
    """Whether both are the same: their types, too, but for that of arrays of objects."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            same(ours[key], value)
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if theirs.dtype == object:
            for mine, other in zip(ours, theirs, strict=True):
                same(mine, other)
        else:
            np.testing.assert_array_equal(ours, theirs)
    else:
        assert ours == theirs


# -- each row is its own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("group", ["picture", "dict", "tuple", "vector", "plain"])
def test_it_is_gymnasiums_vector_around_the_same_environments(
    running: BlenderLauncher, group: str, mode: AutoresetMode
) -> None:
    """Random episodes: what is returned, the last observations and infos of episodes, and the masks."""
    which = addresses(running, group)
    played = []
    for make in (
        lambda: BlenderVectorEnv(addresses=which, autoreset_mode=mode),
        lambda: SyncVectorEnv([lambda a=a: BlenderEnv(address=a) for a in which], autoreset_mode=mode),
        lambda: BlenderVectorEnv(addresses=elsewhere(which), autoreset_mode=mode),
        lambda: BlenderVectorEnv(addresses=[which[0], *elsewhere(which[1:])], autoreset_mode=mode),
    ):
        with contextlib.closing(make()) as envs:
            played.append((envs.single_observation_space, envs.observation_space, envs.metadata["autoreset_mode"]))
            played.append(play(envs, mode, 25))
    ours, theirs, remote, mixed = played[1::2]
    assert played[0] == played[2] == played[4]
    assert sum(bool(np.any(over)) for over in theirs[2]) > 2
    for each in (ours, remote, mixed):
        same(each, theirs)


def play(envs: Any, mode: AutoresetMode, steps: int) -> Any:
    dice = np.random.default_rng(1)
    first = envs.reset(seed=7, options={"who": "me"})
    returned = [(*first, None, None, None)]
    for _ in range(steps):
        over = returned[-1][2] is not None and returned[-1][2] | returned[-1][3]
        if mode is AutoresetMode.DISABLED and np.any(over):
            observations, infos = envs.reset(options={"reset_mask": over})
            returned.append((observations, infos, np.zeros_like(over), np.zeros_like(over), None))
            continue
        observations, rewards, terminated, truncated, infos = envs.step(dice.integers(0, 200, envs.num_envs))
        returned.append((observations, infos, terminated, truncated, rewards))
    return tuple(zip(*returned, strict=True))


def test_seeds_may_be_one_for_each_and_reach_the_episodes(running: BlenderLauncher) -> None:
    with vector(addresses(running)) as envs:
        episodes = []
        for seed in (5, [5, 6, 7], [7, None, 5], None):
            envs.reset(seed=seed)
            episodes.append([envs.step(np.zeros(3, int))[1].tolist() for _ in range(3)])
        assert episodes[0] == episodes[1]
        assert [step[0] for step in episodes[2]] == [step[2] for step in episodes[0]]
        assert episodes[3] not in episodes[:3]
        with pytest.raises(ConfigurationError, match="2 seeds for 3 environments"):
            envs.reset(seed=[1, 2])
        with pytest.raises(ConfigurationError, match="seed"):
            envs.reset(seed=[-1, 0, 0])
        assert envs.reset(seed=5)[0].shape == (3, 20, 31, 5)


def test_episodes_may_be_cut_by_the_trainer(running: BlenderLauncher) -> None:
    """In gymnasium's words: truncated, and only if it is not terminated in the same step."""
    for mode in AutoresetMode:
        with vector(addresses(running), autoreset_mode=mode, max_episode_steps=3) as envs:
            envs.reset(seed=0, options={"length": 100})
            for step in (1, 2, 3):
                observations, _, terminated, truncated, infos = envs.step(np.full(3, 9))
                assert not terminated.any()
                assert truncated.all() == (step == 3)
            if mode is AutoresetMode.SAME_STEP:
                assert [who(last)[2] for last in infos["final_obs"]] == [3, 3, 3]
                assert [who(first)[1:3] for first in observations] == [[1, 0]] * 3


# -- it stays as it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_batches", [1, 4, 8])
def test_what_is_kept_stays_and_what_is_changed_is_changed_for_nobody_else(
    running: BlenderLauncher, num_batches: int
) -> None:
    """Observations of 60 steps: kept whole, as a view of a row, as a tensor, or not at all; and some are changed in place."""
    dice = np.random.default_rng(num_batches)
    with vector(addresses(running), num_batches=num_batches) as envs:
        envs.reset(seed=0, options={"length": 1000})
        kept: list[tuple[Any, list[Any], int]] = []
        for step in range(1, 61):
            actions = dice.integers(0, 200, 3)
            observations, *_ = envs.step(actions)
            moments = [(env, 0, step, int(actions[env])) for env in range(3)]
            for env in range(3):
                check(observations[env], *moments[env])
            kind, env = dice.integers(5), int(dice.integers(3))
            if kind == 0:
                kept.append((observations, moments, 0))
            elif kind == 1:
                kept.append((observations[env : env + 1, 2:18:3], moments[env : env + 1], 0))
            elif kind == 2:
                kept.append((torch.from_numpy(observations), moments, 0))
            elif kind == 3:
                observations += 1
                kept.append((observations[1:], moments[1:], 1))
            del observations
            if step < 40 and dice.random() < 0.15:
                del kept[int(dice.integers(len(kept) + 1)) :]
        assert len(kept) > num_batches
        for pictures, moments, added in kept:
            for picture, moment in zip(pictures, moments, strict=True):
                flat = np.asarray(picture).reshape(-1)
                assert flat[-1] == mark(*moment) + added
                assert (flat[5:] == flat[-1]).all()
        assert envs.stats().copied_batches


@pytest.mark.parametrize("num_batches", [1, 8])
def test_who_is_not_reset_has_the_last_observation_as_it_came(running: BlenderLauncher, num_batches: int) -> None:
    """Whatever the trainer did to it."""
    for which in (addresses(running), elsewhere(addresses(running))):
        with vector(which, autoreset_mode="DISABLED", num_batches=num_batches) as envs:
            kept = [envs.reset(seed=0, options={"length": 1000})[0]]
            for step in (1, 2, 3):
                kept.append(envs.step([step, step, step])[0])
                kept[-1][:] = 0
            for _ in range(2):
                mask = np.array([False, True, False])
                observations, infos = envs.reset(options={"reset_mask": mask, "length": 1000})
                assert [who(observations[0]), who(observations[2])] == [[0, 0, 3, 3], [2, 0, 3, 3]]
                assert infos["_number"].tolist() == [False, True, False]
                observations[:] = 0
            observations, *_ = envs.step([4, 4, 4])
            assert [who(each)[1:] for each in observations] == [[0, 4, 4], [2, 1, 4], [0, 4, 4]]
            for mask in ([True, True, False], np.zeros(3, bool), np.ones(2, bool), np.ones(3)):
                with pytest.raises(ConfigurationError, match="reset_mask"):
                    envs.reset(options={"reset_mask": mask})
        with (
            vector(which, autoreset_mode="DISABLED") as envs,
            pytest.raises(ConfigurationError, match="leaves environment 0 out, which was never reset"),
        ):
            envs.reset(options={"reset_mask": np.array([False, True, True])})


# -- each at its own pace ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_here", [True, False])
def test_nothing_is_lost_or_doubled_when_each_goes_at_its_own_pace(running: BlenderLauncher, is_here: bool) -> None:
    """Each environment's steps come in their order, with their actions, and what is kept stays as it is."""
    dice = np.random.default_rng(5)
    which = addresses(running) if is_here else elsewhere(addresses(running))
    with vector(which, num_batches=3, autoreset_mode="SAME_STEP") as envs:
        envs.async_reset(seed=0, options={"length": 10**6})
        at = [-1, -1, -1]
        sent = [0, 0, 0]
        under_way = {0, 1, 2}
        kept: list[tuple[Any, list[tuple[int, ...]]]] = []
        for _ in range(150):
            least = int(dice.integers(1, 4))
            most = int(dice.integers(least, 4))
            observations, rewards, terminated, truncated, infos = envs.recv(least, most)
            came = infos["env_id"].tolist()
            assert min(least, len(under_way)) <= len(came) <= most
            assert came == sorted(set(came))
            assert under_way >= set(came)
            assert len(observations) == len(rewards) == len(terminated) == len(truncated) == len(came)
            assert not terminated.any()
            under_way -= set(came)
            moments = []
            for observation, env in zip(observations, came, strict=True):
                at[env] += 1
                moments.append((env, 0, at[env], sent[env]))
                check(observation, *moments[-1])
            if dice.random() < 0.5:
                kept.append((observations[:, 3:], moments))
            elif dice.random() < 0.5:
                observations[:] = 0  # which nobody else sees
            again = [env for env in range(3) if env not in under_way and (dice.random() < 0.7 or not under_way)]
            dice.shuffle(again)
            if again:
                for env in again:
                    sent[env] = int(dice.integers(200))
                envs.send([sent[env] for env in again], again)
                under_way |= set(again)
            del observations
            if dice.random() < 0.1:
                del kept[int(dice.integers(len(kept) + 1)) :]
        for pictures, moments in kept:
            for picture, moment in zip(pictures, moments, strict=True):
                assert (picture == mark(*moment)).all()
        stats = envs.stats()
        assert stats.batches == 150
        assert 0 < stats.partial_batch_fraction <= 1
        assert stats.avg_batch_size == pytest.approx(3 * stats.batch_fill_ratio)
        assert 1 <= stats.avg_batch_size <= 3
        assert 0 < stats.consumer_busy_fraction < 1
        assert stats.avg_batch_to_action_ms > 0
        assert stats.avg_observation_to_batch_ms >= 0


def test_whole_batches_are_not_copied_in_either_way(running: BlenderLauncher) -> None:
    with vector(addresses(running), num_batches=2) as envs:
        envs.reset(seed=0, options={"length": 10**6})
        observations, *_ = envs.step([1, 1, 1])
        for _ in range(20):
            envs.send([1, 1, 1])
            observations, *_ = envs.recv(min_get=3)
            assert len(observations) == 3
        assert envs.stats().copied_batches == 0


def test_slow_environments_do_not_keep_fast_ones_waiting(running: BlenderLauncher) -> None:
    slow = pid(running, 1)
    with vector(addresses(running)) as envs:
        envs.async_reset(seed=0, options={"length": 10**6})
        envs.recv(min_get=3)
        os.kill(slow, signal.SIGSTOP)
        try:
            envs.send([1, 1, 1])
            for step in range(1, 6):
                observations, *_, infos = envs.recv(min_get=2)
                assert infos["env_id"].tolist() == [0, 2]
                assert [who(each)[2] for each in observations] == [step, step]
                envs.send([1, 1], [0, 2])
            with pytest.raises(StreamTimeout, match=r"of 3 answered within 0 s \(min_get=3\)"):
                envs.recv(min_get=3, timeout=0)
        finally:
            os.kill(slow, signal.SIGCONT)
        observations, *_ = envs.recv(min_get=3)  # what came is not lost
        assert [who(each)[2] for each in observations] == [6, 1, 6]


def test_misuse_is_told_and_does_no_harm(running: BlenderLauncher) -> None:
    with vector(addresses(running)) as envs:
        for misuse in (lambda: envs.step([1, 1, 1]), lambda: envs.send([1, 1, 1]), envs.recv):
            with pytest.raises(ConfigurationError, match=r"No episode has begun: call reset\(\) first"):
                misuse()
        envs.reset(seed=0)
        with pytest.raises(ConfigurationError, match="nothing is under way"):
            envs.recv()
        with pytest.raises(ConfigurationError, match="There are 2 actions for 3 environments"):
            envs.step(np.array([1, 1]))
        for ids in ([0, 0], [3], [-1]):
            with pytest.raises(ConfigurationError, match="expected numbers from 0 to 2, each once"):
                envs.send([1] * len(ids), ids)
        envs.send([7, 8], [2, 0])
        for misuse in (lambda: envs.send([1], [2]), lambda: envs.step([1, 1, 1]), lambda: envs.send([1, 1, 1])):
            with pytest.raises(ConfigurationError, match=r"Environments \[.*\] have not been received yet: recv\(\)"):
                misuse()
        with pytest.raises(ConfigurationError, match="max_get=1 is not between 2"):
            envs.recv(2, 1)
        observations, *_ = envs.recv(min_get=2)
        assert [who(each)[3] for each in observations] == [8, 7]
        envs.send([1, 1, 1])
        observations, _ = envs.reset(seed=0)
        assert [who(each)[1:3] for each in observations] == [[0, 0]] * 3
    for misuse in (envs.reset, envs.async_reset, lambda: envs.step([1, 1, 1]), lambda: envs.send([1] * 3), envs.recv):
        with pytest.raises(ConfigurationError, match="closed"):
            misuse()


# -- what it is made with ----------------------------------------------------------------------------------------------


def test_arguments_that_cannot_work_are_told(running: BlenderLauncher, capsys: pytest.CaptureFixture[str]) -> None:
    which = addresses(running)
    for arguments, said in [
        ({}, "Say scene=, script= and num_envs=; or addresses="),
        ({"scene": "", "script": PIXELS}, "num_envs="),
        ({"addresses": which, "script": PIXELS}, "addresses= are of instances that run"),
        ({"addresses": which, "num_envs": 2}, "num_envs=2, and there are 3 addresses"),
        ({"addresses": which, "output": "jax"}, "output='jax'"),
        ({"addresses": which, "render_mode": "human"}, "render_mode='human'"),
        ({"addresses": which, "autoreset_mode": "SOMETIMES"}, "use one of NEXT_STEP, SAME_STEP, DISABLED"),
        ({"addresses": which, "max_episode_steps": 0}, "max_episode_steps=0"),
        ({"addresses": ["here"]}, "here"),
        (
            {"addresses": [which[0], addresses(running, "vector")[0]]},
            "Environment 1 has other spaces than environment 0",
        ),
        ({"scene": "", "script": PIXELS, "num_envs": 1, "launch_args": {"scene": "a"}}, "launch_args has 'scene'"),
        (
            {"scene": "", "script": PIXELS, "num_envs": 2, "launch_args": {"instance_args": [[]]}},
            "instance_args for 1 instances; there are 2",
        ),
    ]:
        with pytest.raises(ConfigurationError, match=re.escape(said)):
            BlenderVectorEnv(**arguments)
    gc.collect()
    assert capsys.readouterr().err == ""


def test_observations_may_be_tensors(running: BlenderLauncher) -> None:
    with vector(addresses(running, "dict"), output="torch", autoreset_mode="SAME_STEP") as envs:
        observations, _ = envs.reset(seed=0, options={"length": 2})
        assert observations["left"].dtype == torch.uint8
        for _ in range(2):
            observations, rewards, terminated, truncated, _ = envs.step(torch.tensor([1, 2]))
        assert observations["pose"]["xyz"].shape == (2, 4)
        assert (rewards.dtype, terminated.dtype, truncated.dtype) == (torch.float64, torch.bool, torch.bool)
        assert envs.stats().copied_batches == 0


def test_pictures_for_people_are_the_last_ones_that_were_drawn(running: BlenderLauncher) -> None:
    with vector(addresses(running, "plain"), render_mode="rgb_array") as envs:
        with pytest.raises(ConfigurationError, match="drawn no picture yet"):
            envs.render()
        envs.reset(seed=0, options={"length": 9})
        envs.step([1, 1])
        envs.step([1, 1])
        assert [picture.tolist() for picture in envs.render() or ()] == [np.full((4, 6, 3), 2).tolist()] * 2
    with vector(addresses(running, "plain")) as envs:
        assert envs.render() is None


def test_gymnasium_makes_it_and_its_wrappers_take_it() -> None:
    options = {"least": 5, "launch_args": {"blender": "python", "progress": False}}
    gymnasium.register(
        "blendtorch/Pixels-v0",
        entry_point="torch_side.env:BlenderEnv",
        vector_entry_point="torch_side.env:BlenderVectorEnv",
        max_episode_steps=4,
        kwargs={"scene": "", "script": str(PIXELS), **options},
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = gymnasium.make_vec("blendtorch/Pixels-v0", num_envs=2, autoreset_mode="SAME_STEP")
        with contextlib.closing(RecordEpisodeStatistics(made)) as envs:
            envs.reset(seed=0, options={"length": 100})
            for _ in range(4):
                *_, truncated, infos = envs.step(envs.action_space.sample())
            assert truncated.all()
            assert infos["episode"]["l"].tolist() == [4, 4]
            assert made.unwrapped.spec is not None
        with contextlib.closing(gymnasium.make("blendtorch/Pixels-v0")) as env:
            check_env(env.unwrapped, skip_render_check=True)
            env.reset(seed=0, options={"length": 100})
            assert [env.step(1)[3] for _ in range(4)] == [False, False, False, True]
    finally:
        del gymnasium.registry["blendtorch/Pixels-v0"]


def test_spaces_may_be_the_trainers() -> None:
    space = gymnasium.spaces.Box(0, 255, (20, 30, 3), np.uint8)
    with launch([["--undeclared"]] * 2) as launcher:
        which = launcher.launch_info.addresses["GYM"]
        with pytest.raises(ConfigurationError, match="declares no observation_space"):
            BlenderVectorEnv(addresses=which)
        actions = gymnasium.spaces.Discrete(200)
        for each in (which, elsewhere(which)):
            with vector(each, observation_space=space, action_space=actions) as envs:
                envs.reset(seed=0, options={"length": 9})
                observations, *_ = envs.step(np.array([4, 5]))
                assert [who(picture) for picture in observations] == [[0, 0, 1, 4], [1, 0, 1, 5]]


# -- nobody copies -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kept", [0, 4])
def test_the_trainer_does_not_touch_what_is_rendered(running: BlenderLauncher, kept: int) -> None:
    """Measured: in a process that may not access the batches' memory while it steps. Where copies are due, that ends it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            envs = BlenderVectorEnv(addresses=addresses(running), num_batches=4)
            held = [envs.reset(seed=0, options={"length": 10**6})[0] for _ in range(kept)]
            envs.reset(seed=0, options={"length": 10**6})
            protect(envs, 0)
            for _ in range(20):
                observations, *_ = envs.step([1, 1, 1])
            protect(envs, mmap.PROT_READ | mmap.PROT_WRITE)
            check(observations[2], 2, 0, 20, 1)
            assert len(held) == kept
            status = 0
        finally:
            os._exit(status)
    ended = os.waitpid(child, 0)[1]
    with vector(addresses(running)) as envs:  # which removes what it left
        envs.reset()
    assert ended == (signal.SIGSEGV if kept else 0)


def protect(envs: BlenderVectorEnv, protection: int) -> None:
    """Say what may be done with the memory of all batches, in this process."""
    assert envs._batches is not None
    segment = envs._batches._segment
    assert segment.own is not None
    libc = ctypes.CDLL(None)
    for memory in (segment.view, segment.own.view):
        address = ctypes.c_void_p(address_of(memory))
        assert libc.mprotect(address, ctypes.c_size_t(len(memory)), protection) == 0
