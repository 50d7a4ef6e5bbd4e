"""Pictures by final render (F12): by any engine, in every form of Blender, in display colours or as light.

What a render produced cannot be read from Python in background (the Render Result is empty, and there is no Viewer). So
Blender writes it as an uncompressed file of 32-bit floats that exists in memory only. Display colours are made of these: Blender
encodes them, by writing another such file of 8 bits a channel. docs/final_renders.md has the figures; next to most renders it is
nothing.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import bpy
import numpy as np
from mathutils import Matrix
from numpy.typing import DTypeLike, NDArray

from blendtorch_shm.errors import ConfigurationError, OutOfSharedMemory
from blendtorch_shm.launch.address import SHARED_MEMORY

from . import compat, evaluation, overrides
from .camera import Camera, Origin, check_origin, inverse, is_same_pose, is_same_projection, world_to_camera
from .evaluation import Evaluation
from .panorama import described
from .publisher import lend_array
from .utils import find_first_view3d

Mode = Literal["rgba", "rgb"]
ColorSpace = Literal["linear", "srgb"]
Shading = Literal["WIREFRAME", "SOLID", "MATERIAL", "RENDERED"]
Engine = Literal["CYCLES", "EEVEE", "WORKBENCH"]

_ENGINES = {"CYCLES": "CYCLES", "EEVEE": compat.EEVEE, "WORKBENCH": compat.WORKBENCH}
_TGA_HEADER_NBYTES = 18
_FARTHEST = 1e9
_AXES = 1e-4
"""What the length of a camera's axes may differ from 1."""
#: More than what comes before the pixels of an OpenEXR file.
_EXR_HEADER_NBYTES = 65536
#: Settings that a solid viewport and a Workbench render have in common.
# fmt: off
_SOLID_SETTINGS = (
    "light", "studio_light", "color_type", "single_color", "background_type", "background_color", "use_dof",
    "show_shadows", "show_cavity", "show_xray", "show_object_outline", "show_specular_highlight", "show_backface_culling",
)
# fmt: on


def check_picture(mode: str, origin: str, color_space: str) -> None:
    """Raise ConfigurationError where what a renderer was asked for is not known."""
    if mode not in ("rgba", "rgb"):
        raise ConfigurationError(f"mode={mode!r}: it is 'rgba' or 'rgb'.")
    check_origin(origin)
    if color_space not in ("linear", "srgb"):
        raise ConfigurationError(f"color_space={color_space!r}: it is 'linear' or 'srgb'.")


def describe(engine: str) -> str:
    """What the launcher and the log are told about final renders."""
    on = f" on {compat.gl_renderer()}" if engine in compat.GL_ENGINES and compat.draws_off_screen() else ""
    return f"Blender {bpy.app.version_string}, final renders ({engine}{on})"


