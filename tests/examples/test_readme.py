"""The programs that the README begins with, run as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_the_first_programs_of_the_readme_run_as_printed(a_blender: Any, tmp_path: Path) -> None:
    train, scene = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:2]
    (tmp_path / "train.py").write_text(train)
    (tmp_path / "scene.py").write_text(scene)
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"print\(.*# (.*)", train)
    assert len(printed) == 1
    assert done.stdout.splitlines() == printed * 4
