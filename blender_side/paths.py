"""Where scripts find what lies beside their scene."""

from __future__ import annotations

import os
import sys

import bpy

from blendtorch_shm.errors import ConfigurationError


def add_scene_dir_to_path() -> None:
    """Let the script import modules that lie beside the .blend file: append its directory to `sys.path`, once.

    Raises:
        ConfigurationError: the scene was not opened from a file.
    """
    if not bpy.data.filepath:
        raise ConfigurationError(
            "This scene was not opened from a file, so nothing lies beside it: save it, or open it from a file."
        )
    directory = os.path.dirname(bpy.data.filepath)
    if directory not in sys.path:
        sys.path.append(directory)
