"""examples/control: the physics of the scene in each Blender, and the controller."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torch_side import BlenderLauncher

HERE = Path(__file__).parent
CONTROL = HERE.parents[1] / "examples" / "control"
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
