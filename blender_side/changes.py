"""What is changed about Blender's data for a moment, and put back."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import bpy

from . import compat


class Changes(ExitStack):
    """What is changed about Blender's data for one render, and put back at the end of the ``with`` block."""

    def set(self, owner: Any, **values: Any) -> None:
        """Set attributes of `owner`, in the given order; they are put back in reverse order."""
        for name, value in values.items():
            before = getattr(owner, name)
            if isinstance(
                before, bpy.types.bpy_prop_array
            ):  # a view of what changes next; so are vectors and their like
                before = tuple(before)
            elif hasattr(before, "copy") and not isinstance(before, bpy.types.bpy_struct):
                before = before.copy()
            self.callback(setattr, owner, name, before)
            setattr(owner, name, value)

    def set_file_format(self, image_settings: Any, file_format: str, **values: Any) -> None:
        """Choose the format of still images and settings that depend on it, such as ``color_depth``."""
        self.callback(compat.set_file_format(image_settings, file_format, **values))