class FinalRenderer:
    """Renders as F12 does: the scene's engine, samples, film and compositor; not its video sequencer, and no handlers of yours.

    Works in every form of Blender, with or without a GPU context. EEVEE and Workbench need OpenGL libraries. A picture that
    `OffScreenRenderer` can draw comes several times faster from there.
    """

    def __init__(
        self,
        camera: Camera | None = None,
        mode: Mode = "rgba",
        origin: Origin = "upper-left",
        *,
        color_space: ColorSpace = "linear",
        dtype: DTypeLike = np.uint8,
        engine: Engine | None = None,
    ) -> None:
        """Prepare to render.

        Args:
            camera: what to look through; its `shape` is the size of the pictures. None: the scene's camera.
            mode: 'rgba', or 'rgb' to leave out alpha. Colours are multiplied by alpha; a table in
                docs/final_renders.md says more.
            origin: the corner of the first pixel: 'upper-left' or 'lower-left'.
            color_space: 'linear' gives light intensities, 'srgb' what Blender shows on screen: the scene's view transform,
                encoded for display.
            dtype: uint8 (light above 1 is cut off), or float32 for scene-linear light without a limit.
            engine: 'CYCLES', 'EEVEE' or 'WORKBENCH', whatever this Blender calls it. None: the scene's, at each render.

        Raises:
            ConfigurationError: an argument is unknown, float32 was asked for in display colours, or the scene has no camera.
        """
        check_picture(mode, origin, color_space)
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.uint8, np.float32):
            raise ConfigurationError(f"dtype={dtype!r}: it is uint8 or float32.")
        if self.dtype == np.float32 and color_space == "srgb":
            raise ConfigurationError(
                "dtype=float32 has light, and no display colours: leave out color_space='srgb', or take uint8."
            )
        if engine is not None and engine not in _ENGINES:
            raise ConfigurationError(
                f"engine={engine!r}: it is one of {', '.join(_ENGINES)}, or None for the scene's own."
            )
        self.camera = camera or Camera()
        self.mode = mode
        self.origin = origin
        self.color_space = color_space
        self.engine = engine
        evaluation.register(self)

    @property
    def evaluation(self) -> Evaluation:
        """What its next picture shows."""
        engine = bpy.context.scene.render.engine if self.engine is None else _ENGINES[self.engine]
        return Evaluation(is_final=True, engine=str(engine))

    def render(self) -> NDArray[Any]:
        """Render the scene as it is now.

        Returns:
            (H, W, 4) or (H, W, 3), for `mode` 'rgba' or 'rgb', of `dtype`. Nothing overwrites it later.

        Raises:
            ConfigurationError: the engine cannot run here, or renders no pictures of this size (below 4 x 4).
            OutOfSharedMemory: there is no memory for the picture.
        """
        image = allocate((*self.camera.shape, len(self.mode)), self.dtype)
        evaluation.register(self)
        with Changes() as changes:
            look_through(changes, self.camera)
            if self.engine is not None:
                changes.set(bpy.context.scene.render, engine=_ENGINES[self.engine])
            compat.report(describe(bpy.context.scene.render.engine))
            light = _render_light(changes, self.camera.shape)
        put(image, light, flip=self.origin == "upper-left", display=self.color_space == "srgb")
        return image


class ViewportStandIn:
    """Final renders that look like the viewport, for `OffScreenRenderer` where Blender cannot draw that."""

    def __init__(self) -> None:
        self.shading: Shading = "RENDERED"

    def set_style(self, shading: Shading, overlays: bool) -> None:
        if overlays or shading == "WIREFRAME":
            raise ConfigurationError(
                f"shading={shading!r}, overlays={overlays}: a final render shows neither wireframes nor overlays, and"
                f" Blender {bpy.app.version_string} has nothing else in background, or with a display for a transparent film. 5.1"
                " and later have; for a film that is not transparent, any version has with a display (a virtual one such as"
                " Xvfb will do)."
            )
        self.shading = shading

    def describe(self) -> str:
        return f"{describe(self._engine())}, slower than off-screen drawing"

    def draw(self, image: NDArray[np.uint8], camera: Camera, *, flip: bool, display: bool) -> None:
        scene, render = bpy.context.scene, bpy.context.scene.render
        with Changes() as changes:
            look_through(changes, camera)
            changes.set(render, use_compositing=False, use_stamp=False, engine=self._engine())
            if self.shading == "SOLID":
                self._look_solid(changes)
            if render.engine == compat.EEVEE:
                changes.set(scene.eevee, taa_render_samples=max(scene.eevee.taa_samples, 1))
            light = _render_light(changes, camera.shape)
        put(image, light, flip=flip, display=display, plain=self.shading == "SOLID")

    def _look_solid(self, changes: Changes) -> None:
        scene, shown = bpy.context.scene, find_first_view3d()[1].shading
        changes.set(scene.display.shading, **{name: getattr(shown, name) for name in _SOLID_SETTINGS})
        changes.set(scene.display, render_aa="OFF")
        if shown.background_type != "WORLD":  # renders know the world's colour only
            world = bpy.data.worlds.new("blendtorch")
            changes.callback(bpy.data.worlds.remove, world)
            if shown.background_type == "VIEWPORT":
                world.color = shown.background_color
            else:
                theme = bpy.context.preferences.themes[0].view_3d.space.gradients.high_gradient
                world.color = theme.copy().from_srgb_to_scene_linear()  # without a copy, black in 3.4
            changes.set(scene, world=world)

    def _engine(self) -> str:
        return evaluation.of_viewport(self.shading).engine


