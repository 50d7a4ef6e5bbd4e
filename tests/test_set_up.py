"""How the set-up finds its Python: by running the candidates."""

import os
import subprocess
import sys
from pathlib import Path

FIND_PYTHON = Path(__file__).parents[1] / "tools" / "find-python"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def command(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def find(home: Path, *versions: str) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(home), "PATH": f"{home / 'bin'}:{home / 'later'}:/usr/bin:/bin"}
    return subprocess.run([FIND_PYTHON, *versions], env=environment, capture_output=True, text=True)


def test_a_command_that_only_prints_an_error_is_passed_over(tmp_path: Path) -> None:
    command(tmp_path / "bin", f"python{HERE}", "echo 'no such version' >&2; exit 127")
    command(tmp_path / "later", f"python{HERE}", f'exec "{sys.executable}" "$@"')
    assert find(tmp_path, HERE).stdout.strip() == sys.executable


def test_interpreters_of_version_managers_are_found_although_not_on_the_path(tmp_path: Path) -> None:
    command(tmp_path / ".pyenv/versions/3.99.1/bin", "python3", "echo has been run; exit 1")
    command(tmp_path / ".local/share/uv/python/cpython-3.99.2-linux/bin", "python3", "echo has been run; exit 1")
    assert find(tmp_path, "3.99").stderr.count("has been run") == 2


def test_the_first_version_asked_for_wins(tmp_path: Path) -> None:
    command(tmp_path / "bin", "python3.99", "echo is broken; exit 1")
    command(tmp_path / "bin", f"python{HERE}", f'exec "{sys.executable}" "$@"')
    assert find(tmp_path, "3.99", HERE).stdout.strip() == sys.executable


def test_when_there_is_none_the_message_says_what_was_tried_and_what_to_do(tmp_path: Path) -> None:
    shim = command(tmp_path / "bin", "python3.99", "echo 'shim: not installed' >&2; exit 127")
    answer = find(tmp_path, "3.99")
    assert answer.returncode == 1
    assert f"{shim}: shim: not installed" in answer.stderr
    assert "uv python install 3.13" in answer.stderr
    assert "PYTHON=/path/to/python3.13" in answer.stderr


def test_a_python_that_cannot_make_an_environment_says_which_package_does(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/ensurepip.py").write_text("raise ImportError(\"No module named 'ensurepip'\")")
    broken = command(tmp_path / "bin", f"python{HERE}", f'PYTHONPATH={tmp_path}/broken exec "{sys.executable}" "$@"')
    answer = find(tmp_path, HERE)
    if answer.returncode == 0:  # Another Python of this version lies in /usr/bin.
        assert os.path.dirname(answer.stdout) == "/usr/bin"
    else:
        assert f"{broken}: No module named 'ensurepip' (on Debian and Ubuntu: sudo apt-get install" in answer.stderr
