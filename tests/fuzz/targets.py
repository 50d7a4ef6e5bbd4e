"""Whatever parses what another process wrote, each as a function of some bytes.

A target returns when the bytes were understood, or refused with an error that is documented. Everything else that it lets out,
or asserts, is a finding. :mod:`test_fuzz` feeds them mutations of valid inputs, :mod:`coverage_guided` goes on from there for as
long as one likes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import zmq

from blendtorch_shm.errors import (
    ConfigurationError,
    InstanceDied,
    PublishError,
    RecordingError,
    SegmentError,
    UnreadableMessage,
    WireError,
)
from blendtorch_shm.launch.address import ENVIRONMENT_VARIABLE, Address, Twin, describe, resolve
from blendtorch_shm.launch.info import LaunchInfo
from blendtorch_shm.launch.keys import make_keys
from blendtorch_shm.launch.notes import instance_reports, write_status
from blendtorch_shm.memory.layout import MAX_SLOTS, VERSION, align
from blendtorch_shm.memory.states import State
from blendtorch_shm.message import dtypes, token, values, wire
from blendtorch_shm.stream import inbox
from blendtorch_shm.stream.bell import private_bell
from blendtorch_shm.stream.consumer import Consumer
from blendtorch_shm.stream.control import activity
from blendtorch_shm.stream.inspection import inspect
from blendtorch_shm.stream.merge import Source
from blendtorch_shm.stream.place import PrivatePlace
from blendtorch_shm.stream.producer import Producer
from blendtorch_shm.transport.tcp import TcpForwarder, protocol
from blendtorch_shm.transport.tcp.inlet import Inlet
from torch_side.file import FileReader, FileRecorder

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


def header_of(fields: dict[str, Any]) -> bytes:
    """The header of a message, its arrays in place."""
    parts = wire.Encoder(trusted=True).take_apart(fields)
    assert parts.nbytes <= PAYLOAD_NBYTES
    return parts.header()


def forged_header(specs: list[Any], offsets: list[int], fields: Any) -> bytes:
    """A header by hand."""
    encoded = msgspec.msgpack.encode(specs)
    prefix = wire._PREFIX.pack(VERSION, len(encoded))
    return prefix + encoded + struct.pack(f"<{len(offsets)}Q", *offsets) + msgspec.msgpack.encode(fields)


def header_from_a_stranger(data: bytes) -> None:
    _decode(data, trusted=False)


def header_from_a_friend(data: bytes) -> None:
    """Trusted means that pickles are read, which may do anything: here none is."""
    with mock.patch.object(values, "pickle", mock.Mock(loads=mock.Mock(side_effect=ValueError("a pickle")))):
        _decode(data, trusted=True)


def _decode(data: bytes, *, trusted: bool) -> None:
    payload = np.zeros(PAYLOAD_NBYTES, np.uint8)
    decoder = wire.Decoder(trusted=trusted)
    decoder.decode(_usual_header, payload)
    try:
        fields = decoder.decode(data, payload)
    except WireError:
        with contextlib.suppress(WireError):
            decoder.decode(data, payload)
            raise AssertionError("refused, and understood when it came again") from None
        decoder.decode(_usual_header, payload)
        return
    _check(fields)
    again = decoder.decode(data, payload)
    _check(again)
    assert list(again) == list(fields)
    with contextlib.suppress(PublishError):  # nested deeper than can be published, for example
        wire.Encoder(trusted=False).take_apart(fields).header()


def _check(value: Any) -> None:
    waiting = [value]
    while waiting:
        value = waiting.pop()
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
        found = dtypes.dtype_of.__wrapped__(data.decode(errors="replace"))
    except WireError:
        return
    assert found.itemsize > 0
    assert not found.hasobject
    if name := dtypes.dtype_name.__wrapped__(found):
        assert dtypes.dtype_of.__wrapped__(name) == found


def token_of_a_slot(data: bytes) -> None:
    found = token.unpack(data)
    if found is not None:
        assert found.slot < MAX_SLOTS
        assert token.pack(*found) == data


# -- TCP --------------------------------------------------------------------------------------------------------


class _Nowhere:
    """A ZeroMQ context and its sockets: what is sent goes nowhere, and nothing comes."""

    def __getattr__(self, name: str) -> Callable[..., _Nowhere]:
        return lambda *_, **__: self


def greetings(data: bytes) -> None:
    """Each line is what a consumer says on one of four connections, `1:hexadecimal`. No slot may be lost over it."""
    place = PrivatePlace()
    producer = Producer(place, trusted=True)
    for _ in range(3):
        producer.publish({"image": FIELDS["image"]})
    forwarder = object.__new__(TcpForwarder)
    forwarder.authenticated = True
    forwarder._address = Address("tcp://127.0.0.1:1")
    forwarder._returned, forwarder._complained, forwarder._remote = deque(), set(), 0
    forwarder._socket = _Nowhere()
    forwarder._consumer = Consumer(place)
    session = forwarder._session = protocol.ProducerSession(1, 1)
    try:
        for line in data.splitlines()[:20]:
            route, _, said = line.partition(b":")
            frames = [unhex(frame) for frame in said.split(b",")]
            forwarder._perform(session.hear(route[:1], frames))
            forwarder._send()
        sent = sum(len(peer.sent) for peer in session.peers)
        assert inspect(place).count(State.LEASED) == sent
        for peer in session.peers:
            forwarder._perform(session.hear(peer.route, [protocol.encode(protocol.Bye())]))
        assert inspect(place).count(State.LEASED) == 0
    finally:
        forwarder._consumer.close()
        producer.close()


def posts(data: bytes) -> None:
    """What a trainer posts to an instance."""
    session = protocol.ProducerSession(1, 1, is_channel=True)
    session.hear(b"1", [protocol.encode(protocol.Hello(VERSION, bytes(16), 1, 1, 0, [], 1))])
    inlet = Inlet(private_bell(), "here", trusted=False)
    for _ in range(2):
        for action in session.hear(b"1", [data]):
            if isinstance(action, protocol.Deliver):
                inlet.put(action)
                message = inlet.take()
                _check(None if message is None else message.fields)
    inlet.explain()


def unhex(text: bytes) -> bytes:
    """Hexadecimal digits as bytes; what is none is skipped."""
    digits = bytes(c for c in text if c in b"0123456789abcdefABCDEF")
    return bytes.fromhex(digits[: len(digits) & ~1].decode())


def frames(data: bytes) -> None:
    """What a consumer receives: frames, each after its length in two bytes."""
    session = protocol.ConsumerSession(bytes(16), 4)
    session.connected()
    split: list[Any] = []
    while len(data) >= 2 and len(split) < 5:
        nbytes = int.from_bytes(data[:2], "little")
        frame = data[2 : 2 + nbytes]
        split.append(np.frombuffer(frame, np.uint8) if len(split) == 2 else frame)
        data = data[2 + nbytes :]
    for _ in range(2 if split else 0):
        session.receive(split, 0.0)
        while (step := session.next()) is not None:
            if isinstance(step, protocol.Arrived):
                try:
                    _check(wire.Decoder(trusted=False).decode(step.header, step.payload))
                except WireError:
                    pass
                session.accept(step)


def framed(*parts: bytes) -> bytes:
    """An input for :func:`frames`."""
    return b"".join(len(part).to_bytes(2, "little") + part for part in parts)


# -- files and the environment ----------------------------------------------------------------------------------


def launch_info(data: bytes) -> None:
    try:
        info = LaunchInfo.load_json(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    except (ConfigurationError, InstanceDied):  # of a launch that is over
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
    with Producer(place, num_slots=4, trusted=True) as producer:
        for _ in range(3):
            producer.publish({"image": FIELDS["image"], "nested": FIELDS["nested"]})
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
    with contextlib.suppress(SegmentError):
        inspect(place)
    try:
        consumer = Consumer(place)
    except SegmentError:
        return
    try:
        consumer.explain()
        for local in (True, False):
            with contextlib.suppress(SegmentError, WireError):
                consumer.has_ready(local=local)
                claimed = consumer.claim(local=local)
                if claimed is not None:
                    assert len(claimed.payload) <= len(_segments[".0"])
                    _check(wire.Decoder(trusted=False).decode(claimed.header, claimed.payload))
        claimed = None
        consumer.reject()
        consumer.reclaim_dead()
        consumer.pass_on()
        consumer.explain()
    finally:
        consumer.close()
    with Source([place]) as source:
        for receive in (source.receive, functools.partial(source.receive_many, 2), source.receive):
            with contextlib.suppress(UnreadableMessage):
                received = receive(0.001)
                for message in received if isinstance(received, list) else [received]:
                    _check(None if message is None else message.fields)
        source.explain()


def numbers_at_an_inbox(data: bytes) -> None:
    """What is pushed to a consumer that sleeps: messages of one or two frames, each frame after its length in one byte."""
    place = PrivatePlace()
    with Producer(place, trusted=True) as producer, Source([place]) as source:
        producer.publish({"image": FIELDS["image"]})
        assert source.receive(0) is not None
        somebody = inbox._context.socket(zmq.PUSH)
        try:
            somebody.connect(place.inbox(0))
            numbers = rejected = 0
            while data and numbers < 20:
                nbytes = data[0] & 127
                frames = [data[1 : 1 + nbytes], *([b"more"] if data[0] & 128 else [])]
                somebody.send_multipart(frames, zmq.DONTWAIT)
                number = token.unpack(frames[0])
                rejected += len(frames) > 1 or number is None or number.key != source._streams[0].key
                data = data[1 + nbytes :]
                numbers += 1
            assert source.receive(0.001) is None
            producer.publish({"number": numbers})
            message = source.receive(1.0)
            assert message is not None
            assert message.fields == {"number": numbers}
            until = time.monotonic() + 30.0
            while rejected and "no slot numbers" not in source.explain():  # they may be on their way
                assert time.monotonic() < until, source.explain()
                assert source.receive(0.001) is None
            assert rejected or "no slot numbers" not in source.explain(), source.explain()
        finally:
            somebody.close()


# -- recordings -------------------------------------------------------------------------------------------------


def recording(data: bytes) -> None:
    fd = os.memfd_create("recording")
    try:
        os.write(fd, data)
        with FileReader(f"/proc/self/fd/{fd}", verify=False) as reader:
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
    return route + b":" + protocol.encode(said).hex().encode()


def _example_greetings() -> bytes:
    first: dict[str, Any] = dict(version=VERSION, session=bytes(16))
    second: dict[str, Any] = dict(version=VERSION, session=bytes(range(16)))
    return b"\n".join(
        [
            _said(b"1", protocol.Hello, **first, room=2, taken=[]),
            _said(b"1", protocol.Taken, sequence=0),
            _said(b"2", protocol.Hello, **first, generation=2, room=2, taken=[1]),
            _said(b"2", protocol.Hello, **second, room=9, taken=[]),
            _said(b"2", protocol.Bye),
        ]
    )


def _example_frames() -> bytes:
    stamp = protocol.STAMP.pack(*range(1, protocol.STAMP.size // 8 + 1))
    return framed(stamp, header_of(FIELDS), bytes(PAYLOAD_NBYTES))


def _example_post() -> bytes:
    parts = wire.Encoder(trusted=False).take_apart(FIELDS)
    post, payload = protocol.new_post(parts.header(), parts.nbytes)
    parts.copy_into(payload)
    return post.tobytes()


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
        forged_header(
            [["a", "<f8", [2**62, 4], True], [None, "|V0", [2**40], True], [None, "|u1", [9], False]],
            [0, 0],
            {"": b"123456789"},
        ),
        forged_header(
            [[None, "<f8", [100], True]] * 3, [1, 2, 3], {"a": ext(1, b"\0"), "b": ext(6, b"\x80"), "c": deep}
        ),
        forged_header([], [], {"a": {0: ext(5, msgspec.msgpack.encode([[ext(1, b"\0"), ext(7, bytes(40))]]))}}),
    ]
    return [
        header_of(FIELDS),
        *(header_of({key: FIELDS[key]}) for key in FIELDS),
        *by_hand,
    ]


_headers = _example_headers()
_usual_header = _headers[0]
TARGETS = {
    "header_from_a_stranger": Target(header_from_a_stranger, _headers, mutations.message_header),
    "header_from_a_friend": Target(header_from_a_friend, _headers, mutations.message_header),
    "dtype": Target(
        dtype,
        [
            *(
                dtypes.dtype_name(np.dtype(d)).encode()
                for d in ("f8", ">i2", "?", "U7", "V9", "M8[25us]", "m8", FIELDS["points"].dtype)
            ),
            b"V99999999999",
            b"S0",
            b'[["a","<f8",[2147483647]],["","|V4"],[["t","n"],[["b","u1"]],[0,3]]]',
            b"[" * 3000,
        ],
        mutations.json_text,
    ),
    "token_of_a_slot": Target(
        token_of_a_slot, [token.pack(2**64 - 1, 2**32 - 1, MAX_SLOTS - 1, 2**64 - 1), b"\xff" * 24], mutations.raw
    ),
    "numbers_at_an_inbox": Target(
        numbers_at_an_inbox,
        [
            b"".join(bytes([len(number)]) + number for number in (token.pack(1, 2, 3, 4), b"", b"?" * 30)),
            bytes([24]) + b"\xff" * 24 + bytes([24 + 128]) + bytes(24),
        ],
        mutations.raw,
    ),
    "greetings": Target(greetings, [_example_greetings()], mutations.hexadecimal_lines),
    "posts": Target(posts, [_example_post(), b"post", bytes(16)], mutations.raw),
    "frames": Target(
        frames,
        [_example_frames(), framed(b"", b""), framed(bytes(protocol.STAMP.size), *_headers[:1], b"")],
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
