"""Pictures of a training run: its curves, its confusion matrix, its mistakes.

Drawn by matplotlib's Agg on figures of their own: neither pyplot nor a display takes part, and no global setting is touched.
Equal numbers give equal files, to the byte.
"""
from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicnn.weights import atomically

Path = str | os.PathLike[str]
Ints = np.ndarray[Any, Any]

TRAIN, TEST = "#9aa5b1", "#0b62a4"          # what was learnt from is grey, what was held out is blue
MOST_CLASSES_IN_NUMBERS = 30                # beyond, a matrix is read by colour alone
MOST_MISTAKES = 30


def curves(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Loss and accuracy of both sets, epoch by epoch. history: rows as in metrics.jsonl."""
    figure = new_figure(9.0, 3.6)
    epochs = [row["epoch"] for row in history]
    for axes, metric, factor in zip(figure.subplots(1, 2), ("loss", "accuracy"), (1, 100), strict=True):
        for part, colour, label in (("train", TRAIN, "training, as the steps went"), ("test", TEST, "held out")):
            values = [factor * row[f"{part}_{metric}"] for row in history]
            axes.plot(epochs, values, color=colour, label=label, marker="o", markersize=3 * (len(epochs) <= 50))
        axes.set_title("loss" if metric == "loss" else "accuracy, %", loc="left", fontsize=11)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if metric == "loss" and min(row[f"{part}_loss"] for row in history for part in ("train", "test")) > 0:
            axes.set_yscale("log")              # late progress is small in absolute terms, and it is what one looks for
        if metric == "accuracy":
            axes.annotate(f"{values[-1]:.2f}", (epochs[-1], values[-1]), xytext=(0, -14), textcoords="offset points", color=TEST,
                          ha="right", fontsize=9)
            axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 0.08))
    _write(path, figure)


def confusion(path: Path, matrix: Ints, classes: Sequence[str]) -> None:
    """The confusion matrix: right answers on the diagonal in blue, mistakes in red, by their share of the row's class.

    matrix: (classes, classes) counts, true class by predicted class.
    """
    n = len(classes)
    side = min(12.0, max(5.0, 2.0 + 0.45 * n))
    figure = new_figure(side, side)
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    right = np.eye(n, dtype=bool)
    axes.imshow(np.where(right, share, np.nan), cmap="Blues", vmin=0, vmax=1.3)
    # The square root lifts rare mistakes off the white; half of a class lost is as red as it gets.
    axes.imshow(np.where(right | (matrix == 0), np.nan, np.sqrt(share)), cmap="Reds", vmin=-0.15, vmax=0.7)
    if n <= MOST_CLASSES_IN_NUMBERS:
        for true, predicted in np.argwhere(matrix > 0):
            dark = share[true, predicted] > (0.6 if true == predicted else 0.15)
            axes.text(predicted, true, str(matrix[true, predicted]), ha="center", va="center", fontsize=9,
                      color="white" if dark else "black")
    named = range(0, n, -(-n // 40))
    axes.set_xticks(named, [classes[i] for i in named], rotation=0 if max(map(len, classes)) <= 2 else 90)
    axes.set_yticks(named, [classes[i] for i in named])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"{int(np.trace(matrix))} of {int(matrix.sum())} right", loc="left", fontsize=11)
    _write(path, figure)


def mistakes(path: Path, images: Ints, labels: Ints, predictions: Ints, confidences: np.ndarray[Any, Any],
             classes: Sequence[str]) -> None:
    """The wrongly answered images, those the model was surest of first. images: (N, C, H, W) uint8; the others (N,)."""
    wrong = np.flatnonzero(predictions != labels)
    shown = wrong[np.argsort(-confidences[wrong], kind="stable")][:MOST_MISTAKES]
    columns = min(6, max(3, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = new_figure(1.7 * columns, 2.0 * rows + 0.5)
    which = "all of them" if len(shown) == len(wrong) else f"the {len(shown)} that it was surest of"
    title = f"{len(wrong)} of {len(labels)} wrong: {which}" if len(wrong) else f"none of {len(labels)} wrong"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, i in zip(panels, shown, strict=False):
        image = images[i].transpose(1, 2, 0)
        axes.imshow(image if image.shape[2] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
        said = f"true {classes[labels[i]]}, said {classes[predictions[i]]}"
        axes.set_title(f"{said}\n{100 * confidences[i]:.0f} % sure", fontsize=9)
    _write(path, figure)


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that needs no screen; ImportError where matplotlib is not installed."""
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
        importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    except ImportError as error:
        raise ImportError("pictures need matplotlib, which is not installed: pip install matplotlib") from error
    return figure


def _write(path: Path, figure: Any) -> None:
    atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
