"""Clips: consecutive frames in one message, put together where they will be read.

A :class:`ClipSink` stands before a :class:`~.producer.Producer`. It takes one message per frame, and sends one
per clip, in which each array field of T frames is one array (T, ...). When a clip begins, the sink lends it that array, so it
lies in the slot that the clip will be sent from; frame t is rendered or copied into row t, and the sink finds everything in
place.
A clip that cannot be lent its arrays (the first one: nobody knows yet how large slots must be) is put together in ordinary
memory and copied once more.

The slot is LOANED meanwhile. So a producer that is killed loses the clip that it had begun, and nothing else.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arguments import integer
from ..closing import Closable
from ..errors import StreamClosed
from ..memory.own_pages import Window
from ..message.dtypes import Array, dtype_name
from ..message.values import SMALL_NBYTES, blender_array
from ..message.wire import Decoder, Encoder
from ..process import forks, interrupts
from .producer import AFTER_FORK, DEFAULT_SEND_HWM, Producer, check_alone

log = logging.getLogger("blendtorch.stream")

_Path = tuple[str, ...]
_Kind = tuple[tuple[int, ...], np.dtype[Any]]
_NUMBERS = (bool, int, float, complex, np.number, np.bool_)
_UNCHANGING = (*_NUMBERS, np.generic, bytes, type(None))
_CLOSING_PATIENCE_S = 5.0
"""How long closing waits for memory to send from, where the clip that was begun has none."""
_DEEPEST = 32
"""How many levels of dicts are merged; what is deeper is a value like any other."""


def limits(frames_per_clip: int, send_hwm: int | None = None, num_slots: int | None = None) -> tuple[int, int]:
    """How many clips may wait, and how many slots a ring has, where the user did not say.

    About ten frames wait, and two clips at least. Besides those that wait, one clip is being filled and three are in use: slots
    are large here, and the usual number of them would be a lot of memory.

    Raises:
        ConfigurationError: `frames_per_clip` is no int, or less than 1.
    """
    integer("frames_per_clip", frames_per_clip)
    if send_hwm is None:
        send_hwm = max(2, -(-DEFAULT_SEND_HWM // frames_per_clip))
    return send_hwm, send_hwm + 4 if num_slots is None else num_slots


class ClipSink(Closable):
    """Sends every `frames_per_clip` messages as one.

    The first frame of a clip says which fields it has, and the shapes and dtypes of its arrays. A frame that differs ends the
    clip: the shorter one is sent, and the frame begins another.

    * An array field becomes an array (T, ...). So do Blender's vectors, matrices and buffers.
    * Numbers and NumPy scalars become an array (T,), of a dtype that holds them all.
    * A dict with string keys becomes a dict of such fields.
    * Anything else becomes a list of length T.

    Args:
        sink: where clips go; closed with this sink.
        frames_per_clip: T.
        once: fields of which a clip has one value, not one per frame. Another value begins another clip.

    Example::

        with ClipSink(open_sink(address), frames_per_clip=16) as sink:
            for t in range(16):
                sink.publish({"image": image, "t": t})  # with the last one, a clip is sent
    """

    def __init__(self, sink: Producer, frames_per_clip: int, *, once: Collection[str] = ()) -> None:
        self._sink = sink
        self._encoder = Encoder(trusted=sink.trusted)
        self._decoder = Decoder(trusted=sink.trusted)
        self._frames_per_clip = frames_per_clip
        self._once = once
        self._clip = _Clip(sink, frames_per_clip, once, [])
        self._lock = threading.RLock()  # a signal handler may close in the middle of publish
        self._running = threading.Lock()  # held while a call runs
        self._closed = False
        self._is_copy = False
        forks.register(self)

    def publish(self, fields: Mapping[str, Any]) -> bool:
        """Add one frame; send the clip if that was its last, waiting for room as long as it takes.

        Returns:
            whether a clip was sent, this one or the one that it does not continue.

        Raises:
            PublishError: a value cannot travel on this connection; the frame is not added.
            BlendtorchError: called by a signal's handler or a finalizer in the middle of another call.
        """
        with self._lock:
            check_alone(self._running, "publish")
            with self._running:
                self._check_open(AFTER_FORK if self._is_copy else "publish() after close().")
                interrupts.raise_kept()
                frame = {path: self._settle(path[0], value) for path, value in _flatten(fields)}
                sent = not self._clip.is_continued_by(frame) and self._send()
                self._clip.add(frame)
                # By a signal handler, which has sent what was complete.
                self._check_open("close() in the middle of publish().")
                if self._clip.length == self._frames_per_clip:
                    return self._send()
                self._sink.show_life()
                return sent

    def lend(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array | None:
        """A row of the clip for the next :meth:`publish`, uninitialised; None where the last clip had no such field, it has
        a small one, or somebody holds that row already.
        """
        with self._lock:
            if self._closed or self._running.locked():
                return None
            with self._running:
                return self._clip.lend((shape, np.dtype(dtype)))

    def close(self, *, patient: bool = True) -> None:
        """Send the clip that was begun, even if as many as may wait already do; then no more."""
        if self._is_copy:
            return
        if self._lock.acquire(blocking=False):  # no other thread is in the middle of publish
            try:
                if patient and self._clip.length > 0:
                    self._sink.wait_for_slot(_CLOSING_PATIENCE_S)
            finally:
                self._lock.release()
        self._sink.stop_waiting()
        with self._lock:
            self._closed = True
            length = self._clip.length
            try:
                self._send(wait=False)
            except StreamClosed:
                log.warning(
                    "A clip of %d frames was not sent: consumers hold all memory, and take nothing more.", length
                )
            finally:
                self._sink.close(patient=patient)

    def in_child(self) -> None:
        """In a forked child: the stream is its parent's."""
        self._is_copy = self._closed = True
        self._lock, self._running = threading.RLock(), threading.Lock()  # a thread of the parent may have held them

    def end_clip(self) -> bool:
        """Send the clip as far as it has come; whether there was one.

        Raises:
            BlendtorchError: as for :meth:`publish`.
        """
        with self._lock:
            check_alone(self._running, "end_clip")
            with self._running:
                return self._send()

    def _send(self, *, wait: bool = True) -> bool:
        if self._clip.length == 0:
            return False
        if wait:
            self._sink.wait_for_room()  # before the clip is taken: what interrupts this loses no frame
        clip = self._clip
        self._clip = _Clip(self._sink, self._frames_per_clip, self._once, clip.kinds())
        return self._sink.publish(clip.take_message(), wait=False)

    def _check_open(self, otherwise: str) -> None:
        if self._closed:
            raise StreamClosed(otherwise)

    def _settle(self, key: str, value: Any) -> Any:
        """`value` in a form that later changes do not reach; arrays, which are about to be copied, as they are."""
        if isinstance(value, _UNCHANGING):
            return value
        array = _as_array(value)
        return self._copy_of(key, value) if array is None else array

    def _copy_of(self, key: str, value: Any) -> Any:
        """`value` as it would arrive now: it shares nothing with the original, and cannot fail to be sent later."""
        parts = self._encoder.take_apart({key: value})
        payload = np.empty(parts.nbytes, np.uint8)
        parts.copy_into(payload)
        return self._decoder.decode(parts.header(), payload)[key]


