"""What ground truth is asked for by, and what it keeps when Blender replaces its data."""

import numpy as np
import pytest

from .conftest import IN_EACH_BLENDER

pytestmark = [pytest.mark.timeout(300), IN_EACH_BLENDER]


@pytest.fixture(scope="module")
def found(saved_by):
    return saved_by("lifetimes.py")


def test_what_an_empty_has_below_it_is_its_and_the_nearest_counts(found):
    rows = ["body:vehicle", "wheel0:wheel", "wheel1:wheel", "hub:wheel"]
    assert sorted(found["an empty"].tolist()) == sorted(rows)


def test_a_collection_stands_for_what_is_in_it(found):
    assert found["a collection"].tolist() == ["tree:plant"]


def test_a_mesh_stands_for_itself_alone(found):
    assert found["a mesh"].tolist() == ["wheel0:"]


def test_what_stands_under_a_name_has_one_number_and_one_box(found):
    assert found["one number"].tolist() == ["car", "green"]
    assert found["one number: ids"].tolist() == [1, 2]
    # x, y and z of the car: the body's 4, from the hub's -2 to the body's 2, 1; of the tree: along the world's axes
    np.testing.assert_allclose(found["one number: sizes"], [(4, 4, 1), (1, 1, 3)], atol=1e-4)


@pytest.mark.parametrize("renderer", ["SOLID", "F12"])
def test_the_box_of_a_group_turns_with_its_object_however_that_is_hidden(found, renderer):
    turned = {key: error for key, error in found.items() if key.startswith(f"axes {renderer}")}
    assert len(turned) == 10
    for way, (of_wagon, of_bricks) in turned.items():
        assert abs(of_wagon) < 1e-4, way
        assert np.isnan(of_bricks) or abs(of_bricks) < 1e-4, way  # none: they are not in the picture either
    # A viewport leaves out instances of what is hidden from it; a final render shows them where an animation hides that.
    gone = np.isnan(turned[f"axes {renderer} hidden by an animation"])
    assert gone.tolist() == [False, renderer == "SOLID" and bool(found["draws off-screen"])]


def test_a_property_of_an_empty_or_a_collection_is_that_of_what_it_stands_for(found):
    rows = dict(row.split(":") for row in found["by property"].tolist())
    assert rows == {"body": "car", "wheel0": "car", "wheel1": "car", "hub": "car", "tree": "pines"}


def test_collections_that_disagree_are_an_error_that_names_them(found):
    message = str(found["disagreement"])
    assert all(name in message for name in ("'tree'", "'inner'", "'other'"))


@pytest.mark.parametrize("what", ["no surface", "no surface in a collection", "a light"])
def test_what_has_no_surface_and_stands_for_none_is_an_error(found, what):
    assert "no surface" in str(found[what])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("two names", ("'body'", "'x'", "'y'")),
        ("two categories", ("'forest'", "'x'", "'y'")),
        ("an empty group", ("'x'", "empty")),
        ("an empty name", ("''", "name")),
        ("an empty category", ("''", "name")),
        ("a number", ("5", "bpy.data.objects")),
        ("metaballs", ("'ball'", "'ball.001'", "one surface")),
    ],
)
def test_what_makes_no_sense_is_an_error_that_names_it(found, what, said):
    assert all(part in str(found[f"wrong: {what}"]) for part in said)


def test_one_object_may_stand_for_a_list_and_an_empty_category_is_none(found):
    assert found["one object"].tolist() == ["tree:"]
    assert found["an empty property"].tolist() == ["tree:"]
    assert found["metaballs"].tolist() == ["ball:"]


def test_a_row_keeps_number_and_name_when_its_object_is_renamed_even_to_that_of_another(found):
    assert found["renamed"].tolist() == ["body", "hub"]
    np.testing.assert_allclose(found["renamed: sizes"], np.broadcast_to((1, 2, 4, 0.5), (3, 4)), atol=1e-4)


def test_what_is_nowhere_is_not_in_the_picture_and_a_camera_that_is_nowhere_an_error(found):
    np.testing.assert_allclose(found["nowhere"], [(4, 3, 1), (np.nan,) * 3], atol=1e-4)
    assert found["nowhere: keypoints"].tolist()[0] == 0
    assert found["nowhere: keypoints"].tolist()[1] > 0
    assert "'Camera'" in str(found["nowhere: camera"])


def test_meshes_are_followed_though_a_script_clears_the_handlers(found):
    np.testing.assert_allclose(found["handlers cleared"], np.broadcast_to([[2], [4], [4], [2]], (4, 3)), atol=1e-4)


def test_the_box_of_a_subdivided_mesh_is_that_of_its_vertices(found):
    np.testing.assert_allclose(found["rounded"], found["rounded: vertices"], atol=1e-6)
    np.testing.assert_allclose(found["rounded"], 1.679, atol=0.002)
    np.testing.assert_allclose(found["outwards"], found["outwards: vertices"], atol=1e-6)
    assert "has no box" in str(found["of an empty"])


def test_numbers_have_dtypes_that_torch_computes_with_or_those_that_were_asked_for(found):
    if "dtypes: too small" not in found:
        pytest.skip("this Blender draws nothing off-screen in background")
    chosen = {"int32, uint8, int64, int64", "uint8, int32, int64, int64", "uint16, uint16, int64, int64"}
    counts = [found[f"dtypes: {key}"] for key in chosen]
    assert counts[0][0] > 0
    assert all((count == counts[0]).all() for count in counts)
    assert found["dtypes: 256 categories"] == "int32"
    assert "256" in str(found["dtypes: too small"])
    assert "int32" in str(found["dtypes: too small"])


def test_no_other_pass_has_a_dtype_to_choose(found):
    assert "instance and category" in str(found["dtypes: of depth"])


def test_what_is_kept_across_files_has_the_meshes_of_the_file_that_is_open(found):
    sizes = found["across files"]
    assert sizes.shape == (12, 8, 3)
    np.testing.assert_allclose(sizes[0::2], 2, atol=1e-4)
    np.testing.assert_allclose(sizes[1::2], np.broadcast_to((1, 1, 0.5), (6, 8, 3)), atol=1e-4)
    assert found["across files: numbers"].tolist() == list(range(1, 9))


def test_what_was_asked_for_is_found_again_by_name(found):
    rows = found["across files: by name"]
    np.testing.assert_allclose(rows[0::2], np.broadcast_to((2, 2, 2, 2), (6, 4)), atol=1e-4)
    np.testing.assert_allclose(rows[1::2], np.broadcast_to((1, 1, 0.5, 2), (6, 4)), atol=1e-4)


def test_a_file_that_has_nothing_of_that_name_is_an_error_that_says_so(found):
    assert "'Thing2'" in str(found["across files: gone"])
    assert "anew" in str(found["across files: gone"])
    assert found["across files: nothing there"].size == 0


def test_a_camera_is_found_again_by_the_name_that_it_had_last(found):
    assert str(found["a camera that was renamed"]) == "Another"
    assert "'Another'" in str(found["a camera that is not there"])


def test_undo_is_followed(found):
    np.testing.assert_allclose(found["undo: larger"], 4, atol=1e-4)
    np.testing.assert_allclose(found["undo: undone"], 2, atol=1e-4)
    assert found["undo: counted"]


def test_a_library_that_is_reloaded_is_followed(found):
    np.testing.assert_allclose(found["reloaded"], np.broadcast_to((1, 1, 0.5), (3, 3)), atol=1e-4)
