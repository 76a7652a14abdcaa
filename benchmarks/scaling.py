"""How the cost of a model grows: with threads, with the batch, and with the image; minicnn beside PyTorch, where that is installed.

    python benchmarks/scaling.py                                     ResNet-18, all three, in some minutes
    python benchmarks/scaling.py --model vgg16 --batches 1 4 --threads --sizes       one study: a flag alone leaves its study out
    python benchmarks/scaling.py --json out.json --plot out.svg      keep every number, and draw them
    python benchmarks/scaling.py --quick                             tiny sizes: does it all run?

Measured as in run.py: a process for each side, one repetition of each in turn, medians. What does not fit in memory is reported
as such, and the rest goes on.
"""
from __future__ import annotations

import argparse
import importlib.util
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import cases
import report
from cases import Case
from report import OURS, Measurement
from run import SIDES, Care, Side, Worker, cores, greet, kept, measure, parse_common, positive, progress, status, write

BATCHES = (1, 2, 4, 8, 16, 32, 64)
PIXELS = (32, 64, 128, 224, 320, 448)           # a side
SUFFIXES = (".png", ".svg", ".pdf")


class Point(NamedTuple):
    """One task of one model at one place of one study."""

    study: str                  # which of the three is varied: "threads", "batch" or "size"
    threads: int
    case: Case

    @property
    def value(self) -> int:
        """Of what is varied."""
        return {"threads": self.threads, "batch": self.case.batch, "size": self.pixels}[self.study]

    @property
    def pixels(self) -> int:
        """Of a side of the images."""
        return self.case.images["x"][1]

    @property
    def name(self) -> str:
        """For the display of progress."""
        return f"{self.case.name}, {self.study} {self.value}, {', '.join(self.case.tasks)}"


Measured = list[tuple[Point, Measurement]]


def points(args: argparse.Namespace) -> list[Point]:
    """All to measure: threads at the batch that the model is compared at, sizes at a small one."""
    def study(name: str, threads: int, batch: int | None, side: int) -> list[Point]:
        return [Point(name, threads, case) for case in cases.model(args.model, args.quick, batch, side)]

    # At 32 pixels a ResNet ends in a single one, and a batch of one picture then has no variance.
    side = 64 if args.quick else cases.side_of(args.model)
    few = 2 if args.quick else cases.BATCH
    return [*(point for n in args.threads for point in study("threads", n, None, side)),
            *(point for n in args.batches for point in study("batch", cores(), n, side)),
            *(point for n in args.sizes for point in study("size", cores(), few, n))]


def run(selected: Sequence[Point], sides: Sequence[Side], care: Care) -> Iterator[tuple[Point, Measurement]]:
    """Measure one after the other, by the same processes as long as the number of threads stays the same."""
    for threads, group in groupby(progress(selected), key=lambda point: point.threads):
        with ExitStack() as running:
            workers = [running.enter_context(Worker(side, threads)) for side in sides]
            for point in group:
                yield from ((point, measurement) for measurement in measure(point.case, workers, care))


# ---------------------------------------------------------------- to read and to keep
TITLES = {"threads": "Threads: {model}, batch {batches}, {pixels} x {pixels} pixels",
          "batch": "Batch: {model}, {threads}, {pixels} x {pixels} pixels",
          "size": "Image size: {model}, batch {batches}, {threads}"}


def text(surroundings: dict[str, Any], measured: Measured, repeats: int) -> str:
    """Surroundings, a table for each study, remarks."""
    parts = ["\n".join(f"{name + ':':14} {value}" for name, value in surroundings.items())]
    parts += [f"{title(study, those)}; milliseconds an image, medians of {repeats}\n" + table(study, those)
              for study, those in by_study(measured).items()]
    return "\n\n".join([*parts, *report.remarks([measurement for _, measurement in measured])])


def by_study(measured: Measured) -> dict[str, Measured]:
    return {study: those for study in TITLES if (those := [found for found in measured if found[0].study == study])}


def title(study: str, measured: Measured) -> str:
    """With what stays the same in it; the batch may be another one in training."""
    point = measured[0][0]
    batches = dict.fromkeys(other.case.batch for other, _ in measured)
    return TITLES[study].format(model=point.case.name, pixels=point.pixels, batches=" and ".join(map(str, batches)),
                                threads=f"{point.threads} thread{'s' * (point.threads > 1)}")


def table(study: str, measured: Measured) -> str:
    """Inference first, then training, each as what is varied grows."""
    ordered = sorted(measured, key=lambda found: (found[1].task, found[0].value))
    heads, times = report.columns([m for _, m in ordered], [m.batch for _, m in ordered])
    return report.table(["task", study, *heads],
                        [[m.task, str(point.value), *cells] for (point, m), cells in zip(ordered, times)], left=(0,))


