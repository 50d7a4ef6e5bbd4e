"""Pictures of the scene in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast, get_args

import bpy
import gpu
import numpy as np
from gpu_extras.batch import batch_for_shader
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError

from . import compat, evaluation, readback
from .camera import Camera, Origin
from .changes import Changes
from .evaluation import Evaluation
from .final import ColorSpace, Mode, Shading, ViewportStandIn, check_picture
from .publisher import allocate
from .render_files import put
from .utils import find_first_view3d, type_switches


class OffScreenRenderer:
    """Renders what a camera sees.

    Where Blender can draw its viewport into memory, that is used, and the pixels are read straight into the
    shared-memory slot that the next `DataPublisher.publish` will send. Elsewhere (`bpy` before 5.1, ``blender -b``, a
    scene that Cycles renders) each picture is a final render, as with F12: much slower, but of the same size,
    orientation, colour space and alpha; the log says so.

    The viewport drawn is the first 3D viewport of the file, and its settings count (shading, overlays, which objects are shown)
    until `set_render_style` changes them. It is looked for before each picture, also when another file was opened, or after
    undo. What pictures of each kind of renderer hold, and where they differ, is a table in docs/final_renders.md.

    Example::

        renderer = btb.OffScreenRenderer(btb.Camera(), mode="rgb", color_space="srgb")
        renderer.set_render_style("RENDERED")
        publisher.publish(image=renderer.render())
    """

    def __init__(
        self,
        camera: Camera | None = None,
        mode: Mode = "rgba",
        origin: Origin = "upper-left",
        *,
        color_space: ColorSpace = "linear",
    ) -> None:
        """Prepare to render.

        Args:
            camera: what to look through; its `shape` is the size of the pictures. None: the scene's camera.
            mode: 'rgba', or 'rgb' to leave out alpha. Colours are multiplied by alpha.
            origin: the corner of the first pixel: 'upper-left' as in OpenCV and NumPy, or 'lower-left' as in OpenGL.
            color_space: 'linear' gives light intensities, as blendtorch did: darker than expected when looked at, for
                scripts that gamma-encode themselves. 'srgb' gives what Blender shows on screen: the scene's view
                transform (Standard, Filmic, AgX, ...), encoded for display.

        Raises:
            ConfigurationError: an argument is unknown, the file has no camera or no 3D viewport, or OpenGL does not
                work here.
        """
        compat.require_main_thread()
        check_picture(mode, origin, color_space)
        self.camera = camera or Camera()
        self.mode = mode
        self.origin = origin
        self.color_space = color_space
        self._final = ViewportStandIn()
        self._viewport = ViewportDrawing() if compat.draws_off_screen() else None
        evaluation.register(self)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the pictures: the camera's."""
        return self.camera.shape

    @property
    def area(self) -> Any:
        """The area of the screen that holds the viewport, found anew in each file that is opened.

        Raises:
            ConfigurationError: the file has no 3D viewport.
        """
        return find_first_view3d()[0]

    @property
    def space(self) -> Any:
        """The viewport (`bpy.types.SpaceView3D`): its settings are those of the pictures. Else as `area`."""
        return find_first_view3d()[1]

    @property
    def region(self) -> Any:
        """The viewport's region. Else as `area`."""
        return find_first_view3d()[2]

    @property
    def evaluation(self) -> Evaluation:
        """What its next picture shows. The viewport gets the style that it will have then."""
        shown = evaluation.of_viewport((self._viewport or self._final).shading)
        if self._viewport is not None and not shown.is_final:
            self._viewport.find_viewport()
        return shown

    def render(self) -> NDArray[np.uint8]:
        """Render the scene as it is now.

        Returns:
            (H, W, 4) or (H, W, 3) uint8, for `mode` 'rgba' or 'rgb'. Nothing overwrites it later.

        Raises:
            ConfigurationError: the camera's object is gone; the camera is panoramic, and the scene's engine is not Cycles; the
                file that is open has no 3D viewport; or this is a final render that cannot be made.
            OutOfSharedMemory: there is no memory for a final render.
        """
        image = allocate((*self.camera.shape, len(self.mode)), np.uint8)
        drawing = self._drawing()
        compat.report(drawing.describe())
        drawing.draw(image, self.camera, flip=self.origin == "upper-left", display=self.color_space == "srgb")
        return image

    def render_later(self) -> PendingPicture:
        """Have the scene rendered as it is now, and go on while the graphics card does it.

        For scripts that prepare the next frame meanwhile, and then publish this one with what they noted about it::

            before, pending = pending, (renderer.render_later(), camera.object_to_pixel(cube))
            if before is not None:
                publisher.publish(image=before[0].read(), xy=before[1])

        It gains the time for which the card and the script work at once; where OpenGL draws on the CPU, that is none. Where
        pictures cannot be fetched later (final renders, Vulkan, display colours of a transparent film), it is rendered here and
        now.

        Returns:
            the picture to come: `PendingPicture.read` waits for it.

        Raises:
            as `render`.
        """
        drawing = self._drawing()
        display = self.color_space == "srgb"
        if isinstance(drawing, ViewportStandIn) or not readback.is_available() or (display and _is_film_transparent()):
            image = self.render()
            return PendingPicture(lambda: image)
        compat.report(drawing.describe())
        shape = (*self.camera.shape, len(self.mode))
        return drawing.draw_later(shape, self.camera, flip=self.origin == "upper-left", display=display)

    def set_render_style(self, shading: Shading = "RENDERED", overlays: bool = False) -> None:
        """Choose how pictures look, whatever the viewport is set to. This changes the viewport, for whoever looks at it, too.

        The viewport then shows all of the scene (it leaves local view, and shows objects of all types and collections), in the
        colours of the picture and not of one pass, and takes no samples for anti-aliasing beyond the engine's own.

        Args:
            shading: 'RENDERED' (the scene's engine, lights and world), 'MATERIAL' (EEVEE, with the viewport's own
                light and world), 'SOLID' (Workbench, with the viewport's own light, colours and background) or 'WIREFRAME'.
            overlays: draw grid, outlines and other helpers too.

        Raises:
            ConfigurationError: this Blender makes final renders, and they cannot show that.
        """
        if shading not in get_args(Shading):
            raise ConfigurationError(f"shading={shading!r}: it is one of {', '.join(get_args(Shading))}.")
        if self._viewport is not None:
            self._viewport.set_style(shading, overlays)
        else:
            self._final.set_style(shading, overlays)

    def _drawing(self) -> ViewportDrawing | ViewportStandIn:
        """What draws now."""
        shown = evaluation.register(self)
        if self._viewport is None:
            return self._final
        if shown.is_final:
            self._final.set_style(self._viewport.shading, overlays=self._viewport.has_overlays)
            return self._final
        return self._viewport


