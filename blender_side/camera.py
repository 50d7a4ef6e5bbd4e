"""From the world to pixels: what a camera sees, where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import Any, Literal, cast, overload

import bpy
import numpy as np
from mathutils import Matrix, Vector
from numpy.typing import ArrayLike, NDArray

from blendtorch_shm.errors import ConfigurationError

from . import poses, utils
from .lifetime import Reference
from .panorama import Panorama

Origin = Literal["upper-left", "lower-left"]
Convention = Literal["opencv", "blender"]

ROUNDING = 2.0**-22
"""Of a number: what some roundings in single precision change."""
_SEEN = 1e-4
"""Of a right angle, and of a distance: what may go unnoticed where a camera is put."""
_SEEN_IN_IMAGE = 2e-5
"""Of half an image: what may go unnoticed of a lens."""


def check_origin(origin: str) -> None:
    """Raise ConfigurationError for an origin that is not one of the two known."""
    if origin not in ("upper-left", "lower-left"):
        raise ConfigurationError(
            f"origin={origin!r}: it is 'upper-left' (as in OpenCV, NumPy and most files) or 'lower-left' (as in OpenGL)."
        )


class Camera:
    """A Blender camera and an image size, with the matrices that lead from the world to the image.

    A `Camera` follows its object: whatever draws, projects or labels with it uses the pose, lens and clip range that the camera
    has at that moment, and the scene's render size, unless a `shape` was given. Picture and labels agree as long as nothing moves
    between them.

    A matrix that a script sets (``camera.proj_matrix = ...``, or in place: ``camera.proj_matrix[0][2] += 0.1``) counts instead,
    until `update_view_matrix` or `update_proj_matrix` is called.

    After a file was opened, or undo, a `Camera` is the camera of the same name there. What the script has set still counts.

    Conventions: camera coordinates have x to the right, y up, and look along -z. Normalised device coordinates (NDC) go
    from -1 to 1 in x (right), y (up) and z (near to far) over what the camera sees. Pixel coordinates are continuous:
    the image covers [0, width] x [0, height], and the middle of its first pixel is at (0.5, 0.5).

    """

    def __init__(self, bpy_camera: Any = None, shape: tuple[int, int] | None = None) -> None:
        """Take a camera.

        Args:
            bpy_camera: a camera object. None: the camera that the scene has now.
            shape: image height and width in pixels. None: the scene's render size, whatever it is at each picture.

        Raises:
            ConfigurationError: the scene has no camera, or there would be no pixel in the image.
        """
        self._camera = Reference(_camera_or_scenes(bpy_camera))
        self._shape: tuple[int, int] | None = None
        self._view, self._projection = _Matrix(), _Matrix()
        if shape is not None:
            self.shape = shape

    @property
    def bpy_camera(self) -> Any:
        """The camera, a `bpy.types.Object`.

        Raises:
            ConfigurationError: it was deleted, or the file that is open now has none of its name.
        """
        found = self._camera.get()
        if found is None or found.type != "CAMERA":
            raise ConfigurationError(
                f"There is no camera {self._camera.name!r} any more, of which this Camera is: it was deleted, or another file was"
                " opened. Make a new Camera."
            )
        return found

    @bpy_camera.setter
    def bpy_camera(self, bpy_camera: Any) -> None:
        self._camera = Reference(bpy_camera)

    @property
    def shape(self) -> tuple[int, int]:
        """Image height and width in pixels: what was given or set, else the scene's render size."""
        return _checked(self.shape_from_bpy()) if self._shape is None else self._shape

    @shape.setter
    def shape(self, shape: tuple[int, int]) -> None:
        self._shape = _checked(shape)

    @property
    def view_matrix(self) -> Matrix:
        """4x4, world to camera coordinates: of where the camera stands now, or what the script has set."""
        return self._view.get(lambda: self.view_from_bpy(self.bpy_camera))

    @view_matrix.setter
    def view_matrix(self, matrix: Any) -> None:
        self._view.set(matrix)

    @property
    def proj_matrix(self) -> Matrix:
        """4x4, camera coordinates to homogeneous NDC: of the camera's lens, or what the script has set.

        Knows lens, sensor fit, shift, clipping and pixel aspect, in perspective and orthographic cameras.

        Raises:
            ConfigurationError: the camera is panoramic.
        """
        return self._projection.get(lambda: self.proj_from_bpy(self.bpy_camera, self.shape))

    @proj_matrix.setter
    def proj_matrix(self, matrix: Any) -> None:
        self._projection.set(matrix)

    @property
    def has_own_view(self) -> bool:
        """Whether the script has set `view_matrix`."""
        return self._view.is_set

    @property
    def has_own_projection(self) -> bool:
        """Whether the script has set `proj_matrix`."""
        return self._projection.is_set

    @property
    def type(self) -> str:
        """'PERSP', 'ORTHO' or 'PANO'. A `proj_matrix` that the script has set is one of the first two."""
        if self.has_own_projection:
            return "ORTHO" if self.proj_matrix[3][2] == 0 else "PERSP"
        return str(poses.evaluated(self.bpy_camera).data.type)

    @property
    def panorama(self) -> Panorama | None:
        """How a panoramic camera maps directions to the image; None: `proj_matrix` does.

        Raises:
            ConfigurationError: the camera is of a model that is not known here.
        """
        return None if self.has_own_projection else Panorama.of(poses.evaluated(self.bpy_camera).data)

    @property
    def clip_range(self) -> tuple[float, float]:
        """Distance of the nearest and the farthest plane that are seen, in scene units."""
        if self.has_own_projection:
            return _clip_range(self.proj_matrix)
        lens = poses.evaluated(self.bpy_camera).data
        return lens.clip_start, lens.clip_end

    @property
    def intrinsics(self) -> NDArray[np.float64]:
        """K: from OpenCV's camera coordinates (x to the right, y down, z forward, see `extrinsics`) to pixels.

        Perspective: ``K @ (x, y, z) = depth * (u, v, 1)``. Orthographic: nothing is divided by depth, and
        ``K @ (x, y, 1) = (u, v, 1)``, so K[0, 0] and K[1, 1] are pixels per scene unit. Lens, sensor fit, shift and pixel
        aspect are in it, or the `proj_matrix` that the script has set.

        u and v are this class's pixel coordinates: the middle of the first pixel is at (0.5, 0.5). Where it is to be
        (0, 0), as in functions that take pixel indices for coordinates, subtract 0.5 from K[0, 2] and K[1, 2].

        Returns:
            (3, 3) float64.

        Raises:
            ConfigurationError: the camera is panoramic.
        """
        if self.type not in ("PERSP", "ORTHO"):
            raise ConfigurationError(
                f"The camera {self.bpy_camera.name!r} is of type {self.type}, and no 3x3 matrix describes its projection:"
                " perspective and orthographic cameras have one."
            )
        height, width = self.shape
        ndc_to_pixel = np.array([[width / 2, 0, width / 2], [0, -height / 2, height / 2], [0, 0, 1]])
        to_ndc = np.array(self.proj_matrix, np.float64)[[0, 1, 3]]
        columns, signs = ([0, 1, 3], (1, -1, 1)) if self.type == "ORTHO" else ([0, 1, 2], (1, -1, -1))
        return ndc_to_pixel @ (to_ndc[:, columns] * signs)

    def extrinsics(self, convention: Convention = "opencv") -> NDArray[np.float64]:
        """World to camera coordinates, of where the camera stands now, or the `view_matrix` that the script has set.

        In double precision, unlike `view_matrix`: 100 km from the world's origin, that is wrong by some millimetres. Pictures,
        which Blender makes in single precision, may be off by so much there.

        Args:
            convention: of the camera coordinates. 'opencv': x to the right, y down, z forward. 'blender': x to the right,
                y up, looking along -z, as everywhere else in this class.

        Returns:
            (4, 4) float64; the last row is 0, 0, 0, 1.

        Raises:
            ConfigurationError: the convention is neither; or the camera's scale is 0, or where it stands is not a number.
        """
        if convention not in ("opencv", "blender"):
            raise ConfigurationError(
                f"convention={convention!r}: it is 'opencv' (y down, z forward) or 'blender' (y up, looking along -z)."
            )
        view = self._view.exact() if self.has_own_view else world_to_camera(poses.evaluated(self.bpy_camera))
        if convention == "opencv":
            view[1:3] *= -1
        return view

    def update_view_matrix(self) -> None:
        """Follow the camera's pose again, if the script has set `view_matrix`."""
        self._view = _Matrix()

    def update_proj_matrix(self) -> None:
        """Follow the camera's lens again, if the script has set `proj_matrix`."""
        self._projection = _Matrix()

    @staticmethod
    def shape_from_bpy(bpy_render: Any = None) -> tuple[int, int]:
        """Image height and width in pixels of render settings (`bpy.types.RenderSettings`), or of the scene's."""
        render = bpy_render or bpy.context.scene.render
        percentage = render.resolution_percentage
        return render.resolution_y * percentage // 100, render.resolution_x * percentage // 100

    @staticmethod
    def view_from_bpy(bpy_camera: Any = None) -> Matrix:
        """World to camera coordinates for a camera, or the scene's. What was changed about it up to now counts.

        Raises:
            ConfigurationError: the camera's scale is 0, or where it stands is not a number.
        """
        return Matrix(world_to_camera(poses.evaluated(_camera_or_scenes(bpy_camera))))

    @staticmethod
    def proj_from_bpy(bpy_camera: Any = None, shape: tuple[int, int] | None = None) -> Matrix:
        """Camera coordinates to homogeneous NDC, for a camera and an image height and width; None: the scene's.

        Raises:
            ConfigurationError: the camera is panoramic.
        """
        height, width = Camera.shape_from_bpy() if shape is None else shape
        render = bpy.context.scene.render
        evaluated = poses.evaluated(_camera_or_scenes(bpy_camera))
        if evaluated.data.type not in ("PERSP", "ORTHO"):
            raise ConfigurationError(
                f"The camera {evaluated.name!r} is of type {evaluated.data.type}, and no matrix describes its projection: only"
                " perspective and orthographic cameras have one. A viewport cannot draw what it sees: Cycles renders it,"
                " FinalRenderer(..., engine='CYCLES') for example."
            )
        return evaluated.calc_matrix_camera(
            bpy.context.evaluated_depsgraph_get(),
            x=width,
            y=height,
            scale_x=render.pixel_aspect_x,
            scale_y=render.pixel_aspect_y,
        )

    @overload
    def world_to_ndc(self, xyz_world: ArrayLike, return_depth: Literal[False] = ...) -> NDArray[np.float64]: ...
    @overload
    def world_to_ndc(
        self, xyz_world: ArrayLike, return_depth: Literal[True]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
    def world_to_ndc(
        self, xyz_world: ArrayLike, return_depth: bool = False
    ) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Project world coordinates.

        Args:
            xyz_world: (N, 3) array or a single point.
            return_depth: return depths too.

        Returns:
            (N, 3) array of NDC; with `return_depth` also an (N,) array of distances from the camera's plane along its
            viewing direction, in scene units, or from a panoramic camera itself, as in Cycles' depth pass. Of a point behind
            a perspective camera (depth below 0) the NDC mean nothing.

        Raises:
            ConfigurationError: the camera is of a model that is not known here, such as mirror ball.
        """
        xyzw = utils.hom(np.asarray(xyz_world, np.float64))
        in_camera = xyzw @ self.extrinsics("blender").T
        panorama = self.panorama
        if panorama is not None:
            distance = np.linalg.norm(in_camera[:, :3], axis=1)
            near, far = self.clip_range
            between = 2 * (distance - near) / (far - near) - 1
            ndc = np.column_stack([2 * panorama.place(in_camera[:, :3]) - 1, between])
            return (ndc, distance) if return_depth else ndc
        ndc = cast("NDArray[np.float64]", utils.dehom(in_camera @ np.array(self.proj_matrix, np.float64).T))
        return (ndc, -in_camera[:, 2]) if return_depth else ndc

    def in_view(self, xyz_world: ArrayLike) -> NDArray[np.bool_]:
        """Whether points are within the image and the clip range. Occlusion is not considered.

        Args:
            xyz_world: (N, 3) array or a single point.

        Returns:
            (N,) array.
        """
        panorama = self.panorama
        if panorama is not None:
            ndc = self.world_to_ndc(xyz_world)
            return np.asarray(panorama.shows((ndc[:, :2] + 1) / 2) & (np.abs(ndc[:, 2]) <= 1))
        to_clip = np.array(self.proj_matrix, np.float64) @ self.extrinsics("blender")
        clip = utils.hom(np.asarray(xyz_world, np.float64)) @ to_clip.T
        return np.asarray((np.abs(clip[:, :3]) <= clip[:, 3:]).all(axis=1))

    def ndc_to_pixel(self, ndc: ArrayLike, origin: Origin = "upper-left") -> NDArray[np.float64]:
        """Pixel coordinates of NDC.

        Args:
            ndc: (N, 2) or (N, 3) array; x and y are used.
            origin: the image's corner that is (0, 0); y grows away from it.

        Returns:
            (N, 2) array of x (from the left) and y in pixels.
        """
        check_origin(origin)
        height, width = self.shape
        xy = (np.atleast_2d(np.asarray(ndc, np.float64))[:, :2] + 1.0) / 2.0
        if origin == "upper-left":
            xy[:, 1] = 1.0 - xy[:, 1]
        return xy * (width, height)

    @overload
    def object_to_pixel(self, *objs: Any, return_depth: Literal[False] = ...) -> NDArray[np.float64]: ...
    @overload
    def object_to_pixel(
        self, *objs: Any, return_depth: Literal[True]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
    def object_to_pixel(
        self, *objs: Any, return_depth: bool = False
    ) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where the vertices of objects, as the viewport evaluates them, are in the image. Occlusion is not considered.

        Final renders may have other vertices, of modifiers with other levels there for example: GroundTruth(..., renderer=) has
        boxes and keypoints of what they show.

        Returns:
            (N, 2) array of pixel coordinates from the upper left; with `return_depth` also an (N,) array of depths,
            as in `world_to_ndc`.
        """
        return self._world_to_pixel(utils.world_coordinates(*objs), return_depth)

    @overload
    def bbox_object_to_pixel(self, *objs: Any, return_depth: Literal[False] = ...) -> NDArray[np.float64]: ...
    @overload
    def bbox_object_to_pixel(
        self, *objs: Any, return_depth: Literal[True]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
    def bbox_object_to_pixel(
        self, *objs: Any, return_depth: bool = False
    ) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where the corners of the objects' own, oriented bounding boxes are in the image, as the viewport evaluates them.

        Returns:
            (8 N, 2) array of pixel coordinates from the upper left; with `return_depth` also an (8 N,) array of depths.

        Raises:
            ConfigurationError: an object has no vertices, and so no box, such as an Empty or a lamp.
        """
        return self._world_to_pixel(utils.bbox_world_coordinates(*objs), return_depth)

    def look_at(self, look_at: ArrayLike | None = None, look_from: ArrayLike | None = None) -> None:
        """Place the camera and turn it towards a point, upright (world z up in the image). `view_matrix` follows it again.

        Args:
            look_at: world coordinates of the image's centre. None: the world's origin.
            look_from: world coordinates of the camera. None: where it is.

        Raises:
            ConfigurationError: the two are the same point, or not finite; the camera's scale is 0; or a constraint or a driver
                holds it elsewhere.
        """
        evaluated = poses.evaluated(self.bpy_camera)
        now = np.linalg.inv(world_to_camera(evaluated))
        source = _point("look_from", now[:3, 3] if look_from is None else look_from)
        target = _point("look_at", (0.0, 0.0, 0.0) if look_at is None else look_at)
        distance = float(np.linalg.norm(target - source))
        if distance == 0:
            raise ConfigurationError(
                f"look_at: the camera {self.bpy_camera.name!r} is to look at the point where it stands, {tuple(source.tolist())}."
            )
        turn = Vector((target - source) / distance).to_track_quat("-Z", "Y")
        wanted = Matrix.LocRotScale(Vector(source), turn, evaluated.matrix_world.to_scale())
        places = [source, *(np.array(obj.matrix_world.translation) for obj in _with_parents(evaluated))]
        self.bpy_camera.matrix_world = wanted
        self.update_view_matrix()
        left = np.abs(np.linalg.inv(self.extrinsics("blender")) - np.array(wanted.normalized(), np.float64))
        # As it is seen: parts of the distance, but for the rounding of the coordinates that the place is computed from.
        if not (
            (left[:3, :3] <= _SEEN).all()
            and (left[:3, 3] <= _SEEN * distance + 4 * ROUNDING * np.abs(places).max()).all()
        ):
            raise ConfigurationError(
                f"look_at: the camera {self.bpy_camera.name!r} does not stay where it was put, because {_holds(self.bpy_camera)}."
                " Mute or remove what holds it, or set camera.view_matrix."
            )

    def set_as_active_camera(self, scene: Any = None) -> None:
        """Make this the camera of `scene`, or of the current scene: the one that Blender's own renders and new `Camera`s use."""
        (scene or bpy.context.scene).camera = self.bpy_camera

    def _world_to_pixel(
        self, xyz_world: NDArray[np.float64], return_depth: bool
    ) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]:
        ndc, depth = self.world_to_ndc(xyz_world, return_depth=True)
        return (self.ndc_to_pixel(ndc), depth) if return_depth else self.ndc_to_pixel(ndc)


class _Matrix:
    """A matrix that follows Blender's until the script sets it, or changes the one that it got.

    Attributes:
        given: the matrix that the script got or set last.
    """

    def __init__(self) -> None:
        self.given: Matrix | None = None
        self._exact: NDArray[np.float64] | None = None  # what the script has set, before it was rounded
        self._read: Matrix | None = None  # what `given` was when it was read from Blender; None: the script has set it

    @property
    def is_set(self) -> bool:
        """Whether it is the script's."""
        return self.given is not None and self.given != self._read

    def get(self, read: Callable[[], Matrix]) -> Matrix:
        if not self.is_set:
            now = read()
            if self.given is None or now != self._read:
                self.given, self._read = now, now.copy()
        return self.given

    def set(self, matrix: Any) -> None:
        elements = np.array(matrix, np.float64)
        if elements.shape != (4, 4) or not np.isfinite(elements).all():
            raise ConfigurationError(f"A camera's matrix has 4 x 4 finite numbers, which this has not: {matrix!r}.")
        self.given, self._read, self._exact = Matrix(elements), None, elements

    def exact(self) -> NDArray[np.float64]:
        """What the script has set, as precisely as it has."""
        if self._exact is not None and self.given == Matrix(self._exact):
            return self._exact.copy()
        return np.array(self.given, np.float64)


def world_to_camera(evaluated: Any) -> NDArray[np.float64]:
    """World to camera coordinates, (4, 4), of an evaluated camera, whose scale does not count.

    In double precision: what rounds in single precision is the place where the camera stands, and not the product of that
    and its axes, which is what the inverse of a pose has in its last column.
    """
    pose = np.array(evaluated.matrix_world, np.float64)
    lengths = np.linalg.norm(pose[:3, :3], axis=0)
    if not (np.isfinite(pose).all() and (lengths > 0).all()):
        raise ConfigurationError(
            f"The camera {evaluated.name!r} shows nothing: its scale, or that of what it hangs on, is 0, or where it is is not a"
            f" number.\n{evaluated.matrix_world}"
        )
    pose[:3, :3] /= lengths
    return inverse(pose)


def inverse(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of a (4, 4) matrix to or from camera coordinates.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        return np.linalg.inv(matrix)
    except np.linalg.LinAlgError as error:
        raise ConfigurationError(f"A camera's axes lie in one plane, so it shows nothing.\n{matrix}") from error


def is_same_pose(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether two (4, 4) matrices to camera coordinates are equal but for the rounding, in single precision, of where it is."""
    a, b = inverse(one), inverse(other)
    difference, farthest = np.abs(a - b), max(np.abs(a[:3, 3]).max(), np.abs(b[:3, 3]).max())
    return bool((difference[:3, :3] <= 4 * ROUNDING).all() and (difference[:3, 3] <= ROUNDING * farthest).all())


def is_same_projection(one: Matrix, other: Matrix) -> bool:
    """Whether two projection matrices are equal but for rounding, as it is seen in the image, and where the clip range ends."""
    m, n = np.array(one, np.float64), np.array(other, np.float64)
    m, n = m / np.abs(m[3]).max(), n / np.abs(n[3]).max()
    difference = np.abs(m - n)[[0, 1, 3]]
    difference[:2, :2] /= np.abs(m[:2, :2]).max()  # how large things are in the image; little in a large scene
    ends, other_ends = 1 / np.array(_clip_range(one)), 1 / np.array(_clip_range(other))
    return bool(
        (difference <= _SEEN_IN_IMAGE).all() and np.allclose(ends, other_ends, rtol=1e-2, atol=ROUNDING * ends[0])
    )


def _clip_range(projection: Matrix) -> tuple[float, float]:
    """Distance of the planes whose NDC have z = -1 and z = 1."""
    (a, b), (c, d) = np.array(projection, np.float64)[2:, 2:]
    near, far = float((b + d) / (a + c)), float((b - d) / (a - c)) if a != c else inf
    return near, far if far > near else inf


def _holds(bpy_camera: Any) -> str:
    """What may hold a camera where it is."""
    constraints = [f"{c.name!r} ({c.type})" for c in bpy_camera.constraints if not c.mute and c.influence > 0]
    if constraints:
        return f"it has the constraint{'s' * (len(constraints) > 1)} {', '.join(constraints)}"
    return "a driver, a locked or a sheared parent places it"


def _with_parents(obj: Any) -> Iterator[Any]:
    while obj is not None:
        yield obj
        obj = obj.parent


def _point(name: str, xyz: ArrayLike) -> NDArray[np.float64]:
    """A point as Blender has it, in single precision."""
    try:
        point = np.array(xyz, np.float32).astype(np.float64)
    except (TypeError, ValueError):
        point = np.empty(0)
    if point.shape != (3,) or not np.isfinite(point).all():
        raise ConfigurationError(f"{name}={xyz!r}: it is a point, with three finite coordinates.")
    return point


def _checked(shape: tuple[int, int]) -> tuple[int, int]:
    height, width = shape
    if min(height, width) < 1:
        raise ConfigurationError(f"An image of shape {(int(height), int(width))} (height, width) has no pixels.")
    return int(height), int(width)


def _camera_or_scenes(bpy_camera: Any) -> Any:
    camera = bpy_camera or bpy.context.scene.camera
    if camera is None:
        raise ConfigurationError("The scene has no camera: add one in Blender, or name one in Camera(bpy_camera=...).")
    return camera
