"""Pictures, projected points and labels are of where the camera is now, however the script has moved it, in every Blender."""

import numpy as np
import pytest

from .conftest import IN_EACH_BLENDER

pytestmark = [pytest.mark.timeout(300), IN_EACH_BLENDER]

REFUSED = {
    "blended_actions": "camera.view_matrix = camera.view_matrix",
    "blended_actions_far_away": "camera.view_matrix = camera.view_matrix",
    "blended_actions_in_a_tiny_scene": "camera.view_matrix = camera.view_matrix",
    "blended_actions_of_the_clip_range": "camera.view_matrix = camera.view_matrix",
    "blended_actions_of_a_large_scene": "camera.view_matrix = camera.view_matrix",
    "skew": "cannot have this proj_matrix",
    "a_mirrored_projection": "cannot have this proj_matrix",
    "a_scaled_view": "cannot have this view_matrix",
}
FOCAL = 50 / 36 * 64
#: Where the cube's middle is then, by hand, as far as its faces' perspective lets their mean say it.
BY_HAND = {
    "parent": (32 - FOCAL / 10, 24 + FOCAL / 20),
    "lens": (32 - 1.4 * FOCAL / 10, 24),
    "ortho_scale": (32 - 64 / 9, 24),
    "hidden_from_viewports": (32 - FOCAL / 10, 24),
    "excluded": (32 - FOCAL / 10, 24),
    "in_no_collection": (32 - FOCAL / 10, 24),
    "resolution": (40 - 50 / 36 * 80 / 10, 12),
    "k_of_a_calibration": (27 - 90 * 0.5 / 10, 30 + 70 * 0.5 / 10),
}


@pytest.fixture(scope="module")
def moves(saved_by):
    return saved_by("camera_moves.py")


@pytest.fixture(scope="module")
def ways(moves):
    return [way for way in moves["ways"] if way not in REFUSED]


def test_the_script_has_moved_the_cube_in_the_picture(moves, ways):
    assert len(ways) > 25
    for way in ways:
        if way != "grandparent":  # turned about the point that it looks at
            assert np.linalg.norm(moves[f"{way} before"] - moves[f"{way} unmoved"]) > 1, way


@pytest.mark.parametrize(("renderer", "tolerance"), [("WORKBENCH", 0.3), ("CYCLES", 0.2), ("off-screen", 0.5)])
def test_pictures_show_the_cube_where_it_is_projected_to(moves, ways, renderer, tolerance):
    shown = [way for way in ways if f"{way} {renderer}" in moves]
    assert len(shown) >= 8
    for way in shown:
        np.testing.assert_allclose(moves[f"{way} {renderer}"], moves[f"{way} before"], atol=tolerance, err_msg=way)


def test_a_final_render_leaves_the_camera_where_it_was(moves, ways):
    for way in ways:
        np.testing.assert_allclose(moves[f"{way} after"], moves[f"{way} before"], atol=1e-3, err_msg=way)


@pytest.mark.parametrize("way", BY_HAND)
def test_the_cube_is_where_a_pinhole_shows_it(moves, way):
    np.testing.assert_allclose(moves[f"{way} before"], BY_HAND[way], atol=0.06)


@pytest.mark.parametrize("way", REFUSED)
def test_what_a_final_render_cannot_show_is_an_error(moves, way):
    assert REFUSED[way] in str(moves[f"{way} error"])


def test_a_render_leaves_no_objects_behind(moves):
    for way in moves["ways"]:
        np.testing.assert_array_equal(moves[f"{way} left"], 0, err_msg=way)


@pytest.mark.parametrize(("frame", "where"), [(1, -2), (6, 0), (11, 2)])
def test_final_renders_show_objects_where_the_script_put_them_and_hidden_ones_where_their_animation_says(
    moves, frame, where
):
    picture = moves[f"objects {frame}"]
    assert middle_of(picture[:24]) + 0.5 == pytest.approx(32 + FOCAL / 10, abs=0.5)
    assert middle_of(picture[24:]) + 0.5 == pytest.approx(32 + where * FOCAL / 10, abs=0.5)
    np.testing.assert_allclose(moves[f"objects {frame} after"], [1, 1.5, 0], atol=1e-6)


