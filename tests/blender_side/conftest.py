"""Scripts run inside a real Blender, with a window (a virtual one) and without."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blendtorch_shm.launch.notes import log_path, note_path
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

IN_EACH_BLENDER = pytest.mark.parametrize("run_script", ["default"], indirect=True, scope="module")
"""For what does not depend on whether there is a window: each Blender that is here is asked, but not with and without one."""


@pytest.fixture(scope="module", params=["default", "background"])
def run_script(request: pytest.FixtureRequest, blender: Any) -> Runner:
    """Runs one of our scripts with the cube scene, in each form of Blender, until it ends by itself.

    Pictures, and what makes them, are looked at in each form; values with :data:`IN_EACH_BLENDER`.
    """
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
            renderer = Path(note_path(directory, 0, "renderer"))
            return Run(
                exit_code,
                Path(log_path(directory, 0)).read_text(errors="replace"),
                renderer.read_text() if renderer.exists() else "",
            )

    return run


@pytest.fixture(scope="module")
def saved_by(run_script: Runner, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Runs a script that saves arrays to the .npz file that it is given; these by name, its "log" and its "renderer"."""

    def run(script: str) -> dict[str, Any]:
        out = tmp_path_factory.mktemp(Path(script).stem) / "saved.npz"
        done = run_script(script, out)
        assert done.exit_code == 0, done.log
        return {**np.load(out), "log": done.log, "renderer": done.renderer}

    return run
