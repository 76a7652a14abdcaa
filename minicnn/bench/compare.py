"""`minicnn bench compare A B`: what changed beyond the noise."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from minicnn.bench import results, tables
from minicnn.bench.measure import Spread
from minicnn.bench.results import Document, Row

LEAST_CHANGE = 0.03             # of the time: a machine drifts by as much between two runs
MEMORY_CHANGE = 0.05            # of the peak memory
SAME_MACHINE = ("CPU", "GPU", "cores", "system")
SAME_SOFTWARE = ("threads", "Python", "NumPy", "BLAS", "CuPy", "PyTorch")
SAME_SETTINGS = ("quick", "repeats")

RULE = (f"changed: the medians differ by more than the sum of both spreads (quartile to quartile), and by more than "
        f"{100 * LEAST_CHANGE:.0f} %")


class Change(NamedTuple):
    """A row of both files whose time or memory is another."""

    name: str
    what: str                   # "time" or "peak memory"
    before: float               # seconds, or bytes
    after: float

    @property
    def ratio(self) -> float:
        """Above 1: better than before."""
        return self.before / self.after

    def __str__(self) -> str:
        if self.what == "time":
            verdict, unit = ("faster" if self.ratio > 1 else "slower"), "ms"
            numbers = f"{tables.milliseconds(self.before)} -> {tables.milliseconds(self.after)}"
        else:
            verdict, unit = ("smaller" if self.ratio > 1 else "larger"), "MB of peak memory"
            numbers = f"{tables.megabytes(self.before)} -> {tables.megabytes(self.after)}"
        return f"{verdict:<8}{max(self.ratio, 1 / self.ratio):6.2f}x  {self.name}: {numbers} {unit}"


def run(a: str, b: str) -> None:
    """Print what changed from file a to file b. Raises OSError, or ResultsError for files that cannot be compared."""
    before, after = results.read(a), results.read(b)
    if before["kind"] != after["kind"]:
        raise results.ResultsError(f"{a} holds {before['kind']} and {b} {after['kind']}: compare two of a kind")
    for path, found in ((a, before), (b, after)):
        print(f"{path}: {_about(found)}")
    for warning in differences(before, after):
        print(f"NOTE  {warning}")
    old, new = ({results.key(found["kind"], row): row for row in found["results"]} for found in (before, after))
    shared = [name for name in old if name in new]
    found_changes = [change for name in shared for change in changes(before["kind"], old[name], new[name])]
    print(RULE + "\n")
    for change in sorted(found_changes, key=lambda change: change.ratio):
        print(change)
    changed = len({change.name for change in found_changes})
    print(f"{changed} of {len(shared)} changed; {len(shared) - changed} within the noise" if shared else "nothing is in both files")
    for path, only in ((a, old.keys() - new.keys()), (b, new.keys() - old.keys())):
        if only:
            print(f"only in {path}: {len(only)}, such as {' '.join(str(part) for part in min(only, key=str) if part)}")


def changes(kind: str, old: Row, new: Row) -> Iterator[Change]:
    """What differs beyond the noise between two rows of one name."""
    name = results.name(kind, new)
    if bool(old["seconds"]) != bool(new["seconds"]):
        return                                                  # one of them was not timed: no change of speed
    if old["seconds"]:
        a, b = Spread.of(old["seconds"]), Spread.of(new["seconds"])
        if abs(a.median - b.median) > max(a.width + b.width, LEAST_CHANGE * min(a.median, b.median)):
            yield Change(name, "time", a.median, b.median)
    before, after = old.get("peak_bytes"), new.get("peak_bytes")
    if before and after and abs(before - after) > MEMORY_CHANGE * min(before, after):
        yield Change(name, "peak memory", before, after)


def differences(before: Document, after: Document) -> Iterator[str]:
    """What else is another, so that a change may not be the code's: a sentence each."""
    for fields, part, meaning in ((SAME_MACHINE, "environment", "other machines: what differs is not the code's alone"),
                                  (SAME_SOFTWARE, "environment", "other versions or threads"),
                                  (SAME_SETTINGS, "settings", "other settings")):
        differ = [f"{name} {_said(before[part], name)} / {_said(after[part], name)}" for name in fields
                  if before[part].get(name) != after[part].get(name)]
        if differ:
            yield f"{meaning}: {'; '.join(differ)}"
    if before["settings"].get("quick") or after["settings"].get("quick"):
        yield "measured with --quick, which shows that everything runs and measures nothing"


def _said(fields: dict[str, Any], name: str) -> str:
    return str(fields.get(name, "none"))


def _about(found: Document) -> str:
    surroundings = found["environment"]
    facts = [str(surroundings[name]) for name in ("date", "CPU") if name in surroundings]
    commit = f"commit {surroundings['commit']}" if "commit" in surroundings else f"minicnn {surroundings.get('minicnn', '?')}"
    threads = surroundings.get("threads", "?")
    return ", ".join([*facts, commit, f"{threads} thread{'' if threads == 1 else 's'}", f"{len(found['results'])} {found['kind']}"])
