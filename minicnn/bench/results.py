"""What is kept of a measurement: a JSON file with every repetition and all that the numbers depend on."""
from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

import minicnn
from minicnn import backend
from minicnn.kernels.precision import get_precision
from minicnn.threads import cores
from minicnn.weights import atomically

FORMAT = "minicnn bench 1"
KINDS = ("kernels", "models")
LAYER_PARTS = ("inference", "forward", "backward")          # of a layer by itself, in seconds; the last two are training's
Document = dict[str, Any]
Row = dict[str, Any]


class ResultsError(ValueError):
    """A file that holds no results of `minicnn bench`."""


# ---------------------------------------------------------------- surroundings
def environment(threads: int, devices: list[str]) -> dict[str, Any]:
    """What the numbers depend on: versions, BLAS, processor, GPU, threads, commit, date."""
    facts: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"), "minicnn": minicnn.__version__, "commit": _commit(),
        "Python": platform.python_version(), "NumPy": np.__version__, "BLAS": _blas(), "system": platform.platform(),
        "CPU": _cpu(), "cores": cores(), "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None}
    if "cuda" in devices:
        gpu = backend.cuda_status().facts
        facts |= {"GPU": gpu.get("device"), "CuPy": gpu.get("CuPy"), "CUDA of the driver": gpu.get("CUDA of the driver"),
                  "precision": get_precision()}
    return {name: value for name, value in facts.items() if value is not None}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _blas() -> str:
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    pools.sort(key=lambda pool: "numpy" not in pool["filepath"])            # SciPy and others may have brought their own
    if pools:
        return " ".join(str(pools[0][key]) for key in ("internal_api", "version", "architecture") if pools[0].get(key))
    build: Any = np.show_config(mode="dicts")
    return str(build["Build Dependencies"]["blas"]["name"])


def _commit() -> str | None:
    """The commit of the checkout that this package is a part of, with a + where files differ from it; None elsewhere."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(minicnn.__file__).parent, capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", "__init__.py")                   # an installed copy may lie in somebody else's checkout
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# ---------------------------------------------------------------- files
def document(kind: str, surroundings: dict[str, Any], settings: dict[str, Any], rows: list[Row], **more: Any) -> Document:
    """What is written: see the fields. `more`: what only this kind has."""
    return {"format": FORMAT, "kind": kind, "environment": surroundings, "settings": settings, **more, "results": rows}


def can_write(path: str) -> None:
    """Raises OSError where this file cannot be written: before an hour of measuring, not after."""
    existed = os.path.lexists(path)
    with open(path, "a", encoding="utf-8"):
        pass
    if not existed:
        os.unlink(path)


def write(path: str, content: Document) -> None:
    """Write the file in one step; what was there stays until the new one is whole."""
    def fill(temporary: str) -> None:
        Path(temporary).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    atomically(path, fill)


def read(path: str) -> Document:
    """What `write` wrote. Raises OSError, or ResultsError for a file that is something else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ResultsError(f"{path} is not JSON ({error}); give a file written by `minicnn bench ... --json FILE`") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("kind") not in KINDS:
        raise ResultsError(f"{path} holds no results of this version: give a file written by `minicnn bench ... --json FILE`")
    problem = _problem(found)
    if problem:
        raise ResultsError(f"{path} is damaged: {problem}")
    return found


def _problem(found: Document) -> str | None:
    """What is wrong with a file's fields, in words."""
    if not (isinstance(found.get("environment"), dict) and isinstance(found.get("settings"), dict)):
        return "environment and settings must be objects"
    rows = found.get("results")
    if not isinstance(rows, list):
        return "results must be a list"
    for i, row in enumerate(rows):
        seconds = row.get("seconds") if isinstance(row, dict) else None
        if not isinstance(seconds, list) or not all(_is_time(s) for s in seconds):
            return f"results[{i}] has no list of seconds"
        missing = [key for key in KEYS[found["kind"]] if not isinstance(row.get(key), (str, int))]
        if missing:
            return f"results[{i}] does not say its {', '.join(missing)}"
        wrong = [key for key in ("operations", "least_bytes", "peak_bytes") if not isinstance(row.get(key), (int, type(None)))]
        wrong += [] if _are_layers(row.get("layers", [])) else ["layers"]
        if wrong:
            return f"results[{i}] has no numbers for its {', '.join(wrong)}"
    roofs = found.get("roofline", {})
    if not isinstance(roofs, dict) or not all(isinstance(r, dict) and _is_time(r.get("gflops")) and _is_time(r.get("gbytes"))
                                              for r in roofs.values()):
        return "roofline must give gflops and gbytes for each device"
    return None


def _are_layers(layers: Any) -> bool:
    return isinstance(layers, list) and all(isinstance(layer, dict) and isinstance(layer.get("kind"), str) and all(
        _is_time(layer.get(part)) or layer.get(part) == 0 for part in LAYER_PARTS) for layer in layers)


def _is_time(value: Any) -> bool:
    """Whether it is a number above 0, and finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


KEYS = {"kernels": ("kernel", "algorithm", "shape", "batch", "backend"), "models": ("model", "task", "batch", "backend")}


def key(kind: str, row: Row) -> tuple[Any, ...]:
    """What tells a row from the others of its file."""
    return tuple(row[name] for name in KEYS[kind])


def name(kind: str, row: Row) -> str:
    """The same in words, for a person."""
    words = [str(row[name]) for name in KEYS[kind] if name not in ("batch", "backend") and row[name]]
    return " ".join([*words, f"batch {row['batch']}", *([row["backend"]] if row["backend"] != "cpu" else [])])
