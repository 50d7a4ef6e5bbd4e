"""The helpers' answers about scenes that are simple enough to know them."""

import json

import numpy as np
import pytest

from .conftest import IN_EACH_BLENDER

pytestmark = IN_EACH_BLENDER


@pytest.fixture(scope="module")
def answers(run_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("utils")
    run = run_script("utils_values.py", folder / "answers.json", folder)
    assert run.exit_code == 0, run.log
    return json.loads((folder / "answers.json").read_text())


class TestRandomSphericalLoc:
    def test_it_draws_radius_then_angle_from_z_then_angle_around_z(self, answers):
        radius, theta, phi = np.array(answers["draws"]).T
        expected = [radius * np.sin(theta) * np.cos(phi), radius * np.sin(theta) * np.sin(phi), radius * np.cos(theta)]
        np.testing.assert_allclose(np.array(answers["random places"]).T, expected)

    def test_by_default_it_is_anywhere_on_the_unit_sphere(self, answers):
        places = np.array(answers["default places"])
        assert places.shape == (500, 3)
        np.testing.assert_allclose(np.linalg.norm(places, axis=1), 1)
        octants = {tuple(place) for place in (places > 0).tolist()}
        assert len(octants) == 8


class TestVisibility:
    @pytest.mark.parametrize(
        "case",
        [
            "alone",
            "alone, within dist",
            "in a view layer",
            "the wall itself",
            "behind a wall that is nearer than the clip range",
            "behind a hidden wall",
            "a wall that lies on a face",
            "a text",
        ],
    )
    def test_what_nothing_covers_is_seen_wholly(self, answers, case):
        assert answers["seen"][case] == 1.0

    @pytest.mark.parametrize(
        "case",
        [
            "alone, beyond dist",
            "behind a wall",
            "behind a wall, ortho",
            "close behind a wall",
            "the hidden wall",
            "behind the camera",
            "outside",
            "in another scene",
            "an object without faces",
        ],
    )
    def test_what_is_covered_or_not_there_is_not_seen(self, answers, case):
        assert answers["seen"][case] == 0.0

    @pytest.mark.parametrize(
        "case", ["half behind a wall", "half behind a wall, ortho", "half outside", "half beyond the clip range"]
    )
    def test_of_what_is_half_covered_or_half_outside_half_is_seen(self, answers, case):
        assert answers["seen"][case] == pytest.approx(0.5, abs=0.1)

    def test_an_empty_has_no_surface_to_be_seen(self, answers):
        assert "'Nothing' (EMPTY)" in answers["visibility of an empty"]


class TestCoordinates:
    def test_vertices_are_those_after_modifiers_in_both_coordinate_systems(self, answers):
        local, world = np.array(answers["object coordinates"]), np.array(answers["world coordinates"])
        assert local.shape == (26, 3)
        assert set(np.round(local, 5).ravel()) == {-1, 0, 1}
        x, y, z = (local * (1, 2, 3)).T
        np.testing.assert_allclose(world, np.stack([1 - y, 2 + x, 3 + z], axis=1), atol=1e-5)
        np.testing.assert_array_equal(answers["with a depsgraph"], world)

    def test_what_the_given_evaluation_does_not_show_is_evaluated_there_too_or_an_error(self, answers):
        np.testing.assert_allclose(answers["in a view layer without it"], answers["with it"], atol=1e-5)
        assert "'Cube' is not part of this evaluation" in answers["in a scene without it"]

    def test_the_bounding_box_has_its_corners_in_blenders_order(self, answers):
        np.testing.assert_allclose(answers["bounding box"], answers["bound_box"], atol=1e-5)

    @pytest.mark.parametrize("what", ["Empty", "lamp", "mesh", "second metaball"])
    def test_what_has_no_vertices_has_no_box(self, answers, what):
        assert "has no box" in answers["boxes of nothing"][what]
        assert "has no box" in answers["boxes of nothing in pixels"][what]
        assert answers["box of a metaball"] == 8

    def test_several_objects_come_one_after_the_other(self, answers):
        assert answers["of two"] == [26 + 4, 2 * 8]

    def test_what_is_not_a_mesh_has_coordinates_if_it_has_geometry(self, answers):
        assert answers["of a text"] > 10
        assert "'Nothing' (EMPTY)" in answers["coordinates of an empty"]

    def test_homogeneous_coordinates_and_back(self, answers):
        assert answers["hom"] == [[1, 2, 2], [3, 4, 2]]
        assert answers["dehom"] == [[0.5, 1], [6, 8]]

    def test_the_first_view_is_an_area_its_space_and_its_window_region(self, answers):
        assert answers["view"] == ["VIEW_3D", "VIEW_3D", "WINDOW"]


def test_statistics_count_used_and_orphaned_blocks_of_each_kind(answers):
    before, after = answers["stats"]["before"], answers["stats"]["after"]
    assert sum(after["meshes"]) == answers["stats"]["meshes"]
    assert after["meshes"] == [before["meshes"][0], before["meshes"][1] + 1]
    assert after["objects"][0] > 0
    assert sum(after["scenes"]) == answers["stats"]["scenes"] == 2
    assert all(sum(counts) for counts in after.values())


def test_modules_beside_the_scene_can_be_imported(answers):
    assert answers["beside"] == 42
    assert answers["times on the path"] == 1
    assert answers["last on the path"]


def test_a_scene_without_a_file_has_nothing_beside_it(answers):
    assert "not opened from a file" in answers["unsaved"]