class _Clip:
    """One clip in the making.

    Args:
        sink: that arrays are lent from.
        capacity: frames that it is to have.
        once: see :class:`ClipSink`.
        expected: what fields it probably has, by the clip before: that many rows may be lent before its first frame is known.
    """

    def __init__(self, sink: Producer, capacity: int, once: Collection[str], expected: list[_Kind]) -> None:
        self.length = 0
        self._sink = sink
        self._capacity = capacity
        self._once = once
        self._expected = expected
        self._fields: dict[_Path, _Rows | list[Any]] = {}
        self._rows: list[_Rows] = []  # in the order in which they were lent, which is every frame's as a rule

    def kinds(self) -> list[_Kind]:
        """What arrays it has."""
        return [content.kind for content in self._fields.values() if isinstance(content, _Rows)]

    def lend(self, kind: _Kind) -> Array | None:
        shape, dtype = kind
        if math.prod(shape) * dtype.itemsize <= SMALL_NBYTES:
            return None
        alike = [rows for rows in self._rows if rows.kind == kind]
        for rows in alike:
            row = rows.lend(self.length)
            if row is not None:
                return row
        if self.length == 0 and len(alike) < self._expected.count(kind):
            return self._make_rows(kind).lend(0)
        return None

    def is_continued_by(self, frame: Mapping[_Path, Any]) -> bool:
        if self.length == 0:
            return True
        if self.length == self._capacity:  # sending it was interrupted
            return False
        return frame.keys() == self._fields.keys() and all(self._fits(path, value) for path, value in frame.items())

    def _fits(self, path: _Path, value: Any) -> bool:
        content = self._fields[path]
        if isinstance(content, _Rows):
            return _is_plain(value) and _kind(value) == content.kind
        if _is_plain(value):
            return False
        return not self._is_once(path) or bool(value == content[0])

    def add(self, frame: Mapping[_Path, Any]) -> None:
        if self.length == 0:
            self._begin(frame)
        for path, value in frame.items():
            content = self._fields[path]
            if isinstance(content, _Rows):
                content.put(self.length, value)
            else:
                content[self.length :] = [value]
        self.length += 1  # last: a signal handler may want to send what is complete

    def take_message(self) -> dict[str, Any]:
        """The clip as one message. Its arrays are no longer held here, so that nothing but the message pins their slot."""
        message: dict[str, Any] = {}
        for path, content in self._fields.items():
            into = message
            for key in path[:-1]:
                into = into.setdefault(key, {})
            if isinstance(content, _Rows):
                into[path[-1]] = content.take(self.length, self._sink)
            else:
                into[path[-1]] = content[0] if self._is_once(path) else _stack(content[: self.length])
        self._rows.clear()
        return message

    def _begin(self, frame: Mapping[_Path, Any]) -> None:
        """Learn the fields. Rows that were lent for this frame are those of the fields that they are published in."""
        self._fields = {}
        arrays = {path: value for path, value in frame.items() if _is_plain(value)}
        unused = list(self._rows)
        chosen: dict[_Path, _Rows] = {}
        for is_right in (_Rows.has_lent, _Rows.could_take):
            for path, value in arrays.items():
                rows = next((rows for rows in unused if path not in chosen and is_right(rows, value)), None)
                if rows is not None:
                    unused.remove(rows)
                    chosen[path] = rows
        for path, value in frame.items():
            if path not in arrays:
                self._fields[path] = []
            else:
                self._fields[path] = chosen.get(path) or self._make_rows(_kind(value))
        self._rows = [rows for rows in self._rows if rows not in unused]

    def _make_rows(self, kind: _Kind) -> _Rows:
        shape, dtype = (self._capacity, *kind[0]), kind[1]
        array = self._sink.lend(shape, dtype)
        self._rows.append(_Rows(np.empty(shape, dtype) if array is None else array, self._sink))
        return self._rows[-1]

    def _is_once(self, path: _Path) -> bool:
        return len(path) == 1 and path[0] in self._once


