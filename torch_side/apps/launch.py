"""``blendtorch-launch``: run Blender instances for readers on this or another host, until they end or are ended.

The program is one BlenderLauncher around a wait. What is particular to it: a JSON file in place of a call, and signals that
end it in good order.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from blendtorch_shm.errors import BlendtorchError, ConfigurationError, LaunchError, SceneNotFound, ScriptNotFound
from blendtorch_shm.launch.notes import InstanceReport

from ..launch_info import LaunchInfo
from ..launcher import BlenderLauncher
from ..launching.config import LaunchConfig
from ..launching.instance import describe_exit

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["main"]

_WRONG_USE = 2
"""Exit code, the same that argparse has, for a program that was not started as it must be."""
_EXAMPLE = """\
{
    "scene": "cube.blend",
    "script": "cube.blend.py",
    "num_instances": 2,
    "named_sockets": ["DATA"],
    "bind_addr": "primaryip"
}"""
_REFRESH_PER_S = 4
_COLORS = {"starting": "yellow", "running": "green", "restarting": "yellow", "exited": "dim", "failed": "red"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Afterwards the process ignores the signals that would have ended it, since it is about to exit.

    Args:
        argv: the arguments of the command line. None: those of this process.

    Returns:
        the exit code: 0 if all instances ended well or the program was asked to end, 1 if an instance failed or could not be
        launched, 2 if an argument cannot work, in the file or on the command line.
    """
    try:
        _await_signals()
        args = _parser().parse_args(argv)
        try:
            config = _read_config(args.arguments)
            if args.follow:
                config = msgspec.structs.replace(config, follow=True)
            return _launch(config, _writable(args.out_launch_info, args.arguments))
        except ConfigurationError as error:
            _say(str(error))
            return _WRONG_USE
        except (SceneNotFound, ScriptNotFound) as error:
            _say(f"{error} A relative path is looked for in the working directory, then beside {args.arguments}.")
            return 1
        except BlendtorchError as error:
            _say(str(error))
            return 1
    except _AskedToEnd as asked:
        _say(f"ended on {asked.signal}, with all instances.")
        return 0
    finally:
        _disregard_signals()


def _launch(config: LaunchConfig, out: str) -> int:
    """Launch, write the launch information to `out`, wait for the instances, and return the exit code.

    Raises:
        BlendtorchError: the arguments, the system or the disk do not allow it.
    """
    with BlenderLauncher(**msgspec.structs.asdict(config)) as launcher, _written(out, launcher.launch_info):
        if launcher.config.progress:
            _say(f"the launch information is in {out}; Ctrl-C ends the instances")
        codes = _wait(launcher)
    failed = [f"instance {btid} failed: {describe_exit(code)}" for btid, code in enumerate(codes) if code]
    if failed:
        _say(f"{'; '.join(failed)}.")
    return 1 if failed else 0


@contextlib.contextmanager
def _written(path: str, launch_info: LaunchInfo) -> Iterator[None]:
    """Have the launch information in a file for as long as the block lasts. What others put in its place meanwhile stays.

    Raises:
        LaunchError: it cannot be written.
    """
    ours = None
    try:
        with _signals_held():
            try:
                LaunchInfo.save_json(path, launch_info)
            except OSError as error:
                raise LaunchError(f"Cannot write the launch information {path}: {error.strerror}.") from error
            ours = _identity(path)
        yield
    finally:
        if ours is not None and _identity(path) == ours:
            with contextlib.suppress(OSError):  # the folder may be read-only by now
                os.unlink(path)


def _identity(path: str) -> tuple[int, int, int] | None:
    """Which file has this path now, and since when it has its contents."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal is gone; no reason to end otherwise than asked
        print(f"blendtorch: {message}", file=sys.stderr, flush=True)


# -- the command line -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    width = max(60, min(shutil.get_terminal_size().columns, 120) - 2)
    documented = inspect.getdoc(BlenderLauncher) or ""
    arguments = textwrap.dedent(documented.partition("Args:\n")[2].partition("\n\nRaises:")[0])
    paragraphs = [
        textwrap.fill(" ".join(paragraph.split()), width, initial_indent="  ", subsequent_indent="      ")
        for paragraph in re.split(r"\n(?=\S)", arguments)
    ]
    parser = argparse.ArgumentParser(
        prog="blendtorch-launch",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.fill(
            "Run Blender instances, and write down how to reach them: on this or another host, LaunchInfo.load_json reads "
            "that file, and RemoteIterableDataset the addresses in it. The program ends with its instances; SIGINT (Ctrl-C), "
            "SIGTERM, SIGHUP and SIGQUIT end both.",
            width,
        ),
        epilog=f"The arguments of BlenderLauncher, as JSON:\n\n{textwrap.indent(_EXAMPLE, '  ')}\n\n"
        f"These are all (null stands for None):\n\n" + "\n".join(paragraphs),
    )
    parser.add_argument(
        "arguments", metavar="launch.json", help="file with the arguments of BlenderLauncher, a JSON object"
    )
    parser.add_argument(
        "--out-launch-info",
        metavar="FILE",
        default="launch_info.json",
        help="where to write the launch information, readable by this user only; the file goes when the program ends "
        "(default: %(default)s)",
    )
    parser.add_argument("--follow", action="store_true", help="show what the instances print")
    return parser


def _writable(path: str, other: str) -> str:
    """The file to write when `path` was asked for.

    Raises:
        ConfigurationError: it cannot be written, or is `other`, the file of arguments.
    """
    file = os.path.realpath(path)  # what a link points to is replaced, not the link
    if os.path.exists(file) and (not os.path.isfile(file) or os.path.samefile(file, other)):
        what = "the file of arguments" if os.path.isfile(file) else "not a file"
        raise ConfigurationError(f"Cannot write the launch information to {path}: this is {what}. Choose another name.")
    try:
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(file)):
            pass  # to try is the only way to know: permission bits mean little to root, and on a full or read-only disk
    except OSError as error:
        raise ConfigurationError(
            f"Cannot write the launch information to {path}: {error.strerror} ({os.path.dirname(file)}). Nothing was "
            f"launched. Make the folder, or choose another one with --out-launch-info."
        ) from error
    return file


# -- the file of arguments ------------------------------------------------------------------------------------------


def _read_config(path: str) -> LaunchConfig:
    """Read the arguments of BlenderLauncher, and check them.

    Raises:
        ConfigurationError: the file cannot be read, or does not hold such arguments. All that is wrong is told at once.
        SceneNotFound, ScriptNotFound: what they name does not exist.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except OSError as error:
        raise ConfigurationError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        found = {list: "an array", str: "a string", type(None): "null"}.get(type(content), "a number or a truth value")
        raise ConfigurationError(
            f"{path} holds {found}. It must hold an object with the arguments of BlenderLauncher:\n{_EXAMPLE}"
        )
    for key in ("scene", "script"):
        if isinstance(content.get(key), str):
            content[key] = _here_or_beside(content[key], os.path.dirname(path))
    try:
        return LaunchConfig.from_arguments(content, functools.partial(json.dumps, ensure_ascii=False))
    except ConfigurationError as error:
        first, *others = str(error).splitlines()
        raise ConfigurationError(
            "\n    ".join([f"{path}:", first, *others] if others else [f"{path}: {first}"])
        ) from error


