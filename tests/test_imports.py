"""Who may import whom, and the two names that users know."""

import ast
import importlib.util
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
            f"assert {package}.__spec__.name == {package!r}\n"
            f"assert {package}.__name__ == {first!r}\n",  # what was loaded first is not called otherwise later
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
        "assert (btt.__name__, btb.__name__) == ('blendtorch.btt', 'blendtorch.btb')\n",
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
        "assert leaf.parent == 'blendtorch.btb.inner' and leaf.__spec__.parent == 'blender_side.inner'\n",
        without=BLENDER,
    )


def test_what_is_not_there_is_an_ordinary_import_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"blendtorch\.btt\.nowhere"):
        import_module("blendtorch.btt.nowhere")
    with pytest.raises(ModuleNotFoundError, match=r"blendtorch\.other"):
        import_module("blendtorch.other")


@pytest.mark.parametrize("alias", ["blendtorch.btt", "blendtorch.btb"])
def test_tab_offers_what_is_public_and_classes_call_themselves_as_users_do(alias: str) -> None:
    """And so they are found where they say that they are: by pickle, by help(), by whoever shows their source."""
    without = {"torchvision"} if alias == "blendtorch.btt" else TORCH
    example = "side.RemoteIterableDataset('tcp://127.0.0.1:9')" if alias == "blendtorch.btt" else "side.Signal()"
    run(
        "import inspect, pickle, pydoc, types\n"
        f"import {alias} as side\n"
        "assert dir(side) == sorted(side.__all__)\n"
        "for name in side.__all__:\n"
        "    public = getattr(side, name)\n"
        "    if not isinstance(public, type | types.FunctionType): continue\n"
        "    assert pickle.loads(pickle.dumps(public)) is public, name\n"
        "    assert name in inspect.getsource(public).partition('\\n\\n')[0], name\n"
        f"    assert public.__module__.startswith(({alias!r}, 'blendtorch_shm.')), public\n"
        "    assert public.__module__ in pydoc.render_doc(public, renderer=pydoc.plaintext), name\n"
        f"example = pickle.dumps({example})\n"
        f"assert {alias.encode()!r} in example and b'_side' not in example, example\n",
        without=without,
    )


NAMES_OF_BLENDTORCH = {
    "blendtorch.btt": [
        "RemoteIterableDataset",
        "FileDataset",
        "BlenderLauncher",
        "LaunchInfo",
        "colors",
        "__version__",
    ],
    "blendtorch.btt.apps.launch": ["main"],
    "blendtorch.btt.colors": ["gamma"],
    "blendtorch.btt.constants": ["DEFAULT_TIMEOUTMS"],
    "blendtorch.btt.dataset": ["RemoteIterableDataset", "SingleFileDataset", "FileDataset"],
    "blendtorch.btt.env_rendering": ["create_renderer", "RENDER_BACKENDS", "LOOKUP_ORDER"],
    "blendtorch.btt.file": ["FileRecorder", "FileReader"],
    "blendtorch.btt.finder": ["discover_blender"],
    "blendtorch.btt.launch_info": ["LaunchInfo"],
    "blendtorch.btt.launcher": ["BlenderLauncher", "LaunchInfo"],
    "blendtorch.btt.utils": ["get_primary_ip"],
    "blendtorch.btt.version": ["__version__"],
    "blendtorch.btb": ["DataPublisher", "OffScreenRenderer", "Camera", "env", "utils", "materials", "__version__"],
    "blendtorch.btb.animation": ["AnimationController"],
    "blendtorch.btb.arguments": ["parse_blendtorch_args"],
    "blendtorch.btb.camera": ["Camera"],
    "blendtorch.btb.env": ["BaseEnv", "RemoteControlledAgent"],
    "blendtorch.btb.constants": ["DEFAULT_TIMEOUTMS"],
    "blendtorch.btb.materials": ["create_normal_material"],
    "blendtorch.btb.offscreen": ["OffScreenRenderer"],
    "blendtorch.btb.paths": ["add_scene_dir_to_path"],
    "blendtorch.btb.publisher": ["DataPublisher"],
    "blendtorch.btb.renderer": ["CompositeRenderer", "CompositeSelection"],
    "blendtorch.btb.signal": ["Signal"],
    "blendtorch.btb.utils": ["find_first_view3d", "world_coordinates", "compute_object_visibility", "scene_stats"],
    "blendtorch.btb.version": ["__version__"],
}


@pytest.mark.parametrize("side", ["btt", "btb"])
def test_programs_import_what_they_import_from_blendtorch(side: str) -> None:
    names = {module: names for module, names in NAMES_OF_BLENDTORCH.items() if f".{side}" in module}
    statements = [f"from {module} import {', '.join(names)}" for module, names in names.items()]
    uses = [module for module in names if not module.endswith("launch")]  # after `import blendtorch.btt` alone
    if importlib.util.find_spec("bpy") is None and side == "btb":
        pytest.skip("needs bpy")
    run("\n".join([f"import blendtorch.{side}", *uses, *statements]))


HIDDEN = """
import sys

class Hider:
    def find_spec(name, *_):
        if name.partition(".")[0] in ("torch", "bpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hider)

def check(program, module, remedy):
    try:
        exec(program)
    except ModuleNotFoundError as error:
        assert error.name == module and remedy in str(error) and str(error).count(remedy) == 1, error
    else:
        raise AssertionError(program)

import blendtorch.btt as btt
import blendtorch.btb as btb
"""


def test_what_only_blender_or_torch_can_do_says_what_to_install() -> None:
    torch = [
        "btt.RemoteIterableDataset",
        "from blendtorch.btt import FileDataset",
        "from blendtorch.btt.dataset import FileDataset",
        "btt.colors",
        "btt.pooled_collate",
    ]
    run(
        HIDDEN
        + f"for program in {torch!r}: check(program, 'torch', 'blendtorch-shm[torch]')\n"
        + "check('btb.Camera', 'bpy', 'BlenderLauncher')\n"
    )


@pytest.mark.parametrize("name", ["btt", "btb"])
def test_an_editor_finds_source_behind_the_names(name: str) -> None:
    """Those that run no code look for a file; it leads on to the classes."""
    file = ROOT / "blendtorch" / f"{name}.py"
    assert imported_by(file) == {{"btt": "torch_side", "btb": "blender_side"}[name]}
    assert "import *" in file.read_text()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed_and_installed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin == str(ROOT / package / "__init__.py")


FACE = ["Address", "LaunchInfo", "__version__", "errors", "open_sink", "open_source", "stats"]


def test_the_face_of_the_core_is_imported_when_it_is_used() -> None:
    loaded = run("import blendtorch_shm\nprint(*sys.modules)").split()
    assert {name for name in loaded if name.startswith("blendtorch_shm")} == {"blendtorch_shm", "blendtorch_shm.lazy"}
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
