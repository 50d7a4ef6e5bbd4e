"""RemoteIterableDataset over real instances, which here are plain Python processes."""

import contextlib
import gc
import glob
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import data

import torch_side.dataset
import torch_side.waiting
from blendtorch_shm.errors import ConfigurationError, InstanceDied, StreamClosed, StreamTimeout, UnreadableMessage
from blendtorch_shm.launch.address import Address, Twin
from blendtorch_shm.launch.notes import log_path, write_status
from blendtorch_shm.memory.states import State
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer
from blendtorch_shm.stream.stats import stats
from blendtorch_shm.transport import open_sink, open_source
from torch_side import BlenderLauncher, FileDataset, RemoteIterableDataset, verify_recording
from torch_side.dataset import to_tensors
from torch_side.recordings import archive, files, recorder
from torch_side.waiting import Watch

from ..blendtorch_shm.conftest import free_port
from ..interruption import everywhere
from .conftest import BAD, PATIENCE_S, Missing, eventually, killed_worker, launch, publish_some


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[str]]:
    with launch() as launcher:
        found = launcher.launch_info.addresses["DATA"]
        for address in found:  # they run, and have made all that they will
            assert len(list(RemoteIterableDataset(address, max_items=2))) == 2
        yield found


def key(item: dict[str, Any]) -> tuple[int, int]:
    return int(item["btid"]), int(item["frameid"])


def check(item: dict[str, Any]) -> None:
    assert isinstance(item["image"], torch.Tensor)
    assert item["image"].dtype == torch.uint8
    assert item["xy"].dtype == torch.float64
    assert (item["image"] == item["value"]).all()
    assert (item["xy"] == item["frameid"]).all()


WORKERS = [(0, None), (1, "fork"), (4, "fork"), (2, "spawn"), (2, "forkserver")]


@pytest.mark.parametrize(
    ("num_workers", "method", "max_items"),
    # Each spawned worker imports torch for seconds: the other lengths are for those that start fast.
    [(n, method, 19) for n, method in WORKERS] + [(n, method, m) for n, method in WORKERS[:2] for m in (1, 16)],
)
def test_exactly_max_items_arrive_whatever_the_workers(
    addresses: list[str], num_workers: int, method: str | None, max_items: int
) -> None:
    dataset = RemoteIterableDataset(addresses, max_items=max_items)
    assert len(dataset) == max_items
    loader = data.DataLoader(dataset, batch_size=None, num_workers=num_workers, multiprocessing_context=method)
    items = list(loader)
    assert len(items) == max_items
    assert len(set(map(key, items))) == max_items
    for item in items:
        check(item)


def test_default_collation_makes_batches(addresses: list[str]) -> None:
    batches = list(data.DataLoader(RemoteIterableDataset(addresses, max_items=16), batch_size=4, num_workers=4))
    assert [batch["image"].shape for batch in batches] == [(4, 48, 64, 3)] * 4
    assert {int(btid) for batch in batches for btid in batch["btid"]} == {0, 1}
    for batch in batches:
        assert (batch["image"] == batch["value"][:, None, None, None]).all()


def wait_until_ten_messages_wait(address: Any) -> None:
    deadline = time.monotonic() + 60
    while stats(address)[0].ready < 10:
        assert time.monotonic() < deadline, stats(address)
        time.sleep(0.01)


def test_without_workers_instances_take_turns_and_keep_their_order(addresses: list[str]) -> None:
    for address in addresses:
        wait_until_ten_messages_wait(address)
    items = [key(item) for item in RemoteIterableDataset(addresses, max_items=20)]
    assert [btid for btid, _ in items] in ([0, 1] * 10, [1, 0] * 10)
    for btid in (0, 1):
        frames = [frame for found, frame in items if found == btid]
        assert frames == list(range(frames[0], frames[0] + 10))


def test_an_epoch_after_the_other_goes_on_where_the_stream_is(addresses: list[str]) -> None:
    dataset = RemoteIterableDataset(addresses, max_items=30)
    seen = [key(item) for _ in range(3) for item in dataset]
    assert len(set(seen)) == 90
    dataset.stream_length(5)
    assert len(list(dataset)) == len(dataset) == 5


def test_an_abandoned_iteration_gives_back_what_it_held(addresses: list[str]) -> None:
    for _ in range(10):
        for item in data.DataLoader(RemoteIterableDataset(addresses, max_items=1000), batch_size=2):
            assert (item["image"] == item["value"][:, None, None, None]).all()
            break
    assert len(list(RemoteIterableDataset(addresses, max_items=40))) == 40


