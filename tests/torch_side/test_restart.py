"""Instances that are killed, hang, fail or grow, and are started again under the eyes of whoever reads from them."""

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.utils import data

import torch_side.launching.instance
import torch_side.launching.supervisor
from blendtorch_shm.errors import InstanceDied, StreamTimeout
from blendtorch_shm.launch.notes import InstanceReport, instance_reports
from blendtorch_shm.stream.control import activity
from blendtorch_shm.stream.place import SharedPlace
from torch_side import BlenderLauncher, RemoteIterableDataset

from .conftest import eventually, is_alive

COUNT = """
import os
import numpy as np
import blendtorch.btb as btb
args, rest = btb.parse_blendtorch_args()
run = int(os.environ["BLENDTORCH_RESTARTS"])

def frames(publisher, start=0, end=10**9):
    for i in range(start, end):
        publisher.publish(image=np.full((48, 64, 3), i % 256, np.uint8), run=run, frameid=i, pid=os.getpid())
"""
"""Start of a script that publishes frames which say in which run, counted from 0, they were made."""
PATIENCE_S = 0.5
"""For signs of life, of who is known to be stuck; see :func:`lose_patience`."""
FOREVER = COUNT + "frames(btb.DataPublisher(args.btsockets['DATA'], args.btid))\n"


@contextlib.contextmanager
def launched(script: Path, num_instances: int = 1, **options: Any) -> Iterator[BlenderLauncher]:
    options = {"named_sockets": ["DATA"], "blender": "python", "progress": False} | options
    with BlenderLauncher("", script, num_instances, **options) as launcher:
        yield launcher


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts without long pauses."""
    monkeypatch.setattr(torch_side.launching.instance, "_FIRST_PAUSE_S", 0.02)


@pytest.fixture
def lose_patience(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it when the first run of an instance is stuck. Before, and with its later runs, the supervisor has patience without
    end: on a machine with much to do a start may take any time.
    """
    listen = torch_side.launching.supervisor.Supervisor._listen
    stuck: set[int] = set()

    def listen_patiently(self: Any, instance: Any, patience_s: float) -> None:
        is_stuck = instance.btid in stuck and instance.restarts == 0
        listen(self, instance, patience_s if is_stuck else float("inf"))

    monkeypatch.setattr(torch_side.launching.supervisor.Supervisor, "_listen", listen_patiently)
    return lambda *btids: stuck.update(btids)


def address(launcher: BlenderLauncher, name: str = "DATA") -> Any:
    return launcher.launch_info.addresses[name][0]


def process(launcher: BlenderLauncher, btid: int = 0) -> "subprocess.Popen[bytes]":
    return (launcher.launch_info.processes or [])[btid]


def report(launcher: BlenderLauncher, btid: int = 0) -> InstanceReport:
    directory = address(launcher).twin.directory
    return next(report for report in instance_reports(directory) if report.btid == btid)


def log(launcher: BlenderLauncher) -> str:
    return Path(address(launcher).twin.directory, "instance-00.log").read_text()


def stream(launcher: BlenderLauncher, name: str = "DATA", **options: Any) -> Iterator[dict[str, Any]]:
    return iter(RemoteIterableDataset(launcher.launch_info.addresses[name], max_items=10**6, **options))


def check_that_each_run_is_whole(items: list[tuple[int, int]], *, per_run: int | None = None) -> None:
    """That the frames of each run are 0, 1, 2, ... without a gap or a repetition, one run after the other."""
    runs = sorted({run for run, _ in items})
    assert runs == list(range(len(runs)))
    assert [run for run, _ in items] == sorted(run for run, _ in items)
    for run in runs:
        frames = [frame for found, frame in items if found == run]
        assert frames == list(range(len(frames)))
        if per_run is not None and run != runs[-1]:
            assert len(frames) == per_run


def key(item: dict[str, Any]) -> tuple[int, int]:
    assert (item["image"] == item["frameid"] % 256).all()
    return int(item["run"]), int(item["frameid"])


