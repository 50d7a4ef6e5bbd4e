"""Ground truth against rays of our own, and against what pictures show."""

import ast
from typing import NamedTuple

import numpy as np
import pytest

from torch_side import BlenderLauncher, RemoteIterableDataset

from .conftest import CUBE_BLEND, IN_EACH_BLENDER, SCRIPTS

pytestmark = pytest.mark.timeout(300)

SHOTS = ["perspective", "shifted", "orthographic", "clipped"]
FRAMES = [f"{shot} {i}" for shot in SHOTS for i in range(3)]
SEQUELS = [(f"{shot} {i}", f"{shot} {i - 1}") for shot in SHOTS for i in (1, 2)]
SUBPIXEL = 1 / 200  # GPUs place corners of triangles on a grid of 1/256 pixel


class Seen(NamedTuple):
    """What rays see."""

    box: np.ndarray  # (H, W) index of the box, -1: none
    axis: np.ndarray  # (H, W) its face
    depth: np.ndarray
    distance: np.ndarray
    normal: np.ndarray  # camera coordinates, turned to the viewer
    local: np.ndarray  # (H, W, 4) on the box


class Frame:
    """One frame that Blender saved, and rays through it."""

    def __init__(self, saved, name):
        self.truth = {key.removeprefix(f"{name} "): saved[key] for key in saved if key.startswith(f"{name} ")}
        self.names = [str(box) for box in self.truth["boxes"]]
        self.matrices, self.view, self.projection = (self.truth[key] for key in ("matrices", "view", "projection"))
        self.shape = self.truth["depth"].shape
        self.seen = self.trace()
        corners = [(-SUBPIXEL, -SUBPIXEL), (SUBPIXEL, -SUBPIXEL), (-SUBPIXEL, SUBPIXEL), (SUBPIXEL, SUBPIXEL)]
        around = [self.trace(*corner) for corner in corners]
        #: where no edge passes so near to the middle of the pixel that rounding decides
        self.certain = np.all([(a.box == self.seen.box) & (a.axis == self.seen.axis) for a in around], axis=0)
        self.number = {
            str(name): i for name, i in zip(self.truth["instance_names"], self.truth["instance_ids"], strict=True)
        }

    def trace(self, dx=0.0, dy=0.0, only=None):
        """Cast a ray through each pixel, at the boxes one after the other."""
        height, width = self.shape
        y, x = np.mgrid[:height, :width] + 0.5
        ndc = np.stack([(x + dx) / width * 2 - 1, 1 - (y + dy) / height * 2], -1)
        to_world = np.linalg.inv(self.projection @ self.view)
        near, far = (self._dehom(np.concatenate([ndc, np.full_like(ndc, z)], -1), to_world) for z in (-1, 1))
        best = np.full(self.shape, np.inf)
        box, axis = np.full(self.shape, -1), np.full(self.shape, -1)
        normal, local = np.zeros((*self.shape, 3)), np.zeros((*self.shape, 4))
        for i, matrix in enumerate(self.matrices):
            if only not in (None, i):
                continue
            to_box = np.linalg.inv(matrix)
            start = near @ to_box.T
            way = (far - near) @ to_box.T
            with np.errstate(divide="ignore"):
                t = np.sort(
                    np.stack([(-1 - start[..., :3]) / way[..., :3], (1 - start[..., :3]) / way[..., :3]]), axis=0
                )
            t_in, t_out = t[0].max(-1), t[1].min(-1)
            inside = t_in < 0  # the clip range begins in the box: its inside is seen
            hit = np.where(inside, t_out, t_in)
            face = np.where(inside, t[1].argmin(-1), t[0].argmax(-1))
            nearer = (t_in <= t_out) & (hit >= 0) & (hit <= 1) & (hit < best)
            best[nearer], box[nearer], axis[nearer] = hit[nearer], i, face[nearer]
            local[nearer] = (start + hit[..., None] * way)[nearer]
            normals = np.linalg.inv((self.view @ matrix)[:3, :3])[face]  # rows of the inverse: columns of its transpose
            normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
            towards = np.sum(normals * ((far - near) @ self.view.T)[..., :3], -1, keepdims=True)
            normal[nearer] = np.where(towards > 0, -normals, normals)[nearer]
        in_camera = (near + np.where(box < 0, 0, best)[..., None] * (far - near)) @ self.view.T
        depth = np.where(box < 0, np.inf, -in_camera[..., 2])
        perspective = self.projection[3, 3] == 0
        distance = np.where(box < 0, np.inf, np.linalg.norm(in_camera[..., :3], axis=-1)) if perspective else depth
        return Seen(box, axis, depth, distance, normal, local)

    @staticmethod
    def _dehom(points, matrix):
        points = points.copy()
        points[..., 3] = 1
        points = points @ matrix.T
        return points / points[..., 3:]

    def to_pixels(self, world):
        clip = world @ (self.projection @ self.view).T
        ndc = clip[..., :2] / clip[..., 3:]
        return (ndc * (1, -1) + 1) / 2 * self.shape[::-1]

    def flow_to(self, other):
        """From the middle of each pixel, the way to where the same point of the box is in another frame."""
        y, x = np.mgrid[: self.shape[0], : self.shape[1]] + 0.5
        seen = self.seen.box >= 0
        world = np.einsum("nij,nj->ni", other.matrices[self.seen.box[seen]], self.seen.local[seen])
        flow = np.full((*self.shape, 2), np.nan)
        flow[seen] = other.to_pixels(world) - np.stack([x, y], -1)[seen]
        return flow


