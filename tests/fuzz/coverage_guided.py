"""The targets of :mod:`targets` under atheris, which looks for inputs that reach code that no earlier one reached.

``make fuzz`` runs each target for :data:`SECONDS`; ``make fuzz ARGS="dtype -runs=1000000"`` runs one, with options of libFuzzer.
A target that lets out an error, takes longer than 10 s or more than 1 GiB, ends its run, and the input is kept in ``.fuzz/``.
So is whatever reached new code: the next run goes on from there.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["blendtorch_shm", "torch_side.recordings"]):
    from tests.fuzz.targets import TARGETS

SECONDS = 60
KEPT = Path(__file__).parents[2] / ".fuzz"


def main() -> int:
    """Run one target, or all of them in processes of their own."""
    if len(sys.argv) > 1 and sys.argv[1] in TARGETS:
        run(sys.argv[1], sys.argv[2:])
    options = sys.argv[1:] or [f"-max_total_time={SECONDS}"]
    failed = []
    for name in TARGETS:
        print(f"==> {name}", flush=True)
        if subprocess.run([sys.executable, "-m", "tests.fuzz.coverage_guided", name, *options]).returncode:
            failed.append(name)
    print(f"Findings in {', '.join(failed)}: see above." if failed else "No findings.")
    return len(failed)


def run(name: str, options: list[str]) -> None:
    """Feed one target until it is enough, or an input is found that it cannot take; does not return."""
    target = TARGETS[name]
    corpus = KEPT / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    logging.getLogger("blendtorch").setLevel(logging.CRITICAL + 1)
    limits = ["-timeout=10", "-rss_limit_mb=1024", "-max_len=32768", f"-artifact_prefix={KEPT}/{name}-"]

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        mutated: bytes = target.mutate(data, random) if random.random() < 0.7 else atheris.Mutate(data, max_size)
        return mutated[:max_size]

    atheris.Setup(
        [sys.argv[0], *limits, "-print_final_stats=1", *options, str(corpus)], target.run, custom_mutator=mutate
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
