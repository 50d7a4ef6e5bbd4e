"""Which evaluation of the scene a picture shows.

Blender evaluates a scene in two ways. The *viewport* has the viewport levels of modifiers, the displayed part of hair and
particles, and the window's view layer. A *final render* has the render levels and all of the particles, its own visibility
and simplification, and the first view layer that is rendered. Labels have to come from the evaluation that the picture shows.

Python is given the evaluation of a final render only while an engine renders. So there is an engine here that renders
nothing, and reads instead.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import bpy

from blendtorch_shm.errors import ConfigurationError

from . import bootstrap, compat
from .changes import Changes
from .utils import find_first_view3d

if TYPE_CHECKING:
    from .camera import Camera

T = TypeVar("T")
log = logging.getLogger("blendtorch")

_LEAST_PIXELS = 4  # to a side: Blender renders no smaller pictures
_HANDLERS = (
    "frame_change_pre",
    "frame_change_post",
    "depsgraph_update_pre",
    "depsgraph_update_post",
    "render_init",
    "render_pre",
    "render_post",
    "render_stats",
    "render_write",
    "render_complete",
    "render_cancel",
)


@dataclass(frozen=True)
class Evaluation:
    """How a picture is made, as far as that decides what it shows.

    Attributes:
        is_final: whether it is a final render (F12). Otherwise it is drawn as the viewport is.
        engine: what draws or renders it, as this Blender calls it, such as 'CYCLES' or `compat.WORKBENCH`.
        shading: that of the viewport, such as 'SOLID'; "" for final renders.
    """

    is_final: bool
    engine: str
    shading: str = ""

    def read(self, function: Callable[[Any], T], changes: Changes) -> T:
        """Call a function with this evaluation of the scene as it is now.

        A final render evaluates animation anew, and so does this. Look through the camera first
        (`final_camera.look_through`): then what a script changed about animated properties is kept in both. The user's handlers
        are not called.

        Args:
            function: takes a `bpy.types.Depsgraph`, which is gone when it returns.
            changes: puts back what this changes about the scene's settings.

        Returns:
            what the function returns.

        Raises:
            ConfigurationError: Blender cannot render the scene.
        """
        if not self.is_final:
            return function(bpy.context.evaluated_depsgraph_get())
        _spare_pixels(changes)
        changes.set(bpy.context.scene.render, engine=_reading_engine())
        reading = _Reading(function)
        with reading:
            try:
                render()
            except RuntimeError as error:  # what it reports as an error
                if reading.error is None:
                    raise ConfigurationError(f"Blender could not evaluate the scene: {error}".strip()) from error
        if reading.error is not None:
            raise reading.error
        result: T = reading.results[0]
        return result


def of_viewport(shading: str) -> Evaluation:
    """What a viewport in this shading ('SOLID', 'MATERIAL', 'RENDERED', 'WIREFRAME') shows when it is drawn off-screen.

    Where Blender cannot draw that, it is a final render: for engines that trace rays, in background before 5.1, and for a
    transparent film before 4.0.
    """
    engine = {"SOLID": compat.WORKBENCH, "WIREFRAME": compat.WORKBENCH, "MATERIAL": compat.EEVEE}.get(
        shading, str(bpy.context.scene.render.engine)
    )
    if (
        not compat.draws_off_screen()
        or engine not in compat.GL_ENGINES
        or (bpy.context.scene.render.film_transparent and not compat.draws_without_background())
    ):
        return Evaluation(is_final=True, engine=engine)
    return Evaluation(is_final=False, engine=engine, shading=shading)


def regain_gpu_context() -> None:
    """See to it that something can be drawn after a render took Blender's GPU context away: one with Workbench brings it back."""
    if compat.lost_gpu_context():
        with Changes() as changes:
            _spare_pixels(changes)
            changes.set(bpy.context.scene.render, engine=compat.WORKBENCH)
            render()


def render(**options: Any) -> None:
    """Have Blender render the scene as it is, with its settings as they are: the one place where that is asked for.

    Handlers of the user's are not called. Their frame has come already, and what they would change now would be in a picture and
    not in its labels, or the other way round.

    Args:
        options: of `bpy.ops.render.render`.

    Raises:
        ConfigurationError: there is nothing to render: no view layer is.
        RuntimeError: what Blender reports as an error.
    """
    scene = bpy.context.scene
    if not any(layer.use for layer in scene.view_layers):  # there engines crash
        raise ConfigurationError(
            f"The scene {scene.name!r} has no view layer that is used for rendering, so a final render shows nothing: switch"
            " 'Use for Rendering' on for one."
        )
    with _without_users_handlers() as left_out:
        _tell(tuple(name for name in left_out if name.startswith("render_")))
        bpy.ops.render.render(**options)


