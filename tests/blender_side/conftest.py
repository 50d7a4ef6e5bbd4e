"""Scripts run inside a real Blender, with a window (a virtual one) and without."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blendtorch_shm.launch.directory import log_path, renderer_path
from torch_side import BlenderLauncher

SCRIPTS = Path(__file__).parent / "scripts"
CUBE_BLEND = Path(__file__).parents[2] / "examples" / "datagen" / "cube.blend"


@dataclass(frozen=True)
class Run:
    """How an instance ended."""

    exit_code: int
    log: str
    renderer: str


Runner = Callable[..., Run]


@pytest.fixture(scope="module", params=["default", "background"])
def run_script(request: pytest.FixtureRequest, blender: Any) -> Runner:
    """Runs one of our scripts with the cube scene, in each form of Blender, until it ends by itself."""
    background = request.param == "background"
    if background and blender.form == "module":
        pytest.skip("the bpy module never has a window")

    def run(script: str, *args: object) -> Run:
        with BlenderLauncher(
            scene=CUBE_BLEND,
            script=SCRIPTS / script,
            named_sockets=["UNUSED"],
            blender=blender.argument,
            background=background,
            instance_args=[[str(arg) for arg in args]],
            progress=False,
        ) as launcher:
            (exit_code,) = launcher.wait()
            directory = launcher.launch_info.addresses["UNUSED"][0].twin.directory
            renderer = Path(renderer_path(directory, 0))
            return Run(
                exit_code,
                Path(log_path(directory, 0)).read_text(errors="replace"),
                renderer.read_text() if renderer.exists() else "",
            )

    return run
