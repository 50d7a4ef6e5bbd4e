"""What runs inside Blender. Also known as ``blendtorch.btb``.

Publishing and argument parsing work in any Python. The rest needs Blender, and is there when ``bpy`` is.
"""

from importlib.util import find_spec as _find_spec

from .arguments import parse_blendtorch_args
from .publisher import DataPublisher
from .signal import Signal

__all__ = ["DataPublisher", "Signal", "parse_blendtorch_args"]

if _find_spec("bpy") is not None:
    from .animation import AnimationController
    from .camera import Camera
    from .offscreen import OffScreenRenderer

    __all__ += ["AnimationController", "Camera", "OffScreenRenderer"]