class Changes(ExitStack):
    """What is changed about Blender's data for one render, and put back at the end of the ``with`` block."""

    def set(self, owner: Any, **values: Any) -> None:
        """Set attributes of `owner`, in the given order; they are put back in reverse order."""
        for name, value in values.items():
            before = getattr(owner, name)
            if isinstance(
                before, bpy.types.bpy_prop_array
            ):  # a view of what changes next; so are vectors and their like
                before = tuple(before)
            elif hasattr(before, "copy") and not isinstance(before, bpy.types.bpy_struct):
                before = before.copy()
            self.callback(setattr, owner, name, before)
            setattr(owner, name, value)

    def set_file_format(self, image_settings: Any, file_format: str, **values: Any) -> None:
        """Choose the format of still images and settings that depend on it, such as ``color_depth``."""
        self.callback(compat.set_file_format(image_settings, file_format, **values))


def look_through(changes: Changes, camera: Camera) -> None:
    """Make a render show what `camera` sees, in its size, and what the script set on animated properties.

    Blender's own camera makes the picture, so that its motion blur and rolling shutter are in it. Only a matrix that the script
    set needs a stand-in.

    Raises:
        ConfigurationError: a final render cannot have that projection, or Blender renders no picture of that size. At the end of
            `changes`: the picture was made from elsewhere.
    """
    scene, render = bpy.context.scene, bpy.context.scene.render
    height, width = camera.shape
    changes.enter_context(_agreeing(camera))
    changes.enter_context(overrides.kept())
    for marker in scene.timeline_markers:
        if marker.camera is not None:  # it would take over at its frame
            changes.set(scene, camera=scene.camera)  # which 5.2 changes with the marker
            changes.set(marker, camera=None)
    bpy_camera = camera.bpy_camera
    if camera.has_own_view:
        bpy_camera = _standing(changes, camera)
    if camera.has_own_projection:
        _project(changes, camera, bpy_camera)
    if scene.camera != bpy_camera:  # to set it, changed or not, costs Blender the building of its dependency graph anew
        changes.set(scene, camera=bpy_camera)
    changes.set(render, resolution_x=width, resolution_y=height, resolution_percentage=100, use_border=False)
    if (render.resolution_y, render.resolution_x) != (height, width):
        raise ConfigurationError(
            f"Blender renders no picture of {height} x {width} (height, width), the camera's shape: the nearest that it can is"
            f" {render.resolution_y} x {render.resolution_x}."
        )
    changes.set(render, use_multiview=False, use_sequencer=False)
    if render.use_single_layer:  # by which Blender means one layer in some renders, and another, or all, in others
        for layer in scene.view_layers:
            changes.set(layer, use=layer == bpy.context.view_layer)
        changes.set(render, use_single_layer=False)


def _standing(changes: Changes, camera: Camera) -> Any:
    """A camera with the same data that stands where the script has put it; sheared, if need be, as under a scaled parent."""
    name, data = camera.bpy_camera.name, camera.bpy_camera.data
    pose = inverse(camera.extrinsics("blender"))
    lengths = np.linalg.norm(pose[:3, :3], axis=0)
    if (np.abs(lengths - 1) > _AXES).any() or (np.abs(pose[3] - (0, 0, 0, 1)) > _AXES).any():
        raise ConfigurationError(
            "A final render cannot have this view_matrix: the camera's axes have length 1, what it sees is neither scaled nor"
            f" projected.\n{camera.view_matrix}"
        )
    foot, standing = bpy.data.objects.new(name, None), bpy.data.objects.new(name, data)
    changes.callback(bpy.data.batch_remove, (standing, foot))
    standing.parent, standing.matrix_parent_inverse = foot, Matrix(pose)
    return standing


