"""Final renders hold the light that the engines computed, and the colours that Blender would show, in every form of Blender."""

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(300)

HEIGHT, WIDTH = 48, 64
GLOW = np.array([2.0, 0.4, 0.08])  # what the cube shines with


@pytest.fixture(scope="module")
def renders(saved_by):
    return saved_by("final_renders.py")


@pytest.fixture
def middle(renders):
    """Row and column where the cube's middle is."""
    x, y = renders["middle"].astype(int)
    return y, x


def as_bytes(values):
    return 255 * np.clip(values, 0, 1)


def srgb(linear):
    """IEC 61966-2-1."""
    linear = np.asarray(linear)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_floats_are_what_the_engine_rendered_to_the_last_bit(renders, middle):
    assert renders["light"].dtype == np.float32
    np.testing.assert_array_equal(renders["light"], renders["cycles"])
    np.testing.assert_allclose(renders["light"][middle], [*GLOW, 1], rtol=1e-5)


def test_lower_left_origin_has_the_rows_reversed_and_rgb_has_no_alpha(renders):
    np.testing.assert_array_equal(renders["light rgb lower"], renders["cycles"][::-1, :, :3])


def test_linear_bytes_are_the_light_whatever_the_exposure(renders):
    assert renders["linear"].shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(renders["linear"], as_bytes(renders["cycles"][..., :3]), atol=0.6)


def test_display_colors_are_encoded(renders):
    expected = as_bytes(srgb(renders["cycles"][..., :3].clip(0, 1)))
    np.testing.assert_allclose(renders["srgb"][..., :3], expected, atol=3)  # there is dither
    assert (renders["srgb"][..., 3] == 255).all()


def test_colors_are_multiplied_by_alpha(renders, middle):
    light, linear = renders["transparent light"], renders["transparent linear"]
    assert (light[-1, 0] == 0).all()
    assert (linear[-1, 0] == 0).all()
    np.testing.assert_allclose(light[middle], [*GLOW, 1], rtol=1e-5)
    edge = (light[..., 3] > 0) & (light[..., 3] < 1)
    assert edge.any()
    np.testing.assert_allclose(linear, as_bytes(light), atol=0.6)


@pytest.mark.parametrize("engine", ["eevee", "workbench"])
def test_every_engine_shows_the_cube_where_it_is(renders, engine):
    image = renders[engine]
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert image.dtype == np.float32
    y, x = np.nonzero((image != image[-1, 0]).any(-1))
    low, high = renders["corners"].min(0).clip(0), renders["corners"].max(0)
    np.testing.assert_allclose([x.min(), y.min()], low, atol=1.5)
    np.testing.assert_allclose([x.max() + 1, y.max() + 1], high, atol=1.5)


def test_eevee_gives_the_same_light_and_colors(renders, middle):
    np.testing.assert_allclose(renders["eevee"][middle], GLOW, rtol=2**-9)
    np.testing.assert_allclose(renders["eevee srgb"][middle], as_bytes(srgb(GLOW.clip(0, 1))), atol=3)


def test_workbench_gives_the_same_light_in_bytes(renders):
    np.testing.assert_allclose(renders["workbench linear"], as_bytes(renders["workbench"]), atol=0.6)


def test_the_compositor_is_part_of_the_render(renders):
    np.testing.assert_allclose(renders["composited"], 1 - renders["cycles"][..., :3], atol=1e-6)


def test_the_scene_is_afterwards_as_it_was(renders):
    assert renders["unchanged"].all()
    assert renders["engine"] == "CYCLES"


def test_a_picture_is_rendered_into_the_array_that_the_publisher_lends(renders):
    assert renders["lent is returned"]
    np.testing.assert_allclose(renders["lent"], renders["cycles"][..., :3], rtol=1e-5)


def test_without_a_publisher_each_picture_has_memory_of_its_own(renders):
    assert renders["fresh memory"]


def test_without_a_camera_it_is_the_scenes(renders):
    assert renders["of the scene's size"]


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ("bad mode", "mode='bgr'"),
        ("bad color space", "color_space='sRGB'"),
        ("bad dtype", "uint8 or float32"),
        ("float display", "leave out color_space='srgb'"),
        ("bad engine", "one of CYCLES, EEVEE, WORKBENCH"),
        ("too small", "no picture of 3 x 64 (height, width), the camera's shape: the nearest that it can is 4 x 64"),
        ("no memory for light", "No room for what Blender renders: 0.05 MB"),
        ("no memory for colors", "No room for what Blender renders: 0.05 MB"),
    ],
)
def test_what_cannot_be_rendered_is_an_error_that_says_why(renders, refusal, said):
    assert said in str(renders[refusal])


def test_the_launcher_and_the_log_are_told_what_renders(renders):
    assert "final renders (" in renders["renderer"]
    assert renders["log"].count("final renders (CYCLES)") == 1
