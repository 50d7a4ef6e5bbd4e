"""Compares what the product says of a scene with what Blender's final renders show."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import descriptions, reading
from .descriptions import Description
from .pixels import FINER, PALETTE
from .process import Blenders, Crashed, Failed

_RIM = 0.04
"""Of a silhouette's pixels, how many may differ: the oracle's sample is up to 0.01 pixels from the middle, so an edge that
passes nearer than that has either side."""

_THINNEST = 0.3
"""Pixels: what is thinner on the whole, as a plane seen from its edge, is missed by many samples."""


@dataclass
class Verdict:
    """What was found in one scene.

    Attributes:
        disagreements: by what disagrees, in words and numbers.
        refused: what the product said against the scene, or "".
        unsure: why the oracle itself cannot say what is right, or "".
        differing: pixels of masks that differ, all at silhouettes.
        rim: pixels at silhouettes.
    """

    disagreements: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    unsure: str = ""
    differing: int = 0
    rim: int = 0
    pixels: int = 0


def judge(blenders: Blenders, description: Description) -> Verdict:
    """Build the scene, ask F12 and the product, and compare."""
    verdict = Verdict()
    try:
        _judge(blenders, description, verdict)
    except Crashed as crash:
        verdict.disagreements["crash"] = str(crash)
    return verdict


def _judge(blenders: Blenders, description: Description, verdict: Verdict) -> None:
    path = str(blenders.folder / "f12")
    pictured, labelled = descriptions.twin_for_pictures(description), descriptions.twin_for_labels(description)
    right = blenders.oracle.call("right", pictured, labelled, descriptions.unhidden(labelled), path)
    light, colors = reading.light(f"{path}.exr", right["layer"]), reading.colors(f"{path}.png")
    expected = reading.rasters(f"{path}.rasters.exr", right["layer"])
    alone = {n: reading.coverage(f"{path}.{n}.exr", right["layer"]) for n in right["alone"]}
    shown = expected["number"] > 0
    _check_against_the_picture(description, light, right["numbers"], expected, verdict)
    places = expected["position"][shown].astype(np.float64)
    try:
        found = blenders.product.call("product", description, str(blenders.folder), places)
    except (Failed, Crashed) as error:
        what = f"exception {str(error).strip().splitlines()[-1][:60]}" if isinstance(error, Failed) else "crash"
        try:  # in a Blender that has seen nothing before
            found = blenders.product.call("product", description, str(blenders.folder), places)
        except (Failed, Crashed) as again:
            verdict.disagreements[what] = str(again)
            return
        verdict.disagreements[f"{what}, after another scene"] = f"{descriptions.plain(blenders.before)}, then: {error}"
    finally:
        blenders.before = description
    if "refused" in found:
        verdict.refused = found["refused"]
        return
    comparison = _Comparison(description, right["numbers"], expected, alone, right, found, verdict)
    comparison.projection()
    if "projection" not in verdict.disagreements:  # all else follows from that
        comparison.masks()
        comparison.instances()
        comparison.depths()
        comparison.normals()
        comparison.boxes()
        comparison.keypoints()
    comparison.again()
    if descriptions.is_final(description):
        comparison.final_picture(light, colors)
    else:
        comparison.viewport_picture(light, colors)


def _check_against_the_picture(
    description: Description,
    light: NDArray[np.float32],
    numbers: dict[str, int],
    expected: dict[str, NDArray[Any]],
    verdict: Verdict,
) -> None:
    """The picture decides what is seen. What Cycles' rasters say must be the same, where Cycles made the picture."""
    pictured = _by_color(light)
    differ = (pictured >= 0) & (pictured != expected["number"])
    is_an_edge = _is_near(pictured, expected["number"]) & _is_near(expected["number"], pictured)
    if any(obj["visibility"] == "in front" for obj in description["objects"]):  # which no raster of Cycles knows
        is_an_edge &= descriptions.engine(description) == "CYCLES"
    kinds = [obj["kind"] for obj in description["objects"]]
    uncounted = [i for i, kind in enumerate(kinds) if kind in descriptions.NOT_COUNTED]
    theirs = [numbers[f"object {i}"] for i in uncounted]
    if any(description["objects"][i]["visibility"] in descriptions.HOLES for i in uncounted):
        theirs.append(0)
    differ &= ~is_an_edge & ~np.isin(pictured, theirs)
    is_blurred = description["motion_blur"] and descriptions.engine(description) != "WORKBENCH"
    if is_blurred or "grease pencil" in kinds:  # one sample at another time; strokes have their own colours
        differ[:] = False
    if descriptions.engine(description) == "CYCLES" and differ.sum() > 2:
        row, column = np.argwhere(differ)[0]
        verdict.unsure = (
            f"{differ.sum()} px, e.g. picture {light[row, column]}, raster {expected['number'][row, column]}"
        )
    expected["raster"] = expected["number"]
    expected["number"] = np.where(differ, pictured, expected["number"])


