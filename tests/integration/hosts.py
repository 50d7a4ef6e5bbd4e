"""Further hosts for tests, made of Linux namespaces: each with a network of its own, shared memory, processes and /tmp.

A host is held by one keeper, the first process of its namespaces, which reads from a pipe that only the test's process holds
open. When that process ends, in whatever way, the pipe ends, hence the keeper, hence (says the kernel) every process of the
host, its mounts and its network. Nothing of a host has a name outside, so nothing can be left behind, and several runs cannot
collide.

The hosts of a network hang on one switch, which is a bridge in a further namespace; pulling a cable takes its port down.
Two hosts may share their ``/dev/shm``, as containers started with ``--ipc=container:NAME`` do.

Programs, interpreter and checkout are the same files everywhere, and so is the root file system outside of ``/tmp``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

ROOT = Path(__file__).parents[2]
_RUN = "/tmp/run"
_OWN = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


@functools.cache
def why_not() -> str:
    """Why this machine cannot make hosts; empty if it can."""
    if os.geteuid() != 0:
        return "hosts of their own need root"
    for program, package in (("unshare", "util-linux"), ("nsenter", "util-linux"), ("ip", "iproute2")):
        if shutil.which(program) is None:
            return f"hosts of their own need the program {program} (package {package})"
    probe = "mount -t tmpfs tmpfs /dev/shm && ip link add type veth && ip link add type bridge"
    done = subprocess.run(
        ["unshare", "--ipc", *_OWN, "sh", "-c", probe],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return f"this machine makes no hosts of their own: {done.stdout.strip()}" if done.returncode else ""


class Network:
    """A switch, and the hosts that are connected to it. A context manager: at its end everything is gone."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self._switch = _Keeper(
            ["unshare", "--net"], "ip link add switch type bridge forward_delay 0\nip link set switch up"
        )

    def add(self, name: str, *, shares_memory_with: Host | None = None) -> Host:
        """A new host, with the address ``host.ip``, that reaches the others by theirs.

        Args:
            name: for messages.
            shares_memory_with: whose ``/dev/shm`` it has. None: its own.
        """
        number = len(self.hosts) + 1
        keeper = _Keeper(*_new_host(shares_memory_with))
        host = self.hosts[name] = Host(name, f"10.77.0.{number}", keeper, functools.partial(self._plug, number))
        self._switch.call(
            f"ip link add port{number} type veth peer name eth0 netns {keeper.pid}\nip link set port{number} master switch up"
        )
        keeper.call(
            f"ip link set lo up\nip addr add {host.ip}/24 dev eth0\nip link set eth0 up\nip route add default via 10.77.0.254"
        )
        return host

    def _plug(self, number: int, up: bool) -> None:
        self._switch.call(f"ip link set port{number} {'up' if up else 'down'}")

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts.values():
            host.end_programs()
            host._keeper.close()
        self._switch.close()


def _new_host(neighbour: Host | None) -> tuple[list[str], str]:
    """The command that makes the namespaces, and what is to be mounted there."""
    needed = {str(Path(path).resolve()) for path in (ROOT, sys.prefix, sys.base_prefix)}
    setup = ["mount -t tmpfs -o mode=1777 tmpfs /dev/shm"]  # built here, as nothing in it is needed, then moved to /tmp
    for path in sorted(path for path in needed if path.startswith("/tmp/")):
        setup.append(f"mkdir -p /dev/shm/{path[5:]}\nmount --bind {path} /dev/shm/{path[5:]}")
    setup += ["mount --move /dev/shm /tmp", f"mkdir -m 0700 {_RUN}"]
    if neighbour is not None:
        # A copy of the neighbour's mounts: the one of /dev/shm stays in place.
        return ["nsenter", "-t", str(neighbour._keeper.pid), "--ipc", "--mount", "unshare", *_OWN], "\n".join(setup)
    setup.append("mount -t tmpfs -o mode=1777 tmpfs /dev/shm")
    return ["unshare", "--ipc", *_OWN], "\n".join(setup)


