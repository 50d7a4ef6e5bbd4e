"""Packages for instances whose Python is not the launcher's."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from blendtorch_shm.errors import LaunchError
from torch_side.finder import Runtime
from torch_side.launching import packages
from torch_side.launching.packages import package_folders

OTHER_PYTHON = (3, 11) if sys.version_info[:2] != (3, 11) else (3, 13)


def runtime(*missing: str, python: tuple[int, int] = OTHER_PYTHON) -> Runtime:
    return Runtime("executable", "/opt/blender", (4, 2, 0), python, missing)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that consists of one folder, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def add_wheel(index: Path, name: str, version: str = "1.0") -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(index / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def test_an_instance_of_this_python_uses_the_packages_of_this_python(tmp_path: Path) -> None:
    folders = package_folders(runtime("numpy", "posix_ipc", python=sys.version_info[:2]), str(tmp_path), print)
    program = "import sys; sys.path += sys.argv[1:]; import numpy, posix_ipc, blendtorch_shm"
    subprocess.run([sys.executable, "-S", "-E", "-c", program, *folders], check=True)


def test_what_another_python_lacks_is_downloaded_once(index: Path, tmp_path: Path) -> None:
    add_wheel(index, "msgspec")
    told: list[str] = []
    for _ in range(2):
        folders = package_folders(runtime("msgspec"), str(tmp_path), told.append)
        assert Path(folders[-1], "msgspec.py").exists()
    assert len(told) == 1
    assert f"downloading msgspec for Python 3.{OTHER_PYTHON[1]}" in told[0]
    assert not list((tmp_path / "cache" / "blendtorch-shm").glob(".new-*"))


def test_an_old_python_gets_the_numpy_that_its_blender_was_built_against(index: Path, tmp_path: Path) -> None:
    add_wheel(index, "numpy", "1.26.4")
    add_wheel(index, "numpy", "2.1.0")
    for python, version in [((3, 10), "1.26.4"), ((3, 14), "2.1.0")]:
        folders = package_folders(runtime("numpy", python=python), str(tmp_path), lambda news: None)
        assert Path(folders[-1], f"numpy-{version}.dist-info").is_dir()


def test_a_failed_download_gives_the_command_to_run_and_leaves_nothing(index: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        package_folders(runtime("msgspec"), str(tmp_path), lambda news: None)
    message = str(caught.value)
    cached = tmp_path / "cache" / "blendtorch-shm" / f"python3.{OTHER_PYTHON[1]}-msgspec"
    assert "lacks msgspec" in message
    assert f"pip install --quiet --disable-pip-version-check --target {cached}" in message
    assert not cached.exists()


def test_packages_for_this_python_are_kept_from_another_one(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_packages = tmp_path / "site-packages"
    for name in ("numpy", "blendtorch", "blendtorch_shm", "blender_side", "torch"):
        (site_packages / name).mkdir(parents=True)
    monkeypatch.setattr(packages, "OUR_FOLDER", str(site_packages))
    launch_directory = tmp_path / "launch"
    launch_directory.mkdir()
    (folder,) = package_folders(runtime(), str(launch_directory), lambda news: None)
    assert sorted(os.listdir(folder)) == ["blender_side", "blendtorch", "blendtorch_shm"]
