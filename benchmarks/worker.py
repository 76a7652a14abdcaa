"""One library, in a process of its own, that does one thing at a time when it is asked to.

    python worker.py ENGINE VARIANT THREADS

reads requests from standard input, one JSON object a line, and answers each by one line. Between requests it sleeps.

    {"do": "hello"}                            -> {"versions": {...}}, or {"missing": "why"} where the library is not installed
    {"do": "prepare", "case": {...},
                      "shortest": 0.02}        -> {"tasks": [...]}    builds and warms up; forgets the case before
    {"do": "repeat", "task": "forward"}        -> {"seconds": ...}    one repetition, in seconds a call
    {"do": "rest"}                             -> {}                  when its threads have stopped spinning
    {"do": "memory", "case": {...}}            -> {"bytes": ...}      peak of this process; ask a fresh one, once
    anything that fails                        -> {"error": "..."}, with "memory": true where there was not enough of it

ENGINE is a module here with a class `Engine(threads, variant)`, which has `versions() -> {name: version}` and
`tasks(case) -> {name: Task}`. A new rival, or another backend, is one such file and one line in run.py.
"""
from __future__ import annotations

import importlib
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from cases import Case
from timing import Task, fall_asleep, once, repetition, warm_up


class Engine(Protocol):
    def versions(self) -> dict[str, str]: ...
    def tasks(self, case: Case) -> dict[str, Task]: ...


class Bench:
    """An engine, and the case that it holds ready."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tasks: dict[str, Task] = {}
        self.calls: dict[str, int] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "hello":
                return {"versions": self.engine.versions()}
            case "prepare":
                self.tasks = {}                                         # free the last one's memory first
                case = Case(**request["case"])
                self.tasks = {name: task for name, task in self.engine.tasks(case).items() if not case.tasks or name in case.tasks}
                self.calls = {name: warm_up(task, request["shortest"]) for name, task in self.tasks.items()}
                return {"tasks": list(self.tasks)}
            case "repeat":
                name = request["task"]
                return {"seconds": repetition(self.tasks[name], self.calls[name])}
            case "rest":
                fall_asleep()
                return {}
            case "memory":
                step = self.engine.tasks(Case(**request["case"]))["training step"]
                for _ in range(2):                                      # the second has the optimiser's memory beside it
                    once(step)
                return {"bytes": peak_memory()}
        raise ValueError(f"no such request: {request}")


def peak_memory() -> int | None:
    """The most memory that was ever resident in this process, in bytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024            # macOS counts bytes, Linux kibibytes


def is_lack_of_memory(error: Exception) -> bool:
    """A MemoryError, or what PyTorch raises in its place: a RuntimeError that says so."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def first_to_go() -> Iterator[None]:
    """Should memory run out in the block, Linux ends this process, which asks for more, not a large one that waits its turn."""
    score, before = Path("/proc/self/oom_score_adj"), ""
    with suppress(OSError):                                             # another system, or one that does not let us
        before = score.read_text()
        score.write_text("1000")
    try:
        yield
    finally:
        with suppress(OSError):
            if before:
                score.write_text(before)


def main() -> None:
    module, variant, threads = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)                        # Ctrl-C is the parent's to hear; it ends its workers
    answers, sys.stdout = sys.stdout, sys.stderr                        # what a library prints must not mix with the answers
    bench: Bench | None = None
    for line in sys.stdin:
        try:
            with first_to_go():
                bench = bench or Bench(importlib.import_module(module).Engine(int(threads), variant))
                answer = bench.answer(json.loads(line))
        except Exception as error:
            kind = "missing" if bench is None and isinstance(error, ModuleNotFoundError) else "error"
            answer = {kind: f"{type(error).__name__}: {error}", "memory": is_lack_of_memory(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