def _project(changes: Changes, camera: Camera, bpy_camera: Any) -> None:
    """Give a camera data of its own, and the scene's pixels a shape, that make up the projection that the script set."""
    render = bpy.context.scene.render
    height, width = camera.shape
    is_orthographic = camera.type == "ORTHO"
    wanted = np.array(camera.proj_matrix, np.float64)
    wanted /= wanted[3, 3] if is_orthographic else -wanted[3, 2]
    a, b = wanted[0, 0], wanted[1, 1]
    near, far = camera.clip_range
    if not (a > 0 and b > 0 and 0 < near < far):
        raise _cannot_project(camera)
    lens = bpy_camera.data.copy()
    changes.callback(bpy.data.cameras.remove, lens)
    lens.animation_data_clear()
    aspect = a * width / (b * height)
    shift_x, shift_y = -wanted[:2, 3] / 2 if is_orthographic else wanted[:2, 2] / 2
    if is_orthographic:
        lens.ortho_scale = 2 / a
    else:
        sensor = lens.sensor_width
        if (
            lens.type == "PERSP"
        ):  # what it is across the picture; so the lens stays as it is where only the middle moves
            sensor = 2 * lens.lens / camera.proj_from_bpy(bpy_camera, camera.shape)[0][0]
        lens.sensor_width, lens.lens = sensor, a * sensor / 2
    lens.type, lens.sensor_fit = camera.type, "HORIZONTAL"
    lens.shift_x, lens.shift_y = shift_x, shift_y * aspect * height / width
    lens.clip_start, lens.clip_end = near, min(far, _FARTHEST)
    changes.set(bpy_camera, data=lens)
    changes.set(render, pixel_aspect_x=max(1.0, 1 / aspect), pixel_aspect_y=max(1.0, aspect))
    if not is_same_projection(camera.proj_from_bpy(bpy_camera, camera.shape), camera.proj_matrix):
        raise _cannot_project(camera)


def _cannot_project(camera: Camera) -> ConfigurationError:
    return ConfigurationError(
        "A final render cannot have this proj_matrix: a lens, a shift, a clip range and pixels of one shape do not make it up"
        f" (no skew, nothing mirrored, a clip range above 0).\n{camera.proj_matrix}"
    )


@contextmanager
def _agreeing(camera: Camera) -> Iterator[None]:
    """Look whether the renders within the context are made from where the camera is, and leave it there.

    Blender evaluates the frame anew for a render, and then once more for the viewport.
    """
    scene = bpy.context.scene
    frame = scene.frame_current_final
    height, width = camera.shape
    is_panoramic = camera.type not in ("PERSP", "ORTHO")
    view, projection = camera.extrinsics("blender"), None if is_panoramic else camera.proj_matrix.copy()
    clip_range = None if camera.has_own_projection else camera.clip_range
    lens = described(camera.bpy_camera.data)
    agree = []

    def look(of: Any, depsgraph: Any) -> None:
        if of == scene and depsgraph.mode == "RENDER" and scene.frame_current_final == frame:
            aspect = {"scale_x": scene.render.pixel_aspect_x, "scale_y": scene.render.pixel_aspect_y}
            eye = depsgraph.scene_eval.camera
            agree.append(is_same_pose(world_to_camera(eye), view))
            agree.append(clip_range in (None, (eye.data.clip_start, eye.data.clip_end)))
            if projection is None:
                agree.append(described(eye.data) == lens)
            else:
                found = eye.calc_matrix_camera(depsgraph, x=width, y=height, **aspect)
                agree.append(is_same_projection(found, projection))

    bpy.app.handlers.frame_change_post.append(look)
    try:
        yield
    finally:
        bpy.app.handlers.frame_change_post.remove(look)
    agree.append(is_same_pose(camera.extrinsics("blender"), view))
    agree.append(clip_range in (None, camera.clip_range))
    if projection is None:
        agree.append(described(camera.bpy_camera.data) == lens)
    else:
        agree.append(is_same_projection(camera.proj_matrix, projection))
    if not all(agree):
        raise ConfigurationError(
            f"Blender did not render from where the camera {camera.bpy_camera.name!r} was, or it was elsewhere afterwards: it"
            " evaluates the frame anew for a render. What the script has changed about the camera, or what the camera depends"
            " on, is lost if actions are blended there (NLA). To keep it, set it as the script's own: camera.view_matrix ="
            " camera.view_matrix, and likewise proj_matrix."
        )


