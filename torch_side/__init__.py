"""What runs in training. Also known as ``blendtorch.btt``.

Launching needs no torch; it is imported with the first use of a dataset.
"""

from typing import TYPE_CHECKING, Any

from blendtorch_shm import __version__, errors
from blendtorch_shm.errors import *
from blendtorch_shm.launch.info import LaunchInfo
from blendtorch_shm.stream.stats import stats

from .finder import discover_blender
from .launcher import BlenderLauncher

if TYPE_CHECKING:
    from . import colors
    from .collation import pooled_collate
    from .dataset import FileDataset, RemoteIterableDataset, SingleFileDataset
    from .frame_loader import FrameLoader
    from .recording import FileReader, FileRecorder

__all__ = [
    "BlenderLauncher",
    "FileDataset",
    "FileReader",
    "FileRecorder",
    "FrameLoader",
    "LaunchInfo",
    "RemoteIterableDataset",
    "SingleFileDataset",
    "__version__",
    "colors",
    "discover_blender",
    "pooled_collate",
    "stats",
]
__all__ += errors.__all__


_LAZY = {
    "FileDataset": "dataset",
    "FileReader": "recording",
    "FileRecorder": "recording",
    "FrameLoader": "frame_loader",
    "RemoteIterableDataset": "dataset",
    "SingleFileDataset": "dataset",
    "pooled_collate": "collation",
}


def __getattr__(name: str) -> Any:
    home = _LAZY.get(name, name)
    if home in ("collation", "colors", "dataset", "frame_loader", "recording"):
        from importlib import import_module

        module = import_module(f".{home}", __name__)
        return module if name == home else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
