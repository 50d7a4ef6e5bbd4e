"""Everything that differs between Blender 3.4 and 5.2, between its forms, and between the devices it draws with.

Blender runs with a window (an executable with a display) or in background (the ``bpy`` module, ``blender -b``). A
window always has a GPU context. In background there is one only from 5.1 on, after ``gpu.init()``; earlier versions
draw nothing off-screen there.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import bpy
import gpu
import numpy as np
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.launch.notes import SOFTWARE_WARNING, is_software, leave_note

from . import trial, triton_guard

log = logging.getLogger("blendtorch")

VERSION: tuple[int, int, int] = tuple(bpy.app.version)
HAS_WINDOW: bool = not bpy.app.background

EEVEE = "BLENDER_EEVEE_NEXT" if (4, 2, 0) <= VERSION < (5, 0, 0) else "BLENDER_EEVEE"
WORKBENCH = "BLENDER_WORKBENCH"
#: Engines that draw with OpenGL, in the viewport and in final renders.
GL_ENGINES = (EEVEE, WORKBENCH)

#: View settings that encode light as sRGB and no more, as solid viewports do.
PLAIN_VIEW = {"view_transform": "Standard", "look": "None", "exposure": 0.0, "gamma": 1.0, "use_curve_mapping": False}
if VERSION >= (4, 3, 0):
    PLAIN_VIEW["use_white_balance"] = False

NEEDED_PACKAGES = "apt-get install -y libegl1 libgl1 libgl1-mesa-dri"

#: What a pixel takes at least in a file that the compositor wrote in half floats: three channels, or the only one of a value.
LEAST_NBYTES_OF_SLOT = 2 if (4, 0, 0) <= VERSION < (4, 5, 0) else 6

#: What a viewport's shading says where it leaves the compositor alone.
NO_COMPOSITOR = "DISABLED" if VERSION >= (3, 5, 0) else False


@cache
def draws_off_screen() -> bool:
    """Whether this Blender can draw its viewport into memory. Makes a GPU context where one has to be asked for.

    Raises:
        ConfigurationError: it should be able to, but OpenGL does not work on this machine.
    """
    if HAS_WINDOW:
        return True
    if not hasattr(gpu, "init"):
        return False
    _probe_gpu_init()
    gpu.init()
    return True


def lost_gpu_context() -> bool:
    """Whether the GPU context is no longer active: drawing would crash Blender.

    In background, a final render by Cycles with a grease pencil leaves it so; with a window, in 3.4, the first one by Cycles.
    """
    if not draws_off_screen.cache_info().currsize or not draws_off_screen():
        return False  # who has not asked yet has no context, and needs none now
    try:
        gpu.types.GPUTexture((1, 1), format="R8")
    except RuntimeError:
        return True
    return False


def _probe_gpu_init() -> None:
    """Try ``gpu.init()`` in a forked child, because where EGL is unusable it crashes the process instead of raising."""
    status, said = trial.run(gpu.init)
    if status != 0:
        raise ConfigurationError(
            f"Blender {bpy.app.version_string} cannot draw off-screen here: gpu.init() ended with status {status}. It needs"
            f" a working EGL with OpenGL 4.3. On Debian and Ubuntu: {NEEDED_PACKAGES}. If they are installed, look at"
            " EGL_PLATFORM, __EGL_VENDOR_LIBRARY_FILENAMES, GALLIUM_DRIVER and LIBGL_* in the environment."
            f" What it said: {said.strip()[-800:] or 'nothing'}"
        )


def renders_spare_gpu_buffers() -> bool:
    """Whether final renders leave alone what was uploaded before. 3.4's Workbench overwrites it when it subdivides on the GPU."""
    return VERSION >= (5, 1, 0)


def require_gl_library() -> None:
    """Raise ConfigurationError where an engine that draws with OpenGL would take a background Blender down."""
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError as error:
        raise ConfigurationError(
            f"EEVEE and Workbench cannot render: {error}. On Debian and Ubuntu: {NEEDED_PACKAGES};"
            " or choose the Cycles engine in the scene, which needs no OpenGL."
        ) from error


