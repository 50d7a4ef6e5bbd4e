"""A trainer that steps the environments of launches, and says what it sees, a line of JSON each.

Usage: act.py STEPS INFO ... First whether each address has a twin in shared memory; then, for each step, which moment each
picture is of; at last how many environments are there.
"""

import contextlib
import json
import sys

import numpy as np

from torch_side import LaunchInfo
from torch_side.env import BlenderVectorEnv


def report(value):
    print(json.dumps(value), flush=True)


def moments(pictures):
    """Instance, episode, step and action; all other elements of a picture are alike."""
    flat = pictures.reshape(len(pictures), -1)
    assert (flat[:, 4:] == flat[:, 4:5]).all()
    return flat[:, :4].tolist()


addresses = [address for path in sys.argv[2:] for address in LaunchInfo.load_json(path).addresses["GYM"]]
report([address.twin is not None for address in addresses])
with contextlib.closing(BlenderVectorEnv(addresses=addresses, timeoutms=60_000)) as envs:
    pictures, _ = envs.reset(seed=3, options={"length": 10**6})
    kept = [pictures]
    for step in range(1, int(sys.argv[1]) + 1):
        kept.append(envs.step(np.arange(envs.num_envs) + step)[0])
    for pictures in kept:
        report(moments(pictures))
    report(envs.num_envs)
