"""Publishes one picture over and over. Arguments: pickle|ring, height, width, channels; with `pickle` also the address."""

import numpy as np
import zmq

import blendtorch.btb as btb

btargs, (how, *rest) = btb.parse_blendtorch_args()
shape = tuple(map(int, rest[:3]))
image = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
frameid = 0

if how == "ring":
    publisher = btb.DataPublisher(btargs.btsockets["DATA"], btargs.btid)
    while True:
        image.flat[0] = frameid % 251
        publisher.publish(image=image, frameid=frameid)
        frameid += 1
else:  # as blendtorch 0.4 does it: a pickle of the dict over a PUSH socket, ten messages ahead
    socket = zmq.Context().socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 10)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(str(btargs.btsockets["DATA"]))
    while True:
        image.flat[0] = frameid % 251
        socket.send_pyobj({"btid": btargs.btid, "image": image, "frameid": frameid})
        frameid += 1
