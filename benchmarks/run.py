"""Time minicnn beside PyTorch: every operation at real layers' shapes, and whole models.

    python benchmarks/run.py                             everything, in some minutes
    python benchmarks/run.py --quick                     tiny sizes: does it all run?
    python benchmarks/run.py --models resnet20 --ops     one model, no operation
    python benchmarks/run.py --models --ops conv2d       the convolutions alone
    python benchmarks/run.py --ops --plain               the models, beside whole-batch im2col in plain NumPy, too

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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import cases
import report
from cases import Case
from report import OURS, Measurement

HERE = Path(__file__).parent
KILLED = -9                     # how a process ends that Linux stops because memory has run out


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
PLAIN = Side("plain", "", "engine_plain")


class WorkerFailed(RuntimeError):
    """A library could not do what it was asked to."""


class OutOfMemory(WorkerFailed):
    """Nor could it for lack of memory: the case is too large for this library here, and nothing else is wrong."""


class Worker:
    """The process of one side. Use as a context manager: it ends with the block."""

    def __init__(self, side: Side, threads: int) -> None:
        self.side, self.threads = side, threads
        self.process = self._start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def restart(self) -> None:
        """A fresh process, which holds nothing, in place of this one."""
        self.__exit__()
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, HERE / "worker.py", self.side.engine, self.side.variant, str(self.threads)],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request, wait for its answer. WorkerFailed where it reports an error or has died: OutOfMemory if of that."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            failure = OutOfMemory if code == KILLED else WorkerFailed
            raise failure(f"the process of {self.side.name} ended with code {code} when asked for {_in_words(request)}"
                          + "; it was killed, mostly for a lack of memory" * (code == KILLED))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            failure = OutOfMemory if answer["memory"] else WorkerFailed
            raise failure(f"{self.side.name}, asked for {_in_words(request)}: {answer['error']}")
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

    @classmethod
    def of(cls, args: argparse.Namespace) -> Care:
        return cls(args.repeats, shortest=0.0, rest=False) if args.quick else cls(args.repeats, shortest=0.02, rest=True)


def measure(case: Case, workers: Sequence[Worker], care: Care) -> list[Measurement]:
    """Every task of a case, by every worker in turn that has the task. Who lacks memory for the case leaves it to the others."""
    lacking: dict[str, str] = {}                                            # who ran out of memory, and how it said so

    def ask(worker: Worker, **request: Any) -> dict[str, Any]:
        """The answer, after which its threads sleep; {} from who has run out of memory, now or before."""
        if worker.side.name in lacking:
            return {}
        try:
            answer = worker.ask(**request)
            if care.rest:
                worker.ask(do="rest")
        except OutOfMemory as error:
            lacking[worker.side.name] = str(error)
            worker.restart()
            return {}
        return answer

    able: dict[str, list[Worker]] = {task: [] for task in case.tasks}
    for worker in workers:
        for task in ask(worker, do="prepare", case=asdict(case), shortest=care.shortest).get("tasks", ()):
            able.setdefault(task, []).append(worker)
    measured = []
    for task, those in able.items():
        seconds: dict[str, list[float]] = {worker.side.name: [] for worker in those}
        for i in range(care.repeats):
            for worker in those if i % 2 == 0 else reversed(those):         # forth and back: a drift favours nobody
                if answer := ask(worker, do="repeat", task=task):
                    seconds[worker.side.name].append(answer["seconds"])
        complete = {name: times for name, times in seconds.items() if name not in lacking}
        measured.append(Measurement(case.name, case.kind, case.batch, task, complete, out_of_memory=dict(lacking)))
    if not measured:
        raise OutOfMemory("; ".join(lacking.values()))
    return measured


def add_peak_memory(case: Case, step: Measurement, sides: Sequence[Side], threads: int) -> None:
    """Of a training step, by each library's faster side, each in a fresh process."""
    fastest = {step.fastest(side.library) for side in sides}
    for side in sides:
        if side.name in fastest:
            with Worker(side, threads) as fresh:
                try:
                    step.peak_bytes[side.name] = fresh.ask(do="memory", case=asdict(case))["bytes"]
                except OutOfMemory as error:
                    step.out_of_memory[side.name] = str(error)


def run(selected: Sequence[Case], workers: Sequence[Worker], care: Care, threads: int) -> Iterator[Measurement]:
    for case in progress(selected):
        measured = measure(case, workers, care)
        for measurement in measured:
            if measurement.task == "training step":
                add_peak_memory(case, measurement, [worker.side for worker in workers], threads)
            yield measurement


class Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def progress(selected: Sequence[N]) -> Iterator[N]:
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
    care = Care.of(args)
    sides = (*SIDES, PLAIN) if args.plain else SIDES
    measured: list[Measurement] = []
    surroundings: dict[str, Any] = {}
    with kept() as problems, ExitStack() as running:
        workers, versions = greet([running.enter_context(Worker(side, args.threads)) for side in sides])
        surroundings = report.environment(args.threads, versions)
        for measurement in run(selected, workers, care, args.threads):
            measured.append(measurement)
    if measured:                                    # also what was measured before something failed
        print(report.text(surroundings, measured, args.repeats))
        if args.json is not None:
            write(args.json, report.document(surroundings, measured, args.repeats))
    return status(problems)


@contextmanager
def kept() -> Iterator[list[str]]:
    """What stops the block, a failure or Ctrl-C, goes into the list: what was measured until then is still reported."""
    problems: list[str] = []
    try:
        yield problems
    except WorkerFailed as error:
        problems.append(str(error))
    except KeyboardInterrupt:
        problems.append("interrupted")


def status(problems: Sequence[str]) -> int:
    """The process's exit status, after saying what stopped it."""
    for problem in problems:
        print(f"stopped: {problem}", file=sys.stderr)
    return 1 if problems else 0


def write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time minicnn beside PyTorch, where that is installed.")
    for name, choices in (("--models", tuple(cases.MODELS)), ("--ops", cases.OPERATIONS)):
        parser.add_argument(name, nargs="*", choices=choices, default=choices, help="all by default; the flag alone: none")
    parser.add_argument("--plain", action="store_true",
                        help="models also by whole-batch im2col in plain NumPy, which is slow and takes much memory")
    parser.add_argument("--threads", type=positive, default=cores(), help="of each library (default: %(default)s, the cores)")
    parser.add_argument("--batch", type=positive,
                        help=f"images a batch (default: {cases.BATCH}; models at what they are compared at)")
    return parse_common(parser, arguments)


def parse_common(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """With what every benchmark is asked: how quickly, how often, and where to write."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes and 2 repeats: shows that it runs, measures nothing")
    parser.add_argument("--repeats", type=positive, help="repetitions of each task, the median of which counts (default 7)")
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


def positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of at least 1")
    return int(value)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