def _spare_pixels(changes: Changes) -> None:
    """Have the next render make a picture that costs next to nothing."""
    render = bpy.context.scene.render
    percentage = min(100, -(-100 * _LEAST_PIXELS // min(render.resolution_x, render.resolution_y)))
    changes.set(render, use_compositing=False, use_sequencer=False, use_freestyle=False)
    changes.set(render, resolution_percentage=percentage)


# ------------------------------------------------------------------------------------------- whose picture it is


class Renderer(Protocol):
    """What makes pictures."""

    @property
    def camera(self) -> Camera: ...
    @property
    def evaluation(self) -> Evaluation:
        """What its next picture shows."""


_renderers: weakref.WeakSet[Any] = weakref.WeakSet()
_last: weakref.WeakKeyDictionary[Any, Evaluation] = weakref.WeakKeyDictionary()
"""By camera: what the last picture through it showed. For renderers that are gone by now."""


def register(renderer: Renderer) -> Evaluation:
    """Remember a renderer, for labels that do not say whose picture they belong to. Called when it is made, and for each picture.

    Returns:
        what its next picture shows.

    Raises:
        ConfigurationError: this is not the main thread.
    """
    compat.require_main_thread()
    _renderers.add(renderer)
    shown = _last[renderer.camera] = renderer.evaluation
    return shown


def of_pictures_through(camera: Camera) -> Evaluation:
    """What pictures through a camera show: those of its renderers; else of all renderers; else of a viewport drawn now.

    Raises:
        ConfigurationError: they differ.
    """
    renderers = list(_renderers)
    found = {renderer.evaluation for renderer in renderers if renderer.camera is camera}
    if not found and camera in _last:
        return _last[camera]
    found = found or {renderer.evaluation for renderer in renderers}
    if len(found) > 1:
        raise ConfigurationError(
            f"Pictures are made in {len(found)} ways here, which may show different things:"
            f" {', '.join(sorted(map(_describe, found)))}. Say which of them the labels belong to: GroundTruth(...,"
            " renderer=...)."
        )
    return found.pop() if found else of_viewport(_first_shading())


def _describe(evaluation: Evaluation) -> str:
    return f"final renders ({evaluation.engine})" if evaluation.is_final else f"viewport drawing ({evaluation.shading})"


def _first_shading() -> str:
    try:
        return str(find_first_view3d()[1].shading.type)
    except ConfigurationError:  # then nothing is drawn either
        return "SOLID"


# ------------------------------------------------------------------------------------------- the engine that reads


class _Reading:
    """One call of a function by our engine, which cannot be given arguments."""

    current: _Reading | None = None

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self.results: list[Any] = []
        self.error: BaseException | None = None

    def __enter__(self) -> _Reading:
        _Reading.current = self
        return self

    def __exit__(self, *_: object) -> None:
        _Reading.current = None

    def read(self, depsgraph: Any) -> None:
        """Read the first view layer that is rendered: its picture is what is seen. Blender would only print exceptions."""
        if self.error is None and not self.results:
            try:
                self.results.append(self._function(depsgraph))
            except BaseException as error:
                self.error = error


def _reading_engine() -> str:
    """The name of our engine. It stays registered: to unregister it would cost other engines what they keep."""
    if not _ReadingEngine.is_registered:
        bpy.utils.register_class(_ReadingEngine)
    return str(_ReadingEngine.bl_idname)


class _ReadingEngine(bpy.types.RenderEngine):  # type: ignore[misc]
    bl_idname = "BLENDTORCH_READING"
    bl_label = "Labels (blendtorch)"
    bl_use_postprocess = False

    def render(self, depsgraph: Any) -> None:
        if _Reading.current is not None:
            _Reading.current.read(depsgraph)


@contextmanager
def _without_users_handlers() -> Iterator[list[str]]:
    """Keep handlers from taking this for a new frame; which there are. Ours have to know what was evaluated anew."""
    before = {name: list(getattr(bpy.app.handlers, name)) for name in _HANDLERS if hasattr(bpy.app.handlers, name)}
    ours = {name: [one for one in functions if bootstrap.is_ours(one)] for name, functions in before.items()}
    try:
        for name, functions in ours.items():
            getattr(bpy.app.handlers, name)[:] = functions
        yield [name for name in before if len(ours[name]) < len(before[name])]
    finally:
        for name, functions in before.items():
            getattr(bpy.app.handlers, name)[:] = functions


@cache
def _tell(left_out: tuple[str, ...]) -> None:
    """Log once what somebody may wait for."""
    if left_out:
        log.warning(
            "Renders and labels made by blendtorch do not call your handlers %s: what they changed would be in a picture, and not"
            " in its labels. Call those functions before the picture, or after its labels.",
            ", ".join(left_out),
        )