# -- killed ------------------------------------------------------------------------------------------------------------


def test_a_killed_instance_comes_back_and_the_same_iterator_goes_on(script: Callable[[str], Path], quick: None) -> None:
    with launched(script(FOREVER), restart="on-failure") as launcher:
        items = stream(launcher)
        received = []
        for _ in range(3):
            received += [key(next(items)) for _ in range(25)]
            process(launcher).kill()
        while received[-1] < (3, 25):
            received.append(key(next(items)))
        check_that_each_run_is_whole(received)
        launcher.assert_alive()
        assert report(launcher).restarts == 3


def test_what_a_killed_instance_had_ready_is_delivered_once_and_before_what_follows(
    script: Callable[[str], Path], quick: None
) -> None:
    """Nobody reads while it is killed, and then there is no room for its successor's."""
    path = script(FOREVER)
    with launched(path, restart="on-failure") as launcher:
        twin = address(launcher).twin
        eventually(lambda: published(twin) == 10)
        process(launcher).kill()
        eventually(lambda: report(launcher).restarts == 1 and report(launcher).state == "running")
        items = stream(launcher)
        received = [key(next(items)) for _ in range(40)]
        assert received == [(0, i) for i in range(10)] + [(1, i) for i in range(30)]


def published(twin: Any) -> int:
    seen = activity(SharedPlace(twin))
    return 0 if seen is None else seen.published


def test_what_a_killed_instance_had_ready_arrives_over_tcp_too(script: Callable[[str], Path], quick: None) -> None:
    with launched(script(FOREVER), restart="on-failure") as launcher:
        twin = address(launcher).twin
        eventually(lambda: published(twin) == 10)
        process(launcher).kill()
        items = iter(RemoteIterableDataset(address(launcher).elsewhere(), max_items=1000))
        received = [key(next(items)) for _ in range(60)]
        assert received[:10] == [(0, i) for i in range(10)]
        check_that_each_run_is_whole(received)


def test_a_tcp_reader_goes_on_across_a_kill(script: Callable[[str], Path], quick: None) -> None:
    with launched(script(FOREVER), restart="on-failure") as launcher:
        items = iter(RemoteIterableDataset(address(launcher).elsewhere(), max_items=1000))
        received = [key(next(items)) for _ in range(40)]
        process(launcher).kill()
        while received[-1] < (1, 40):
            received.append(key(next(items)))
        check_that_each_run_is_whole(received)


def test_workers_of_a_data_loader_go_on_too(script: Callable[[str], Path], quick: None) -> None:
    with launched(script(FOREVER), 2, restart="on-failure") as launcher:
        dataset = RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=10**6)
        received = []
        for item in data.DataLoader(dataset, batch_size=None, num_workers=2):
            received.append((int(item["btid"]), *key(item)))
            if len(received) == 100:
                process(launcher, 0).kill()
            if received[-1][:2] == (0, 1) and received[-1][2] > 50:
                break
        assert len(set(received)) == len(received)


def test_the_current_process_is_in_launch_info_and_in_the_report(script: Callable[[str], Path], quick: None) -> None:
    with launched(script(FOREVER), 2, restart="on-failure") as launcher:
        items = stream(launcher)
        first, second = launcher.launch_info.processes or []
        next(items)
        second.kill()
        assert eventually(lambda: process(launcher, 1) is not second)
        assert process(launcher, 0) is first
        item = next(item for item in items if item["run"] == 1)
        assert item["pid"] == process(launcher, 1).pid == report(launcher, 1).pid
        assert second.returncode == -signal.SIGKILL


def test_log_environment_and_command_are_those_of_the_first_start_but_for_the_seed(
    script: Callable[[str], Path], quick: None
) -> None:
    path = script(
        "import os, sys\nprint(os.environ['BLENDTORCH_RESTARTS'], os.environ['MINE'], sys.argv, flush=True)\n"
        "sys.exit(os.environ['BLENDTORCH_RESTARTS'] == '0')"
    )
    with launched(path, restart="on-failure", env={"MINE": "x"}, seed=7) as launcher:
        assert launcher.wait() == [0]
        before, mark, after = log(launcher).splitlines()
    assert mark == "---- blendtorch: restart 1 of instance 0 ----"
    assert before.startswith("0 x [")
    assert "'-btseed', '7'" in before
    assert after == ("1" + before[1:]).replace("'-btseed', '7'", "'-btseed', '8'")


