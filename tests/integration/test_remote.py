"""Instances on one host, training on another: everything but the cable is real, see hosts.py."""

import json
import stat
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .hosts import Host, Network, Program, why_not

HERE = Path(__file__).parent
SCRIPTS = HERE / "scripts"
CUBE_BLEND = HERE.parents[1] / "examples" / "datagen" / "cube.blend"
INFO = "/tmp/launch_info.json"

Key = tuple[str, int, int]


@pytest.fixture(scope="module")
def all_hosts() -> Iterator[dict[str, Host]]:
    if reason := why_not():
        pytest.skip(reason)
    with Network() as network:
        rendering = network.add("rendering")
        network.add("training")
        network.add("another")
        network.add("neighbour", shares_memory_with=rendering)
        yield network.hosts


@pytest.fixture
def hosts(all_hosts: dict[str, Host]) -> Iterator[dict[str, Host]]:
    """Three hosts, and a container that shares the memory of the first one. What a test leaves on them is a failure."""
    yield all_hosts
    ended = [host.end_programs() for host in all_hosts.values()]
    was_cut_short = any(ended)  # by a failure, which is enough
    left = [path for host in all_hosts.values() for path in host.leftovers()]
    for host in all_hosts.values():
        host.link(up=True)
        host.clean()
    assert was_cut_short or not left


@pytest.fixture
def rendering(hosts: dict[str, Host]) -> Host:
    return hosts["rendering"]


@pytest.fixture
def training(hosts: dict[str, Host]) -> Host:
    return hosts["training"]


@pytest.fixture
def another(hosts: dict[str, Host]) -> Host:
    return hosts["another"]


@pytest.fixture
def neighbour(hosts: dict[str, Host]) -> Host:
    return hosts["neighbour"]


# ------------------------------------------------------------------------------------------------- what runs on them


def launch(host: Host, *instance_args: object, num_instances: int = 2, **arguments: Any) -> Program:
    """Launch producers on a host, reachable from the others; it has the launch information then."""
    arguments = {
        "scene": "",
        "script": str(SCRIPTS / "publish.py"),
        "num_instances": num_instances,
        "named_sockets": ["DATA"],
        "bind_addr": "primaryip",
        "instance_args": [list(map(str, instance_args))] * num_instances,
        "blender": "python",
        **arguments,
    }
    launcher = host.python(SCRIPTS / "launch.py", INFO, json.dumps(arguments))
    assert launcher.line() == "launched"
    return launcher


def hand_over(giver: Host, taker: Host, path: str = INFO) -> str:
    """Copy the launch information from one host to the other; its path there."""
    taker.path(path).write_bytes(giver.path(INFO).read_bytes())
    taker.path(path).chmod(0o600)
    return path


def consume(host: Host, *args: object, twins: list[bool]) -> Program:
    """Start training on a host."""
    consumer = host.python(SCRIPTS / "consume.py", *args)
    assert consumer.line() == twins
    return consumer


def keys(count: int, num_instances: int = 2, source: str = "") -> list[Key]:
    """Of all messages of a launch."""
    return [(source, btid, i) for btid in range(num_instances) for i in range(count)]


def as_keys(said: list[Any]) -> list[Key]:
    return [(source, btid, i) for source, btid, i in said]


def read_until_it_pauses(consumer: Program) -> list[Key]:
    said = []
    while (line := consumer.line()) != "paused":
        said.append(line)
    return as_keys(said)


def in_order(received: list[Key]) -> bool:
    """Whether each instance's messages came in the order in which they were made."""
    return sorted(received, key=lambda key: key[:2]) == sorted(received)


# ------------------------------------------------------------------------------------------------------- what arrives

COUNT = 30


