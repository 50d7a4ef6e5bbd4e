"""The version, under the name that users of blendtorch know."""

from blendtorch_shm import __version__

__all__ = ["__version__"]
