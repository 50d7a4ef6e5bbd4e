"""Launch information, under the name that users of blendtorch know."""

from blendtorch_shm.launch_info import LaunchInfo

__all__ = ["LaunchInfo"]
