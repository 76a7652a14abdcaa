"""Everything that only a GPU can tell, in one command and one results file: the tests, whole models, every kernel.

    python benchmarks/gpu.py --json benchmarks/results/DATE-gpu.json         nine minutes at the most, see --minutes
    python benchmarks/gpu.py --quick --device cpu                            tiny sizes: does it all run?
    python benchmarks/gpu.py --table                                         the README's table, from the newest results file

In this order, each part written to the file as soon as it is there, and left out (and named) where the time is up; the same command
goes on then with what is missing (what failed is not tried again):

1. the engine's whole suite on the device, `pytest -m gpu`, where a skip is a failure;
2. VGG-16, ResNet-18 and ResNet-50 at batch 64 and 224 x 224, ResNet-20 at batch 128 and 32 x 32: inference and a training step in
   float32, TF32 and bfloat16, beside PyTorch eager on the same device in both of its memory formats (cudnn.benchmark on); the step
   captured as a CUDA graph (not VGG-16's, whose dropout is drawn on the host); and both by im2col alone, without Winograd.
   One repetition of each side in turn, until the device has done all of it; peak memory by each library's own pool; and which
   kernels our time goes to (launches.py);
3. `minicnn bench kernels` on the CPU and the GPU of the machine, at several batches: time, error, share of the roofline, and the
   batch from which on the GPU is faster.

"bf16" is PyTorch's autocast, and here `set_precision("bf16")`: images in bfloat16, weights and sums in float32, of either library.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cases
import launches
import numpy as np
from engine_minicnn import Engine

from minicnn.backend import library_of
from minicnn.bench import results
from minicnn.kernels.cuda import source
from minicnn.kernels.precision import precision
from minicnn.threads import cores

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MODELS = {"vgg16": 64, "resnet18": 64, "resnet50": 64, "resnet20": 128}             # batches
PRECISIONS = "fp32", "tf32", "bf16"
BATCHES = (1, 8, 64)                                                                # of the kernels
# Of the kernels: what `minicnn bench kernels` is asked for, one call for each.
SELECTIONS = (("resnet20",), ("max_pool2d*", "vgg16"),
              ("64x224x224-64x224x224-3x3", "256x56x56-256x56x56-3x3", "512x14x14-512x14x14-3x3", "256x56x56-64x56x56-1x1"))
FORMATS = ("contiguous", "channels_last")
SAME = ("hash", "commit", "quick", "GPU", "CuPy", "PyTorch", "NumPy")               # in all parts of a results file
TIME_IS_UP = "the time was up"

Call = Callable[[], object]


class TimeIsUp(Exception):
    """What is left has to wait for another run."""


# ---------------------------------------------------------------- the parts
def suite(device: str, seconds: float, log: Path) -> dict[str, Any]:
    """How many tests passed on the device, and what failed. The log of what pytest said is kept where not all passed."""
    if device != "cuda":
        return {"left out": "it is for a GPU"}
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-n", str(min(16, cores())), "-p", "no:cacheprovider"]
    status: int | str
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(command, cwd=HERE.parent, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, "MINICNN_REQUIRE_GPU": "1"})
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)      # its workers, too: they would disturb what is timed next
            process.wait()
            status = TIME_IS_UP
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if status == 0:
        log.unlink()
    return verdict(status, lines)


def verdict(status: int | str, lines: list[str]) -> dict[str, Any]:
    """What pytest -v has said, in its summary or as far as it came."""
    if status != TIME_IS_UP:
        return {"exit status": status, "last line": lines[-1].strip("= ") if lines else "",
                "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:50]}
    passed, failed = ([line for line in lines if f"] {word} " in line] for word in ("PASSED", "FAILED"))    # one line a test
    return {"exit status": status, "last line": f"{len(failed)} failed, {len(passed)} passed, then {TIME_IS_UP}",
            "failures": failed[:50]}


def whole_models(device: str, quick: bool, repeats: int, rival: Any, until: float, done: list[Any]) -> Iterator[dict[str, Any]]:
    """A row for each model, task and precision that is not done: seconds of every repetition and peak bytes, by side."""
    for name, batch in MODELS.items():
        for how in PRECISIONS if device != "cpu" else ("fp32",):
            for task in ("inference", "training step"):
                if (name, task, how) in done:
                    continue
                case = cases.model(name, quick, None if quick else batch)[("inference", "training step").index(task)]
                if time.monotonic() > until:
                    raise TimeIsUp
                with precision(how):
                    sides = sides_of(name, case, task, how, device, rival)
                    row = {"model": name, "task": task, "precision": how, "batch": case.batch,
                           **measured(sides, device, repeats, rival)}
                print(line_of(row), flush=True)
                if row.get("kernels"):
                    print(f"{'':24} {launches.in_words(row['kernels'])}", flush=True)
                yield row


def sides_of(name: str, case: Any, task: str, how: str, device: str, rival: Any) -> dict[str, Callable[[], Call]]:
    """What prepares each side's call of a model: ours in each variant that is worth the time, PyTorch's in each format."""
    variants = [""]
    if device != "cpu" and task == "training step" and name != "vgg16":
        variants.append("captured")
    if device != "cpu" and how != "bf16":       # "auto" decides by a rule that is not measured
        variants.append("im2col")
    sides = {variant or "minicnn": lambda variant=variant: call_of(Engine(cores(), variant, device), case, task)
             for variant in variants}
    if rival is not None:
        sides |= {f"PyTorch {form}": lambda form=form: rival.prepare(case, task, form, how) for form in FORMATS}
    return sides


def measured(sides: dict[str, Callable[[], Call]], device: str, repeats: int, rival: Any) -> dict[str, Any]:
    """Seconds and peak bytes of each side, one repetition in turn; a side that cannot says why."""
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    problems: dict[str, str] = {}
    calls: dict[str, Call] = {}

    def trying(what: str, work: Callable[[], Any]) -> Any:
        """What it gives; where it cannot, mostly for want of memory, it says why and the others go on."""
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            problems[what] = f"{type(error).__name__}: {str(error)[:300]}"
            return None

    def warm_up(side: str, prepare: Callable[[], Call]) -> None:
        with rival.memory() if side.startswith("PyTorch") else peak_of(device)() as peak:
            call = prepare()
            for _ in range(2):                          # compiles, and lets cuDNN choose
                call()
            synchronize(device)
        calls[side], peaks[side], seconds[side] = call, peak[0], []

    for side, prepare in sides.items():
        trying(side, partial(warm_up, side, prepare))
    for i in range(repeats):
        for side in list(calls) if i % 2 == 0 else list(calls)[::-1]:
            taken = trying(side, partial(seconds_of, calls[side], device))
            if taken is None:
                del calls[side]
            else:
                seconds[side].append(taken)
    found = {"seconds": seconds, "peak_bytes": peaks, "problems": problems}
    if device == "cuda" and "minicnn" in calls:
        found["kernels"] = trying("kernels", partial(launches.of, calls["minicnn"]))
    return found


def call_of(engine: Any, case: Any, task: str) -> Call:
    """The call to time, of a library's own engine: a model on the device, with its input there."""
    prepare, run = engine.tasks(case)[task]
    return partial(run, prepare())