@pytest.mark.parametrize(("frame", "where"), [(1, 0), (6, 1), (11, 2)])
def test_final_renders_and_labels_show_what_a_modifier_makes_of_an_object_that_viewports_do_not_evaluate(
    moves, frame, where
):
    columns = np.flatnonzero(moves[f"copies {frame}"].max(axis=(0, 2)) > 100)
    left, _, right, _ = moves[f"copies {frame} box"][0]
    assert (left + right) / 2 == pytest.approx(32 + where / 2 * FOCAL / 9.7, abs=0.05)
    assert (columns[0], columns[-1] + 1) == pytest.approx((left, right), abs=1)


def test_a_camera_that_hangs_on_what_viewports_do_not_evaluate_is_where_its_animation_says(moves):
    assert moves["on a hidden rig"] == pytest.approx(1, abs=1e-4)


def middle_of(rows):
    light = rows.max(axis=2).astype(float).sum(axis=0)
    return (light * np.arange(light.size)).sum() / light.sum()


@pytest.mark.parametrize(("name", "x"), [("far", 32 + FOCAL / 10), ("tiny", 32 + FOCAL / 10), ("type", 32 - 64 / 6)])
def test_what_a_script_sets_on_animated_properties_counts_by_its_own_size_and_of_choices_too(moves, name, x):
    assert moves[f"{name} before"][0] == pytest.approx(x, abs=0.1)
    np.testing.assert_allclose(moves[f"{name} CYCLES"], moves[f"{name} before"], atol=0.2)
    np.testing.assert_array_equal(moves[f"{name} after"], moves[f"{name} before"])


def test_what_has_the_value_of_its_animation_was_changed_by_nobody(moves):
    assert not moves["not overridden"].any()


def test_labels_and_projections_are_the_same_65_km_away(moves):
    labels = [key.removeprefix("near ") for key in moves if key.startswith("near ")]
    assert {"keypoints", "pixels", "in_view"} <= set(labels)
    for label in labels:
        if moves[f"near {label}"].dtype.kind in "fiub":
            np.testing.assert_allclose(
                moves[f"distant {label}"], moves[f"near {label}"], rtol=1e-5, atol=1e-4, err_msg=label
            )


@pytest.mark.parametrize("above", [0.01, 0.002])
def test_what_lies_on_something_far_away_is_seen_wherever_the_clip_range_begins(moves, above):
    masks = [mask for name, mask in moves.items() if name.startswith(f"slab {above}")]
    if not masks:
        pytest.skip("this Blender draws nothing off-screen in background")
    assert len(masks) == 3
    assert (masks[0] > 0).sum() > 80
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])


@pytest.mark.parametrize("frame", [2, 3, 4])
def test_a_handler_that_moves_things_has_moved_them_in_picture_and_labels_alike(moves, frame):
    where = moves[f"handled {frame}"]
    for made, tolerance in (("before", 0.1), ("WORKBENCH", 0.3), ("after", 0.1)):
        np.testing.assert_allclose(moves[f"handled {frame} {made}"], where, atol=tolerance, err_msg=made)


def test_handlers_are_called_once_for_a_frame_and_not_by_renders(moves):
    assert moves["handled"].tolist() == [2, 2, 3, 3, 4, 4]
    assert str(moves["log"]).count("do not call your handlers render_init, render_pre") == 1


def test_a_scene_without_a_view_layer_to_render_is_an_error(moves):
    assert "'Use for Rendering'" in str(moves["no layer"])


def lit_columns(picture, least=5):
    return int((picture[24].max(axis=1) > least).sum())


def test_final_renders_have_the_motion_blur_of_the_camera(moves):
    wall, way = 0.6 * FOCAL / 9.7, 4 * 0.25 * FOCAL / 9.7
    assert lit_columns(moves["blurred"]) == pytest.approx(wall + way, abs=2)
    assert moves["blurred"].max() < 200  # nothing is covered all the time


def test_final_renders_have_the_rolling_shutter_of_the_camera(moves):
    upper, lower = moves["rolling"][8:16], moves["rolling"][32:40]
    seen = middle_of(lower) - middle_of(upper)
    assert abs(seen) == pytest.approx(4 * 0.25 * FOCAL / 9.7 * 24 / 48, abs=1.5)
    assert abs(middle_of(moves["blurred"][32:40]) - middle_of(moves["blurred"][8:16])) < 0.5


def test_a_camera_that_the_script_holds_stands_still(moves):
    assert lit_columns(moves["held"], least=127) == pytest.approx(0.6 * FOCAL / 9.7, abs=1)
    assert moves["held"].max() == 255