@pytest.fixture(scope="module")
def draws(blender):
    if blender.form == "module" and blender.version < (5, 1, 0):
        pytest.skip("this Blender draws nothing off-screen in background")


@pytest.fixture(scope="module")
def boxes(draws, saved_by):
    saved = saved_by("ground_truth_boxes.py")
    frames = {name: Frame(saved, name) for name in FRAMES}
    return frames | {"face": {key: saved[key] for key in saved if key.startswith("face ")}}


@pytest.fixture
def frame(boxes, request):
    return boxes[request.param]


@pytest.fixture(scope="module")
def scenes(saved_by):
    return saved_by("ground_truth_scenes.py")


each_frame = pytest.mark.parametrize("frame", FRAMES, indirect=True)


def drawing(test):
    """Run with a Blender that has a window, or is a module that draws without one."""
    return pytest.mark.usefixtures("draws")(IN_EACH_BLENDER(test))


@each_frame
@drawing
def test_each_pixel_has_the_number_of_the_box_that_a_ray_meets(frame):
    numbers = np.array([frame.number[name] for name in frame.names] + [0])
    assert frame.certain.mean() > 0.98
    np.testing.assert_array_equal(frame.truth["instance"][frame.certain], numbers[frame.seen.box][frame.certain])
    assert len(np.unique(frame.truth["instance"])) == 1 + len(frame.names)


@each_frame
@drawing
def test_depth_and_distance_are_right_within_a_millimetre(frame):
    for name, expected in [("depth", frame.seen.depth), ("distance", frame.seen.distance)]:
        assert frame.truth[name].dtype == np.float32
        np.testing.assert_allclose(frame.truth[name][frame.certain], expected[frame.certain], atol=1e-3)


@each_frame
@drawing
def test_normals_are_right_within_a_tenth_of_a_degree_and_face_the_viewer(frame):
    seen = frame.certain & (frame.seen.box >= 0)
    normals = frame.truth["normals"]
    np.testing.assert_allclose(np.linalg.norm(normals[seen], axis=-1), 1, atol=1e-5)
    sine = np.linalg.norm(np.cross(normals[seen], frame.seen.normal[seen]), axis=-1)
    assert np.degrees(np.arcsin(sine.clip(0, 1))).max() < 0.1
    assert (np.sum(normals[seen] * frame.seen.normal[seen], -1) > 0).all()
    assert (normals[frame.certain & (frame.seen.box < 0)] == 0).all()


@pytest.mark.parametrize(("name", "before"), SEQUELS)
@drawing
def test_flow_leads_to_the_same_point_of_the_surface(boxes, name, before):
    now, past = boxes[name], boxes[before]
    for key, frame, expected in [
        ("flow_backward", now, now.flow_to(past)),
        ("flow_forward", past, past.flow_to(now)),
    ]:
        flow = now.truth[key]
        assert np.nanmax(np.linalg.norm(expected, axis=-1)) > 3
        np.testing.assert_array_equal(np.isnan(flow[frame.certain]), np.isnan(expected[frame.certain]))
        error = np.linalg.norm(flow - expected, axis=-1)[frame.certain & (frame.seen.box >= 0)]
        assert error.max() < 0.1
        assert np.median(error) < 0.001


