"""Environments in Blender: to act in, one or many, with gymnasium or as blendtorch has them."""

from typing import TYPE_CHECKING

from blendtorch_shm.lazy import lazy

from .environments.old import OpenAIRemoteEnv, RemoteEnv, launch_env

if TYPE_CHECKING:
    from .environments.single import BlenderEnv
    from .environments.vector import BlenderVectorEnv

__all__ = ["BlenderEnv", "BlenderVectorEnv", "OpenAIRemoteEnv", "RemoteEnv", "launch_env"]

_HOMES = {"BlenderEnv": "single", "BlenderVectorEnv": "vector"}

__getattr__, __dir__ = lazy("torch_side.environments", _HOMES, __all__)
