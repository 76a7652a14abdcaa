"""`minicnn bench plot`: the roofline and the time by algorithm, or the models and their layers, as a picture for a report.

Drawn by matplotlib on figures of their own: neither pyplot nor a display takes part, and no global setting is touched.
"""
from __future__ import annotations

import importlib
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minicnn.bench import cases, results
from minicnn.bench.measure import Spread
from minicnn.bench.results import Document, Row
from minicnn.plots import new_figure
from minicnn.weights import atomically

SUFFIXES = (".png", ".svg", ".pdf")
MOST_BARS = 14                  # the shapes that take the longest

# Colours that stay apart for colour-blind eyes (Okabe and Ito), one a kind of kernel; marks, one an algorithm.
COLOURS = {"conv2d": "#0072b2", "conv2d_input_grad": "#56b4e9", "conv2d_weight_grad": "#009e73", "linear": "#d55e00",
           "linear_input_grad": "#d55e00", "linear_weight_grad": "#d55e00", "max_pool2d": "#cc79a7", "max_pool2d_grad": "#cc79a7",
           "batch_norm": "#e69f00", "batch_norm_grad": "#e69f00", "residual_add": "#666666", "col2im": "#999999"}
KINDS = {"conv2d": "convolution", "conv2d_input_grad": "its input gradient", "conv2d_weight_grad": "its weight gradient",
         "linear": "linear and its gradients", "batch_norm": "batch norm, both ways", "max_pool2d": "max pool, both ways",
         "residual_add": "residual addition", "col2im": "col2im"}
ALGORITHM_COLOURS = {"im2col": "#9aa5b1", "direct": "#e69f00", "winograd": "#0b62a4", "": "#9aa5b1"}
MARKS = {"im2col": "o", "direct": "s", "winograd": "^", "": "o"}
OTHER = "#444444"
GREY = "#9aa5b1"


def run(file: str, out: str | None = None) -> None:
    """Draw a results file. Raises OSError, ResultsError for a bad file, ValueError for a suffix, ImportError without matplotlib."""
    found = results.read(file)
    path = Path(out) if out is not None else Path(file).with_suffix(".png")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--out {path}: a picture's name ends in one of {', '.join(SUFFIXES)}")
    timed = [row for row in found["results"] if row["seconds"]]
    if not timed:
        raise results.ResultsError(f"{file} holds no row with times: there is nothing to draw")
    draw = _kernels if found["kind"] == "kernels" else _models
    figure = draw(found, timed)
    atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, facecolor="white"))
    print(f"in {path}: {len(timed)} {found['kind']}")


def _about(found: Document, device: str) -> str:
    facts = found["environment"]
    threads = facts.get("threads", "?")
    on_cpu = f"{facts.get('CPU', 'CPU')}, {threads} thread{'' if threads == 1 else 's'}"
    machine = facts.get("GPU", "GPU") if device == "cuda" else on_cpu
    versions = [f"minicnn {facts.get('minicnn', '?')}" + (f" ({facts['commit']})" if "commit" in facts else "")]
    versions += [f"{name} {facts[name]}" for name in ("NumPy", "CuPy") if name in facts]
    quick = ["--quick: sizes that measure nothing"] if found["settings"].get("quick") else []
    return ", ".join([machine, *versions, str(facts.get("date", ""))[:10], *quick])


def _milliseconds(row: Row) -> float:
    return 1e3 * Spread.of(row["seconds"]).median


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _plain_ticks(*sides: Any) -> None:
    """0.25, 1 and 100 instead of powers."""
    for side in sides:
        side.set_major_formatter(lambda value, _: f"{value:g}")
        side.set_minor_formatter(lambda value, _: "")


# ---------------------------------------------------------------- kernels
def _kernels(found: Document, rows: Sequence[Row]) -> Any:
    """On the left a roofline for each device, on the right the convolutions' times by algorithm, the longest first."""
    devices = [device for device in dict.fromkeys(row["backend"] for row in rows) if device in found.get("roofline", {})]
    convolutions = _longest([row for row in rows if row["kernel"] in cases.CONVOLUTIONS])
    maps = [name for name in cases.CONVOLUTIONS if any(row["kernel"] == name for row in convolutions)]
    shapes = len({(row["shape"], row["batch"]) for row in convolutions})
    height = 6.2 * max(1, len(devices))
    figure = new_figure(15.0, max(height, 1.6 + 0.3 * shapes)) if maps else new_figure(9.0, height)
    left, *right = figure.subfigures(1, 2, width_ratios=(1.0, 1.05)) if maps else (figure,)
    for axes, device in zip(_column(left, max(1, len(devices))), devices or ["cpu"], strict=True):
        _roofline(axes, found, [row for row in rows if row["backend"] == device], device)
    if maps:
        _bars(right[0], convolutions, maps)
    return figure


def _column(figure: Any, count: int) -> list[Any]:
    return list(figure.subplots(count, 1, squeeze=False)[:, 0])


