"""FrameLoader over real instances, which here are plain Python processes."""

import contextlib
import gc
import json
import os
import pickle
import re
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils import data
from torch.utils.data import default_collate

from blendtorch_shm.errors import ConfigurationError, InstanceDied, StreamClosed, StreamTimeout, UnreadableMessage
from blendtorch_shm.launch.address import Address
from blendtorch_shm.launch.info import LaunchInfo
from blendtorch_shm.memory.states import State
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer
from blendtorch_shm.stream.stats import stats
from torch_side import BlenderLauncher, FrameLoader, RemoteIterableDataset, batch_memory, frame_loader
from torch_side.batch_memory import HostMemory, Mark, Rows

from ..integration.programs import PATIENCE_S, Workshop
from .conftest import BAD, check, eventually, keys, launch, publish_some


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with Workshop(tmp_path_factory.mktemp("programs")) as workshop:
        yield workshop


@pytest.fixture
def info(launcher: BlenderLauncher, tmp_path: Path) -> Path:
    """The launch information of the two instances, for other programs."""
    LaunchInfo.save_json(tmp_path / "info.json", launcher.launch_info)
    return tmp_path / "info.json"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "blendtorch FrameLoader"]


def leased(address: Any) -> int:
    """Slots of this stream that consumers hold."""
    return stats(address)[0].leased


# -- what it yields ---------------------------------------------------------------------------------------------


def test_batches_are_those_of_a_data_loader(addresses: list[str]) -> None:
    ours = next(iter(FrameLoader(addresses, 4, max_items=8)))
    theirs = next(iter(data.DataLoader(RemoteIterableDataset(addresses, max_items=8), batch_size=4)))
    assert {k: (type(v), v.dtype, v.shape) for k, v in ours.items()} == {
        k: (type(v), v.dtype, v.shape) for k, v in theirs.items()
    }
    assert list(ours) == list(theirs)
    check(ours)


@pytest.mark.parametrize(
    ("max_items", "drop_last", "sizes"),
    [
        (16, False, [8, 8]),
        (19, False, [8, 8, 3]),
        (19, True, [8, 8]),
        (5, False, [5]),
        (5, True, []),
        (0, False, []),
    ],
)
def test_exactly_max_items_arrive_in_batches(
    addresses: list[str], max_items: int, drop_last: bool, sizes: list[int]
) -> None:
    loader = FrameLoader(addresses, 8, max_items=max_items, drop_last=drop_last)
    batches = list(loader)
    assert [len(batch["image"]) for batch in batches] == sizes
    assert len(loader) == len(sizes)
    assert len(set(keys(batches))) == sum(sizes)
    for batch in batches:
        check(batch)


def test_one_epoch_after_the_other_loses_and_repeats_nothing() -> None:
    with launch("--stop-after", "40") as launcher:
        loader = FrameLoader(launcher.launch_info.addresses["DATA"], 8, max_items=20)
        items = [key for _ in range(4) for key in keys(loader)]
    assert sorted(items) == [(btid, frame) for btid in (0, 1) for frame in range(40)]
    for btid in (0, 1):
        assert [frame for found, frame in items if found == btid] == list(range(40))


def test_without_max_items_it_does_not_end(addresses: list[str]) -> None:
    loader = FrameLoader(addresses, 4)
    with pytest.raises(TypeError, match="max_items is None"):
        len(loader)
    batches = iter(loader)
    assert len(set(keys(next(batches) for _ in range(50)))) == 200


def test_instances_take_turns(addresses: list[str]) -> None:
    batches = list(FrameLoader(addresses, 8, max_items=160))
    assert {int(btid) for batch in batches for btid in batch["btid"]} == {0, 1}


@pytest.mark.parametrize("copy_threads", [1, 3])
def test_batches_that_are_held_stay_as_they_are(addresses: list[str], copy_threads: int) -> None:
    batches = list(FrameLoader(addresses, 4, max_items=200, copy_threads=copy_threads))
    for batch in batches:
        check(batch)
    assert len(set(keys(batches))) == 200


def test_a_row_that_is_held_stays_as_it_is_and_may_be_written_to(addresses: list[str]) -> None:
    held = []
    for batch in FrameLoader(addresses, 4, max_items=200):
        check(batch)
        batch["image"][0].fill_(255)
        held.append((int(batch["value"][1]), batch["image"][1, ::2].numpy()))
    for value, image in held:
        assert (image == value).all()


