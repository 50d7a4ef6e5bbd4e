"""Finding what can run an instance: a Blender executable, or a Python interpreter with the ``bpy`` module."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blendtorch_shm.errors import BlenderNotFound, LaunchError
from blendtorch_shm.launch.notes import PATH_VARIABLE

__all__ = ["Runtime", "discover_blender", "find_runtime"]

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

DEPENDENCIES = {"numpy": "numpy", "pyzmq": "zmq", "posix_ipc": "posix_ipc", "msgspec": "msgspec"}
"""What the instance's side needs: name on the package index -> name to import."""

_BPY_FOR_PYTHON = {(3, 13): "5.2.*", (3, 11): "5.0.*", (3, 10): "3.6.*"}
"""A bpy version for each Python: a release of bpy fits exactly one."""
_PROBE_TIMEOUT_S = 120.0
_MARK = "BLENDTORCH-PROBE "
_PROBE = f"""
import json, sys
from importlib.util import find_spec
try: import bpy
except ImportError: bpy = None
missing = [name for name, module in {DEPENDENCIES!r}.items() if find_spec(module) is None]
print({_MARK!r} + json.dumps(dict(version=bpy and list(bpy.app.version), python=list(sys.version_info[:2]), missing=missing)))
"""


@dataclass(frozen=True)
class Runtime:
    """Something that can run an instance.

    Args:
        kind: ``executable`` of Blender, Python interpreter with the bpy ``module``, or plain ``python``.
        path: what to run.
        version: of Blender; ``()`` without one.
        python: version of its Python, major and minor.
        missing: the packages that its Python lacks, by their names on the package index.
    """

    kind: Literal["executable", "module", "python"]
    path: str
    version: tuple[int, ...]
    python: tuple[int, int]
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        blender = ".".join(map(str, self.version))
        python = "Python " + ".".join(map(str, self.python))
        return {
            "executable": f"Blender {blender} ({self.path}, {python})",
            "module": f"the bpy module {blender} ({self.path}, {python})",
            "python": f"{python} without Blender ({self.path})",
        }[self.kind]


def discover_blender(additional_blender_paths: Paths | None = None) -> dict[str, Any] | None:
    """The first Blender executable in the given directories and then on the PATH.

    Args:
        additional_blender_paths: directories to search first: a path, several joined by ``:``, or a list of paths.

    Returns:
        ``{'path': Path, 'major': int, 'minor': int, 'patch': int, 'python': (int, int)}``, or None if there is none that runs.
    """
    path = _which(_directories(additional_blender_paths))
    if path is None:
        return None
    try:
        runtime = _probe_executable(path)
    except LaunchError:
        return None
    major, minor, patch = runtime.version
    return {"path": Path(path), "major": major, "minor": minor, "patch": patch, "python": runtime.python}


def find_runtime(blender: str | os.PathLike[str] | None, blend_path: Paths | None) -> Runtime:
    """Decide what runs the instances.

    Args:
        blender: a Blender executable, a Python interpreter that has bpy, or ``"python"`` for the running interpreter. None, in
            this order: an executable in `blend_path`, the bpy module of the running interpreter, which needs no
            display, an executable on the PATH.
        blend_path: directories to search for an executable.

    Raises:
        BlenderNotFound: there is none; the message says where was looked and what to do.
        LaunchError: what there is does not run.
    """
    if blender is not None:
        return _named_runtime(os.fspath(blender))
    directories = _directories(blend_path)
    for directory in directories:
        path = _which([directory], environment=False)
        if path is not None:
            return _probe_executable(path)
    if importlib.util.find_spec("bpy") is not None:
        return _this_interpreter("module")
    path = _which([])
    if path is not None:
        return _probe_executable(path)
    searched = "".join(f", {directory}" for directory in directories)
    raise BlenderNotFound(
        f"No Blender found: no bpy module in {sys.executable}, no 'blender' on the PATH{searched}. Do one of these: "
        f"{_install_bpy(sys.executable, sys.version_info[:2])}; apt-get install -y blender xvfb; "
        f"or name an executable, or a Python that has bpy, with blender='/path/to/it'."
    )


