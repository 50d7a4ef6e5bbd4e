"""Whatever parses what another process wrote, each as a function of some bytes.

A target returns when the bytes were understood, or refused with an error that is documented. Everything else that it lets out,
or asserts, is a finding. :mod:`test_fuzz` feeds them mutations of valid inputs, :mod:`coverage_guided` goes on from there for as
long as one likes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import struct
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import zmq

from blendtorch_shm.errors import ConfigurationError, PublishError, RecordingError, SegmentError, WireError
from blendtorch_shm.launch.address import ENVIRONMENT_VARIABLE, Address, Twin, describe, resolve
from blendtorch_shm.launch.directory import instance_reports, write_status
from blendtorch_shm.launch.info import LaunchInfo
from blendtorch_shm.launch.keys import make_keys
from blendtorch_shm.memory.layout import VERSION, align
from blendtorch_shm.memory.states import State
from blendtorch_shm.message import wire
from blendtorch_shm.stream.control import activity, attach_control, attach_rings
from blendtorch_shm.stream.place import PrivatePlace
from blendtorch_shm.stream.reader import Reader
from blendtorch_shm.stream.writer import Writer
from blendtorch_shm.transport import tcp
from torch_side.recording import FileReader, FileRecorder

from . import mutations
from .mutations import Mutation

PAYLOAD_NBYTES = 12288
FIELDS: dict[str, Any] = {
    "image": np.zeros((40, 30, 3), np.uint8),
    "label": np.arange(5),
    "points": np.zeros(3, [("x", "<f4"), ("p", [("s", "S3"), ("t", "<M8[us]")], (2,))]),
    "nested": [np.zeros(600), (1, "x", {3: np.float32(2)}), np.arange(3.0)],
    "count": 5,
    "big": -(2**70),
    "text": "ü",
    "raw": b"\0\1",
    "none": None,
    "flag": True,
}


@dataclass
class Target:
    """A function that must take any bytes, inputs from which to begin, and how to make more of them."""

    run: Callable[[bytes], None]
    seeds: list[bytes]
    mutate: Mutation


# -- messages ---------------------------------------------------------------------------------------------------


def header_of(fields: dict[str, Any], sequence: int = 0) -> bytes:
    """The header of a message, its arrays in place."""
    parts = wire.take_apart(fields, trusted=True)
    assert parts.nbytes <= PAYLOAD_NBYTES
    return wire.encode_header(sequence, parts)


def header_from_a_stranger(data: bytes) -> None:
    _decode(data, trusted=False)


def header_from_a_friend(data: bytes) -> None:
    """Trusted means that pickles are read, which may do anything: here none is."""
    with mock.patch.object(wire, "pickle", mock.Mock(loads=mock.Mock(side_effect=ValueError("a pickle")))):
        _decode(data, trusted=True)


def _decode(data: bytes, *, trusted: bool) -> None:
    payload = np.zeros(PAYLOAD_NBYTES, np.uint8)
    try:
        fields = wire.decode(data, payload, trusted=trusted).fields
    except WireError:
        return
    _check(fields)
    with contextlib.suppress(PublishError):  # nested deeper than can be published, for example
        wire.encode_header(0, wire.take_apart(fields, trusted=False))


def _check(value: Any) -> None:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        assert not isinstance(value, wire._Reference)
        if isinstance(value, np.ndarray):
            assert value.dtype.itemsize > 0
            assert not value.dtype.hasobject
            assert value.nbytes == math.prod(value.shape) * value.dtype.itemsize
            value.tobytes()  # all of it is there
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value


def dtype(data: bytes) -> None:
    try:
        found = wire.dtype_of.__wrapped__(data.decode(errors="replace"))
    except WireError:
        return
    assert found.itemsize > 0
    assert not found.hasobject
    if name := wire.dtype_name.__wrapped__(found):
        assert wire.dtype_of.__wrapped__(name) == found


# -- TCP --------------------------------------------------------------------------------------------------------


class _Nowhere:
    """A ZeroMQ context and its sockets: what is sent goes nowhere, and nothing comes."""

    def __getattr__(self, name: str) -> Callable[..., _Nowhere]:
        return lambda *_, **__: self


def greetings(data: bytes) -> None:
    """Each line is what a consumer says on one of four connections, `1:hexadecimal`. No slot may be lost over it."""
    place = PrivatePlace()
    writer = Writer(place, max_ready=4)
    for _ in range(3):
        loan = writer.loan(100)
        writer.commit(loan, 10, b"header", 0)
    forwarder = object.__new__(tcp.TcpForwarder)
    forwarder.authenticated = True
    forwarder._address = Address("tcp://127.0.0.1:1")
    forwarder._peers, forwarder._returned, forwarder._complained = {}, deque(), set()
    forwarder._socket = _Nowhere()
    forwarder._reader = Reader(place)
    try:
        for line in data.splitlines()[:20]:
            route, _, said = line.partition(b":")
            frames = [unhex(frame) for frame in said.split(b",")]
            forwarder._hear(route[:1], frames)
            forwarder._send()
        sent = sum(len(peer.sent) for peer in forwarder._peers.values())
        ring = next(attach_rings(place, attach_control(place), {}))
        assert ring.count(State.LEASED) == sent
        for peer in list(forwarder._peers.values()):
            forwarder._dismiss(peer)
        assert ring.count(State.LEASED) == 0
    finally:
        forwarder._reader.finish()
        writer.close()


def unhex(text: bytes) -> bytes:
    """Hexadecimal digits as bytes; what is none is skipped."""
    digits = bytes(c for c in text if c in b"0123456789abcdefABCDEF")
    return bytes.fromhex(digits[: len(digits) & ~1].decode())


def frames(data: bytes) -> None:
    """What a consumer receives: frames, each after its length in two bytes."""
    connection = tcp._Connection(_Nowhere(), Address("tcp://127.0.0.1:1"), 4)
    split = []
    while len(data) >= 2 and len(split) < 5:
        nbytes = int.from_bytes(data[:2], "little")
        split.append(zmq.Frame(data[2 : 2 + nbytes]))
        data = data[2 + nbytes :]
    for _ in range(2):
        try:
            message = connection._open(split, False)
        except WireError:
            continue
        if message is not None:
            _check(message.fields)


def framed(*parts: bytes) -> bytes:
    """An input for :func:`frames`."""
    return b"".join(len(part).to_bytes(2, "little") + part for part in parts)


# -- files and the environment ----------------------------------------------------------------------------------


def launch_info(data: bytes) -> None:
    try:
        info = LaunchInfo.load_json(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    except ConfigurationError:
        return
    assert all(isinstance(a, Address) and a.twin is None for addresses in info.addresses.values() for a in addresses)
    text = io.StringIO()
    LaunchInfo.save_json(text, info)
    text.seek(0)
    assert LaunchInfo.load_json(text) == info


def environment(data: bytes) -> None:
    text = data.replace(b"\0", b"").decode(errors="surrogateescape")
    with mock.patch.object(os, "environ", {ENVIRONMENT_VARIABLE: text}), contextlib.suppress(ConfigurationError):
        resolve("tcp://127.0.0.1:1")


_directory = tempfile.TemporaryDirectory(prefix="fuzz-")


def status(data: bytes) -> None:
    Path(_directory.name, "instance-00.json").write_bytes(data)
    for report in instance_reports(_directory.name):
        assert report.state in ("starting", "running", "restarting", "exited")
        report.is_stopped()


# -- shared memory ----------------------------------------------------------------------------------------------

EDIT = struct.Struct("<BHQ")
"""Which segment, which of its words (modulo their number), and what is to stand there."""


def _example_stream() -> dict[str, bytes]:
    place = PrivatePlace()
    writer = Writer(place, num_slots=4)
    for sequence in range(3):
        header = header_of({"image": FIELDS["image"], "nested": FIELDS["nested"]}, sequence)
        loan = writer.loan(PAYLOAD_NBYTES + len(header))
        writer.commit(loan, PAYLOAD_NBYTES, header, 0)
    writer.close()
    return {suffix: bytes(segment.view) for suffix, segment in place._segments.items()}


_segments = _example_stream()


def stream(data: bytes) -> None:
    """The first byte says how much of the ring is missing, what follows are edits."""
    place = PrivatePlace()
    cut = data[:1] in b"\1\2\3" and len(data) > 1 and data[0] * 4096
    for suffix, content in _segments.items():
        content = content[: len(content) - cut] if suffix else content
        place.create(suffix, len(content)).view[:] = content
    names = [*_segments, ".0"]
    for which, at, value in EDIT.iter_unpack(data[1 : 1 + (len(data) - 1) // EDIT.size * EDIT.size]):
        words = place.attach(names[which % len(names)]).words
        words[at % len(words)] = value
    activity(place)
    try:
        reader = Reader(place)
    except SegmentError:
        return
    try:
        reader.explain()
        for local in (True, False, True, True):
            with contextlib.suppress(SegmentError, WireError):
                reader.has_ready(local=local)
                claimed = reader.take(local=local, lease=True)
                if claimed is not None:
                    assert len(claimed.payload) <= len(_segments[".0"])
                    _check(wire.decode(claimed.header, claimed.payload, trusted=False).fields)
        claimed = None
        reader.reject()
        reader.reclaim_dead()
        reader.explain()
    finally:
        reader.finish()


# -- recordings -------------------------------------------------------------------------------------------------


def recording(data: bytes) -> None:
    fd = os.memfd_create("recording")
    try:
        os.write(fd, data)
        with FileReader(f"/proc/self/fd/{fd}") as reader:
            for i in range(len(reader)):
                with contextlib.suppress(RecordingError):
                    _check(reader[i])
    except RecordingError:
        pass
    finally:
        os.close(fd)


# -- all of them ------------------------------------------------------------------------------------------------


def _example_info() -> bytes:
    twin = Twin("/tmp/blendtorch-00000000", "00000000", "0" * 32, "DATA", 0)
    address = Address("tcp://127.0.0.1:1", twin, make_keys()[1])
    text = io.StringIO()
    LaunchInfo.save_json(text, LaunchInfo({"DATA": [address], "MORE": [Address("tcp://[::1]:2")]}, ["a b"]))
    return text.getvalue().encode()


def _example_environment() -> bytes:
    twin = Twin("/tmp/blendtorch-00000000", "00000000", "0" * 32, "DATA", 0)
    return json.dumps(describe([Address("tcp://127.0.0.1:1", twin, make_keys()[0], True)])).encode()


def _example_status() -> bytes:
    write_status(_directory.name, 0, os.getpid(), "exited", -9, restarts=2)
    return Path(_directory.name, "instance-00.json").read_bytes()


def _said(route: bytes, kind: type[msgspec.Struct], **fields: Any) -> bytes:
    """A line of :func:`greetings`; fields that are not given are 1."""
    said = kind(**{field: fields.get(field, 1) for field in kind.__struct_fields__})
    return route + b":" + tcp._encode(said).hex().encode()


def _example_greetings() -> bytes:
    first: dict[str, Any] = dict(version=VERSION, session=bytes(16))
    second: dict[str, Any] = dict(version=VERSION, session=bytes(range(16)))
    return b"\n".join(
        [
            _said(b"1", tcp.Hello, **first, queue_size=2, taken=[]),
            _said(b"1", tcp.Taken, sequence=0),
            _said(b"2", tcp.Hello, **first, generation=2, queue_size=2, taken=[1]),
            _said(b"2", tcp.Hello, **second, queue_size=9, taken=[]),
            _said(b"2", tcp.Bye),
        ]
    )


def _example_frames() -> bytes:
    stamp = tcp._STAMP.pack(*range(1, tcp._STAMP.size // 8 + 1))
    return framed(stamp, header_of(FIELDS), bytes(PAYLOAD_NBYTES))


def _example_recording() -> bytes:
    path = f"{_directory.name}/recorded.tar"
    with FileRecorder(path) as recorder:
        recorder.save(FIELDS)
        recorder.save(
            {"image": np.zeros((150, 200, 3), np.uint8), "raw": bytes(3000), "nan": float("nan"), 1: np.eye(30)}
        )
        recorder.save({"order": deque([1])})  # which takes a pickle
    return Path(path).read_bytes()


def _example_headers() -> list[bytes]:
    ext = msgspec.msgpack.Ext
    deep: Any = None
    for _ in range(50):
        deep = ext(3, msgspec.msgpack.encode([deep]))
    by_hand = [
        [
            VERSION,
            0,
            [["a", "<f8", [2**62, 4], 0], [None, "|V0", [2**40], 0], [None, "|u1", [9], -1]],
            {"": b"123456789"},
        ],
        [VERSION, 0, [[None, "<f8", [1000], 1]] * 3, {"a": ext(1, b"\0"), "b": ext(6, b"\x80"), "c": deep}],
        [VERSION, 0, [], {"a": {0: ext(5, msgspec.msgpack.encode([[ext(1, b"\0"), ext(7, bytes(40))]]))}}],
    ]
    return [
        header_of(FIELDS),
        *(header_of({key: FIELDS[key]}) for key in FIELDS),
        *map(msgspec.msgpack.encode, by_hand),
    ]


_headers = _example_headers()
TARGETS = {
    "header_from_a_stranger": Target(header_from_a_stranger, _headers, mutations.message_pack),
    "header_from_a_friend": Target(header_from_a_friend, _headers, mutations.message_pack),
    "dtype": Target(
        dtype,
        [
            *(
                wire.dtype_name(np.dtype(d)).encode()
                for d in ("f8", ">i2", "?", "U7", "V9", "M8[25us]", "m8", FIELDS["points"].dtype)
            ),
            b"V99999999999",
            b"S0",
            b'[["a","<f8",[2147483647]],["","|V4"],[["t","n"],[["b","u1"]],[0,3]]]',
            b"[" * 3000,
        ],
        mutations.json_text,
    ),
    "greetings": Target(greetings, [_example_greetings()], mutations.hexadecimal_lines),
    "frames": Target(
        frames,
        [_example_frames(), framed(b"", b""), framed(bytes(tcp._STAMP.size), *_headers[:1], b"")],
        mutations.framed,
    ),
    "launch_info": Target(
        launch_info, [_example_info(), b'{"addresses": {}, "details": {"a": {"x":' + b"[" * 3000], mutations.json_text
    ),
    "environment": Target(
        environment, [_example_environment(), b'{"a": {"twin": {"x": ' + b"[" * 3000], mutations.json_text
    ),
    "status": Target(status, [_example_status(), b'{"btid": 1e999, "x": ' + b"[" * 3000], mutations.json_text),
    "recording": Target(
        recording,
        [_example_recording(), _example_recording()[:30_000], _example_recording()[:-1024]],
        mutations.archive,
    ),
    "stream": Target(
        stream,
        [
            b"\0" + EDIT.pack(0, 5, 2**64 - 1),
            b"\1" + EDIT.pack(1, 3, 2**63) + EDIT.pack(0, 4, 2**63) + EDIT.pack(0, 5, 2**63 + 1),
            b"\0" + EDIT.pack(1, 8, 0x0707020203030102) + EDIT.pack(0, 65, 2**64 - 1),
            b"\0" + b"".join(EDIT.pack(1, align(64 + 4) // 8 + word, 2**64 - 1) for word in range(16)),
        ],
        mutations.edits(EDIT.pack, 104),
    ),
}
