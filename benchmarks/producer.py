"""Publishes pictures, with one way of many. Run by a launcher, or imported for what :func:`messages` gives.

Arguments: ring|pickle|parts|iceoryx2|hop, height, width, channels; --fields N cuts the picture into N arrays; --interval S waits
between two messages; --asked ENDPOINT waits to be asked for each, there.
"""

from __future__ import annotations

import argparse
import itertools
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import zmq

import blendtorch.btb as btb

AHEAD = 10  # messages: blendtorch's high-water mark, and so everybody's
STAMP = np.dtype([("frameid", np.int64), ("sent_ns", np.int64)])
NOT_COUNTED = -1  # as a frameid: sent to connect


def messages(
    shape: tuple[int, ...], fields: int = 1, interval_s: float = 0.0, asked: str = ""
) -> Iterator[dict[str, Any]]:
    """A picture that is another one each time, without much being done for that."""
    image = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    parts = dict(zip(field_names(fields), np.split(image, fields), strict=True))
    due = time.perf_counter()
    if asked:
        questions = zmq.Context().socket(zmq.PULL)
        questions.connect(asked)
    for frameid in itertools.count():
        if asked:
            questions.recv()
        image.flat[0] = frameid % 251
        yield {**parts, "frameid": frameid, "sent_ns": time.monotonic_ns()}
        if interval_s:
            due = max(due + interval_s, time.perf_counter() - 0.1)  # what it was kept waiting for is not made up for
            time.sleep(max(0.0, due - time.perf_counter()))


def field_names(fields: int) -> list[str]:
    return ["image", *(f"image{i}" for i in range(1, fields))]


def ring(socket: str, btid: int) -> Callable[[dict[str, Any]], None]:
    publisher = btb.DataPublisher(socket, btid)
    return lambda message: publisher.publish(**message)


def push(endpoint: str) -> zmq.Socket[bytes]:
    socket = zmq.Context().socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, AHEAD)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(endpoint)
    return socket


def over_tcp(endpoint: str, btid: int) -> Callable[[dict[str, Any]], None]:
    """As blendtorch 0.4 does it: a pickle of the dict over a PUSH socket."""
    socket = push(endpoint)
    return lambda message: socket.send_pyobj({"btid": btid, **message})


def in_parts(endpoint: str, btid: int) -> Callable[[dict[str, Any]], None]:
    """Pictures as ZeroMQ parts of their own, not copied into the pickle, over ipc."""
    socket = push("ipc://@" + endpoint)

    def publish(message: dict[str, Any]) -> None:
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps({"btid": btid, **message}, protocol=5, buffer_callback=buffers.append)
        socket.send_multipart([head, *buffers])  # copies, as the next picture overwrites this one

    return publish


def hop(endpoint: str, btid: int) -> Callable[[dict[str, Any]], None]:
    """What must be: a copy into one of eight slots, which nobody else sees, and one small message over ZeroMQ."""
    socket = push("ipc://@" + endpoint)
    slots: list[np.ndarray[Any, Any]] = []

    def publish(message: dict[str, Any]) -> None:
        if not slots:
            slots.extend(np.ones_like(message["image"]) for _ in range(8))
        np.copyto(slots[message["frameid"] % len(slots)], message["image"])
        socket.send(np.array((message["frameid"], message["sent_ns"]), STAMP).tobytes())

    return publish


def iceoryx2(service: str, btid: int) -> Callable[[dict[str, Any]], None]:
    """The bare picture behind a stamp, in a loaned sample, and a notification."""
    import iceoryx2 as iox

    node, samples, events, connected = iceoryx2_services(service)
    publisher: Any = None
    notifier = events.notifier_builder().create()

    def send(stamp: tuple[int, int], image: np.ndarray[Any, Any]) -> None:
        sample = publisher.loan_slice_uninit(STAMP.itemsize + image.nbytes)
        memory = np.frombuffer(sample.payload().as_memory_view(), np.uint8)
        memory[: STAMP.itemsize].view(STAMP)[0] = stamp
        np.copyto(memory[STAMP.itemsize :].reshape(image.shape), image)
        sample.assume_init().send()
        notifier.notify()

    def publish(message: dict[str, Any]) -> None:
        nonlocal publisher
        image = message["image"]
        if publisher is None:
            factory = samples.publisher_builder().initial_max_slice_len(STAMP.itemsize + image.nbytes)
            publisher = factory.backpressure_strategy(iox.BackpressureStrategy.RetryUntilDelivered).create()
            # What is sent to a subscriber that has not connected is lost. So none counts before it has answered one.
            answers = connected.listener_builder().create()
            while not answers.timed_wait(iox.Duration.from_millis(20)):
                send((NOT_COUNTED, 0), image)
        send((message["frameid"], message["sent_ns"]), image)

    publish.node = node  # type: ignore[attr-defined]  # lives as long as what it made
    return publish


def iceoryx2_services(service: str) -> tuple[Any, Any, Any, Any]:
    """Its node, its samples, its events, and the subscriber's event that it is connected; the same at both ends."""
    import ctypes

    import iceoryx2 as iox

    iox.set_log_level(iox.LogLevel.Error)
    node = iox.NodeBuilder.new().create(iox.ServiceType.Ipc)
    name = iox.ServiceName.new(service)
    samples = node.service_builder(name).publish_subscribe(iox.Slice[ctypes.c_uint8])
    samples = samples.enable_safe_overflow(False).subscriber_max_buffer_size(AHEAD).open_or_create()
    events, connected = (
        node.service_builder(iox.ServiceName.new(each)).event().open_or_create()
        for each in (service, f"{service}/connected")
    )
    return node, samples, events, connected


WAYS = {"ring": ring, "pickle": over_tcp, "parts": in_parts, "iceoryx2": iceoryx2, "hop": hop}


def main() -> None:
    btargs, arguments = btb.parse_blendtorch_args()
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("shape", type=int, nargs=3)
    parser.add_argument("--fields", type=int, default=1)
    parser.add_argument("--interval", type=float, default=0.0)
    parser.add_argument("--asked", default="")
    options = parser.parse_args(arguments)
    publish = WAYS[options.way](btargs.btsockets["DATA"], btargs.btid)
    for message in messages(tuple(options.shape), options.fields, options.interval, options.asked):
        publish(message)


if __name__ == "__main__":
    main()
