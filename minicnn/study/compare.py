"""What residual additions are for: the same layer lists with and without them, side by side.

A plain network that is made deeper should be no worse: the added layers could be the identity. Trained, it is worse, and on the
very images that it is trained on, so that it is no overfitting: He et al. call it degradation. With a shortcut around every two
layers the deeper network is the better one. This is that experiment in small: CIFAR-style networks of 20 and 56 layers, and the
same lists without `Residual`, from the same first weights, by the same recipe, on the same batches.

    gradients       norm of dL/dy at the output of every convolution, before any training; without batch norm, too
    training        loss and error, epoch by epoch

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, sections 3.1, 4.2.
"""
from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

import numpy as np

from minicnn import __version__, train
from minicnn.data import ImageSet, Normalize
from minicnn.layers import Sequential
from minicnn.models.resnet import cifar_resnet
from minicnn.plots import new_figure
from minicnn.study.depth import changed, gradient_norms
from minicnn.threads import num_threads
from minicnn.weights import atomically

DEPTHS = (20, 56)
NAMES = {"plain": "plain", "residual": "ResNet"}
WITH_NORM, WITHOUT_NORM = "batch norm", "no batch norm"
COLOURS = {"plain": "#d55e00", "residual": "#0072b2"}           # stay apart for colour-blind eyes (Okabe and Ito)
GRADIENT_IMAGES = 128           # that the gradients before training are of


def network(depth: int, kind: str, num_classes: int, in_shape: Sequence[int], seed: int = 0) -> Sequential:
    """ResNet-`depth` for CIFAR ("residual"), or the same list without its residual additions ("plain"). Option A shortcuts have no
    parameters, so that both begin with the same weights."""
    model = cifar_resnet(depth, num_classes, in_shape, seed=seed)
    return model if kind == "residual" else changed(model, residual=False, batch_norm=True)


# ---------------------------------------------------------------- the experiment
@dataclass
class Result:
    """One network: its depth, plain or residual; ||dL/dy|| at each convolution and at the last layer before training, with "batch
    norm" and with "no batch norm"; a row an epoch, as in metrics.jsonl; seconds of training; what ended it early, if anything."""

    depth: int
    kind: str
    gradients: dict[str, list[float]]
    history: list[train.Row] = field(default_factory=list)
    seconds: float = 0.0
    ended_by: str = ""

    @property
    def name(self) -> str:
        return f"{NAMES[self.kind]}-{self.depth}"

    def error(self, part: str) -> float:
        """The share of the images of "train" or "test" that it was wrong on in the last epoch, in %; of "train", as its steps went.
        Not a number where no epoch came to its end."""
        return 100 * (1 - self.history[-1][f"{part}_accuracy"]) if self.history else float("nan")


@dataclass
class Comparison:
    """All that was measured, and what it depends on."""

    data: str
    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)

    def of(self, kind: str) -> list[Result]:
        """The plain or the residual networks, the shallowest first."""
        return sorted((r for r in self.results if r.kind == kind), key=lambda r: r.depth)

    def to_json(self) -> str:
        """Everything, as JSON; what is no finite number is null."""
        found = {"kind": "comparison of plain and residual networks", "minicnn": __version__, "numpy": np.__version__,
                 "data": self.data, "settings": self.settings, "networks": [{"name": r.name, **asdict(r)} for r in self.results]}
        return json.dumps(_finite(found), allow_nan=False, indent=1) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def default_config(source: str, epochs: int | None = None, **changes: Any) -> train.Config:
    """The recipe: the paper's weight decay, its learning rate and momentum, which are Config's own, and no label smoothing."""
    known = train.default_training(source, (0, 32, 32))
    augmentation: dict[str, Any] = {name: known[name] for name in ("shift", "flip") if name in known}
    chosen = {"epochs": 12, "batch_size": 64, "weight_decay": 1e-4, **augmentation, **changes}
    return train.Config(**chosen if epochs is None else {**chosen, "epochs": epochs})


