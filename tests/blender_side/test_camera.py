"""A camera's K and extrinsics lead from the world to the pixels that pictures show, in every Blender."""

import numpy as np
import pytest

from .conftest import IN_EACH_BLENDER

SHOTS = [
    "landscape",
    "portrait",
    "horizontal fit, portrait",
    "vertical fit, landscape",
    "shift",
    "shift, portrait, vertical fit",
    "wide pixels",
    "high pixels",
    "ortho",
    "ortho, portrait, shift",
    "ortho, vertical fit, wide pixels",
]

pytestmark = [pytest.mark.timeout(300), IN_EACH_BLENDER]


@pytest.fixture(scope="module")
def seen(saved_by):
    return saved_by("camera_matrices.py")


def project(k, extrinsics, xyz, *, orthographic):
    """As the docstring of Camera.intrinsics says."""
    in_camera = xyz @ extrinsics[:3, :3].T + extrinsics[:3, 3]
    if orthographic:
        in_camera[:, 2] = 1
    uvw = in_camera @ k.T
    return uvw[:, :2] / uvw[:, 2:]


def projected(seen, shot, xyz):
    return project(seen[f"{shot} K"], seen[f"{shot} opencv"], xyz, orthographic=shot.startswith("ortho"))


def test_all_shots_were_taken(seen):
    assert list(seen["shots"]) == SHOTS


@pytest.mark.parametrize("shot", SHOTS)
def test_k_projects_places_onto_the_pixels_that_show_them(seen, shot):
    assert seen[f"{shot} in view"].all()
    np.testing.assert_allclose(projected(seen, shot, seen["places"]), seen[f"{shot} shown"], atol=0.3)


@pytest.mark.parametrize("shot", SHOTS)
def test_k_projects_vertices_where_object_to_pixel_does(seen, shot):
    for place, expected in zip(seen["places"], seen[f"{shot} vertices xy"], strict=True):
        np.testing.assert_allclose(projected(seen, shot, seen["vertices"] + place), expected, atol=1e-3)


@pytest.mark.parametrize("shot", SHOTS)
def test_opencvs_third_coordinate_is_depth(seen, shot):
    z = (seen["places"] @ seen[f"{shot} opencv"][:3, :3].T + seen[f"{shot} opencv"][:3, 3])[:, 2]
    np.testing.assert_allclose(z, seen[f"{shot} depth"])
    assert (z > 5).all()


@pytest.mark.parametrize("shot", SHOTS)
def test_extrinsics_are_rigid_and_differ_in_y_and_z_alone(seen, shot):
    blender, opencv = seen[f"{shot} blender"], seen[f"{shot} opencv"]
    np.testing.assert_array_equal(blender.astype(np.float32), seen[f"{shot} view matrix"])
    np.testing.assert_array_equal(opencv, np.diag([1, -1, -1, 1]) @ blender)
    np.testing.assert_allclose(opencv[:3, :3] @ opencv[:3, :3].T, np.eye(3), atol=1e-6)
    assert np.linalg.det(opencv[:3, :3]) > 0
    assert opencv.dtype == blender.dtype == np.float64


@pytest.mark.parametrize("shot", SHOTS)
def test_k_has_a_positive_diagonal_and_ends_in_0_0_1(seen, shot):
    k = seen[f"{shot} K"]
    assert k.dtype == np.float64
    assert (np.diag(k) > 0).all()
    np.testing.assert_array_equal(k[2], [0, 0, 1])


def test_k_of_a_plain_camera_is_what_its_lens_says(seen):
    focal = 50 / 36 * 160  # millimetres of lens and sensor, pixels of width
    np.testing.assert_allclose(seen["landscape K"], [[focal, 0, 80], [0, focal, 60], [0, 0, 1]], atol=1e-4)


def test_k_of_an_orthographic_camera_has_pixels_per_metre(seen):
    np.testing.assert_allclose(seen["ortho K"], [[160 / 7, 0, 80], [0, 160 / 7, 60], [0, 0, 1]], atol=1e-4)


def test_what_is_outside_the_image_or_the_clip_range_is_not_in_view(seen):
    assert seen["in view"].all()
    assert not seen["not in view"].any()


def test_a_panoramic_camera_has_no_k(seen):
    assert "PANO" in str(seen["panorama"])


def test_an_unknown_convention_is_refused(seen):
    assert "'opengl'" in str(seen["convention"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("look at itself", "look at the point where it stands"),
        ("look at nan", "look_at=(nan, 0, 0)"),
        ("look from nan", "look_from=(1, nan, 1)"),
        ("look at two numbers", "look_at=(0, 0)"),
    ],
)
def test_a_camera_is_not_moved_to_where_it_cannot_look(seen, wrong, said):
    assert said in str(seen[wrong])
    np.testing.assert_array_equal(*seen["left where it was"])


def test_a_camera_that_is_held_is_noticed_in_tiny_scenes_too(seen):
    assert "COPY_LOCATION" in str(seen["held"])
    for name in ("not held", "far away"):
        np.testing.assert_allclose(seen[name], [[80, 60]], atol=1e-3)


def test_a_view_matrix_that_was_set_is_kept_as_precisely_as_it_was_given_until_it_is_changed(seen):
    np.testing.assert_array_equal(*seen["kept"])
    np.testing.assert_array_equal(*seen["changed"])


@pytest.mark.parametrize("wrong", ["no scale", "nowhere"])
@pytest.mark.parametrize("how", ["view", "extrinsics", "look_at", "off-screen", "final"])
def test_a_camera_without_scale_or_place_is_an_error(seen, wrong, how):
    assert "shows nothing" in str(seen[f"{wrong}, {how}"])


def test_a_shape_from_a_list_or_an_array_is_a_tuple_of_ints(seen):
    assert list(seen["array shape"]) == ["(120, 160)"] * 2


def test_an_image_without_pixels_is_refused(seen):
    assert "(0, 160)" in str(seen["no pixels"])
