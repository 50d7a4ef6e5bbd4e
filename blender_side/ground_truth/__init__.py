"""What each pixel shows, and where things are, beside the picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import bpy
import numpy as np
from numpy.typing import DTypeLike, NDArray

from blendtorch_shm.errors import ConfigurationError

from .. import compat, evaluation
from ..camera import Camera
from ..final import Changes, look_through
from ..publisher import lend_array
from . import labels
from .draw import ATTACHMENTS, Rasterizer, View
from .scene import Drawn, SceneReader

__all__ = ["GroundTruth"]

Raster = Literal["depth", "distance", "normals", "instance", "category", "flow_backward", "flow_forward"]
Label = Literal["boxes_2d", "boxes_2d_full", "boxes_3d", "keypoints", "camera"]

_RASTERS: tuple[Raster, ...] = get_args(Raster)
_LABELS: tuple[Label, ...] = get_args(Label)
_NEED_RASTER = {*_RASTERS, "boxes_2d"}
_WITH_TABLE = {"instance", "category", "boxes_2d", "boxes_2d_full", "boxes_3d"}


class GroundTruth:
    """Makes labels for what a camera sees, of the frame as it is now.

    Typical use::

        truth = btb.GroundTruth(camera, ("depth", "instance", "boxes_2d"))
        ...
        publisher.publish(image=renderer.render(), **truth.render())

    All passes are drawn at once, in a few milliseconds, and read straight into the shared-memory slot that the next
    `DataPublisher.publish` will send. What the viewport shows counts: modifiers, instances, curves, text and metaballs, hidden
    objects left out. Surfaces are opaque and one sample is taken in the middle of each pixel, whatever the picture does.

    ``docs/ground_truth.md`` has the conventions, the figures, and what is not covered.
    """

    def __init__(
        self,
        camera: Camera | None,
        passes: Iterable[Raster | Label],
        *,
        objects: Iterable[Any] | None = None,
        categories: Mapping[str, Iterable[Any]] | None = None,
        keypoints: Mapping[str, Any] | None = None,
        renderer: evaluation.Renderer | None = None,
    ) -> None:
        """Choose what to make.

        Args:
            camera: what to look through, the one that pictures are made with. None: that of `renderer`, or the scene's.
            passes: names of what `render` returns.
            objects: what gets numbers and boxes (`bpy.types.Object`; of an instancer, all that it instances). The rest is drawn
                with number 0. None: everything.
            categories: names of categories, and the objects in each. None: the custom property "category" of objects.
            keypoints: names of points and where they are: an object (its origin), ``(object, vertex index)``,
                ``(object, (x, y, z))`` in the object's own coordinates or ``(armature, bone name)``.
            renderer: whose pictures the labels belong to (`OffScreenRenderer`, `FinalRenderer`, `CompositeRenderer`). What a
                final render shows differs from what the viewport does. None: that of pictures through `camera`, or else of
                any pictures made here; where they are made in several ways, `render` asks for this argument.

        Raises:
            ConfigurationError: a pass is unknown, an argument cannot be understood, or this Blender cannot draw off-screen and
                a pass needs it.
        """
        self.passes = tuple(dict.fromkeys(passes))
        unknown = [name for name in self.passes if name not in (*_RASTERS, *_LABELS)]
        if unknown or not self.passes:
            raise ConfigurationError(
                f"passes={self.passes!r}: choose from {', '.join((*_RASTERS, *_LABELS))}."
                + (f" There is no {unknown[0]!r}." if unknown else "")
            )
        if ("keypoints" in self.passes) != (keypoints is not None):
            raise ConfigurationError(
                "The pass 'keypoints' and the argument keypoints={name: where, ...} need each other."
            )
        needing = [name for name in self.passes if name in _NEED_RASTER]
        if needing and not compat.draws_off_screen():
            raise ConfigurationError(
                f"passes {', '.join(needing)}: Blender {bpy.app.version_string} draws nothing off-screen in background. 5.1 and"
                " later do; so does any version with a display (a virtual one such as Xvfb will do). Here there are"
                f" {', '.join(name for name in _LABELS if name not in _NEED_RASTER)}."
            )
        self.camera = camera or (renderer.camera if renderer else Camera())
        self._renderer = renderer
        self._reader = SceneReader(objects, categories)
        self._keypoints = None if keypoints is None else labels.Keypoints(keypoints)
        self._present, self._past = Rasterizer(), Rasterizer()
        self._before: tuple[list[Drawn], View] | None = None

    def render(self) -> dict[str, Any]:
        """Make all passes of the scene as it is now. Call it once per frame: flow is the way since the last call.

        Returns:
            for each pass its array, by name; H and W are `camera.shape`, the first row is the upper one. Pixel coordinates are
            those of `Camera`: the middle of the first pixel is at (0.5, 0.5).

            - ``depth``: (H, W) float32, scene units (metres) along the viewing direction; inf: nothing there.
            - ``distance``: (H, W) float32, scene units from the camera, for an orthographic one from its plane; inf as above.
            - ``normals``: (H, W, 3) float32 unit vectors in camera coordinates (x to the right, y up, z towards the viewer) of
              the shaded surface, turned to the viewer's side; 0: nothing there.
            - ``instance``: (H, W) uint16 numbers, from 65536 names on uint32; see `instance_ids`. 0: nothing.
            - ``category``: (H, W) uint16 indices into `category_names`. 0: nothing, or without a category.
            - ``flow_backward``: (H, W, 2) float32 pixels, x to the right, y down: where what this pixel shows was at the last
              call, minus where it is. NaN: nothing there, or it was not there then or has become another mesh.
            - ``flow_forward``: (H, W, 2) float32 pixels: for each pixel of the *last* call's frame, where what it showed is
              now, minus where it was. NaN likewise.
            - ``boxes_2d``: (N, 4) float32 left, top, right, bottom of the visible pixels; NaN: not visible.
            - ``boxes_2d_full``: likewise of the whole, hidden and outside parts included.
            - ``boxes_3d``: (N, 8, 3) float32 corners of oriented boxes in OpenCV's camera coordinates, in the order of
              `bpy.types.Object.bound_box`.
            - ``keypoints``: (M, 3) float32 x, y, and 2: visible, 1: occluded, 0: not in the image; with ``keypoint_names``.
            - ``camera``: a dict of ``K`` (3, 3), ``extrinsics`` (4, 4) from world to OpenCV's camera coordinates and
              ``extrinsics_blender`` (4, 4) to Blender's, float64.

            With masks or boxes also the table of names: ``instance_ids`` (N,) uint32 and ``instance_names`` (N), to which the
            rows of boxes belong, ``category_ids`` (N,) uint16 and ``category_names``, the latter by category number. A
            number belongs to a name for the life of this GroundTruth. Objects asked for by `objects` always have their row.

        Raises:
            ConfigurationError: a keypoint's vertex is not there any more, or the camera is panoramic and K was asked for.
        """
        view = View.of(self.camera)
        if self._before is not None and self._before[1].shape != view.shape:
            self.forget()
        drawn, points = self._read()
        rasters = self._rasters(drawn, view)
        self._before = drawn, view
        result: dict[str, Any] = {name: array for name, array in rasters.items() if name in self.passes}
        return result | self._labels(drawn, points, rasters)

    def forget(self) -> None:
        """Let flow begin anew, for example after a jump to another place of the animation. Numbers of objects stay."""
        self._before = None
        self._reader.forget()

    def _read(self) -> tuple[list[Drawn], labels.Points | None]:
        """What the picture shows, and where keypoints are, from the evaluation of the scene that the picture is made of."""
        shown = self._renderer.evaluation if self._renderer else evaluation.of_pictures_through(self.camera)

        def read(depsgraph: Any) -> tuple[list[Drawn], labels.Points | None]:
            drawn = self._reader.read(depsgraph, shown, normals="normals" in self.passes)
            if self._keypoints is None:
                return drawn, None
            return drawn, self._keypoints.locate(self.camera, drawn, self._reader.shown, depsgraph)

        with Changes() as changes:
            if shown.is_final:
                look_through(changes, self.camera)
            return shown.read(read, changes)

    def _rasters(self, drawn: list[Drawn], view: View) -> dict[str, NDArray[Any]]:
        """The passes that are drawn, and those that labels are made from."""
        arrays: dict[str, NDArray[Any]] = {}
        to_draw: dict[str, NDArray[Any]] = {}
        wanted = set(self.passes) & set(_RASTERS)
        if "boxes_2d" in self.passes:
            wanted.add("instance")
        if "keypoints" in self.passes and compat.draws_off_screen():
            wanted.add("depth")
        for name in sorted(wanted):
            attachment = _attachment(name, self._reader.highest_id)
            kind = ATTACHMENTS[attachment]
            arrays[name] = _array((*view.shape, *kind.components), kind.dtype, lent=name in self.passes)
            if name != "flow_forward":
                to_draw[attachment] = arrays[name]
        before, view_before = self._before or ([], None)
        if to_draw:
            self._present.draw(to_draw, drawn, view, [thing.previous for thing in drawn], view_before)
        if "flow_forward" in wanted:
            after = {thing.previous: thing for thing in drawn}
            flow = {"flow": arrays["flow_forward"]}
            self._past.draw(flow, before, view_before or view, [after.get(thing) for thing in before], view)
        return arrays

    def _labels(
        self, drawn: list[Drawn], points: labels.Points | None, rasters: Mapping[str, NDArray[Any]]
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if not _WITH_TABLE.isdisjoint(self.passes):
            rows = self._reader.rows(drawn)
            things = [row.drawn for row in rows]
            ids = np.array([row.id for row in rows], np.uint32)
            if "boxes_2d" in self.passes:
                result["boxes_2d"] = labels.tight_boxes(rasters["instance"], ids)
            if "boxes_2d_full" in self.passes:
                result["boxes_2d_full"] = labels.full_boxes(things, self.camera)
            if "boxes_3d" in self.passes:
                result["boxes_3d"] = labels.boxes_3d(things, self.camera)
            result["instance_ids"] = ids
            result["instance_names"] = [row.name for row in rows]
            result["category_ids"] = np.array([row.category for row in rows], np.uint16)
            result["category_names"] = list(self._reader.category_names)
        if self._keypoints is not None and points is not None:
            result["keypoints"] = labels.project(points, self.camera, rasters.get("depth"))
            result["keypoint_names"] = list(self._keypoints.names)
        if "camera" in self.passes:
            result["camera"] = {
                "K": self.camera.intrinsics,
                "extrinsics": self.camera.extrinsics("opencv"),
                "extrinsics_blender": self.camera.extrinsics("blender"),
            }
        return result


def _attachment(name: str, highest_id: int) -> str:
    """What a pass is drawn into."""
    if name in ("flow_backward", "flow_forward"):
        return "flow"
    return "instance of many" if name == "instance" and highest_id > np.iinfo(np.uint16).max else name


def _array(shape: tuple[int, ...], dtype: DTypeLike, *, lent: bool) -> NDArray[Any]:
    array = lend_array(shape, dtype) if lent else None
    return np.empty(shape, dtype) if array is None else array