def _here_or_beside(path: str, folder: str) -> str:
    """`path`, or what it is from `folder` if there is no such file from the working directory but there."""
    if not path or os.path.exists(os.path.expanduser(path)):
        return path
    beside = os.path.join(folder, path)
    return beside if os.path.exists(beside) else path


# -- waiting --------------------------------------------------------------------------------------------------------


def _wait(launcher: BlenderLauncher) -> list[int]:
    """Wait until all instances have ended, on a terminal with a line about each, and return their exit codes."""
    if not (launcher.config.progress and sys.stderr.isatty()):
        return launcher.wait()
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        _say("install rich to see a line about each instance here: pip install 'blendtorch-shm[launch]'")
        return launcher.wait()
    console = Console(stderr=True)
    if not console.is_interactive:
        return launcher.wait()
    # The news of other threads go to sys.stderr, which Live replaces: they appear above the lines.
    lines = _Lines(launcher)
    live = Live(get_renderable=lines.draw, console=console, refresh_per_second=_REFRESH_PER_S, transient=True)
    try:
        with _signals_held():  # rich, interrupted while it draws its first lines, would draw them again below
            live.start(refresh=True)
        codes = launcher.wait()
        live.transient = False  # the last lines stay, unless a signal comes: then they would tell of instances that run
        return codes
    finally:
        with contextlib.suppress(OSError):  # the terminal is gone
            live.stop()


class _Lines:
    """A line about each instance: what it does, since when, with what."""

    def __init__(self, launcher: BlenderLauncher) -> None:
        self._launcher = launcher
        # Number of the instance and of its restart -> when it was first seen so.
        self._began: dict[tuple[int, int], float] = {}
        self._ended: dict[tuple[int, int], float] = {}

    def draw(self) -> Group:
        """The lines as they are now."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
        table.add_column("instance", justify="right")
        table.add_column("state", min_width=max(map(len, _COLORS)))
        table.add_column("age", justify="right")
        table.add_column("renderer", no_wrap=True)
        table.add_column("last exit")
        for report in self._launcher.reports():
            state = "failed" if report.state == "exited" and report.exit_code else report.state
            last_exit = "" if report.exit_code is None else describe_exit(report.exit_code).partition(",")[0]
            if report.restarts:
                last_exit += f", restarted {report.restarts} time{'s' if report.restarts > 1 else ''}"
            renderer = Text(report.renderer or "-")  # not a str, in which brackets would be markup
            table.add_row(str(report.btid), Text(state, _COLORS[state]), self._age(report), renderer, last_exit)
        return Group(table, "")  # the cursor rests on an empty line, where the terminal's ^C does no harm

    def _age(self, report: InstanceReport) -> str:
        start, now = (report.btid, report.restarts), time.monotonic()
        end = self._ended.setdefault(start, now) if report.state in ("restarting", "exited") else now
        seconds = int(end - self._began.setdefault(start, now))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


# -- signals --------------------------------------------------------------------------------------------------------


class _AskedToEnd(SystemExit):
    """A signal asked this program to end. Where nobody notices it any more, the program ends without a traceback."""

    def __init__(self, number: int) -> None:
        super().__init__(0)
        self.signal = signal.Signals(number).name


def _await_signals() -> None:
    """From now on, let the first signal that asks this program to end raise _AskedToEnd, and disregard further ones.

    Ending takes a few seconds at most whatever the instances do, and a second Ctrl-C would leave half of it undone.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        _disregard_signals()
        raise _AskedToEnd(number)

    _handle(on_signal)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let a signal that comes meanwhile raise its _AskedToEnd at the end of the block."""
    held: list[int] = []
    _handle(lambda number, frame: held.append(number))
    try:
        yield
    finally:
        _await_signals()
    if held:
        signal.raise_signal(held[0])


def _disregard_signals() -> None:
    _handle(lambda number, frame: None)  # unlike SIG_IGN, this is also fine for a signal that is already on its way


def _handle(handler: Any) -> None:
    # A background job of a shell script inherits SIGINT and SIGQUIT ignored, which is not meant for whoever sends them later;
    # nohup's SIGHUP is.
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
