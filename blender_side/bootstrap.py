"""What an instance runs first: it finds the packages, opens the scene and runs the user's script.

One command line serves every form, with our own options between the first ``--`` and the second::

    blender scene.blend --python bootstrap.py -- --script cube.blend.py --packages DIR:DIR --scene scene.blend -- -btid 0 ...
    python -u bootstrap.py -- --script cube.blend.py --packages DIR:DIR --scene scene.blend -- -btid 0 ...

The script then sees ``sys.argv`` as if it had been started directly. Whatever happens to it, the instance ends: with a
traceback and exit code 1 when it raises, and with 0 when it is done, unless a Blender with a window still plays its animation.

Runs before any package can be found: standard library only, until :func:`main` knows where our packages are.
"""

import sys

if __name__ == "__main__" and "bpy" not in sys.modules and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # python put this folder there, and our signal.py would stand in for the standard library's

import argparse
import atexit
import errno
import faulthandler
import io
import os
import threading
import traceback
import types
from collections import Counter
from importlib import import_module
from typing import Any, Literal, NoReturn


def main() -> None:
    """Run the instance that the command line describes."""
    global _exit_code, _in_blender, _recycle_after
    sys.modules["blender_side.bootstrap"] = sys.modules["__main__"]  # for those who may have to end it
    atexit.register(_skip_blenders_own_exit)  # before anything of the user's, so it runs after that
    sys.stdout, sys.stderr = _Log.over(sys.stdout), _Log.over(sys.stderr)
    options = _take_own_options()
    _append_to_path(options.packages)  # behind everything: Blender's own numpy wins
    from blendtorch_shm.launch.notes import PATH_VARIABLE, RECYCLE_VARIABLE

    if inherited := os.environ.pop(PATH_VARIABLE, ""):
        _append_to_path(inherited)
        os.environ["PYTHONPATH"] = inherited  # for processes that the script starts
    _recycle_after = int(os.environ.pop(RECYCLE_VARIABLE, "0"))  # not for processes that the script starts
    sys.path.insert(0, os.path.dirname(options.script))
    _in_blender = "bpy" in sys.modules
    if not _in_blender:
        faulthandler.enable()  # a crash leaves a trace in the log, as a Blender executable's own handler does
    if options.scene is not None:
        _open(options.scene)
    _say_started()
    before = _Activity()
    code = run_script(options.script)
    if not _in_blender:
        _exit_code = code if "bpy" in sys.modules else None  # bpy 4.2 crashes on its way out
        sys.exit(code)
    import bpy

    # In background too: 3.4 crashes on its own way out, after some imports (multiprocessing.util is one).
    if code != 0 or _recycling or bpy.app.background or not before.goes_on():
        leave(code)


def _append_to_path(folders: str) -> None:
    for folder in folders.split(os.pathsep):
        if folder and folder not in sys.path:
            sys.path.append(os.path.abspath(folder))


class _Log(io.FileIO):
    """A log on a disk that may be full: then lines are lost, which is better than the script."""

    @staticmethod
    def over(stream: Any) -> Any:
        """A text stream that writes where `stream` does."""
        raw = _Log(stream.fileno(), "wb", closefd=False)
        buffer = io.BufferedWriter(raw)
        return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True, write_through=True)

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return len(data)


def _open(scene: str) -> None:
    """Import bpy and open the scene, unless Blender did; then see whether it could, since it goes on without one."""
    import bpy

    if not scene:
        return
    # By the name that users know: what is loaded now calls itself by it from now on.
    scene_file = import_module("blendtorch.btb.scene_file")
    try:
        if _in_blender:
            with bpy.data.libraries.load(scene):
                pass
        else:
            bpy.ops.wm.open_mainfile(filepath=scene, use_scripts=True)
    except (OSError, RuntimeError) as error:
        print(scene_file.why_not_opened(scene, error), file=sys.stderr)
        leave(1)
    if warnings := scene_file.warnings(scene):
        print(*(f"WARNING: {warning}" for warning in warnings), sep="\n", file=sys.stderr)
        _note("warnings", "\n".join(warnings))


def run_script(path: str) -> int:
    """Run the script as ``__main__`` and return the exit code that plain Python would end with."""
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=__builtins__)
    sys.modules["__main__"] = module
    try:
        with open(path, "rb") as file:
            source = file.read()
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        here = error.__traceback__
        return exit_code_of(
            error.with_traceback(here.tb_next if here is not None and here.tb_next is not None else here)
        )
    return 0


def leave(code: int) -> NoReturn:
    """End this process now, with an exit code, also from inside Blender's event loop; Blender's own way out knows none.

    What user code and libraries registered with ``atexit`` runs. What Blender registered before does not: it frees the window
    manager whose event loop may be calling us, and crashes.
    """
    global _exit_code
    _exit_code = code
    atexit._run_exitfuncs()  # the last one is ours
    _skip_blenders_own_exit()
    os._exit(code)


_exit_code: int | None = None


def _skip_blenders_own_exit() -> None:
    if _exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_code)


_in_blender = False
"""Whether this is a Blender executable, with an event loop and a way out of its own."""
_recycle_after = 0
"""Messages on one socket after which this instance ends, to be started afresh; 0: it goes on."""
_published: Counter[str] = Counter()
_recycling = False


def count_published(socket: str) -> None:
    """Note that one more message was published on a socket."""
    _published[socket] += 1


def is_recycling() -> bool:
    """Whether this instance ends in order to be started afresh."""
    return _recycling