def run_render(*, write_still: bool = False) -> None:
    """Render the scene, with its settings as they are now.

    Raises:
        ConfigurationError: Blender could not, or would show another camera, or nothing.
    """
    scene = bpy.context.scene
    if scene.camera.data.type not in ("PERSP", "ORTHO") and scene.render.engine != "CYCLES":
        raise ConfigurationError(
            f"The camera {scene.camera.name!r} is of type {scene.camera.data.type}, and {scene.render.engine} renders none but"
            " perspective and orthographic ones: let Cycles render it, FinalRenderer(..., engine='CYCLES') for example."
        )
    if scene.render.engine in compat.GL_ENGINES:
        compat.require_gl_library()
        if compat.draws_off_screen():  # larger ones are black in EEVEE
            compat.require_size(*Camera.shape_from_bpy())
    try:
        evaluation.render(write_still=write_still)
    except RuntimeError as error:  # what it reports as an error
        raise ConfigurationError(f"Blender could not render: {error}".strip()) from error
    regain_gpu_context()


def regain_gpu_context() -> None:
    """See to it that something can be drawn, if a render has taken Blender's GPU context away."""
    with Changes() as changes:
        evaluation.bring_gpu_context_back(changes)


def allocate(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array in the slot that the next publish will use, else an ordinary one."""
    lent = lend_array(shape, dtype)
    return np.empty(shape, dtype) if lent is None else lent


def load_pixels(path: str, least_nbytes: int) -> NDArray[np.float32]:
    """Let Blender read an uncompressed OpenEXR file, exactly as it is.

    It knows which channels it wrote and how: 5.x names those of vectors X, Y, Z, W and writes all data but colours in full
    precision. OpenImageIO is not among the modules of Blender 3.4's Python, nor of bpy's.

    Args:
        path: of the file.
        least_nbytes: what a pixel takes in it at least. Of a file that is too short 3.4 and 5.2 make nothing, and 5.0 crashes.

    Returns:
        (H, W, 4) float32, the bottom row first, of the size that the file has. A file of one channel has it in the first three.

    Raises:
        OutOfSharedMemory: the file is incomplete.
    """
    height, width = _exr_shape(path)
    nbytes = height * width * least_nbytes
    if nbytes == 0 or os.path.getsize(path) < nbytes:
        raise no_room(nbytes)
    image = bpy.data.images.load(path)
    try:
        image.colorspace_settings.name = "Non-Color"
        if tuple(image.size) != (width, height) or image.channels != 4:
            raise no_room(nbytes)
        pixels = np.empty((height, width, 4), np.float32)
        image.pixels.foreach_get(pixels.reshape(-1))
        return pixels
    finally:
        bpy.data.images.remove(image)


def _exr_shape(path: str) -> tuple[int, int]:
    """Height and width that an OpenEXR file says it has, by the corners of its pixels in its header; 0 if it does not."""
    name = b"dataWindow\0box2i\0"
    with open(path, "rb") as file:
        header = file.read(_EXR_HEADER_NBYTES)
    at = header.find(name) + len(name)
    if at < len(name) or len(header) < at + 20:
        return 0, 0
    _, left, low, right, high = struct.unpack_from("<5i", header, at)
    return high - low + 1, right - left + 1


def no_room(nbytes: int) -> OutOfSharedMemory:
    """The error for when a render cannot be written to memory."""
    free_mb = shutil.disk_usage(SHARED_MEMORY).free / 1e6
    return OutOfSharedMemory(
        f"No room for what Blender renders: {nbytes / 1e6:.2f} MB of memory, for the compositor's files in {SHARED_MEMORY}, where"
        f" {free_mb:.2f} MB are free. Make room there (containers: --shm-size), or give this machine more memory."
    )


def put(image: NDArray[Any], light: NDArray[np.float32], *, flip: bool, display: bool, plain: bool = False) -> None:
    """Put what was rendered into a picture.

    Args:
        image: (H, W, 4) or (H, W, 3), float32: light as it is, or uint8: light from 0 to 1 as 0 to 255, or display colours.
        light: (H, W, 4) float32, scene-linear, multiplied by alpha.
        flip: last row first.
        display: encode light for display, by the scene's view transform.
        plain: whatever the scene's view transform, as sRGB and no more.
    """
    if display:
        made: NDArray[Any] = _to_display(light, plain=plain)
    else:
        made = light if image.dtype == np.float32 else _to_bytes(light)
    np.copyto(image, (made[::-1] if flip else made)[..., : image.shape[-1]])


def _to_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (np.fmin(np.fmax(values, 0.0), 1.0) * 255 + 0.5).astype(np.uint8)


def _to_display(light: NDArray[np.float32], *, plain: bool) -> NDArray[np.uint8]:
    """Encode light for display.

    As Blender does: what covers a pixel in part has the colour that it would have if it covered all of it, times alpha. So it can
    be pasted: ``rgb + (1 - alpha) * background``. Light without any coverage (flames) is encoded as it is.
    """
    alpha = light[..., 3:]
    is_partial = (alpha > 0) & (alpha < 1)
    straight = np.divide(light, alpha, out=light.copy(), where=is_partial)
    straight[..., 3] = 1
    colors = _encode(straight, plain=plain)
    if is_partial.any():
        colors[..., :3] = np.where(is_partial, colors[..., :3] * alpha + 0.5, colors[..., :3])
    colors[..., 3:] = _to_bytes(alpha)
    return colors


def _encode(light: NDArray[np.float32], *, plain: bool) -> NDArray[np.uint8]:
    """Have Blender encode opaque light for display.

    Raises:
        OutOfSharedMemory: there is no memory for the file.
    """
    height, width, _ = light.shape
    stills = bpy.context.scene.render.image_settings
    image = bpy.data.images.new("blendtorch", width, height, alpha=True, float_buffer=True)
    try:
        image.pixels.foreach_set(np.ascontiguousarray(light).reshape(-1))
        with Changes() as changes, _memory_file() as file:
            changes.set_file_format(stills, "TARGA_RAW", color_mode="RGBA")
            changes.set(stills, color_management="OVERRIDE" if plain else "FOLLOW_SCENE")
            if plain:
                changes.set(stills.display_settings, display_device="sRGB")
                changes.set(stills.view_settings, **compat.PLAIN_VIEW)
            image.save_render(_path(file), scene=bpy.context.scene)
            file.seek(_TGA_HEADER_NBYTES)
            bgra = np.fromfile(file, np.uint8, light.size)
    except RuntimeError as error:
        raise no_room(light.size) from error
    finally:
        bpy.data.images.remove(image)
    if bgra.size != light.size:
        raise no_room(light.size)
    return np.ascontiguousarray(bgra.reshape(light.shape)[..., [2, 1, 0, 3]])


def _render_light(changes: Changes, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Render (H, W, 4) float32 scene-linear light, multiplied by alpha, the bottom row first."""
    height, width = shape
    with _memory_file() as file:
        _write_to(changes, file, "OPEN_EXR", color_depth="32", exr_codec="NONE")
        run_render(write_still=True)
        if os.path.getsize(_path(file)) < height * width * 4 * 4:
            raise no_room(height * width * 4 * 4)
        return load_pixels(_path(file), 4 * 4)


def _memory_file() -> Any:
    return os.fdopen(os.memfd_create("blendtorch-render"), "rb")


def _path(file: Any) -> str:
    return f"/proc/self/fd/{file.fileno()}"


def _write_to(changes: Changes, file: Any, file_format: str, **values: Any) -> None:
    render = bpy.context.scene.render
    changes.set(render, filepath=_path(file), use_file_extension=False, use_overwrite=True)
    changes.set_file_format(render.image_settings, file_format, color_mode="RGBA", **values)
    changes.set(render.image_settings, color_management="FOLLOW_SCENE")
