"""Pictures of the scene in memory."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, get_args

import bpy
import gpu
import numpy as np
from gpu_extras.batch import batch_for_shader
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError

from . import compat
from .camera import Camera, Origin, check_origin
from .final import FinalRender
from .publisher import lend_array
from .utils import find_first_view3d

Mode = Literal["rgba", "rgb"]
ColorSpace = Literal["linear", "srgb"]
Shading = Literal["WIREFRAME", "SOLID", "MATERIAL", "RENDERED"]


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
        if mode not in ("rgba", "rgb"):
            raise ConfigurationError(f"mode={mode!r}: it is 'rgba' or 'rgb'.")
        check_origin(origin)
        if color_space not in ("linear", "srgb"):
            raise ConfigurationError(f"color_space={color_space!r}: it is 'linear' or 'srgb'.")
        self.camera = camera or Camera()
        self.mode = mode
        self.origin = origin
        self.color_space = color_space
        self._final = FinalRender()
        self._viewport = ViewportDrawing() if compat.draws_off_screen() else None

    def render(self) -> NDArray[np.uint8]:
        """Render the scene as it is now.

        Returns:
            (H, W, 4) or (H, W, 3) uint8, for `mode` 'rgba' or 'rgb'. Nothing overwrites it later.
        """
        shape = (*self.camera.shape, len(self.mode))
        image = lend_array(shape, np.uint8)
        if image is None:
            image = np.empty(shape, np.uint8)
        drawing = self._drawing()
        compat.report(drawing.describe(), software=drawing is self._viewport and compat.draws_in_software())
        drawing.draw(image, self.camera, flip=self.origin == "upper-left", display=self.color_space == "srgb")
        return image

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

    def _drawing(self) -> ViewportDrawing | FinalRender:
        """What draws now. Viewports draw nothing off-screen for engines that trace rays."""
        if self._viewport is None:
            return self._final
        traced = self._viewport.shading == "RENDERED" and bpy.context.scene.render.engine not in compat.GL_ENGINES
        return self._final if traced else self._viewport


class ViewportDrawing:
    """Draws a 3D viewport into a frame buffer, the same one as long as the size is: EEVEE holds memory for each."""

    def __init__(self) -> None:
        _, self._space, self._region = find_first_view3d()
        self._style: tuple[Shading, bool] | None = None
        self._offscreen: Any = None
        self._flipped: Any = None
        self._scratch: NDArray[np.uint8] | None = None
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
        height, width, _ = image.shape
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
            if not flip:
                _read(image)
            elif not self._flip_on_gpu:
                if self._scratch is None or self._scratch.shape != image.shape:
                    self._scratch = np.empty(image.shape, np.uint8)
                _read(self._scratch)
        if flip and self._flip_on_gpu:
            with self._flipped.bind():
                _draw_upside_down(self._offscreen.texture_color)
                _read(image)
        elif flip:
            assert self._scratch is not None
            np.copyto(image, self._scratch[::-1])

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
