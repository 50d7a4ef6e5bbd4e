"""A training program that talks to each instance of a launch: sends pictures ahead, and compares what comes back.

Usage: talk.py INFO COUNT. Says whether each address has a twin in shared memory, "half" after half of COUNT messages, and how
many came back as they should have.
"""

import json
import sys

import numpy as np

from torch_side import DuplexChannel, LaunchInfo

AHEAD = 5


def picture(btid, i):
    return np.random.default_rng([btid, i]).integers(256, size=(48, 64, 3), dtype=np.uint8)


def say(value):
    print(json.dumps(value), flush=True)


addresses = LaunchInfo.load_json(sys.argv[1]).addresses["CTRL"]
count = int(sys.argv[2])
say([address.twin is not None for address in addresses])
channels = [DuplexChannel(address) for address in addresses]
right = 0
for i in range(count + AHEAD):
    for btid, channel in enumerate(channels):
        if i < count:
            channel.send(i=i, image=picture(btid, i), meta={"who": btid, "of": [i, (i, None)]})
        if i >= AHEAD:
            message = channel.recv()
            expected = i - AHEAD
            right += message["btid"] == btid and message["i"] == expected
            right += bool((message["image"] == picture(btid, expected)[::-1]).all())
            right += message["meta"] == {"who": btid, "of": [expected, (expected, None)]}
    if i == count // 2:
        say("half")
for channel in channels:
    channel.send(end=True)
    assert channel.recv()["ended"]
    channel.close()
say(right)
