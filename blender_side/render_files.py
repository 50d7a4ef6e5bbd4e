"""What a render made, read from the file that Blender writes; and light, encoded for display.

What a render produced cannot be read from Python in background (the Render Result is empty, and there is no Viewer). So
Blender writes it as an uncompressed file of 32-bit floats that exists in memory only. Display colours are made of these: Blender
encodes them, by writing another such file of 8 bits a channel. docs/final_renders.md has the figures; next to most renders it is
nothing.
"""

from __future__ import annotations

import os
import shutil
import struct
from typing import Any

import bpy
import numpy as np
from numpy.typing import NDArray

from blendtorch_shm.errors import OutOfSharedMemory
from blendtorch_shm.launch.address import SHARED_MEMORY

from . import compat
from .changes import Changes

_TGA_HEADER_NBYTES = 18
_EXR_HEADER_NBYTES = 65536
"""More than what comes before the pixels of an OpenEXR file."""


def memory_file() -> Any:
    return os.fdopen(os.memfd_create("blendtorch-render"), "rb")


def path_of(file: Any) -> str:
    return f"/proc/self/fd/{file.fileno()}"


def write_to(changes: Changes, file: Any, file_format: str, **values: Any) -> None:
    render = bpy.context.scene.render
    changes.set(render, filepath=path_of(file), use_file_extension=False, use_overwrite=True)
    changes.set_file_format(render.image_settings, file_format, color_mode="RGBA", **values)
    changes.set(render.image_settings, color_management="FOLLOW_SCENE")


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
        with Changes() as changes, memory_file() as file:
            changes.set_file_format(stills, "TARGA_RAW", color_mode="RGBA")
            changes.set(stills, color_management="OVERRIDE" if plain else "FOLLOW_SCENE")
            if plain:
                changes.set(stills.display_settings, display_device="sRGB")
                changes.set(stills.view_settings, **compat.PLAIN_VIEW)
            image.save_render(path_of(file), scene=bpy.context.scene)
            file.seek(_TGA_HEADER_NBYTES)
            bgra = np.fromfile(file, np.uint8, light.size)
    except RuntimeError as error:
        raise no_room(light.size) from error
    finally:
        bpy.data.images.remove(image)
    if bgra.size != light.size:
        raise no_room(light.size)
    return np.ascontiguousarray(bgra.reshape(light.shape)[..., [2, 1, 0, 3]])
