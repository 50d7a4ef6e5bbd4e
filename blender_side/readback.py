"""Reading a picture back while the graphics card is still drawing it: OpenGL's pixel buffers, which Blender does not offer.

`glReadPixels` into a pixel buffer is one more command in OpenGL's queue, behind the drawing: it returns at once, and what is
queued later does not delay it. Whoever maps the buffer waits until that command was carried out (OpenGL 4.6, 18.2 and 6.3).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import gpu
import numpy as np
from numpy.typing import NDArray

from blendtorch_shm.errors import ConfigurationError

# From the OpenGL registry, glcorearb.h.
_RENDERER = 0x1F01
_UNSIGNED_BYTE = 0x1401
_FORMATS = {3: 0x1907, 4: 0x1908}  # RGB, RGBA
_PACK_ALIGNMENT = 0x0D05
_PIXEL_PACK_BUFFER = 0x88EB
_STREAM_READ = 0x88E1
_READ_ONLY = 0x88B8


@cache
def _gl() -> Any:
    """The OpenGL library, if it is the one that Blender draws with here; else None."""
    try:
        library = ctypes.CDLL("libGL.so.1")
    except OSError:
        return None
    library.glGetString.restype = ctypes.c_char_p
    library.glMapBuffer.restype = ctypes.c_void_p
    library.glBufferData.argtypes = [ctypes.c_uint, ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_uint]
    renderer = library.glGetString(_RENDERER)  # None where another library's context is current, or one of Vulkan
    return library if renderer is not None and renderer.decode() == gpu.platform.renderer_get() else None


def is_available() -> bool:
    """Whether pictures can be read back later. Needs a GPU context."""
    return _gl() is not None


class PixelBuffer:
    """Memory of OpenGL's for one picture of `shape` (H, W, 3) or (H, W, 4), uint8."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._nbytes = int(np.prod(shape))
        name = ctypes.c_uint()
        gl = _gl()
        gl.glGenBuffers(1, ctypes.byref(name))
        self._name = name.value
        gl.glBindBuffer(_PIXEL_PACK_BUFFER, self._name)
        gl.glBufferData(_PIXEL_PACK_BUFFER, self._nbytes, None, _STREAM_READ)
        gl.glBindBuffer(_PIXEL_PACK_BUFFER, 0)

    def read(self) -> None:
        """Queue reading the bound frame buffer's colours, bottom row first, and have the queue worked on."""
        height, width, channels = self.shape
        gl = _gl()
        gl.glBindBuffer(_PIXEL_PACK_BUFFER, self._name)
        gl.glPixelStorei(_PACK_ALIGNMENT, 1)
        gl.glReadPixels(0, 0, width, height, _FORMATS[channels], _UNSIGNED_BYTE, None)
        gl.glBindBuffer(_PIXEL_PACK_BUFFER, 0)
        gl.glFlush()

    @contextmanager
    def picture(self) -> Iterator[NDArray[np.uint8]]:
        """Wait until the picture is here; it lasts as long as the context.

        Raises:
            ConfigurationError: OpenGL has run out of memory.
        """
        gl = _gl()
        gl.glBindBuffer(_PIXEL_PACK_BUFFER, self._name)
        address = gl.glMapBuffer(_PIXEL_PACK_BUFFER, _READ_ONLY)
        try:
            if address is None:
                raise ConfigurationError(
                    f"OpenGL has no memory for a picture of {self._nbytes / 1e6:.2f} MB: read pending pictures before more are"
                    " rendered, or use render()."
                )
            yield np.ctypeslib.as_array((ctypes.c_uint8 * self._nbytes).from_address(address)).reshape(self.shape)
        finally:
            if address is not None:
                gl.glUnmapBuffer(_PIXEL_PACK_BUFFER)
            gl.glBindBuffer(_PIXEL_PACK_BUFFER, 0)

    def free(self) -> None:
        """Give the memory back."""
        _gl().glDeleteBuffers(1, ctypes.byref(ctypes.c_uint(self._name)))
