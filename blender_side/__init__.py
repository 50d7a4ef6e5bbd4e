"""What runs inside Blender. Also known as ``blendtorch.btb``.

Publishing and argument parsing work in any Python. The rest needs Blender, and imports ``bpy`` when it is first used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from blendtorch_shm import __version__, errors
from blendtorch_shm.errors import *

from .arguments import parse_blendtorch_args
from .publisher import DataPublisher
from .signal import Signal

if TYPE_CHECKING:
    from . import materials, utils
    from .animation import AnimationController
    from .camera import Camera
    from .compositor import CompositeRenderer, CompositeSelection
    from .final import FinalRenderer
    from .ground_truth import GroundTruth
    from .offscreen import OffScreenRenderer
    from .paths import add_scene_dir_to_path

__all__ = [
    "AnimationController",
    "Camera",
    "CompositeRenderer",
    "CompositeSelection",
    "DataPublisher",
    "FinalRenderer",
    "GroundTruth",
    "OffScreenRenderer",
    "Signal",
    "__version__",
    "add_scene_dir_to_path",
    "materials",
    "parse_blendtorch_args",
    "utils",
]
__all__ += errors.__all__

_NEEDS_BLENDER = {
    "AnimationController": "animation",
    "Camera": "camera",
    "CompositeRenderer": "compositor",
    "CompositeSelection": "compositor",
    "FinalRenderer": "final",
    "GroundTruth": "ground_truth",
    "OffScreenRenderer": "offscreen",
    "add_scene_dir_to_path": "paths",
}
_MODULES = {*_NEEDS_BLENDER.values(), "materials", "utils"}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_BLENDER:
        return getattr(_import_module(f"{__name__}.{_NEEDS_BLENDER[name]}"), name)
    if name in _MODULES:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
