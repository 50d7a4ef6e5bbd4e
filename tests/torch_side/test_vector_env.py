"""Many environments as one batch: that each row is of its own environment, episode, step and action, and stays so.

The instances need no Blender: scripts/pixels.py says which picture is of what. gymnasium's own SyncVectorEnv around single
environments of the same instances says what is to come.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.launch.address import Address
from torch_side import BlenderLauncher
from torch_side.env import BlenderEnv, BlenderVectorEnv

from .pixels import check, elsewhere, launch, mark, who

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
                assert infos["_episode"].tolist() == [False, True, False]
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
