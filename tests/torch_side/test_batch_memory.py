"""The memory that batches lie in: whose it is, and in which order a device is told what."""

import gc
import mmap
import multiprocessing
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from blendtorch_shm.memory import segment
from blendtorch_shm.memory.own_pages import OwnPages, address_of
from torch_side import batch_memory
from torch_side.batch_memory import DeviceMemory, HostMemory
from torch_side.pinned import Driver, Registrations

SHAPE = (4, 1000)


@pytest.fixture
def memory() -> HostMemory:
    return HostMemory(1, spares=2)


@pytest.fixture
def allocate(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts what is allocated: the kernel gives out an address that was given back."""
    allocate = Mock(wraps=batch_memory._allocate)
    monkeypatch.setattr(batch_memory, "_allocate", allocate)
    return allocate


def test_memory_is_used_again_when_nobody_holds_it(memory: HostMemory, allocate: Mock) -> None:
    for _ in range(20):
        batch = memory.empty(SHAPE, np.dtype(np.float32)).first(4)
        assert batch.shape == SHAPE
        assert batch.dtype == torch.float32
        assert batch.data_ptr() % 4096 == 0
        del batch
    assert allocate.call_count == 1


@pytest.mark.parametrize(
    "view",
    [
        lambda batch: batch,
        lambda batch: batch[2, 5:7],
        lambda batch: batch.detach().view(-1),
        lambda batch: batch.numpy()[1:, ::3].T,
        lambda batch: memoryview(batch.numpy()),
        lambda batch: torch.from_dlpack(batch),
        lambda batch: np.asarray(batch)[0].reshape(10, 100),
        lambda batch: batch.untyped_storage(),
        lambda batch: [{"kept": batch[0]}],
    ],
)
def test_memory_is_nobody_elses_while_any_view_of_it_lives(memory: HostMemory, allocate: Mock, view: Any) -> None:
    batch = memory.empty(SHAPE, np.dtype(np.float32)).first(4)
    first = batch.data_ptr()
    kept = view(batch)
    del batch
    others = [memory.empty(SHAPE, np.dtype(np.float32)).first(4) for _ in range(5)]
    assert len({first, *(other.data_ptr() for other in others)}) == 6
    del kept
    gc.collect()
    assert memory.empty(SHAPE, np.dtype(np.float32)).first(4).data_ptr() == first
    assert allocate.call_count == 6


def test_what_the_graph_of_autograd_saved_is_not_overwritten(memory: HostMemory) -> None:
    weight = torch.ones(SHAPE, requires_grad=True)
    batch = memory.empty(SHAPE, np.dtype(np.float32)).first(4).fill_(3)
    loss = (weight * batch).sum()
    del batch
    memory.empty(SHAPE, np.dtype(np.float32)).first(4).fill_(7)
    loss.backward()
    assert weight.grad is not None
    assert (weight.grad == 3).all()


def test_what_was_kept_for_a_while_is_let_go(memory: HostMemory) -> None:
    def batch_of(*shape: int) -> torch.Tensor:
        return memory.move(memory.empty(shape, np.dtype(np.float32)).first(4))

    held = [batch_of(*SHAPE) for _ in range(50)]
    assert len(memory._blocks) == 50
    del held
    for _ in range(3):
        batch_of(*SHAPE)
    assert len(memory._blocks) <= 4
    for _ in range(20):
        batch_of(4, 3000)
    assert len(memory._blocks) == 1


def test_a_field_that_is_kept_takes_no_memory_from_one_that_is_dropped(memory: HostMemory, allocate: Mock) -> None:
    kept = []
    for _ in range(20):
        image = memory.empty(SHAPE, np.dtype(np.float32)).first(4)
        depth = memory.empty((4, 3000), np.dtype(np.float32)).first(4)
        batch = memory.move({"image": image, "depth": depth})
        kept.append(batch["image"])
        del image, depth, batch
    assert allocate.call_count == 20 + 1


def test_a_forked_child_keeps_what_it_has(memory: HostMemory) -> None:
    batch = memory.empty(SHAPE, np.dtype(np.float32)).first(4).fill_(1)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer_whether_all_are_ones, args=(batch, theirs))
    process.start()
    address = batch.data_ptr()
    del batch
    again = memory.empty(SHAPE, np.dtype(np.float32)).first(4)
    assert again.data_ptr() == address
    again.fill_(2)
    ours.send("now")
    assert ours.recv() is True
    process.join()


def answer_whether_all_are_ones(batch: torch.Tensor, pipe: Any) -> None:
    pipe.recv()
    pipe.send(bool((batch == 1).all()))


def test_threads_copy_and_their_mark_passes_when_they_have() -> None:
    memory = HostMemory(2, spares=2)
    rows = memory.empty(SHAPE, np.dtype(np.uint8))
    for i in range(4):
        memory.copy(rows, i, np.full(1000, i, np.uint8))
    mark = memory.mark()
    assert mark is not None
    assert memory.mark() is None
    memory.hand_over(rows.first(4), [mark])
    assert mark.query()
    assert [int(row.max()) for row in rows.first(4)] == [0, 1, 2, 3]
    memory.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("blendtorch copies")]


def test_a_copy_that_fails_raises_from_its_mark() -> None:
    memory = HostMemory(2, spares=2)
    memory.copy(memory.empty((1, 10), np.dtype(np.uint8)), 0, np.zeros(11, np.uint8))
    mark = memory.mark()
    assert mark is not None
    with pytest.raises(ValueError, match="broadcast"):
        memory.hand_over(None, [mark])
    memory.close()


# -- CUDA, without a device -------------------------------------------------------------------------------------


class FakeLibrary:
    """What the driver's library would be asked."""

    def __init__(self, error: int = 0) -> None:
        self.registered: dict[int, int] = {}
        self.calls: list[str] = []

        def register(address: int, nbytes: int, flags: int) -> int:
            self.calls.append("register")
            assert flags == 1
            assert nbytes > 0
            if not error:
                self.registered[address] = nbytes
            return error

        def unregister(address: int) -> int:
            self.calls.append("unregister")
            return 0 if self.registered.pop(address, 0) else 713

        def name_of(code: int, name: Any) -> int:
            known = {2: b"CUDA_ERROR_OUT_OF_MEMORY", 713: b"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"}
            name._obj.value = known.get(code)
            return 0 if code in known else 1

        self.cuMemHostRegister_v2, self.cuMemHostUnregister, self.cuGetErrorName = register, unregister, name_of


class FakeCuda:
    """Notes what it is asked, in order."""

    def __init__(self, library: FakeLibrary) -> None:
        self.driver = Driver(library)
        self.asked = library.calls

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.asked.append("empty")
        return torch.empty(shape, dtype=dtype)

    def copy(self, row: torch.Tensor, source: torch.Tensor) -> None:
        self.asked.append("copy")
        row.copy_(source)

    def mark(self) -> Any:
        self.asked.append("mark")
        return SimpleNamespace(number=self.asked.count("mark"))

    def join(self, mark: Any, tensors: Any) -> None:
        self.asked.append(f"join {mark.number} for {len(tensors)}")


def in_segment(memory: segment.Segment, offset: int = 0) -> np.ndarray:
    return np.frombuffer(memory.view[offset : offset + 3000], np.uint8)


def test_shared_memory_is_registered_before_the_first_copy_from_it_and_once() -> None:
    library = FakeLibrary()
    here = segment.private(2**16)
    memory = DeviceMemory(torch.device("cuda", 0), lambda: [here], FakeCuda(library))  # type: ignore[arg-type]
    rows = memory.empty((2, 3000), np.dtype(np.uint8))
    for i in range(2):
        memory.copy(rows, i, in_segment(here, 4096 * i))
    first = memory.mark()
    moved = memory.move({"image": rows.first(2), "numbers": [torch.arange(2)], "names": ["a", "b"]})
    second = memory.mark()
    assert first is not None
    assert second is not None
    memory.hand_over(moved, [first, second])
    assert library.calls[:5] == ["empty", "register", "copy", "copy", "mark"]
    assert library.calls[-2:] == ["mark", "join 2 for 2"]
    assert list(library.registered.values()) == [2**16]
    memory.close()
    assert library.calls[-1] == "unregister"
    assert not library.registered


def test_without_copies_there_is_no_mark() -> None:
    memory = DeviceMemory(torch.device("cuda", 0), list, FakeCuda(FakeLibrary()))  # type: ignore[arg-type]
    assert memory.mark() is None
    memory.hand_over({"names": ["a"]}, [])


def test_memory_that_is_not_shared_is_not_registered() -> None:
    library = FakeLibrary()
    here = segment.private(2**16)
    registrations = Registrations(lambda: [here], Driver(library))
    registrations.cover(np.zeros(3000, np.uint8))
    registrations.cover(in_segment(here))
    assert list(library.registered.values()) == [2**16]


def test_a_frame_in_a_readers_own_pages_is_copied_from_registered_memory_unless_it_was_changed() -> None:
    library = FakeLibrary()
    made = segment.private(2**16)
    made.view[:] = bytes(range(256)) * 256
    shared = mmap.mmap(made.fd, made.nbytes)
    here = segment.Segment("", shared, own=OwnPages(made.fd, made.nbytes))
    registrations = Registrations(lambda: [here], Driver(library))
    assert here.own is not None
    frames = [np.frombuffer(here.own.view, np.uint8, 4000, offset) for offset in (0, 8192, 20000)]
    frames[1][5] = 99
    covered = [registrations.cover(frame) for frame in frames]
    start = address_of(shared)
    assert list(library.registered) == [start]
    assert [address_of(memoryview(frame)) - start for frame in covered[::2]] == [0, 20000]
    assert covered[1] is frames[1]
    for frame, found in zip(frames, covered, strict=True):
        np.testing.assert_array_equal(found, frame)
    turned = frames[0][::-1]
    assert registrations.cover(turned) is turned


def test_a_ring_that_was_replaced_is_taken_back_and_unmapped() -> None:
    library = FakeLibrary()
    here = [segment.private(2**16)]
    registrations = Registrations(lambda: here, Driver(library))
    registrations.cover(in_segment(here[0]))
    assert list(library.registered.values()) == [2**16]
    here[:] = [segment.private(2**17)]
    registrations.cover(in_segment(here[0]))
    assert list(library.registered.values()) == [2**17]
    assert library.calls == ["register", "unregister", "register"]


@pytest.mark.parametrize(("code", "name"), [(2, "CUDA_ERROR_OUT_OF_MEMORY"), (4711, "CUDA error 4711")])
def test_what_cannot_be_registered_is_copied_all_the_same_and_said_once(
    caplog: pytest.LogCaptureFixture, code: int, name: str
) -> None:
    library = FakeLibrary(error=code)
    here = [segment.private(2**16), segment.private(2**16)]
    registrations = Registrations(lambda: here, Driver(library))
    for _ in range(3):
        registrations.cover(in_segment(here[0]))
        registrations.cover(in_segment(here[1]))
    registrations.close()
    assert library.calls == ["register", "register"]
    assert [name in record.getMessage() for record in caplog.records] == [True]
