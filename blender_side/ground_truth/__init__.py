"""What each pixel shows, and where things are, beside the picture."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import bpy
import numpy as np
from numpy.typing import DTypeLike, NDArray

from blendtorch_shm.errors import ConfigurationError

from .. import compat, evaluation, poses
from ..camera import Camera
from ..changes import Changes
from ..final_camera import look_through
from ..lifetime import generation
from ..publisher import allocate
from . import labels
from .draw import ATTACHMENTS, Rasterizer, View
from .looks import Look
from .scene import Drawn, SceneReader

__all__ = ["GroundTruth"]

Raster = Literal["depth", "distance", "normals", "instance", "category", "flow_backward", "flow_forward"]
Label = Literal["boxes_2d", "boxes_2d_full", "boxes_3d", "keypoints", "camera"]

_RASTERS: tuple[Raster, ...] = get_args(Raster)
_LABELS: tuple[Label, ...] = get_args(Label)
_NEED_RASTER = {*_RASTERS, "boxes_2d"}
_NUMBERS = ("instance", "category")
_NUMBER_DTYPES = tuple(map(np.dtype, ("uint8", "int16", "uint16", "int32", "uint32")))
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
        passes: Iterable[str],
        *,
        objects: Iterable[Any] | Mapping[str, Any] | None = None,
        categories: Mapping[str, Iterable[Any]] | None = None,
        keypoints: Mapping[str, Any] | None = None,
        renderer: evaluation.Renderer | None = None,
        dtypes: Mapping[Raster, DTypeLike] | None = None,
    ) -> None:
        """Choose what to make.

        Args:
            camera: what to look through, the one that pictures are made with. None: that of `renderer`, or the scene's.
            passes: names of what `render` returns: depth, distance, normals, instance, category, flow_backward, flow_forward,
                boxes_2d, boxes_2d_full, boxes_3d, keypoints, camera.
            objects: what gets numbers and boxes: objects and collections (`bpy.types.Object`, `bpy.types.Collection`). One
                without a surface, such as an Empty or an armature, stands for its children and theirs, a collection for what is
                in it, an instancer for all that it instances; each of these has its own number. By name, as in
                ``{"car": empty, "trees": [tree, forest]}``, all that stands under a name has one number. The rest is
                drawn with number 0. None: everything.
            categories: names of categories, and the objects and collections in each, which stand for others likewise. None: the
                custom property "category" of objects and collections.
            keypoints: names of points and where they are: an object (its origin), ``(object, vertex index)``,
                ``(object, (x, y, z))`` in the object's own coordinates or ``(armature, bone name)``.
            renderer: whose pictures the labels belong to (`OffScreenRenderer`, `FinalRenderer`, `CompositeRenderer`). What a
                final render shows differs from what the viewport does. None: that of pictures through `camera`, or else of
                any pictures made here; where they are made in several ways, `render` asks for this argument.
            dtypes: other dtypes for ``instance`` and ``category``: uint8, int16, uint16, int32 or uint32.

        Raises:
            ConfigurationError: a pass is unknown, an argument cannot be understood, an object has no surface and stands for
                none, or stands under two names, or this Blender cannot draw off-screen and a pass needs it.
        """
        compat.require_main_thread()
        self.passes = _checked_passes(passes)
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
        self._dtypes = _checked_dtypes(dtypes or {})
        self._reader = SceneReader(objects, categories)
        self._keypoints = None if keypoints is None else labels.Keypoints(keypoints)
        self._present, self._past = Rasterizer(), Rasterizer()
        self._before: tuple[list[Drawn], View] | None = None
        self._generation = generation()

    def render(self) -> dict[str, Any]:
        """Make all passes of the scene as it is now. Call it once per frame: flow is the way since the last call.

        Returns:
            for each pass its array, by name; H and W are `camera.shape`, the first row is the upper one. Pixel coordinates are
            those of `Camera`: the middle of the first pixel is at (0.5, 0.5).

            - ``depth``: (H, W) float32, scene units along the viewing direction, or from a panoramic camera itself, as in
              Cycles' depth pass; inf: nothing there. Times the scene's ``unit_settings.scale_length``, which is 1 at
              first, they are metres.
            - ``distance``: (H, W) float32, scene units from the camera, for an orthographic one from its plane; inf as above.
            - ``normals``: (H, W, 3) float32 unit vectors in camera coordinates (x to the right, y up, z towards the viewer) of
              the shaded surface, turned to the viewer's side; 0: nothing there.
            - ``instance``: (H, W) int32 numbers, see `instance_ids`. 0: nothing.
            - ``category``: (H, W) uint8 indices into `category_names`, int32 if there are more than 255. 0: nothing, or
              without a category.
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

            With masks or boxes also the table of names: ``instance_ids`` (N,) int64 and ``instance_names`` (N), to which the
            rows of boxes belong, ``category_ids`` (N,) int64 and ``category_names``, the latter by category number. A
            number belongs to a name for the life of this GroundTruth, in whatever file. What `objects` asks for always has its
            row.

        Raises:
            ConfigurationError: a keypoint's vertex is not there any more; the camera is nowhere (NaN), panoramic while K or flow
                was asked for, or of a model without labels; a number does not fit into its dtype; pictures are made in several
                ways and `renderer` was not given; or another file was opened and has nothing by the name of what was asked for.
        """
        compat.require_main_thread()
        view = View.of(self.camera)
        if not (np.isfinite(view.view).all() and np.isfinite(view.projection).all()):
            raise ConfigurationError(
                f"The camera {self.camera.bpy_camera.name!r} is nowhere: its matrices have numbers that are not finite."
                " Look at its location, rotation and lens, and at what it hangs on."
            )
        if self._before is not None and (self._before[1].shape != view.shape or self._generation != generation()):
            self.forget()
        self._generation = generation()
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
            return drawn, self._keypoints.locate(drawn, self._reader.shown, depsgraph)

        wanted = self._reader.wanted() + (self._keypoints.wanted() if self._keypoints else [])
        poses.include(one for one in wanted if shown.is_final or not one.obj.visible_get())
        with Changes() as changes:
            if shown.is_final:
                look_through(changes, self.camera)
            return shown.read(read, changes)

    def _rasters(self, drawn: list[Drawn], view: View) -> dict[str, NDArray[Any]]:
        """The passes that are drawn, and those that labels are made from."""
        arrays: dict[str, NDArray[Any]] = {}
        to_draw: dict[str, NDArray[Any]] = {}
        wanted: set[str] = {name for name in self.passes if name in _RASTERS}
        if "boxes_2d" in self.passes:
            wanted.add("instance")
        if view.panorama is not None and not wanted.isdisjoint(("flow_backward", "flow_forward")):
            raise ConfigurationError("There is no flow of panoramic cameras: leave out flow_backward and flow_forward.")
        if "keypoints" in self.passes and compat.draws_off_screen() and view.panorama is None:
            wanted.add(self._obstacles(drawn))
        for name in sorted(wanted):
            attachment, dtype = self._attachment(name)
            shape = (*view.shape, *ATTACHMENTS[attachment].components)
            arrays[name] = allocate(shape, dtype) if name in self.passes else np.empty(shape, dtype)
            if name != "flow_forward":
                to_draw[attachment] = arrays[name]
        before, view_before = self._before or ([], None)
        if wanted:
            evaluation.regain_gpu_context()
        if to_draw:
            self._present.draw(to_draw, drawn, view, [thing.previous for thing in drawn], view_before)
        if "flow_forward" in wanted:
            after = {thing.previous: thing for thing in drawn}
            flow = {"flow": arrays["flow_forward"]}
            self._past.draw(flow, before, view_before or view, [after.get(thing) for thing in before], view)
        return arrays

    def _attachment(self, name: str) -> tuple[str, np.dtype[Any]]:
        """What a pass is drawn into, and the dtype of its array."""
        if name not in _NUMBERS:
            name = "flow" if name in ("flow_backward", "flow_forward") else name
            return name, np.dtype(ATTACHMENTS[name].dtype)
        highest = self._reader.highest_id if name == "instance" else len(self._reader.category_names) - 1
        small = name == "category" and highest <= np.iinfo(np.uint8).max
        dtype = self._dtypes.get(name, np.dtype(np.uint8 if small else np.int32))
        if highest > np.iinfo(dtype).max:
            raise ConfigurationError(
                f"The pass {name!r} has numbers up to {highest}, and {dtype} holds {np.iinfo(dtype).max} at most: choose a larger"
                f" dtype, as in GroundTruth(..., dtypes={{{name!r}: 'int32'}})."
            )
        return f"{name} in {dtype.itemsize} bytes", dtype

    def _obstacles(self, drawn: list[Drawn]) -> str:
        """The raster that says what is before a keypoint. Holes are, and the depth raster has none there."""
        return "nearest" if any(thing.look is Look.AS_A_HOLE for thing in drawn) else "depth"

    def _labels(
        self, drawn: list[Drawn], points: labels.Points | None, rasters: Mapping[str, NDArray[Any]]
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if not _WITH_TABLE.isdisjoint(self.passes):
            rows = self._reader.rows(drawn)
            ids = np.array([row.id for row in rows], np.int64)
            if "boxes_2d" in self.passes:
                result["boxes_2d"] = labels.tight_boxes(rasters["instance"], ids)
            if "boxes_2d_full" in self.passes:
                result["boxes_2d_full"] = labels.full_boxes(rows, self.camera)
            if "boxes_3d" in self.passes:
                result["boxes_3d"] = labels.boxes_3d(rows, self.camera)
            result["instance_ids"] = ids
            result["instance_names"] = [row.name for row in rows]
            result["category_ids"] = np.array([row.category for row in rows], np.int64)
            result["category_names"] = list(self._reader.category_names)
        if self._keypoints is not None and points is not None:
            depth = None if self.camera.panorama else rasters.get(self._obstacles(drawn))
            result["keypoints"] = labels.project(points, self.camera, drawn, depth)
            result["keypoint_names"] = list(self._keypoints.names)
        if "camera" in self.passes:
            result["camera"] = {
                "K": self.camera.intrinsics,
                "extrinsics": self.camera.extrinsics("opencv"),
                "extrinsics_blender": self.camera.extrinsics("blender"),
            }
        return result


def _checked_passes(passes: Iterable[str]) -> tuple[str, ...]:
    """Their names, each once, in the order given."""
    known = (*_RASTERS, *_LABELS)
    names = tuple(dict.fromkeys(passes.replace(",", " ").split() if isinstance(passes, str) else passes))
    nearest = {name: difflib.get_close_matches(str(name), known, 1) for name in names}
    if isinstance(passes, str):
        meant = tuple(found[0] for found in nearest.values() if found) or ("depth",)
        raise ConfigurationError(f"passes={passes!r} is one text; it takes a list or tuple of names: passes={meant!r}.")
    problems = [
        f"There is no {name!r}." + (f" Did you mean {found[0]!r}?" if found else "")
        for name, found in nearest.items()
        if name not in known
    ]
    if problems or not names:
        raise ConfigurationError(" ".join([f"passes={names!r}: choose from {', '.join(known)}.", *problems]))
    return names


def _checked_dtypes(dtypes: Mapping[Raster, DTypeLike]) -> dict[str, np.dtype[Any]]:
    checked: dict[str, np.dtype[Any]] = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
    for name, dtype in checked.items():
        if name not in _NUMBERS or dtype not in _NUMBER_DTYPES:
            raise ConfigurationError(
                f"dtypes={dtypes!r}: for {' and '.join(_NUMBERS)} one of {', '.join(map(str, _NUMBER_DTYPES))} can be chosen;"
                " every other pass has one dtype."
            )
    return checked
