"""Who may import whom, and the two names that users know."""

import ast
import pickle
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import blendtorch_shm
from blendtorch_shm import errors

ROOT = Path(__file__).parents[1]
BLENDER = {"bpy", "bpy_extras", "bgl", "bmesh", "gpu", "gpu_extras", "mathutils"}
TORCH = {"torch", "torchvision"}
PACKAGES = {
    "blendtorch_shm": BLENDER | TORCH | {"blender_side", "torch_side", "blendtorch", "psutil", "rich"},
    "blender_side": TORCH | {"torch_side", "blendtorch", "psutil", "rich"},
    "torch_side": BLENDER | {"blendtorch"},
    "blendtorch": BLENDER | TORCH,
}


def run(program: str, *, without: set[str] | None = None) -> str:
    """Run `program` in a fresh interpreter where the modules `without` cannot be imported; return its output."""
    prelude = f"import sys\nsys.modules.update(dict.fromkeys({sorted(without or ())!r}))\n"
    done = subprocess.run([sys.executable, "-c", prelude + program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_imports_what_its_package_must_not_know(package: str) -> None:
    trespassers = {
        str(file.relative_to(ROOT)): names
        for file in sorted((ROOT / package).rglob("*.py"))
        if (names := imported_by(file) & PACKAGES[package])
    }
    assert not trespassers


def submodules(package: str) -> list[str]:
    return sorted(
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__main__.py"
    )


@pytest.mark.parametrize("package", ["blendtorch_shm", "torch_side"])
def test_every_module_of_the_core_and_of_the_training_side_loads_without_blender(package: str) -> None:
    without = PACKAGES[package] if package == "blendtorch_shm" else BLENDER
    run(
        f"from importlib import import_module\nfor name in {submodules(package)!r}: import_module(name)",
        without=without,
    )


def test_the_blender_side_publishes_without_blender_and_without_torch() -> None:
    run(
        "import blendtorch.btb as btb\nbtb.parse_blendtorch_args, btb.DataPublisher, btb.Signal",
        without=BLENDER | PACKAGES["blender_side"] - {"blendtorch"},
    )


def test_publishing_imports_no_event_loop() -> None:
    """Into each Blender: 50 modules, and some 30 ms."""
    loaded = run("import blender_side.publisher\nprint(*sys.modules)").split()
    assert not {"asyncio", "ssl"} & set(loaded)


def test_launching_needs_only_the_core() -> None:
    run("import blendtorch.btt, torch_side.apps.launch, torch_side.apps.clean", without=TORCH | {"psutil", "rich"})


def test_importing_blendtorch_imports_neither_side() -> None:
    loaded = run("import blendtorch\nprint(*sys.modules)").split()
    assert not {name.partition(".")[0] for name in loaded} & (BLENDER | TORCH | {"torch_side", "blender_side", "numpy"})


@pytest.mark.parametrize(("alias", "package"), [("blendtorch.btt", "torch_side"), ("blendtorch.btb", "blender_side")])
def test_an_alias_is_the_package_itself_whichever_is_imported_first(alias: str, package: str) -> None:
    for first, second in [(alias, package), (package, alias)]:
        run(
            f"import {first}, {second}\n"
            f"assert sys.modules[{alias!r}] is sys.modules[{package!r}]\n"
            f"assert {alias} is {package}\n"
            f"assert {package}.__name__ == {package}.__spec__.name == {package!r}\n",
            without=BLENDER,
        )


@pytest.mark.parametrize(
    "program",
    [
        "import blendtorch.btb.publisher\nassert blendtorch.btb.publisher is sys.modules['blender_side.publisher']",
        "from blendtorch.btb import publisher\nimport blender_side.publisher as real\nassert publisher is real",
        "import blender_side.publisher as real\nfrom blendtorch.btb import publisher\nassert publisher is real",
        (
            "from blendtorch.btb.publisher import DataPublisher\nimport blender_side\n"
            "assert DataPublisher is blender_side.DataPublisher"
        ),
    ],
    ids=["import", "from", "after the real one", "name"],
)
def test_submodules_are_the_same_objects_however_they_are_imported(program: str) -> None:
    run(program, without=BLENDER)


def test_the_training_side_is_found_under_both_names() -> None:
    run(
        "import blendtorch.btt.launcher\n"
        "from blendtorch.btt.dataset import RemoteIterableDataset\n"
        "from blendtorch import btt, btb\n"
        "import torch_side.launcher\n"
        "assert blendtorch.btt.launcher is torch_side.launcher\n"
        "assert RemoteIterableDataset is torch_side.RemoteIterableDataset\n"
        "assert (btt.__name__, btb.__name__) == ('torch_side', 'blender_side')\n",
        without=BLENDER,
    )


def test_subpackages_alias_too(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "__init__.py").touch()
    (inner / "leaf.py").write_text("from . import __name__ as parent\n")
    run(
        f"import blender_side; blender_side.__path__.append({str(tmp_path)!r})\n"
        "import blendtorch.btb.inner.leaf as leaf\n"
        "import blender_side.inner.leaf\n"
        "assert leaf is blender_side.inner.leaf\n"
        "assert leaf.parent == 'blender_side.inner' and leaf.__spec__.parent == 'blender_side.inner'\n",
        without=BLENDER,
    )


def test_what_is_not_there_is_an_ordinary_import_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"torch_side\.nowhere"):
        import_module("blendtorch.btt.nowhere")
    with pytest.raises(ModuleNotFoundError, match=r"blendtorch\.other"):
        import_module("blendtorch.other")


def test_classes_pickle_under_their_real_name() -> None:
    import blendtorch.btt as btt

    data = pickle.dumps(btt.RemoteIterableDataset)
    assert b"torch_side" in data
    assert b"blendtorch.btt" not in data
    assert pickle.loads(data) is btt.RemoteIterableDataset


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed_and_installed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin == str(ROOT / package / "__init__.py")


FACE = ["Address", "LaunchInfo", "__version__", "errors", "open_sink", "open_source", "stats"]


def test_the_face_of_the_core_is_imported_when_it_is_used() -> None:
    loaded = run("import blendtorch_shm\nprint(*sys.modules)").split()
    assert [name for name in loaded if name.startswith("blendtorch_shm")] == ["blendtorch_shm"]
    assert not {"numpy", "zmq", "msgspec"} & set(loaded)
    for name in FACE:  # each as the first: no cycle
        run(
            f"import blendtorch_shm\nblendtorch_shm.{name}\nfrom blendtorch_shm import *\n{name}",
            without=BLENDER | TORCH,
        )
    assert sorted(blendtorch_shm.__all__) == FACE
    with pytest.raises(AttributeError, match="no attribute 'open_nothing'"):
        _ = blendtorch_shm.open_nothing


@pytest.mark.parametrize("alias", ["blendtorch.btt", "blendtorch.btb"])
def test_both_sides_have_all_errors_and_the_version(alias: str) -> None:
    side = import_module(alias)
    named = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert named | {"__version__"} <= set(side.__all__)
    assert all(getattr(side, name) is getattr(errors, name) for name in named)
    assert side.__version__ == blendtorch_shm.__version__
