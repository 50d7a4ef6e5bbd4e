"""BlenderLauncher: starts Blender instances, watches over them, and leaves nothing behind."""

from __future__ import annotations

import atexit
import collections
import contextlib
import ipaddress
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from blendtorch_shm.errors import (
    BlendtorchError,
    ConfigurationError,
    InstanceDied,
    LaunchError,
    StreamTimeout,
)
from blendtorch_shm.launch.address import (
    ENVIRONMENT_VARIABLE,
    Address,
    describe,
    is_loopback,
)
from blendtorch_shm.launch.directory import LaunchDirectory
from blendtorch_shm.launch.info import LaunchInfo
from blendtorch_shm.launch.keys import make_keys
from blendtorch_shm.launch.notes import (
    INSTANCE_VARIABLE,
    LAUNCH_VARIABLE,
    RECYCLE_VARIABLE,
    InstanceReport,
    instance_path,
    instance_reports,
)
from blendtorch_shm.launch.sweep import sweep_and_warn
from blendtorch_shm.process import descriptors
from blendtorch_shm.stream.stats import StreamStats, stats

from .finder import Paths, Runtime, environment, find_runtime
from .launching.config import LaunchConfig, Restart
from .launching.display import VirtualDisplay
from .launching.instance import Instance
from .launching.logs import Logs
from .launching.packages import OUR_FOLDER, package_folders
from .launching.ports import DEFAULT_START_PORT, PortReservations
from .launching.supervisor import Supervisor
from .utils import get_primary_ip

__all__ = ["BlenderLauncher"]

_HEADLESS_SINCE = (5, 1)
"""From this version on, Blender draws off-screen in background."""
_EVERYWHERE = "0.0.0.0"
_DESCRIPTORS = 24
"""File descriptors that a launch needs at once; besides, each instance and each of its ports has two."""

StrPath = str | os.PathLike[str]


