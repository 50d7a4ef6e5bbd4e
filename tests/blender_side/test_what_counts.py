"""The table of what counts (docs/ground_truth.md), by the colours of pictures that each renderer makes."""

import numpy as np
import pytest

from .conftest import IN_EACH_BLENDER

pytestmark = pytest.mark.timeout(300)

HOLE, GONE, SEEN = "hole", "gone", "seen"
ENGINES = ["CYCLES", "WORKBENCH", "SOLID", "EEVEE"]
TABLE = {
    #   F12 of CYCLES and WORKBENCH; off-screen SOLID and EEVEE (RENDERED), which changed in 4.2
    "as it is": (SEEN, SEEN, SEEN, SEEN),
    "not visible to the camera": (GONE, SEEN, SEEN, GONE),
    "a holdout": (HOLE, SEEN, SEEN, HOLE),
    "a shadow catcher": (HOLE, SEEN, SEEN, SEEN),
    "in a holdout collection": (HOLE, SEEN, SEEN, HOLE),
    "in an indirect collection": (GONE, SEEN, SEEN, SEEN),
    "in an excluded collection": (GONE, GONE, GONE, GONE),
    "in a collection with its eye shut": (SEEN, SEEN, GONE, GONE),
    "in a collection hidden in viewports": (SEEN, SEEN, GONE, GONE),
    "in a collection hidden in renders": (GONE, GONE, SEEN, SEEN),
    "with its eye shut": (SEEN, SEEN, GONE, GONE),
    "hidden in viewports": (SEEN, SEEN, GONE, GONE),
    "hidden in renders": (GONE, GONE, SEEN, SEEN),
    "displayed as wire": (SEEN, SEEN, GONE, SEEN),
    "displayed as bounds": (SEEN, SEEN, GONE, SEEN),
    "in front, and far": (GONE, SEEN, SEEN, GONE),
    "only in the second layer": (GONE, GONE, SEEN, SEEN),
    "only in the first layer": (SEEN, SEEN, GONE, GONE),
    "only the window's layer is rendered": (GONE, GONE, GONE, GONE),
    "rounder in renders": (SEEN, SEEN, SEEN, SEEN),
    "simplified in renders": (SEEN, SEEN, SEEN, SEEN),
    "instanced": (SEEN, SEEN, SEEN, SEEN),
    "instanced, leaf not visible to the camera": (GONE, SEEN, SEEN, GONE),
    "instanced, host not visible to the camera": (GONE, SEEN, SEEN, SEEN),
    "instanced, leaf a holdout": (SEEN, SEEN, SEEN, HOLE),
    "instanced, host a holdout": (HOLE, SEEN, SEEN, SEEN),
    "instanced, host a holdout, in a holdout collection": (HOLE, SEEN, SEEN, HOLE),
    "instanced, leaf a shadow catcher": (HOLE, SEEN, SEEN, SEEN),
    "instanced, host a shadow catcher": (HOLE, SEEN, SEEN, SEEN),
    "instanced, host in an indirect collection": (GONE, SEEN, SEEN, SEEN),
    "instanced, leaf displayed as wire": (SEEN, SEEN, GONE, SEEN),
    "instanced, host displayed as wire": (SEEN, SEEN, GONE, SEEN),
    "instanced, leaf hidden in renders": (GONE, GONE, SEEN, SEEN),
    "instanced, leaf in front, and far": (GONE, SEEN, SEEN, GONE),
    "instanced by nodes": (SEEN, SEEN, SEEN, SEEN),
    "instanced by nodes, leaf hidden in viewports": (SEEN, SEEN, GONE, GONE),
    "instanced by nodes, leaf hidden in renders": (SEEN, SEEN, SEEN, SEEN),
    "instanced by nodes, leaf displayed as wire": (SEEN, SEEN, GONE, SEEN),
}
IN_EACH_WAY = pytest.mark.parametrize("way", TABLE)
BY_EACH = pytest.mark.parametrize("engine", ENGINES)
SMALLEST = {"rounder in renders": 30, "in front, and far": 9, "instanced, leaf in front, and far": 9}


@pytest.fixture(scope="module")
def shown(saved_by):
    return saved_by("what_counts.py")


@pytest.fixture
def found(shown, engine, way):
    if f"{engine} {way}: names" not in shown:
        pytest.skip(f"this Blender does not draw {engine} off-screen in background, or is older than this table")
    start = f"{engine} {way}: "
    return {key.removeprefix(start): array for key, array in shown.items() if key.startswith(start)}


def expected_of(way, engine):
    return TABLE[way][ENGINES.index(engine)]


