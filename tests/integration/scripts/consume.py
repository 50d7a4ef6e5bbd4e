"""A training program that reports what it receives, a line of JSON each.

First whether each address has a twin in shared memory, then for each item its key (source, btid, frameid) and, with
--describe, all that it is.
"""

import argparse
import collections
import hashlib
import json
import logging
import sys
import time

import numpy as np
import torch
from torch.utils import data

from torch_side import LaunchInfo, RemoteIterableDataset


def describe(value):
    """`value` as JSON that is equal only for equal values of equal types."""
    if isinstance(value, torch.Tensor):
        assert value.layout == torch.strided
        return ["tensor", str(value.dtype), list(value.shape), digest(value.resolve_conj().numpy())]
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), list(value.shape), value.flags.writeable, digest(value)]
    if isinstance(value, dict):
        return ["dict", [[describe(k), describe(v)] for k, v in value.items()]]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [describe(v) for v in value]]
    return [type(value).__module__, type(value).__qualname__, repr(value)]


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def report(value):
    print(json.dumps(value), flush=True)


class WithWhatItWas:
    """Adds a description of the item as it was received, its arrays not yet tensors."""

    def __call__(self, item):
        return {**item, "as it was": json.dumps(describe(item))}


def as_it_is(item):
    return item


parser = argparse.ArgumentParser()
parser.add_argument("infos", nargs="+", help="files of launch information; all their instances are read from")
parser.add_argument("--max-items", type=int, required=True)
parser.add_argument("--until-each", type=int, help="end when each instance has sent so many")
parser.add_argument("--num-workers", type=int, default=0)
parser.add_argument("--only", type=int, help="the one instance to read from")
parser.add_argument("--describe", action="store_true")
parser.add_argument("--pause-at", type=int, help="after so many items, say so and wait for a line on standard input")
parser.add_argument("--step-s", type=float, default=0, help="what a training step takes")
args = parser.parse_args()

logging.basicConfig()
addresses = [address for info in args.infos for address in LaunchInfo.load_json(info).addresses["DATA"]]
if args.only is not None:
    addresses = [addresses[args.only]]
report([address.twin is not None for address in addresses])
dataset = RemoteIterableDataset(
    addresses,
    max_items=args.max_items,
    timeoutms=40_000,
    item_transform=WithWhatItWas() if args.describe else None,
)
loader = data.DataLoader(dataset, batch_size=None, num_workers=args.num_workers, collate_fn=as_it_is)
heard = collections.Counter()
for i, item in enumerate(loader, 1):
    key = [item.get("source", ""), item["btid"], item["frameid"]]
    report([key, describe(item)] if args.describe else key)
    if i == args.pause_at:
        report("paused")
        sys.stdin.readline()
    heard[key[0], key[1]] += 1
    if args.until_each and len(heard) == len(addresses) and min(heard.values()) >= args.until_each:
        break
    time.sleep(args.step_s)