class Host:
    """A host. Made by :meth:`Network.add`.

    Attributes:
        name: for messages.
        ip: its address.
    """

    def __init__(self, name: str, ip: str, keeper: _Keeper, plug: Callable[[bool], None]) -> None:
        self.name = name
        self.ip = ip
        self._keeper = keeper
        self._plug = plug
        self._programs: list[Program] = []

    def link(self, *, up: bool) -> None:
        """Plug or pull the network cable. Addresses and connections stay, packets do not arrive."""
        self._plug(up)

    def path(self, path: str) -> Path:
        """Where the file `path` of this host is seen from outside."""
        return Path(f"/proc/{self._keeper.pid}/root{path}")

    def run(self, command: Sequence[str], *, timeout_s: float = 60) -> str:
        """Run a program here to its end, successfully; what it said on standard output."""
        program = self.popen(command)
        output, _ = program.process.communicate(timeout=timeout_s)
        assert program.process.returncode == 0, program.describe()
        return output

    def popen(self, command: Sequence[str]) -> Program:
        """Start a program here."""
        others = ("TMPDIR", "XDG_CACHE_HOME", "DISPLAY", "WAYLAND_DISPLAY")  # mean something on this host
        environment = {key: value for key, value in os.environ.items() if key not in others}
        environment |= {"XDG_RUNTIME_DIR": _RUN, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        program = Program(f"{command[-1]!r} on host {self.name}", [*self._keeper.enter(), *command], environment)
        self._programs.append(program)
        return program

    def python(self, script: str | Path, *args: object) -> Program:
        """Start a Python script here."""
        return self.popen([sys.executable, str(script), *map(str, args)])

    def counter(self, name: str) -> int:
        """What the kernel has counted on this host's network since its start, such as ``Tcp.OutRsts`` (snmp(7))."""
        protocol, _, item = name.partition(".")
        lines = Path(f"/proc/{self._keeper.pid}/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith(f"{protocol}:"))
        return int(values[names.index(item)])

    def received_nbytes(self) -> int:
        """What has come in by the cable."""
        lines = Path(f"/proc/{self._keeper.pid}/net/dev").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.strip().startswith("eth0:"))

    def leftovers(self) -> list[Path]:
        """What launches have left here, in the shared memory and elsewhere."""
        places = [self.path(place) for place in ("/dev/shm", "/tmp", _RUN)]
        patterns = ("bt-*", "blendtorch-*", ".blendtorch-*", ".X*-lock")
        return sorted(found for place in places for pattern in patterns for found in place.glob(pattern))

    def clean(self) -> None:
        """Remove what :meth:`leftovers` finds, and every other file in /tmp."""
        for path in [*self.leftovers(), *self.path("/tmp").iterdir()]:
            if path.is_dir() and path.name.startswith(("blendtorch-", ".blendtorch-")):
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()

    def end_programs(self) -> bool:
        """Kill what was started here and still runs; whether something did."""
        running = [program for program in self._programs if program.process.poll() is None]
        for program in self._programs:
            program.kill()
        self._programs.clear()
        return bool(running)


class Program:
    """A program on a host that speaks in lines of JSON on its standard output, and waits for lines on its standard input.

    Attributes:
        process: what started it (nsenter), ends as it ends.
    """

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        self.name = name
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the program
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def line(self) -> Any:
        """The next thing it says; AssertionError with what it complained about if it ends instead."""
        text = self._out.readline()
        assert text, self.describe()
        return json.loads(text)

    def lines(self) -> Iterator[Any]:
        """What else it says, up to its end."""
        for text in self._out:
            yield json.loads(text)

    def tell(self) -> None:
        """Give it a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(self.describe()) from None

    def finish(self) -> list[Any]:
        """End its standard input and read on until it ends, successfully."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        said = list(self.lines())
        assert self.process.wait() == 0, self.describe()
        return said

    def kill(self) -> list[Any]:
        """Kill it and its children with SIGKILL, if they still run; what it had said and nobody had read."""
        with contextlib.suppress(psutil.NoSuchProcess):
            # Not nsenter: its child would live on, while with its child it ends as well.
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
        said = [] if self._out.closed else list(self.lines())
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # something was still on its way to it
                    stream.close()
        return said

    def describe(self) -> str:
        """How it ended, or did not, and its standard error."""
        self._errors.seek(0)
        return f"{self.name}: exit code {self.process.poll()}\n{self._errors.read()}"

    @property
    def _out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout


class _Keeper:
    """The process that holds namespaces.

    Args:
        command: makes them, and runs what follows in them.
        setup: shell commands to run in them first.

    Attributes:
        pid: of a process whose namespaces they are, but for that of processes, which is its children's.
    """

    def __init__(self, command: Sequence[str], setup: str) -> None:
        # Not `exec cat`: as the first process of its namespace, the shell also buries the dead of others.
        self._process = subprocess.Popen(
            [*command, "sh", "-ec", f"{setup}\necho ready\ncat\nexit 0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if said != "ready\n":
            raise RuntimeError(f"Cannot make a host: {said}{self._process.communicate()[0]}")

    def enter(self) -> list[str]:
        """The start of a command line that is to run in the namespaces."""
        kinds = ["--net", "--ipc", "--uts", "--mount", f"--pid=/proc/{self.pid}/ns/pid_for_children"]
        return ["nsenter", "-t", str(self.pid), *kinds, "--wd=/"]

    def call(self, commands: str) -> None:
        """Run shell commands where the network is theirs, and the rest the test's."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "--net", "sh", "-ec", commands],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"{commands}: {done.stdout}")

    def close(self) -> None:
        """Let go; returns when every process in there is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