class _Rows:
    """The array of one field of a clip: (T, ...), row t for frame t.

    A row that was lent belongs to whoever holds it until it is published in this field. If it is kept, and something else
    published, all rows move to other memory.
    """

    def __init__(self, array: Array, sink: Producer) -> None:
        self.kind: _Kind = array.shape[1:], array.dtype
        self._array = array
        self._sink = sink
        self._lends = True
        self._lent_at = -1
        self._window: Window | None = None
        """That the row lent last lies in."""
        self._row: weakref.ref[Array] | None = None
        self._root: weakref.ref[Array] | None = None
        """What the row lent last, and all views of it, are built on."""

    def lend(self, t: int) -> Array | None:
        """Row `t`, if nobody holds it."""
        if not self._lends or self._is_held(t):
            return None
        shape, dtype = self.kind
        nbytes = self._array.nbytes // len(self._array)
        part = self._sink.part(self._array, t * nbytes, nbytes)
        if part is None:  # not in a slot: what is written late could not be kept from it
            return None
        self._window, root = part
        row: Array = np.ndarray(shape, dtype, root)
        self._lent_at, self._row, self._root = t, weakref.ref(row), weakref.ref(root)
        return row

    def has_lent(self, value: Array) -> bool:
        """Whether `value` is the row lent last."""
        return self._row is not None and self._row() is value

    def could_take(self, value: Array) -> bool:
        """Whether `value` could be copied into the first row."""
        return _kind(value) == self.kind and not self._is_held(0)

    def put(self, t: int, value: Array) -> None:
        """Make `value` row `t`."""
        if self._lent_at == t and self.has_lent(value):
            value.flags.writeable = (
                False  # as a message's: a late write is an error, and has no effect by way of a view
            )
            if self._window is not None:
                self._window.seal()
            return
        if self._is_held(t):
            array = np.empty(self._array.shape, self._array.dtype)
            np.copyto(array[:t], self._array[:t])
            self._array, self._lends, self._root = array, False, None
        np.copyto(self._array[t : t + 1], value)

    def take(self, length: int, sink: Producer) -> Array:
        """The first rows; this object is of no use afterwards."""
        array = self._array
        if length < len(array):
            array = array[:length] if self._is_held(length) else sink.shorten(array, length)
        del self._array
        self._lends = False
        return array

    def _is_held(self, t: int) -> bool:
        return self._lent_at == t and self._root is not None and self._root() is not None


def _kind(array: Array) -> _Kind:
    return array.shape, array.dtype


def _flatten(fields: Mapping[str, Any], outer: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """The fields of a frame, and those of dicts in it, by their keys from outside to inside."""
    for key, value in fields.items():
        path = (*outer, key)
        if type(value) is dict and value and len(path) < _DEEPEST and all(type(inner) is str for inner in value):
            yield from _flatten(value, path)
        else:
            yield path, value


def _as_array(value: Any) -> Array | None:
    """`value` as the array that it arrives as, if it does."""
    if isinstance(value, np.memmap):
        value = np.asarray(value)
    array = value if type(value) is np.ndarray else blender_array(value)
    return array if _is_plain(array) else None


def _is_plain(value: Any) -> bool:
    """Whether it is an array of mere bytes; others, of objects or with a mask, travel as pickles."""
    return type(value) is np.ndarray and dtype_name(value.dtype) != ""


def _stack(values: list[Any]) -> Any:
    """Numbers or NumPy scalars as an array (T,); a list of other values as it is."""
    kinds = {type(value) for value in values}
    try:
        if kinds == {int}:
            return np.array(values, np.int64)
        if all(issubclass(kind, _NUMBERS) for kind in kinds):
            array = np.array(values)
            return array if array.dtype != object else values
        if len(kinds) == 1 and issubclass(kinds.pop(), np.generic):
            return np.array(values)
    except (OverflowError, TypeError):  # larger than 64 bits; records that have nothing in common
        pass
    return values
