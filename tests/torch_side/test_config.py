"""The arguments of a launch, checked without launching anything."""

import inspect
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from blendtorch_shm.errors import ConfigurationError, SceneNotFound, ScriptNotFound
from torch_side.launcher import BlenderLauncher
from torch_side.launching.config import LaunchConfig


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., LaunchConfig]:
    """Make a configuration of arguments and a script that exists."""
    script = tmp_path / "script.py"
    script.touch()

    def make(show: Callable[[Any], str] = repr, **arguments: Any) -> LaunchConfig:
        return LaunchConfig.from_arguments({"scene": "", "script": script, **arguments}, show)

    return make


def test_its_fields_are_the_arguments_of_the_launcher_with_the_same_defaults(
    config: Callable[..., LaunchConfig],
) -> None:
    parameters = inspect.signature(BlenderLauncher).parameters
    assert LaunchConfig.__struct_fields__ == tuple(parameters)
    required = {field.name for field in msgspec.structs.fields(LaunchConfig) if field.required}
    assert required == {name for name, p in parameters.items() if p.default is p.empty}
    left_out = config(seed=1)
    given = config(**{name: p.default for name, p in parameters.items() if name not in required} | {"seed": 1})
    assert left_out == given


def test_a_launcher_has_its_arguments_as_attributes_as_in_blendtorch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.touch()
    launcher: Any = BlenderLauncher("", script, 2, ["DATA"], seed=7, instance_args=[["a"], ["b"]])
    assert (launcher.script, launcher.num_instances, launcher.seed) == (str(script), 2, 7)
    assert launcher.named_sockets == launcher.config.named_sockets == ["DATA"]
    assert launcher.processes is None
    with pytest.raises(AttributeError, match="no attribute 'num_instance'"):
        _ = launcher.num_instance


def test_a_checked_configuration_passes_the_check_again(config: Callable[..., LaunchConfig], tmp_path: Path) -> None:
    once = config(scene=tmp_path / "script.py", num_instances=2, env={"A": "1"}, stall_timeout=3, named_sockets=["D"])
    assert LaunchConfig.from_arguments(msgspec.structs.asdict(once)) == once


def test_what_python_has_besides_jsons_types_is_welcome(config: Callable[..., LaunchConfig], tmp_path: Path) -> None:
    made = config(
        num_instances=np.int64(2),
        named_sockets=("A", np.str_("B")),
        instance_args=((tmp_path, 1.5), ["x", True, np.int32(3)]),
        blend_path=iter([tmp_path, "b"]),
        blender=tmp_path,
        stall_timeout=np.float64(2.5),
        env=({}, {"A": "1"}),
    )
    assert made.num_instances == 2
    assert made.named_sockets == ["A", "B"]
    assert [made.arguments_of(btid) for btid in range(2)] == [[str(tmp_path), "1.5"], ["x", "True", "3"]]
    assert made.blend_path == [str(tmp_path), "b"]
    assert made.blender == str(tmp_path)
    assert made.stall_timeout == 2.5
    assert [made.variables_of(btid) for btid in range(2)] == [{}, {"A": "1"}]
    assert msgspec.json.decode(msgspec.json.encode(made), type=LaunchConfig) == made


