"""Pictures by final render (F12), where Blender cannot draw its viewport off-screen.

What a render produced cannot be read from Python in background (the Render Result is empty, and there is no Viewer).
So Blender writes it as an uncompressed 8-bit file that exists in memory only, which also leaves the conversion to
display colours to Blender. Next to the render that is nothing.
"""

from __future__ import annotations

import os
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

_TGA_HEADER_NBYTES = 18
#: Settings that a solid viewport and a Workbench render have in common.
# fmt: off
_SOLID_SETTINGS = (
    "light", "studio_light", "color_type", "single_color", "background_type", "background_color", "use_dof",
    "show_shadows", "show_cavity", "show_xray", "show_object_outline", "show_specular_highlight", "show_backface_culling",
)
# fmt: on


class FinalRender:
    """Renders with the scene's engine, or with the one behind the viewport shading that was asked for."""

    def __init__(self) -> None:
        self._shading: Shading = "RENDERED"

    def set_style(self, shading: Shading, overlays: bool) -> None:
        if overlays or shading == "WIREFRAME":
            raise ConfigurationError(
                f"shading={shading!r}, overlays={overlays}: a final render shows neither wireframes nor overlays, and"
                f" Blender {bpy.app.version_string} has nothing else in background. 5.1 and later have; so has any version"
                " with a display (a virtual one such as Xvfb will do)."
            )
        self._shading = shading

    def describe(self) -> str:
        return f"Blender {bpy.app.version_string}, final renders ({self._engine()}), slower than off-screen drawing"

    def draw(self, image: NDArray[np.uint8], camera: Camera, *, flip: bool, display: bool) -> None:
        height, width, channels = image.shape
        with os.fdopen(os.memfd_create("blendtorch-render"), "rb") as file:
            with self._settings(camera, f"/proc/self/fd/{file.fileno()}", display=display):
                bpy.ops.render.render(write_still=True)
            file.seek(_TGA_HEADER_NBYTES)
            bgra = np.fromfile(file, np.uint8, height * width * 4).reshape(height, width, 4)
        if flip:  # the file begins with the bottom row
            bgra = bgra[::-1]
        np.copyto(image, bgra[..., [2, 1, 0, 3][:channels]])
        if bpy.context.scene.render.film_transparent:  # the viewport's colours are multiplied by alpha
            image[..., :3] = (image[..., :3] * bgra[..., 3:].astype(np.uint16) + 127) // 255

    def _engine(self) -> str:
        engine = str(bpy.context.scene.render.engine)
        return {"SOLID": compat.WORKBENCH, "MATERIAL": compat.EEVEE}.get(self._shading, engine)

    @contextmanager
    def _settings(self, camera: Camera, path: str, *, display: bool) -> Iterator[None]:
        """Makes a render come out like an off-screen picture; puts everything back afterwards."""
        scene, render = bpy.context.scene, bpy.context.scene.render
        height, width = camera.shape
        with ExitStack() as undo:

            def change(owner: Any, **values: Any) -> None:
                for name, value in values.items():
                    before = getattr(owner, name)
                    undo.callback(setattr, owner, name, before.copy() if hasattr(before, "copy") else before)
                    setattr(owner, name, value)

            change(scene, camera=camera.bpy_camera)
            pose = camera.view_matrix.inverted()
            if pose != camera.view_from_bpy(camera.bpy_camera).inverted():  # moved since its view matrix was taken
                change(camera.bpy_camera, matrix_world=pose)
            change(render, resolution_x=width, resolution_y=height, resolution_percentage=100, use_border=False)
            change(render, use_multiview=False, use_compositing=False, use_sequencer=False)
            change(render, filepath=path, use_file_extension=False, use_overwrite=True)
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
                if shown.background_type == "VIEWPORT" and scene.world:  # renders know the world's colour only
                    change(scene.world, color=shown.background_color.copy())
            if render.engine == compat.EEVEE:
                change(scene.eevee, taa_render_samples=max(scene.eevee.taa_samples, 1))
            if render.engine in compat.GL_ENGINES:
                compat.require_gl_library()
            yield
