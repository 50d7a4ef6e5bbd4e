"""Memory that keeps what is written to it: for readers that change arrays in place, and scripts that write too late."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blendtorch_shm.errors import StreamClosed
from blendtorch_shm.memory import own_pages, segment
from blendtorch_shm.memory.layout import PAGE
from blendtorch_shm.memory.own_pages import OwnPages, Window, address_of
from blendtorch_shm.stream.clip import ClipSink
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer

PATIENCE_S = 20.0
PAGES = 6

chooses = np.random.default_rng


@pytest.fixture(params=["all is said", "no page table", "no faults"])
def page_table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the kernel says of pages and faults, and without, as in some sandboxes."""
    if request.param == "no faults":
        monkeypatch.setattr(own_pages, "page_faults", lambda: 0)
        monkeypatch.setattr(own_pages, "_page_table", own_pages._PageTable())
    elif request.param == "no page table":
        monkeypatch.setattr(own_pages, "_page_table", hidden := own_pages._PageTable())
        monkeypatch.setattr(hidden, "_is_true", False)


@pytest.fixture(params=["moved", "faulted in"])
def moving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel that moves page-table entries, and with one that does not."""
    if request.param == "faulted in":
        monkeypatch.setattr(Window, "_move", lambda *_: False)


def receive(source: Source) -> dict[str, Any]:
    message = source.receive(PATIENCE_S)
    assert message is not None
    return message.fields


def in_a_child(does: Callable[[], None]) -> None:
    assert_went_well(fork(does))


def assert_went_well(child: int) -> None:
    assert os.waitpid(child, 0)[1] == 0


def fork(does: Callable[[], None]) -> int:
    """The process id of a child that does that, and ends."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            does()
            status = 0
        finally:
            os._exit(status)
    return child


# -- a reader's pages -------------------------------------------------------------------------------------------

OFFSETS = st.integers(0, PAGES * PAGE - 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("theirs"), OFFSETS, st.integers(1, 2 * PAGE)),
        st.tuples(st.just("ours"), OFFSETS, st.integers(1, 2 * PAGE)),
        st.tuples(st.just("renew"), st.integers(0, PAGES - 1), st.integers(1, 2 * PAGE)),
        st.tuples(st.just("ask"), OFFSETS, st.integers(1, 2 * PAGE)),
    ),
    max_size=30,
)


