"""Time minicnn beside PyTorch: every operation at real layers' shapes, and whole models.

    python benchmarks/run.py                             everything, in some minutes
    python benchmarks/run.py --quick                     tiny sizes: does it all run?
    python benchmarks/run.py --models resnet20 --ops     one model, no operation
    python benchmarks/run.py --models --ops conv2d       the convolutions alone

How it measures: each library is a process of its own (worker.py), PyTorch one for each of its memory formats. For every
task all are warmed up, then asked for one repetition at a time, in turn, while the others sleep; so a slow minute of
the machine hits all alike, and no library's spinning threads disturb another. Medians are shown.

This process imports no numerical library: a child's peak memory counts from that of the process that started it.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import cases
import report
from cases import Case
from report import OURS, Measurement

HERE = Path(__file__).parent


class Side(NamedTuple):
    """Who takes part: a library (no spaces), in a variant or "", measured by a module of this folder."""

    library: str
    variant: str
    engine: str

    @property
    def name(self) -> str:
        return f"{self.library} {self.variant}".rstrip()


SIDES = (Side(OURS, "", "engine_minicnn"),
         Side("PyTorch", "contiguous", "engine_pytorch"),
         Side("PyTorch", "channels_last", "engine_pytorch"))


class WorkerFailed(RuntimeError):
    """A library could not do what it was asked to."""


class Worker:
    """The process of one side. Use as a context manager: it ends with the block."""

    def __init__(self, side: Side, threads: int) -> None:
        self.side = side
        self.process = subprocess.Popen([sys.executable, HERE / "worker.py", side.engine, side.variant, str(threads)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request, wait for its answer. WorkerFailed where it reports an error or has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerFailed(f"the process of {self.side.name} ended with code {self.process.wait()} when asked for "
                               f"{_in_words(request)}; -9 is mostly a lack of memory: try a smaller --batch")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"{self.side.name}, asked for {_in_words(request)}: {answer['error']}")
        return answer


def _in_words(request: dict[str, Any]) -> str:
    case = request.get("case")
    return " ".join([request["do"], *([case["name"]] if case else []), *([request["task"]] if "task" in request else [])])


# ---------------------------------------------------------------- measuring
class Care(NamedTuple):
    """How carefully to measure."""

    repeats: int                # repetitions of each task
    shortest: float             # seconds that a repetition takes at least: short tasks are called again and again
    rest: bool                  # whether a worker's threads must be asleep before the next worker begins


def measure(case: Case, workers: Sequence[Worker], care: Care) -> list[Measurement]:
    """Every task of a case, by every worker in turn."""
    for worker in workers:
        tasks = worker.ask(do="prepare", case=asdict(case), shortest=care.shortest)["tasks"]
        if care.rest:
            worker.ask(do="rest")
    measured = []
    for task in tasks:
        seconds: dict[str, list[float]] = {worker.side.name: [] for worker in workers}
        for i in range(care.repeats):
            for worker in workers if i % 2 == 0 else reversed(workers):     # forth and back: a drift favours nobody
                seconds[worker.side.name].append(worker.ask(do="repeat", task=task)["seconds"])
                if care.rest:
                    worker.ask(do="rest")
        measured.append(Measurement(case.name, case.kind, case.batch, task, seconds))
    return measured


def add_peak_memory(case: Case, step: Measurement, threads: int) -> None:
    """Of a training step, by each library's faster side, each in a fresh process."""
    fastest = {step.fastest(side.library) for side in SIDES}
    for side in SIDES:
        if side.name in fastest:
            with Worker(side, threads) as fresh:
                step.peak_bytes[side.name] = fresh.ask(do="memory", case=asdict(case))["bytes"]


def run(selected: Sequence[Case], workers: Sequence[Worker], care: Care, threads: int) -> Iterator[Measurement]:
    for case in progress(selected):
        measured = measure(case, workers, care)
        for measurement in measured:
            if measurement.task == "training step":
                add_peak_memory(case, measurement, threads)
            yield measurement


def progress(selected: Sequence[Case]) -> Iterator[Case]:
    """Show on standard error how far it is: a bar where tqdm is installed, else a line a case."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        for i, case in enumerate(selected):
            print(f"{i + 1}/{len(selected)} {case.name}", file=sys.stderr, flush=True)
            yield case
        return
    with tqdm(selected, unit="case", file=sys.stderr) as bar:
        for case in bar:
            bar.set_postfix_str(case.name)
            yield case


def greet(workers: Sequence[Worker]) -> tuple[list[Worker], dict[str, str]]:
    """The workers whose library is installed, and the libraries' versions; says who is missing."""
    present: list[Worker] = []
    versions: dict[str, str] = {}
    missing: dict[str, str] = {}
    for worker in workers:
        answer = worker.ask(do="hello")
        if "missing" in answer:
            missing[worker.side.library] = answer["missing"]
        else:
            present.append(worker)
            versions |= answer["versions"]
    if OURS in missing:
        raise WorkerFailed(f"{OURS} cannot be imported ({missing[OURS]}); to install it: pip install -e . in the project's folder")
    for library, why in missing.items():
        print(f"{library} is not measured: {why}", file=sys.stderr)
    return present, versions


# ---------------------------------------------------------------- the command
def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    selected = select(args)
    care = Care(args.repeats, shortest=0.0, rest=False) if args.quick else Care(args.repeats, shortest=0.02, rest=True)
    measured: list[Measurement] = []
    surroundings: dict[str, Any] = {}
    problem = ""
    try:
        with ExitStack() as running:
            workers, versions = greet([running.enter_context(Worker(side, args.threads)) for side in SIDES])
            surroundings = report.environment(args.threads, versions)
            for measurement in run(selected, workers, care, args.threads):
                measured.append(measurement)
    except WorkerFailed as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted"
    if measured:                                    # also what was measured before something failed
        print(report.text(surroundings, measured, args.repeats))
        if args.json is not None:
            args.json.write_text(json.dumps(report.document(surroundings, measured, args.repeats), indent=1) + "\n")
    if problem:
        print(f"stopped: {problem}", file=sys.stderr)
    return 1 if problem else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time minicnn beside PyTorch, where that is installed.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and 2 repeats: shows that it runs, measures nothing")
    for name, choices in (("--models", tuple(cases.MODELS)), ("--ops", cases.OPERATIONS)):
        parser.add_argument(name, nargs="*", choices=choices, default=choices, help="all by default; the flag alone: none")
    parser.add_argument("--repeats", type=_positive, help="repetitions of each task, the median of which counts (default 7)")
    parser.add_argument("--threads", type=_positive, default=_cores(), help="of each library (default: %(default)s, the cores)")
    parser.add_argument("--batch", type=_positive,
                        help=f"images a batch (default: {cases.BATCH}; models at what they are compared at)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there, too")
    args = parser.parse_args(arguments)
    args.repeats = args.repeats or (2 if args.quick else 7)
    if args.json is not None:
        try:
            args.json.open("a").close()             # now, not after an hour of measuring
        except OSError as error:
            parser.error(f"--json {args.json}: cannot be written ({error.strerror})")
    return args


def select(args: argparse.Namespace) -> list[Case]:
    selected = [case for case in cases.operations(args.quick) if case.kind in args.ops]
    selected = [replace(case, batch=args.batch) for case in selected] if args.batch else selected
    return selected + [case for name in args.models for case in cases.model(name, args.quick, args.batch)]


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of at least 1")
    return int(value)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