def measure(train_set: ImageSet, test_set: ImageSet, config: train.Config, depths: Sequence[int] = DEPTHS, *, threads: int = 1,
            on_begin: Callable[[Result], None] | None = None, on_step: Callable[[train.Trainer], None] | None = None,
            on_end: Callable[[Comparison], None] | None = None) -> Comparison:
    """Gradients before training, and a training, of every depth, plain and residual.

    on_begin, on_step, on_end: called before each training, behind each of its steps, and behind it with all that is known so far.
    """
    normalize = train.normalization_of(train_set)
    found = Comparison(train_set.name, {
        **asdict(config), "depths": list(depths), "threads": threads, "train_images": len(train_set), "test_images": len(test_set),
        "in_shape": list(train_set.images.shape[1:])})
    with num_threads(threads):
        for depth in depths:
            gradients = gradients_before(depth, train_set, normalize, config.seed)
            for kind in NAMES:
                result = Result(depth, kind, gradients[kind])
                if on_begin:
                    on_begin(result)
                model = network(depth, kind, len(train_set.classes), train_set.images.shape[1:], config.seed)
                trainer = train.Trainer(model, train_set, test_set, config, normalize)
                began = time.perf_counter()
                try:
                    trainer.fit(on_step=on_step)
                except FloatingPointError as error:         # a result, too
                    result.ended_by = str(error)
                result.history, result.seconds = trainer.history, time.perf_counter() - began
                found.results.append(result)
                if on_end:
                    on_end(found)
    return found


def gradients_before(depth: int, train_set: ImageSet, normalize: Normalize, seed: int) -> dict[str, dict[str, list[float]]]:
    """||dL/dy|| along both networks of a depth before they have seen anything, with batch norm and without, on the first images of
    a set: {kind: {norm: one a layer}}"""
    model = network(depth, "residual", len(train_set.classes), train_set.images.shape[1:], seed)
    images, labels = normalize(train_set.images[:GRADIENT_IMAGES]), train_set.labels[:GRADIENT_IMAGES]
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in NAMES}
    for line in gradient_norms(model, images, labels):
        found["residual" if line.residual else "plain"][WITH_NORM if line.batch_norm else WITHOUT_NORM] = line.norms
    return found


def check_depths(depths: Sequence[int]) -> None:
    """ValueError for a depth that no such network has, before any is trained."""
    for depth in depths:
        cifar_resnet(depth, 2, (1, 4, 4))


# ---------------------------------------------------------------- in words
HEAD = f"{'network':<12}{'training loss':>15}{'training error':>16}{'held-out error':>16}{'seconds':>9}"


def row(result: Result) -> str:
    """How a network ended, below HEAD."""
    loss = result.history[-1]["train_loss"] if result.history else float("nan")
    ended = f"  {result.ended_by}" if result.ended_by else ""
    errors = "".join(f"{result.error(part):14.2f} %" for part in ("train", "test"))
    return f"{result.name:<12}{loss:15.4f}{errors}{result.seconds:9.0f}{ended}"


def in_words(found: Comparison) -> list[str]:
    """What the numbers show, in sentences, and nothing beyond them."""
    said = [sentence for kind in NAMES if (sentence := _about_depth(found.of(kind)))]
    if pairs := list(zip(found.of("plain"), found.of("residual"), strict=False)):
        plain, residual = pairs[-1]
        said.append(f"Of {plain.depth} layers, {_percent(plain.error('train'))} of the training images went wrong without the "
                    f"residual additions and {_percent(residual.error('train'))} with them; held out, "
                    f"{_percent(plain.error('test'))} and {_percent(residual.error('test'))}.")
        for norm in residual.gradients:
            said.append(f"Before training, with {norm}, the gradient at the first convolution of {plain.name} is "
                        f"{_times(first_to_last(plain, norm))} that at its last layer; of {residual.name}, "
                        f"{_times(first_to_last(residual, norm))}.")
    settings = found.settings
    said.append(f"One training each, of {settings['epochs']} epochs on {settings['train_images']:,} images, with seed "
                f"{settings['seed']}: other seeds, epochs and data give other numbers.")
    return said


