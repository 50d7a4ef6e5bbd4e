"""What runs in training. Also known as ``blendtorch.btt``.

Launching needs no torch; it is imported with the first use of a dataset.
"""

from typing import TYPE_CHECKING, Any

from blendtorch_shm.errors import BlendtorchError, InstanceDied, LaunchError, StreamTimeout
from blendtorch_shm.launch_info import LaunchInfo
from blendtorch_shm.stats import stats

from .finder import discover_blender
from .launcher import BlenderLauncher

if TYPE_CHECKING:
    from .dataset import RemoteIterableDataset

__all__ = [
    "BlenderLauncher",
    "BlendtorchError",
    "InstanceDied",
    "LaunchError",
    "LaunchInfo",
    "RemoteIterableDataset",
    "StreamTimeout",
    "discover_blender",
    "stats",
]


def __getattr__(name: str) -> Any:
    if name in ("RemoteIterableDataset", "dataset"):
        from importlib import import_module

        module = import_module(".dataset", __name__)
        return module if name == "dataset" else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