@pytest.fixture(scope="module")
def items_received_locally(all_hosts: dict[str, Host]) -> list[Any]:
    host = all_hosts["rendering"]
    launcher = launch(host, "--count", COUNT, "--variety")
    items = consume(host, INFO, "--max-items", 2 * COUNT, "--describe", twins=[True, True]).finish()
    launcher.finish()
    assert host.leftovers() == []
    return items


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_on_another_host_are_those_of_the_same_launch_consumed_locally(
    items_received_locally: list[Any], rendering: Host, training: Host, num_workers: int
) -> None:
    launcher = launch(rendering, "--count", COUNT, "--variety")
    assert stat.S_IMODE(rendering.path(INFO).stat().st_mode) == 0o600
    info = hand_over(rendering, training)
    # Not all of them with workers: the last ones may queue at one while the DataLoader waits for the other.
    max_items = COUNT if num_workers else 2 * COUNT
    options = ["--max-items", max_items, "--num-workers", num_workers, "--describe"]
    items = consume(training, info, *options, twins=[False, False]).finish()
    launcher.finish()
    received = as_keys([key for key, _ in items])
    assert len(set(received)) == max_items
    assert num_workers or in_order(received)
    local = {tuple(key): description for key, description in items_received_locally}
    assert sorted(local) == keys(COUNT)
    assert {tuple(key): description for key, description in items} == {key: local[key] for key in received}


@pytest.mark.timeout(300)
def test_pictures_of_blender_are_the_same_on_both_hosts(a_blender: Any, rendering: Host, training: Host) -> None:
    cube = {"scene": str(CUBE_BLEND), "script": str(SCRIPTS / "turning_cube.py"), "blender": a_blender.argument}
    launcher = launch(rendering, 4, **cube)
    info = hand_over(rendering, training)
    here = consume(rendering, INFO, "--only", 0, "--max-items", 4, "--describe", twins=[True])
    there = consume(training, info, "--only", 1, "--max-items", 4, "--describe", twins=[False])
    local, remote = here.finish(), there.finish()
    launcher.finish()
    assert as_keys([key for key, _ in local]) == keys(4, num_instances=1)
    assert as_keys([key for key, _ in remote]) == [("", 1, i) for i in range(4)]
    assert [pictures(item) for _, item in remote] == [pictures(item) for _, item in local]
    assert len({json.dumps(pictures(item)) for _, item in local}) == 4


def pictures(item: Any) -> Any:
    """A described item without the number of its instance: both render the same."""
    kind, fields = item
    assert kind == "dict"
    return [[name, value] for name, value in fields if name[2] not in ("'btid'", "'as it was'")]


# ------------------------------------------------------------------------------------------------------- two-way talk


def test_channels_work_both_ways_between_two_hosts_and_outlive_a_network_that_fails(
    rendering: Host, training: Host
) -> None:
    count = 40
    launcher = launch(rendering, script=str(SCRIPTS / "echo.py"), named_sockets=["CTRL"])
    trainer = training.python(SCRIPTS / "talk.py", hand_over(rendering, training), count)
    assert trainer.line() == [False, False]
    assert trainer.line() == "half"
    training.run(["ss", "--kill", "--tcp", "state", "established", "dst", rendering.ip])  # where the kernel lets it
    training.link(up=False)
    time.sleep(1)
    training.link(up=True)
    assert trainer.finish() == [3 * 2 * count]
    launcher.finish()


# -------------------------------------------------------------------------------------- several sources and consumers


def test_local_and_remote_instances_are_read_at_once_and_none_keeps_another_waiting(
    rendering: Host, training: Host
) -> None:
    """Each always has more to send, so that one that is passed over for good would never be heard."""
    endless, count = 10**9, 30
    launchers = [launch(host, "--count", endless, "--source", host.name) for host in (rendering, training)]
    remote = hand_over(rendering, training, "/tmp/remote.json")
    options = ["--max-items", endless, "--until-each", count]
    received = as_keys(consume(training, INFO, remote, *options, twins=[True, True, False, False]).finish())
    for launcher in launchers:
        launcher.finish()
    assert in_order(received)
    shares = Counter(key[:2] for key in received)
    assert sorted(shares) == [(host, btid) for host in ("rendering", "training") for btid in (0, 1)]
    assert min(shares.values()) == count
    assert sorted(received) == sorted((*who, i) for who, share in shares.items() for i in range(share))


