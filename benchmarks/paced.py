"""Publishes pictures at a steady pace, each one another. Arguments: frames per second, height, width, channels."""

import time

import numpy as np

import blendtorch.btb as btb

btargs, (fps, *shape) = btb.parse_blendtorch_args()
images = np.random.default_rng(0).integers(0, 255, (8, *map(int, shape)), np.uint8)
publisher = btb.DataPublisher(btargs.btsockets["DATA"], btargs.btid)
frameid = 0
due = time.perf_counter()
while True:
    publisher.publish(image=images[frameid % len(images)], frameid=frameid)
    frameid += 1
    due = max(due + 1 / float(fps), time.perf_counter() - 0.1)  # what it was kept waiting for is not made up for
    time.sleep(max(0.0, due - time.perf_counter()))