@settings(max_examples=60)
@given(steps=STEPS)
def test_own_pages_show_what_is_shared_but_for_pages_written_to_since_they_were_renewed(steps: Any) -> None:
    shared = segment.private(PAGES * PAGE)
    own = OwnPages(shared.fd, shared.nbytes)
    theirs, ours = bytearray(PAGES * PAGE), bytearray(PAGES * PAGE)  # the model
    apart: set[int] = set()
    for number, (what, at, length) in enumerate(steps, 1):
        at = at * PAGE if what == "renew" else at
        length = min(length, PAGES * PAGE - at)
        pages = set(range(at // PAGE, (at + length - 1) // PAGE + 1))
        if what == "theirs":
            shared.view[at : at + length] = theirs[at : at + length] = bytes([number]) * length
        elif what == "ours":
            for page in pages - apart:
                ours[page * PAGE : (page + 1) * PAGE] = theirs[page * PAGE : (page + 1) * PAGE]
            apart |= pages
            own.view[at : at + length] = ours[at : at + length] = bytes([number]) * length
        elif what == "renew":
            own.renew(at, length)
            apart -= pages
        else:
            assert own.is_as_shared(at, length) == (not pages & apart)
        seen = b"".join(bytes((ours if p in apart else theirs)[p * PAGE : (p + 1) * PAGE]) for p in range(PAGES))
        assert bytes(own.view) == seen
        assert bytes(shared.view) == bytes(theirs)


def test_where_the_page_table_cannot_be_read_all_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> int:
        raise PermissionError

    table = own_pages._PageTable()
    shared = mmap.mmap(-1, PAGE)
    monkeypatch.setattr("builtins.open", fails)
    assert table.has_copies(address_of(shared), 1)


def test_a_page_table_that_says_nothing_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, *args: bytes(len(pread(fd, *args))))
    shared = mmap.mmap(-1, PAGE)
    assert own_pages._PageTable().has_copies(address_of(shared), 1)


def test_a_forked_child_asks_for_its_own_pages() -> None:
    shared = segment.private(2 * PAGE)
    own = OwnPages(shared.fd, shared.nbytes)
    assert own.is_as_shared(0, 2 * PAGE) or own.view[0] == 0

    def writes() -> None:
        own.view[PAGE] = 7
        own.renew(0, 2 * PAGE)
        assert own.view[PAGE] == 0

    in_a_child(writes)
    own.view[0] = 7
    own.renew(0, 2 * PAGE)
    assert own.view[0] == 0


SIZES = [3000, 4096 - 700, 4096, 3 * 4096, 3 * 4096 + 1, 50_000]


def changed_in_place(sink: Producer, source: Source, seed: int) -> None:
    """Publish arrays of many sizes, and write to what arrives; what arrives next in that slot must be as it was published."""
    chooser = chooses(seed)
    for i in range(60):
        sent = chooser.integers(0, 256, chooser.choice(SIZES), np.uint8)
        sink.publish({"i": i, "image": sent} if i % 7 else {"i": i})
        fields = receive(source)
        assert fields["i"] == i
        if i % 7:
            np.testing.assert_array_equal(fields["image"], sent)
            if chooser.random() < 0.6:
                fields["image"][-chooser.integers(1, len(sent)) :] = 255
        del fields


@pytest.mark.usefixtures("page_table")
def test_what_a_reader_writes_in_place_is_gone_with_its_message(sink: Producer, source: Source) -> None:
    changed_in_place(sink, source, seed=1)


@pytest.mark.usefixtures("page_table")
@pytest.mark.parametrize("seed", range(4))
def test_what_a_reader_writes_in_place_is_gone_with_its_message_however_many_it_holds(
    sink: Producer, source: Source, seed: int
) -> None:
    """How many page faults there were is not asked for each message: slots that were unused meanwhile share an answer."""
    chooser = chooses(seed)
    held: list[np.ndarray] = []
    sent: list[np.ndarray] = []
    for _ in range(400):
        if chooser.random() < 0.5 and len(sent) < 8:
            sent.append(chooser.integers(0, 256, chooser.choice(SIZES), np.uint8))
            sink.publish({"image": sent[-1]})
        elif sent and len(held) < 6:
            held.append(receive(source)["image"])
            np.testing.assert_array_equal(held[-1], sent.pop(0))
        if held and chooser.random() < 0.3:
            image = held[chooser.integers(len(held))]
            image[chooser.integers(len(image))] ^= 255
            del image
        while held and chooser.random() < 0.4:
            held.pop(chooser.integers(len(held)))


@pytest.mark.usefixtures("page_table")
def test_a_message_that_was_changed_and_comes_again_in_this_process_is_as_it_was_published(
    sink: Producer, place: SharedPlace
) -> None:
    sink.publish({"i": 0, "image": np.arange(9000, dtype=np.uint16)})
    for _ in range(3):
        with Source([place]) as source:
            message = source.receive(PATIENCE_S, held=True)  # and never handed over, so it is put back
            assert message is not None
            np.testing.assert_array_equal(message.fields["image"], np.arange(9000, dtype=np.uint16))
            message.fields["image"][4500:] = 7
            del message


LOCKED = """
import ctypes, os
import numpy as np
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import SharedPlace
from blendtorch_shm.stream.producer import Producer

if ctypes.CDLL(None, use_errno=True).mlockall(3):  # MCL_CURRENT | MCL_FUTURE
    raise SystemExit(77)
directory = LaunchDirectory().create()
try:
    place = SharedPlace(directory.twin("DATA", 0))
    with Producer(place, trusted=True) as sink, Source([place]) as source:
        for i in range(40):
            nbytes = 50_000 if i % 3 else 9_000
            sink.publish({"i": i, "image": np.full(nbytes, i, np.uint8)})
            fields = source.receive(20).fields
            assert fields["i"] == i
            assert (fields["image"] == i).all(), i
            fields["image"][:] = 255
            del fields
finally:
    directory.remove()
"""


def test_a_process_whose_memory_is_locked_gets_what_was_published() -> None:
    """There, a private mapping consists of copies from the start."""
    done = subprocess.run([sys.executable, "-c", LOCKED], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77:
        pytest.skip("this user may not lock so much memory")
    assert done.returncode == 0, done.stderr


def changes_and_waits(twin: Any, ready: Any) -> None:
    source = Source([SharedPlace(twin)])
    held = [receive(source) for _ in range(4)]
    for fields in held:
        fields["image"] //= 2
        torch.from_numpy(fields["image"])[-1] = 255
    ready.set()
    signal.pause()


def test_what_a_killed_reader_changed_comes_again_as_it_was_published(sink: Producer, place: SharedPlace) -> None:
    sent = [np.random.default_rng(i).integers(0, 256, SIZES[i], np.uint8) for i in range(6)]
    for i, image in enumerate(sent):
        sink.publish({"i": i, "image": image})
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    victim = context.Process(target=changes_and_waits, args=(place.twin, ready))
    victim.start()
    assert ready.wait(60)
    victim.kill()
    victim.join()
    with Source([place]) as source:
        for i, image in enumerate(sent):
            fields = receive(source)
            assert fields["i"] == i
            np.testing.assert_array_equal(fields["image"], image)


@pytest.fixture(params=["copied at once", "written to"])
def copying(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel that copies pages when it is told to, and with one that does not know how."""
    if request.param == "written to":
        monkeypatch.setattr(own_pages, "MADV_POPULATE_WRITE", 255)


def receive_three(sink: Producer, source: Source) -> list[np.ndarray]:
    """Three arrays that show 0, 1, and 2 but for a 9."""
    for i in range(3):
        sink.publish({"image": np.full(9000, i, np.uint8)})
    images = [receive(source)["image"] for _ in range(3)]
    images[2][5000] = 9
    return images


def are_as_received(images: list[np.ndarray]) -> bool:
    return [np.unique(image).tolist() for image in images] == [[0], [1], [2, 9]]


def use_all_slots(sink: Producer, source: Source) -> None:
    for i in range(100, 150):
        sink.publish({"image": np.full(9000, i, np.uint8)})
        assert (receive(source)["image"] == i).all()


@pytest.mark.usefixtures("copying")
def test_a_forked_childs_arrays_stay_as_they_are_when_its_parent_drops_its_own(sink: Producer, source: Source) -> None:
    images = receive_three(sink, source)
    dropped, drop = os.pipe()

    def looks_afterwards() -> None:
        os.close(drop)
        os.read(dropped, 1)
        assert are_as_received(images)

    child = fork(looks_afterwards)
    assert are_as_received(images)
    images.clear()
    use_all_slots(sink, source)
    os.close(drop)
    os.close(dropped)
    assert_went_well(child)


@pytest.mark.usefixtures("copying")
def test_arrays_stay_as_they_are_when_their_process_leaves_the_stream_at_its_end(
    sink: Producer, source: Source, place: SharedPlace
) -> None:
    images = receive_three(sink, source)
    for consumer in source._streams:
        consumer.finish()
    with Source([place]) as other:
        use_all_slots(sink, other)
    assert are_as_received(images)


# -- a script's windows -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("moving")
def test_a_window_is_the_shared_memory_until_it_is_sealed() -> None:
    shared = segment.private(8 * PAGE)
    other = mmap.mmap(shared.fd, shared.nbytes)
    for round_ in range(4):  # page-table entries go there and back
        window = Window(shared, 2 * PAGE, 3 * PAGE, address_of(shared.view) + 2 * PAGE)
        window.view[:] = bytes([round_ + 1]) * (3 * PAGE)
        part, at = window.part(PAGE + 100, 300)
        root = part.array(at, 300, holding=window)
        root[:] = 100 + round_
        part.seal()
        root[:] = 0
        window.view[0] = 77
        window.seal()
        window.view[1] = root[0] = 0
        expected = bytearray(bytes([round_ + 1]) * (3 * PAGE))
        expected[0], expected[PAGE + 100 : PAGE + 400] = 77, bytes([100 + round_]) * 300
        assert bytes(shared.view[2 * PAGE : 5 * PAGE]) == expected
        assert bytes(other[2 * PAGE : 5 * PAGE]) == expected
        shared.view[2 * PAGE] = 78
        assert other[2 * PAGE] == 78


def test_a_window_on_memory_without_a_descriptor_is_an_error_and_no_other_memory() -> None:
    with pytest.raises(OSError, match="Bad file"):
        Window(segment.Segment("", mmap.mmap(-1, PAGE)), 0, PAGE, 0)


def by_view(array: np.ndarray) -> Callable[[], object]:
    view = array[::-1]
    return lambda: view.fill(255)


def by_memoryview(array: np.ndarray) -> Callable[[], object]:
    view = memoryview(array).cast("B")
    return lambda: view.__setitem__(slice(0, 50), b"\xff" * 50)


def by_tensor(array: np.ndarray) -> Callable[[], object]:
    tensor = torch.from_numpy(array)
    return lambda: tensor.fill_(255)


def by_flag(array: np.ndarray) -> Callable[[], object]:
    def write() -> None:
        array.flags.writeable = True
        array[:] = 255

    return write


LATE = [by_view, by_memoryview, by_tensor, by_flag]


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("keep", LATE)
def test_what_is_written_after_publishing_reaches_nobody(
    sink: Producer, place: SharedPlace, keep: Callable[[np.ndarray], Callable[[], object]]
) -> None:
    sink.publish({"i": -1, "image": np.zeros((100, 100), np.uint8)})
    with Source([place]) as source:
        receive(source)
        for restart in range(2):
            for i in range(25):
                lent = sink.lend((100, 100), np.uint8)
                assert lent is not None
                late = keep(lent)
                lent[:] = i
                sink.publish({"i": i, "image": lent})
                late()
                assert (receive(source)["image"] == i).all()
                late()
                del lent, late
            if restart == 0:  # a successor lends from rings that it did not make
                sink.close()
                sink = Producer(place, trusted=True)
        sink.close()


@pytest.mark.parametrize("keep", LATE)
def test_what_is_written_to_a_frame_after_it_was_added_to_a_clip_reaches_nobody(
    sink: Producer, place: SharedPlace, keep: Callable[[np.ndarray], Callable[[], object]]
) -> None:
    clips = ClipSink(sink, 3)
    kept = []
    with Source([place]) as source:
        for clip in range(6):
            for t in range(3):
                lent = clips.lend((90, 100, 3), np.uint8)
                assert (lent is None) == (clip == 0)
                frame = np.empty((90, 100, 3), np.uint8) if lent is None else lent
                late = keep(frame)
                frame[:] = 10 * clip + t
                clips.publish({"image": frame})
                if lent is not None:
                    late()
                    kept.append(late)
                del lent, frame, late
            for late in kept:
                late()
            assert (receive(source)["image"] == (10 * clip + np.arange(3))[:, None, None, None]).all()
            kept.clear()


def test_a_frame_that_a_script_keeps_stays_as_it_was_published(sink: Producer, place: SharedPlace) -> None:
    """Of messages and of rows of clips: a slot is not used again while its arrays are alive."""
    for clips in (sink, ClipSink(sink, 2)):
        with Source([place]) as source:
            kept: list[tuple[int, np.ndarray]] = []
            for i in range(40):
                lent = clips.lend((100, 100), np.uint8)
                frame = np.empty((100, 100), np.uint8) if lent is None else lent
                frame[:] = i
                clips.publish({"image": frame})
                kept = [*kept[-2:], (i, frame)]
                for number, array in kept:
                    assert (array == number).all()
                while source.receive(0) is not None:
                    pass


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("frames", [None, 2])
def test_arrays_that_a_script_keeps_have_nothing_to_do_with_what_its_next_publisher_sends(
    sink: Producer, place: SharedPlace, frames: int | None
) -> None:
    """One array was published, one is drawn to still. The next publisher, in the same process, uses their slots."""
    for i in range(6):
        clips = sink if frames is None else ClipSink(sink, frames)
        kept: list[tuple[int, np.ndarray]] = []
        with Source([place]) as source:
            for t in range(5):
                lent = clips.lend((100, 100), np.uint8)
                frame = np.empty((100, 100), np.uint8) if lent is None else lent
                frame[:] = 100 + t
                clips.publish({"image": frame})
                kept = [(100 + t, frame)]
            drawn = clips.lend((100, 100), np.uint8)
            if i > 0:
                assert drawn is not None
                drawn[:] = 7
            clips.close()
            while source.receive(0) is not None:
                pass
            sink = Producer(place, trusted=True)
            for n in range(8):
                sink.publish({"image": np.full((100, 100), n, np.uint8)})
            for number, array in kept:
                assert (array == number).all()
            if i > 0:
                assert (drawn == 7).all()
                drawn[:] = 255
            for n in range(8):
                assert (receive(source)["image"] == n).all()
    sink.close()


def test_what_a_parent_wrote_late_stays_in_its_forked_child(sink: Producer, source: Source) -> None:
    sink.publish({"image": np.zeros((100, 100), np.uint8)})
    receive(source)
    lent = sink.lend((100, 100), np.uint8)
    assert lent is not None
    late = lent[:]
    lent[:] = 3
    sink.publish({"image": lent})
    late[:] = 4
    in_a_child(lambda: np.testing.assert_array_equal(late, 4))
    assert (receive(source)["image"] == 3).all()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_slot_is_lent_again_although_an_interrupt_hit_the_end_of_its_arrays(sink: Producer, source: Source) -> None:
    """Python prints what a signal's handler raises in a callback's first instruction, and does not run the rest."""

    def interrupts(*_: object) -> None:
        sys.settrace(None)
        raise KeyboardInterrupt

    for i in range(100):
        lent = sink.lend((100, 100), np.uint8)
        assert (lent is None) == (i == 0)
        sink.publish({"image": np.full((100, 100), i, np.uint8) if lent is None else lent})
        tracing = sys.gettrace()
        sys.settrace(interrupts)
        del lent
        sys.settrace(tracing)
        receive(source)


def test_what_a_forked_child_writes_to_arrays_that_its_parent_was_lent_does_not_reach_its_parent(
    sink: Producer, source: Source
) -> None:
    sink.publish({"image": np.zeros((100, 100), np.uint8)})
    receive(source)
    lent = sink.lend((100, 100), np.uint8)
    assert lent is not None
    lent[:] = 3
    in_a_child(lambda: lent.fill(4))
    sink.publish({"image": lent})
    in_a_child(lambda: setattr(lent.flags, "writeable", True) or lent.fill(5))
    assert (receive(source)["image"] == 3).all()


def test_a_forked_child_can_add_no_frame_to_its_parents_clip(sink: Producer, source: Source) -> None:
    clips = ClipSink(sink, 2)

    def publishes() -> None:
        row = clips.lend((90, 100), np.uint8)
        with pytest.raises(StreamClosed, match="before a fork"):
            clips.publish({"image": np.full((90, 100), 9, np.uint8) if row is None else row})

    for i in range(4):
        clips.publish({"image": np.full((90, 100), i, np.uint8)})
        in_a_child(publishes)
    for first in (0, 2):
        assert [frame[0, 0] for frame in receive(source)["image"]] == [first, first + 1]


def test_without_descriptors_for_windows_nothing_is_lent(
    sink: Producer, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink.publish({"image": np.zeros(9000, np.uint8)})
    receive(source)

    def fails(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Window, "__init__", fails)
        assert sink.lend((9000,), np.uint8) is None
        sink.publish({"image": np.full(9000, 3, np.uint8)})
        assert (receive(source)["image"] == 3).all()
    lent = sink.lend((9000,), np.uint8)
    assert lent is not None
    lent[:] = 5
    sink.publish({"image": lent})
    assert (receive(source)["image"] == 5).all()