def test_consumers_on_two_hosts_share_the_messages(rendering: Host, training: Host, another: Host) -> None:
    count = 80
    launcher = launch(rendering, "--count", count)
    options = ["--max-items", count, "--step-s", 0.002]  # together: all
    consumers = [
        consume(host, hand_over(rendering, host), *options, twins=[False, False]) for host in (training, another)
    ]
    received = [as_keys(consumer.finish()) for consumer in consumers]
    launcher.finish()
    assert sorted(received[0] + received[1]) == keys(count)
    assert all(in_order(part) for part in received)


# ------------------------------------------------------------------------------------------------ what may go wrong


def test_an_epoch_outlives_ten_seconds_without_a_network(rendering: Host, training: Host) -> None:
    count = 100
    launcher = launch(rendering, "--count", count)
    info = hand_over(rendering, training)
    consumer = consume(training, info, "--max-items", 2 * count, "--pause-at", 60, twins=[False, False])
    received = read_until_it_pauses(consumer)
    training.link(up=False)
    before = training.received_nbytes()
    consumer.tell()
    time.sleep(10)  # longer than each patience but those of minutes, in tcp.py
    assert training.received_nbytes() == before
    training.link(up=True)
    received += as_keys(consumer.finish())
    launcher.finish()
    assert sorted(received) == keys(count)
    assert in_order(received)


def test_connections_that_break_time_and_again_lose_nothing_and_repeat_nothing(rendering: Host, training: Host) -> None:
    count = 150
    launcher = launch(rendering, "--count", count)
    info = hand_over(rendering, training)
    consumer = consume(training, info, "--max-items", 2 * count, "--step-s", 0.002, twins=[False, False])
    received = []
    breaks = training.counter("Tcp.EstabResets")
    for _ in range(6):
        received += as_keys([consumer.line() for _ in range(40)])
        training.run(["ss", "--kill", "--tcp", "state", "established", "dst", rendering.ip])
    received += as_keys(consumer.finish())
    launcher.finish()
    if training.counter("Tcp.EstabResets") == breaks:
        pytest.skip("this kernel does not let ss close connections")
    assert sorted(received) == keys(count)
    assert in_order(received)


def test_training_may_start_before_the_instances_and_be_killed(rendering: Host, training: Host) -> None:
    count = 100
    launcher = launch(rendering, "--count", count, "--start-after", "/tmp/go")
    info = hand_over(rendering, training)
    refused = rendering.counter("Tcp.OutRsts")
    first = consume(training, info, "--max-items", 2 * count, "--pause-at", 60, twins=[False, False])
    while rendering.counter("Tcp.OutRsts") < refused + 2:  # connected to each in vain
        time.sleep(0.01)
    rendering.path("/tmp/go").touch()
    received = read_until_it_pauses(first)
    assert first.kill() == []
    second = consume(training, info, "--max-items", 2 * count - 60, twins=[False, False])
    received_then = as_keys(second.finish())
    launcher.finish()
    # The first one said of each message that it took it before it reported it, but what a program says is on its way for
    # a moment: the last one may not have been heard of, and comes again. Then one of the others is still to come.
    twice = set(received) & set(received_then)
    assert twice <= {received[-1]}
    assert len(set(received_then)) == 2 * count - 60
    assert len({*received, *received_then} & set(keys(count))) == 2 * count - len(twice)
    assert in_order(received)


# ---------------------------------------------------------------------------------------------------------- containers


def test_containers_that_share_memory_need_no_network_and_others_use_it(
    rendering: Host, neighbour: Host, another: Host
) -> None:
    count = 80
    launcher = launch(rendering, "--count", count, "--start-after", "/tmp/go")
    neighbour.link(up=False)
    options = ["--max-items", count, "--step-s", 0.002]
    sharing = consume(neighbour, hand_over(rendering, neighbour), *options, twins=[True, True])
    apart = consume(another, hand_over(rendering, another), *options, twins=[False, False])
    # Longer than a consumer waits for the last messages of instances of which it knows that they have ended. Of these it
    # knows nothing, as the directory of their logs is not here.
    time.sleep(3)
    rendering.path("/tmp/go").touch()
    received = [as_keys(sharing.finish()), as_keys(apart.finish())]
    launcher.finish()
    assert sorted(received[0] + received[1]) == keys(count)
    assert all(in_order(part) for part in received)


