"""Boxes and keypoints of scenes whose answers are known by geometry, or by rays through pixels, in every Blender."""

import numpy as np
import pytest

from .conftest import IN_EACH_BLENDER

pytestmark = [pytest.mark.timeout(300), IN_EACH_BLENDER]

HOWS = pytest.mark.parametrize("how", ["by raster", "by rays"])
KINDS = pytest.mark.parametrize("kind", ["PERSP", "ORTHO"])
VISIBLE, OCCLUDED, OUTSIDE = 2, 1, 0


@pytest.fixture(scope="module")
def scenes(saved_by):
    return saved_by("label_scenes.py")


def visibility(scenes, scene, how):
    keypoints = scenes[f"{scene}: {how}"]
    assert keypoints.dtype == np.float32
    return keypoints[:, 2]


class TestOcclusion:
    @HOWS
    @pytest.mark.parametrize(
        ("scene", "count"),
        [
            ("three faces, PERSP", 7),
            ("three faces, ORTHO", 7),
            ("two faces, PERSP", 6),
            ("one face, PERSP", 4),
            ("half behind a wall", 2),
        ],
    )
    def test_a_cubes_corner_is_visible_if_one_of_its_faces_is(self, scenes, scene, count, how):
        expected = scenes[f"{scene}: is visible"]
        assert expected.sum() == count
        np.testing.assert_array_equal(visibility(scenes, scene, how), np.where(expected, VISIBLE, OCCLUDED))

    @HOWS
    def test_what_is_hidden_in_the_viewport_hides_nothing(self, scenes, how):
        np.testing.assert_array_equal(
            visibility(scenes, "behind a hidden wall", how), visibility(scenes, "one face, PERSP", how)
        )

    @KINDS
    @pytest.mark.parametrize(("how", "blurred"), [("by raster", 0.4), ("by rays", 0.15)])
    def test_points_of_a_sphere_are_visible_on_the_near_side(self, scenes, kind, how, blurred):
        # Next to the outline it depends on the facets and, of a raster, on the pixels: half a diameter has 14 or more.
        cosine = scenes[f"sphere, {kind}: cosine"]
        certain = np.abs(cosine) > blurred
        found = visibility(scenes, f"sphere, {kind}", how)
        assert min((certain & (cosine > 0)).sum(), (certain & (cosine < 0)).sum()) > 80
        np.testing.assert_array_equal(found[certain], np.where(cosine > 0, VISIBLE, OCCLUDED)[certain])
        assert (found[cosine > 0] == VISIBLE).all()

    @HOWS
    @pytest.mark.parametrize("scene", ["ground at a grazing angle", "ground from below"])
    def test_points_on_a_plane_are_visible_however_steep_it_is(self, scenes, scene, how):
        inside = scenes[f"{scene}: in view"]
        assert inside.sum() > 200
        np.testing.assert_array_equal(visibility(scenes, scene, how), np.where(inside, VISIBLE, OUTSIDE))

    @HOWS
    def test_corners_of_a_room_are_visible_from_inside_and_nothing_behind_its_walls(self, scenes, how):
        found, inside = visibility(scenes, "inside a room", how), scenes["inside a room: in view"]
        corners, within, beyond = found[:8], found[8:11], found[11:]
        assert (corners == VISIBLE).sum() == 4
        np.testing.assert_array_equal(corners, np.where(inside[:8], VISIBLE, OUTSIDE))
        assert (within == VISIBLE).all()
        assert inside[11:].all()
        assert (beyond == OCCLUDED).all()


@HOWS
class TestOutside:
    def test_what_is_not_in_the_image_and_the_clip_range_is_zero_as_in_coco(self, scenes, how):
        keypoints = scenes[f"in and out: {how}"]
        assert scenes["in and out: names"][0] == "in view"
        np.testing.assert_allclose(keypoints[0], [48, 36, VISIBLE], atol=1e-3)
        assert len(keypoints) == 7
        assert not keypoints[1:].any()

    @pytest.mark.parametrize("scene", ["three faces, PERSP", "sphere, ORTHO", "inside a room"])
    def test_what_is_has_its_pixels_even_if_it_is_occluded(self, scenes, scene, how):
        inside = scenes[f"{scene}: in view"]
        np.testing.assert_allclose(scenes[f"{scene}: {how}"][inside, :2], scenes[f"{scene}: xy in view"], rtol=1e-6)


