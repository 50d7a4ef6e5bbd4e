"""Parameters with versions, over real instances, which here are plain Python processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blendtorch_shm.errors import ConfigurationError, PublishError, StreamClosed
from torch_side import BlenderLauncher, LaunchInfo, Parameters, RemoteIterableDataset

from .conftest import eventually, when_it_waits

SCRIPT = Path(__file__).parents[1] / "scripts" / "parameters.py"
FAR = pytest.mark.parametrize("is_far", [False, True], ids=["shared memory", "tcp"])


def launch(*args: str, num_instances: int = 1, script: Path = SCRIPT, **kwargs: Any) -> BlenderLauncher:
    return BlenderLauncher(
        scene="",
        script=script,
        num_instances=num_instances,
        named_sockets=["DATA", "PARAMS"],
        instance_args=[list(args)] * num_instances,
        blender="python",
        progress=False,
        **kwargs,
    )


def connect(launcher: BlenderLauncher, is_far: bool = False) -> Parameters:
    addresses = launcher.launch_info.addresses["PARAMS"]
    return Parameters([address.elsewhere() for address in addresses] if is_far else addresses)


def items_of(launcher: BlenderLauncher) -> Iterator[dict[str, Any]]:
    return iter(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], output="numpy"))


def until_version(
    items: Iterator[dict[str, Any]], version: int, btids: set[int] = frozenset([0])
) -> list[dict[str, Any]]:  # type: ignore[assignment]
    """The items until each of these instances has sent one that was made with that version."""
    found = []
    missing = set(btids)
    while missing:
        found.append(next(items))
        if found[-1]["parameters_version"] == version:
            missing.discard(found[-1]["btid"])
    return found


@FAR
def test_what_is_set_reaches_all_instances_and_each_item_says_its_version(is_far: bool) -> None:
    with launch(num_instances=2) as launcher, connect(launcher, is_far) as parameters:
        items = items_of(launcher)
        table = np.zeros((40, 30), np.float32)
        sums = {}
        for version in (1, 2, 3):
            table += version
            sums[version] = table.sum()
            assert parameters.set(value=10 * version, table=table, note="text") == version == parameters.version
            table += 100  # what was set is a copy
            for item in until_version(items, version, {0, 1}):
                seen = item["parameters_version"]
                assert item["value"] == 10 * seen
                assert (item["image"] == 10 * seen).all()
                assert item["table"].sum() == sums[seen]
                assert item["names"] == ["note", "table", "value"]
        assert parameters.set(value=1, table=table) == 4
        assert until_version(items, 4)[-1]["names"] == ["table", "value"], "in place of all that were set before"


@FAR
def test_who_sets_a_thousand_times_does_not_wait_and_the_instance_gets_the_last_one(is_far: bool) -> None:
    with launch() as launcher, connect(launcher, is_far) as parameters:
        parameters.set(value=0, table=0)
        items = items_of(launcher)
        until_version(items, 1)
        when_it_waits(launcher.launch_info.addresses["DATA"][0], ready=1)
        for value in range(1, 1001):
            last = parameters.set(value=value, table=np.full((100, 100), value))
        seen = [item["parameters_version"] for item in until_version(items, last)]
        assert seen == sorted(seen)
        between = set(seen) - {1, last}
        assert len(between) <= (1 if is_far else 0), between  # what was on its way
        seen = [last]
        while len(set(seen)) < 5:  # both go on
            item = next(items)
            assert item["is_newer"] == (item["parameters_version"] > seen[-1])
            seen.append(item["parameters_version"])
            assert item["value"] + 1 == seen[-1]
            parameters.set(value=parameters.version, table=np.zeros(1000))
        assert seen == sorted(seen)


@FAR
def test_an_instance_that_is_started_again_gets_the_newest_by_itself(is_far: bool) -> None:
    with launch(restart="on-failure") as launcher, connect(launcher, is_far) as parameters:
        parameters.set(value=1, table=0)
        parameters.set(value=2, table=np.zeros(5000))
        items = items_of(launcher)
        pid = until_version(items, 2)[-1]["pid"]
        os.kill(pid, signal.SIGKILL)
        item = next(item for item in items if item["pid"] != pid)
        assert (item["parameters_version"], item["value"]) == (2, 2)
        assert parameters.set(value=3, table=0) == 3
        until_version(items, 3)


def test_a_killed_instance_does_not_keep_others_waiting() -> None:
    with launch(num_instances=2) as launcher, connect(launcher) as parameters:
        parameters.set(value=0, table=0)
        items = items_of(launcher)
        pid = next(item["pid"] for item in until_version(items, 1, {0, 1}) if item["btid"] == 0)
        os.kill(pid, signal.SIGKILL)
        for value in range(50):
            last = parameters.set(value=value, table=np.zeros(5000))
        until_version(items, last, {1})


TRAINER = """
import sys
import blendtorch.btt as btt
parameters = btt.Parameters(btt.LaunchInfo.load_json(sys.argv[1]).addresses["PARAMS"])
for value in range(1, 6):
    version = parameters.set(value=value, table=0)