def environment(
    kind: Literal["executable", "module", "python"], variables: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment for a program of that kind: `variables`, but for a Blender executable's Python.

    PYTHONHOME is meant for this Python alone. PYTHONPATH is for the script, which finds it behind Blender's own modules
    (see `bootstrap`): before them, this Python's NumPy could replace Blender's.

    It must be passed on explicitly, since a bpy imported into this process changes C's environment, and not Python's.
    """
    passed_on = dict(variables)
    if kind == "executable":
        passed_on.pop("PYTHONHOME", None)
        passed_on[PATH_VARIABLE] = passed_on.pop("PYTHONPATH", "")
    return passed_on


def _named_runtime(blender: str) -> Runtime:
    if blender == "python":
        return _this_interpreter("python")
    path = shutil.which(os.path.expanduser(blender))
    if path is None and os.path.isdir(blender):
        path = _which([blender], environment=False)
    if path is None:
        exists = "is not an executable file" if os.path.exists(blender) else "does not exist"
        if os.path.basename(blender) == blender:
            exists = "is not on the PATH"
        raise BlenderNotFound(
            f"blender={blender!r} {exists}. It can be a Blender executable, a Python interpreter that has the bpy module, "
            f"or 'python'."
        )
    path = os.path.abspath(path)  # not realpath: the interpreter of a virtual environment is a link
    if not re.fullmatch(r"python[0-9.]*", os.path.basename(path)):
        return _probe_executable(path)
    if os.path.samefile(path, sys.executable) and os.path.dirname(path) == os.path.dirname(sys.executable):
        if importlib.util.find_spec("bpy") is None:
            raise BlenderNotFound(f"{path} has no bpy module. {_install_bpy(path, sys.version_info[:2])}")
        return _this_interpreter("module")
    runtime = _probe(path, os.stat(path).st_mtime_ns, "module")
    if not runtime.version:
        raise BlenderNotFound(f"{path} has no bpy module. {_install_bpy(path, runtime.python)}")
    return runtime


def _this_interpreter(kind: Literal["module", "python"]) -> Runtime:
    version: tuple[int, ...] = ()
    if kind == "module":
        try:
            version = tuple(int(number) for number in re.findall(r"\d+", importlib.metadata.version("bpy"))[:3])
        except importlib.metadata.PackageNotFoundError:
            pass  # a bpy that was built here, not installed
    return Runtime(kind, sys.executable, version, sys.version_info[:2])


def _probe_executable(path: str) -> Runtime:
    return _probe(path, os.stat(path).st_mtime_ns, "executable")


@functools.cache
def _probe(path: str, mtime_ns: int, kind: Literal["executable", "module"]) -> Runtime:
    """Run the program once, and have it tell what it is. `mtime_ns` is there to ask again when the file has changed."""
    command = [path, "-c", _PROBE]
    if kind == "executable":
        command = [path, "--background", "--factory-startup", "--python-exit-code", "1", "--python-expr", _PROBE]
    try:
        done = subprocess.run(
            command,
            env=environment(kind),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{path} did not start within {_PROBE_TIMEOUT_S:.0f} s. Try: {path} --version") from error
    except OSError as error:
        raise LaunchError(f"{path} cannot be run: {error.strerror}.") from error
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            answer = json.loads(line.removeprefix(_MARK))
            major, minor = answer["python"]
            return Runtime(kind, path, tuple(answer["version"] or ()), (major, minor), tuple(answer["missing"]))
    output = (done.stdout + done.stderr).strip()[-500:]
    raise LaunchError(
        f"{path} does not run (exit code {done.returncode}). It should be a Blender executable. It printed: {output}"
    )


def _which(directories: list[str], environment: bool = True) -> str | None:
    """The first 'blender' in the directories, and then on the PATH if `environment`."""
    search = [*directories, *([os.environ.get("PATH", os.defpath)] if environment else [])]
    path = shutil.which("blender", path=os.pathsep.join(search))
    return None if path is None else os.path.abspath(path)


def _directories(paths: Paths | None) -> list[str]:
    if paths is None:
        return []
    if isinstance(paths, (str, os.PathLike)):
        paths = os.fspath(paths).split(os.pathsep)
    return [os.path.expanduser(os.fspath(path)) for path in paths]


def _install_bpy(interpreter: str, python: tuple[int, int]) -> str:
    version = _BPY_FOR_PYTHON.get(python)
    if version is None:
        supported = ", ".join(f"{major}.{minor}" for major, minor in _BPY_FOR_PYTHON)
        return f"use a Python that bpy exists for ({supported})"
    return f"{interpreter} -m pip install 'bpy=={version}'"