def _roofline(axes: Any, found: Document, rows: Sequence[Row], device: str) -> None:
    """Arithmetic intensity against speed, both on logarithmic scales, below the lines that the machine sets."""
    points = [row for row in rows if row.get("operations") and row.get("least_bytes")]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(textwrap.fill(f"Roofline of {_about(found, device)}", 90), loc="left", fontsize=9)
    axes.set_xlabel("arithmetic intensity: operations a byte that must move")
    axes.set_ylabel("speed: GFLOP/s of the definition's operations")
    _plain_ticks(axes.xaxis, axes.yaxis)
    _clean(axes)
    intensities = [row["operations"] / row["least_bytes"] for row in points] or [1.0]
    low, high = min(intensities) / 1.8, max(intensities) * 2.2
    axes.set_xlim(low, high)
    roof = found.get("roofline", {}).get(device)
    if roof:
        _roof_lines(axes, roof["gflops"], roof["gbytes"], low, high)
    seen: dict[str, Any] = {}
    for row in points:
        x, y = row["operations"] / row["least_bytes"], row["operations"] / (1e6 * _milliseconds(row))
        colour = COLOURS.get(row["kernel"], OTHER)
        dots = axes.scatter([x], [y], s=26, color=colour, marker=MARKS.get(row["algorithm"], "D"), alpha=0.75, linewidths=0)
        seen.setdefault(_kind(row["kernel"]), dots)
    for row, side in _worth_a_label(points):
        _label(axes, row, side)
    _legend(axes, seen, [name for name in MARKS if name and any(row["algorithm"] == name for row in points)])


def _roof_lines(axes: Any, gflops: float, gbytes: float, low: float, high: float) -> None:
    knee = gflops / gbytes
    axes.plot([low, min(knee, high)], [low * gbytes, min(knee, high) * gbytes], color="black", linewidth=1.3)
    if knee < high:
        axes.plot([max(knee, low), high], [gflops, gflops], color="black", linewidth=1.3)
        axes.annotate(f"matrix product: {gflops:.0f} GFLOP/s", (max(knee, low), gflops), xytext=(-4, 2), textcoords="offset points",
                      ha="right" if knee > low else "left", va="bottom", fontsize=8)
    if low < knee:
        x = math.sqrt(low * min(knee, high))
        axes.annotate(f"copy: {gbytes:.0f} GB/s", (x, x * gbytes), xytext=(-6, 6), textcoords="offset points", ha="right",
                      fontsize=8)


def _kind(kernel: str) -> str:
    return next((words for name, words in KINDS.items() if COLOURS.get(name) == COLOURS.get(kernel)), kernel)


def _worth_a_label(points: Sequence[Row]) -> list[tuple[Row, str]]:
    """The fastest and the slowest convolution."""
    def speed(row: Row) -> float:
        return float(row["operations"]) / _milliseconds(row)
    convolutions = sorted((row for row in points if row["kernel"] == "conv2d"), key=speed)
    return list(zip(convolutions[:1] + convolutions[1:][-1:], ("below", "above"), strict=False))


def _label(axes: Any, row: Row, side: str) -> None:
    x, y = row["operations"] / row["least_bytes"], row["operations"] / (1e6 * _milliseconds(row))
    up = 14 if side == "above" else -16
    low, high = axes.get_xlim()
    near_the_edge = math.log(high / x) < 0.25 * math.log(high / low)
    axes.annotate(" ".join(word for word in (row["shape"], row["algorithm"]) if word), (x, y), xytext=(0, up),
                  ha="right" if near_the_edge else "center", textcoords="offset points", fontsize=7.5, color=COLOURS["conv2d"],
                  arrowprops={"arrowstyle": "-", "color": COLOURS["conv2d"], "linewidth": 0.6})


def _legend(axes: Any, seen: dict[str, Any], algorithms: Sequence[str]) -> None:
    """Colours with their kinds, in the order of KINDS, and marks with their algorithms."""
    Line2D = importlib.import_module("matplotlib.lines").Line2D
    handles = [Line2D([], [], linestyle="", marker="o", color=dots.get_facecolor()[0][:3], label=kind)
               for kind, dots in sorted(seen.items(), key=lambda item: [*KINDS.values(), item[0]].index(item[0]))]
    if len(algorithms) > 1:
        handles += [Line2D([], [], linestyle="", marker=MARKS[name], markerfacecolor="none", color="black", label=name)
                    for name in algorithms]
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="lower right")


