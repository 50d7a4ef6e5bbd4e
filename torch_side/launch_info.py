"""Launch information, under the name that users of blendtorch know."""

from blendtorch_shm.launch.info import LaunchInfo

__all__ = ["LaunchInfo"]
