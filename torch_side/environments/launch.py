"""Instances for environments, and the arguments of their scripts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blendtorch_shm.errors import ConfigurationError
from blendtorch_shm.launch.address import Address

from ..launcher import BlenderLauncher

SOCKET = "GYM"
"""The name of the socket at which an environment listens."""
_OURS = ("scene", "script", "num_instances", "named_sockets", "background")


def name_of(script: str | os.PathLike[str] | None) -> str:
    """A script, for messages; None: of an instance that was not launched here."""
    return "The script" if script is None else os.path.basename(script)


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments of a script.

    >>> flags({"render_every": 10, "real_time": False})
    ['--render-every', '10', '--no-real-time']
    """
    found = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}", str(value)]
    return found


@contextlib.contextmanager
def launched(
    scene: str | os.PathLike[str],
    script: str | os.PathLike[str],
    num_instances: int,
    background: bool,
    launch_args: Mapping[str, Any] | None,
    arguments: Mapping[str, Any],
) -> Iterator[Sequence[Address]]:
    """Instances of a script; the addresses of their environments.

    Args:
        scene, script, background: as for :class:`~torch_side.BlenderLauncher`.
        num_instances: how many.
        launch_args: what else the launcher is told, such as ``{"blender": "python", "restart": "on-failure"}``.
        arguments: of the script, see :func:`flags`.

    Raises:
        ConfigurationError: `launch_args` has what is an argument of its own.
        and what :class:`~torch_side.BlenderLauncher` raises.
    """
    others = dict(launch_args or {})
    for name in _OURS:
        if name in others:
            raise ConfigurationError(
                f"launch_args has {name!r}, which is an argument of its own: {name}={others[name]!r}."
            )
    own = others.pop("instance_args", None) or [[] for _ in range(num_instances)]
    if len(own) != num_instances:
        raise ConfigurationError(f"launch_args has instance_args for {len(own)} instances; there are {num_instances}.")
    with BlenderLauncher(
        scene,
        script,
        num_instances=num_instances,
        named_sockets=[SOCKET],
        instance_args=[[*map(str, each), *flags(arguments)] for each in own],
        background=background,
        **others,
    ) as launcher:
        yield launcher.launch_info.addresses[SOCKET]