def recycle_if_due(socket: str | None = None) -> None:
    """End this instance in good order if it has published what it may, so that the launcher starts it afresh.

    It ends between two messages: by SystemExit where the next one was to be published, so that ``finally`` blocks run, and then
    what is registered with ``atexit``.

    Args:
        socket: the one to be published on: its own messages count, so that others still get what belongs to its last. None: any.
    """
    global _exit_code, _recycle_after, _recycling
    if _recycle_after <= 0:
        return
    count = max(_published.values(), default=0) if socket is None else _published[socket]
    if count < _recycle_after:
        return
    if not _recycling and not _note("recycled", ""):
        _recycle_after = 0  # nobody would start it afresh
        return
    swallowed, _recycling = _recycling, True
    if swallowed or threading.current_thread() is not threading.main_thread():
        leave(0)
    if _in_blender:
        _exit_code = 0  # its event loop takes SystemExit for a reason to exit by itself
    raise SystemExit(0)


def exit_code_of(error: BaseException) -> int:
    """Print what is to be said about the end of a script, and return the exit code that plain Python would end with."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    said = traceback.TracebackException.from_exception(error)
    _leave_out_our_frames(said, error)
    print("".join(said.format()), end="", file=sys.stderr)
    _note("error", _in_one_line(said, error))
    return 1


def _leave_out_our_frames(said: traceback.TracebackException | None, error: BaseException | None) -> None:
    """Of the traceback of `error`, leave out those frames of ours that led to the user's code; and all of ours, if it was raised
    on purpose.
    """
    if said is None or error is None:
        return
    from blendtorch_shm.errors import BlendtorchError

    users = [number for number, frame in enumerate(said.stack) if not _is_in_our_code(frame)]
    last = users[-1] if users else -1
    on_purpose = isinstance(error, (BlendtorchError, SyntaxError))  # the latter when the script is compiled
    said.stack[:] = [
        frame for number, frame in enumerate(said.stack) if number in users or (number > last and not on_purpose)
    ]
    _leave_out_our_frames(said.__cause__, error.__cause__)
    _leave_out_our_frames(said.__context__, error.__context__)


def _is_in_our_code(frame: traceback.FrameSummary) -> bool:
    packages = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.relpath(frame.filename, packages).partition(os.sep)[0] in ("blender_side", "blendtorch_shm")


def _in_one_line(said: traceback.TracebackException, error: BaseException) -> str:
    """An error, and where in the script it was raised: ``NameError: name 'x' is not defined (cube.blend.py:46)``."""
    lines = "".join(said.format_exception_only()).splitlines()
    text = next(line for line in lines if not line.startswith(" "))  # of a SyntaxError, its place comes first
    text = text.removeprefix(f"{type(error).__module__}.")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} ({os.path.basename(error.filename)}:{error.lineno})"
    return f"{text} ({os.path.basename(said.stack[-1].filename)}:{said.stack[-1].lineno})" if said.stack else text


class _Activity:
    """What keeps a Blender with a window busy once the script is over: handlers, timers, playback."""

    def __init__(self) -> None:
        bpy = sys.modules.get("bpy")
        self._num_handlers = 0
        self._num_timers = 0
        if bpy is None or bpy.app.background:
            return
        self._num_handlers = self._count_handlers()
        register = bpy.app.timers.register

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._num_timers += 1
            return register(*args, **kwargs)

        bpy.app.timers.register = counted

    def goes_on(self) -> bool:
        """Whether the script left something that runs on."""
        import bpy

        playing = any(window.screen.is_animation_playing for window in bpy.context.window_manager.windows)
        return playing or self._num_timers > 0 or self._count_handlers() > self._num_handlers

    @staticmethod
    def _count_handlers() -> int:
        """The user's handlers. Ours only take notes: they are no reason to go on."""
        import bpy

        lists = [getattr(bpy.app.handlers, name) for name in dir(bpy.app.handlers)]
        return sum(not is_ours(handler) for each in lists if isinstance(each, list) for handler in each)


_OURS = ("blender_side.", "blendtorch.btb.")
"""What our modules may be called."""


def is_ours(handler: Any) -> bool:
    """Whether a handler in one of Blender's lists is this package's, not the user's."""
    return str(getattr(handler, "__module__", "")).startswith(_OURS)


def _take_own_options() -> argparse.Namespace:
    """Parse our own options and take them out of ``sys.argv``."""
    first = sys.argv.index("--")
    second = sys.argv.index("--", first + 1)
    parser = argparse.ArgumentParser(prog="bootstrap.py", allow_abbrev=False)
    parser.add_argument("--script", required=True)
    parser.add_argument("--scene", help="open this scene; if empty, import bpy and keep its own")
    parser.add_argument("--packages", default="")
    options = parser.parse_args(sys.argv[first + 1 : second])
    before = [options.script if os.path.abspath(a) == os.path.abspath(__file__) else a for a in sys.argv[:first]]
    sys.argv[:] = before + sys.argv[second:]
    return options


def _say_started() -> None:
    """Tell the launcher that the script begins, and which temporary directory Blender made for itself."""
    bpy = sys.modules.get("bpy")
    _note("started", bpy.app.tempdir if bpy is not None else "")


def _note(note: Literal["started", "recycled", "warnings", "error"], text: str) -> bool:
    """Leave a note for the launcher, if there is one; whether that worked."""
    from blendtorch_shm.launch.notes import leave_note

    try:
        return leave_note(note, text)
    except OSError as error:  # the launch is over, or its disk is full
        print(f"Cannot report to the launcher: {error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    main()
