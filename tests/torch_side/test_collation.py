"""Batches that DataLoader workers lay into memory which is used again; real workers, and instances without Blender."""

import copy
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import reduction
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils import data

from blendtorch_shm.errors import ConfigurationError, StreamClosed
from blendtorch_shm.launch.address import Address
from blendtorch_shm.memory.layout import PAGE
from blendtorch_shm.process import leaving
from torch_side import RemoteIterableDataset, collation, pooled_collate

from .conftest import check, eventually, is_alive, keys, killed_worker, launch


def load(
    addresses: list[str],
    max_items: int,
    item_transform: Callable[[Any], Any] | None = None,
    *,
    batch_size: int = 8,
    num_workers: int = 2,
    collate_fn: Callable[[list[Any]], Any] | None = pooled_collate,
    **kwargs: Any,
) -> data.DataLoader[Any]:
    dataset = RemoteIterableDataset(addresses, max_items=max_items, item_transform=item_transform)
    return data.DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=collate_fn, **kwargs)


def blocks() -> dict[int, int]:
    """The blocks that this process has mapped, by inode, and the memory that lies in each."""
    files = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            if "blendtorch-batch" in os.readlink(link):
                status = link.stat()
                files[status.st_ino] = status.st_blocks * 512
        except OSError:  # the descriptor of this very look
            pass
    return files


