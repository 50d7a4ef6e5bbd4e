"""Who may read at an instance's port, whose messages it gives, and what becomes of readers when port or seats are taken."""

import contextlib
import os
import pickle
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blendtorch_shm.errors import StreamTimeout
from blendtorch_shm.launch.address import Address, readers_path
from blendtorch_shm.memory.layout import FORWARDER
from blendtorch_shm.memory.locks import Locks, consumer_lock
from blendtorch_shm.transport import open_source
from torch_side import BlenderLauncher, RemoteIterableDataset

from ..integration.hosts import why_not
from .conftest import eventually, is_alive, launch

SCRIPT = """
import os
import numpy as np
import blendtorch.btb as btb
args, rest = btb.parse_blendtorch_args()
run = int(os.environ["BLENDTORCH_RESTARTS"])
publisher = btb.DataPublisher(args.btsockets["DATA"], args.btid)
for i in range(10**9):
    publisher.publish(image=np.full((48, 64, 3), i % 256, np.uint8), run=run, frameid=i, launch=os.environ["BLENDTORCH_LAUNCH"])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "publish.py"
    path.write_text(SCRIPT)
    return path


def only(launcher: BlenderLauncher) -> Address:
    return launcher.launch_info.addresses["DATA"][0]


def read(address: str, **options: Any) -> Iterator[Any]:
    return iter(RemoteIterableDataset(address, max_items=10**6, **options))


def read_until(items: Iterator[Any], run: int) -> None:
    """Read on, without a gap or a repetition, until the first messages of that run of the instance."""
    item = next(items)
    while item["run"] < run:
        following = next(items)
        is_next = (following["run"], following["frameid"]) == (item["run"], item["frameid"] + 1)
        assert is_next or (following["run"], following["frameid"]) == (item["run"] + 1, 0)
        item = following


def read_in_vain(address: str) -> str:
    """What a reader is told that gets nothing."""
    with pytest.raises(StreamTimeout) as caught:
        next(read(address, timeoutms=1000))
    return str(caught.value)


# -- whose messages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_open", [True, False], ids=["open to all", "with keys"])
def test_a_reader_over_tcp_takes_nothing_of_the_next_launch_on_its_port(script: Path, is_open: bool) -> None:
    with launch(num_instances=1, script=script, allow_unauthenticated=is_open) as first:
        address = only(first).elsewhere()
        items = read(address, timeoutms=1500)
        typed = read(Address(str(address), unauthenticated=True), timeoutms=1500) if is_open else None
        assert next(items)["launch"] == address.launch
        assert typed is None or next(typed)["launch"] == address.launch
    port = int(address.rpartition(":")[2])
    with launch(num_instances=1, script=script, allow_unauthenticated=is_open, start_port=port) as second:
        for ended in filter(None, (items, typed)):
            with pytest.raises(StreamTimeout) as caught:
                while next(ended)["launch"] == address.launch:  # its own last messages
                    pass
            said = str(caught.value)
            if is_open:
                assert f"launch {only(second).launch} is there now" in said
                assert f"belongs to launch {address.launch}" in said
            else:
                assert "refused: what listens there now does not have the keys of this launch: another launch" in said
                assert "LaunchInfo.load_json" in said
            assert "do they run" not in said
        received = [next(items_of_second)["frameid"] for items_of_second in [read(only(second))] for _ in range(20)]
        assert received == list(range(20))


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_dataset_that_is_sent_into_a_container_with_memory_of_its_own_reads_over_tcp(
    script: Path, tmp_path: Path
) -> None:
    with launch(num_instances=1, script=script) as launcher:
        sent = tmp_path / "dataset.pickle"
        sent.write_bytes(pickle.dumps(RemoteIterableDataset([only(launcher)], max_items=20, timeoutms=20_000)))
        program = f"import pickle; print([item['frameid'] for item in pickle.load(open({str(sent)!r}, 'rb'))])"
        container = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
        done = subprocess.run([*container, sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == str(list(range(20))), done.stderr
        assert pickle.loads(pickle.dumps(only(launcher))).twin == only(launcher).twin


# -- who may read ---------------------------------------------------------------------------------------------------


def test_on_loopback_too_only_those_with_the_keys_of_the_launch_are_served(script: Path) -> None:
    with launch(num_instances=1, script=script) as launcher:
        address = only(launcher)
        path = readers_path(address.launch)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
        assert next(read(address.elsewhere()))["frameid"] == 0
        with open_source([Address(str(address))]) as stranger:  # who cannot read that file
            assert stranger.receive(0.5) is None
            assert "refused: the two ends do not understand each other" in stranger.explain()
            assert "take the addresses from launch_info" in stranger.explain()
        assert next(read(str(address)))["frameid"] > 0


def test_who_allows_it_serves_every_user_of_the_host(script: Path) -> None:
    with (
        launch(num_instances=1, script=script, allow_unauthenticated=True) as launcher,
        open_source([Address(str(only(launcher)))]) as stranger,
    ):
        assert stranger.receive(20.0) is not None


# -- what is taken --------------------------------------------------------------------------------------------------


def test_readers_in_all_seats_do_not_keep_a_killed_instance_from_starting_again(script: Path) -> None:
    with launch(num_instances=1, script=script, restart="on-failure") as launcher, contextlib.ExitStack() as seats:
        items = read(only(launcher))
        next(items)
        twin = only(launcher).twin
        assert twin is not None
        locks = [seats.enter_context(Locks(twin.lock_path)) for _ in range(FORWARDER)]
        for index, lock in enumerate(locks):
            lock.hold(consumer_lock(index))
        assert f"has {FORWARDER} readers already, which is the limit" in read_in_vain(only(launcher))
        process = (launcher.processes or [])[0]
        process.kill()
        eventually(lambda: not is_alive(process.pid))
        for index, lock in enumerate(locks):  # whatever seat has become free, a reader that waits for one has it first
            lock.hold(consumer_lock(index))
        read_until(items, run=1)
        read_until(read(only(launcher).elsewhere()), run=1)
        seats.close()
        read_until(read(only(launcher)), run=1)


def take_port(port: int) -> socket.socket:
    """Listen on a port that an instance has just left."""

    def listen() -> socket.socket | None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
            return listener
        except OSError:
            listener.close()
            return None

    return eventually(listen)


def test_a_port_that_was_taken_while_an_instance_was_down_stops_no_reader_of_shared_memory(script: Path) -> None:
    with launch(num_instances=1, script=script, restart="on-failure") as launcher:
        address = only(launcher)
        items, elsewhere = read(address), read(address.elsewhere())
        next(items)
        next(elsewhere)
        assert launcher.stats()["DATA"][0].reachable
        (launcher.processes or [])[0].kill()
        with take_port(int(address.rpartition(":")[2])):
            while next(items)["run"] < 1:
                pass
            assert not launcher.stats()["DATA"][0].reachable
            assert f"Readers elsewhere cannot reach {address}: another program" in launcher.reports()[0].log_tail
        while not launcher.stats()["DATA"][0].reachable:
            next(items)
        while next(elsewhere)["run"] < 1:
            pass
        assert f"Readers elsewhere can reach {address} now." in launcher.reports()[0].log_tail