def test_everything_that_a_dead_instance_started_is_gone_before_the_next_start(
    script: Callable[[str], Path], quick: None
) -> None:
    """A grandchild that ignores SIGTERM, in a session of its own, which listens on the instance's port."""
    stubborn = (
        "import signal, socket, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen(); print(1, flush=True); time.sleep(600)"
    )
    path = script(
        COUNT + "import subprocess, sys\naddress = args.btsockets['DATA']\nif run == 0:\n"
        f"    child = subprocess.Popen([sys.executable, '-c', {stubborn!r}, address.rpartition(':')[2]],\n"
        "        stdout=subprocess.PIPE, start_new_session=True)\n"
        "    child.stdout.readline()\n    print(child.pid, flush=True)\n    os._exit(1)\n"
        "frames(btb.DataPublisher(address, args.btid))"
    )
    with launched(path, restart="on-failure") as launcher:
        assert key(next(stream(launcher))) == (1, 0)
        assert not is_alive(int(log(launcher).split()[0]))


# -- limits ------------------------------------------------------------------------------------------------------------


def test_without_restart_a_killed_instance_stays_dead(script: Callable[[str], Path]) -> None:
    with launched(script(FOREVER)) as launcher:
        items = stream(launcher)
        next(items)
        process(launcher).kill()
        with pytest.raises(InstanceDied):
            list(items)
        assert launcher.wait() == [-signal.SIGKILL]


def test_an_instance_that_fails_again_and_again_is_given_up_with_the_numbers(
    script: Callable[[str], Path], quick: None
) -> None:
    with launched(script("raise ValueError('no cube')"), restart="on-failure", max_restarts=3) as launcher:
        with pytest.raises(InstanceDied, match=r"(?s)^instance 0: ValueError: no cube.*code 1, started again 3 times"):
            next(stream(launcher))
        assert launcher.wait() == [1]
        with pytest.raises(InstanceDied, match=r"It is not started again: it was 3 times in a row \(max_restarts=3\)"):
            launcher.assert_alive()
        assert log(launcher).count("ValueError: no cube") == 4


