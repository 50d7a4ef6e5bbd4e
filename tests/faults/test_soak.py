"""Millions of frames: none lost, none twice, and nothing grows. Short by default; `make soak` runs all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..selection import ALL

SOAK = Path(__file__).with_name("soak.py")
MiB = 2**20
PRODUCERS, LOCAL = 2, 3  # as in soak.py


def soak(frames: int, height: int, width: int) -> dict[str, Any]:
    """What the run reports."""
    done = subprocess.run(
        [sys.executable, SOAK, "--frames", str(frames), "--shape", str(height), str(width)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SOAK.parents[2])},
        check=True,
    )
    report = dict(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps(report, indent=1))
    return report


def assert_nothing_is_lost_and_nothing_grows(report: dict[str, Any], tolerance_nbytes: int) -> None:
    assert (report["lost"], report["repeated"]) == (0, 0)
    for who, (early, late) in report["samples"].items():
        assert late["private"] - early["private"] < tolerance_nbytes, who
        # A connection to an inbox is made when a sleeper is told for the first time, by the producer or by another consumer.
        connections = LOCAL if who.startswith("producer") else PRODUCERS * 2 * LOCAL
        assert late["files"] <= early["files"] + 2 * connections + 4, who  # a socket is two files
        # An arena of malloc, a thread's stack; a producer's windows divide the mapping of a ring, at each slot's ends.
        assert late["mappings"] <= early["mappings"] + 4 + (2 * 16 if who.startswith("producer") else 0), who


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_small_frames_are_not_lost_and_leave_nothing_behind() -> None:
    assert_nothing_is_lost_and_nothing_grows(soak(1_000_000 if ALL else 6_000, 32, 32), 4 * MiB)


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_large_frames_are_not_lost_and_leave_nothing_behind() -> None:
    # Over TCP a few frames of 8 MiB are on their way, and malloc keeps as many.
    assert_nothing_is_lost_and_nothing_grows(soak(50_000 if ALL else 400, 1080, 1920), 100 * MiB)
