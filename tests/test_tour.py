"""The guided tour, examples/tour.ipynb, runs as a reader runs it, and what it shows is what it would show again.

    python tests/test_tour.py           runs it and keeps the new results

A cell whose numbers differ from machine to machine, or that tells times, is tagged "varies": only the kinds of its results must be
the same.
"""
import html
import json
import os
import re
from pathlib import Path

import pytest

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?")


def executed():
    """The notebook, run in a kernel of its own, with nothing in it but what a reader sees."""
    nbclient = pytest.importorskip("nbclient", reason="running the tour needs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat")
    tour = nbformat.read(TOUR, as_version=4)
    for cell in tour.cells:
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags"}
    tour.metadata = {"kernelspec": tour.metadata["kernelspec"], "language_info": {"name": "python"}}
    client = nbclient.NotebookClient(tour, timeout=300, record_timing=False, coalesce_streams=True,
                                     resources={"metadata": {"path": TOUR.parent}})
    beside = [str(TOUR.parent.parent), os.environ.get("PYTHONPATH", "")]        # the engine that stands beside it, installed or not
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, beside))})
    tour.metadata["language_info"] = {"name": "python"}         # the kernel wrote its version there
    return tour


def shown(cell):
    """[(kind, text)] of what a cell shows; pictures have no text."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found.append((output.name, output.text))
        else:
            found += [(kind, "" if kind.startswith("image/") else data) for kind, data in sorted(output.data.items())]
    return found


def words_and_numbers(text):
    text = html.unescape(text)
    return NUMBER.sub("#", text).split(), [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.mark.slow
def test_it_runs_and_its_results_are_fresh():
    nbformat = pytest.importorskip("nbformat", reason="running the tour needs nbclient and ipykernel")
    for library in ("sklearn", "matplotlib", "ipykernel"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    kept, now = nbformat.read(TOUR, as_version=4), executed()
    for old, new in zip(kept.cells, now.cells, strict=True):
        if old.cell_type != "code":
            continue
        assert [kind for kind, _ in shown(old)] == [kind for kind, _ in shown(new)], old.id
        if "varies" in old.metadata.get("tags", []):
            continue
        for (_, before), (_, after) in zip(shown(old), shown(new), strict=True):
            (old_words, old_numbers), (new_words, new_numbers) = words_and_numbers(before), words_and_numbers(after)
            assert old_words == new_words, f"{old.id}: run `python tests/test_tour.py` to keep the new results"
            assert old_numbers == pytest.approx(new_numbers, rel=1e-3, abs=1e-8), old.id


def test_it_stands_as_a_reader_would_want_it():
    """Run from top to bottom, without an error, and small enough to read as a change."""
    text = TOUR.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)) and len(cells) > 15
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for cell in cells for output in cell["outputs"])
    printed = [line for cell in cells for output in cell["outputs"] for line in output.get("text", [])]
    assert sum("True" in line for line in printed) >= 6 and not any("False" in line for line in printed), "hand and engine agree"
    assert len(text) < 150_000
    assert not re.search(r"""["'`\s(=](/(?:home|root|work|Users|tmp)/\w)""", text)


if __name__ == "__main__":
    pytest.importorskip("nbformat").write(executed(), TOUR)
