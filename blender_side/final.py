"""Pictures by final render (F12), where Blender cannot draw its viewport off-screen.

What a render produced cannot be read from Python in background (the Render Result is empty, and there is no Viewer). So Blender writes
it as an uncompressed 8-bit file in memory, which also leaves the conversion to display colours to Blender. Next to the render that is nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import bpy
import numpy as np
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError

from . import compat
from .utils import find_first_view3d

if TYPE_CHECKING:
    from .camera import Camera
    from .offscreen import Shading

_MEMORY_FOLDER = "/dev/shm"
_TGA_HEADER_NBYTES = 18
#: Settings that a solid viewport and a Workbench render have in common.
_SOLID_SETTINGS = (
    *("light", "studio_light", "color_type", "single_color", "background_type", "background_color"),
    *("show_shadows", "show_cavity", "show_xray", "show_object_outline", "show_specular_highlight", "show_backface_culling", "use_dof"),
)


class FinalRender:
    """Renders with the scene's engine, or with the one behind the viewport shading that was asked for."""

    def __init__(self) -> None:
        self._shading: Shading = "RENDERED"

    def set_style(self, shading: Shading, overlays: bool) -> None:
        if overlays or shading == "WIREFRAME":
            raise ConfigurationError(
                f"shading={shading!r}, overlays={overlays}: a final render shows neither wireframes nor overlays, and Blender {bpy.app.version_string}"
                " has nothing else in background. 5.1 and later have; so has any version with a display (a virtual one such as Xvfb will do)."
            )
        self._shading = shading

    def describe(self) -> str:
        return f"Blender {bpy.app.version_string}, final renders ({self._engine()}), slower than off-screen drawing"

    def draw(self, image: NDArray[np.uint8], camera: Camera, *, flip: bool, display: bool) -> None:
        height, width, channels = image.shape
        file, path = tempfile.mkstemp(prefix="blendtorch-", suffix=".tga", dir=_MEMORY_FOLDER if os.path.isdir(_MEMORY_FOLDER) else None)
        os.close(file)
        try:
            with self._settings(camera, path, display=display):
                bpy.ops.render.render(write_still=True)
            bgra = np.fromfile(path, np.uint8, offset=_TGA_HEADER_NBYTES, count=height * width * 4).reshape(height, width, 4)
        finally:
            os.unlink(path)
        if flip:  # the file begins with the bottom row
            bgra = bgra[::-1]
        np.copyto(image, bgra[..., [2, 1, 0, 3][:channels]])
        if bpy.context.scene.render.film_transparent:  # the viewport's colours are multiplied by alpha
            image[..., :3] = (image[..., :3] * bgra[..., 3:].astype(np.uint16) + 127) // 255

    def _engine(self) -> str:
        return {"SOLID": compat.WORKBENCH, "MATERIAL": compat.EEVEE}.get(self._shading, str(bpy.context.scene.render.engine))

    @contextmanager
    def _settings(self, camera: Camera, path: str, *, display: bool) -> Iterator[None]:
        """Everything that makes a render come out like `OffScreenRenderer`'s pictures, for the duration of one render."""
        scene, render = bpy.context.scene, bpy.context.scene.render
        height, width = camera.shape
        with ExitStack() as undo:

            def change(owner: Any, **values: Any) -> None:
                for name, value in values.items():
                    undo.callback(setattr, owner, name, getattr(owner, name))
                    setattr(owner, name, value)

            change(scene, camera=camera.bpy_camera)
            pose = camera.view_matrix.inverted()
            if pose != camera.view_from_bpy(camera.bpy_camera).inverted():  # moved since its view matrix was taken
                change(camera.bpy_camera, matrix_world=pose)
            change(render, resolution_x=width, resolution_y=height, resolution_percentage=100, use_border=False, use_multiview=False)
            change(render, use_compositing=False, use_sequencer=False, filepath=path, use_file_extension=False, use_overwrite=True)
            undo.callback(compat.set_file_format(render.image_settings, "TARGA_RAW"))
            change(render.image_settings, color_mode="RGBA")
            if not display:
                change(render, dither_intensity=0.0)
                change(render.image_settings, color_management="OVERRIDE")
                change(render.image_settings.view_settings, view_transform="Raw")
            change(render, engine=self._engine())
            if self._shading == "SOLID":
                shown = find_first_view3d()[1].shading
                change(scene.display.shading, **{name: getattr(shown, name) for name in _SOLID_SETTINGS})
                change(scene.display, render_aa="OFF")
            if render.engine == compat.EEVEE:
                change(scene.eevee, taa_render_samples=max(scene.eevee.taa_samples, 1))
            if render.engine in compat.GL_ENGINES:
                compat.require_gl_library()
            yield
