"""Publishes one picture over and over. Arguments: ring|pickle|parts, height, width, channels."""

import pickle

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
elif how == "pickle":  # as blendtorch 0.4 does it: a pickle of the dict over a PUSH socket, ten messages ahead
    socket = zmq.Context().socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 10)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(str(btargs.btsockets["DATA"]))
    while True:
        image.flat[0] = frameid % 251
        socket.send_pyobj({"btid": btargs.btid, "image": image, "frameid": frameid})
        frameid += 1
elif how == "parts":  # the picture as a ZeroMQ part of its own, not copied into the pickle, over ipc
    socket = zmq.Context().socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 10)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind("ipc://@" + str(btargs.btsockets["DATA"]))
    while True:
        image.flat[0] = frameid % 251
        buffers: list[pickle.PickleBuffer] = []
        message = {"btid": btargs.btid, "image": image, "frameid": frameid}
        head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
        socket.send_multipart([head, *buffers])  # copies, as the next picture overwrites this one
        frameid += 1
else:
    raise SystemExit(f"{how}: no such way")
