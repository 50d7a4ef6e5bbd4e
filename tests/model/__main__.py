"""Explores all settings, the largest in a minute and two gigabytes. ``--steps`` prints the table of steps."""

from __future__ import annotations

import argparse

from .compiled import explore
from .protocol import C, P, Protocol, R, Setting
from .settings import LONG, SHORT


def main() -> None:
    """Explore the settings whose names contain the given words, or print the steps."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("words", nargs="*", help="explore the settings whose names contain all these words")
    parser.add_argument("--steps", action="store_true", help="print where a process is, and what it does next")
    arguments = parser.parse_args()
    if arguments.steps:
        model = Protocol(Setting(slots=1))
        tables = ((P, model.producer_steps()), (C, model.consumer_steps()), (R, model.release_steps()))
        for places, table in tables:
            for at, steps in table.items():
                print(f"{places.__name__}.{places(at).name:16}", "; ".join(step.name for step in steps))
        return
    for name, setting in (SHORT | LONG).items():
        if all(word in name for word in arguments.words):
            print(f"{name}: {explore(Protocol(setting))}", flush=True)


if __name__ == "__main__":
    main()