@IN_EACH_WAY
@BY_EACH
@IN_EACH_BLENDER
def test_the_picture_shows_it_as_the_table_says(found, way, engine):
    expected = expected_of(way, engine)
    middle, green = found["picture"][20, 20], (found["picture"] == 2).sum()
    assert middle == {SEEN: 2, GONE: 1, HOLE: 0}[expected]
    assert green > SMALLEST.get(way, 50) if expected == SEEN else green == 0


@IN_EACH_WAY
@BY_EACH
@IN_EACH_BLENDER
def test_names_are_of_what_is_in_the_scene_of_the_picture(found, way, engine):
    name = "nodes/leaf#0" if "nodes" in way else "host/leaf#0" if "instanced" in way else "thing"
    is_covered = engine in ("CYCLES", "EEVEE") and "in front" in way  # behind the other one, and there
    assert set(found["names"].tolist()) == {"back"} | (
        {name} if expected_of(way, engine) == SEEN or is_covered else set()
    )


@pytest.mark.parametrize("way", [way for way in TABLE if "in front" not in way])
@BY_EACH
@IN_EACH_BLENDER
def test_keypoints_are_hidden_by_what_the_picture_shows_and_by_holes(found, way, engine):
    behind, on_it = found["keypoints"]
    expected = expected_of(way, engine)
    assert behind == (2 if expected == GONE else 1)
    if "instanced" not in way:
        assert on_it == (2 if expected == SEEN else 0)


@BY_EACH
@IN_EACH_BLENDER
def test_a_layer_without_surfaces_has_none_where_the_engine_says_so(shown, engine):
    if f"{engine} without surfaces: names" not in shown:
        pytest.skip(f"this Blender does not draw {engine} off-screen in background, or is older than this table")
    picture, names = (shown[f"{engine} without surfaces: {key}"] for key in ("picture", "names"))
    is_there = engine not in ("CYCLES", "EEVEE")
    assert (picture[..., :2].max() > 100) == is_there
    assert set(names.tolist()) == ({"back", "thing"} if is_there else set())


@pytest.mark.parametrize("kind", ["mesh", "font", "empty"])
@IN_EACH_BLENDER
def test_a_viewport_leaves_out_what_is_drawn_as_a_type_that_it_does_not_show(shown, kind):
    if f"without {kind}: names" not in shown:
        pytest.skip("this Blender draws nothing off-screen in background")
    names, mask, picture = (shown[f"without {kind}: {key}"] for key in ("names", "mask", "picture"))
    everything = {"thing", "text", "host/leaf#0"}  # the surface of a text is a mesh, and an Empty instances in any case
    assert set(names.tolist()) == (set() if kind == "mesh" else everything)
    assert abs((picture[..., 1] > 100).sum() - (mask > 0).sum()) <= 20
    assert set(shown[f"without {kind}: names in its style"].tolist()) == everything


@IN_EACH_BLENDER
def test_a_vertex_is_one_of_the_objects_own_mesh_not_of_what_it_instances(shown):
    assert shown["vertex: names"].tolist().count("thing") == 1
    assert "thing#0.0" in shown["vertex: names"].tolist()
    vertex, place = shown["vertex: keypoints"]
    np.testing.assert_allclose(vertex[:2], place[:2], atol=1e-3)


@IN_EACH_BLENDER
def test_instances_have_no_flow_where_there_are_more_or_fewer_of_them(shown):
    if "flow of 3: back" not in shown:
        pytest.skip("this Blender draws nothing off-screen in background")
    assert min(len(shown[f"flow of {count}: {what}"]) for count in (2, 3) for what in ("instances", "back")) > 5
    assert max(shown[f"flow of {count}: back"].max() for count in (2, 3)) < 1e-3
    assert shown["flow of 3: instances"].max() < 1e-3
    assert np.isnan(shown["flow of 2: instances"]).all()


@IN_EACH_WAY
@BY_EACH
@IN_EACH_BLENDER
def test_mask_and_depth_are_those_of_the_picture(found, way, engine):
    if "mask" not in found:
        pytest.skip("this Blender draws nothing off-screen in background")
    mask, picture, depth = found["mask"], found["picture"], found["depth"]
    windows = np.lib.stride_tricks.sliding_window_view(mask, (3, 3))
    inside = np.zeros(mask.shape, bool)
    inside[1:-1, 1:-1] = windows.min(axis=(2, 3)) == windows.max(axis=(2, 3))
    assert inside.mean() > 0.7
    np.testing.assert_array_equal(mask[inside], picture[inside])
    assert (mask != picture).sum() <= 20  # a sample is anywhere in its pixel
    flat = "rounder" not in way
    thing = 13.9 if "far" in way else 8.9
    for number, expected in enumerate((np.inf, 10.9, thing)):
        if number != 2 or flat:
            np.testing.assert_allclose(depth[(mask == number) & inside], expected, atol=1e-3)