def test_two_hundred_items_can_be_kept_of_a_ring_of_eight_slots(caplog: pytest.LogCaptureFixture) -> None:
    with launch("--send-hwm", "2") as launcher:  # 2 + 6 slots
        items = list(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=200))
        assert len(set(map(key, items))) == 200
        for item in items:
            check(item)
        assert 1 <= len([r for r in caplog.records if "arrive as copies" in r.getMessage()]) <= 2
        del items, item


def derive(item: dict[str, Any], how: str) -> Any:
    image = item["image"]
    return {
        "slice": lambda: image[3:5, ::2],
        "detach": lambda: image.detach(),
        "view": lambda: image.view(-1),
        "permute": lambda: image.permute(2, 0, 1),
        "numpy": lambda: image.numpy(),
        "numpy_slice": lambda: image.numpy()[::3].T,
        "array_interface": lambda: np.asarray(image)[1:],
        "dlpack": lambda: torch.from_dlpack(image),
        "memoryview": lambda: memoryview(image.numpy()),
    }[how]()


@pytest.mark.parametrize(
    "how",
    ["slice", "detach", "view", "permute", "numpy", "numpy_slice", "array_interface", "dlpack", "memoryview"],
)
def test_a_view_of_any_kind_keeps_its_frame(addresses: list[str], how: str) -> None:
    stream = iter(RemoteIterableDataset(addresses, max_items=200))
    item = next(stream)
    value = item["value"]
    view = derive(item, how)
    del item
    for later in stream:  # many times more than there are slots
        check(later)
    assert (np.asarray(view) == value).all()


def test_a_view_held_by_another_thread_keeps_its_frame(addresses: list[str]) -> None:
    stream = iter(RemoteIterableDataset(addresses, max_items=200))
    begin = threading.Event()
    result = []

    def hold(image: torch.Tensor, value: int) -> None:
        begin.wait()
        result.append(bool((image == value).all()))

    item = next(stream)
    thread = threading.Thread(target=hold, args=(item["image"], item["value"]))
    thread.start()
    del item
    for later in stream:
        check(later)
    begin.set()
    thread.join()
    assert result == [True]


def test_a_pickled_item_is_a_copy(addresses: list[str]) -> None:
    stream = iter(RemoteIterableDataset(addresses, max_items=60))
    item = next(stream)
    pickled = pickle.dumps(item)
    value = item["value"]
    item["image"].fill_(0)
    del item
    list(stream)
    assert (pickle.loads(pickled)["image"] == value).all()


def test_items_are_writable_and_writing_harms_no_other_item(addresses: list[str]) -> None:
    previous = None
    for item in RemoteIterableDataset(addresses, max_items=60):
        check(item)
        if previous is not None:
            assert (previous == 255).all()
        item["image"].fill_(255)
        previous = item["image"]


def test_a_forked_child_that_drops_a_tensor_does_not_release_its_parents_slot(addresses: list[str]) -> None:
    stream = iter(RemoteIterableDataset(addresses, max_items=100))
    item = next(stream)
    holder = [item["image"]]
    value = item["value"]
    del item
    pid = os.fork()
    if pid == 0:
        holder.clear()
        gc.collect()
        os._exit(0)
    os.waitpid(pid, 0)
    for later in stream:
        check(later)
    assert (holder[0] == value).all()


def test_an_item_transform_gets_writable_arrays_and_may_return_anything(addresses: list[str]) -> None:
    def transform(item: dict[str, Any]) -> tuple[Any, ...]:
        image = item["image"]
        assert type(image) is np.ndarray
        assert image.flags.writeable
        image[0, 0] = 1
        return image.astype(np.float32)[::-1], {"chw": np.transpose(image, (2, 0, 1))}, item["btid"]

    for flipped, views, btid in RemoteIterableDataset(addresses, max_items=8, item_transform=transform):
        assert flipped.dtype == torch.float32
        assert (flipped[-1, 0] == 1).all()
        assert views["chw"].shape == (3, 48, 64)
        assert btid in (0, 1)


def test_a_subclass_may_override_item(addresses: list[str]) -> None:
    class Mine(RemoteIterableDataset):
        def _item(self, item: dict[str, Any]) -> Any:
            return item["image"].mean(), item["xy"]

    batches = list(data.DataLoader(Mine(addresses, max_items=8), batch_size=4))
    assert [tuple(map(len, batch)) for batch in batches] == [(4, 4)] * 2