print(version, flush=True)
if sys.argv[2] == "waits":
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["waits", "returns"])
def test_when_its_trainer_has_gone_an_instance_goes_on_and_another_one_may_begin_with_1(
    end: str, tmp_path: Path
) -> None:
    with launch() as launcher:
        LaunchInfo.save_json(tmp_path / "info.json", launcher.launch_info)
        command = [sys.executable, "-c", TRAINER, str(tmp_path / "info.json"), end]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as trainer:
            assert trainer.stdout is not None
            assert trainer.stderr is not None
            assert trainer.stdout.readline() == "5\n"
            items = items_of(launcher)
            if end == "waits":
                with pytest.raises(ConfigurationError, match="another trainer is connected"):
                    connect(launcher)
                until_version(items, 5)
                trainer.kill()
            assert trainer.stderr.read() == ""
        assert trainer.returncode == (0 if end == "returns" else -signal.SIGKILL)
        assert until_version(items, 5)[-1]["value"] == 5
        with connect(launcher) as parameters:
            assert parameters.set(value=100, table=0) == 1
            assert until_version(items, 1)[-1]["value"] == 100
        assert [next(items)["value"] for _ in range(3)] == [100, 100, 100]
        with Parameters(launcher.launch_info.addresses["PARAMS"], version=57) as parameters:
            assert parameters.set(value=7, table=0) == 58
            until_version(items, 58)


def test_each_frame_of_a_clip_has_its_version() -> None:
    with launch("--frames-per-clip", "4") as launcher, connect(launcher) as parameters:
        parameters.set(value=0, table=0)
        items = items_of(launcher)
        while True:
            clip = next(items)
            assert clip["parameters_version"].shape == (4,)
            assert (clip["value"] + 1 == clip["parameters_version"]).all()
            assert (clip["image"][:, 0, 0] + 1 == clip["parameters_version"]).all()
            if clip["parameters_version"][0] > 5:
                break
            parameters.set(value=parameters.version, table=0)


BEFORE = """
import blendtorch.btb as btb
args, _ = btb.parse_blendtorch_args()
parameters = btb.Parameters(args.btsockets["PARAMS"], args.btid)
publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid, parameters=parameters)
try:
    parameters["scale"]
except KeyError as error:
    said = str(error)
waited, updated = parameters.wait(1), parameters.update()
publisher.publish(said=said, waited=waited, updated=updated, names=list(parameters), shown=repr(parameters))
waited = parameters.wait(60_000)
publisher.publish(waited=waited, shown=repr(parameters), parameters_version=-1)
parameters.close()
"""


def test_before_any_have_come_there_are_none_and_nothing_waits(script: Any) -> None:
    with launch(script=script(BEFORE)) as launcher, connect(launcher) as parameters:
        items = items_of(launcher)
        item = next(items)
        assert "'scale': no parameters have arrived yet" in item.pop("said")
        assert item == {
            "btid": 0,
            "parameters_version": 0,
            "waited": False,
            "updated": False,
            "names": [],
            "shown": "<Parameters, version 0: >",
        }
        parameters.set(scale=1)
        assert next(items) == {
            "btid": 0,
            "waited": True,
            "shown": "<Parameters, version 1: scale>",
            "parameters_version": -1,
        }


def test_what_cannot_be_sent_is_not_set_and_after_the_end_nothing_is() -> None:
    with launch() as launcher:
        with connect(launcher) as parameters:
            with pytest.raises(PublishError, match="callback"):
                parameters.set(value=1, callback=lambda: None)
            assert parameters.set(value=1, table=0) == 1
            pid = os.fork()
            if pid == 0:
                try:
                    parameters.set(value=2, table=0)
                except StreamClosed:
                    os._exit(7)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
            assert parameters.set(value=2, table=0) == 2
            until_version(items_of(launcher), 2)
        with pytest.raises(StreamClosed):
            parameters.set(value=3)
        assert repr(parameters) == "<Parameters, version 2>"


def test_forgotten_parameters_leave_the_sockets_to_others() -> None:
    with launch() as launcher:
        parameters = connect(launcher)
        parameters.set(value=1, table=0)
        del parameters
        with connect(launcher) as parameters:
            assert parameters.set(value=2, table=0) == 1
            eventually(lambda: next(items_of(launcher))["value"] == 2)
