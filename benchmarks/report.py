"""Tables of what was measured; as a program, docs/benchmarks.md with its plots, from what `make bench` kept.

Usage: python -m benchmarks.report RESULTS.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

DOCS = Path(__file__).parents[1] / "docs"
PLOTS = DOCS / "benchmarks"

FIGURES = {
    "frames_per_s": ("frames/s", ",.0f"),
    "steps_per_s": ("steps/s", ",.0f"),
    "p50_us": ("p50 us", ",.0f"),
    "first_batch_s": ("s", ".2f"),
    "median_us": ("us", ",.1f"),
    "ms": ("ms", ".2f"),
    "p99_us": ("p99 us", ",.0f"),
    "gb_per_s": ("GB/s", ".2f"),
    "spread": ("spread", ".0%"),
    "trainer_us": ("trainer us", ",.0f"),
    "beside_copies_us": ("beside copies us", ",.0f"),
    "producer_us": ("producer us", ",.0f"),
    "trainer_mb": ("trainer MB", ",.0f"),
    "producers_mb": ("producers MB", ",.0f"),
}
"""What is known of a row, in the order of the columns: heading and format. The first one known is compared."""

ABOUT = """\
# Benchmarks

`make bench` measures, `make bench-report` writes this page from what it measured: {when}, {cpus} CPUs of a shared virtual
machine (load at the end {load}, most of it this), Linux {kernel}, Python {python}, {packages}.

Each table is of one run. *Ratio* compares a row with the first one of its block; where times are compared, less is better.
*Spread* is the distance between the quartiles of nine rounds, as a share of their median: smaller differences mean nothing.
*Trainer* and *producer* are CPU time in microseconds per frame, of all processes of that side. MB are resident memory at the end;
what several processes share counts once, and some 230 MB of the trainer's are Python, torch and pytest. Producers publish one
picture over and over, as fast as they may; unless said otherwise there is one. A receiver of single messages does not look at the
pictures, which flatters whatever does not copy; in the tables of batches the trainer gets memory of its own.
"""

NOTES = {
    "frame size": """\
One consumer without workers. `memcpy` is the limit of the machine: one thread that copies the picture, and tells nobody.
`iceoryx2` sends the bare bytes of one picture, without names, types, or a lease that Python's views keep, and waits for events:
less work per message, which tells where frames are small. `spdl arena` and `torch queue` send through queues of
multiprocessing. `tcp` is what a consumer on another host gets, over this host's own network.""",
    "frame size, batches of 8": """\
In the training process, ready for use. `data loader alone` yields the same tensor again and again: what a DataLoader costs before
anybody has sent anything. DataLoaders have four workers, the FrameLoader none.""",
    "workers": "DataLoaders by their number of workers, 480x640x3, batches of 8.",
    "batch size": "480x640x3. DataLoaders have four workers.",
    "producers": "480x640x3, one consumer. Each producer's frames are counted: none was lost.",
    "four consumers": "One producer; each consumer is a process of its own. Every frame reached exactly one of them.",
    "one busy and one idle consumer": """\
480x640x3, one producer, each consumer a process of its own. One keeps each frame for 100 ms before it asks for the next, the
other waits for frames. The latency is that of the second one; CPU time is of both, for each frame of either.""",
    "producers, batches of 8": "480x640x3. DataLoaders have four workers.",
    "fields": "480x640x3, cut into so many arrays.",
    "latency": """\
From before publishing until the receiver has the frame, 480x640x3, one frame at a time: 1500 of which each is asked for when the
one before is there, 600 at 60 a second, 1500 at 200 a second, between which caches and CPUs cool down. The first row is what must
be: a copy of that picture and a small message over ZeroMQ's ipc.""",
    "time to first batch": """\
From launching two instances (without Blender) to the first batch of 8, 480x640x3. DataLoaders have four workers, by fork.""",
    "real Blender": """\
640x480, SOLID, a moving cube, software OpenGL: blocks of ten frames with and without publishing, in turn. Frames/s are those of
one instance, of one or of two that share the machine.""",
    "ground truth": "640x480, six cubes: milliseconds a frame.",
    "recording": "480x640x3, one consumer without workers, at the producer's pace.",
    "replay": "In random order, from a file that the system has in memory; nobody looks at the bytes.",
    "replay, all bytes read": "The same, with a sum over each picture.",
    "opening a recording": "With the index that is written at its end, and without, as after `kill -9`.",
    "lockstep": """\
One environment without Blender: a loop that fills a picture, and waits for the next action. *req rep pickle* is what blendtorch
does.""",
    "four environments": """\
Steps of all four at once; each waits for so many milliseconds, as for a graphics card, and fills a picture. *async vector env* is
gymnasium's, with shared memory, around the same environments; it copies each batch twice.""",
    "publishing": "The producer's time for one message that finds a free slot.",
}