def test_numpy_output_leaves_arrays(addresses: list[str]) -> None:
    for item in RemoteIterableDataset(addresses, max_items=4, output="numpy"):
        assert type(item["image"]) is np.ndarray


def test_a_dataset_has_the_attributes_of_blendtorchs(tmp_path: Path) -> None:
    dataset = RemoteIterableDataset("tcp://127.0.0.1:9")
    assert dataset.record_path_prefix is None
    assert dataset.item_transform({"a": 1}) == {"a": 1}
    dataset.record_path_prefix = tmp_path / "cubes"
    assert dataset.record_path_prefix == str(tmp_path / "cubes")
    assert pickle.loads(pickle.dumps(dataset)).record_path_prefix == dataset.record_path_prefix
    dataset.record_path_prefix = None
    assert dataset.record_path_prefix is None


def test_a_dataset_pickles_as_its_specification(addresses: list[str]) -> None:
    dataset = pickle.loads(pickle.dumps(RemoteIterableDataset(addresses, max_items=7)))
    assert [a.twin for a in dataset.addresses] == [a.twin for a in addresses]
    assert len(list(dataset)) == 7


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_that_was_typed_by_hand_is_read_in_shared_memory(addresses: list[Address], host: str) -> None:
    typed = [str(a).replace("127.0.0.1", host) for a in addresses]
    dataset = RemoteIterableDataset(typed, max_items=20)
    assert [a.twin for a in dataset.addresses] == [a.twin for a in addresses]
    assert len(set(map(key, dataset))) == 20


def test_messages_arrive_over_tcp_as_well(addresses: list[Address]) -> None:
    dataset = RemoteIterableDataset([a.elsewhere() for a in addresses], max_items=20)
    assert all(a.twin is None and a.keys is not None for a in dataset.addresses)
    items = list(dataset)
    assert len(set(map(key, items))) == 20
    for item in items:
        check(item)


def test_local_and_remote_addresses_mix(addresses: list[Address]) -> None:
    mixed = [addresses[0], addresses[1].elsewhere()]
    items = list(RemoteIterableDataset(mixed, max_items=40))
    assert len(set(map(key, items))) == 40
    origins = set()
    for item in RemoteIterableDataset(mixed, max_items=200_000):  # TCP takes its time to connect
        origins.add(key(item)[0])
        if len(origins) == 2:
            break
    assert origins == {0, 1}


def test_an_instance_that_raises_ends_the_iteration_with_its_log(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("import sys\nprint('about to fail')\nraise RuntimeError('no such texture')\n")
    with launch(script=script, num_instances=1) as launcher:
        with pytest.raises(InstanceDied, match=r"exited, exit code 1, after 0 messages.*instance-00.log") as raised:
            list(RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=4))
        said = str(raised.value).splitlines()
        assert said[0] == "instance 0: RuntimeError: no such texture (broken.py:3)"
        assert "about to fail" not in said
        assert len(said) <= 3
        loader = data.DataLoader(
            RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=4), num_workers=1
        )
        with pytest.raises(InstanceDied, match="no such texture"):
            list(loader)


def test_all_messages_of_instances_that_have_ended_are_delivered_before_the_error() -> None:
    with launch("--stop-after", "7") as launcher:
        received = []
        with pytest.raises(InstanceDied, match=r"Instances 0 and 1.*end of their scripts.*14 of 20 items") as raised:
            for item in RemoteIterableDataset(launcher.launch_info.addresses["DATA"], max_items=20):
                received.append(key(item))
        assert "max_items=14" in str(raised.value)
        assert "restart='always'" in str(raised.value)
        assert sorted(received) == [(btid, i) for btid in (0, 1) for i in range(7)]


def test_silence_is_a_timeout_that_says_who_lives_and_what_he_last_logged(tmp_path: Path) -> None:
    script = tmp_path / "silent.py"
    script.write_text("import time\nprint('loading textures')\ntime.sleep(600)\n")
    with launch(script=script) as launcher:
        dataset = RemoteIterableDataset(launcher.launch_info.addresses["DATA"], timeoutms=3000)
        with pytest.raises(StreamTimeout, match=r"(?s)instance 0: running.*loading textures.*instance 1: running"):
            next(iter(dataset))


