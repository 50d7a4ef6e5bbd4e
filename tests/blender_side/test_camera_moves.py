"""Pictures, projected points and labels are of where the camera is now, however the script has moved it, in every Blender."""

import numpy as np
import pytest

from .conftest import IN_EACH_BLENDER

pytestmark = [pytest.mark.timeout(300), IN_EACH_BLENDER]

REFUSED = {
    "blended_actions": "camera.view_matrix = camera.view_matrix",
    "a_handler": "camera.view_matrix = camera.view_matrix",
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


def middle_of(rows):
    light = rows.max(axis=2).astype(float).sum(axis=0)
    return (light * np.arange(light.size)).sum() / light.sum()


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