def _about_depth(results: Sequence[Result]) -> str:
    """Whether more layers did worse on the very images that they were trained on."""
    if len(results) < 2:
        return ""
    shallow, deep = results[0], results[-1]
    a, b = shallow.error("train"), deep.error("train")
    verdict = "cannot be compared" if math.isnan(a + b) else "is worse" if b > a else "is better" if b < a else "is as good"
    kind = "Plain" if deep.kind == "plain" else "Residual"
    return (f"{kind}: with {deep.depth} layers {_percent(b)} of the training images went wrong in the last epoch, with "
            f"{shallow.depth} layers {_percent(a)}: the deeper network {verdict}.")


def first_to_last(result: Result, norm: str) -> float:
    """The norm of the gradient at the first convolution over that at the last layer."""
    sizes = result.gradients[norm]
    return sizes[0] / sizes[-1] if sizes[-1] else float("nan")


def _percent(share: float) -> str:
    return "an unknown share" if math.isnan(share) else f"{share:.1f} %"


def _times(ratio: float) -> str:
    if not math.isfinite(ratio) or ratio == 0:
        return "out of all proportion to"
    if ratio < 0.01:
        return f"1/{float(f'{1 / ratio:.3g}'):,.0f} of"
    return f"{float(f'{ratio:.3g}'):,.0f} times" if ratio >= 100 else f"{ratio:.3g} times"


# ---------------------------------------------------------------- as a picture
def draw(found: Comparison, paths: Sequence[str | PathLike[str]]) -> None:
    """Gradients along depth above, a panel a depth; training and held-out error below. One file a path, by its suffix.

    ImportError where matplotlib is missing.
    """
    depths = sorted({r.depth for r in found.results})
    figure = new_figure(11.0, 7.5)
    above, below = figure.subfigures(2, 1)
    above.suptitle(f"{found.data}: norm of dL/dy at each layer, before training", x=0.01, ha="left", fontsize=11)
    for axes, depth in zip(above.subplots(1, len(depths), sharey=True, squeeze=False)[0], depths, strict=True):
        _draw_gradients(axes, [r for r in found.results if r.depth == depth])
        axes.set_title(f"{depth} layers", loc="left", fontsize=10)
    for axes, part in zip(below.subplots(1, 2, sharey=True), ("train", "test"), strict=True):
        _draw_errors(axes, found, part)
    for path in paths:
        atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, facecolor="white"))


def _draw_gradients(axes: Any, results: Sequence[Result]) -> None:
    for result in results:
        for norm, sizes in result.gradients.items():
            axes.plot(range(1, len(sizes) + 1), sizes, "--" if norm == WITHOUT_NORM else "-", linewidth=1.2,
                      color=COLOURS[result.kind], label=f"{NAMES[result.kind]}, {norm}")
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("convolutions and the last layer, from the image on")
    _tidy(axes)


def _draw_errors(axes: Any, found: Comparison, part: str) -> None:
    deepest = max(r.depth for r in found.results)
    for result in found.results:
        axes.plot([r["epoch"] for r in result.history], [100 * (1 - r[f"{part}_accuracy"]) for r in result.history],
                  "-" if result.depth == deepest else "--", color=COLOURS[result.kind], label=result.name,
                  linewidth=2.0 if result.depth == deepest else 1.2, marker="o", markersize=2.5)
    axes.set_title("training error, %, as the steps went" if part == "train" else "held-out error, %", loc="left", fontsize=10)
    axes.set_xlabel("epoch")
    axes.set_ylim(0, None)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