def _by_color(light: NDArray[np.float32]) -> NDArray[np.int64]:
    """Numbers of what has a colour of the palette; 0: black or nothing; -1: another colour."""
    palette = np.array([(0, 0, 0), *PALETTE])
    distance = np.abs(light[..., None, :3] - palette).max(axis=-1)
    return np.where(distance.min(axis=-1) < 0.02, distance.argmin(axis=-1), -1)


def _rim(numbers: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels with another number beside them."""
    return np.any([one != numbers for one in _around(numbers)], axis=0)


def _cracks(numbers: NDArray[Any], right: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels where both neighbours in a row or a column are right: GPUs do not close edges that meet others half-way."""
    is_right = np.pad(numbers == right, 1)
    return np.asarray((is_right[:-2, 1:-1] & is_right[2:, 1:-1]) | (is_right[1:-1, :-2] & is_right[1:-1, 2:]))


def _is_near(numbers: NDArray[Any], others: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels whose number `others` has there, or beside them."""
    return np.any([one == numbers for one in _around(others)], axis=0)


def _around(numbers: NDArray[Any]) -> list[NDArray[Any]]:
    """The picture moved by a pixel in all ways, and not at all."""
    padded = np.pad(numbers, 1, mode="edge")
    height, width = numbers.shape
    return [padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]


class _Comparison:
    def __init__(
        self,
        description: Description,
        numbers: dict[str, int],
        expected: dict[str, NDArray[Any]],
        alone: dict[int, NDArray[np.float32]],
        poses: dict[str, Any],
        found: dict[str, Any],
        verdict: Verdict,
    ) -> None:
        self.description, self.numbers, self.expected, self.alone, self.poses = (
            description,
            numbers,
            expected,
            alone,
            poses,
        )
        self.found, self.disagreements, self.verdict = found, verdict.disagreements, verdict
        self.rim = _rim(expected["number"]) | _rim(expected["place"][..., 0]) | _rim(expected["place"][..., 1])
        self.objects = {0: 0}
        """The number of the object that each number of an instance belongs to."""
        for id_, name in zip(found["instance_ids"], found["instance_names"], strict=True):
            self.objects[int(id_)] = numbers.get(name.rsplit("/", 1)[-1].split("#")[0], -1)
        mask = np.asarray(found["instance"]).astype(np.int64)
        ids, places = np.unique(mask, return_inverse=True)
        self.mask = mask
        self.numbered = np.array([self.objects.get(int(i), -2) for i in ids])[places].reshape(mask.shape)
        self.agree = (self.numbered == expected["number"]) & (expected["raster"] == expected["number"]) & ~self.rim
        self.panoramic = description["camera"]["type"] not in ("PERSP", "ORTHO")

    def projection(self) -> None:
        """Cycles says which place of the world each pixel shows: it projects to that pixel."""
        rows, columns = np.nonzero(self.expected["raster"] > 0)
        if not len(rows):
            return
        away = np.abs(self.found["pixels"] - np.stack([columns + 0.5, rows + 0.5], axis=-1)).max(axis=-1)
        if not np.nanmedian(away) < 0.05 or not (away < 0.2).mean() > 0.98:
            self.disagreements["projection"] = (
                f"points seen at pixels' middles project {np.nanmedian(away):.2f} px away (median), {np.nanmax(away):.2f} at most"
            )
        elif (~self.found["in view"]).mean() > 0.05 and not self.panoramic:
            self.disagreements["in_view"] = (
                f"{(~self.found['in view']).sum()} of {len(rows)} places that are seen are not in view"
            )

    def masks(self) -> None:
        differ = self.numbered != self.expected["number"]
        near, far = self.description["camera"]["clip"]
        if far > 1e6 * near and descriptions.engine(self.description) != "CYCLES":
            differ &= self.numbered != self.expected["raster"]  # the picture does not know which of two is nearer
        at_edge = differ & (self.rim | _cracks(self.numbered, self.expected["number"]))
        inside = differ & ~at_edge
        on_rim = int(at_edge.sum())
        self.verdict.differing, self.verdict.rim, self.verdict.pixels = on_rim, int(self.rim.sum()), self.mask.size
        if inside.sum() > 1 or on_rim > 3 + _RIM * self.rim.sum():
            counts = {
                name: (int((self.numbered == n).sum()), int((self.expected["number"] == n).sum()))
                for name, n in self.numbers.items()
            }
            wrong = {name: pair for name, pair in counts.items() if pair[0] != pair[1]}
            self.disagreements["mask"] = (
                f"{inside.sum()} px inside, {on_rim} of {self.rim.sum()} at silhouettes; pixels (found, right) of {wrong}"
            )

    def instances(self) -> None:
        """Each number stands for one instance, and each instance for one number."""
        places = np.round(self.expected["place"] * 1000).astype(np.int64)
        seen = Counter(
            (int(i), tuple(place))
            for i, place in zip(self.mask[self.agree], places[self.agree].tolist(), strict=True)
            if i
        )
        pairs = {
            pair for pair, count in seen.items() if count > 3
        }  # where faces of two lie in one plane, chance decides
        if len(pairs) != len({i for i, _ in pairs}):
            self.disagreements["instances"] = f"one number for several instances: {sorted(pairs)[:6]}"
        by_object = {(self.objects[i], place) for i, place in pairs}
        if len(pairs) > len(by_object):
            self.disagreements["instances"] = f"several numbers for one instance: {sorted(pairs)[:6]}"

    def depths(self) -> None:
        """Depth and distance, by the places that Cycles saw, from where the camera is."""
        seen = self.agree & (self.expected["number"] > 0)
        if not seen.any():
            return
        to_camera = np.linalg.inv(_rigid(self.poses["camera"]))
        in_camera = self.expected["position"] @ to_camera[:3, :3].T + to_camera[:3, 3]
        right = {"depth": -in_camera[..., 2], "distance": np.linalg.norm(in_camera, axis=-1)}
        if self.description["camera"]["type"] == "ORTHO":
            right["distance"] = right["depth"]
        for name, values in right.items():
            slope = np.abs(np.stack(np.gradient(values))).max(axis=0)
            off = np.abs(self.found[name] - values) > 0.002 + 0.05 * slope
            off &= seen & (slope < 1)
            if off.sum() > 2 + 0.01 * seen.sum():
                row, column = np.argwhere(off)[0]
                self.disagreements[name] = (
                    f"{off.sum()} of {seen.sum()} px, e.g. {self.found[name][row, column]:.4f}, right {values[row, column]:.4f}"
                )
        nothing = self.agree & (self.expected["number"] == 0)
        for name in right:
            if np.isfinite(self.found[name][nothing]).any():
                self.disagreements[name] = "something where nothing is"

    def normals(self) -> None:
        seen = self.agree & (self.expected["number"] > 0)
        if not seen.any():
            return
        right = self.expected["normal"] @ _rigid(self.poses["camera"])[:3, :3]
        cosine = (right * self.found["normals"]).sum(axis=-1)
        off = seen & ~(cosine > 0.998)
        for row, column in np.argwhere(off):  # the other side of an edge that passes by the pixel's middle
            around = (
                right[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] @ self.found["normals"][row, column]
            )
            off[row, column] = not (around > 0.998).any()
        if off.sum() > 2 + 0.02 * seen.sum():
            row, column = np.argwhere(off)[0]
            self.disagreements["normals"] = (
                f"{off.sum()} of {seen.sum()} px, e.g. {self.found['normals'][row, column]}, right {right[row, column]}"
            )

    def boxes(self) -> None:
        for i, id_ in enumerate(self.found["instance_ids"]):
            name, number = self.found["instance_names"][i], self.objects[int(id_)]
            mine = self.mask == id_
            self._tight(name, self.found["boxes_2d"][i], mine)
            corners = self.found["boxes_3d"][i].astype(np.float64)
            seen = mine & self.agree
            if seen.any():
                to_camera = np.linalg.inv(_rigid(self.poses["camera"]))
                points = (self.expected["position"][seen] @ to_camera[:3, :3].T + to_camera[:3, 3]) * (1, -1, -1)
                axes = corners[[4, 3, 1]] - corners[0]
                lengths = np.linalg.norm(axes, axis=1)
                along = (points - corners[0]) @ (axes / np.maximum(lengths, 1e-9)[:, None]).T
                # the axes of an object that is sheared by its parent are not at right angles
                if _is_orthogonal(axes) and not ((along > -0.02) & (along < lengths + 0.02)).all():
                    self.disagreements["boxes_3d"] = (
                        f"{name}: what is seen of it is up to {max(-along.min(), (along - lengths).max()):.2f} outside"
                    )
            same = [j for j in self.found["instance_ids"] if self.objects[int(j)] == number]
            if number in self.alone and len(same) == 1:
                self._full(name, self.found["boxes_2d_full"][i], self.alone[number])

    def _tight(self, name: str, box: NDArray[np.float32], mine: NDArray[np.bool_]) -> None:
        rows, columns = np.nonzero(mine)
        right = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [np.nan] * 4
        if not np.array_equal(box, np.array(right, np.float32), equal_nan=True):
            self.disagreements["boxes_2d"] = f"{name}: {box}, right {right}"

    def _full(self, name: str, box: NDArray[np.float32], coverage: NDArray[np.float32]) -> None:
        rows, columns = np.nonzero(coverage)
        if not len(rows):
            return
        right = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / FINER
        outside = np.array([1, 1, -1, -1]) * (box - right)  # how far the box is inside of what is seen
        height, width = self.mask.shape
        whole = (box[:2] > 0).all() and box[2] < width and box[3] < height
        whole &= self.poses["lens"]["clip"][1] >= 100  # what is farther away than the clip range counts
        whole &= coverage.sum() / FINER > _THINNEST * np.ptp([rows, columns], axis=1).max()
        if not (outside < 1 / FINER + 0.02).all() or (whole and not (outside > -1).all()):
            self.disagreements["boxes_2d_full"] = f"{name}: {box.round(1)}, alone in the picture {right}"

    def keypoints(self) -> None:
        """Origins of objects, by a formula of its own."""
        if self.panoramic:
            return
        for name, keypoint in zip(self.found["keypoint_names"], self.found["keypoints"], strict=True):
            pixel, depth = project(
                self.poses["objects"][name][:3, 3], self.poses["camera"], self.poses["lens"], self.mask.shape
            )
            height, width = self.mask.shape
            near, far = self.poses["lens"]["clip"]
            margin = 0.5
            inside = (
                margin < pixel[0] < width - margin
                and margin < pixel[1] < height - margin
                and near * 1.01 < depth < far * 0.99
            )
            outside = not (
                -margin < pixel[0] < width + margin
                and -margin < pixel[1] < height + margin
                and near * 0.99 < depth < far * 1.01
            )
            if keypoint[2] and (outside or np.abs(keypoint[:2] - pixel).max() > 0.05):
                self.disagreements["keypoints"] = f"{name}: {keypoint}, right {np.round(pixel, 2)}, depth {depth:.2f}"
            elif not keypoint[2] and inside and self.alone.get(self.numbers[name], np.zeros(1)).any():
                self.disagreements["keypoints"] = (
                    f"{name}: {keypoint}, but it is at {np.round(pixel, 2)} in the picture"
                )

    def again(self) -> None:
        if not np.array_equal(self.found["again"], self.found["instance"]):
            self.disagreements["again"] = "the same frame has another mask the second time"

    def final_picture(self, light: NDArray[np.float32], colors: NDArray[np.uint8]) -> None:
        if not np.allclose(self.found["light"], light, atol=2e-3):
            off = np.abs(self.found["light"] - light).max(axis=-1)
            self.disagreements["light"] = f"{(off > 2e-3).sum()} px of float32 differ, by {off.max():.3f} at most"
        alpha = colors[..., 3:].astype(np.float64) / 255
        right = np.concatenate([colors[..., :3] * alpha, colors[..., 3:]], axis=-1)
        off = np.abs(self.found["picture"] - right).max(axis=-1)
        if (off > 1.5).any():
            row, column = np.argwhere(off > 1.5)[0]
            self.disagreements["picture"] = (
                f"{(off > 1.5).sum()} px differ, e.g. {self.found['picture'][row, column]}, right {right[row, column].round()}"
            )

    def viewport_picture(self, light: NDArray[np.float32], colors: NDArray[np.uint8]) -> None:
        is_smoothed = any(
            obj["kind"] == "grease pencil" for obj in self.description["objects"]
        )  # strokes are, alpha too
        if descriptions.engine(self.description) == "EEVEE":
            off = np.abs(self.found["picture"][..., :3].astype(int) - colors[..., :3].astype(int)).max(axis=-1)
            if np.median(off) > 1 or (off <= 3).mean() < 0.99:
                self.disagreements["picture"] = f"{(off > 3).sum()} px differ by more than 3, median {np.median(off)}"
        elif not is_smoothed:
            found = _by_color(np.round(self.found["picture"].astype(np.float32) / 255 * 4) / 4)
            right = _by_color(np.round(np.clip(light, 0, 1) * 4) / 4)
            differ = (found != right) & ~_rim(right)
            if differ.sum() > 2:
                row, column = np.argwhere(differ)[0]
                self.disagreements["picture"] = (
                    f"{differ.sum()} px show another, e.g. {self.found['picture'][row, column]}, right {light[row, column]}"
                )
        right_alpha = colors[..., 3]
        differ = (np.abs(self.found["picture"][..., 3].astype(int) - right_alpha) > 1) & ~self.rim
        if differ.sum() > 2 and not is_smoothed:
            row, column = np.argwhere(differ)[0]
            self.disagreements["alpha"] = (
                f"{differ.sum()} px, e.g. {self.found['picture'][row, column, 3]}, right {right_alpha[row, column]}"
            )


def project(
    point: NDArray[np.float64], camera: NDArray[np.float64], lens: dict[str, Any], shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], float]:
    """Where a point of the world is in the image, by the camera's data: x and y in pixels, and its depth.

    The sensor is as wide as the image is long (fit AUTO), wide or high; its height or width follows from the image's. Shift is in
    units of that length.
    """
    height, width = shape
    x, y, z = (np.linalg.inv(_rigid(camera)) @ (*point, 1))[:3]
    wide, high = width * lens["aspect"][0], height * lens["aspect"][1]
    horizontal = lens["fit"] == "HORIZONTAL" or (lens["fit"] == "AUTO" and wide >= high)
    length = wide if horizontal else high
    sensor = lens["sensor"][1] if lens["fit"] == "VERTICAL" else lens["sensor"][0]
    scale = length / lens["ortho_scale"] if lens["type"] == "ORTHO" else length * lens["lens"] / sensor / -z
    at = (
        np.array([x, -y]) * scale
        + np.array([wide / 2, high / 2])
        + np.array([-1, 1]) * np.array(lens["shift"]) * length
    )
    return at / lens["aspect"], -z


def _rigid(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """A camera has no scale of its own."""
    found = matrix.copy()
    found[:3, :3] /= np.linalg.norm(found[:3, :3], axis=0)
    return found


def _is_orthogonal(axes: NDArray[np.float64]) -> bool:
    products = np.abs(axes @ axes.T - np.diag((axes**2).sum(axis=1)))
    return bool(products.max() < 1e-4)