def test_a_stranger_who_does_not_answer_is_a_timeout() -> None:
    dataset = RemoteIterableDataset("tcp://127.0.0.1:9", timeoutms=300)
    with pytest.raises(StreamTimeout, match="tcp://127.0.0.1:9"):
        next(iter(dataset))


def answer_of_another_process(target: Any, addresses: list[str], method: str = "spawn") -> tuple[Any, Any]:
    """Start `target(addresses, pipe)` in another process; the process, and the first thing that it sends."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(addresses, theirs))
    process.start()
    theirs.close()
    return process, ours.recv()


def take_some_and_hang(addresses: list[str], pipe: Any) -> None:
    kept = list(RemoteIterableDataset(addresses, max_items=12))
    pipe.send([key(item) for item in kept])
    signal.pause()


def test_what_a_killed_consumer_held_goes_to_the_next_one() -> None:
    with launch("--stop-after", "40", num_instances=1) as launcher:
        addresses = launcher.launch_info.addresses["DATA"]
        process, held = answer_of_another_process(take_some_and_hang, addresses, "fork")
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        received = sorted(key(item) for item in RemoteIterableDataset(addresses, max_items=40))
        assert set(held) <= set(received)
        assert received == [(0, i) for i in range(40)]


def test_what_an_exited_consumer_held_is_not_delivered_again() -> None:
    with launch("--stop-after", "40", num_instances=1) as launcher:
        addresses = launcher.launch_info.addresses["DATA"]
        process, held = answer_of_another_process(take_some_and_leave, addresses)
        process.join()
        received = sorted(key(item) for item in RemoteIterableDataset(addresses, max_items=28))
        assert sorted(held + received) == [(0, i) for i in range(40)]


kept: list[Any] = []


def take_some_and_leave(addresses: list[str], pipe: Any) -> None:
    kept.extend(RemoteIterableDataset(addresses, max_items=12))
    pipe.send([key(item) for item in kept])


def queue_and_return(addresses: list[str], queue: Any) -> None:
    for item in RemoteIterableDataset(addresses, max_items=6, output="numpy"):
        queue.put(item)


def test_what_a_process_queued_before_it_returned_arrives_whole(addresses: list[str]) -> None:
    context = multiprocessing.get_context("fork")  # its end is the same as a spawned one's
    queue = context.Queue()
    process = context.Process(target=queue_and_return, args=(addresses, queue))
    process.start()
    for item in RemoteIterableDataset(addresses, max_items=100):  # so that slots are used again meanwhile
        check(item)
    for _ in range(6):
        item = queue.get(timeout=60)
        assert (item["image"] == item["value"]).all()
    process.join()


@pytest.mark.long
def test_ctrl_c_anywhere_in_an_iteration_costs_no_item(stream: tuple[Address, SharedPlace, Producer]) -> None:
    address, place, sink = stream
    dataset = RemoteIterableDataset(address, timeoutms=20_000)
    received: list[int] = []
    published = 0
    iterations: list[Iterator[Any]] = []

    def take() -> None:
        iterations.append(iter(dataset))
        for item in iterations[-1]:
            received.append(int(item["i"]))  # not traced: the item is ours
            break

    for where in everywhere(take, [str(torch_side.dataset.__file__)]):
        iterations.clear()
        assert received == list(range(len(received))), where
        while inspect(place).count(State.READY) < 3:
            sink.publish({"i": published, "image": np.zeros(9000, np.uint8)})
            published += 1
    dataset.stream_length(published - len(received))
    assert received + [item["i"] for item in dataset] == list(range(published))


@pytest.mark.long
@pytest.mark.skipif(sys.version_info < (3, 11), reason="a for loop looks for signals when it has its item")
@pytest.mark.parametrize(
    ("kind", "nbytes"),
    [(ValueError, 9000), (TimeoutError, 9000), (RuntimeError, 9000), (KeyboardInterrupt, 10)],
    ids=["value", "time-out", "runtime", "Ctrl-C, without a slot"],
)
def test_what_a_signals_handler_raises_costs_no_item_whatever_it_is(
    stream: tuple[Address, SharedPlace, Producer], kind: type[BaseException], nbytes: int
) -> None:
    """As torch's handler of SIGCHLD does; or one that a program has set for SIGALRM, for a time-out."""
    address, _, sink = stream
    received: list[int] = []
    chooser = np.random.default_rng(0)
    armed, interrupted = False, threading.Event()

    class Raised(kind):  # type: ignore[misc,valid-type]
        pass

    def interrupt(*_: object) -> None:
        if armed:
            interrupted.set()
            raise Raised

    def publish() -> None:
        with contextlib.suppress(StreamClosed):
            for i in itertools.count():
                sink.publish({"i": i, "image": np.full(nbytes, i % 251, np.uint8)})

    def read_on() -> None:
        for item in items:  # not next(): it looks for signals when it has its result
            received.append(item["i"])
            assert item["image"][0] == item["image"][-1] == item["i"] % 251
            del item
            if interrupted.is_set():  # where an error has no consequences
                return

    publisher = threading.Thread(target=publish)
    publisher.start()
    items = iter(RemoteIterableDataset(address, max_items=10**9, output="numpy"))
    previous = signal.signal(signal.SIGVTALRM, interrupt)  # another thread would send signals only when this one waits
    try:
        for _ in range(80):
            try:
                armed = True
                interrupted.clear()
                signal.setitimer(signal.ITIMER_VIRTUAL, chooser.uniform(0.001, 0.01))
                read_on()
            except Raised:  # not pytest.raises, which keeps what was raised, and so the slot of its message
                armed = False
            armed = False
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
        for _ in range(50):
            with contextlib.suppress(Raised):  # what was kept of an interrupted callback
                received.append(next(items)["i"])
        sink.close()
        publisher.join(PATIENCE_S)
    assert received == list(range(len(received)))


