"""What runs inside Blender. Also known as ``blendtorch.btb``.

Publishing and argument parsing work in any Python. The rest needs Blender, and imports ``bpy`` when it is first used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from blendtorch_shm.errors import PublishError

from .arguments import parse_blendtorch_args
from .publisher import DataPublisher
from .signal import Signal

if TYPE_CHECKING:
    from . import utils
    from .animation import AnimationController
    from .camera import Camera
    from .offscreen import OffScreenRenderer

__all__ = [
    "AnimationController",
    "Camera",
    "DataPublisher",
    "OffScreenRenderer",
    "PublishError",
    "Signal",
    "parse_blendtorch_args",
    "utils",
]

_NEEDS_BLENDER = {
    "AnimationController": "animation",
    "Camera": "camera",
    "OffScreenRenderer": "offscreen",
}
_MODULES = ("animation", "camera", "compat", "final", "offscreen", "utils")


def __getattr__(name: str) -> Any:
    if name in _NEEDS_BLENDER:
        return getattr(_import_module(f"{__name__}.{_NEEDS_BLENDER[name]}"), name)
    if name in _MODULES:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