def test_memory_is_used_again(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = Mock(wraps=batch_memory._allocate)
    monkeypatch.setattr(batch_memory, "_allocate", allocate)
    for batch in FrameLoader(addresses, 4, max_items=200, prefetch=2):
        check(batch)
    assert 0 < allocate.call_count <= 2 + 3


def test_a_batch_holds_no_slot(addresses: list[str]) -> None:
    batches = list(FrameLoader(addresses, 8, max_items=80))
    assert [leased(address) for address in addresses] == [0, 0]
    assert len(batches) == 10


def test_no_more_batches_are_prepared_than_asked_for() -> None:
    with launch("--stop-after", "64", num_instances=1) as launcher:
        (address,) = launcher.launch_info.addresses["DATA"]
        batches: Any = iter(FrameLoader(address, 4, prefetch=3))
        first = next(batches)
        assert keys([first]) == [(0, i) for i in range(4)]
        eventually(lambda: counted(launcher, "delivered") >= 16)
        batches.close()
        assert counted(launcher, "delivered") == 16


def counted(launcher: BlenderLauncher, what: str) -> int:
    return sum(getattr(stream, what) for streams in launcher.stats().values() for stream in streams)


# -- transforms and collations ----------------------------------------------------------------------------------


def test_a_transform_is_called_for_each_item_and_may_return_anything(addresses: list[str]) -> None:
    def transform(item: dict[str, Any]) -> tuple[Any, ...]:
        image = item["image"]
        assert type(image) is np.ndarray
        assert image.flags.writeable
        image[0, 0] = 1
        return image.astype(np.float32)[::-1], {"chw": np.transpose(image, (2, 0, 1))}, item["btid"]

    for flipped, views, btid in FrameLoader(addresses, 4, max_items=8, transform=transform):
        assert flipped.dtype == torch.float32
        assert flipped.shape == (4, 48, 64, 3)
        assert (flipped[:, -1, 0] == 1).all()
        assert views["chw"].shape == (4, 3, 48, 64)
        assert set(btid.tolist()) <= {0, 1}


def test_a_transform_that_is_set_meanwhile_is_for_the_next_iteration(addresses: list[str]) -> None:
    """Only for one that there is from the start, arrays may be changed in place."""
    loader = FrameLoader(addresses, 4, max_items=24)
    batches = iter(loader)
    check(next(batches))
    loader.dataset.item_transform = lambda item: {"value": item["value"]}
    for batch in batches:
        check(batch)
    assert {tuple(batch) for batch in loader} == {("value",)}


def test_a_collate_fn_gets_the_items_as_tensors(addresses: list[str]) -> None:
    def collate(items: list[dict[str, Any]]) -> Any:
        assert all(isinstance(item["image"], torch.Tensor) for item in items)
        return [item["image"] for item in items], [item["value"] for item in items]

    seen = 0
    for images, values in FrameLoader(addresses, 4, max_items=90, collate_fn=collate):
        for image, value in zip(images, values, strict=True):
            assert (image == value).all()
            seen += 1
    assert seen == 90


def test_what_makes_no_batch_names_the_field(addresses: list[str]) -> None:
    def crop(item: dict[str, Any]) -> dict[str, Any]:
        return {"crop": item["image"][: 20 + item["frameid"] % 20]}

    with pytest.raises(RuntimeError, match=r"'crop' makes no batch.*in item 1"):
        list(FrameLoader(addresses[0], 4, max_items=8, transform=crop))


def transform_that_fails(item: dict[str, Any]) -> Any:
    if item["frameid"] % 8 == 5:
        raise LookupError("no such material")
    return item


def transform_that_fails_in_the_end(item: dict[str, Any]) -> Any:
    try:
        return transform_that_fails(item)
    except LookupError as error:
        raise LookupError(f"{error} in frame {item['frameid']}") from error


def collate_that_fails(items: list[dict[str, Any]]) -> Any:
    return [transform_that_fails(item) for item in items]


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("transform_that_fails", dict(transform=transform_that_fails)),
        ("transform_that_fails_in_the_end", dict(transform=transform_that_fails_in_the_end)),
        ("collate_that_fails", dict(collate_fn=collate_that_fails)),
    ],
)
def test_an_error_of_the_users_has_its_traceback_and_holds_no_slot(
    addresses: list[str], where: str, arguments: dict[str, Any]
) -> None:
    gc.disable()  # a slot must not wait for the collector
    try:
        with pytest.raises(LookupError, match="no such material") as raised:
            list(FrameLoader(addresses, 4, max_items=80, **arguments))
        assert [leased(address) for address in addresses] == [0, 0]
    finally:
        gc.enable()
    assert where in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]