def require_main_thread() -> None:
    """Raise ConfigurationError in another thread, where Blender would crash: it draws and renders in its main thread only."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigurationError(
            f"Pictures and labels are made in the main thread only, and this is {threading.current_thread().name!r}: Blender"
            " crashes when another thread draws. Render in the main thread, and let others work on what was rendered."
        )


def require_size(height: int, width: int) -> None:
    """Raise ConfigurationError for a picture larger than OpenGL can draw here. Needs a GPU context."""
    limit = gpu.capabilities.max_texture_size_get()
    if max(height, width) > limit:
        raise ConfigurationError(
            f"A picture of {height} x {width} pixels (height, width) is too large for OpenGL here: at most {limit} to a side"
            f" (GL_MAX_TEXTURE_SIZE of {gl_renderer()}). Make the camera's shape smaller, or have Cycles render it:"
            " FinalRenderer(..., engine='CYCLES')."
        )


def gl_renderer() -> str:
    """What OpenGL reports, e.g. 'Mesa/X.org llvmpipe (LLVM 15.0.6, 256 bits)'. Needs a GPU context."""
    return f"{gpu.platform.vendor_get()} {gpu.platform.renderer_get()}".strip()


@cache
def draws_in_software() -> bool:
    """Whether OpenGL runs on the CPU. Needs a GPU context."""
    if not is_software(gl_renderer()):
        return False
    triton_guard.install()
    return True


@cache
def draws_without_background() -> bool:
    """Whether off-screen drawing can leave out what is behind the scene, so that alpha says what is covered."""
    return "draw_background" in (gpu.types.GPUOffScreen.draw_view3d.__doc__ or "")


def flips_on_gpu() -> bool:
    """Whether turning a picture upside down is cheaper on the GPU than as one flipped copy by the CPU.

    On a GPU the blit costs next to nothing and the read-back then lands in its final place. Software OpenGL is the
    CPU, and slower at it than numpy. Draw excluded, read-back and flip included, RGBA, llvmpipe on 2 cores, ms
    (flipped copy / blit):

    ==========  ==============  ==============
    frame       5.2.3           3.4.1
    ==========  ==============  ==============
    321x240     0.05 / 0.45     0.03 / 0.50
    640x480     0.12 / 0.84     0.15 / 2.9
    1920x1080   1.3 / 23        1.6 / 18
    ==========  ==============  ==============

    Both give exactly the same bytes, in both versions.
    """
    return not draws_in_software()


def disable_viewport_antialiasing() -> None:
    """Make off-screen drawing take one sample per pixel.

    5.x applies this preference off-screen too (moving cube, SOLID, 320x240: 18 ms 'OFF', 85 to 119 ms '8', and
    colours that are not those of the objects along every edge); 3.4 does not.
    """
    bpy.context.preferences.system.viewport_aa = "OFF"


def shades_wire_objects(shading: str) -> bool:
    """Whether a viewport shaded like that draws the surface of objects that are displayed as wire or as bounds."""
    return VERSION >= (4, 2, 0) and shading == "RENDERED"


def hides_from_camera(engine: str) -> bool:
    """Whether an engine leaves out what is not visible to the camera (ray visibility)."""
    return engine != WORKBENCH and (engine != EEVEE or VERSION >= (4, 2, 0))


def heeds_layers_surfaces(engine: str) -> bool:
    """Whether an engine shows no surfaces where the view layer's filter has them off (`use_solid`)."""
    return engine != WORKBENCH and (engine != EEVEE or VERSION >= (4, 2, 0))


def corner_normals(mesh: Any) -> NDArray[np.float32]:
    """The normals that a mesh is shaded with, (C, 3), one for each corner of a face."""
    normals = np.empty((len(mesh.loops), 3), np.float32)
    if VERSION >= (4, 1, 0):
        mesh.corner_normals.foreach_get("vector", normals.reshape(-1))
    else:
        mesh.calc_normals_split()
        mesh.loops.foreach_get("normal", normals.reshape(-1))
    return normals


def draw_instances(batch: Any, shader: Any, first: int, number: int) -> None:
    """Draw a `GPUBatch` a number of times. The shader's uniform `first` plus `gl_InstanceID` counts up from `first`."""
    if hasattr(batch, "draw_instanced"):
        shader.uniform_int("first", first)
        batch.draw_instanced(shader, instance_start=0, instance_count=number)
    else:  # 3.4
        for i in range(first, first + number):
            shader.uniform_int("first", i)
            batch.draw(shader)


def let_write_depth(info: Any) -> None:
    """Let the fragment shader of a `gpu.types.GPUShaderCreateInfo` write ``gl_FragDepth``. In 3.4 every shader may."""
    if hasattr(info, "depth_write"):
        info.depth_write("ANY")