def document(surroundings: dict[str, Any], measured: Measured, repeats: int) -> dict[str, Any]:
    """As run.py's, and of each measurement what it was a point of."""
    whole = report.document(surroundings, [measurement for _, measurement in measured], repeats)
    whole["measurements"] = [{"study": point.study, "threads": point.threads, "pixels": point.pixels, **fields}
                             for (point, _), fields in zip(measured, whole["measurements"])]
    return whole


# ---------------------------------------------------------------- to see
COLOURS = {OURS: "#0072b2", "PyTorch": "#d55e00"}               # which colour-blind eyes tell apart (Okabe and Ito)
LINES = {"inference": ("-", "o"), "training step": ("--", "s")}
LABELS = {"threads": "threads", "batch": "images a batch", "size": "pixels a side of the image"}


def plot(path: Path, surroundings: dict[str, Any], measured: Measured) -> None:
    """A panel for each study, both axes logarithmic: halving, or the square of the side, is a straight line."""
    # Here, since NumPy comes with them: run.py says why the parent stays small.
    from minicnn.plots import new_figure
    from minicnn.weights import atomically

    studies = by_study(measured)
    figure = new_figure(4.6 * len(studies), 4.6)
    for axes, (study, those) in zip(figure.subplots(1, len(studies), squeeze=False)[0], studies.items(), strict=True):
        panel(axes, study, those)
    libraries = ", ".join(f"{name} {surroundings[name]}" for name in (OURS, "NumPy", "PyTorch") if name in surroundings)
    where = f"{measured[0][0].case.name} on {surroundings['CPU']}, {surroundings['cores']} cores: {libraries}"
    figure.suptitle(textwrap.fill(where, 60 * len(studies)), fontsize=10)
    atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, facecolor="white"))


def panel(axes: Any, study: str, measured: Measured) -> None:
    """Milliseconds an image over what is varied: a line for each library and task, its faster variant at each point."""
    values = sorted({point.value for point, _ in measured})
    for task, (line, marker) in LINES.items():
        for library, colour in COLOURS.items():
            curve = sorted((point.value, m.milliseconds[side] / m.batch) for point, m in measured
                           if m.task == task and (side := m.fastest(library)))
            if curve:
                axes.plot(*zip(*curve), color=colour, linestyle=line, marker=marker, markersize=4, label=f"{library}, {task}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_yticks([tick for power in range(-3, 6) for digit in (1, 2, 5) if low <= (tick := digit * 10.0 ** power) <= high])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(LABELS[study])
    axes.set_ylabel("milliseconds an image")
    axes.set_title(title(study, measured).replace(": ", "\n", 1), loc="left", fontsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


# ---------------------------------------------------------------- the command
def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    selected = points(args)
    measured: Measured = []
    surroundings: dict[str, Any] = {}
    with kept() as problems:
        with ExitStack() as running:            # to see who is there
            workers, versions = greet([running.enter_context(Worker(side, cores())) for side in SIDES])
        surroundings = report.environment(cores(), versions)
        for found in run(selected, [worker.side for worker in workers], Care.of(args)):
            measured.append(found)
    if measured:                                # also what was measured before something stopped it
        print(text(surroundings, measured, args.repeats))
        if args.json is not None:
            write(args.json, document(surroundings, measured, args.repeats))
        if args.plot is not None:
            plot(args.plot, surroundings, measured)
    return status(problems)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time a model over threads, batches and image sizes.")
    parser.add_argument("--model", choices=tuple(cases.MODELS), default="resnet18", help="(default: %(default)s)")
    for name, what in (("threads", f"1 to {cores()}, the cores"), ("batches", f"{BATCHES[0]} to {BATCHES[-1]}"),
                       ("sizes", f"{PIXELS[0]} to {PIXELS[-1]} pixels a side")):
        parser.add_argument(f"--{name}", type=positive, nargs="*", help=f"default: {what}; the flag alone: none")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a figure there, too; needs matplotlib")
    args = parse_common(parser, arguments)
    many = 2 if args.quick else None
    for name, default in (("threads", range(1, cores() + 1)), ("batches", BATCHES[:many]), ("sizes", PIXELS[:many])):
        if getattr(args, name) is None:
            setattr(args, name, list(default))
    if not (args.threads or args.batches or args.sizes):
        parser.error("--threads, --batches and --sizes are all empty: nothing is left to measure")
    if args.plot is not None:
        refuse_plot(parser, args.plot)
    return args


def refuse_plot(parser: argparse.ArgumentParser, path: Path) -> None:
    """What could not be drawn in the end is an error now, before anything is measured."""
    if path.suffix not in SUFFIXES:
        parser.error(f"--plot {path}: a picture's name ends in one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        parser.error(f"--plot {path}: there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")


if __name__ == "__main__":
    sys.exit(main())
