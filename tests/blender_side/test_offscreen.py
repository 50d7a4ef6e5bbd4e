"""Pixel truth: what the camera says about the cube is what the picture shows, in every form of Blender."""

import numpy as np
import pytest

SHOTS = ["persp linear", "persp srgb", "shifted", "ortho", "looked at"]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def pictures(saved_by):
    return saved_by("pictures.py")


def srgb(linear):
    """IEC 61966-2-1, as 0 to 255."""
    linear = np.asarray(linear)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def convex_hull(points):
    """Corners in counter-clockwise order (y up), by gift wrapping."""
    hull = [points[np.lexsort(points.T[::-1])[0]]]
    while True:
        best = None
        for point in points:
            if best is None or np.allclose(best, hull[-1]):
                best = point
                continue
            (ax, ay), (bx, by) = best - hull[-1], point - hull[-1]
            if ax * by - ay * bx < 0:
                best = point
        if np.allclose(best, hull[0]):
            return np.array(hull)
        hull.append(best)


def distance_inside(points, shape):
    """For the middle of each pixel, how far it is inside the convex hull of points; negative outside (a lower bound)."""
    hull = convex_hull(points)
    edges = np.roll(hull, -1, axis=0) - hull
    normals = np.stack([-edges[:, 1], edges[:, 0]], -1) / np.linalg.norm(edges, axis=-1, keepdims=True)
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    return np.min([(x - px) * nx + (y - py) * ny for (px, py), (nx, ny) in zip(hull, normals, strict=True)], axis=0)


@pytest.mark.parametrize("shot", SHOTS)
def test_projected_corners_span_the_silhouette(pictures, shot):
    image = pictures[shot]
    inside = distance_inside(pictures[f"{shot} xy"], image.shape)
    drawn = image[..., :3].max(-1) > 8
    assert (inside > 1).sum() > 300
    assert drawn[inside > 1].all()
    assert not drawn[inside < -1].any()


@pytest.mark.parametrize("shot", SHOTS)
def test_each_face_has_its_colour_where_it_is_seen(pictures, shot):
    image, seen = pictures[shot], pictures[f"{shot} faces seen"]
    assert seen.sum() >= 2
    colors = pictures["colors"][pictures[f"{shot} faces material"]]
    expected = srgb(colors) if shot == "persp srgb" else 255 * colors
    for (x, y), color in zip(pictures[f"{shot} faces xy"][seen], expected[seen], strict=True):
        np.testing.assert_allclose(image[int(y), int(x), :3], color, atol=2)


@pytest.mark.parametrize(("space", "expected"), [("linear", (127.5, 25.5, 5.1)), ("srgb", srgb([0.5, 0.1, 0.02]))])
def test_a_glowing_surface_has_the_value_it_shines_with(pictures, space, expected):
    x, y = pictures["look_at xy"][0].astype(int)
    np.testing.assert_allclose(pictures[f"glow {space}"][y, x], expected, atol=2)


def test_lower_left_origin_is_the_same_picture_with_its_rows_reversed(pictures):
    assert (np.abs(pictures["lower left"][::-1].astype(int) - pictures["persp linear"]) <= 1).all()


def test_alpha_is_full_where_the_cube_is(pictures):
    image = pictures["persp srgb"]
    assert image.shape == (120, 160, 4)
    assert (image[distance_inside(pictures["persp srgb xy"], image.shape) > 1, 3] == 255).all()


def test_a_picture_is_drawn_into_the_array_that_the_publisher_lends(pictures):
    assert pictures["lent is returned"]
    assert (np.abs(pictures["lent"].astype(int) - pictures["looked at"]) <= 1).all()


def test_without_a_publisher_each_picture_has_memory_of_its_own(pictures):
    assert pictures["fresh memory"]


def test_flipping_on_the_gpu_gives_the_same_bytes(pictures):
    if not pictures["off_screen"]:
        pytest.skip("this Blender makes final renders")
    np.testing.assert_array_equal(pictures["flipped on gpu"], pictures["looked at"])
    np.testing.assert_array_equal(pictures["flipped on gpu, read later"], pictures["looked at"])


def test_a_picture_that_is_read_later_is_of_the_scene_as_it_was(pictures):
    assert pictures["can be read later"] == pictures["off_screen"]
    assert pictures["lent is filled later"] == pictures["off_screen"]
    for i in range(2):
        assert pictures[f"same array {i}"]
        for number in range(6):
            later, now = pictures[f"later {i} {number}"], pictures[f"now {i} {number}"]
            assert (np.abs(later.astype(int) - now) <= 1).all()
            assert later.max() > 8
        assert not np.array_equal(pictures[f"later {i} 0"], pictures[f"later {i} 2"])


def test_the_launcher_and_the_log_are_told_what_renders(pictures):
    assert pictures["renderer"].startswith("Blender ")
    assert ("off-screen" if pictures["off_screen"] else "final renders") in pictures["renderer"]
    assert pictures["log"].count(f"renders with {pictures['renderer']}") == 1
    assert "SOFTWARE" not in pictures["log"]  # the launcher says that


class TestCamera:
    def test_look_at_puts_the_point_in_the_middle_at_its_distance(self, pictures):
        np.testing.assert_allclose(pictures["look_at xy"], [[32, 48]], atol=1e-3)
        np.testing.assert_allclose(pictures["look_at depth"], np.linalg.norm([6.4, -3.3, 2.2]), rtol=1e-5)

    def test_pixels_can_be_counted_from_the_lower_left(self, pictures):
        np.testing.assert_allclose(pictures["look_at xy lower"], [[0, 96]])

    def test_a_cubes_bounding_box_has_its_corners(self, pictures):
        np.testing.assert_allclose(pictures["bbox xy"], pictures["corners xy"], atol=1e-3)

    def test_depth_is_measured_along_the_viewing_direction(self, pictures):
        assert 8 < pictures["ortho depth"][0] < 12