def test_ctrl_c_anywhere_in_an_iteration_that_records_costs_no_message(
    stream: tuple[Address, SharedPlace, Producer], tmp_path: Path
) -> None:
    """Each is in the recording once, and what was not recorded comes again."""
    address, place, sink = stream
    dataset = RemoteIterableDataset(address, timeoutms=20_000, record_path_prefix=tmp_path / "a")
    received: list[int] = []
    published = 0
    iterations: list[Iterator[Any]] = []

    def take() -> None:
        iterations.append(iter(dataset))
        received.append(int(next(iterations[-1])["i"]))

    modules = [str(module.__file__) for module in (torch_side.dataset, recorder, files, archive)]
    for where in everywhere(take, modules, without=["__exit__", "close", "__del__"]):
        iterations.clear()
        assert not [path for path in map(os.path.realpath, glob.glob("/proc/self/fd/*")) if path.endswith(".tar")], (
            where
        )
        while inspect(place).count(State.READY) < 3:
            sink.publish({"i": published, "image": np.zeros(9000, np.uint8)})
            published += 1
    iterations.clear()
    dataset.stream_length(inspect(place).count(State.READY))
    received += [int(item["i"]) for item in dataset]
    recorded = [int(item["i"]) for item in FileDataset(tmp_path / "a")]
    assert sorted(recorded) == list(range(published))
    assert received == sorted(set(received))
    assert not verify_recording(tmp_path / "a").damage


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_a_transform_was_given_is_its_own_even_if_it_raises(
    stream: tuple[Address, SharedPlace, Producer], error: type[BaseException]
) -> None:
    address, _, sink = stream
    kept = []

    def keep_and_raise(item: dict[str, Any]) -> None:
        kept.append(item["image"])
        raise error

    sink.publish({"image": np.full(9000, 1, np.uint8)})
    with pytest.raises(error):
        next(iter(RemoteIterableDataset(address, item_transform=keep_and_raise)))
    for value in range(2, 40):
        sink.publish({"image": np.full(9000, value, np.uint8)})
        (item,) = RemoteIterableDataset(address, max_items=1)
        assert (item["image"] == value).all()
    assert (kept[0] == 1).all()


def all_that_comes(iterator: Iterator[Any]) -> tuple[list[int], list[str]]:
    """The numbers of the items, and what was raised instead of some, by a user who goes on."""
    numbers, errors = [], []
    while True:
        try:
            item = next(iterator)
            assert (item["image"] == int(item["i"])).all()
            numbers.append(int(item["i"]))
            del item
        except StopIteration:
            return numbers, errors
        except (UnreadableMessage, LookupError) as error:
            errors.append(str(error))