def test_an_error_that_was_dropped_is_gone(addresses: list[str]) -> None:
    class NoSuchMaterial(LookupError):
        pass

    def transform(item: dict[str, Any]) -> Any:
        error = NoSuchMaterial()
        alive.append(weakref.ref(error))
        raise error

    alive: list[weakref.ref[NoSuchMaterial]] = []
    gc.disable()
    try:
        with contextlib.suppress(NoSuchMaterial):
            list(FrameLoader(addresses, 4, max_items=80, transform=transform))
        assert alive
        eventually(lambda: not any(reference() for reference in alive))  # the thread may be about to let go of one
    finally:
        gc.enable()


@pytest.mark.parametrize("collate_fn", [None, default_collate])
@pytest.mark.parametrize(("bad", "transform", "words"), BAD)
def test_an_item_that_raises_costs_itself_alone_if_the_user_goes_on(
    stream: tuple[Address, SharedPlace, Producer], bad: Any, transform: Any, words: str, collate_fn: Any
) -> None:
    address, place, sink = stream
    publish_some(sink, bad)
    loader = FrameLoader(address, 2, max_items=4, transform=transform, collate_fn=collate_fn)
    batches = iter(loader)
    outcomes: list[Any] = []
    for _ in range(4):
        try:
            batch = next(batches)
            assert (batch["image"] == batch["i"][:, None]).all()
            outcomes.append(batch["i"].tolist())
        except (UnreadableMessage, LookupError) as error:
            outcomes.append("error" if re.search(words, str(error)) else error)
            if collate_fn is None:
                assert inspect(place).count(State.LEASED) == 0, "nothing is received before the user goes on"
    assert outcomes == [[0, 1], "error", "error", [3, 5]]
    assert list(batches) == []
    del batch
    assert inspect(place).count(State.FREE) == 16


def test_after_a_time_out_the_user_may_go_on_waiting(stream: tuple[Address, SharedPlace, Producer]) -> None:
    address, _, sink = stream
    batches = iter(FrameLoader(address, 2, timeoutms=1))
    for i in (0, 2):
        sink.publish({"i": i})
        with pytest.raises(StreamTimeout):
            next(batches)
        sink.publish({"i": i + 1})
        assert next(batches)["i"].tolist() == [i, i + 1]


# -- instances that end, are silent, or come back ---------------------------------------------------------------


def test_all_full_batches_of_instances_that_have_ended_are_delivered_before_the_error() -> None:
    with launch("--stop-after", "9") as launcher:
        batches: list[dict[str, Any]] = []
        with pytest.raises(InstanceDied, match="18 of 40 items"):
            batches.extend(FrameLoader(launcher.launch_info.addresses["DATA"], 4, max_items=40))
        assert len(set(keys(batches))) == 16


def test_silence_is_a_timeout_that_says_who_lives_and_what_he_last_logged(tmp_path: Path) -> None:
    script = tmp_path / "silent.py"
    script.write_text("import time\nprint('loading textures')\ntime.sleep(600)\n")
    with launch(script=script) as launcher:
        loader = FrameLoader(launcher.launch_info.addresses["DATA"], 4, timeoutms=3000)
        with pytest.raises(StreamTimeout, match=r"(?s)instance 0: running.*loading textures.*instance 1: running"):
            next(iter(loader))


def test_instances_that_come_back_are_read_on() -> None:
    with launch("--stop-after", "20", num_instances=1, restart="always") as launcher:
        batches = list(FrameLoader(launcher.launch_info.addresses["DATA"], 8, max_items=50))
    assert keys(batches) == [(0, i % 20) for i in range(50)]


# -- ways to travel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [0, 1])
def test_instances_elsewhere_are_read_over_tcp(addresses: list[Address], local: int) -> None:
    mixed = addresses[:local] + [address.elsewhere() for address in addresses[local:]]
    seen: set[tuple[int, int]] = set()
    for batch in FrameLoader(mixed, 8):
        check(batch)
        assert seen.isdisjoint(keys([batch]))
        seen.update(keys([batch]))
        if len(seen) >= 100 and {btid for btid, _ in seen} == {0, 1}:  # who is connected first may send a hundred alone
            break