class PyTorch:
    """PyTorch eager on the same device, as its users run it."""

    def __init__(self, device: str) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.engine: Any = importlib.import_module("engine_pytorch")
        self.device = device
        self.torch.backends.cudnn.benchmark = True

    def prepare(self, case: Any, task: str, form: str, how: str) -> Call:
        """The call to time; TF32 on or off for convolutions and products alike, bfloat16 by autocast."""
        torch = self.torch
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = how == "tf32"
        cast = torch.autocast(self.device, torch.bfloat16, enabled=how == "bf16")
        return call_of(self.engine.Engine(cores(), form, self.device, cast), case, task)

    @contextlib.contextmanager
    def memory(self) -> Iterator[list[int]]:
        """Collects the most bytes that PyTorch had reserved in the block."""
        peak = [0]
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            before = self.torch.cuda.memory_reserved()
            self.torch.cuda.reset_peak_memory_stats()
        yield peak
        if self.device == "cuda":
            peak[0] = self.torch.cuda.max_memory_reserved() - before


def kernels(device: str, quick: bool, until: float, found: dict[str, Any], keep: Call) -> None:
    """Into `found`: the rows of `minicnn bench kernels` at each batch, its rooflines, and where the GPU begins to win."""
    found |= {"done": [], "rows": [], "roofline": {}, "problems": []} | found
    selections = SELECTIONS[:1] if quick else SELECTIONS
    for batch, words in [(batch, words) for batch in (BATCHES[:1] if quick else BATCHES) for words in selections]:
        name = f"{' '.join(words)}, batch {batch}"
        if name in found["done"]:
            continue
        if time.monotonic() > until:
            raise TimeIsUp
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernels.json")
            command = [sys.executable, "-m", "minicnn", "bench", "kernels", *words, "--batch", str(batch),
                       "--backend", "auto" if device == "cuda" else "cpu", "--repeats", "3", "--json", str(file)]
            done = subprocess.run([*command, *["--quick"] * quick], capture_output=True, text=True, check=False,
                                  timeout=max(1.0, until - time.monotonic()))
            if done.returncode:
                found["problems"].append(f"{name}: {done.stderr.strip()[-300:]}")
                print(found["problems"][-1], flush=True)
            if file.exists():
                document = results.read(str(file))
                found["rows"] += document["results"]
                found["roofline"] |= document["roofline"]
                if device not in document["roofline"]:
                    found["problems"].append(f"{name}: on the CPU alone. {done.stderr.strip()[-300:]}")
                found["the GPU is faster from batch"] = crossings(found["rows"])
        found["done"].append(name)
        keep()


