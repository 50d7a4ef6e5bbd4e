"""Channels of launched instances: what their names are, who dies, who comes back, and what is said of it."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blendtorch_shm.errors import BlendtorchError, ConfigurationError, InstanceDied, SegmentError, StreamTimeout
from blendtorch_shm.launch.notes import instance_reports
from torch_side import BlenderLauncher, DuplexChannel, LaunchInfo, RemoteIterableDataset, stats

from ..conftest import Blender
from ..selection import is_due
from .conftest import eventually
from .test_restart import PATIENCE_S, lose_patience, process, quick  # noqa: F401  # fixtures

PATIENCE_MS = 60_000
ECHO = """
import os
import numpy as np
import blendtorch.btb as btb
args, rest = btb.parse_blendtorch_args()
run = int(os.environ.get("BLENDTORCH_RESTARTS", 0))
channel = btb.DuplexChannel(args.btsockets["CTRL"], args.btid)

def echo():
    message = channel.recv()
    channel.send(run=run, **{key: value for key, value in message.items() if not key.startswith("bt")})
"""
"""Start of a script with a channel."""


@contextlib.contextmanager
def launched(script: Path, num_instances: int = 1, **options: Any) -> Iterator[BlenderLauncher]:
    options = {"named_sockets": ["CTRL"], "blender": "python", "progress": False} | options
    with BlenderLauncher("", script, num_instances, **options) as launcher:
        yield launcher


def address(launcher: BlenderLauncher, name: str = "CTRL", *, remote: bool = False) -> Any:
    found = launcher.launch_info.addresses[name][0]
    return found.elsewhere() if remote else found


def state(launcher: BlenderLauncher, btid: int = 0) -> str:
    directory = address(launcher).twin.directory
    return next(report.state for report in instance_reports(directory) if report.btid == btid)


def received(channel: DuplexChannel) -> dict[str, Any]:
    message = channel.recv(timeoutms=PATIENCE_MS)
    assert message is not None
    return message


SOCKETS = ["CTRL", "COMMAND", "DATA", "a+b", "x%2By", "CTRL+back", "a"]
ON_ALL = """
import numpy as np
import blendtorch.btb as btb
args, rest = btb.parse_blendtorch_args()
channels = {name: btb.DuplexChannel(args.btsockets[name], args.btid) for name in ("CTRL", "COMMAND", "a+b", "CTRL+back")}
publishers = {name: btb.DataPublisher(args.btsockets[name], args.btid) for name in ("DATA", "x%2By", "a")}
for name, publisher in publishers.items():
    publisher.publish(name=name, image=np.zeros(9000, np.uint8))
while True:
    for name, channel in channels.items():
        message = channel.recv(timeoutms=1)
        if message is not None:
            channel.send(name=name, got=message["image"], of=message["btmid"])