def test_two_loaders_of_one_process_share_the_messages(addresses: list[str]) -> None:
    one, other = iter(FrameLoader(addresses, 4, max_items=80)), iter(FrameLoader(addresses, 4, max_items=80))
    batches = [batch for pair in zip(one, other, strict=True) for batch in pair]
    assert len(set(keys(batches))) == 160


TRAIN = """
import json, sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch_side import FrameLoader, LaunchInfo

info, rendezvous, rank = sys.argv[1:]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method="file://" + rendezvous, rank=int(rank), world_size=2)
model = DistributedDataParallel(torch.nn.Linear(48 * 64 * 3, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
items = []
for batch in FrameLoader(LaunchInfo.load_json(info).addresses["DATA"], 4, max_items=40):
    assert (batch["image"] == batch["value"].view(-1, 1, 1, 1)).all()
    loss = model(batch["image"].flatten(1).float() / 255).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    items += zip(batch["btid"].tolist(), batch["frameid"].tolist())
weights = [parameter.detach().double().sum().item() for parameter in model.parameters()]
distributed.destroy_process_group()
print(json.dumps([items, weights]))
"""


@pytest.mark.timeout(PATIENCE_S + 60)
def test_the_ranks_of_a_distributed_training_share_the_messages(workshop: Workshop, info: Path, tmp_path: Path) -> None:
    ranks = [workshop.run(TRAIN, info, tmp_path / "rendezvous", rank) for rank in range(2)]
    for rank in ranks:
        assert rank.ends() == 0, rank.stderr
    (first, weights), (second, same) = [json.loads(rank.stdout) for rank in ranks]
    assert len(first) == len(second) == 40
    assert len(set(map(tuple, first + second))) == 80
    assert weights == same


# -- beginnings and ends ----------------------------------------------------------------------------------------


def test_an_iteration_can_be_left_half_way_and_begun_again(addresses: list[str]) -> None:
    loader = FrameLoader(addresses, 4, max_items=10**6)
    for _ in range(3):
        for number, batch in enumerate(loader):
            check(batch)
            if number == 2:
                break
    assert [leased(address) for address in addresses] == [0, 0]
    assert len(list(FrameLoader(addresses, 4, max_items=40))) == 10


def test_an_iteration_that_is_collected_late_ends_then(addresses: list[str]) -> None:
    cycle: list[Any] = [iter(FrameLoader(addresses, 4))]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    assert len(list(FrameLoader(addresses, 4, max_items=40))) == 10
    gc.collect()


def test_who_leaves_does_not_wait_for_ever_for_a_transform_and_says_so(
    addresses: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(frame_loader, "_CLOSING_PATIENCE_S", 0.01)
    go_on = threading.Event()

    def transform(item: dict[str, Any]) -> Any:
        nonlocal called
        called += 1
        if called > 4:
            assert go_on.wait(PATIENCE_S)
        return item

    called = 0
    batches: Any = iter(FrameLoader(addresses, 4, transform=transform))
    check(next(batches))
    eventually(lambda: called > 4)
    batches.close()
    assert ["has not ended within 0.01 s" in record.getMessage() for record in caplog.records] == [True]
    go_on.set()
    eventually(lambda: "blendtorch FrameLoader" not in [thread.name for thread in threading.enumerate()])


def test_an_iteration_that_never_began_has_no_thread(addresses: list[str]) -> None:
    iter(FrameLoader(addresses, 4))


def test_a_forked_child_cannot_go_on_and_does_not_disturb(addresses: list[str]) -> None:
    batches = iter(FrameLoader(addresses, 4, max_items=80))
    seen = keys([next(batches)])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            next(batches)
        except StreamClosed:
            code = 0
        del batches
        gc.collect()
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(set(seen + keys(batches))) == 80


ITERATE = """
import signal, sys
from torch_side import FrameLoader, LaunchInfo
addresses = LaunchInfo.load_json(sys.argv[1]).addresses["DATA"]
if sys.argv[2] == "tcp":
    addresses = [address.elsewhere() for address in addresses]
batches = iter(FrameLoader(addresses, 4))
next(batches)
print("iterating")
"""


@pytest.mark.timeout(PATIENCE_S + 60)
@pytest.mark.parametrize("way", ["shared", "tcp"])
@pytest.mark.parametrize(
    ("rest", "code"), [("", 0), ("sys.exit(3)\n", 3), ("raise LookupError\n", 1)], ids=["end", "exit", "error"]
)
def test_a_program_may_end_in_the_middle_of_an_iteration(
    workshop: Workshop, info: Path, addresses: list[str], way: str, rest: str, code: int
) -> None:
    program = workshop.run(ITERATE + rest, info, way)
    assert program.ends() == code, program.stderr
    assert program.stderr.count("Traceback") == (code == 1), program.stderr
    assert "Exception" not in program.stderr
    if way == "shared":
        assert [leased(address) for address in addresses] == [0, 0]


@pytest.mark.timeout(PATIENCE_S + 60)
@pytest.mark.parametrize("way", ["shared", "tcp"])
@pytest.mark.parametrize("rest", ["for batch in batches: pass\n", "signal.pause()\n"], ids=["iterates", "pauses"])
def test_ctrl_c_ends_an_iteration(workshop: Workshop, info: Path, way: str, rest: str) -> None:
    program = workshop.run(ITERATE + rest, info, way)
    program.until_it_says("iterating")
    program.interrupt(group=False)
    assert program.ends() == -signal.SIGINT, program.stderr
    assert program.stderr.count("Traceback") == 1, program.stderr
    assert "Exception ignored" not in program.stderr


def test_ctrl_c_ends_the_wait_for_a_batch_that_does_not_come() -> None:
    loader = FrameLoader("tcp://127.0.0.1:9", 4)
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(iter(loader))
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)


