"""examples/control: the physics of the scene in each Blender, the controller, and the programs as their users run them."""

import importlib
import os
import re
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
from PIL import Image

from torch_side import BlenderLauncher

from ..selection import is_due

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONTROL = ROOT / "examples" / "control"
FRAME_S = 1 / 30


@pytest.fixture(scope="module")
def episodes(blender: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("control") / "episodes.npz"
    with BlenderLauncher(
        scene=CONTROL / "cartpole.blend",
        script=HERE / "scripts" / "balance.py",
        blender=blender.argument,
        background=True,
        instance_args=[[str(CONTROL / "cartpole.blend.py"), str(out)]],
        progress=False,
    ) as launcher:
        assert launcher.wait() == [0]
    return dict(np.load(out))


def test_a_pole_that_nobody_holds_falls_as_a_rod_does(episodes: dict[str, Any]) -> None:
    """The motor holds the cart: 0 = angle'' - (3 g / 2 l) sin(angle), for a thin rod of l = 2 m."""
    position, _, angle, _, _ = episodes["fall"].T
    np.testing.assert_allclose(position, 0.5, atol=1e-3)
    t = FRAME_S * np.arange(len(angle))
    expected = 0.1 * np.cosh(np.sqrt(3 * 9.81 / (2 * 2.0)) * t)
    np.testing.assert_allclose(angle[:15], expected[:15], rtol=0.03)


def test_an_action_is_an_acceleration_and_the_pole_leans_against_it(episodes: dict[str, Any]) -> None:
    _, speed, angle, _, _ = episodes["push"].T
    np.testing.assert_allclose(np.diff(speed)[1:], 0.4 * 15 * FRAME_S, rtol=0.1)
    assert (np.diff(angle) < 0).all()


@pytest.mark.parametrize("name", ["first", "other", "corner"])
def test_the_controller_keeps_the_pole_up_until_the_episode_is_truncated(episodes: dict[str, Any], name: str) -> None:
    assert episodes[f"end of {name}"].tolist() == [False, True]
    position, _, angle, _, reward = episodes[name].T
    assert len(position) == 501, "the first state, and that of each step"
    assert (reward == 1).all()
    assert abs(angle).max() < 0.4
    assert abs(position).max() < 2.5
    assert abs(angle[-50:]).max() < 0.05
    assert abs(position[-50:]).max() < 0.1


def test_a_fall_ends_the_episode(episodes: dict[str, Any]) -> None:
    assert episodes["end of swing"].tolist() == [True, False]
    assert abs(episodes["swing"][-1, 2]) > 0.5
    assert (abs(episodes["swing"][:-1, 2]) <= 0.5).all()
    assert episodes["swing"][-1, 4] == 0
    assert (episodes["swing"][:-1, 4] == 1).all()


def test_the_same_seed_and_actions_give_the_very_same_episode(episodes: dict[str, Any]) -> None:
    for name, again in (("first", "again"), ("swing", "swing again")):
        assert episodes[name].tobytes() == episodes[again].tobytes()
    assert (episodes["first"][0, [0, 2]] != episodes["other"][0, [0, 2]]).all()


def run(program: str, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, CONTROL / program, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cartpole_env() -> Iterator[Any]:
    sys.path.insert(0, str(CONTROL))
    try:
        yield importlib.import_module("cartpole_env")
    finally:
        sys.path.remove(str(CONTROL))


@pytest.mark.timeout(300)
def test_gymnasium_finds_nothing_wrong(a_blender: Any, cartpole_env: Any) -> None:
    env = gymnasium.make(f"cartpole_env:{cartpole_env.ID}", launch_args={"blender": a_blender.argument})
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            check_env(env.unwrapped, skip_render_check=True)
    finally:
        env.close()
    assert not [str(warning.message) for warning in said if "infinity" not in str(warning.message)]


@pytest.mark.long
@pytest.mark.skipif(not is_due(1), reason="it is due at another turn")
@pytest.mark.timeout(300)
def test_two_instances_play_the_same_episode_and_pictures_show_where_it_begins(
    a_blender: Any, cartpole_env: Any
) -> None:
    envs = gymnasium.make_vec(
        f"cartpole_env:{cartpole_env.ID}",
        num_envs=2,
        pixels=True,
        steps=8,
        launch_args={"blender": a_blender.argument},
    )
    assert envs.single_observation_space.shape == (64, 128, 3)
    try:
        first, _ = envs.reset(seed=[5, 5], options={"angle": 0.2})
        states = []
        for _ in range(8):
            last, _, _, truncated, infos = envs.step(np.full((2, 1), -0.3, np.float32))
            states.append(infos["state"])
        again, _ = envs.reset(seed=[5, 5], options={"angle": 0.2})
    finally:
        envs.close()
    assert truncated.all()
    for one, other in states:
        assert one.tobytes() == other.tobytes()
    for frame in (first, last):
        np.testing.assert_allclose(frame[0].astype(int), frame[1], atol=1)
    np.testing.assert_allclose(first.astype(int), again, atol=1)
    assert (abs(first.astype(int) - last) > 50).any(axis=-1).sum() > 30, "the pole has moved"


@pytest.mark.long
@pytest.mark.skipif(not is_due(0), reason="it is due at another turn")
@pytest.mark.timeout(300)
def test_the_controller_is_shown(a_blender: Any, tmp_path: Path) -> None:
    said = run("cartpole.py", "--episodes", 2, "--steps", 25, "--blender", a_blender.argument, "--out", tmp_path)
    assert [line.split(";")[0] for line in said.splitlines()[:2]] == [
        f"episode {i}: 25 steps, reward 25, up" for i in (0, 1)
    ]
    with Image.open(tmp_path / "balance.png") as picture:
        assert picture.size == (5 * 320, 160)


@pytest.mark.timeout(300)
def test_a_policy_is_trained_tested_and_shown(a_blender: Any, tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3", reason="train.py needs it: pip install '.[control]'")
    few = ("--steps", 1024, "--instances", 2, "--episode-steps", 40, "--test-episodes", 1)
    said = run("train.py", *few, "--blender", a_blender.argument, "--out", tmp_path)
    assert "Trained with 1024 steps in " in said
    assert re.search(r"In 1 other episodes of 40 steps, the pole stays up for \d+ steps", said), said
    with Image.open(tmp_path / "policy.png") as picture:
        assert picture.size == (5 * 320, 2 * 160)
    assert (tmp_path / "learning_curve.png").exists()
    assert (tmp_path / "policy.zip").exists()
