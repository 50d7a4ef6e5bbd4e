"""Many random scenes, and what disagrees, by kind: ``make scenes``, or ``python -m tests.blender_side.random_scenes --help``.

hypothesis draws the scenes. Each disagreement is made smaller by leaving out one thing after the other, as long as it stays, and
what is left names its kind.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from .comparison import Verdict, judge
from .descriptions import RENDERERS, Description, descriptions, one_choice_each, plain, smallest, whole
from .process import Blenders


class Campaign:
    def __init__(self, blenders: Blenders, report: Path | None, seconds: float) -> None:
        self.started = time.perf_counter()
        self.blenders, self.report, self.seconds = blenders, report, seconds
        self.scenes = self.differing = self.rim = self.pixels = 0
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.kinds: dict[str, tuple[Description, str, str]] = {}

    def look_at_single_choices(self) -> None:
        for renderer in RENDERERS:
            for description in one_choice_each(renderer):
                self.look_at(description, shrink=False)

    def look_at(self, description: Description, *, shrink: bool = True) -> None:
        if time.perf_counter() - self.started > self.seconds:
            return
        self.scenes += 1
        verdict = judge(self.blenders, description)
        self._count(verdict)
        for what in (*verdict.disagreements, *(["unsure"] if verdict.unsure else [])):
            self.counts[what] += 1
            if not self._is_known(what, description):
                text = verdict.unsure if what == "unsure" else verdict.disagreements[what]
                small = description
                if shrink:
                    small, text = self._shrunk(what, description, text)
                self._note(what, small, text)

    def _count(self, verdict: Verdict) -> None:
        self.differing += verdict.differing
        self.rim += verdict.rim
        self.pixels += verdict.pixels
        if verdict.refused:
            self.refused[verdict.refused[:100]] += 1

    def _is_known(self, what: str, description: Description) -> bool:
        """Whether a smallest scene of the same disagreement is contained in this one."""
        features = _features(description)
        return any(
            kind.startswith(f"{what}:") and _features(small) <= features for kind, (small, _, _) in self.kinds.items()
        )

    def _shrunk(self, what: str, description: Description, said: str) -> tuple[Description, str]:
        def is_found(candidate: Description) -> bool:
            nonlocal said
            verdict = judge(self.blenders, candidate)
            text = verdict.unsure if what == "unsure" else verdict.disagreements.get(what, "")
            said = text or said
            return bool(text)

        return smallest(description, is_found), said

    def _note(self, what: str, small: Description, said: str) -> None:
        kind = f"{what}: {', '.join(sorted(_features(small)))}"
        if kind not in self.kinds:
            self.kinds[kind] = small, said, what
            line = f"{kind}\n    {json.dumps(plain(small))}\n    {said[-4000:]}\n"
            print(f"[{self.scenes} scenes, {time.perf_counter() - self.started:.0f} s] {line}", flush=True)
            if self.report:
                with self.report.open("a") as file:
                    file.write(line)

    def summary(self) -> str:
        seconds = time.perf_counter() - self.started
        return (
            f"{self.scenes} scenes in {seconds:.0f} s, {self.blenders.product.deaths} deaths of Blender;"
            f" refused {dict(self.refused)}; scenes with a disagreement, by what disagrees: {dict(self.counts)};"
            f" kinds: {len(self.kinds)};"
            f" pixels of masks that differ: {self.differing} of {self.rim} at silhouettes, of {self.pixels} in all"
        )


def _features(description: Description) -> set[str]:
    short = plain(description)
    found = {f"{key}={value}" for key, value in short.items() if key not in ("objects", "camera", "frames")}
    found |= {
        f"camera {key}={value}" for key, value in short.get("camera", {}).items() if key not in ("location", "at")
    }
    for obj in short["objects"]:
        for key, value in obj.items():
            if key == "modifiers":
                found |= {f"modifier {modifier['type']}" for modifier in value}
            elif key in ("parent", "constraint"):
                found.add(key)
            elif key not in ("location", "rotation"):
                found.add(f"{key}={value}")
    return found | ({"moves on"} if len(short.get("frames", [])) > 1 else set())


def look_again(short: list[Description]) -> None:
    """Print what is found in scenes of a report."""
    with tempfile.TemporaryDirectory() as folder, Blenders(Path(folder)) as blenders:
        for one in short:
            print(f"{json.dumps(one)}\n    {judge(blenders, whole(one))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--singles", action="store_true", help="first, scenes in which one thing is not plain")
    parser.add_argument("--report", type=Path, help="a file to add the kinds of disagreements to")
    parser.add_argument("--scene", type=json.loads, action="append", help="only this one, as a report has it: {...}")
    arguments = parser.parse_args()
    if arguments.scene:
        look_again(arguments.scene)
        return
    print(f"--seed {arguments.seed}")
    with tempfile.TemporaryDirectory() as folder, Blenders(Path(folder)) as blenders:
        campaign = Campaign(blenders, arguments.report, arguments.seconds)

        @seed(arguments.seed)
        @settings(
            max_examples=max(arguments.scenes, 1),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(descriptions())
        def look(description: Description) -> None:
            campaign.look_at(description)

        try:
            if arguments.singles:
                campaign.look_at_single_choices()
            if arguments.scenes:
                look()
        finally:
            print(campaign.summary())


if __name__ == "__main__":
    main()