# -- copies that take their time --------------------------------------------------------------------------------


class SlowMark:
    """Passes when it is told to, or somebody waits for it."""

    def __init__(self, memory: "SlowMemory", number: int) -> None:
        self._memory = memory
        self._number = number
        self.has_passed = False

    def query(self) -> bool:
        return self.has_passed

    def synchronize(self) -> None:
        with self._memory.lock:
            self._memory.is_failing |= len(self._memory.begun) == self._memory.fails_when_begun
            self._memory.waited += not self.has_passed
            while not self.has_passed:
                self._memory.land()
        if self._memory.is_failing:
            self._memory.failed.append(self._number)
            raise OSError(f"copy {self._number} has failed")


class SlowMemory(HostMemory):
    """Copies as a device does: some time after it was asked to, reading its source only then."""

    def __init__(self) -> None:
        super().__init__(1, spares=2)
        self.begun: list[tuple[SlowMark, list[Callable[[], None]]]] = []
        self.copies: list[Callable[[], None]] = []
        self.lock = threading.Lock()  # the receiver waits for copies, and so does the user
        self.closed_with: int | None = None
        self.waited = 0
        self.marks = 0
        self.fails_when_begun: int | None = None
        self.is_failing = False
        self.failed: list[int] = []
        self.copies_until_one_fails = -1

    def copy(self, rows: Rows, index: int, array: np.ndarray) -> None:
        address, nbytes = array.ctypes.data, array.nbytes  # as DMA: the lease is nobody's business here

        def copy() -> None:
            source = (np.ctypeslib.ctypes.c_uint8 * nbytes).from_address(address)
            np.copyto(rows.first(index + 1)[index].numpy().reshape(-1), np.frombuffer(source, np.uint8))

        if not self.copies_until_one_fails:
            raise OSError("no copy can begin")
        self.copies_until_one_fails -= 1
        self.copies.append(copy)

    def mark(self) -> Mark | None:
        if not self.copies:
            return None
        mark = SlowMark(self, self.marks)
        self.marks += 1
        with self.lock:
            self.begun.append((mark, self.copies))
        self.copies = []
        return mark

    def land(self) -> None:
        """Do the oldest copies."""
        mark, copies = self.begun[0]
        for copy in copies:
            copy()
        mark.has_passed = True
        del self.begun[0]

    def close(self) -> None:
        self.closed_with = len(self.begun) + len(self.copies)
        super().close()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowMemory:
    memory = SlowMemory()
    monkeypatch.setattr(frame_loader, "open_memory", lambda *args, **kwargs: memory)
    return memory


def test_a_slot_is_released_when_its_copy_is_done_and_not_before(slow: SlowMemory) -> None:
    """The only copies here read the slots late; had one been released, the producer would have written the next frame there."""
    with launch("--send-hwm", "1", num_instances=1) as launcher:  # 1 + 6 slots, all in use
        addresses = launcher.launch_info.addresses["DATA"]
        batches = list(FrameLoader(addresses, 4, max_items=400))
        for batch in batches:
            check(batch)
        assert keys(batches) == [(0, i) for i in range(400)]
        assert leased(addresses[0]) == 0
    assert slow.waited
    assert slow.closed_with == 0