def test_a_container_that_is_killed_gives_back_what_it_held(rendering: Host, neighbour: Host) -> None:
    count = 80
    launcher = launch(rendering, "--count", count)
    info = hand_over(rendering, neighbour)
    first = consume(neighbour, info, "--max-items", 2 * count, "--pause-at", 60, twins=[True, True])
    received = read_until_it_pauses(first)
    first.kill()
    # What it had in hand, and had reported, it had not released: that is one message, and comes again.
    second = consume(rendering, INFO, "--max-items", 2 * count - 60 + 1, twins=[True, True])
    received_then = as_keys(second.finish())
    launcher.finish()
    assert set(received) & set(received_then) == {received[-1]}
    assert sorted({*received, *received_then}) == keys(count)


# ----------------------------------------------------------------------------------------------- with and without keys


def test_launch_information_of_blendtorch_works_on_its_own_host(rendering: Host) -> None:
    count = 30
    launcher = launch(rendering, "--count", count, bind_addr="127.0.0.1")
    without_details(rendering)
    received = as_keys(consume(rendering, INFO, "--max-items", 2 * count, twins=[False, False]).finish())
    launcher.finish()
    assert sorted(received) == keys(count)


def test_whoever_asks_for_it_by_name_publishes_to_everybody(rendering: Host, training: Host) -> None:
    count = 30
    launcher = launch(rendering, "--count", count, allow_unauthenticated=True)
    without_details(rendering)
    info = hand_over(rendering, training)
    received = as_keys(consume(training, info, "--max-items", 2 * count, twins=[False, False]).finish())
    launcher.finish()
    assert sorted(received) == keys(count)


def without_details(host: Host) -> None:
    """Leave in a host's launch information what blendtorch writes there, and nothing else."""
    info = json.loads(host.path(INFO).read_text())
    host.path(INFO).write_text(json.dumps({name: info[name] for name in ("addresses", "commands")}))


def test_who_has_not_the_keys_gets_nothing_and_disturbs_nobody(rendering: Host, training: Host) -> None:
    count = 150
    launcher = launch(rendering, "--count", count)
    info = hand_over(rendering, training)
    intruder = training.python(SCRIPTS / "intrude.py", info)
    assert intruder.line() == "connected"
    options = ["--max-items", 2 * count, "--step-s", 0.005]
    received = as_keys(consume(training, info, *options, twins=[False, False]).finish())
    intruder.tell()
    stolen = intruder.line()
    intruder.finish()
    launcher.finish()
    assert sorted(received) == keys(count)
    assert in_order(received)
    assert stolen.pop("TCP") <= 4 * 64  # what ZeroMQ says to everyone, before it asks who is there
    assert set(stolen.values()) == {0}, stolen


# ---------------------------------------------------------------------------------------------------------- environments


def test_environments_on_two_hosts_are_stepped_by_the_same_program(rendering: Host, training: Host) -> None:
    arguments = {"script": str(HERE.parent / "torch_side" / "scripts" / "pixels.py"), "named_sockets": ["GYM"]}
    steps = 30
    launcher = launch(rendering, **arguments)
    info = hand_over(rendering, training, "/tmp/remote.json")
    there = training.python(SCRIPTS / "act.py", steps, info)
    assert there.line() == [False, False]
    assert there.finish() == [*acted(steps, 2), 2]
    here = rendering.python(SCRIPTS / "act.py", steps, INFO)
    assert here.line() == [True, True]
    assert here.finish() == [*acted(steps, 2), 2]
    beside = launch(training, **arguments)
    both = training.python(SCRIPTS / "act.py", steps, INFO, info)
    assert both.line() == [True, True, False, False]
    assert both.finish() == [*acted(steps, 4), 4]
    beside.finish()
    launcher.finish()


def acted(steps: int, num_envs: int) -> list[list[list[int]]]:
    """Instance, episode, step and action of each picture; launches have two instances."""
    return [[[env % 2, 0, step, step and env + step] for env in range(num_envs)] for step in range(steps + 1)]
