"""What users of blendtorch have, run as it is: two scripts, put beside our cube.blend, on each form of Blender."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

RUN = """
import runpy, sys
from torch_side import BlenderLauncher
BlenderLauncher.__init__.__kwdefaults__["blender"] = sys.argv[2]  # the script names none
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.timeout(300)
def test_the_scripts_of_the_design_run_verbatim(blender: Any, tmp_path: Path) -> None:
    num_workers = 4 if blender.form == "executable" else 0  # the two have little to do with each other
    for file in (*(HERE / "verbatim").iterdir(), ROOT / "examples" / "datagen" / "cube.blend"):
        if file.is_file():
            shutil.copy(file, tmp_path)
    script = tmp_path / "minimal.py"
    if num_workers == 0:
        script.write_text(script.read_text().replace("num_workers=4", "num_workers=0"))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(script), str(blender.argument)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    received = re.findall(r"^Received (.*)$", done.stdout, re.MULTILINE)
    assert received == ["torch.Size([4, 480, 640, 3]) torch.Size([4, 8, 2])"] * 4