class Table(NamedTuple):
    title: str
    header: list[str]
    lines: list[list[str]]


def tables(infos: list[dict[str, Any]]) -> Iterator[Table]:
    """Of the rows that benchmarks have noted, in the order in which they were measured."""
    for title, rows in by_title(infos).items():
        known = [figure for figure in FIGURES if any(figure in row for row in rows)]
        header = [
            title,
            "",
            FIGURES[known[0]][0],
            "ratio" if known[0].endswith("_per_s") else "times the time",
            *(FIGURES[figure][0] for figure in known[1:]),
        ]
        lines = []
        base: dict[str, float] = {}
        for row in rows:
            first = base.setdefault(row["x"], row[known[0]])
            cells = [format(row[f], FIGURES[f][1]) if f in row else "" for f in known]
            lines.append([row["x"], row["way"], cells[0], f"{row[known[0]] / first:.3g}", *cells[1:]])
        yield Table(title, header, lines)


def by_title(infos: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    titled: dict[str, list[dict[str, Any]]] = {}
    for row in (row for info in infos for row in info.get("rows", [info])):
        if "table" in row:
            titled.setdefault(row["table"], []).append(row)
    return titled


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Frames per second, or what is compared instead: lines over `x`, or bars where there are too few for a line."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "blendtorch-shm"  # the same file for the same figures
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: a tenth of the size
    from matplotlib import pyplot, ticker

    figure = next(f for f in FIGURES if f in rows[0])
    xs = list(dict.fromkeys(row["x"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    canvas, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if len(xs) < 3:
        names = [row["way"] if len(xs) == 1 else f"{row['x']}: {row['way']}" for row in rows]
        axes.barh(names, [row[figure] for row in rows], color=[f"C{xs.index(row['x'])}" for row in rows])
        axes.bar_label(axes.containers[0], fmt=lambda value: format(value, FIGURES[figure][1]), padding=3)
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.set_xlabel(FIGURES[figure][0])
    else:
        for way, marker in zip(ways, "osD^v<>Pp*hXd", strict=False):
            points = {row["x"]: row[figure] for row in rows if row["way"] == way}
            axes.plot([xs.index(x) for x in points], list(points.values()), marker=marker, label=way)
        axes.set_xticks(range(len(xs)), xs)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(ticker.StrMethodFormatter("{x:,g}"))
        axes.grid(axis="y", which="both", alpha=0.3)
        axes.set_xlabel(rows[0]["table"])
        axes.set_ylabel(FIGURES[figure][0])
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    canvas.savefig(path, metadata={"Date": None})
    pyplot.close(canvas)


def versions(*packages: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def main(path: Path) -> None:
    results = json.loads(path.read_text())
    if results["is_short"]:
        raise SystemExit(f"{path} is of a short run, whose figures mean nothing. Run make bench.")
    infos = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    machine = results["machine_info"]
    text = ABOUT.format(
        when=results["datetime"][:10],
        cpus=machine["cpu"]["count"],
        kernel=machine["release"].split("-")[0],
        python=machine["python_version"],
        packages=results["packages"],
        load=results["load"][0],
    )
    PLOTS.mkdir(exist_ok=True)
    rows = by_title(infos)
    for table in tables(infos):
        file = PLOTS / f"{''.join(c if c.isalnum() else '_' for c in table.title)}.svg"
        plot(rows[table.title], file)
        text += f"\n## {table.title[0].upper()}{table.title[1:]}\n\n"
        text += f"{NOTES.get(table.title, '')}\n\n![{table.title}]({PLOTS.name}/{file.name})\n\n"
        text += tabulate(table.lines, table.header, tablefmt="github", disable_numparse=True, stralign="right") + "\n"
    (DOCS / "benchmarks.md").write_text(text)
    print(f"{DOCS / 'benchmarks.md'}, of {len(infos)} benchmarks")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
