"""What arrives at File Output nodes is what the arrays hold, in every form of Blender."""

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(300)

HEIGHT, WIDTH = 48, 64
BEYOND = 1e5  # deeper than anything in the scene: the background


@pytest.fixture(scope="module")
def slots(saved_by):
    return saved_by("compositor_slots.py")


def test_arrays_hold_what_the_engine_rendered_to_the_last_bit(slots):
    np.testing.assert_array_equal(slots["rgba"], slots["cycles Combined"])
    np.testing.assert_array_equal(slots["depth"], slots["cycles Depth"])
    np.testing.assert_array_equal(slots["normals"], slots["cycles Normal"])
    assert slots["rgba"][..., 3].min() == 0
    assert slots["rgba"][..., 3].max() == 1
    assert slots["normals"].min() < -0.5


def test_channels_come_in_the_order_of_their_letters(slots):
    np.testing.assert_array_equal(slots["bgr"], slots["cycles Combined"][..., [2, 1, 0]])


def test_nodes_on_the_way_count(slots):
    np.testing.assert_allclose(slots["inverted"], 1 - slots["cycles Combined"][..., :3], atol=1e-6)


def test_names_of_slots_may_hold_placeholders(slots):
    np.testing.assert_array_equal(slots["odd name"], slots["depth"])


def test_half_precision_is_that_of_the_node(slots):
    np.testing.assert_array_equal(slots["half rgba"], slots["cycles Combined"].astype(np.float16))
    near = slots["cycles Depth"] < BEYOND
    np.testing.assert_allclose(slots["half depth"][near], slots["cycles Depth"][near], rtol=2**-10)
    np.testing.assert_allclose(slots["half normals"], slots["cycles Normal"], atol=2**-11)


def test_arrays_are_float32_of_the_cameras_shape_in_the_order_asked_for(slots):
    shapes = {"rgba": 4, "bgr": 3, "depth": 1, "normals": 3, "inverted": 3, "odd name": 1}
    assert list(slots["keys"]) == [*shapes, "half rgba", "half depth", "half normals"]
    for key, channels in shapes.items():
        assert slots[key].shape == (HEIGHT, WIDTH, channels)
        assert slots[key].dtype == np.float32
    assert slots["contiguous"]


def test_a_slot_of_another_size_has_that(slots):
    np.testing.assert_array_equal(slots["of another size"], np.arange(200).reshape(10, 20, 1)[::-1])


def test_the_first_row_is_the_upper_one(slots):
    y, x = np.nonzero(slots["depth"][..., 0] < BEYOND)
    low, high = slots["corners"].min(0).clip(0), slots["corners"].max(0)
    np.testing.assert_allclose([x.min(), y.min()], low, atol=1)
    np.testing.assert_allclose([x.max() + 1, y.max() + 1], high, atol=1)
    assert high[1] < HEIGHT - 10  # so that upside down would be noticed


def test_arrays_are_those_that_the_publisher_lends(slots):
    assert slots["lent is returned"]
    np.testing.assert_array_equal(slots["lent"], slots["depth"])


def test_scene_and_nodes_are_afterwards_as_they_were(slots):
    assert slots["unchanged"]
    assert slots["images left"] <= 2  # the scene has its Render Result; in 4.5 there is a Viewer Node's, too


def test_files_exist_in_the_launchs_shared_memory_for_the_time_of_a_render_only(slots):
    assert slots["folder is the launch's"]
    assert list(slots["folders left"]) == []
    assert not slots["written to disk"]


def test_files_can_be_kept_where_the_node_says(slots):
    assert list(slots["kept"]) == [
        "Full_Depth_03_0007.exr",
        "Full_Normals_03_0007.exr",
        "Single_Inverted_03_0007.exr",
        "Single_a_b___03_0007.exr",
    ]
    np.testing.assert_array_equal(slots["kept depth"], slots["depth"])


def test_nodes_that_were_not_asked_for_write_their_own_files(slots):
    assert any("Image" in name for name in slots["written by others"])
    assert not any(name.startswith("blendtorch") for name in slots["written by others"])


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ("no node", "no File Output node 'label of Full'; it has 'Full', 'Single', 'Half', 'Wrong', 'Muted'"),
        ("no slot", "no slot 'Image.001'; it has 'Image', 'Depth', 'Normals'"),
        ("no channel", "has channels 'V' (it is of type VALUE), not 'RGB'"),
        ("no channels", "has channels 'V' (it is of type VALUE), not ''"),
        ("wrong format", "'Wrong' writes PNG"),
        ("muted", "'Muted' is muted"),
        ("no selection", "one at least"),
        ("same key", "['rgba', 'rgba']"),
        ("nothing written", "wrote nothing for slot 'Image' of 'Full'"),
        ("no memory", " MB of memory, for the compositor's files in"),
        ("no room", "0.15 MB of memory, for the compositor's files in /dev/shm, where 0.15 MB are free"),
        ("gone", "no File Output node 'Full'; it has 'Single'"),
        ("off", "does not use the compositor"),
    ],
)
def test_what_cannot_be_rendered_is_an_error_that_names_what_there_is(slots, refusal, said):
    assert said in str(slots[refusal])


def test_the_launcher_is_told_what_renders(slots):
    assert slots["renderer"].endswith("final renders (CYCLES) and compositor")