"""


@pytest.mark.parametrize("remote", [False, True])
def test_channels_and_streams_of_any_name_do_not_disturb_each_other_and_leave_nothing(
    script: Callable[[str], Path], remote: bool
) -> None:
    with launched(script(ON_ALL), 2, named_sockets=SOCKETS) as launcher:
        addresses = launcher.launch_info.addresses
        with contextlib.ExitStack() as opened:
            channels = {
                (name, btid): opened.enter_context(DuplexChannel(found.elsewhere() if remote else found))
                for name in ("CTRL", "COMMAND", "a+b", "CTRL+back")
                for btid, found in enumerate(addresses[name])
            }
            sent = {
                key: channel.send(image=np.full(9000, i, np.uint8)) for i, (key, channel) in enumerate(channels.items())
            }
            for i, ((name, btid), channel) in enumerate(channels.items()):
                message = received(channel)
                assert (message["name"], message["btid"], message["of"]) == (name, btid, sent[name, btid])
                assert (message["got"] == i).all()
            for name in ("DATA", "x%2By", "a"):
                items = list(RemoteIterableDataset(addresses[name], max_items=2))
                assert sorted((item["name"], item["btid"]) for item in items) == [(name, 0), (name, 1)]
        assert [found.name for found in stats(addresses["CTRL"])] == ["CTRL", "CTRL"]
        assert [[found.name for found in each] for each in launcher.stats().values()] == [
            [name] * 2 for name in SOCKETS
        ]
        launch = addresses["CTRL"][0].twin.launch
    assert not [
        name for folder in ("/dev/shm", os.environ["XDG_RUNTIME_DIR"]) for name in os.listdir(folder) if launch in name
    ]


def test_a_plain_address_is_enough_where_the_launch_runs(script: Callable[[str], Path]) -> None:
    with launched(script(ECHO + "while True: echo()")) as launcher, DuplexChannel(str(address(launcher))) as channel:
        channel.send(x=1)
        assert received(channel)["x"] == 1
        assert channel.address.twin is not None


def test_who_has_a_channel_and_who_may_have_it_next(script: Callable[[str], Path]) -> None:
    with launched(script(ECHO + "while True: echo()")) as launcher:
        channel = DuplexChannel(address(launcher))
        with pytest.raises(ConfigurationError, match="another trainer"):
            DuplexChannel(address(launcher))
        channel.send(x=1)
        del channel
        gc.collect()
        with DuplexChannel(address(launcher)) as channel:  # a forgotten one has let go
            assert received(channel)["x"] == 1
    with pytest.raises(SegmentError, match="launch is over"):
        DuplexChannel(address(launcher))


# -- instances that end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", ["without end", "a little, again and again", "to send"])
def test_whoever_waits_for_an_instance_that_failed_is_told_how(script: Callable[[str], Path], waits: str) -> None:
    path = script(ECHO + "echo()\necho()\nraise RuntimeError('the cube is gone')")
    with contextlib.suppress(InstanceDied), launched(path) as launcher, DuplexChannel(address(launcher)) as channel:
        channel.send(x=1)
        channel.send(x=2)
        assert received(channel)["x"] == 1
        eventually(lambda: state(launcher) == "exited")
        with pytest.raises(InstanceDied, match="the cube is gone.*\n.*([12]) messages? had arrived") as raised:
            while True:
                if waits == "to send":
                    channel.send(x=3)
                else:
                    message = channel.recv(timeoutms=None if waits == "without end" else 10)
                    assert message is None or message["x"] == 2  # first, what is left of what it sent
        assert "exit code 1" in str(raised.value)


def test_a_channel_of_a_script_that_came_to_its_end_says_so_and_a_look_gives_none(
    script: Callable[[str], Path],
) -> None:
    with launched(script(ECHO + "echo()")) as launcher, DuplexChannel(address(launcher)) as channel:
        channel.send(x=1)
        assert received(channel)["x"] == 1
        eventually(lambda: state(launcher) == "exited")
        with pytest.raises(InstanceDied, match="came to the end of its script after 1 message; 1 message had arrived"):
            channel.recv()
        assert channel.recv(timeoutms=0) is None


def test_whoever_waits_when_the_launch_ends_is_told_so(script: Callable[[str], Path]) -> None:
    told: list[BlendtorchError] = []

    def wait(channel: DuplexChannel) -> None:
        try:
            channel.recv()
        except BlendtorchError as error:
            told.append(error)

    with launched(script(ECHO + "while True: echo()")) as launcher:
        channel = DuplexChannel(address(launcher))
        channel.send(x=1)
        received(channel)
        thread = threading.Thread(target=wait, args=(channel,))
        thread.start()
    thread.join()
    channel.close()
    assert isinstance(told[0], InstanceDied)
    assert "Their launch is over" in str(told[0])


def test_what_was_sent_at_the_end_of_a_script_arrives_and_what_was_not_taken_says_so(
    script: Callable[[str], Path],
) -> None:
    path = script(ECHO + "for i in range(5): echo()\nchannel.send(end=True)")
    for remote in (False, True):
        with launched(path) as launcher, DuplexChannel(address(launcher, remote=remote), timeoutms=50) as channel:
            for i in range(5):
                channel.send(i=i, image=np.full(9000, i, np.uint8))
            assert [received(channel).get("i") for _ in range(6)] == [0, 1, 2, 3, 4, None]
            if remote:
                with pytest.raises(StreamTimeout, match="could not be sent"):
                    while True:
                        channel.send(image=np.zeros(9000, np.uint8))
                channel._channel.close(patient=False)


# -- instances that come back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
def test_a_killed_instance_comes_back_and_the_same_channel_goes_on(
    script: Callable[[str], Path],
    quick: None,  # noqa: F811
    remote: bool,
) -> None:
    path = script(
        ECHO + "for i in range(3): echo()\nif run == 0:\n    import time; time.sleep(600)\nwhile True: echo()"
    )
    with launched(path, restart="on-failure") as launcher, DuplexChannel(address(launcher, remote=remote)) as channel:
        for i in range(8):
            channel.send(i=i)
        assert [(m["run"], m["i"]) for m in (received(channel) for _ in range(3))] == [(0, 0), (0, 1), (0, 2)]
        process(launcher).kill()
        assert [(m["run"], m["i"]) for m in (received(channel) for _ in range(5))] == [(1, i) for i in range(3, 8)]
        channel.send(i=8)
        assert received(channel)["i"] == 8


def test_with_always_each_run_gets_what_the_one_before_left(script: Callable[[str], Path]) -> None:
    with (
        launched(script(ECHO + "echo()"), restart="always") as launcher,
        DuplexChannel(address(launcher, remote=True)) as channel,
    ):
        for i in range(2):
            channel.send(i=i)
        assert [(m["run"], m["i"]) for m in (received(channel) for _ in range(2))] == [(0, 0), (1, 1)]


def test_an_instance_that_waits_for_a_message_is_not_stuck(
    script: Callable[[str], Path],
    lose_patience: Callable[..., None],  # noqa: F811
) -> None:
    """One that hangs is killed beside it meanwhile, so the patience was exceeded."""
    polling = "message = channel.recv(timeoutms=100)\n    if message: channel.send(x=message['x'])"
    path = script(ECHO + f"echo()\nif args.btid:\n    import time; time.sleep(600)\nwhile True:\n    {polling}")
    with contextlib.ExitStack() as opened:
        opened.enter_context(contextlib.suppress(InstanceDied))
        launcher = opened.enter_context(launched(path, 2, stall_timeout=PATIENCE_S))
        channels = [opened.enter_context(DuplexChannel(found)) for found in launcher.launch_info.addresses["CTRL"]]
        for channel in channels:
            channel.send(x=0)
            received(channel)
        lose_patience(0)
        lose_patience(1)
        eventually(lambda: state(launcher, 1) == "exited")
        assert state(launcher, 0) == "running"
        channels[0].send(x=1)
        assert received(channels[0])["x"] == 1


# -- trainers that die ------------------------------------------------------------------------------------------

TRAINER = """
import sys, time
import torch_side as btt
info = btt.LaunchInfo.load_json(sys.argv[1])
address = info.addresses["CTRL"][0]
channel = btt.DuplexChannel(address.elsewhere() if sys.argv[2] == "remote" else address)
for i in range(4):
    channel.send(i=i)