class PendingPicture:
    """A picture that is being rendered. It need not be read."""

    def __init__(self, fetch: Callable[[], NDArray[np.uint8]]) -> None:
        self._fetch = fetch
        self._image: NDArray[np.uint8] | None = None

    def read(self) -> NDArray[np.uint8]:
        """Wait for the picture.

        Returns:
            what :meth:`OffScreenRenderer.render` would have returned, the same array each time. If the picture was fetched later,
            it lies in the slot of the first `DataPublisher.publish` after that.

        Raises:
            ConfigurationError: there are holdouts in it, and display colours of those cannot be fetched later; or OpenGL has no
                memory for it.
        """
        if self._image is None:
            self._image = self._fetch()
        return self._image


class ViewportDrawing:
    """Draws a 3D viewport into frame buffers, the same ones as long as the size is: for a new one EEVEE prepares everything anew.

    Nothing of the file's is kept: a viewport is gone when another file is opened, and drawing it would crash Blender.
    """

    def __init__(self) -> None:
        find_first_view3d()
        self._style: tuple[Shading, bool] | None = None
        self._frame_buffers: dict[str, Any] = {}  # by what they are for
        self._scratch: dict[tuple[int, ...], NDArray[np.uint8]] = {}
        self._unused: list[readback.PixelBuffer] = []
        self._flip_on_gpu = compat.flips_on_gpu()

    def set_style(self, shading: Shading, overlays: bool) -> None:
        self._style = (shading, overlays)
        compat.disable_viewport_antialiasing()
        self.find_viewport()

    @property
    def shading(self) -> Shading:
        """How the viewport is shaded in the next picture."""
        return self._style[0] if self._style else cast("Shading", find_first_view3d()[1].shading.type)

    @property
    def has_overlays(self) -> bool:
        """Whether overlays were asked for; those of a viewport that nobody gave a style are no reason for an error."""
        return self._style is not None and self._style[1]

    def describe(self) -> str:
        return f"Blender {bpy.app.version_string}, off-screen on {compat.gl_renderer()}"

    def draw(self, image: NDArray[np.uint8], camera: Camera, *, flip: bool, display: bool) -> None:
        height, width, _ = image.shape
        evaluation.regain_gpu_context()
        if display and _is_film_transparent():
            self._draw_encoded(image, camera, flip=flip)
            return
        with self._drawn(height, width, camera, flip=flip, display=display) as (upside_down, has_alpha):
            drawn = self._scratch_of(image.shape) if upside_down else image
            _read(drawn)
            is_translucent = display and has_alpha and self._is_translucent(height, width)
        if is_translucent:  # there are holdouts
            self._draw_encoded(image, camera, flip=flip)
        elif upside_down:
            np.copyto(image, drawn[::-1])

    def draw_later(self, shape: tuple[int, ...], camera: Camera, *, flip: bool, display: bool) -> PendingPicture:
        height, width, channels = shape
        evaluation.regain_gpu_context()
        with self._drawn(height, width, camera, flip=flip, display=display) as (upside_down, has_alpha):
            is_to_be_checked = display and has_alpha
            buffer = self._buffer((height, width, 4 if is_to_be_checked else channels))
            buffer.read()

        def fetch() -> NDArray[np.uint8]:
            compat.require_main_thread()
            image = allocate(shape, np.uint8)
            with buffer.picture() as picture:
                if is_to_be_checked and _is_translucent(picture):
                    raise ConfigurationError(
                        "There are holdouts in the picture, and display colours of what covers pixels in part cannot be fetched"
                        " later: render() makes such pictures, or render_later() with color_space='linear'."
                    )
                np.copyto(image, (picture[::-1] if upside_down else picture)[..., :channels])
            no_longer_in_use()
            return image

        pending = PendingPicture(fetch)
        no_longer_in_use = weakref.finalize(pending, self._unused.append, buffer)
        no_longer_in_use.atexit = False
        return pending

    def _draw_encoded(self, image: NDArray[np.uint8], camera: Camera, *, flip: bool) -> None:
        """Draw light, and encode it as that of final renders is. Viewports encode what is multiplied by alpha already."""
        height, width, _ = image.shape
        light = np.empty((height, width, 4), np.float32)
        drawn = self._frame_buffer("light", height, width, "RGBA16F")
        self._draw_into(drawn, camera, display=False)
        with drawn.bind():
            _read(light)
        put(image, light, flip=flip, display=True, plain=self.shading in ("SOLID", "WIREFRAME"))

    def _is_translucent(self, height: int, width: int) -> bool:
        """Whether the bound frame buffer has pixels that are not covered in full."""
        picture = self._scratch_of((height, width, 4))
        _read(picture)
        return _is_translucent(picture)

    def _scratch_of(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        if shape not in self._scratch:
            same_size = {known: array for known, array in self._scratch.items() if known[:2] == shape[:2]}
            self._scratch = same_size | {shape: np.empty(shape, np.uint8)}
        return self._scratch[shape]

    def _buffer(self, shape: tuple[int, ...]) -> readback.PixelBuffer:
        while self._unused:
            buffer = self._unused.pop()
            if buffer.shape == shape:
                return buffer
            buffer.free()
        return readback.PixelBuffer(shape)

    @contextmanager
    def _drawn(
        self, height: int, width: int, camera: Camera, *, flip: bool, display: bool
    ) -> Iterator[tuple[bool, bool]]:
        """Draw, and bind the frame buffer with the picture; whether its rows are still upside down, and whether it has alpha."""
        drawn = self._frame_buffer("picture", height, width)
        has_alpha = self._draw_into(drawn, camera, display=display)
        if not (flip and self._flip_on_gpu):
            with drawn.bind():
                yield flip, has_alpha
            return
        with self._frame_buffer("flipped", height, width).bind():
            _draw_upside_down(drawn.texture_color)
            yield False, has_alpha

    def _draw_into(self, offscreen: Any, camera: Camera, *, display: bool) -> bool:
        """Draw the scene as it is; whether alpha is what covers a pixel, rather than 1 everywhere."""
        space, region = self.find_viewport()
        scene = bpy.context.scene
        shading = space.shading
        is_scenes = (
            scene.render.engine == compat.EEVEE and shading.type == "RENDERED" and shading.use_scene_world_render
        )
        has_alpha = compat.draws_without_background() and (is_scenes or _is_film_transparent())
        with Changes() as changes:
            for owner, values in _framing(space, camera, display=display):
                changes.set(
                    owner, **{name: value for name, value in values.items() if getattr(owner, name, value) != value}
                )
            bpy.context.evaluated_depsgraph_get()  # brings what the script has changed up to date
            with offscreen.bind():
                offscreen.draw_view3d(
                    scene,
                    bpy.context.view_layer,
                    space,
                    region,
                    camera.view_matrix,
                    camera.proj_matrix,
                    do_color_management=display,
                    **({"draw_background": False} if has_alpha else {}),
                )
        return has_alpha

    def _frame_buffer(self, purpose: str, height: int, width: int, texture: str = "RGBA8") -> Any:
        """The frame buffer for something, as it was last used if it has this size. Its `texture` is the format of its colours."""
        known = self._frame_buffers.get(purpose)
        if known is None or (known.height, known.width) != (height, width):
            compat.require_size(height, width)
            if known is not None:
                self._frame_buffers.pop(purpose).free()
            known = self._frame_buffers[purpose] = gpu.types.GPUOffScreen(width, height, format=texture)
        return known

    def find_viewport(self) -> tuple[Any, Any]:
        """The viewport's space and region; in this drawing's style, whoever has changed that."""
        area, space, region = find_first_view3d()
        if self._style is not None:
            for owner, values in _style(space, *self._style):
                for name, value in values.items():
                    if getattr(owner, name, value) != value:  # what a version does not know is as it should be
                        setattr(owner, name, value)
            if space.local_view is not None:
                _leave_local_view(area, region)
        return space, region


def _style(space: Any, shading: Shading, overlays: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What is to be set about a viewport so that a style looks the same in each."""
    yield (
        space.shading,
        {"type": shading, "render_pass": "COMBINED", "use_compositor": compat.NO_COMPOSITOR}
        | ({"use_scene_lights_render": True, "use_scene_world_render": True} if shading == "RENDERED" else {}),
    )
    yield space.overlay, {"show_overlays": overlays}
    yield space, {"use_local_collections": False} | dict.fromkeys(type_switches(), True)


def _framing(space: Any, camera: Camera, *, display: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What is to be set for the time of a drawing, in any style, so that it shows what the camera sees, and no less.

    As seen through a camera, depth of field is the camera's.
    """
    scene = bpy.context.scene
    yield space, {"use_render_border": False}
    if space.camera != camera.bpy_camera:
        yield space, {"use_local_camera": True, "camera": camera.bpy_camera}
    yield space.region_3d, {"view_perspective": "CAMERA", "use_clip_planes": False}
    yield scene.render, {"use_border": False, "preview_pixel_size": "1"}
    if display and space.shading.type in ("MATERIAL", "RENDERED"):  # the others have sRGB in any case
        yield scene.display_settings, {"emulation": "OFF"}


def _leave_local_view(area: Any, region: Any) -> None:
    for window in bpy.context.window_manager.windows:
        if area in list(window.screen.areas):
            with bpy.context.temp_override(window=window, area=area, region=region):
                bpy.ops.view3d.localview(frame_selected=False)


def _is_film_transparent() -> bool:
    return bool(bpy.context.scene.render.film_transparent)


def _is_translucent(picture: NDArray[np.uint8]) -> bool:
    return bool((picture[..., 3] != 255).any())


def _read(image: NDArray[Any]) -> None:
    """Read the bound frame buffer's colours into an array of uint8 or float32, bottom row first, without an intermediate copy."""
    height, width, channels = image.shape
    kind = "UBYTE" if image.dtype == np.uint8 else "FLOAT"
    target = gpu.types.Buffer(kind, image.shape, image)
    gpu.state.active_framebuffer_get().read_color(0, 0, width, height, channels, 0, kind, data=target)


@cache
def _upside_down() -> tuple[Any, Any]:
    """A shader that copies `image` exactly, in reverse order of rows, and a triangle that covers everything."""
    info = gpu.types.GPUShaderCreateInfo()
    info.sampler(0, "FLOAT_2D", "image")
    info.vertex_in(0, "VEC2", "position")
    info.fragment_out(0, "VEC4", "color")
    info.vertex_source("void main() { gl_Position = vec4(position, 0.0, 1.0); }")
    info.fragment_source(
        "void main() {"
        "  ivec2 pixel = ivec2(gl_FragCoord.xy);"
        "  color = texelFetch(image, ivec2(pixel.x, textureSize(image, 0).y - 1 - pixel.y), 0);"
        "}"
    )
    shader = gpu.shader.create_from_info(info)
    return shader, batch_for_shader(shader, "TRIS", {"position": [(-1, -1), (3, -1), (-1, 3)]})


def _draw_upside_down(texture: Any) -> None:
    """Copy a texture into the bound frame buffer of the same size, last row first."""
    shader, triangle = _upside_down()
    gpu.state.blend_set("NONE")
    gpu.state.depth_test_set("NONE")
    shader.bind()
    shader.uniform_sampler("image", texture)
    triangle.draw(shader)