def test_pauses_grow_up_to_a_limit(
    script: Callable[[str], Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_side.launching.instance, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(torch_side.launching.instance, "_LONGEST_PAUSE_S", 0.05)
    with launched(script("raise SystemExit(3)"), restart="on-failure", max_restarts=5) as launcher:
        launcher.wait()
        told = eventually(lambda: len(caplog.messages) == 6 and caplog.messages)
    pauses = [float(message.partition("started again in ")[2].split()[0]) for message in told[:5]]
    assert pauses == [0.01, 0.02, 0.04, 0.05, 0.05]


def test_who_ran_well_for_a_while_begins_anew(
    script: Callable[[str], Path], quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_side.launching.instance, "RAN_WELL_S", 0.0)
    path = script("import os, sys\nsys.exit(int(os.environ['BLENDTORCH_RESTARTS']) < 8)")
    with launched(path, restart="on-failure", max_restarts=1) as launcher:
        assert launcher.wait() == [0]
        assert report(launcher).restarts == 8


def test_while_a_restart_is_pending_nobody_is_dead(
    script: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_side.launching.instance, "_FIRST_PAUSE_S", 600.0)
    monkeypatch.setattr(torch_side.launching.instance, "_LONGEST_PAUSE_S", 600.0)
    with launched(script("raise SystemExit(3)"), restart="on-failure") as launcher:
        eventually(lambda: report(launcher).state == "restarting")
        launcher.assert_alive()
        with pytest.raises(StreamTimeout, match="instance 0: restarting"):
            next(stream(launcher, timeoutms=2000))
    assert launcher.wait() == [3]


def test_an_instance_that_is_done_is_not_started_again_on_failure(script: Callable[[str], Path]) -> None:
    path = script(COUNT + "frames(btb.DataPublisher(args.btsockets['DATA'], args.btid), end=5)")
    with launched(path, restart="on-failure") as launcher:
        received = []
        with pytest.raises(InstanceDied, match="5 of 1000000"):
            for item in stream(launcher):
                received.append(key(item))
        assert received == [(0, i) for i in range(5)]


def test_with_always_a_script_that_is_done_begins_again_without_a_limit(script: Callable[[str], Path]) -> None:
    path = script(COUNT + "frames(btb.DataPublisher(args.btsockets['DATA'], args.btid), end=7)")
    with launched(path, restart="always", max_restarts=2) as launcher:
        items = stream(launcher)
        received = [key(next(items)) for _ in range(7 * 5)]
        assert received == [(run, i) for run in range(5) for i in range(7)]


def test_with_always_a_script_that_is_done_without_a_message_is_given_up(
    script: Callable[[str], Path], quick: None
) -> None:
    with launched(script(""), restart="always", max_restarts=2) as launcher:
        assert launcher.wait() == [0]
        assert report(launcher).restarts == 2


def test_leaving_ends_an_instance_that_is_just_being_started_again(
    script: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the moment; conftest.py sees to it that nothing is left."""
    monkeypatch.setattr(torch_side.launching.instance, "_FIRST_PAUSE_S", 0.0)
    for _ in range(15):
        with launched(script(FOREVER), 2, restart="on-failure") as launcher:
            process(launcher).kill()
            eventually(partial(is_being_started_again, launcher))
        assert all(ended.returncode is not None for ended in launcher.launch_info.processes or [])


def is_being_started_again(launcher: BlenderLauncher) -> bool:
    return report(launcher).state == "restarting" or report(launcher).restarts > 0


# -- recycled ----------------------------------------------------------------------------------------------------------


def test_recycling_is_exact_and_loses_and_repeats_nothing(script: Callable[[str], Path]) -> None:
    with launched(script(FOREVER), recycle_after=20, max_restarts=1) as launcher:
        items = stream(launcher)
        received = [key(next(items)) for _ in range(20 * 4 + 1)]
        check_that_each_run_is_whole(received, per_run=20)
        launcher.assert_alive()
        assert report(launcher).restarts == 4


def test_recycling_loses_nothing_over_tcp(script: Callable[[str], Path]) -> None:
    with launched(script(FOREVER), recycle_after=20) as launcher:
        items = iter(RemoteIterableDataset(address(launcher).elsewhere(), max_items=1000))
        received = [key(next(items)) for _ in range(61)]
        check_that_each_run_is_whole(received, per_run=20)


def test_a_recycled_script_cleans_up_and_counts_on_where_it_was(script: Callable[[str], Path], tmp_path: Path) -> None:
    state = tmp_path / "next"
    state.write_text("0")
    path = script(
        COUNT
        + f"import atexit, pathlib\nstate = pathlib.Path({str(state)!r})\natexit.register(print, 'atexit', flush=True)\n"
        "try:\n"
        "    with btb.DataPublisher(args.btsockets['DATA'], args.btid) as publisher:\n"
        "        for i in range(int(state.read_text()), 10**9):\n"
        "            publisher.publish(frameid=i)\n"
        "            state.write_text(str(i + 1))\n"
        "finally:\n    print('finally', flush=True)"
    )
    with launched(path, recycle_after=3) as launcher:
        items = stream(launcher)
        assert [next(items)["frameid"] for _ in range(30)] == list(range(30))
        assert log(launcher).startswith("finally\natexit\n---- blendtorch: restart 1 of instance 0 ----\nfinally\n")


def test_what_belongs_to_the_last_frame_is_still_published_on_other_sockets(script: Callable[[str], Path]) -> None:
    path = script(
        COUNT + "image, label = (btb.DataPublisher(args.btsockets[n], args.btid) for n in ('DATA', 'LABEL'))\n"
        "for i in range(10**9):\n    image.publish(run=run, i=i)\n    label.publish(run=run, i=i)\n"
    )
    with launched(path, named_sockets=["DATA", "LABEL"], recycle_after=4) as launcher:
        images, labels = stream(launcher), stream(launcher, "LABEL")
        for run in range(3):
            for i in range(4):
                for item in next(images), next(labels):
                    assert (item["run"], item["i"]) == (run, i)


def test_a_script_that_swallows_the_end_ends_at_its_next_message(script: Callable[[str], Path]) -> None:
    path = script(
        COUNT + "publisher = btb.DataPublisher(args.btsockets['DATA'], args.btid)\n"
        "for i in range(10**9):\n"
        "    try:\n        publisher.publish(run=run, frameid=i)\n    except BaseException:\n        print('swallowed')"
    )
    with launched(path, recycle_after=5) as launcher:
        items = stream(launcher)
        received = [(item["run"], item["frameid"]) for item in (next(items) for _ in range(16))]
        check_that_each_run_is_whole(received, per_run=5)


def test_a_publisher_in_a_thread_recycles_too(script: Callable[[str], Path]) -> None:
    path = script(
        COUNT + "import threading\n"
        "thread = threading.Thread(target=frames, args=[btb.DataPublisher(args.btsockets['DATA'], args.btid)])\n"
        "thread.start()\nimport time\ntime.sleep(600)"
    )
    with launched(path, recycle_after=5) as launcher:
        items = stream(launcher)
        check_that_each_run_is_whole([key(next(items)) for _ in range(16)], per_run=5)


def test_a_failure_of_a_recycled_instance_still_counts(script: Callable[[str], Path], quick: None) -> None:
    path = script(
        COUNT + "publisher = btb.DataPublisher(args.btsockets['DATA'], args.btid)\n"
        "frames(publisher, end=10 if run == 0 else 3)\n" + "frames(publisher) if run == 0 else os._exit(5)"
    )
    with launched(path, recycle_after=10, restart="on-failure", max_restarts=2) as launcher:
        with pytest.raises(InstanceDied, match="code 5"):
            for _ in stream(launcher):
                pass
        assert report(launcher).restarts == 3


# -- stuck -------------------------------------------------------------------------------------------------------------


def test_a_stopped_instance_is_named_with_the_age_of_its_last_message(script: Callable[[str], Path]) -> None:
    with launched(script(FOREVER), 2) as launcher:
        items = stream(launcher)
        for btid in (0, 1):
            next(item for item in items if item["btid"] == btid)
            process(launcher, btid).send_signal(signal.SIGSTOP)
        with pytest.raises(StreamTimeout) as caught:
            list(stream(launcher, timeoutms=500))
        message = str(caught.value)
        for btid in (0, 1):
            assert f"instance {btid}: STOPPED (SIGSTOP" in message
            assert f"kill -CONT {process(launcher, btid).pid}" in message
        assert message.count("DATA: last message ") == 2


def test_a_stopped_instance_is_replaced(
    script: Callable[[str], Path], quick: None, lose_patience: Callable[..., None], caplog: Any
) -> None:
    with launched(script(FOREVER), restart="on-failure", stall_timeout=PATIENCE_S) as launcher:
        items = stream(launcher)
        received = [key(next(items)) for _ in range(30)]
        process(launcher).send_signal(signal.SIGSTOP)
        lose_patience(0)
        while received[-1] < (1, 30):
            received.append(key(next(items)))
        check_that_each_run_is_whole(received)
        assert "it was stuck, stopped by a signal (SIGSTOP): no message for" in caplog.text
        assert f"(stall_timeout={PATIENCE_S:g})" in caplog.text


def test_a_render_that_hangs_is_replaced(
    script: Callable[[str], Path], quick: None, lose_patience: Callable[..., None]
) -> None:
    path = script(
        COUNT + "publisher = btb.DataPublisher(args.btsockets['DATA'], args.btid)\n"
        "frames(publisher, end=5 if run == 0 else 10**9)\nimport time\ntime.sleep(600)"
    )
    with launched(path, restart="on-failure", stall_timeout=PATIENCE_S) as launcher:
        items = stream(launcher)
        received = [key(next(items)) for _ in range(5)]
        lose_patience(0)
        received += [key(next(items)) for _ in range(20)]
        assert received == [(0, i) for i in range(5)] + [(1, i) for i in range(20)]


def test_without_restart_an_instance_that_hangs_is_ended_and_reported(
    script: Callable[[str], Path], lose_patience: Callable[..., None]
) -> None:
    lose_patience(0)
    with launched(script("import time\ntime.sleep(600)"), stall_timeout=PATIENCE_S) as launcher:
        with pytest.raises(InstanceDied):
            next(stream(launcher))
        with pytest.raises(InstanceDied, match="it was stuck: no message for"):
            launcher.assert_alive()


def test_an_instance_that_waits_for_room_is_not_stuck(
    script: Callable[[str], Path], lose_patience: Callable[..., None]
) -> None:
    """One that hangs is killed beside it meanwhile, so the patience was exceeded."""
    path = script(
        COUNT + "publisher = btb.DataPublisher(args.btsockets['DATA'], args.btid)\n"
        "frames(publisher, end=3 if args.btid else 10**9)\nimport time\ntime.sleep(600)"
    )
    with launched(path, 2, stall_timeout=PATIENCE_S) as launcher:
        waiting, hanging = (item.twin for item in launcher.launch_info.addresses["DATA"])
        eventually(lambda: (seen := activity(SharedPlace(waiting))) and seen.stalled_ns and published(hanging) == 3)
        lose_patience(0)
        lose_patience(1)
        eventually(lambda: report(launcher, 1).state == "exited")
        assert report(launcher, 0).state == "running"
        items = stream(launcher)
        received = [key(item) for item in (next(items) for _ in range(40)) if item["btid"] == 0]
        assert received == [(0, i) for i in range(len(received))]


# -- real Blender ------------------------------------------------------------------------------------------------------

RENDER = """
import bpy, os, sys
import blendtorch.btb as btb
args, rest = btb.parse_blendtorch_args()
run = int(os.environ["BLENDTORCH_RESTARTS"])
bpy.context.scene.render.resolution_x, bpy.context.scene.render.resolution_y = 64, 48
off = btb.OffScreenRenderer(mode="rgb")
off.set_render_style(shading="SOLID", overlays=False)
publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid)

def publish(frameid):
    publisher.publish(image=off.render(), run=run, frameid=frameid)
"""
ANIMATE = """
anim = btb.AnimationController()
anim.post_frame.add(lambda: publish(anim.frameid))
anim.play(frame_range=(0, 999))
"""
TIMER = """
def step():
    publish(step.frame)
    step.frame += 1
    return 0.0
step.frame = 0
if bpy.app.background:
    while True:
        step()
bpy.app.timers.register(step)
"""


def test_blender_is_recycled_exactly_and_restarted_when_killed(
    blender: Any, script: Callable[[str], Path], quick: None
) -> None:
    way = ANIMATE if blender.form == "executable" else TIMER  # the two have little to do with each other
    with launched(
        script(RENDER + way), blender=blender.argument, recycle_after=4, restart="on-failure", max_restarts=1
    ) as launcher:
        items = stream(launcher)
        received = [(item["run"], item["frameid"]) for item in (next(items) for _ in range(9))]
        check_that_each_run_is_whole(received, per_run=4)
        directory = Path(address(launcher).twin.directory)
        scratch = (directory / "instance-00.started").read_text()
        process(launcher).kill()
        item = next(item for item in items if item["run"] == 3)
        assert item["frameid"] == 0
        assert item["image"].shape == (48, 64, 3)
        assert not scratch.startswith("/tmp/blender_") or not Path(scratch).exists()
