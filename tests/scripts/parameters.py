"""An instance without Blender that publishes what its parameters are. The first item says how they were before any had come.

Arguments: [--frames-per-clip T] [--send-hwm N]
"""

import argparse
import itertools
import os

import numpy as np

import blendtorch.btb as btb

btargs, remainder = btb.parse_blendtorch_args()
parser = argparse.ArgumentParser()
parser.add_argument("--frames-per-clip", type=int)
parser.add_argument("--send-hwm", type=int, default=1)
args = parser.parse_args(remainder)

parameters = btb.Parameters(btargs.btsockets["PARAMS"], btargs.btid)
publisher = btb.DataPublisher(
    btargs.btsockets["DATA"],
    btargs.btid,
    send_hwm=args.send_hwm,
    frames_per_clip=args.frames_per_clip,
    parameters=parameters,
)
parameters.wait()
for i in itertools.count():
    is_newer = parameters.update()
    publisher.publish(
        image=np.full((60, 80), parameters["value"], np.int32),
        names=sorted(parameters),
        value=parameters.get("value"),
        table=parameters["table"],
        is_newer=is_newer,
        frameid=i,
        pid=os.getpid(),
    )