@pytest.mark.parametrize("num_workers", [None, 0, 2])
@pytest.mark.parametrize(("bad", "transform", "words"), BAD)
def test_an_item_that_raises_costs_itself_alone_if_the_user_goes_on(
    stream: tuple[Address, SharedPlace, Producer], num_workers: int | None, bad: Any, transform: Any, words: str
) -> None:
    address, place, sink = stream
    publish_some(sink, bad)
    dataset = RemoteIterableDataset(address, max_items=4, item_transform=transform)
    iterator = iter(dataset)
    if num_workers is not None:
        iterator = iter(data.DataLoader(dataset, batch_size=None, num_workers=num_workers))
    numbers, errors = all_that_comes(iterator)
    assert sorted(numbers) == [0, 1, 3, 5]
    assert num_workers or numbers == [0, 1, 3, 5]
    assert len(errors) == 2
    assert all(re.search(words, error) for error in errors)
    assert transform or all("DATA of instance 0" in error for error in errors)
    assert inspect(place).count(State.FREE) == 16


def test_an_error_holds_no_slot_while_the_user_looks_at_it(stream: tuple[Address, SharedPlace, Producer]) -> None:
    address, place, sink = stream
    publish_some(sink, Missing())
    iterator = iter(RemoteIterableDataset(address))
    items = [next(iterator), next(iterator)]
    with pytest.raises(UnreadableMessage) as raised:
        next(iterator)
    assert inspect(place).count(State.LEASED) == len(items)
    assert next(iterator)["i"] == 3
    assert len(raised.traceback) <= 3, "our own frames say nothing to the user"


def test_after_a_time_out_the_user_may_go_on_waiting(stream: tuple[Address, SharedPlace, Producer]) -> None:
    address, _, sink = stream
    iterator = iter(RemoteIterableDataset(address, timeoutms=1))
    for i in range(3):
        with pytest.raises(StreamTimeout):
            next(iterator)
        sink.publish({"i": i})
        assert next(iterator) == {"i": i}


def test_patience_counts_from_the_last_message_that_anybody_took(
    stream: tuple[Address, SharedPlace, Producer],
) -> None:
    address, _, sink = stream
    with open_source([address]) as ours, open_source([address]) as theirs:
        watch = Watch(RemoteIterableDataset(address, timeoutms=1), ours)
        watch.begin("0 items")
        for _ in range(3):
            time.sleep(0.002)
            sink.publish({"i": 0})
            assert theirs.receive(60) is not None
            watch.look()
        time.sleep(0.002)
        with pytest.raises(StreamTimeout):
            watch.look()


def test_over_tcp_patience_counts_from_the_last_message_that_any_worker_took() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with open_sink(Address(address)) as sink:
        dataset = pickle.loads(pickle.dumps(RemoteIterableDataset(address, max_items=1)))
        sink.publish({"i": 0})
        before = dataset.heard_at()
        assert list(data.DataLoader(dataset, batch_size=None, num_workers=1)) == [{"i": 0}]
        assert dataset.heard_at() > before


PUBLISH_ON_TWO = """
import numpy as np
import blendtorch.btb as btb
args, _ = btb.parse_blendtorch_args()
data, debug = (btb.DataPublisher(args.btsockets[name], args.btid, send_hwm=3) for name in ("DATA", "DEBUG"))
while True:
    data.publish(image=np.zeros(9000, np.uint8))
    debug.publish(note=np.zeros(9000, np.uint8))
"""


def test_a_time_out_names_the_socket_that_an_instance_waits_for_and_who_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "two.py"
    script.write_text(PUBLISH_ON_TWO)
    sockets = ["DATA", "DEBUG"]
    with BlenderLauncher("", script, named_sockets=sockets, blender="python", progress=False) as launcher:
        addresses = launcher.launch_info.addresses
        (debug,) = addresses["DEBUG"]
        list(RemoteIterableDataset(addresses["DATA"], max_items=4))
        eventually(lambda: stats(debug)[0].waits)
        dataset = RemoteIterableDataset(addresses["DATA"], timeoutms=10)
        with pytest.raises(
            StreamTimeout, match="Instance 0 waits for room on its socket 'DEBUG': 3 .*nobody"
        ) as raised:
            next(iter(dataset))
        assert "raise timeoutms" not in str(raised.value)
        with open_source([debug]) as idle:
            assert idle.receive(PATIENCE_S) is not None  # and takes no more
            list(RemoteIterableDataset(addresses["DATA"], max_items=1))
            eventually(lambda: stats(debug)[0].waits)
            with pytest.raises(StreamTimeout, match=rf"on its socket 'DEBUG': 3 .*for process {os.getpid()}\."):
                next(iter(dataset))
            monkeypatch.setattr(torch_side.waiting, "state_of", lambda pid: "D")
            with pytest.raises(StreamTimeout, match=f"for process {os.getpid()}, which waits for a disk"):
                next(iter(dataset))
        items = iter(dataset)

        def what_is_said() -> str:
            try:
                next(items)
                return ""
            except StreamTimeout as error:
                return str(error)

        with open_source([debug.elsewhere()]) as idle:
            eventually(lambda: idle.receive(1) is not None)
            eventually(lambda: "on its socket 'DEBUG': 3 messages wait there for 1 reader over TCP." in what_is_said())


