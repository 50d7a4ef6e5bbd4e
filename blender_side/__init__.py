"""What runs inside Blender. Also known as ``blendtorch.btb``.

Publishing and argument parsing work in any Python. The rest needs Blender, and imports ``bpy`` when it is first used.
"""

from typing import TYPE_CHECKING

from blendtorch_shm import __version__, errors
from blendtorch_shm.errors import *
from blendtorch_shm.lazy import lazy

from .arguments import parse_blendtorch_args
from .publisher import DataPublisher
from .signal import Signal

if TYPE_CHECKING:
    from . import env, materials, utils
    from .animation import AnimationController
    from .camera import Camera
    from .compositor import CompositeRenderer, CompositeSelection
    from .duplex import DuplexChannel
    from .final import FinalRenderer
    from .ground_truth import GroundTruth
    from .offscreen import OffScreenRenderer
    from .parameters import Parameters
    from .paths import add_scene_dir_to_path

__all__ = [
    "AnimationController",
    "Camera",
    "CompositeRenderer",
    "CompositeSelection",
    "DataPublisher",
    "DuplexChannel",
    "FinalRenderer",
    "GroundTruth",
    "OffScreenRenderer",
    "Parameters",
    "Signal",
    "__version__",
    "add_scene_dir_to_path",
    "env",
    "materials",
    "parse_blendtorch_args",
    "utils",
]
__all__ += errors.__all__

_HOMES = {
    "AnimationController": "animation",
    "Camera": "camera",
    "CompositeRenderer": "compositor",
    "CompositeSelection": "compositor",
    "DuplexChannel": "duplex",
    "FinalRenderer": "final",
    "GroundTruth": "ground_truth",
    "OffScreenRenderer": "offscreen",
    "Parameters": "parameters",
    "add_scene_dir_to_path": "paths",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, __all__)
