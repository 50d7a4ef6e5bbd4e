"""Nothing is lost, whatever dies: real processes, really killed, at chosen moments and at random ones.

`director.py` plays the rounds, in a process of its own, which forks; what has to hold stands in `judge.py`, the moments in
`points.py`. Each run plays every second point, and the others on the next day (`selection.py`); `make soak` plays all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..selection import ALL, TURN, part_of
from .points import POINTS

DIRECTOR = Path(__file__).with_name("director.py")
ROOT = Path(__file__).parents[2]


def direct(*arguments: str) -> dict[str, Any]:
    """What the director reports."""
    done = subprocess.run(
        [sys.executable, DIRECTOR, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def rounds_at_points(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A round for each point whose test was chosen."""
    chosen = {
        item.callspec.params["point"] for item in request.session.items if "rounds_at_points" in item.fixturenames
    }
    return direct("points", "--only", *(point.name for point in POINTS if point.name in chosen))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("point", part_of([p.name for p in POINTS], 2))
def test_nothing_is_lost_when_somebody_dies_or_stops_when(point: str, rounds_at_points: dict[str, Any]) -> None:
    outcome = rounds_at_points[point]
    assert not outcome["wrong"], "\n".join(outcome["wrong"])
    assert outcome["reached"][point] >= 2


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_nothing_is_lost_when_processes_die_and_stop_at_random() -> None:
    kills = 5_000 if ALL else 100  # three rounds of 40, of the six kinds that there are
    outcome = direct("chance", "--kills", str(kills), "--seconds", "1800", "--seed", str(3 * TURN))
    assert not outcome["wrong"], "\n".join(outcome["wrong"])
    print(json.dumps(outcome, indent=1))
    assert ALL or sum(outcome["kills"].values()) >= kills  # half an hour of it is enough
