"""What runs in training. Also known as ``blendtorch.btt``.

Launching needs no torch; it is imported with the first use of a dataset.
"""

from typing import TYPE_CHECKING

from blendtorch_shm import __version__, errors
from blendtorch_shm.errors import *
from blendtorch_shm.launch.info import LaunchInfo
from blendtorch_shm.lazy import lazy
from blendtorch_shm.stream.stats import stats

from .finder import discover_blender
from .launcher import BlenderLauncher

if TYPE_CHECKING:
    from . import colors, env
    from .collation import pooled_collate
    from .dataset import FileDataset, RemoteIterableDataset, SingleFileDataset
    from .duplex import DuplexChannel
    from .env import BlenderEnv, BlenderVectorEnv, OpenAIRemoteEnv, RemoteEnv, launch_env
    from .frame_loader import FrameLoader
    from .parameters import Parameters
    from .recordings.reader import FileReader
    from .recordings.recorder import FileRecorder
    from .recordings.verification import verify_recording

__all__ = [
    "BlenderEnv",
    "BlenderLauncher",
    "BlenderVectorEnv",
    "DuplexChannel",
    "FileDataset",
    "FileReader",
    "FileRecorder",
    "FrameLoader",
    "LaunchInfo",
    "OpenAIRemoteEnv",
    "Parameters",
    "RemoteEnv",
    "RemoteIterableDataset",
    "SingleFileDataset",
    "__version__",
    "colors",
    "discover_blender",
    "env",
    "launch_env",
    "pooled_collate",
    "stats",
    "verify_recording",
]
__all__ += errors.__all__

_HOMES = {
    "BlenderEnv": "env",
    "BlenderVectorEnv": "env",
    "DuplexChannel": "duplex",
    "FileDataset": "dataset",
    "FileReader": "recordings.reader",
    "FileRecorder": "recordings.recorder",
    "FrameLoader": "frame_loader",
    "OpenAIRemoteEnv": "env",
    "Parameters": "parameters",
    "RemoteEnv": "env",
    "RemoteIterableDataset": "dataset",
    "SingleFileDataset": "dataset",
    "launch_env": "env",
    "pooled_collate": "collation",
    "verify_recording": "recordings.verification",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, __all__)