@pytest.mark.parametrize("shot", SHOTS)
@drawing
def test_the_first_frame_has_no_flow(boxes, shot):
    for key in ("flow_backward", "flow_forward"):
        assert np.isnan(boxes[f"{shot} 0"].truth[key]).all()


@pytest.mark.parametrize("frame", [name for name in FRAMES if "clipped" not in name], indirect=True)
@drawing
def test_the_box_of_a_mask_is_that_of_the_projected_corners(frame):
    corners = np.array([(x, y, z, 1) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    checked = 0
    for i, (name, matrix) in enumerate(zip(frame.names, frame.matrices, strict=True)):
        xy = frame.to_pixels(corners @ matrix.T)
        if (
            (xy < 0).any()
            or (xy > frame.shape[::-1]).any()
            or not np.array_equal(frame.trace(only=i).box == i, frame.seen.box == i)
        ):
            continue  # partly outside or hidden
        rows, columns = np.nonzero(frame.truth["instance"] == frame.number[name])
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, [*xy.min(0), *xy.max(0)], atol=1)
        np.testing.assert_array_equal(frame.truth["boxes_2d"][list(frame.truth["instance_names"]).index(name)], box)
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize(
    ("face", "depth"), [("4 m", 4), ("50 m", 50), ("500 m", 500), ("orthographic", 4), ("orthographic 50 m", 50)]
)
@drawing
def test_the_face_of_a_cube_is_where_it_is_known_to_be(boxes, face, depth):
    saved = {key.removeprefix(f"face {face} "): value for key, value in boxes["face"].items()}
    shown = np.isfinite(saved["depth"])
    assert 0.02 < shown.mean() < 0.9
    np.testing.assert_allclose(saved["depth"][shown], depth, atol=1e-3)
    np.testing.assert_allclose(saved["normals"][shown], np.broadcast_to((0, 0, 1), (shown.sum(), 3)), atol=1e-5)
    np.testing.assert_array_equal(np.isfinite(saved["distance"]), shown)
    assert (saved["distance"][shown] >= saved["depth"][shown]).all()
    assert ("orthographic" in face) == np.array_equal(saved["distance"], saved["depth"])


def outlines(mask):
    """Pixels that have a neighbour with another number."""
    padded = np.pad(mask, 1, mode="edge")
    height, width = mask.shape
    around = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.any([shifted != mask for shifted in around], axis=0)


class TestOneOfEach:
    """Modifiers, instances of collections, vertices, particles, curves, text, metaballs, mirrored, flat and hidden objects."""

    @drawing
    def test_the_mask_is_what_the_picture_shows(self, scenes, blender):
        mask, picture = scenes["one of each instance"], scenes["one of each solid"]
        colors = np.vstack([np.zeros(3), scenes["one of each colors"]])
        differs = (np.abs(colors[mask] - picture) > 1).any(-1)
        if blender.version < (5, 0, 0):  # 3.4 smooths outlines, whatever its preferences say
            differs &= ~outlines(mask)
        assert (mask > 0).mean() > 0.1
        assert not differs.any()

    @drawing
    def test_every_name_that_is_visible_is_in_the_mask(self, scenes):
        names = list(scenes["one of each instance_names"])
        assert len(names) == len(set(names))
        assert {
            "Monkey",
            "Mirrored",
            "Pipe",
            "Text",
            "Meta",
            "Group1/Inner ball#1",
            "On corners/Child#7",
            "Flat",
        } <= set(names)
        assert sum(name.startswith("Emitter/Inner#") for name in names) == 12
        assert not {"Hidden", "Eye shut", "In hidden collection", "In excluded collection"} & set(names)
        assert len(np.unique(scenes["one of each instance"])) > 25

    @drawing
    def test_objects_displayed_as_wire_count_where_the_picture_shades_them(self, scenes, blender):
        wires = {"As wire", "As bounds"}
        assert not wires & set(scenes["one of each instance_names"])
        assert (wires <= set(scenes["one of each names when rendered"])) == (blender.version >= (4, 2, 0))

    @drawing
    def test_local_view_hides_what_it_hides_from_the_picture(self, scenes):
        if "one of each names in local view" not in scenes:
            pytest.skip("only a window has a local view")
        assert list(scenes["one of each names in local view"]) == ["Cube"]
        mask = scenes["one of each instance in local view"]
        shown = scenes["one of each picture in local view"].max(-1) > 0
        np.testing.assert_array_equal((mask > 0)[~outlines(mask)], shown[~outlines(mask)])


@drawing
def test_normals_are_smooth_or_flat_as_the_surface_is_shaded(scenes):
    normals, depth, mask = (scenes[f"shaded {key}"] for key in ("normals", "depth", "instance"))
    height, width = depth.shape
    y, x = np.mgrid[:height, :width] + 0.5
    projection = scenes["shaded projection"]
    points = np.stack(
        [(x / width * 2 - 1) * depth / projection[0, 0], (1 - y / height * 2) * depth / projection[1, 1], -depth], -1
    )
    angles = []
    for number, center in zip(scenes["shaded ids"], scenes["shaded centers"], strict=True):
        radial = points[mask == number] - center
        radial /= np.linalg.norm(radial, axis=-1, keepdims=True)
        angles.append(np.degrees(np.arccos(np.sum(radial * normals[mask == number], -1).clip(-1, 1))))
    smooth, flat = scenes["shaded ids"]
    assert angles[0].max() < 1
    assert np.median(angles[1]) > 3
    assert len(np.unique(normals[mask == flat].round(4), axis=0)) < 80  # faces of an icosphere of two subdivisions
    assert len(np.unique(normals[mask == smooth].round(4), axis=0)) > 1000


@drawing
def test_numbers_belong_to_names_and_what_is_new_has_no_flow(scenes):
    seen = [(dict(table), new) for table, new in ast.literal_eval(str(scenes["numbers"]))]
    assert seen == [
        ({"A": 1, "B": 2}, ["A", "B"]),
        ({"A": 1, "B": 2, "C": 3}, ["C"]),
        ({"B": 2, "C": 3}, []),  # A was hidden
        ({"A": 1, "B": 2, "C": 3}, ["A"]),
        ({"A": 1, "B": 2, "Renamed": 4}, ["Renamed"]),
        ({"B": 2, "Renamed": 4}, []),  # A was deleted
        ({"A": 1, "B": 2, "Renamed": 4}, ["A"]),  # another object of that name
        ({"A": 1, "B": 2, "Renamed": 4}, ["B"]),  # B got another mesh
        ({"A": 1, "B": 2, "Renamed": 4}, []),
        ({"A": 1, "B": 2, "Renamed": 4}, ["A", "B", "Renamed"]),  # after forget()
    ]


@drawing
def test_several_cameras_and_changing_sizes_do_not_disturb_each_other(scenes):
    assert scenes["two at once"]
    assert scenes["resized"].tolist() == [40, 50, 40, 50, 2, 1]
    assert scenes["resized shows"] > 50
    assert scenes["resized back"]
    assert scenes["again"]


@drawing
def test_only_objects_asked_for_have_numbers_and_all_of_them_have_rows(scenes):
    names, ids = list(scenes["chosen instance_names"]), scenes["chosen instance_ids"]
    assert names == ["Blue", "Gone", "Red", "Pair/Left#0", "Pair/Right#1"]
    assert set(np.unique(scenes["chosen instance"])) == set(ids) - {ids[names.index("Gone")]} | {0}
    categories = scenes["chosen category_names"][scenes["chosen category_ids"]]
    assert dict(zip(names, categories, strict=True)) == {
        "Blue": "cold",
        "Gone": "",
        "Red": "warm",
        "Pair/Left#0": "pairs",
        "Pair/Right#1": "pairs",
    }
    for name, category in zip(names, scenes["chosen category_ids"], strict=True):
        shown = scenes["chosen instance"] == ids[names.index(name)]
        assert (scenes["chosen category"][shown] == category).all()
    assert np.isnan(scenes["chosen boxes_2d"][names.index("Gone")]).all()
    assert np.isfinite(np.delete(scenes["chosen boxes_2d"], names.index("Gone"), axis=0)).all()
    assert scenes["chosen boxes_3d"].shape == (5, 8, 3)
    assert list(scenes["deleted"]) == ["Doomed", "Red", "True"]


@drawing
def test_what_was_not_asked_for_still_hides_the_rest(scenes):
    (left, top), (right, bottom) = scenes["chosen wall"]
    rows, columns = slice(int(top + 1), int(bottom - 1)), slice(int(left + 1), int(right - 1))
    assert (scenes["chosen instance"][rows, columns] == 0).all()
    assert np.isfinite(scenes["chosen depth"][rows, columns]).all()
    assert (scenes["chosen all"][rows, columns] > 0).all()
    names = list(scenes["chosen instance_names"])
    box, full = (scenes[f"chosen {key}"][names.index("Blue")] for key in ("boxes_2d", "boxes_2d_full"))
    assert box[2] < full[2] - 2  # the wall covers its right side
    np.testing.assert_allclose(box[:2], full[:2], atol=1)


@drawing
def test_categories_can_be_given(scenes):
    assert list(scenes["given names"]) == ["", "b", "a", "c"]
    given = dict(zip(scenes["given instances"], scenes["given ids"], strict=True))
    assert given == {"Red": 2, "Blue": 1, "Wall": 1, "Pair/Left#0": 3, "Pair/Right#1": 3}
    assert set(np.unique(scenes["given category"])) == {0, 1, 2, 3}


@drawing
def test_more_things_than_16_bits_can_count_have_their_numbers(scenes):
    assert scenes["many dtype"] == "int32"
    assert scenes["many number"] == 257 * 257 + 1
    assert not scenes["many wrong"].size


def test_geometry_follows_whatever_is_done_to_it(scenes):
    assert not scenes["geometry"].size, scenes["geometry"]


def test_only_what_was_deformed_is_read_anew(scenes):
    assert list(scenes["read anew"]) == ["Waves"]


@drawing
def test_flow_follows_a_mesh_that_a_modifier_deforms(scenes):
    past, now = scenes["deforming past"], scenes["deforming now"]
    shown = scenes["deforming instance"] == scenes["deforming id"]
    assert not np.isnan(scenes["deforming flow_backward"][shown]).any()
    moved, checked = 0, 0
    for key, here, there in [("backward", now, past), ("forward", past, now)]:
        flow = scenes[f"deforming flow_{key}"]
        finite = np.isfinite(flow[..., 0])
        inside = finite & ~outlines(finite)
        for (x, y), way in zip(here - 0.5, there - here, strict=True):
            column, row = int(x), int(y)
            if not inside[row : row + 2, column : column + 2].all():
                continue
            x, y = x - column, y - row
            around = flow[row : row + 2, column : column + 2].reshape(4, 2)
            at_vertex = np.array([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y]) @ around
            np.testing.assert_allclose(at_vertex, way, atol=0.1)
            moved = max(moved, np.linalg.norm(way))
            checked += 1
    assert checked > 300
    assert moved > 2


def test_what_cannot_be_made_is_refused_with_a_reason(scenes):
    assert "'colour'" in str(scenes["unknown"])
    assert "no 'depht'. Did you mean 'depth'? There is no 'boxes'. Did you mean 'boxes_" in str(scenes["misspelt"])
    assert "passes=('depth',)" in str(scenes["one text"])
    assert "passes=('depth', 'normals')" in str(scenes["texts in one"])
    assert "flow_forward" in str(scenes["nothing"])
    assert "keypoints={" in str(scenes["points"])
    assert "bpy.data.objects" in str(scenes["no object"])


def test_without_off_screen_drawing_labels_remain_and_rasters_are_refused_with_the_remedy(scenes):
    if scenes["off_screen"]:
        assert str(scenes["raster"]) == ""
    else:
        assert "passes depth, boxes_2d" in str(scenes["raster"])
        assert "Xvfb" in str(scenes["raster"])
    assert {"boxes_2d_full", "boxes_3d", "camera", "keypoints", "instance_names"} <= set(scenes["labels"])
    assert scenes["labels shapes"].tolist() == [1, 4, 1, 8, 3, 1, 3]


def test_passes_are_drawn_into_the_slot_and_arrive(draws, blender):
    with BlenderLauncher(
        CUBE_BLEND, SCRIPTS / "ground_truth_values.py", named_sockets=["DATA"], blender=blender.argument, progress=False
    ) as launcher:
        dataset = RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=4, output="numpy")
        items = list(dataset)
    assert not any(items[0]["lent"])
    assert all(all(item["lent"]) for item in items[1:])
    for item in items:
        for name, expected in item["sums"].items():
            assert np.nan_to_num(item[name], posinf=0).sum(dtype=np.float64) == pytest.approx(expected)
        assert item["normals"].shape == (60, 80, 3)
        assert (item["instance"].dtype, item["category"].dtype) == (np.int32, np.uint8)
        assert item["instance_ids"].dtype == item["category_ids"].dtype == np.int64
        assert item["instance_names"] == ["Floor", "Cube"]
        assert item["category_names"] == ["", "cube"]
        assert item["boxes_2d"].shape == (2, 4)
        assert item["camera"]["K"].shape == (3, 3)