def crossings(rows: list[dict[str, Any]]) -> dict[str, int | None]:
    """{kernel at a shape: the smallest batch measured at which the GPU's best algorithm beats the CPU's best; None: at none}"""
    best: dict[tuple[str, int, str], float] = {}
    for row in rows:
        if row["seconds"]:
            key = (f"{row['kernel']} {row['shape']}", row["batch"], row["backend"])
            best[key] = min(best.get(key, np.inf), median(row["seconds"]))
    names = dict.fromkeys(name for name, _, backend in best if backend == "cuda")
    return {name: next((batch for batch in sorted({b for n, b, _ in best if n == name})
                        if best.get((name, batch, "cuda"), np.inf) < best.get((name, batch, "cpu"), 0)), None) for name in names}


# ---------------------------------------------------------------- the device
def seconds_of(call: Call, device: str) -> float:
    """By the wall clock; on a GPU until all that it asked for is done, on whichever library's stream."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for all streams of the device, whosever they are."""
    if device == "cuda":
        library_of(device).cuda.runtime.deviceSynchronize()


def peak_of(device: str) -> Callable[[], Any]:
    """A context that collects the bytes by which CuPy's pool had to grow."""
    @contextlib.contextmanager
    def context() -> Iterator[list[int]]:
        peak, pool = [0], None
        if device != "cpu":
            pool = library_of(device).get_default_memory_pool()
            pool.free_all_blocks()
            before = pool.total_bytes()
        yield peak
        if pool is not None:
            peak[0] = int(pool.total_bytes() - before)
    return context


# ---------------------------------------------------------------- in words
def line_of(row: dict[str, Any]) -> str:
    """A row for people: milliseconds by side, and the speed-up over the faster of PyTorch's."""
    times = "  ".join(f"{side} {1e3 * median(s):8.2f} ms" for side, s in row["seconds"].items() if s)
    faster = speed_up(row)
    return (f"{row['model']:9} {row['task']:13} {row['precision']}  {times}"
            + ("" if faster is None else f"  speed-up {faster:.2f}")
            + "".join(f"  {side}: {why}" for side, why in row["problems"].items()))


def speed_up(row: dict[str, Any], ours: str = "minicnn") -> float | None:
    """PyTorch's time in its faster format over ours, of medians; None where one of us is missing."""
    rivals = [median(s) for side, s in row["seconds"].items() if side.startswith("PyTorch") and s]
    return min(rivals) / median(row["seconds"][ours]) if rivals and row["seconds"].get(ours) else None


