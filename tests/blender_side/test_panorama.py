"""Labels of panoramic cameras are what Cycles renders; of models that are not known here there are none."""

import numpy as np
import pytest

from .conftest import IN_EACH_BLENDER

pytestmark = [pytest.mark.timeout(300), IN_EACH_BLENDER]

SHOTS = ["equirectangular", "part of it", "fisheye", "wide fisheye"]
MODELS = ["MIRRORBALL", "FISHEYE_EQUISOLID", "FISHEYE_LENS_POLYNOMIAL"]
#: What is wholly in the image, and nearer than the clip range ends.
WHOLE = {
    "equirectangular": ["front", "right", "behind", "above", "left"],
    "part of it": ["front", "right"],
    "fisheye": ["front", "left"],
    "wide fisheye": ["front", "right", "above", "left"],
}


@pytest.fixture(scope="module")
def seen(saved_by):
    return saved_by("panoramas.py")


@pytest.fixture
def drawn(seen):
    if not seen["draws"]:
        pytest.skip("this Blender draws nothing off-screen")
    return seen


def mask(seen, shot):
    """With the numbers that Cycles has."""
    numbers = np.zeros(seen[f"{shot} instance_ids"].max() + 1, int)
    numbers[seen[f"{shot} instance_ids"]] = seen["indices"]
    return numbers[seen[f"{shot} instance"]]


def agreeing(seen, shot):
    return (mask(seen, shot) == seen[f"{shot} cycles index"]) & np.isfinite(seen[f"{shot} depth"])


def box_of(shown):
    y, x = np.nonzero(shown)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def test_all_shots_were_taken(seen):
    assert list(seen["shots"]) == SHOTS


@pytest.mark.parametrize("shot", SHOTS)
def test_masks_are_those_of_cycles_but_for_an_eighth_of_a_pixel_at_outlines(drawn, shot):
    cycles = drawn[f"{shot} cycles index"]
    wrong = mask(drawn, shot) != cycles
    assert wrong.mean() < 0.004
    around = np.pad(cycles, 1, mode="edge")
    rows, columns = cycles.shape
    neighbours = [around[1 + i : 1 + i + rows, 1 + j : 1 + j + columns] for i in (-1, 0, 1) for j in (-1, 0, 1)]
    at_outline = np.any([one != cycles for one in neighbours], axis=0)
    assert (at_outline | ~wrong).all()


@pytest.mark.parametrize("shot", SHOTS)
def test_depths_are_those_of_cycles(drawn, shot):
    np.testing.assert_array_equal(drawn[f"{shot} depth"], drawn[f"{shot} distance"])
    same = agreeing(drawn, shot)
    error = np.abs(drawn[f"{shot} depth"] - drawn[f"{shot} cycles depth"])[same]
    assert same.sum() > 2000
    assert np.median(error) < 3e-4
    assert np.percentile(error, 98) < 3e-3
    assert not np.isfinite(drawn[f"{shot} depth"][mask(drawn, shot) == 0]).any()


@pytest.mark.parametrize("shot", SHOTS)
def test_normals_are_those_of_cycles(drawn, shot):
    expected = drawn[f"{shot} cycles normal"] @ drawn[f"{shot} view"][:3, :3].T
    cosine = (expected * drawn[f"{shot} normals"]).sum(axis=-1)[agreeing(drawn, shot)]
    degrees = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    assert np.median(degrees) < 0.1
    assert np.percentile(degrees, 98) < 2


@pytest.mark.parametrize("shot", SHOTS)
def test_tight_boxes_are_those_of_what_cycles_shows(drawn, shot):
    for name, number, box in zip(drawn["names"], drawn["indices"], drawn[f"{shot} boxes_2d"], strict=True):
        shown = drawn[f"{shot} cycles index"] == number
        if shown.any():
            np.testing.assert_allclose(box, box_of(shown), atol=1, err_msg=name)
        else:
            assert np.isnan(box).all(), name


@pytest.mark.parametrize("shot", SHOTS)
def test_full_boxes_are_those_of_things_that_are_rendered_alone(seen, shot):
    for name in WHOLE[shot]:
        box = seen[f"{shot} boxes_2d_full"][list(seen["names"]).index(name)]
        np.testing.assert_allclose(box, box_of(seen[f"{shot} alone {name}"]), atol=1.1, err_msg=name)


def test_what_lies_across_the_edge_where_the_image_meets_itself_takes_all_of_its_width(seen):
    box = seen["equirectangular boxes_2d_full"][list(seen["names"]).index("behind")]
    np.testing.assert_allclose(box[[0, 2]], [0, 128], atol=1e-4)


@pytest.mark.parametrize("shot", SHOTS)
def test_points_are_projected_to_where_cycles_shows_them(seen, shot):
    inside = seen[f"{shot} in view"]
    np.testing.assert_array_equal(seen[f"{shot} keypoints"][:, 2] > 0, inside)
    np.testing.assert_allclose(seen[f"{shot} keypoints"][inside, :2], seen[f"{shot} centers"][inside], atol=1e-3)
    for name in WHOLE[shot]:
        if name in ("behind", "above"):
            continue  # its mean is not where its middle is
        number = list(seen["names"]).index(name)
        y, x = np.nonzero(seen[f"{shot} alone {name}"])
        np.testing.assert_allclose(
            seen[f"{shot} centers"][number], (x.mean() + 0.5, y.mean() + 0.5), atol=1, err_msg=name
        )


def test_the_inside_of_things_is_occluded_and_a_place_on_the_floor_is_not(seen):
    keypoints = seen["equirectangular keypoints"][:, 2]
    assert dict(zip(seen["names"], keypoints, strict=True)) == {
        **dict.fromkeys(seen["names"], 1),
        "floor": 2,
    }


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ("K", "no 3x3 matrix"),
        ("camera pass", "no 3x3 matrix"),
        ("workbench", "let Cycles render it"),
        ("eevee", "let Cycles render it"),
    ],
)
def test_what_a_panoramic_camera_does_not_have_is_an_error(seen, refusal, said):
    assert said in str(seen[f"refused {refusal}"])


def test_there_is_no_flow(drawn):
    assert "leave out flow_backward" in str(drawn["refused flow"])


def test_a_viewport_is_not_drawn_as_if_the_lens_were_another(seen):
    assert "Cycles" in str(seen["refused off-screen"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("label", ["points", "in view", "boxes_2d_full", "keypoints"])
def test_other_models_have_no_labels(seen, model, label):
    assert f"of the model {model}" in str(seen[f"refused {model} {label}"])


@pytest.mark.parametrize("model", MODELS)
def test_other_models_have_no_rasters(drawn, model):
    assert f"of the model {model}" in str(drawn[f"refused {model} depth"])


def test_other_models_have_pictures(seen):
    assert seen["picture of another model"].max() > 0