def test_paths_are_absolute_and_a_home_directory_is_meant_as_such(
    config: Callable[..., LaunchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config(script="script.py").script == str(tmp_path / "script.py")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config(scene="~/script.py").scene == str(tmp_path / "script.py")
    assert config(scene=None).scene is None
    with pytest.raises(SceneNotFound, match=r"scene 'no\.blend' does not exist \(looked for /"):
        config(scene="no.blend")
    with pytest.raises(ScriptNotFound, match=r"script '' is not a file"):
        config(script="")


@pytest.mark.parametrize("first", [0, 7, 2**31 - 1])
def test_no_start_of_any_instance_has_the_seed_of_another(config: Callable[..., LaunchConfig], first: int) -> None:
    made = config(num_instances=3, seed=first)
    assert [made.seed_of(btid, 0) for btid in range(3)] == [(first + btid) % 2**31 for btid in range(3)]
    seeds = [made.seed_of(btid, restarts) for btid, restarts in itertools.product(range(3), range(50))]
    assert len(set(seeds)) == 150
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_seeds_are_drawn_at_random_where_none_is_given(config: Callable[..., LaunchConfig]) -> None:
    assert len({made.seed for made in [config(), config(seed=None)] * 3}) > 1
    assert len({config().seed for _ in range(5)}) > 1


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (dict(num_instances=0), "num_instances must be an int from 1 to 9999, not 0."),
        (dict(num_instances="2"), "num_instances must be an int from 1 to 9999, not '2'."),
        (dict(num_instances=True), "num_instances must be an int from 1 to 9999, not True."),
        (dict(num_instances=None), "num_instances must be an int from 1 to 9999, not None."),
        (dict(num_instances=10**30), f"num_instances must be an int from 1 to 9999, not {10**30}."),
        (dict(named_sockets="DATA"), """named_sockets must be a list of names, such as ["DATA"], not 'DATA'."""),
        (dict(named_sockets=["A", 1]), """such as ["DATA"], not ['A', 1] (see named_sockets[1])."""),
        (dict(named_sockets=["-a"]), "named_sockets: '-a' cannot be a name. Use 1 to 48 characters, without = and"),
        (dict(named_sockets=["A", "A"]), "named_sockets has a name twice: ['A', 'A']."),
        (dict(start_port=70000), "start_port must be an int from 1 to 65535, not 70000."),
        (dict(instance_args=["--x"]), "a list with one list of arguments per instance, such as [["),
        (dict(instance_args=[[], []]), "instance_args has 2 lists for 1 instances (num_instances). It must be a list"),
        (dict(instance_args=[["a", None]]), "not [['a', None]] (see instance_args[0][1])."),
        (dict(env=[{}, {}]), "env has 2 dicts for 1 instances (num_instances). It must be a dict of str to str, or a"),
        (
            dict(env={"A": 1}),
            "env must be a dict of str to str, or a list with one such dict per instance, not {'A': 1}.",
        ),
        (dict(seed=-1), f"seed must be an int from 0 to {2**31 - 1}, not -1."),
        (dict(proto="ipc"), """proto must be "tcp" (on this host, shared memory is used in any case), not 'ipc'."""),
        (
            dict(bind_addr=5),
            """bind_addr must be an IPv4 address or a host name, such as "127.0.0.1" or "primaryip",""",
        ),
        (dict(bind_addr=""), """or "primaryip", not ''."""),
        (dict(blender=5), "blender must be the path of a Blender executable"),
        (dict(blend_path=5), "blend_path must be a directory"),
        (dict(scene=5), "scene must be the path of a .blend file"),
        (dict(script=None), "script must be the path of a Python script, not None."),
        (dict(script=b"x.py"), "script must be the path of a Python script, not b'x.py'."),
        (dict(background="yes"), "background must be true or false, not 'yes'."),
        (dict(restart="sometimes"), """restart must be "never", "on-failure" or "always", not 'sometimes'."""),
        (dict(restart=True), """restart must be "never", "on-failure" or "always", not True."""),
        (dict(max_restarts=-1), "max_restarts must be an int, 0 or more, not -1."),
        (dict(recycle_after=0), "recycle_after must be a number of messages, 1 or more, not 0."),
        (dict(recycle_after=5), "recycle_after=5 needs named_sockets"),
        (dict(stall_timeout=0), "stall_timeout must be a positive number of seconds, not 0."),
        (dict(stall_timeout=math.nan), "stall_timeout must be a positive number of seconds, not nan."),
        (dict(stall_timeout=2.5), "stall_timeout=2.5 needs named_sockets"),
    ],
)
def test_what_cannot_work_is_named_with_its_value_and_what_would(
    config: Callable[..., LaunchConfig], wrong: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config(**wrong)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_that_is_wrong_is_told_at_once_and_long_values_are_cut(config: Callable[..., LaunchConfig]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config(seed=-1, num_instances=0, env={"A" * 1000: 1})
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["seed", "num_instances", "env"]
    assert str(caught.value).endswith("AAA ....")
    assert max(map(len, str(caught.value).splitlines())) < 250


def test_an_error_shows_names_and_values_as_the_user_writes_them(config: Callable[..., LaunchConfig]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config(show=json.dumps, num_instance=2, qqqqqqq=2, background=None, stall_timeout="x")
    first, second, *others = str(caught.value).splitlines()
    assert first == '"num_instance" is not an argument of BlenderLauncher. Did you mean "num_instances"?'
    assert second.startswith(
        '"qqqqqqq" is not an argument of BlenderLauncher. There are: scene, script, num_instances, '
    )
    assert others == [
        "background must be true or false, not null.",
        'stall_timeout must be a positive number of seconds, not "x".',
    ]
