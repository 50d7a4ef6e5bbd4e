"""Signals of an animation. The simplest one is played in each form of Blender: with a window, timers play it.

The rest is played with a window, and without one in a module, which plays as any Blender without a window does.
"""

import json

import pytest

from .conftest import IN_EACH_BLENDER

EPISODE = [
    ["pre_animation", 1],
    *([name, frame] for frame in (1, 2, 3) for name in ("pre_frame", "post_frame")),
    ["post_animation", 3],
]
CUT_SHORT = [["pre_animation", 1], *([name, frame] for frame in (1, 2) for name in ("pre_frame", "post_frame"))]


@pytest.fixture(scope="module")
def play(run_script, tmp_path_factory):
    """Plays frames 1 to 3 twice; returns how the instance ended and what it wrote down."""

    def play(scenario):
        out = tmp_path_factory.mktemp("animation") / "events.json"
        run = run_script("animation.py", out, scenario)
        return run, json.loads(out.read_text()) if out.exists() else None

    return play


@pytest.fixture(scope="module")
def plain(play):
    return play("plain")


def test_signals_come_in_order_and_the_instance_ends_after_the_last_episode(plain):
    run, noted = plain
    assert run.exit_code == 0, run.log
    *events, (name, frame_ends) = noted["events"]
    assert events[0][0] == "pre_play"
    assert events[1:] == [*EPISODE, *EPISODE, ["post_play", 3]]
    assert (name, frame_ends) == ("point caches", [3, 3])


def test_play_returns_at_once_with_a_window_and_after_the_last_frame_without_one(plain):
    _, noted = plain
    assert noted["returned"] == noted["window"]


@IN_EACH_BLENDER
def test_play_steps_the_frames_itself_with_a_window_too_if_asked_to(play):
    run, noted = play("blocking")
    assert run.exit_code == 0, run.log
    assert not noted["returned"]
    assert noted["events"][1:-1] == [*EPISODE, *EPISODE, ["post_play", 3]]


@IN_EACH_BLENDER
@pytest.mark.parametrize("place", ["pre_frame", "post_frame"])
def test_an_exception_in_a_handler_ends_the_instance_with_its_traceback(play, place):
    run, noted = play(f"raise in {place}")
    assert run.exit_code == 1
    assert noted is None
    assert "RuntimeError: boom" in run.log
    assert f"in {place}" in run.log


@IN_EACH_BLENDER
def test_a_handler_can_end_the_instance_with_an_exit_code(play):
    run, _ = play("exit")
    assert run.exit_code == 5
    assert "Traceback" not in run.log


@IN_EACH_BLENDER
def test_rewinding_starts_the_episode_anew_and_does_not_count_it(play):
    run, noted = play("rewind")
    assert run.exit_code == 0, run.log
    assert noted["events"][1:-1] == [*CUT_SHORT, *CUT_SHORT, *EPISODE, *EPISODE, ["post_play", 3]]


@IN_EACH_BLENDER
def test_a_handler_that_sets_a_frame_itself_causes_no_signals(play):
    run, noted = play("set a frame")
    assert run.exit_code == 0, run.log
    assert noted["events"][1:-1] == [*EPISODE, *EPISODE, ["post_play", 3]]


@pytest.fixture(scope="module")
def episodes(run_script, tmp_path_factory):
    out = tmp_path_factory.mktemp("episodes") / "episodes.json"
    run = run_script("episodes.py", out)
    assert run.exit_code == 0, run.log
    return json.loads(out.read_text())


@IN_EACH_BLENDER
@pytest.mark.parametrize("simulation", ["force_field", "collider", "cloth"])
def test_each_episode_simulates_from_its_own_state(episodes, simulation):
    played = episodes[simulation]
    assert len(set(played["fresh"])) == 3
    assert played["episodes"] == [played["fresh"]] * 8


@IN_EACH_BLENDER
def test_a_frame_step_leaves_frames_out_but_not_of_the_simulation(episodes):
    every = dict(episodes["every frame"])
    assert list(every) == list(range(1, 13))
    assert len(set(every.values())) > 10
    assert episodes["every third frame"] == 2 * [[frame, every[frame]] for frame in (1, 4, 7, 10)]


@IN_EACH_BLENDER
def test_the_preview_range_is_played_while_it_is_on(episodes):
    assert episodes["preview"] == [5, 6, 7]


@IN_EACH_BLENDER
def test_what_was_baked_is_replayed(episodes):
    before, *played = episodes["baked"]
    assert played == [before, before]


@IN_EACH_BLENDER
def test_no_cache_on_disk_is_shared_by_instances(episodes):
    assert episodes["files"] == ["scene.blend"]


@IN_EACH_BLENDER
@pytest.mark.parametrize("place", ["pre_animation", "pre_frame", "post_frame", "post_animation"])
def test_handlers_may_open_a_file_and_the_animation_goes_on_in_it(episodes, place):
    assert episodes[f"opened in {place}"] == 2 * EPISODE
    assert episodes[f"range after {place}"] == [1, 3]


@IN_EACH_BLENDER
def test_the_animation_goes_on_in_the_scene_that_a_handler_shows(episodes):
    assert episodes["in another scene"] == 2 * [["Other", frame, frame] for frame in (4, 5, 6)]
    assert episodes["is told of its window"] or "The window shows the scene 'Other'" in episodes["refused"]


@IN_EACH_BLENDER
def test_a_range_that_starts_before_frame_0_is_refused_before_anything_is_changed(episodes):
    said, *frames = episodes["negative"]
    assert "(-3, 1) starts before frame 0" in said
    assert frames == [1, 3]
