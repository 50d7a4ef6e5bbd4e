"""Inputs that are nearly right: a valid one, with something in its structure replaced, repeated, removed or wrapped."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

Mutation = Callable[[bytes, Random], bytes]

_NUMBERS = [0, 1, -1, 3, 7, 64, 100, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, 1e300]
_TEXTS = [
    "",
    "a",
    "image",
    "é",
    "|u1",
    "<f8",
    "|V0",
    "S0",
    "|O",
    "<M8[us]",
    "V99999999",
    "V4294967297",
    '[["a","<f4"]]',
    "tcp://[::1]:1",
]
_JSON_POOL: list[Any] = [
    *_NUMBERS,
    *_TEXTS,
    None,
    True,
    [],
    {},
    [[]],
    10**400,
    float("inf"),
    "\ud800",
    "\0",
    "running",
    "0" * 8,
]
_POOL: list[Any] = [
    *_NUMBERS,
    *_TEXTS,
    *(None, True, [], {}, b"", bytes(16), bytes(100)),
    *(["label", "|u1", [9], False], ["image", "<f8", [2, 3], True]),
    *([None, "|u1", [2**40, 0], True], [None, "<u8", [500], True]),
    *(
        msgspec.msgpack.Ext(code, msgspec.msgpack.encode(inner))
        for code in range(9)
        for inner in (0, [], [[1, 2]], ["<f8", [1], bytes(8)])
    ),
    msgspec.msgpack.Ext(4, msgspec.msgpack.encode(["<U1", bytes(4)])),
    msgspec.msgpack.Ext(7, b"\xff" * 40),
]


def message_pack(data: bytes, random: Random) -> bytes:
    """Of a msgpack value; extension types are looked into."""
    try:
        return msgspec.msgpack.encode(_change(msgspec.msgpack.decode(data), random, _POOL))
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError):
        return raw(data, random)


def message_header(data: bytes, random: Random) -> bytes:
    """Of a message's header: version, length of the specs, specs, offsets, fields."""
    start = 8 + int.from_bytes(data[4:8], "little")
    specs = data[8:start]
    try:
        count = sum(is_large is True for *_, is_large in msgspec.msgpack.decode(specs))
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError):
        return raw(data, random)
    offsets = bytearray(data[start : start + 8 * count])
    fields = data[start + 8 * count :]
    how = random.random()
    if how < 0.3:
        specs = message_pack(specs, random)
    elif how < 0.6:
        fields = message_pack(fields, random)
    elif how < 0.8 and count:
        at = 8 * random.randrange(count)
        value = random.choice([0, 1, 64, 8192, 12287, 12288, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
        offsets[at : at + 8] = value.to_bytes(8, "little")
    elif how < 0.9:  # more or fewer of them than there are arrays
        offsets = random.choice([offsets[:-8], offsets + bytes(8)])
    else:
        return raw(data, random)
    return data[:4] + len(specs).to_bytes(4, "little") + specs + bytes(offsets) + fields


def json_text(data: bytes, random: Random) -> bytes:
    """Of a JSON document."""
    try:
        return json.dumps(_change(json.loads(data), random, _JSON_POOL)).encode()
    except (ValueError, TypeError, RecursionError):
        return raw(data, random)


def hexadecimal_lines(data: bytes, random: Random) -> bytes:
    """Of lines `route:hexadecimal`, each a msgpack value."""
    lines = data.splitlines() or [b"1:"]
    at = random.randrange(len(lines))
    route, _, said = lines[at].partition(b":")
    if random.random() < 0.3:
        lines.insert(random.randrange(len(lines) + 1), random.choice(b"123 ".split()) + b":" + said)
    else:
        try:
            lines[at] = route + b":" + message_pack(bytes.fromhex(said.decode()), random).hex().encode()
        except ValueError:
            return raw(data, random)
    return b"\n".join(lines)


def framed(data: bytes, random: Random) -> bytes:
    """Of frames, each after its length in two bytes; the second is a message's header."""
    parts = []
    while len(data) >= 2:
        nbytes = int.from_bytes(data[:2], "little")
        parts.append(data[2 : 2 + nbytes])
        data = data[2 + nbytes :]
    if len(parts) > 1 and random.random() < 0.8:
        parts[1] = message_header(parts[1], random)
    elif parts:
        at = random.randrange(len(parts))
        parts[at : at + 1] = random.choice([[], [parts[at]] * 2, [raw(parts[at], random)]])
    return b"".join(min(len(part), 2**16 - 1).to_bytes(2, "little") + part[: 2**16 - 1] for part in parts)


def edits(pack: Callable[[int, int, int], bytes], num_words: int) -> Mutation:
    """Of a byte, and records (segment, word, value) in the form of `pack`."""
    values = [number for number in _NUMBERS if isinstance(number, int) and number >= 0]

    def mutation(data: bytes, random: Random) -> bytes:
        value = random.choice(values) if random.random() < 0.7 else random.getrandbits(64) & 0x0303030303030303
        record = pack(random.randrange(2), random.randrange(num_words), value)
        start = 1 + random.randrange(max(1, len(data) // len(record))) * len(record)
        keep = start + random.choice([0, len(record)])
        return (data[:1] or b"\0") + data[1:start] + record + data[keep:]

    return mutation


def archive(data: bytes, random: Random) -> bytes:
    """Of a tar archive, its members being JSON, .npy, or numbers that end where their member does."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as old:
            members = [(member, old.extractfile(member).read()) for member in old]  # type: ignore[union-attr]
    except (tarfile.TarError, ValueError, AttributeError):
        return raw(data, random)
    if not members:
        return raw(data, random)
    at = random.randrange(len(members))
    member, content = members[at]
    how = random.random()
    if how < 0.15:
        members[at : at + 1] = random.choice([[], [members[at]] * 2, [random.choice(members), members[at]]])
    elif how < 0.3:
        member.name = random.choice(
            ["a.json", "__index__", "__recording__", raw(member.name.encode(errors="replace"), random).decode("latin1")]
        )
    elif how < 0.4:  # what a program said that wrote the file is now wrong
        cut = random.randrange(len(data) + 1)
        return data[:cut] + random.choice([b"", data[cut + 512 :], random.randbytes(8) + data[cut + 8 :]])
    elif member.name == "__index__":
        words = bytearray(content)
        start = random.randrange(128, max(len(words), 129)) // 8 * 8
        words[start : start + 8] = random.choice([0, 512, 1024, len(data), 2**63, 2**64 - 1]).to_bytes(8, "little")
        members[at] = member, bytes(words)
    elif content[:6] == b"\x93NUMPY":
        members[at] = member, raw(content[:128], random) + content[128:]
    else:
        members[at] = member, json_text(content, random)
    parts = []
    for member, content in members:
        member.size = len(content)
        parts += [member.tobuf(tarfile.GNU_FORMAT, "latin1", "replace"), content, bytes(-len(content) % 512)]
    return b"".join(parts) + bytes(1024)


def raw(data: bytes, random: Random) -> bytes:
    """Of bytes: a few replaced, inserted or removed."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(changed) + 1)
        keep = at + random.choice([0, 0, 1, 1, 1, 4])
        changed[at:keep] = random.choice(
            [b"", bytes([random.randrange(256)]), b"\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"[" * 300]
        )
    return bytes(changed)


def _change(value: Any, random: Random, pool: list[Any]) -> Any:
    """`value` with one change somewhere in it."""
    if random.random() < 0.1:
        return random.choice([[value], random.choice(pool)])
    if isinstance(value, list) and value:
        at = random.randrange(len(value))
        if random.random() < 0.7:
            return [*value[:at], _change(value[at], random, pool), *value[at + 1 :]]
        return [
            *value[:at],
            *random.choice([[], [value[at]] * random.choice([2, 100]), [random.choice(pool), value[at]]]),
            *value[at + 1 :],
        ]
    if isinstance(value, dict) and value:
        key = random.choice(list(value))
        if random.random() < 0.8:
            return {**value, key: _change(value[key], random, pool)}
        if random.random() < 0.5:
            return {k: v for k, v in value.items() if k != key}
        return {**value, random.choice(["", "a", "x", 7]): value[key]}
    if isinstance(value, msgspec.msgpack.Ext) and value.code != 7 and random.random() < 0.8:
        return msgspec.msgpack.Ext(value.code, message_pack(value.data, random))
    if isinstance(value, str) and value[:1] == "[" and random.random() < 0.8:
        return json_text(value.encode(), random).decode(errors="replace")
    if isinstance(value, str) and random.random() < 0.5:
        return raw(value.encode(errors="replace"), random).decode(errors="replace")
    if type(value) is int and random.random() < 0.5:
        return value + random.choice([-1, 1, 2**32])
    return random.choice(pool)
