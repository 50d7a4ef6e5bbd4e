"""From the world to pixels: what a camera sees, where."""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import bpy
import numpy as np
from mathutils import Matrix, Vector
from numpy.typing import ArrayLike, NDArray

from blendtorch_shm.errors import ConfigurationError

from . import utils

Origin = Literal["upper-left", "lower-left"]
Convention = Literal["opencv", "blender"]


def check_origin(origin: str) -> None:
    """Raise ConfigurationError for an origin that is not one of the two known."""
    if origin not in ("upper-left", "lower-left"):
        raise ConfigurationError(
            f"origin={origin!r}: it is 'upper-left' (as in OpenCV, NumPy and most files) or 'lower-left' (as in OpenGL)."
        )


class Camera:
    """A Blender camera and an image size, with the matrices that lead from the world to the image.

    The matrices are kept: `OffScreenRenderer` draws with them and the methods here project with them, so picture and
    labels always agree. After moving the camera call `update_view_matrix` (`look_at` does), after changing its lens
    `update_proj_matrix`.

    Conventions: camera coordinates have x to the right, y up, and look along -z. Normalised device coordinates (NDC) go
    from -1 to 1 in x (right), y (up) and z (near to far) over what the camera sees. Pixel coordinates are continuous:
    the image covers [0, width] x [0, height], and the middle of its first pixel is at (0.5, 0.5).

    Attributes:
        bpy_camera: the camera, a `bpy.types.Object`.
        shape: image height and width in pixels.
        view_matrix: 4x4, world to camera coordinates.
        proj_matrix: 4x4, camera coordinates to homogeneous NDC. Knows lens, sensor fit, shift, clipping and pixel
            aspect, in perspective and orthographic cameras.
    """

    def __init__(self, bpy_camera: Any = None, shape: tuple[int, int] | None = None) -> None:
        """Take a camera as it stands now.

        Args:
            bpy_camera: a camera object. None: the scene's camera.
            shape: image height and width in pixels. None: the scene's render size.

        Raises:
            ConfigurationError: the scene has no camera, or there would be no pixel in the image.
        """
        self.bpy_camera = _camera_or_scenes(bpy_camera)
        height, width = self.shape_from_bpy() if shape is None else shape
        self.shape = int(height), int(width)
        if min(self.shape) < 1:
            raise ConfigurationError(f"An image of shape {self.shape} (height, width) has no pixels.")
        self.view_matrix = self.view_from_bpy(self.bpy_camera)
        self.proj_matrix = self.proj_from_bpy(self.bpy_camera, self.shape)

    @property
    def type(self) -> str:
        """'PERSP', 'ORTHO' or 'PANO'."""
        return str(self.bpy_camera.data.type)

    @property
    def clip_range(self) -> tuple[float, float]:
        """Distance of the nearest and the farthest plane that are seen, in scene units."""
        return self.bpy_camera.data.clip_start, self.bpy_camera.data.clip_end

    @property
    def intrinsics(self) -> NDArray[np.float64]:
        """K: from OpenCV's camera coordinates (x to the right, y down, z forward, see `extrinsics`) to pixels.

        Perspective: ``K @ (x, y, z) = depth * (u, v, 1)``. Orthographic: nothing is divided by depth, and
        ``K @ (x, y, 1) = (u, v, 1)``, so K[0, 0] and K[1, 1] are pixels per scene unit. Lens, sensor fit, shift and pixel
        aspect are in it, as they were when `proj_matrix` was made.

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
        """World to camera coordinates, where the camera stood when `view_matrix` was made.

        Args:
            convention: of the camera coordinates. 'opencv': x to the right, y down, z forward. 'blender': x to the right,
                y up, looking along -z, as everywhere else in this class.

        Returns:
            (4, 4) float64; the last row is 0, 0, 0, 1.

        Raises:
            ConfigurationError: the convention is neither.
        """
        if convention not in ("opencv", "blender"):
            raise ConfigurationError(
                f"convention={convention!r}: it is 'opencv' (y down, z forward) or 'blender' (y up, looking along -z)."
            )
        view = np.array(self.view_matrix, np.float64)
        if convention == "opencv":
            view[1:3] *= -1
        return view

    def update_view_matrix(self) -> None:
        """Take over where the camera stands now."""
        self.view_matrix = self.view_from_bpy(self.bpy_camera)

    def update_proj_matrix(self) -> None:
        """Take over the camera's present lens, for an image of `shape`."""
        self.proj_matrix = self.proj_from_bpy(self.bpy_camera, self.shape)

    @staticmethod
    def shape_from_bpy(bpy_render: Any = None) -> tuple[int, int]:
        """Image height and width in pixels of render settings (`bpy.types.RenderSettings`), or of the scene's."""
        render = bpy_render or bpy.context.scene.render
        percentage = render.resolution_percentage
        return render.resolution_y * percentage // 100, render.resolution_x * percentage // 100

    @staticmethod
    def view_from_bpy(bpy_camera: Any = None) -> Matrix:
        """World to camera coordinates for a camera, or the scene's. What was changed about it up to now counts."""
        depsgraph = bpy.context.evaluated_depsgraph_get()
        return _camera_or_scenes(bpy_camera).evaluated_get(depsgraph).matrix_world.normalized().inverted()

    @staticmethod
    def proj_from_bpy(bpy_camera: Any = None, shape: tuple[int, int] | None = None) -> Matrix:
        """Camera coordinates to homogeneous NDC, for a camera and an image height and width; None: the scene's."""
        height, width = Camera.shape_from_bpy() if shape is None else shape
        render = bpy.context.scene.render
        return _camera_or_scenes(bpy_camera).calc_matrix_camera(
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
            viewing direction, in scene units. Of a point behind a perspective camera (depth below 0) the NDC mean
            nothing.
        """
        xyzw = utils.hom(np.asarray(xyz_world, np.float64))
        view = np.array(self.view_matrix, np.float64)
        in_camera = xyzw @ view.T
        ndc = cast("NDArray[np.float64]", utils.dehom(in_camera @ np.array(self.proj_matrix, np.float64).T))
        return (ndc, -in_camera[:, 2]) if return_depth else ndc

    def in_view(self, xyz_world: ArrayLike) -> NDArray[np.bool_]:
        """Whether points are within the image and the clip range. Occlusion is not considered.

        Args:
            xyz_world: (N, 3) array or a single point.

        Returns:
            (N,) array.
        """
        to_clip = np.array(self.proj_matrix, np.float64) @ np.array(self.view_matrix, np.float64)
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
        """Where the vertices of objects, as evaluated, are in the image. Occlusion is not considered.

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
        """Where the corners of the objects' own, oriented bounding boxes are in the image.

        Returns:
            (8 N, 2) array of pixel coordinates from the upper left; with `return_depth` also an (8 N,) array of depths.
        """
        return self._world_to_pixel(utils.bbox_world_coordinates(*objs), return_depth)

    def look_at(self, look_at: ArrayLike | None = None, look_from: ArrayLike | None = None) -> None:
        """Place the camera and turn it towards a point, upright (world z up in the image), and update `view_matrix`.

        Args:
            look_at: world coordinates of the image's centre. None: the world's origin.
            look_from: world coordinates of the camera. None: where it is.
        """
        bpy.context.view_layer.update()  # matrix_world lags behind location and rotation
        _, _, scale = self.bpy_camera.matrix_world.decompose()
        source = self.bpy_camera.matrix_world.translation.copy() if look_from is None else Vector(look_from)
        target = Vector((0.0, 0.0, 0.0)) if look_at is None else Vector(look_at)
        self.bpy_camera.matrix_world = Matrix.LocRotScale(source, (target - source).to_track_quat("-Z", "Y"), scale)
        self.update_view_matrix()

    def set_as_active_camera(self) -> None:
        """Make this the scene's camera, the one that Blender's own renders and new `Camera`s use."""
        bpy.context.scene.camera = self.bpy_camera

    def _world_to_pixel(
        self, xyz_world: NDArray[np.float64], return_depth: bool
    ) -> NDArray[np.float64] | tuple[NDArray[np.float64], NDArray[np.float64]]:
        ndc, depth = self.world_to_ndc(xyz_world, return_depth=True)
        return (self.ndc_to_pixel(ndc), depth) if return_depth else self.ndc_to_pixel(ndc)


def _camera_or_scenes(bpy_camera: Any) -> Any:
    camera = bpy_camera or bpy.context.scene.camera
    if camera is None:
        raise ConfigurationError("The scene has no camera: add one in Blender, or name one in Camera(bpy_camera=...).")
    return camera