print(channel.recv()["i"], flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("where", ["here", "remote"])
def test_after_a_trainer_was_killed_the_next_one_goes_on(
    script: Callable[[str], Path], tmp_path: Path, where: str
) -> None:
    with launched(script(ECHO + "while True: echo()")) as launcher:
        info = tmp_path / "info.json"
        LaunchInfo.save_json(info, launcher.launch_info)
        program = [sys.executable, "-c", TRAINER, info, where]
        with subprocess.Popen(program, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as trainer:
            assert trainer.stdout is not None
            assert trainer.stdout.readline() == b"0\n"
            trainer.send_signal(signal.SIGKILL)
        with DuplexChannel(address(launcher, remote=where == "remote")) as channel:
            channel.send(i=9)
            found = [received(channel)["i"]]
            while found[-1] != 9:
                found.append(received(channel)["i"])
            assert found == [*range(found[0], 4), 9]  # it may have died before it said that it had the first one
            assert found[0] in (0, 1)


# -- real Blender -----------------------------------------------------------------------------------------------

LINGERS = """
import blendtorch.btb as btb
args, _ = btb.parse_blendtorch_args()
channel = btb.DuplexChannel(args.btsockets["CTRL"], btid=args.btid, lingerms=5000)
channel.send(echo=channel.recv(timeoutms=60_000))
channel.send(msg="end")
"""


@pytest.mark.blender
@pytest.mark.long
@pytest.mark.skipif(not is_due(2), reason="it is due at another turn")
def test_blender_echoes_and_what_it_sent_arrives_after_its_end(script: Callable[[str], Path], blender: Blender) -> None:
    with contextlib.ExitStack() as opened:
        launcher = opened.enter_context(launched(script(LINGERS), blender=blender.argument, background=True))
        channels = [
            opened.enter_context(DuplexChannel(found, lingerms=5000))
            for found in launcher.launch_info.addresses["CTRL"]
        ]
        sent = [channel.send(msg=f"hello {btid}") for btid, channel in enumerate(channels)]
        for btid, channel in enumerate(channels):
            eventually(lambda btid=btid: state(launcher, btid) == "exited")  # type: ignore[misc]
            first, second = received(channel), received(channel)
            assert first["echo"] == {"msg": f"hello {btid}", "btid": None, "btmid": sent[btid]}
            assert (first["btid"], second["btid"], second["msg"]) == (btid, btid, "end")
            assert second["btmid"] == first["btmid"] + 1