def test_whoever_leaves_waits_for_copies_that_are_under_way(slow: SlowMemory, addresses: list[str]) -> None:
    batches = iter(FrameLoader(addresses, 4))
    check(next(batches))
    batches.close()  # type: ignore[attr-defined]
    assert slow.closed_with == 0
    assert [leased(address) for address in addresses] == [0, 0]


def test_copies_after_one_that_has_failed_are_waited_for(slow: SlowMemory, addresses: list[str]) -> None:
    slow.fails_when_begun = 2
    with pytest.raises(OSError, match="has failed") as raised:
        next(iter(FrameLoader(addresses, 10_000)))
    assert len(slow.failed) == 2
    assert str(raised.value) == f"copy {slow.failed[0]} has failed"
    assert slow.closed_with == 0
    assert [leased(address) for address in addresses] == [0, 0]


def test_copies_before_one_that_cannot_begin_are_waited_for(slow: SlowMemory, addresses: list[str]) -> None:
    slow.copies_until_one_fails = 1
    with pytest.raises(OSError, match="no copy can begin"):
        list(FrameLoader(addresses, 4, max_items=64, transform=lambda item: [item["image"], item["image"]]))
    assert slow.waited == 1
    assert slow.closed_with == 0
    assert [leased(address) for address in addresses] == [0, 0]


# -- naps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("was", "wanted", "nap_ms"),
    [
        ([], 8, 0),  # nothing is known yet
        ([(8, 0.8)] * 40, 8, 0),  # all that was wanted was there: there may be more
        ([(3, 0.3)] * 40, 8, 0),  # as before, for a source that hands out three at once
        ([(1, 30), (0, 30)] * 20, 8, 0),  # they come seldom
        ([(8, 0.8)] * 40 + [(3, 0.3)], 8, 0.8),
        ([(8, 0.8)] * 40 + [(3, 0.3)], 2, 0.2),
        ([(8, 0.8)] * 40 + [(0, 9)], 8, 0.8),
        ([(8, 4)] * 40 + [(3, 1.5)], 8, 2),  # the longest
        ([(8, 12)] * 40 + [(3, 4.5)], 8, 0),  # not two would come in the longest
        ([(8, 0.8)] * 40 + [(1, 10_000)], 8, 2),  # one silence is not yet another pace
        ([(8, 0.8)] * 40 + [(1, 10_000)] * 3, 8, 0),
    ],
)
def test_a_nap_is_as_long_as_the_messages_that_are_wanted_take_to_come(
    was: list[tuple[int, float]], wanted: int, nap_ms: float
) -> None:
    now = 100.0
    pace = frame_loader._Pace(now)
    for taken, after_ms in was:
        now += after_ms / 1000
        pace.note(taken, 8, now)
    assert pace.nap_s(wanted) == pytest.approx(nap_ms / 1000, rel=0.01)


# -- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        dict(addresses=[]),
        dict(batch_size=0),
        dict(batch_size="8"),
        dict(batch_size=2.5),
        dict(max_items=2.5),
        dict(prefetch=None),
        dict(copy_threads=1.5),
        dict(transform=5),
        dict(collate_fn="x"),
        dict(max_items=-1),
        dict(prefetch=0),
        dict(copy_threads=0),
        dict(queue_size=0),
        dict(timeoutms=0),
        dict(device="nowhere"),
        dict(device="meta"),
    ],
)
def test_arguments_that_cannot_work_are_errors_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        FrameLoader(**{"addresses": "tcp://127.0.0.1:9", "batch_size": 4, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error_at_once() -> None:
    with pytest.raises(ConfigurationError, match="finds no CUDA device"):
        FrameLoader("tcp://127.0.0.1:9", 4, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_batches_may_lie_on_a_device(addresses: list[str]) -> None:
    batches = list(FrameLoader(addresses, 8, max_items=200, device="cuda"))
    assert len(set(keys(batches))) == 200
    for batch in batches:
        assert {value.device.type for value in batch.values()} == {"cuda"}
        check(batch)


def test_a_loader_pickles_as_its_specification(addresses: list[str]) -> None:
    loader = pickle.loads(pickle.dumps(FrameLoader(addresses, 4, max_items=8)))
    assert len(list(loader)) == len(loader) == 2