def newest(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The newest results of a GPU in the folder."""
    files = sorted(folder.glob("*-gpu.json"))
    return json.loads(files[-1].read_text()) if files else None


def table(found: dict[str, Any] | None) -> str:
    """What the README says of the GPU: a table of the results file's figures, and whether they are of this very code."""
    if found is None:
        return ("**It has not run on a GPU yet**: there is no results file, so there are no figures. What is known comes from a "
                "CPU, by `tests/test_cuda_kernels.py` and `tests/hostcuda/`.")
    facts = found["environment"]
    same = found["hash"] == source.digest()
    lines = [f"On {facts.get('GPU', 'no GPU')}, {facts['date'][:10]}, commit {facts.get('commit', 'unknown')}: "
             + ("" if same else "**these figures are not of this code**, the GPU's files have changed since. ")
             + f"tests: {found.get('suite', {}).get('last line') or 'not run'}. Milliseconds a batch, and speed-up over PyTorch "
             f"{facts.get('PyTorch', '')} in the faster of its memory formats; captured: the step as a CUDA graph, its speed-up in "
             "brackets:", "",
             "| | batch | precision | inference | PyTorch | speed-up | training step | captured | PyTorch | speed-up | peak GB "
             "| PyTorch |",
             "| --- " * 12 + "|"]
    rows = {(r["model"], r["precision"], r["task"]): r for r in found.get("models", [])}
    for name, how in dict.fromkeys((r["model"], r["precision"]) for r in found.get("models", [])):
        cells = [name, str(MODELS.get(name, "")), how]
        for task in ("inference", "training step"):
            row = rows.get((name, how, task), {"seconds": {}, "peak_bytes": {}})
            mine, faster = row["seconds"].get("minicnn"), speed_up(row)
            cells += [f"{1e3 * median(mine):.2f}" if mine else "-"]
            if task == "training step":
                captured, as_graph = row["seconds"].get("captured"), speed_up(row, "captured")
                cells += [(f"{1e3 * median(captured):.2f}" if captured else "-") + (f" ({as_graph:.2f})" if as_graph else "")]
            cells += [f"{1e3 * median(mine) * faster:.2f}" if faster else "-", f"**{faster:.2f}**" if faster else "-"]
        peaks = row["peak_bytes"]
        theirs = [p for side, p in peaks.items() if side.startswith("PyTorch")]
        cells += [f"{peaks['minicnn'] / 1e9:.2f}" if "minicnn" in peaks else "-", f"{min(theirs) / 1e9:.2f}" if theirs else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command
def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.table:
        print(table(newest()))
        return 0
    until = time.monotonic() + 60 * args.minutes
    launches.end_without("gpu.py", args.device)
    rival = None
    with contextlib.suppress(ImportError):
        rival = PyTorch("cuda" if args.device == "cuda" else "cpu") if not args.no_pytorch else None
    facts = results.environment(cores(), [args.device]) | ({"commit": args.commit} if args.commit else {})
    if rival is not None:
        facts["PyTorch"] = str(rival.torch.__version__)
    found: dict[str, Any] = {"environment": facts, "hash": source.digest(), "quick": args.quick, "models": [], "kernels": {}}
    if args.json is not None:
        found = begun(args.json, found)
    keep = (lambda: None) if args.json is None else (lambda: results.write(str(args.json), found))
    try:
        if not args.quick and found.get("suite", {}).get("exit status", TIME_IS_UP) == TIME_IS_UP:
            log = Path(tempfile.gettempdir(), "gpu.tests.log") if args.json is None else args.json.with_suffix(".tests.log")
            found["suite"] = suite(args.device, max(10.0, 0.4 * 60 * args.minutes), log)
            print(f"tests: {found['suite']}", flush=True)
            keep()
        done = [(row["model"], row["task"], row["precision"]) for row in found["models"]]
        for row in whole_models(args.device, args.quick, 2 if args.quick else 7, rival, until - 90, done):
            found["models"].append(row)
            keep()
        kernels(args.device, args.quick, until - 15, found["kernels"], keep)
    except (TimeIsUp, subprocess.TimeoutExpired):
        found["left out"] = f"what is not here: {TIME_IS_UP}"
        print(found["left out"])
    keep()
    print(f"\n{table(found)}")
    return 1 if found.get("suite", {}).get("exit status") or found.get("kernels", {}).get("problems") else 0


def begun(file: Path, new: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same code on the same machine has left in the file; `new` where it left nothing."""
    def told(found: dict[str, Any], name: str) -> Any:
        return found[name] if name in found else found["environment"].get(name)

    if not file.exists() or not file.stat().st_size:
        return new
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        other = [f"{name} {told(before, name)}, not {told(new, name)}" for name in SAME if told(before, name) != told(new, name)]
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"gpu.py: {file} is not one of its results files: name another") from error
    if other:
        raise SystemExit(f"gpu.py: {file} cannot be gone on with, for it is of {'; '.join(other)}: name another file")
    before.pop("left out", None)
    return {**before, "gone on": [*before.get("gone on", []), new["environment"]["date"]]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the tests and time everything on a GPU.")
    parser.add_argument("--device", default="cuda", help="cuda; or cpu, to see that it runs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no tests: shows that it runs, measures nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="what is not done by then is left out (default: %(default)s)")
    parser.add_argument("--no-pytorch", action="store_true", help="minicnn alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there; what is there already is gone on with")
    parser.add_argument("--commit", help="which commit this is, where the files lie without their history")
    parser.add_argument("--table", action="store_true", help="print the README's table, from the newest results file")
    args = parser.parse_args(arguments)
    if args.json is not None:
        results.can_write(str(args.json))
    return args


if __name__ == "__main__":
    sys.exit(main())
