"""Pictures of the scene in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, get_args

import bpy
import gpu
import numpy as np
from gpu_extras.batch import batch_for_shader
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError

from . import compat, evaluation, readback
from .camera import Camera, Origin
from .evaluation import Evaluation
from .final import ColorSpace, Mode, Shading, ViewportStandIn, allocate, check_picture
from .utils import find_first_view3d


class OffScreenRenderer:
    """Renders what a camera sees.

    Where Blender can draw its viewport into memory, that is used, and the pixels are read straight into the
    shared-memory slot that the next `DataPublisher.publish` will send. Elsewhere (`bpy` before 5.1, ``blender -b``, a
    scene that Cycles renders) each picture is a final render, as with F12: much slower, but of the same size,
    orientation, colour space and alpha; the log says so.

    The viewport drawn is the first 3D viewport of the file, so its settings (shading, overlays, which objects are
    shown) count.
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
            mode: 'rgba', or 'rgb' to leave out alpha.
            origin: the corner of the first pixel: 'upper-left' as in OpenCV and NumPy, or 'lower-left' as in OpenGL.
            color_space: 'linear' gives light intensities, as blendtorch did: darker than expected when looked at, for
                scripts that gamma-encode themselves. 'srgb' gives what Blender shows on screen: the scene's view
                transform (Standard, Filmic, AgX, ...), encoded for display.

        Raises:
            ConfigurationError: an argument is unknown, the file has no camera or no 3D viewport, or OpenGL does not
                work here.
        """
        check_picture(mode, origin, color_space)
        self.camera = camera or Camera()
        self.mode = mode
        self.origin = origin
        self.color_space = color_space
        self._final = ViewportStandIn()
        self._viewport = ViewportDrawing() if compat.draws_off_screen() else None
        evaluation.register(self)

    @property
    def evaluation(self) -> Evaluation:
        """What its next picture shows."""
        return evaluation.of_viewport((self._viewport or self._final).shading)

    def render(self) -> NDArray[np.uint8]:
        """Render the scene as it is now.

        Returns:
            (H, W, 4) or (H, W, 3) uint8, for `mode` 'rgba' or 'rgb'. Nothing overwrites it later.
        """
        image = allocate((*self.camera.shape, len(self.mode)), np.uint8)
        drawing = self._drawing()
        compat.report(drawing.describe(), software=drawing is self._viewport and compat.draws_in_software())
        drawing.draw(image, self.camera, flip=self.origin == "upper-left", display=self.color_space == "srgb")
        return image

    def render_later(self) -> PendingPicture:
        """Have the scene rendered as it is now, and go on while the graphics card does it.

        For scripts that prepare the next frame meanwhile, and then publish this one with what they noted about it::

            before, pending = pending, (renderer.render_later(), camera.object_to_pixel(cube))
            if before is not None:
                publisher.publish(image=before[0].read(), xy=before[1])

        It gains the time for which the card and the script work at once; where OpenGL draws on the CPU, that is none. Where
        pictures cannot be fetched later (final renders, Vulkan), it is rendered here and now.
        """
        drawing = self._drawing()
        if isinstance(drawing, ViewportStandIn) or not readback.is_available():
            return PendingPicture(self.render())
        compat.report(drawing.describe(), software=compat.draws_in_software())
        shape = (*self.camera.shape, len(self.mode))
        flip, display = self.origin == "upper-left", self.color_space == "srgb"
        return drawing.draw_later(shape, self.camera, flip=flip, display=display)

    def set_render_style(self, shading: Shading = "RENDERED", overlays: bool = False) -> None:
        """Choose how pictures look. Off-screen drawing then takes no samples for anti-aliasing beyond the engine's own.

        Args:
            shading: 'RENDERED' (the scene's engine, lights and world), 'MATERIAL' (EEVEE, with the viewport's own
                light and world), 'SOLID' (Workbench) or 'WIREFRAME'.
            overlays: draw grid, outlines and other helpers too.

        Raises:
            ConfigurationError: this Blender makes final renders, and they cannot show that.
        """
        if shading not in get_args(Shading):
            raise ConfigurationError(f"shading={shading!r}: it is one of {', '.join(get_args(Shading))}.")
        (self._viewport or self._final).set_style(shading, overlays)

    def _drawing(self) -> ViewportDrawing | ViewportStandIn:
        """What draws now."""
        evaluation.register(self)
        return self._final if self._viewport is None or self.evaluation.is_final else self._viewport


class PendingPicture:
    """A picture that is being rendered. It need not be read."""

    def __init__(self, image: NDArray[np.uint8] | None, fetch: Callable[[], NDArray[np.uint8]] | None = None) -> None:
        self._image = image
        self._fetch = fetch

    def read(self) -> NDArray[np.uint8]:
        """Wait for the picture.

        Returns:
            what :meth:`OffScreenRenderer.render` would have returned, the same array each time. If the picture was fetched later,
            it lies in the slot of the first `DataPublisher.publish` after that.
        """
        if self._image is None:
            assert self._fetch is not None
            self._image = self._fetch()
            self._fetch = None
        return self._image


class ViewportDrawing:
    """Draws a 3D viewport into a frame buffer, the same one as long as the size is: EEVEE holds memory for each."""

    def __init__(self) -> None:
        _, self._space, self._region = find_first_view3d()
        self._style: tuple[Shading, bool] | None = None
        self._offscreen: Any = None
        self._flipped: Any = None
        self._scratch: NDArray[np.uint8] | None = None
        self._unused: list[readback.PixelBuffer] = []
        self._flip_on_gpu = compat.flips_on_gpu()

    def set_style(self, shading: Shading, overlays: bool) -> None:
        self._style = (shading, overlays)
        compat.disable_viewport_antialiasing()

    @property
    def shading(self) -> str:
        """How the viewport is shaded in the next picture."""
        return self._style[0] if self._style else str(self._space.shading.type)

    def describe(self) -> str:
        return f"Blender {bpy.app.version_string}, off-screen on {compat.gl_renderer()}"

    def draw(self, image: NDArray[np.uint8], camera: Camera, *, flip: bool, display: bool) -> None:
        with self._drawn(image.shape, camera, flip=flip, display=display) as upside_down:
            if not upside_down:
                _read(image)
                return
            if self._scratch is None or self._scratch.shape != image.shape:
                self._scratch = np.empty(image.shape, np.uint8)
            _read(self._scratch)
        np.copyto(image, self._scratch[::-1])

    def draw_later(self, shape: tuple[int, ...], camera: Camera, *, flip: bool, display: bool) -> PendingPicture:
        with self._drawn(shape, camera, flip=flip, display=display) as upside_down:
            buffer = self._buffer(shape)
            buffer.read()

        def fetch() -> NDArray[np.uint8]:
            image = allocate(shape, np.uint8)
            buffer.copy_to(image, flip=upside_down)
            no_longer_in_use()
            return image

        pending = PendingPicture(None, fetch)
        no_longer_in_use = weakref.finalize(pending, self._unused.append, buffer)
        no_longer_in_use.atexit = False
        return pending

    def _buffer(self, shape: tuple[int, ...]) -> readback.PixelBuffer:
        while self._unused:
            buffer = self._unused.pop()
            if buffer.shape == shape:
                return buffer
            buffer.free()
        return readback.PixelBuffer(shape)

    @contextmanager
    def _drawn(self, shape: tuple[int, ...], camera: Camera, *, flip: bool, display: bool) -> Iterator[bool]:
        """Draw, with the frame buffer bound that has the picture; whether its rows have to be turned round yet."""
        height, width, _ = shape
        if self._offscreen is None or (self._offscreen.width, self._offscreen.height) != (width, height):
            self._allocate(width, height)
        self._apply_style()
        bpy.context.evaluated_depsgraph_get()  # brings what the script has changed up to date
        with self._offscreen.bind():
            self._offscreen.draw_view3d(
                bpy.context.scene,
                bpy.context.view_layer,
                self._space,
                self._region,
                camera.view_matrix,
                camera.proj_matrix,
                do_color_management=display,
            )
            if not (flip and self._flip_on_gpu):
                yield flip
                return
        with self._flipped.bind():
            _draw_upside_down(self._offscreen.texture_color)
            yield False

    def _allocate(self, width: int, height: int) -> None:
        for old in (self._offscreen, self._flipped):
            if old is not None:
                old.free()
        self._offscreen = gpu.types.GPUOffScreen(width, height)
        self._flipped = gpu.types.GPUOffScreen(width, height) if self._flip_on_gpu else None

    def _apply_style(self) -> None:
        """Give the viewport this drawing's style again, if another one that shares the viewport has changed it."""
        if self._style is None:
            return
        shading, overlays = self._style
        if self._space.shading.type != shading:
            self._space.shading.type = shading
        if self._space.overlay.show_overlays != overlays:
            self._space.overlay.show_overlays = overlays


def _read(image: NDArray[np.uint8]) -> None:
    """Read the bound frame buffer's colours into an array, bottom row first, without an intermediate copy."""
    height, width, channels = image.shape
    target = gpu.types.Buffer("UBYTE", image.shape, image)
    gpu.state.active_framebuffer_get().read_color(0, 0, width, height, channels, 0, "UBYTE", data=target)


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