def test_reports_of_a_long_wait_are_short_and_repeat_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_side.waiting, "_TELL_EVERY_S", 0.0)
    path = str(tmp_path)
    address = Address("tcp://127.0.0.1:9", Twin(path, "0" * 8, "nonce", "DATA", 0))
    log = Path(log_path(path, 0))
    write_status(path, 0, os.getpid(), "starting", None)
    log.write_text("Blender 5.2\n\nloading textures\n")
    dataset = RemoteIterableDataset(address, max_items=1)
    with open_source([address]) as source:
        watch = Watch(dataset, source)
        watch.begin("0 of 1 item")
        watch.look()
        (first,) = caplog.messages
        assert "0 of 1 item had arrived" in first
        assert "instance 0: still starting" in first
        assert "instance 0 logged: loading textures" in first
        assert "/bt-" not in first
        write_status(path, 0, os.getpid(), "running", None)
        watch.begin("0 of 1 item")
        watch.look()
        assert len(caplog.messages[1].splitlines()) == 1
        assert "instance 0: running; DATA: no message yet" in caplog.messages[1]
        log.write_text("loading textures\ncompiling shaders\n")
        watch.look()
        assert caplog.messages[2].splitlines()[1:] == ["instance 0 logged: compiling shaders"]


def test_a_killed_worker_gives_torchs_own_error_and_the_next_iteration_works(addresses: list[str]) -> None:
    iterator = iter(data.DataLoader(RemoteIterableDataset(addresses, max_items=2000), batch_size=4, num_workers=2))
    next(iterator)
    with killed_worker(iterator):
        with pytest.raises((RuntimeError, OSError, EOFError)):  # as torch happens to notice it
            for _ in iterator:
                pass
        del iterator
    again = data.DataLoader(RemoteIterableDataset(addresses, max_items=40), num_workers=2)
    assert len({key(item) for item in again}) == 40


@pytest.mark.parametrize(
    "arguments",
    [
        dict(addresses=[]),
        dict(addresses=[1]),
        dict(addresses={"DATA": ["tcp://127.0.0.1:11000"]}),
        dict(addresses="x", max_items=-1),
        dict(addresses="x", max_items=2.5),
        dict(addresses="x", queue_size="8"),
        dict(addresses="x", timeoutms=None),
        dict(addresses="x", output="jax"),
        dict(addresses="x", record_path_prefix="/proc/r"),
    ],
)
def test_arguments_that_cannot_work_are_errors_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        RemoteIterableDataset(**arguments)


@pytest.mark.parametrize(
    ("addresses", "words"),
    [
        ("launch_info.json", r"LaunchInfo\.load_json\('launch_info\.json'\)"),
        ("127.0.0.1:11000", r"'tcp://127\.0\.0\.1:11000'"),
        (["tcp://127.0.0.1:11000", "tcp://127.0.0.1"], r"'tcp://127\.0\.0\.1' is not an address.*tcp://ADDRESS:PORT"),
    ],
)
def test_what_is_no_address_is_refused_at_once_with_what_was_meant(addresses: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        RemoteIterableDataset(addresses)


def test_to_tensors_reaches_into_containers_and_leaves_the_rest() -> None:
    point = np.arange(3.0)
    item = {
        "a": [point, (point, "text")],
        "names": np.array(["a", "b"]),
        "n": np.float32(2),
        "neg": point[::-1],
        "be": point.astype(">f8"),
    }
    result = to_tensors(item)
    assert result["a"][0].data_ptr() == point.__array_interface__["data"][0]
    assert result["a"][1][1] == "text"
    assert type(result["names"]) is np.ndarray
    assert type(result["n"]) is np.float32
    assert result["neg"].tolist() == [2.0, 1.0, 0.0]
    assert result["be"].tolist() == [0.0, 1.0, 2.0]
