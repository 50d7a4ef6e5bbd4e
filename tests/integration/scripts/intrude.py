"""A program that must not get anything: sockets of many kinds, with the keys of nobody, somebody or the launch, that send noise.

Usage: intrude.py INFO. Says when all are connected, goes on until its standard input has a line, then says how many bytes each
received.
"""

import contextlib
import json
import os
import select
import socket
import sys

import zmq

from blendtorch_shm.launch.info import LaunchInfo

KINDS = {"DEALER": zmq.DEALER, "PULL": zmq.PULL, "SUB": zmq.SUB, "REQ": zmq.REQ, "PAIR": zmq.PAIR}
READS_ONLY = (zmq.PULL, zmq.SUB)
NO_TEXT = b"\x96\xa5" + 5 * b"\xff"  # msgpack of a list that begins with a text, which is not UTF-8
ZMTP_NULL = b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL".ljust(64, b"\0")

addresses = LaunchInfo.load_json(sys.argv[1]).addresses["DATA"]
context = zmq.Context()
poller = zmq.Poller()
names: dict[zmq.Socket[bytes], str] = {}
plain: dict[int, socket.socket] = {}
for address in addresses:
    for kind, number in KINDS.items():
        for keys in ("no", "wrong", "right"):
            intruder = context.socket(number)
            names[intruder] = f"{kind} with {keys} keys"
            if number == zmq.SUB:
                intruder.subscribe(b"")
            if keys != "no":
                intruder.curve_publickey, intruder.curve_secretkey = zmq.curve_keypair()
                intruder.curve_serverkey = address.keys.server_public.encode()
            if keys == "right":
                intruder.curve_publickey = address.keys.client_public.encode()
                intruder.curve_secretkey = address.keys.client_secret.encode()
            monitor = intruder.get_monitor_socket(zmq.EVENT_CONNECTED)
            intruder.connect(address)
            if not monitor.poll(30_000):
                sys.exit(f"{names[intruder]} did not reach {address}")
            intruder.disable_monitor()
            poller.register(intruder, zmq.POLLIN)
    host, _, port = address.removeprefix("tcp://").partition(":")
    for greeting in (b"", ZMTP_NULL):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(greeting + os.urandom(1000))
        poller.register(connection.fileno(), zmq.POLLIN)
        plain[connection.fileno()] = connection
print(json.dumps("connected"), flush=True)

received = dict.fromkeys([*names.values(), "TCP"], 0)
while not select.select([sys.stdin], [], [], 0)[0]:
    for intruder in names:
        if intruder.socket_type not in READS_ONLY:
            for noise in (os.urandom(40), b"", b"\x96\xa5Hello" + os.urandom(20), NO_TEXT):
                with contextlib.suppress(zmq.ZMQError):
                    intruder.send(noise, zmq.NOBLOCK)
    for ready, _ in poller.poll(20):
        if isinstance(ready, zmq.Socket):
            received[names[ready]] += sum(map(len, ready.recv_multipart()))
        else:
            try:
                data = plain[ready].recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                poller.unregister(ready)
            received["TCP"] += len(data)
print(json.dumps(received), flush=True)
context.destroy(linger=0)
