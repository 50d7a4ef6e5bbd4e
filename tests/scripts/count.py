"""A producer without Blender: frames that say which they are. Arguments: [height width] [--stop-after N]"""

import argparse
import itertools

import numpy as np

import blendtorch.btb as btb

btargs, remainder = btb.parse_blendtorch_args()
parser = argparse.ArgumentParser()
parser.add_argument("--shape", type=int, nargs=3, default=[48, 64, 3])
parser.add_argument("--stop-after", type=int)
parser.add_argument("--send-hwm", type=int, default=10)
args = parser.parse_args(remainder)

publisher = btb.DataPublisher(btargs.btsockets["DATA"], btargs.btid, send_hwm=args.send_hwm)
for i in itertools.count() if args.stop_after is None else range(args.stop_after):
    value = (i * 7 + btargs.btid * 101) % 256
    publisher.publish(image=np.full(args.shape, value, np.uint8), xy=np.full((8, 2), float(i)), frameid=i, value=value)
publisher.close()
