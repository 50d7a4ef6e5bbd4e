"""What a launch is asked for: the arguments of ``BlenderLauncher`` and of ``blendtorch-launch``, checked once, here.

Each field of :class:`LaunchConfig` says twice what fits it: as a type, which msgspec checks, and in words, for the error.
Python and JSON differ only in how that error shows the value.
"""

from __future__ import annotations

import contextlib
import difflib
import operator
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from blendtorch_shm.errors import ConfigurationError, SceneNotFound, ScriptNotFound
from blendtorch_shm.launch.address import MAX_SOCKET_NAME, is_socket_name

from .ports import DEFAULT_START_PORT

Restart = Literal["never", "on-failure", "always"]

_NUM_SEEDS = 2**31
_LONGEST_SHOWN = 100
"""Characters of a value in an error."""


def _random_seed() -> int:
    return random.randrange(_NUM_SEEDS)


class LaunchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A launch that can work, as far as that can be known before it begins.

    The fields are the arguments of ``BlenderLauncher``, which explains them. Make one with :meth:`from_arguments`::

        config = LaunchConfig.from_arguments({"scene": "cube.blend", "script": "cube.blend.py", "num_instances": 2})
    """

    scene: Annotated[str | None, 'the path of a .blend file, or "" for the start-up scene']
    script: Annotated[str, "the path of a Python script"]
    num_instances: Annotated[int, Meta(ge=1, le=9999), "an int from 1 to 9999"] = 1
    named_sockets: Annotated[list[str], 'a list of names, such as ["DATA"]'] = []
    start_port: Annotated[int, Meta(ge=1, le=65535), "an int from 1 to 65535"] = DEFAULT_START_PORT
    bind_addr: Annotated[
        str, Meta(min_length=1), 'an IPv4 address or a host name, such as "127.0.0.1" or "primaryip"'
    ] = "127.0.0.1"
    instance_args: Annotated[
        list[list[str | bool | int | float]],
        'a list with one list of arguments per instance, such as [["--color", "red"], ["--size", 3]]',
    ] = []
    proto: Annotated[Literal["tcp"], '"tcp" (on this host, shared memory is used in any case)'] = "tcp"
    blend_path: Annotated[str | list[str] | None, "a directory, or a list of directories, to look for Blender in"] = (
        None
    )
    seed: Annotated[int, Meta(ge=0, lt=_NUM_SEEDS), f"an int from 0 to {_NUM_SEEDS - 1}"] = msgspec.field(
        default_factory=_random_seed
    )
    background: Annotated[bool, "true or false"] = False
    blender: Annotated[str | None, 'the path of a Blender executable or of a Python that has bpy, or "python"'] = None
    env: Annotated[
        dict[str, str] | list[dict[str, str]], "a dict of str to str, or a list with one such dict per instance"
    ] = {}
    progress: Annotated[bool, "true or false"] = True
    restart: Annotated[Restart, '"never", "on-failure" or "always"'] = "never"
    max_restarts: Annotated[int, Meta(ge=0), "an int, 0 or more"] = 5
    recycle_after: Annotated[Annotated[int, Meta(ge=1)] | None, "a number of messages, 1 or more"] = None
    stall_timeout: Annotated[Annotated[float, Meta(gt=0)] | None, "a positive number of seconds"] = None
    allow_unauthenticated: Annotated[bool, "true or false"] = False
    log_dir: Annotated[Annotated[str, Meta(min_length=1)] | None, "the path of a folder"] = None
    max_log_mb: Annotated[Annotated[float, Meta(gt=0)] | None, "a positive number of megabytes"] = 20
    follow: Annotated[bool, "true or false"] = False

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], show: Callable[[Any], str] = repr) -> LaunchConfig:
        """Check arguments. None stands for the default of `named_sockets`, `instance_args`, `seed` and `env`.

        Args:
            arguments: name -> value. Tuples, paths and numpy's numbers do as well as what JSON has.
            show: writes a name or a value as the user would, for errors.

        Raises:
            ConfigurationError: some cannot work. The message has a line about each.
            SceneNotFound, ScriptNotFound: the file does not exist.
        """
        fields = {field.name: field for field in msgspec.structs.fields(cls)}
        problems = [f"{show(name)} is missing." for name, f in fields.items() if f.required and name not in arguments]
        values: dict[str, Any] = {}
        for name, given in arguments.items():
            if name not in fields:
                nearest = difflib.get_close_matches(name, fields, 1)
                hint = f"Did you mean {show(nearest[0])}?" if nearest else f"There are: {', '.join(fields)}."
                problems.append(f"{show(name)} is not an argument of BlenderLauncher. {hint}")
            elif given is not None or fields[name].default_factory is msgspec.NODEFAULT:
                try:
                    values[name] = msgspec.convert(_plain(given), fields[name].type)
                except msgspec.ValidationError as error:
                    where = str(error).partition(" - at `$")[2].rstrip("`")
                    where = f" (see {name}{where})" if where and "." not in where else ""
                    problems.append(f"{name} must be {_WORDS[name]}, not {_shortened(show(given))}{where}.")
        if problems:
            raise ConfigurationError("\n".join(problems))
        config = cls(**values)
        if problems := list(config._contradictions(show)):
            raise ConfigurationError("\n".join(problems))
        return msgspec.structs.replace(
            config,
            scene=_existing_file("scene", config.scene, SceneNotFound) if config.scene else None,
            script=_existing_file("script", config.script, ScriptNotFound),
            log_dir=None if config.log_dir is None else os.path.abspath(os.path.expanduser(config.log_dir)),
        )

    def seed_of(self, btid: int, restarts: int) -> int:
        """The ``-btseed`` of an instance that was started again so many times.

        No two starts have the same seed, of whichever instances: a restarted script would draw again what it drew before.
        """
        return (self.seed + btid + restarts * self.num_instances) % _NUM_SEEDS

    def arguments_of(self, btid: int) -> list[str]:
        """The further arguments of an instance's script."""
        return [str(argument) for argument in self.instance_args[btid]] if self.instance_args else []

    def variables_of(self, btid: int) -> dict[str, str]:
        """The further environment variables of an instance."""
        return self.env if isinstance(self.env, dict) else self.env[btid] if self.env else {}

    def _contradictions(self, show: Callable[[Any], str]) -> Iterator[str]:
        """What is wrong although each argument has the right type."""
        for name in self.named_sockets:
            if not is_socket_name(name):
                yield (
                    f"named_sockets: {show(name)} cannot be a name. Use 1 to {MAX_SOCKET_NAME} characters, without = and "
                    f"without - at the beginning; a space counts for 3, a letter beyond ASCII for 6 to 12."
                )
        if len(set(self.named_sockets)) < len(self.named_sockets):
            yield f"named_sockets has a name twice: {_shortened(show(self.named_sockets))}."
        for name, per_instance, what in (("instance_args", self.instance_args, "lists"), ("env", self.env, "dicts")):
            if isinstance(per_instance, list) and per_instance and len(per_instance) != self.num_instances:
                yield (
                    f"{name} has {len(per_instance)} {what} for {self.num_instances} instances "
                    f"(num_instances). It must be {_WORDS[name]}."
                )
        for name, value in (("recycle_after", self.recycle_after), ("stall_timeout", self.stall_timeout)):
            if value is not None and not self.named_sockets:
                yield f"{name}={show(value)} needs named_sockets: it looks at what is published there."


_WORDS: dict[str, str] = {field.name: field.type.__metadata__[-1] for field in msgspec.structs.fields(LaunchConfig)}
"""What fits each argument."""


def _plain(value: Any) -> Any:
    """`value` as JSON would have it: paths as str, tuples and iterators as lists, numpy's numbers as Python's."""
    if value is None or isinstance(value, (bool, bytes)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (Sequence, Iterator)):
        return [_plain(item) for item in value]
    with contextlib.suppress(TypeError):
        return operator.index(value)
    return value


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 4]} ..."


def _existing_file(name: str, given: str, error: type[SceneNotFound] | type[ScriptNotFound]) -> str:
    path = os.path.abspath(os.path.expanduser(given))
    if not os.path.isfile(path):
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise error(f"{name} {given!r} {what} (looked for {path}).")
    return path
