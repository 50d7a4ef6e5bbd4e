"""What alpha and colours are, in each renderer; and that pictures are of the scene, whatever the viewport and the file before."""

import os

import numpy as np
import pytest

from tests import selection

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
FILMS = [False, True]
IN_EACH_FORM = selection.ALL or "BLENDTORCH_TEST_BLENDERS" in os.environ


@pytest.fixture(scope="module")
def styles(blender, saved_by):
    if blender.form == "executable" and not IN_EACH_FORM:
        pytest.skip("an executable takes a minute and a half for these pictures: make soak, make test-versions")
    return saved_by("styles.py")


def srgb(linear):
    """IEC 61966-2-1."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def as_bytes(light):
    return 255 * np.clip(light, 0, 1)


def as_display(light):
    """As light that covers a pixel in part has to be encoded so that it can be pasted."""
    alpha = light[..., 3:]
    partial = (alpha > 0) & (alpha < 1)
    straight = np.where(partial, light[..., :3] / np.where(partial, alpha, 1), light[..., :3])
    return 255 * np.concatenate([srgb(straight) * np.where(partial, alpha, 1), alpha.clip(0, 1)], axis=-1)


def at(styles, picture):
    """Its values in the middle of the patches (of light that covers 40 %, of light alone, of a holdout), and beside them."""
    return np.array([picture[int(y), int(x)] for x, y in styles["xy"]], np.float64)


@pytest.mark.parametrize("engine", ["CYCLES", "EEVEE"])
def test_light_is_multiplied_by_coverage(styles, engine):
    covered, alone, _, beside = at(styles, styles[f"True {engine} light"])
    np.testing.assert_allclose(covered, [0.8, 0.4, 0.2, 0.4], atol=2e-3)
    np.testing.assert_allclose(alone, [0.5, 0.25, 0.125, 0], atol=2e-3)
    assert (beside == 0).all()
    assert at(styles, styles[f"False {engine} light"])[2, 3] == pytest.approx(0.4, abs=2e-3)  # a holdout


@pytest.mark.parametrize("film", FILMS)
def test_bytes_of_final_renders_are_their_light(styles, film):
    np.testing.assert_allclose(styles[f"{film} CYCLES linear"], as_bytes(styles[f"{film} CYCLES light"]), atol=0.6)


@pytest.mark.parametrize("film", FILMS)
def test_display_colors_of_final_renders_can_be_pasted(styles, film):
    light = styles[f"{film} CYCLES light"]
    np.testing.assert_allclose(styles[f"{film} CYCLES srgb"], as_display(light), atol=1.1)
    over_white = at(styles, styles["True CYCLES srgb"])[0]
    assert (over_white[:3] + (255 - over_white[3]) <= 256).all()


@pytest.mark.parametrize("film", FILMS)
@pytest.mark.parametrize("mode", ["", " rgb"])
def test_off_screen_pictures_are_those_of_final_renders(styles, film, mode):
    if f"{film} off linear{mode}" not in styles:
        pytest.skip("this Blender makes final renders")
    light = at(styles, styles[f"{film} EEVEE light"])
    linear, display = (at(styles, styles[f"{film} off {space}{mode}"]) for space in ("linear", "srgb"))
    if styles["off_screen"] and not styles["has_alpha"] and not film:
        light, linear, display = (
            np.delete(values, 2, axis=0) for values in (light, linear, display)
        )  # but for holdouts
    channels = linear.shape[-1]
    np.testing.assert_allclose(linear, as_bytes(light)[:, :channels], atol=1.1)
    np.testing.assert_allclose(display, as_display(light)[:, :channels], atol=2.1)


def test_pictures_with_holdouts_that_cannot_be_read_later_are_an_error(styles):
    if not styles["off_screen"]:
        pytest.skip("this Blender makes final renders")
    np.testing.assert_array_equal(styles["True off srgb later"], styles["True off srgb"])
    later = styles["False off srgb later"]
    if styles["has_alpha"]:
        assert "holdouts" in str(later)
    else:
        np.testing.assert_array_equal(later, styles["False off srgb"])


def test_solid_pictures_have_the_films_alpha_and_srgb_whatever_the_view_transform(styles):
    for film in FILMS:
        linear, display = at(styles, styles[f"{film} off solid"]), at(styles, styles[f"{film} off solid srgb"])
        assert linear[:, 3].tolist() == display[:, 3].tolist() == [255, 255, 255, 0 if film else 255]
        np.testing.assert_allclose(display[:3, :3], 255 * srgb(linear[:3, :3] / 255), atol=1.5)
        assert linear[3, :3].any() != film


@pytest.mark.parametrize("picture", ["plain", "wide"])
def test_off_screen_pictures_are_f12s(styles, picture):
    if picture not in styles:
        pytest.skip("this Blender knows no such display")
    difference = np.abs(styles[picture].astype(int) - styles[f"{picture} f12"]).max(-1)
    assert np.median(difference) <= 1
    assert (difference <= 3).mean() >= 0.99


def test_nothing_of_the_viewport_gets_into_a_picture_with_a_style(styles):
    if not styles["off_screen"]:
        pytest.skip("this Blender makes final renders")
    assert np.ptp(styles["plain"][..., :3]) > 50
    np.testing.assert_array_equal(styles["disturbed"], styles["plain"])
    assert styles["viewport as it was"].all()


@pytest.mark.parametrize("style", ["SOLID", "RENDERED", "final"])
def test_a_renderer_that_is_kept_draws_the_file_that_is_open(styles, style):
    if f"opened 0 {style}" not in styles:
        pytest.skip("this Blender makes final renders")
    np.testing.assert_array_equal(styles[f"undone {style}"], styles[f"opened 1 {style}"])
    for one, another in (("opened 0", "opened 1"), ("opened 1", "moved")):
        assert not np.array_equal(styles[f"{one} {style}"], styles[f"{another} {style}"])
    if style != "final":
        for name in ("opened 0", "opened 1", "moved", "undone"):
            np.testing.assert_array_equal(styles[f"{name} {style} now"], styles[f"{name} {style}"])


@pytest.mark.parametrize("style", ["SOLID", "RENDERED"])
def test_pictures_can_be_drawn_after_a_final_render_with_a_grease_pencil(styles, style):
    if f"pencil 0 {style}" not in styles:
        pytest.skip("this Blender makes final renders")
    difference = np.abs(styles[f"pencil 0 {style}"].astype(int) - styles[f"pencil 1 {style}"])
    assert difference.max() <= 1
    assert not np.array_equal(styles[f"pencil 0 {style}"], styles[f"undone {style}"])
