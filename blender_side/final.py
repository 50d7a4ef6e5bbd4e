"""Pictures by final render (F12): by any engine, in every form of Blender, in display colours or as light."""

from __future__ import annotations

import os
from typing import Any, Literal

import bpy
import numpy as np
from numpy.typing import DTypeLike, NDArray

from blendtorch_shm.errors import ConfigurationError

from . import compat, evaluation
from .camera import Camera, Origin, check_origin
from .changes import Changes
from .evaluation import Evaluation
from .final_camera import look_through
from .publisher import allocate
from .render_files import load_pixels, memory_file, no_room, path_of, put, write_to
from .utils import find_first_view3d

Mode = Literal["rgba", "rgb"]
ColorSpace = Literal["linear", "srgb"]
Shading = Literal["WIREFRAME", "SOLID", "MATERIAL", "RENDERED"]
Engine = Literal["CYCLES", "EEVEE", "WORKBENCH"]

_ENGINES = {"CYCLES": "CYCLES", "EEVEE": compat.EEVEE, "WORKBENCH": compat.WORKBENCH}
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
            engine = bpy.context.scene.render.engine
            if shading == "RENDERED" and engine not in compat.GL_ENGINES:
                why = f" pictures of {engine} are final renders. Choose 'MATERIAL' or 'SOLID', or leave overlays out."
            else:
                why = (
                    f" Blender {bpy.app.version_string} has nothing else in background, or with a display for a transparent film."
                    " 5.1 and later have; for a film that is not transparent, any version has with a display (a virtual one such"
                    " as Xvfb will do)."
                )
            raise ConfigurationError(
                f"shading={shading!r}, overlays={overlays}: a final render shows neither wireframes nor overlays, and{why}"
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
    evaluation.regain_gpu_context()


def _render_light(changes: Changes, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Render (H, W, 4) float32 scene-linear light, multiplied by alpha, the bottom row first."""
    height, width = shape
    with memory_file() as file:
        write_to(changes, file, "OPEN_EXR", color_depth="32", exr_codec="NONE")
        run_render(write_still=True)
        if os.path.getsize(path_of(file)) < height * width * 4 * 4:
            raise no_room(height * width * 4 * 4)
        return load_pixels(path_of(file), 4 * 4)