class TestKindsOfKeypoints:
    @pytest.mark.parametrize("how", ["with what is drawn", "without"])
    def test_each_kind_is_where_it_was_said_to_be(self, scenes, how):
        assert list(scenes["kinds: names"]) == ["vertex", "vertex that a modifier made", "place", "empty", "bone"]
        np.testing.assert_allclose(scenes[f"kinds: {how}"], scenes["kinds: expected"], atol=1e-5)

    @pytest.mark.parametrize("how", ["", ", not drawn"])
    @pytest.mark.parametrize(
        ("what", "said"),
        [
            ("a string", "Keypoint 'nose' is 'Cube': it can be an object, "),
            ("no such bone", "Keypoint 'elbow': the object 'Armature' has no bone 'Middle'"),
            ("a bone of a mesh", "Keypoint 'elbow': the object 'Cube' has no bone 'Lower'"),
            ("two numbers", "Keypoint 'nose': on the object 'Cube', (1, 2) is neither"),
            (
                "no such vertex",
                "Keypoint 'nose': the object 'Cube' has 26 vertices as evaluated, and none with index 26",
            ),
            ("a negative vertex", "the object 'Cube' has 26 vertices as evaluated, and none with index -1"),
            ("a vertex of an empty", "The object 'Helper' (EMPTY) has no vertices"),
        ],
    )
    def test_a_point_that_cannot_be_is_refused_by_name(self, scenes, what, how, said):
        assert said in str(scenes[f"wrong: {what}{how}"])

    def test_points_of_what_was_hidden_or_deleted_are_zero_and_those_of_hidden_empties_are_not(self, scenes):
        assert scenes["hidden: before"][[0, 1, 3]].all()
        assert not scenes["hidden: after"][[0, 2, 3]].any()
        np.testing.assert_array_equal(scenes["hidden: after"][1, :2], scenes["hidden: before"][1, :2])
        assert scenes["hidden: after"][1, 2] == VISIBLE

    def test_without_points_there_are_none(self, scenes):
        assert scenes["hidden: no points"].shape == (0, 3)


def boxes_by_brute_force(mask, ids):
    boxes = []
    for number in ids:
        rows, columns = np.nonzero(mask == number)
        if len(rows):
            boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        else:
            boxes.append((np.nan,) * 4)
    return np.array(boxes, np.float32)


class TestTightBoxes:
    @pytest.mark.parametrize("scene", ["random uint16", "random uint32", "boxes, PERSP", "boxes, ORTHO"])
    def test_they_are_what_looking_at_each_pixel_gives(self, scenes, scene):
        expected = boxes_by_brute_force(scenes[f"{scene}: mask"], scenes[f"{scene}: ids"])
        assert np.isfinite(expected).any()
        assert np.isnan(expected).any()
        found = scenes[f"{scene}: tight"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("dtype", ["uint16", "uint32"])
    def test_nothing_and_everything(self, scenes, dtype):
        assert scenes[f"empty {dtype}: tight"].shape == (2, 4)
        assert np.isnan(scenes[f"empty {dtype}: tight"]).all()
        np.testing.assert_array_equal(scenes[f"full {dtype}: tight"], [[0, 0, 5, 4]])


class TestFullBoxes:
    @KINDS
    def test_of_what_is_seen_wholly_they_are_the_tight_ones_within_a_pixel(self, scenes, kind):
        assert list(scenes[f"boxes, {kind}: names"]) == ["Cube", "Ball", "Letter", "Triangle"]
        np.testing.assert_allclose(scenes[f"boxes, {kind}: full"], scenes[f"boxes, {kind}: tight"], atol=1)

    def test_outside_the_image_they_go_on(self, scenes):
        full, names = scenes["outside: full"], scenes["outside: names"]
        assert sorted(names) == ["Ball", "Cube"]
        assert (full[:, 2] < 0).all()
        for box, name in zip(full, names, strict=True):
            xy = scenes[f"outside: xy of {name}"]
            np.testing.assert_allclose(box, [*xy.min(axis=0), *xy.max(axis=0)], rtol=1e-5)

    @KINDS
    def test_what_reaches_behind_the_camera_counts_from_where_the_clip_range_begins(self, scenes, kind):
        xy = scenes[f"crossing, {kind}: kept xy"]
        crossing, behind = scenes[f"crossing, {kind}: full"]
        np.testing.assert_allclose(crossing, [*xy.min(axis=0), *xy.max(axis=0)], rtol=1e-4)
        assert np.isnan(behind).all()

    def test_what_is_not_there_has_none(self, scenes):
        assert np.isnan(scenes["boxes, PERSP: full"][-1]).all()


class TestBoxes3d:
    @KINDS
    @pytest.mark.parametrize("name", ["Cube", "Ball"])
    def test_corners_are_those_of_the_bounding_box_in_camera_coordinates(self, scenes, kind, name):
        box = scenes[f"boxes, {kind}: 3d"][list(scenes[f"boxes, {kind}: names"]).index(name)]
        assert box.dtype == np.float32
        np.testing.assert_allclose(box, scenes[f"boxes, {kind}: corners of {name}"], atol=1e-5)
        assert (box[:, 2] > 5).all()

    @KINDS
    def test_k_projects_a_cubes_corners_onto_its_full_box(self, scenes, kind):
        corners = scenes[f"boxes, {kind}: 3d"][0].astype(np.float64)
        if kind == "ORTHO":
            corners[:, 2] = 1
        uvw = corners @ scenes[f"boxes, {kind}: K"].T
        xy = uvw[:, :2] / uvw[:, 2:]
        np.testing.assert_allclose([*xy.min(axis=0), *xy.max(axis=0)], scenes[f"boxes, {kind}: full"][0], rtol=1e-5)

    @KINDS
    def test_vertices_without_a_face_do_not_count(self, scenes, kind):
        box = scenes[f"boxes, {kind}: 3d"][list(scenes[f"boxes, {kind}: names"]).index("Triangle")]
        sides = np.linalg.norm(box[[4, 3, 1]] - box[0], axis=1)
        np.testing.assert_allclose(sides, [1, 1, 0], atol=1e-5)

    @KINDS
    def test_what_is_not_there_has_none(self, scenes, kind):
        assert np.isnan(scenes[f"boxes, {kind}: 3d"][-1]).all()