# ---------------------------------------------------------------- bars
def _longest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the shapes whose fastest algorithms together take the longest."""
    total: dict[tuple[str, int, str], float] = {}
    for key in {(row["shape"], row["batch"], row["backend"]) for row in rows}:
        mine = [row for row in rows if (row["shape"], row["batch"], row["backend"]) == key]
        total[key] = sum(min(_milliseconds(row) for row in mine if row["kernel"] == kernel)
                         for kernel in {row["kernel"] for row in mine})
    kept = sorted(total, key=lambda key: -total[key])[:MOST_BARS]
    return [row for key in kept for row in rows if (row["shape"], row["batch"], row["backend"]) == key]


def _bars(figure: Any, rows: Sequence[Row], maps: Sequence[str]) -> None:
    """Beside each other the three maps, below each other the shapes; a bar for each algorithm."""
    groups = list(dict.fromkeys((row["shape"], row["batch"], row["backend"]) for row in rows))
    algorithms = [name for name in (*ALGORITHM_COLOURS, *sorted({row["algorithm"] for row in rows} - set(ALGORITHM_COLOURS)))
                  if any(row["algorithm"] == name for row in rows)]
    several = len({backend for _, _, backend in groups}) > 1
    panels = figure.subplots(1, len(maps), sharex=True, sharey=True, squeeze=False)[0]
    height = 0.8 / len(algorithms)
    for axes, kernel in zip(panels, maps, strict=True):
        for i, algorithm in enumerate(algorithms):
            bars = [(groups.index((row["shape"], row["batch"], row["backend"])), _milliseconds(row)) for row in rows
                    if row["kernel"] == kernel and row["algorithm"] == algorithm]
            offset = (i - (len(algorithms) - 1) / 2) * height
            axes.barh([at + offset for at, _ in bars], [ms for _, ms in bars], height, label=algorithm,
                      color=ALGORITHM_COLOURS.get(algorithm, OTHER))
        axes.set_title(KINDS[kernel], loc="left", fontsize=9)
        axes.set_xlabel("ms a batch")
        _clean(axes)
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(groups)), [f"{shape}  (batch {batch}{', ' + backend if several else ''})"
                                              for shape, batch, backend in groups], fontsize=8)
    panels[0].invert_yaxis()
    if len(algorithms) > 1:
        panels[-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle("Time by algorithm, the shapes that take the longest", x=0.01, ha="left", fontsize=10)


# ---------------------------------------------------------------- models
LAYER_COLOURS = {"Conv2d": "#0b62a4", "BatchNorm2d": "#e69f00", "ReLU": "#009e73", "Linear": "#d55e00", "MaxPool2d": "#cc79a7",
                 "addition": "#666666"}


def _models(found: Document, rows: Sequence[Row]) -> Any:
    """Milliseconds an image of each task; where layers were measured, what their kinds take."""
    names = list(dict.fromkeys((row["model"], row["backend"]) for row in rows))
    layered = [row for row in rows if row.get("layers")]
    figure = new_figure(7.0 + 6.0 * bool(layered), 1.9 + 0.75 * len(names))
    panels = figure.subplots(1, 1 + bool(layered), squeeze=False)[0]
    axes = panels[0]
    for i, (task, colour) in enumerate((("inference", "#0b62a4"), ("training step", GREY))):
        mine = [row for row in rows if row["task"] == task]
        at = [names.index((row["model"], row["backend"])) + (i - 0.5) * 0.38 for row in mine]
        bars = axes.barh(at, [_milliseconds(row) / row["batch"] for row in mine], 0.36, color=colour, label=task)
        axes.bar_label(bars, [f" {_milliseconds(row) / row['batch']:.3g}" for row in mine], fontsize=8)
    axes.set_yticks(range(len(names)), [_model_name(rows, *name) for name in names], fontsize=9)
    axes.invert_yaxis()
    each = [_milliseconds(row) / row["batch"] for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(min(each)) - 0.05), 10 ** math.ceil(math.log10(max(each)) + 0.1))
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("milliseconds an image (logarithmic)")
    axes.set_title(textwrap.fill(_about(found, names[0][1]), 80), loc="left", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    _clean(axes)
    axes.grid(axis="y", visible=False)
    if layered:
        _layer_shares(panels[1], layered)
    return figure


def _model_name(rows: Sequence[Row], model: str, backend: str) -> str:
    batch = next(row["batch"] for row in rows if (row["model"], row["backend"]) == (model, backend))
    return f"{model}\nbatch {batch}, {backend}"


def _layer_shares(axes: Any, layered: Sequence[Row]) -> None:
    """What each kind of layer takes of inference and of training, in per cent of the layers' sum."""
    parts = [("inference", ("inference",)), ("training", ("forward", "backward"))]
    bars = [(f"{row['model']}, {words}", row["layers"], names) for row in layered for words, names in parts]
    kinds = list(dict.fromkeys([*LAYER_COLOURS, *(layer["kind"] for row in layered for layer in row["layers"])]))
    start = [0.0] * len(bars)
    for i, kind in enumerate(kinds):
        shares = []
        for _, layers, names in bars:
            whole = sum(layer[name] for layer in layers for name in names)
            shares.append(100 * sum(layer[name] for layer in layers for name in names if layer["kind"] == kind) / whole)
        if max(shares) >= 1.0:
            axes.barh(range(len(bars)), shares, 0.7, left=start, label=kind,
                      color=LAYER_COLOURS.get(kind, ("#bbbbbb", "#dddddd")[i % 2]))
        start = [s + share for s, share in zip(start, shares, strict=True)]
    axes.set_yticks(range(len(bars)), [words for words, _, _ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the time of all layers, each by itself")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _clean(axes)
    axes.grid(axis="y", visible=False)
