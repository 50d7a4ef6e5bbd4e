"""A producer without Blender: frames that say which they are, or, with --variety, all that a message can hold."""

import argparse
import fractions
import math
import os
import time

import numpy as np

import blendtorch.btb as btb


def variety(btid: int, i: int) -> dict[str, object]:
    """Fields of message `i`, the same in each run."""
    rng = np.random.default_rng([btid, i])

    def noise(dtype: str, *shape: int) -> np.ndarray:
        return np.frombuffer(rng.bytes(np.dtype(dtype).itemsize * math.prod(shape)), dtype).reshape(shape)

    small = [noise(f"{kind}{nbytes}", 3, 5) for kind in "iu" for nbytes in (1, 2, 4, 8)]
    large = [rng.standard_normal((40, 50)).astype(dtype) for dtype in ("f2", "f4", "f8", "c8", "c16")]
    fields: dict[str, object] = {
        "image": noise("u1", 48, 64, 3),
        "labels": noise("i4", 48, 64),
        "mask": noise("u1", 64, 64) > 127,
        "small": small,
        "large": large,
        "fortran": np.asfortranarray(noise("u2", 60, 40)),
        "strided": noise("u1", 90, 90)[::2, ::-3],
        "read-only": np.broadcast_to(np.float32(i), (30, 30)),
        "foreign": noise("u4", 4).astype(">u4"),
        "empty": np.zeros((0, 3), np.float32),
        "no dimension": np.array(float(i)),
        "texts": np.array(["a", "bc", "ü"]),
        "dates": np.array(["2024-02-29", "1970-01-01"], "M8[D]"),
        "scalar": np.float32(i) / 3,
        "mesh": {
            "verts": rng.standard_normal((200, 3)),
            "faces": noise("i8", 100, 3),
            7: ("uv", noise("f4", 300, 2) * 0),
        },
        "meta": {
            "name": "Würfel",
            "raw": b"\0\xff",
            "nothing": None,
            "yes": True,
            "big": 2**70,
            "inf": -math.inf,
            "t": (1, [2.5]),
        },
        "pickled": fractions.Fraction(i, 7),
    }
    if i % 2:
        fields["sometimes"] = noise("u1", 33, 100)
    if i % 3 == 0:
        del fields["labels"], fields["scalar"]
    if i == 6:
        fields["image"] = noise("u1", 300, 400, 3)  # more than a slot holds
    return fields


btargs, remainder = btb.parse_blendtorch_args()
parser = argparse.ArgumentParser()
parser.add_argument("--count", type=int, required=True)
parser.add_argument("--source", default="")
parser.add_argument("--variety", action="store_true")
parser.add_argument("--start-after", help="a file to wait for")
args = parser.parse_args(remainder)

while args.start_after and not os.path.exists(args.start_after):
    time.sleep(0.01)
# What is left at the end is for whoever comes late, too.
with btb.DataPublisher(btargs.btsockets["DATA"], btargs.btid, lingerms=60_000) as publisher:
    for i in range(args.count):
        fields = variety(btargs.btid, i) if args.variety else {"image": np.full((48, 64, 3), i % 256, np.uint8)}
        publisher.publish(frameid=i, source=args.source, **fields)