def set_file_format(image_settings: Any, file_format: str, **values: Any) -> Callable[[], None]:
    """Choose the format of still images. 5.0 and later want to know first that it is none of a video.

    Args:
        image_settings: `bpy.types.ImageFormatSettings`.
        file_format: such as 'OPEN_EXR'.
        values: other settings, of which a format may allow some values only.

    Returns:
        a function that restores all of that, and what Blender changed by itself because the new format does not know it.
    """
    wanted = {"media_type": "IMAGE"} if hasattr(image_settings, "media_type") else {}
    wanted |= {"file_format": file_format, **values}
    names = [*wanted, "color_mode", "color_depth"]
    before = {name: getattr(image_settings, name) for name in names}

    def put(values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(image_settings, name, value)

    put(wanted)
    return lambda: put(before)


def compositor_tree(scene: Any) -> Any:
    """The nodes of a scene's compositor (`bpy.types.CompositorNodeTree`), or None if it does not use one.

    5.0 made it a node group that scenes share. Scenes saved by older versions are converted when they are opened; nodes and
    slots keep their names.
    """
    if VERSION >= (5, 0, 0):
        return scene.compositing_node_group
    return scene.node_tree if scene.use_nodes else None


def how_to_compose() -> str:
    """What a user does so that a scene has :func:`compositor_tree`."""
    if VERSION >= (5, 0, 0):
        return "give it a node group (New in the Compositor, or scene.compositing_node_group = ...)"
    return "switch on 'Use Nodes' there"


def output_names(node: Any) -> list[str]:
    """The names of a File Output node's slots, in the order of its inputs, as the interface shows them."""
    if VERSION >= (5, 0, 0):
        return [str(item.name) for item in node.file_output_items]
    if node.format.file_format == "OPEN_EXR_MULTILAYER":
        return [str(slot.name) for slot in node.layer_slots]
    return [str(slot.path) for slot in node.file_slots]


def output_folder(node: Any) -> str:
    """Where a File Output node writes; may be relative to the scene's file (``//``)."""
    if VERSION >= (5, 0, 0):
        return str(node.directory)
    # before 5.0 the base path of a multilayer file is that of the file
    return os.path.dirname(node.base_path) if node.format.file_format == "OPEN_EXR_MULTILAYER" else str(node.base_path)


def redirect_output(change: Callable[..., None], node: Any, folder: str, prefixes: list[str]) -> None:
    """Let a File Output node write a file per slot, in the node's own format.

    Args:
        change: sets attributes: ``change(owner, name=value, ...)``.
        node: the node. Its format is one for a single layer.
        folder: where to.
        prefixes: of the names of the files, one for each slot.
    """
    if VERSION >= (5, 0, 0):
        change(node, directory=folder, file_name="")
        for item, prefix in zip(node.file_output_items, prefixes, strict=True):
            change(item, name=prefix, override_node_format=False, save_as_render=True)
    else:
        change(node, base_path=folder)
        for slot, prefix in zip(node.file_slots, prefixes, strict=True):
            change(slot, path=prefix, use_node_format=True, save_as_render=True)


def curves(animation: Any) -> list[Any]:
    """The F-curves of the action of `bpy.types.AnimData`. From 4.4 on, an action has some for each of its slots."""
    action = animation.action
    slot = getattr(animation, "action_slot", None)
    if not hasattr(action, "layers") or slot is None:
        return list(getattr(action, "fcurves", ()))
    bags = [strip.channelbag(slot) for layer in action.layers for strip in layer.strips]
    return [curve for bag in bags if bag is not None for curve in bag.fcurves]


@cache
def report(description: str) -> None:
    """Tell the launcher, and once the log, what this instance renders with; where no launcher does, warn of software."""
    log.warning("renders with %s. The first frame compiles shaders, which can take some seconds.", description)
    is_told = False
    try:
        is_told = leave_note("renderer", description) and is_software((_reported or [description])[0])
    except OSError as error:  # a full disk must not stop the rendering
        log.error("Cannot report to the launcher: %s", error)
    if is_software(description):
        triton_guard.install()
        if not is_told:
            _warn_of_software()
    _reported.append(description)


_reported: list[str] = []
"""What was reported. The launcher reads the first."""


@cache
def _warn_of_software() -> None:
    log.warning("%s", SOFTWARE_WARNING)