class BlenderLauncher:
    """Runs a script in several Blender instances for as long as a ``with`` block lasts.

    On entry, `launch_info` is filled in and the instances are started; they are not waited for, since whoever reads from
    them waits anyway. When the block ends, in whatever way (SIGINT, SIGTERM, SIGHUP and SIGQUIT included), the instances and
    everything that they started end too, and their sockets, files and shared memory are removed. Should this process be killed,
    the kernel ends the instances, and the next launch removes the rest.

    An instance that dies is reported at once with its exit code and the end of its log. With `restart`, it is started again
    in its place, with the same command, addresses and log, and whoever reads from it goes on reading: what it had published is
    delivered, once. Only its ``-btseed`` is another, and its environment variable ``BLENDTORCH_RESTARTS`` counts, from 0.

    Args:
        scene: the .blend file to open. '' or None: Blender's start-up scene.
        script: the Python script to run in each instance.
        num_instances: how many instances to run. They are numbered from 0: their `btid`.
        named_sockets: names of the sockets that the script binds, such as ``['DATA']``. Each instance gets an address for
            each, in the order of names first and instances second.
        start_port: the first TCP port. The default means the first free ports from there on, so that launches run side by
            side; any other number is taken at its word, and is an error if it is in use.
        bind_addr: the IPv4 address to listen on. 'primaryip': that of the default route. '0.0.0.0': all. Processes of this host
            use shared memory in any case. Connections are encrypted and need the keys in `launch_info`.
        instance_args: for each instance, further command-line arguments for its script.
        proto: 'tcp'.
        blend_path: directories in which to look for a Blender executable, before anything else.
        seed: the first instance gets this as ``-btseed``, the next one more, and so on; one that is started again gets one that
            nobody had. None: a random one.
        background: run a Blender executable without a window (``--background``), also where it could have one.
        blender: what runs an instance: a Blender executable, a Python interpreter that has the bpy module, or
            ``'python'``, the running interpreter, for scripts that need no Blender. None: an executable in `blend_path`,
            else the bpy module of the running interpreter (it needs no display), else an executable on the PATH.
        env: further environment variables, for all instances or as one dict for each.
        progress: tell on standard error what is going on.
        restart: 'never'; 'on-failure': start an instance again that ended with an exit code other than 0, or by a signal;
            'always': also one whose script is done.
        max_restarts: failures in a row after which an instance is given up. The pause before a restart grows from 0.5 s to at
            most 30 s. An instance that ran for a minute, or ended with 0 after it published something, begins anew.
        recycle_after: for a Blender that grows: when an instance has published so many messages on one socket, it is ended
            between two of them and started again, whatever `restart` says. Its script sees SystemExit.
        stall_timeout: kill an instance, as one that failed, that for so many seconds has neither published a message, nor waited
            for room, or for a message of its trainer: a render that hangs, a stopped process. More than its start and its first
            frame take.
        allow_unauthenticated: let everybody who can reach the instances read from them, without keys: on loopback, all users of
            this host.
        log_dir: write what the instances print to a folder of this launch's own in this one, and leave it there. None: logs go
            with the launch; where an instance fails, the end of its log is kept in the user's cache folder
            (``~/.cache/blendtorch-shm/logs``, the last five launches), and the error says where.
        max_log_mb: of what an instance prints, its log holds so many megabytes (of 10^6 bytes) at most, about: the last ones.
            None: all.
        follow: show on standard error what the instances print; with several, after the instance's number, as in ``[1] ...``.

    Raises:
        ConfigurationError: an argument that cannot work.
        SceneNotFound, ScriptNotFound: the file does not exist.
        BlenderNotFound: on entry: there is nothing to run an instance with.
        PortInUse: on entry: somebody else has a port that was asked for.
        OutOfDescriptors: on entry: this process has too many files open.
        LaunchError: on entry: anything else that keeps an instance from starting.
    """

    def __init__(
        self,
        scene: StrPath | None,
        script: StrPath,
        num_instances: int = 1,
        named_sockets: Sequence[str] | None = None,
        start_port: int = DEFAULT_START_PORT,
        bind_addr: str = "127.0.0.1",
        instance_args: Sequence[Sequence[object]] | None = None,
        proto: str = "tcp",
        blend_path: Paths | None = None,
        seed: int | None = None,
        background: bool = False,
        *,
        blender: StrPath | None = None,
        env: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        progress: bool = True,
        restart: Restart = "never",
        max_restarts: int = 5,
        recycle_after: int | None = None,
        stall_timeout: float | None = None,
        allow_unauthenticated: bool = False,
        log_dir: StrPath | None = None,
        max_log_mb: float | None = 20,
        follow: bool = False,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        self.config = LaunchConfig.from_arguments(arguments)
        """The arguments, checked, and the seed that was drawn where none was given."""
        self._launch_info: LaunchInfo | None = None
        self._directory: LaunchDirectory | None = None
        self._supervisor: Supervisor | None = None
        self._ports: PortReservations | None = None
        self._display: VirtualDisplay | None = None
        self._cleanup = contextlib.ExitStack()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """blendtorch's launcher has its arguments as attributes, ``launcher.seed``; ours has them in `config`."""
            if name in LaunchConfig.__struct_fields__:
                return getattr(self.config, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        config = self.config
        sockets = f", {', '.join(config.named_sockets)}" if config.named_sockets else ""
        states = collections.Counter(report.state for report in self.reports())
        state = ", ".join(f"{count} {state}" for state, count in states.items()) or "not launched"
        return f"<BlenderLauncher of {config.num_instances} x {config.script}{sockets}: {state}>"

    @property
    def launch_info(self) -> LaunchInfo:
        """Addresses, commands and processes of the instances.

        Raises:
            LaunchError: nothing was launched yet.
        """
        if self._launch_info is None:
            raise LaunchError(
                "Nothing is launched yet. Use the launcher in a with statement: with BlenderLauncher(...) as bl:"
            )
        return self._launch_info

    @property
    def processes(self) -> Sequence[subprocess.Popen[bytes]] | None:
        """The current process of each instance, or its last one; None before a launch."""
        return None if self._supervisor is None else self._supervisor.processes

    def __enter__(self) -> BlenderLauncher:
        if self in _running:
            raise LaunchError(
                "This launcher is already running. For more instances use num_instances, or a second launcher."
            )
        try:
            self._at_last(_forget, self)
            _remember(self)
            per_instance = 2 * (len(self.config.named_sockets) + 1)
            descriptors.require(_DESCRIPTORS + per_instance * self.config.num_instances, "launching")
            self._launch()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, BlendtorchError):
                raise LaunchError(f"Cannot launch: {error}.") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None and issubclass(kind, (InstanceDied, StreamTimeout)):
                self._keep_logs()
        finally:
            self.close()

    def assert_alive(self) -> None:
        """Do nothing if all instances run, or are about to be started again.

        Raises:
            InstanceDied: some do not. The message holds exit codes and the ends of their logs.
        """
        dead = [] if self._supervisor is None else self._supervisor.dead()
        if dead:
            raise InstanceDied("\n".join(instance.obituary for instance in dead))

    def reports(self) -> list[InstanceReport]:
        """What is known about each instance, in the order of their numbers. Empty before a launch and after it."""
        return [] if self._directory is None else instance_reports(self._directory.path)

    def stats(self) -> dict[str, list[StreamStats]]:
        """The counters of each socket of each instance, read without disturbing anybody: name -> in the order of ``btid``."""
        return {name: stats(addresses) for name, addresses in self.launch_info.addresses.items()}

    def wait(self) -> list[int]:
        """Wait until all instances have ended by themselves, and are not started again.

        Returns:
            their last exit codes, negative for a signal.
        """
        if self._supervisor is None:
            return []
        self._supervisor.wait()
        return [instance.exit_code or 0 for instance in self._supervisor.instances]

    def close(self) -> None:
        """End all instances and remove what they leave. In any process but the one that launched them, do nothing."""
        if self in _running:
            try:
                self._cleanup.close()  # each step is taken whatever becomes of the others
            finally:
                self._cleanup.close()  # and those between which an interrupt came

    # -- on entry -----------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        config = self.config
        runtime = find_runtime(config.blender, config.blend_path)
        if config.scene and runtime.kind == "python":
            raise ConfigurationError(f"scene={config.scene!r} needs Blender. With blender='python', pass scene=''.")
        sweep_and_warn()
        directory = LaunchDirectory()
        self._at_last(directory.remove)  # register the clean-up before creating anything: Ctrl-C may come at any point
        self._directory = directory.create()
        folders = partial(
            package_folders, runtime, directory.path, self._tell
        )  # they may be removed: asked for at each start
        folders()
        bound, addresses = self._addresses(directory)
        logs = Logs(directory, config, _print)
        logs.create()
        self._tell(
            f"starting {config.num_instances} instance{'s' if config.num_instances > 1 else ''} with {runtime}, "
            f"logs in {logs.folder}"
        )
        self._at_last(self._stop_display)
        self._supervisor = Supervisor(directory, logs, self._tell, config)
        self._at_last(self._supervisor.stop)
        self._supervisor.begin()
        variables = {**os.environ, LAUNCH_VARIABLE: directory.launch, "PYTHONUNBUFFERED": "1"}
        variables[RECYCLE_VARIABLE] = str(config.recycle_after or 0)
        background = config.background or runtime.kind != "executable"
        if not background and not (variables.get("DISPLAY") or variables.get("WAYLAND_DISPLAY")):
            if runtime.version >= _HEADLESS_SINCE:
                background = True
            else:
                variables["DISPLAY"] = self._supervisor.call(
                    partial(self._start_display, f"{directory.path}/display.log")
                )
        instances = [
            Instance(
                btid,
                partial(self._command, runtime, background, folders, bound, btid),
                environment(
                    runtime.kind,
                    {
                        **variables,
                        ENVIRONMENT_VARIABLE: json.dumps(describe(column[btid] for column in bound.values())),
                        INSTANCE_VARIABLE: instance_path(directory.path, btid),
                        **config.variables_of(btid),
                    },
                ),
                [directory.twin(name, btid) for name in config.named_sockets],
            )
            for btid in range(config.num_instances)
        ]
        self._supervisor.start(instances)
        processes = self._supervisor.processes  # a restart puts its own in
        self._launch_info = LaunchInfo(addresses, [shlex.join(i.command(0)) for i in instances], processes)

    def _addresses(self, directory: LaunchDirectory) -> tuple[dict[str, list[Address]], dict[str, list[Address]]]:
        """An address for each socket of each instance, with its shared-memory twin: as it is bound, and as readers know it."""
        config = self.config
        host = _numeric_address(config.bind_addr)
        public_host = get_primary_ip() if host == _EVERYWHERE else host
        self._ports = PortReservations(host)
        self._at_last(self._ports.close)
        self._ports.sign(directory.launch)
        count = len(config.named_sockets) * config.num_instances
        ports = iter(self._ports.reserve(count, config.start_port))
        server_keys, client_keys = None, None
        is_local = is_loopback(f"tcp://{host}:0")
        is_open = config.allow_unauthenticated
        if is_local and config.bind_addr not in (host, "localhost"):
            self._tell(
                f"bind_addr {config.bind_addr!r} is {host} here, which no other host can reach; "
                f"'primaryip' is what they can"
            )
        if is_open:
            self._tell(
                f"WARNING: everybody who can reach {public_host} can read from these instances: connections are not "
                f"authenticated."
            )
        else:
            server_keys, client_keys = make_keys()
        bound: dict[str, list[Address]] = {}
        public: dict[str, list[Address]] = {}
        for name in config.named_sockets:
            bound[name], public[name] = [], []
            for btid in range(config.num_instances):
                port, twin = next(ports), directory.twin(name, btid)
                bound[name].append(Address(f"tcp://{host}:{port}", twin, server_keys, is_open))
                public[name].append(Address(f"tcp://{public_host}:{port}", twin, client_keys))
        typed = [address for column in public.values() for address in column]
        if host == _EVERYWHERE:
            loopback = (f"tcp://127.0.0.1:{address.rpartition(':')[2]}" for address in typed)
            typed += [Address(e, a.twin, a.keys) for e, a in zip(loopback, typed, strict=True)]
        directory.tell_readers(typed)
        return bound, public

    def _command(
        self,
        runtime: Runtime,
        background: bool,
        folders: Callable[[], list[str]],
        addresses: dict[str, list[Address]],
        btid: int,
        restarts: int,
    ) -> list[str]:
        """The command line of an instance. It also works when copied to a shell, then over TCP alone."""
        config = self.config
        bootstrap = os.path.join(OUR_FOLDER, "blender_side", "bootstrap.py")
        own = ["--script", config.script, "--packages", os.pathsep.join(folders())]
        own += ["--scene", config.scene or ""] if runtime.kind != "python" else []
        if runtime.kind == "executable":
            command = [runtime.path, *(["--background"] if background else []), "-noaudio", "--enable-autoexec"]
            command += [*([config.scene] if config.scene else []), "--python", bootstrap]
        else:
            command = [runtime.path, "-u", bootstrap]
        sockets = [f"{name}={column[btid]}" for name, column in addresses.items()]
        # -btsockets comes first: it takes all that follows up to the next option.
        script_args = ["-btsockets", *sockets] if sockets else []
        script_args += ["-btid", str(btid), "-btseed", str(config.seed_of(btid, restarts))]
        return [*command, "--", *own, "--", *script_args, *config.arguments_of(btid)]

    def _at_last(self, step: Callable[..., None], *args: Any) -> None:
        """Register a step of the end, twice, for Ctrl-C may cut the first call short. To repeat it must do no harm."""
        for _ in range(2):
            self._cleanup.callback(step, *args)

    def _tell(self, news: str) -> None:
        if self.config.progress:
            _print(f"blendtorch: {news}")

    def _keep_logs(self) -> None:
        """Something failed that may have its reason in the logs: let them outlive the launch."""
        if self in _running and self._supervisor is not None:
            first, *others = self._supervisor.call(self._supervisor.keep_logs) or [""]
            self._tell(f"what the instances printed: {first}{f' and {len(others)} more beside it' if others else ''}")

    def _start_display(self, log_path: str) -> str:
        """In the supervisor's thread: start an X server, and return its name."""
        self._display = VirtualDisplay.start(log_path)
        return self._display.name

    def _stop_display(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def _forget_in_child(self) -> None:
        """In a forked child: nothing of this is ours, but the copies of the descriptors would keep the ports."""
        if self._ports is not None:
            self._ports.close()
        self._cleanup.pop_all()


# -- the end of this process ----------------------------------------------------------------------------------------

_running: list[BlenderLauncher] = []
"""The launchers of this process that must be closed, oldest first."""


_ENDING = signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
"""Signals that would end this process without cleaning up. What handles or ignores them already (nohup does) is left alone."""


def _remember(launcher: BlenderLauncher) -> None:
    _running.append(launcher)
    if len(_running) == 1:
        _replace_handlers(signal.SIG_DFL, _on_signal)


def _forget(launcher: BlenderLauncher) -> None:
    if launcher in _running:  # an interrupt may have come first
        _running.remove(launcher)
    if not _running:
        _replace_handlers(_on_signal, signal.SIG_DFL)


def _replace_handlers(old: object, new: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    with contextlib.suppress(
        ValueError
    ):  # not the main thread; then the kernel ends the instances, and the next launch sweeps
        for number in _ENDING:
            if signal.getsignal(number) == old:
                signal.signal(number, new)


def _print(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed; no reason to end a launch
        print(line, file=sys.stderr, flush=True)


def _on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@atexit.register
def _close_all() -> None:
    for launcher in reversed(_running[:]):
        launcher.close()


def _in_forked_child() -> None:
    """A forked child, such as a DataLoader worker, launched nothing: it neither ends instances nor keeps their ports."""
    for launcher in _running:
        launcher._forget_in_child()
    _running.clear()
    _replace_handlers(_on_signal, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_forked_child)


def _numeric_address(bind_addr: str) -> str:
    """`bind_addr` as an IPv4 address, which is what ZeroMQ can bind."""
    if bind_addr == "primaryip":
        return get_primary_ip()
    if bind_addr == "*":
        return _EVERYWHERE
    try:
        return str(ipaddress.IPv4Address(bind_addr))
    except ValueError:
        pass
    try:
        return socket.gethostbyname(bind_addr)
    except (OSError, ValueError, TypeError) as error:  # the latter two: what cannot be a name at all
        raise ConfigurationError(
            f"bind_addr={bind_addr!r} is neither an IPv4 address nor a host name that is known here ({error}). "
            f"'127.0.0.1' is this host alone, 'primaryip' the address of the default route."
        ) from error
