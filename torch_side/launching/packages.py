"""The packages that an instance needs, put where its Python finds them: nobody has to install anything into Blender.

Where the Python of the instance has the launcher's version, it uses the launcher's own. Otherwise what it lacks is
downloaded once into a folder of this user. Both come last on its path, so that the packages that Blender brings along win.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import blendtorch_shm
from blendtorch_shm.errors import LaunchError

from ..finder import DEPENDENCIES, Runtime
from .logs import cache_folder

_OURS = ("blendtorch", "blendtorch_shm", "blender_side")
OUR_FOLDER = str(Path(blendtorch_shm.__file__).parent.parent)
"""Where our packages are; the Blender side must not be imported here, since that imports bpy."""
_LAST_PYTHON_WITH_OLD_NUMPY = (3, 11)
"""Blender's own modules are built against numpy 1 up to this Python, and do not import with numpy 2 (3.4: ``aud``)."""
_TIMEOUT_S = 600.0


def package_folders(runtime: Runtime, launch_directory: str, tell: Callable[[str], None]) -> list[str]:
    """Folders for the end of the instance's path.

    Args:
        runtime: what runs the instances.
        launch_directory: where links to our packages may be placed.
        tell: called with a line of news when something has to be downloaded.

    Raises:
        LaunchError: packages are missing and cannot be downloaded.
    """
    same_python = runtime.python == sys.version_info[:2]
    folders = [OUR_FOLDER]
    if not same_python and any(Path(OUR_FOLDER, module).exists() for module in DEPENDENCIES.values()):
        folders = [_links(launch_directory)]  # the other packages there are for another Python
    if runtime.missing and same_python:
        folders += [folder for folder in map(_home_of, runtime.missing) if folder is not None]
    elif runtime.missing:
        folders.append(_downloaded(runtime, tell))
    return list(dict.fromkeys(folders))


def _links(launch_directory: str) -> str:
    folder = Path(launch_directory, "packages")
    folder.mkdir(exist_ok=True)
    for name in _OURS:
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(Path(OUR_FOLDER, name))
    return str(folder)


def _home_of(package: str) -> str | None:
    """The folder from which this interpreter imports a package."""
    spec = importlib.util.find_spec(DEPENDENCIES[package])
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    return str(origin.parent.parent if spec.submodule_search_locations else origin.parent)


def _downloaded(runtime: Runtime, tell: Callable[[str], None]) -> str:
    python = ".".join(map(str, runtime.python))
    requirements = sorted(runtime.missing)
    if "numpy" in requirements and runtime.python <= _LAST_PYTHON_WITH_OLD_NUMPY:
        requirements[requirements.index("numpy")] = "numpy<2"
    cache = cache_folder()
    folder = cache / "-".join([f"python{python}", *sorted(runtime.missing)])
    if folder.is_dir():
        return str(folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another launch may be at it
            if not folder.is_dir():
                tell(f"downloading {', '.join(requirements)} for Python {python} into {folder} (once)")
                _download(requirements, python, folder)
    except OSError as error:
        raise LaunchError(f"Cannot keep packages for {runtime} in {cache}: {error}. Set XDG_CACHE_HOME.") from error
    return str(folder)


def _download(requirements: list[str], python: str, folder: Path) -> None:
    """Install into a new folder that appears complete or not at all."""
    what = ["--target", str(folder), "--python-version", python, "--only-binary=:all:", "--no-deps", *requirements]
    uv = shutil.which("uv", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    if importlib.util.find_spec("pip") is not None:
        installer = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    elif uv is not None:
        installer = [uv, "pip", "install", "--quiet", "--python", sys.executable]
    else:
        raise LaunchError(
            f"The instances' Python {python} lacks {', '.join(requirements)}, and {sys.executable} has neither pip nor uv to "
            f"download them. Run, with any pip: pip install {shlex.join(what)}"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        new = Path(scratch, "packages")
        what[1] = str(new)
        try:
            done = subprocess.run(
                [*installer, *what], capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S
            )
            # Where this program ignores SIGCHLD, the exit code is 0 whatever happened.
            absent = [name for name in requirements if not any(new.glob(f"{DEPENDENCIES[name.partition('<')[0]]}*"))]
            problem = (
                done.stderr.strip()[-500:] or f"{', '.join(absent)} not installed" if done.returncode or absent else ""
            )
        except subprocess.TimeoutExpired:
            problem = f"no end after {_TIMEOUT_S:.0f} s"
        if problem:
            what[1] = str(folder)
            raise LaunchError(
                f"The instances' Python {python} lacks {', '.join(requirements)}, and downloading them failed: {problem}\n"
                f"When the network is there, run: {shlex.join([*installer, *what])}"
            )
        new.rename(folder)