def blocks_nbytes() -> int:
    """Memory that lies in them."""
    return sum(blocks().values())


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is its own DataLoader worker."""
    monkeypatch.setattr(data, "get_worker_info", lambda: "a worker's")
    yield
    if collation._pool is not None:
        collation._pool.finish()
        leaving.leave(collation._pool)
    collation._pool = None
    collation._forget_ended_workers()


def collated(value: int, **nbytes: int) -> Any:
    """A batch of one item, with arrays that are full of `value`."""
    return pooled_collate([{name: np.full(size, value, np.uint8) for name, size in nbytes.items()}])


def sent(batch: Any) -> bytes:
    return bytes(reduction.ForkingPickler.dumps(batch))


# -- what it makes ----------------------------------------------------------------------------------------------


def describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return type(value), value.dtype, value.shape, value.stride(), value.requires_grad
    if isinstance(value, dict):
        return {k: describe(v) for k, v in value.items()}
    return [describe(v) for v in value] if isinstance(value, list | tuple) else type(value)


def with_all_kinds(item: dict[str, Any]) -> dict[str, Any]:
    image = item["image"]
    return {
        **item,
        "nested": {"depth": [image.astype(np.float64), image[::2, ::-1]]},
        "pair": (image.astype(np.complex64), "text"),
        "mask": image > 3,
        "bfloat16": torch.ones(5000, dtype=torch.bfloat16),
        "small_bfloat16": torch.ones(5, dtype=torch.bfloat16),
        "truth": True,
        "number": 0.5,
        "name": f"frame {item['frameid']}",
        "empty": np.empty((0, 4)),
    }


def leave_as_is(item: Any) -> Any:
    return item


def only_a_pair(item: dict[str, Any]) -> Any:
    return item["image"].astype(np.float32), item["frameid"]


@pytest.mark.parametrize("transform", [leave_as_is, with_all_kinds, only_a_pair])
def test_batches_are_those_of_the_default_collation(addresses: list[str], transform: Any) -> None:
    ours = next(iter(load(addresses, 8, transform, batch_size=4, num_workers=1)))
    theirs = next(iter(load(addresses, 8, transform, batch_size=4, num_workers=1, collate_fn=None)))
    assert describe(ours) == describe(theirs)
    if transform is not only_a_pair:
        check(ours)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_message_arrives_once_whatever_the_workers(method: str) -> None:
    with launch("--stop-after", "50") as launcher:
        batches = list(load(launcher.launch_info.addresses["DATA"], 100, multiprocessing_context=method))
    assert sorted(len(batch["image"]) for batch in batches) == [2, 2] + [8] * 12
    for batch in batches:
        check(batch)
    assert sorted(keys(batches)) == [(btid, frame) for btid in (0, 1) for frame in range(50)]


def test_a_ring_of_too_few_slots_makes_copies_and_stops_nothing() -> None:
    with launch("--send-hwm", "2", "--stop-after", "100", num_instances=1) as launcher:  # 2 + 6 slots
        loader = load(launcher.launch_info.addresses["DATA"], 100, batch_size=16, num_workers=4)
        batches = [batch for batch in loader if check(batch) is None]
    assert sorted(keys(batches)) == [(0, frame) for frame in range(100)]


def test_without_workers_it_is_the_default_collation(addresses: list[str]) -> None:
    for batch in load(addresses, 20, num_workers=0):
        check(batch)
        assert type(batch["image"]) is torch.Tensor


def test_messages_over_tcp_are_collated_as_well(addresses: list[Address]) -> None:
    batches = list(load([a.elsewhere() for a in addresses], 40))
    assert len(set(keys(batches))) == 40
    for batch in batches:
        check(batch)


def unequal(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "image": item["image"][: 10 + item["frameid"] % 2]}


def test_items_that_make_no_batch_are_an_error_that_names_the_field(addresses: list[str]) -> None:
    with pytest.raises(RuntimeError, match="Field 'image' makes no batch"):
        list(load(addresses[:1], 8, unequal, num_workers=1))


def test_one_item_is_not_a_batch() -> None:
    with pytest.raises(ConfigurationError, match="leave collate_fn out"):
        pooled_collate({"image": np.zeros((4, 4))})  # as with batch_size=None


def changed(items: list[Any]) -> dict[str, Any]:
    batch = pooled_collate(items)
    image = batch["image"]
    return {
        **batch,
        "same": image,
        "copied": copy.copy(image),
        "deeply": copy.deepcopy(batch)["image"],
        "cropped": image[:, 2:9],
        "flat": image.detach().view(-1),
        "normalized": image.float() / 255,
        "moved": pooled_collate(items)["image"].transpose_(0, 1),
        "added": pooled_collate(items)["image"].add_(1),
        "learned": pooled_collate(items)["xy"].requires_grad_(),
    }


def test_a_collate_fn_may_build_on_it_and_change_what_it_likes(addresses: list[str]) -> None:
    kept = []
    for batch in load(addresses, 160, collate_fn=changed):
        check(batch)
        value = batch["value"].view(-1, 1, 1, 1)
        for name in ("same", "copied", "deeply", "cropped"):
            assert (batch[name] == value).all(), name
        assert (batch["moved"].transpose(0, 1) == value).all()
        assert (batch["flat"].view(8, -1) == value.view(8, 1)).all()
        assert (batch["normalized"] == value / 255).all()
        assert (batch["added"] == (value + 1) % 256).all()
        assert (batch["learned"] == batch["xy"]).all()
        assert batch["learned"].requires_grad
        kept.append((batch["same"], value))
    for same, value in kept:
        assert (same == value).all()


# -- whose memory it is -----------------------------------------------------------------------------------------


def test_memory_is_used_again_when_nobody_holds_the_batch(addresses: list[str]) -> None:
    before, seen = set(blocks()), set()
    for batch in load(addresses, 800):
        check(batch)
        seen |= set(blocks())
    # Of each worker: two that are ready, one that is made, one that is here.
    assert 2 <= len(seen - before) <= 2 * 4


def test_a_field_that_is_kept_takes_no_memory_from_one_that_is_dropped(
    worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    with monkeypatch.context() as patch:
        empty = Mock()
        patch.setattr(collation._Block, "empty", empty)
        for i in range(20):
            batch = pickle.loads(sent(collated(i, image=100_000, depth=400_000)))
            assert (batch["depth"] == i).all()
            kept.append(batch.pop("image"))
    assert len(blocks()) == 20 + 2  # one of depth is made while the last is held
    assert not empty.called


@pytest.mark.parametrize(
    "view",
    [
        lambda image: image,
        lambda image: image[2, 5:7],
        lambda image: image.detach().view(8, -1),
        lambda image: image.numpy()[:, ::3].T,
        lambda image: memoryview(image.numpy()),
        lambda image: torch.from_dlpack(image),
        lambda image: image.untyped_storage(),
    ],
)
def test_a_batch_stays_as_it_is_while_any_view_of_it_lives(addresses: list[str], view: Any) -> None:
    def bytes_of(seen: Any) -> bytes:
        if isinstance(seen, torch.UntypedStorage):
            seen = torch.empty(0, dtype=torch.uint8).set_(seen)
        return np.asarray(seen).tobytes()

    kept = []
    for batch in load(addresses, 200, num_workers=1):
        check(batch)
        kept.append((view(batch["image"]), bytes_of(view(batch["image"].clone()))))
    for seen, expected in kept:
        assert bytes_of(seen) == expected


def test_batches_are_writable_and_writing_harms_no_other(addresses: list[str]) -> None:
    kept = []
    for batch in load(addresses, 400):
        check(batch)
        kept.append(batch["image"].fill_(len(kept) % 251))
    for i, image in enumerate(kept):
        assert (image == i % 251).all()


def test_memory_of_batches_that_were_kept_for_a_while_is_given_back(addresses: list[str]) -> None:
    batches = iter(load(addresses, 10**6, num_workers=1))
    kept = [next(batches) for _ in range(60)]
    size = kept[0]["image"].nbytes
    assert blocks_nbytes() >= 60 * size
    del kept
    for _ in range(10):
        check(next(batches))
    assert blocks_nbytes() <= 10 * 2 * size  # a block and its page, rounded up


def growing(item: dict[str, Any]) -> dict[str, Any]:
    size = 50 + 10 * (item["frameid"] // 8)
    return {**item, "image": np.full((size, 50), item["frameid"] // 8 % 256, np.uint8)}


def test_fields_that_grow_from_batch_to_batch_need_few_blocks() -> None:
    with launch("--stop-after", "1600", num_instances=1) as launcher:
        before, seen = set(blocks()), set()
        for i, batch in enumerate(load(launcher.launch_info.addresses["DATA"], 1600, growing, num_workers=1)):
            assert batch["image"].shape == (8, 50 + 10 * i, 50)
            assert (batch["image"] == i % 256).all()
            seen |= set(blocks())
    assert 7 <= len(seen - before) <= 7 * 4  # sizes from 20 to 800 KB


# -- how iterations and processes end ---------------------------------------------------------------------------


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_left_and_begun_again_it_repeats_nothing_and_keeps_no_memory(
    addresses: list[str], persistent_workers: bool
) -> None:
    loader = load(addresses, 1000, persistent_workers=persistent_workers)
    kept = []
    for _ in range(6):
        for batch in loader:
            check(batch)
            kept.append(batch)
            if len(kept) % 5 == 0:
                break
    assert len(set(keys(kept))) == len(kept) * 8 == 6 * 5 * 8
    for batch in kept:
        check(batch)
    del loader, batch, kept
    gc.collect()
    assert blocks_nbytes() == 0


def test_batches_outlive_their_workers_and_their_memory_goes_with_them(addresses: list[str]) -> None:
    iterator = iter(load(addresses, 80))
    batches = list(iterator)
    assert not any(worker.is_alive() for worker in iterator._workers)
    del iterator
    for batch in batches:
        check(batch)
    assert blocks_nbytes() >= 10 * batches[0]["image"].nbytes
    del batches, batch
    assert blocks_nbytes() == 0


@pytest.mark.parametrize("max_items", [160, 10**6])
def test_a_loop_that_kept_nothing_leaves_no_memory_behind(addresses: list[str], max_items: int) -> None:
    iterator = iter(load(addresses, max_items))
    size = max(next(iterator)["image"].nbytes for _ in range(20))
    del iterator
    assert blocks_nbytes() < size  # a page of each block, until something is received again


def test_what_a_forked_child_drops_its_parent_keeps(addresses: list[str]) -> None:
    batches = iter(load(addresses, 10**6, num_workers=1))
    holder = [next(batches)]
    pid = os.fork()
    if pid == 0:
        holder.clear()
        gc.collect()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    later = [next(batches) for _ in range(20)]  # kept, so that any block that is free is used
    for batch in [*holder, *later]:
        check(batch)


def test_the_queue_may_be_read_by_another_thread(addresses: list[str]) -> None:
    """As with pin_memory=True."""
    batches: list[Any] = []
    thread = threading.Thread(target=lambda: batches.extend(load(addresses, 160)))
    thread.start()
    thread.join()
    assert len(set(keys(batches))) == 160
    for batch in batches:
        check(batch)


def test_a_killed_worker_takes_no_batch_along_that_somebody_has_and_repeats_none(addresses: list[str]) -> None:
    iterator = iter(load(addresses, 10**6))
    kept = [next(iterator) for _ in range(4)]
    words = "exited unexpectedly|is lost with the DataLoader worker"
    with killed_worker(iterator):
        with pytest.raises((RuntimeError, StreamClosed), match=words):
            while True:
                kept.append(next(iterator))
        del iterator
    kept += load(addresses, 200)
    for batch in kept:
        check(batch)
    found = keys(kept)
    assert len(found) == len(set(found)) >= 32 + 200
    del kept, batch
    gc.collect()
    assert blocks_nbytes() == 0


def hold_and_wait(addresses: list[str], pipe: Any) -> None:
    iterator = iter(load(addresses, 10**6))
    kept = [next(iterator) for _ in range(4)]
    pipe.send([len(kept), *(worker.pid for worker in iterator._workers)])
    signal.pause()


def test_workers_of_a_killed_training_process_end(addresses: list[str]) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold_and_wait, args=(addresses, theirs))
    process.start()
    theirs.close()
    _, *workers = ours.recv()
    process.kill()
    process.join()
    eventually(lambda: not any(map(is_alive, workers)), "the end of the workers")
    assert len(set(keys(load(addresses, 80)))) == 80


def test_a_batch_whose_worker_took_its_memory_along_is_an_error(worker: None) -> None:
    """Of workers that Ctrl-C ended, batches may still be in the queue."""
    pickle.loads(sent(collated(1, image=100_000)))
    in_the_queue = sent(collated(2, image=100_000))  # by its number alone
    assert collation._pool is not None
    collation._pool.finish()
    with pytest.raises(StreamClosed, match="is lost with the DataLoader worker"):
        pickle.loads(in_the_queue)
    assert blocks_nbytes() == PAGE


@pytest.mark.parametrize("error", [OSError, RuntimeError])  # too many open files; no more threads
def test_a_block_that_could_not_be_sent_is_sent_with_a_later_batch(
    worker: None, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(reduction, "DupFd", Mock(side_effect=error))
        with pytest.raises(error):
            sent(collated(1, image=100_000))
    gc.collect()  # of the traceback
    batch = pickle.loads(sent(collated(2, image=100_000)))
    assert (batch["image"] == 2).all()
    assert len(blocks()) == 1


def test_a_block_that_ctrl_c_kept_from_being_given_back_is_used_again(
    worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code is collation._user_gone.__code__:
            raise KeyboardInterrupt

    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    batch = pickle.loads(sent(collated(1, image=100_000)))
    before = sys.gettrace()
    sys.settrace(interrupt)
    del batch
    sys.settrace(before)
    assert [(one.exc_type, one.object) for one in raised] == [(KeyboardInterrupt, collation._user_gone)]
    kept = [pickle.loads(sent(collated(i, image=100_000))) for i in range(2, 6)]
    assert len(blocks()) == len(kept) == 4  # the first of them is a new one, and frees the other
    for i, batch in enumerate(kept, 2):
        assert (batch["image"] == i).all()
