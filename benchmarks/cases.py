"""What is timed: operations at the shapes of real layers, and whole models. Data; every library reads the same.

NumPy is imported by `arrays` and `output_gradient` alone, which the workers call: `run.py` says why the parent stays small.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One line of the table, or two: an operation is timed forward and backward, a model at inference and in training."""

    name: str
    kind: str                                                       # the operation, or "model"
    batch: int
    images: dict[str, Shape]                                        # inputs with a batch axis, without it here
    weights: dict[str, Shape] = field(default_factory=dict)         # inputs without
    options: dict[str, Any] = field(default_factory=dict)           # keywords of the operation or the model
    constants: tuple[str, ...] = ()                                 # inputs whose gradient nobody asks for
    tasks: tuple[str, ...] = ()                                     # which to time; all that the engine has, by default


def arrays(case: Case) -> dict[str, np.ndarray[Any, Any]]:
    """The inputs, float32 in C order, the same in every process; `labels` are integers below 10, a class of every model."""
    import numpy as np

    rng = np.random.default_rng(0)
    shapes = {name: (case.batch, *shape) for name, shape in case.images.items()} | case.weights
    return {name: rng.integers(0, 10, shape) if name == "labels" else rng.standard_normal(tuple(shape), dtype=np.float32)
            for name, shape in shapes.items()}


def output_gradient(shape: Shape) -> np.ndarray[Any, Any]:
    """What a backward begins with: random, so that nothing cancels; the same in every process."""
    import numpy as np

    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


# ---------------------------------------------------------------- operations
# Every different convolution of three models at 224 x 224: channels in, pixels a side in, channels out, kernel, stride.
VGG16 = (
    (3, 224, 64, 3, 1), (64, 224, 64, 3, 1), (64, 112, 128, 3, 1), (128, 112, 128, 3, 1), (128, 56, 256, 3, 1),
    (256, 56, 256, 3, 1), (256, 28, 512, 3, 1), (512, 28, 512, 3, 1), (512, 14, 512, 3, 1),
)
RESNET18 = (
    (3, 224, 64, 7, 2), (64, 56, 64, 3, 1),
    (64, 56, 128, 3, 2), (64, 56, 128, 1, 2), (128, 28, 128, 3, 1),
    (128, 28, 256, 3, 2), (128, 28, 256, 1, 2), (256, 14, 256, 3, 1),
    (256, 14, 512, 3, 2), (256, 14, 512, 1, 2), (512, 7, 512, 3, 1),
)
RESNET50 = (                # those that ResNet-18 has not
    (64, 56, 64, 1, 1), (64, 56, 256, 1, 1), (256, 56, 64, 1, 1),
    (256, 56, 128, 1, 1), (128, 56, 128, 3, 2), (128, 28, 512, 1, 1), (256, 56, 512, 1, 2), (512, 28, 128, 1, 1),
    (512, 28, 256, 1, 1), (256, 28, 256, 3, 2), (256, 14, 1024, 1, 1), (512, 28, 1024, 1, 2), (1024, 14, 256, 1, 1),
    (1024, 14, 512, 1, 1), (512, 14, 512, 3, 2), (512, 7, 2048, 1, 1), (1024, 14, 2048, 1, 2), (2048, 7, 512, 1, 1),
)
OPERATIONS = ("conv2d", "max_pool2d", "avg_pool2d", "global_avg_pool2d", "batch_norm", "relu", "add", "linear", "cross_entropy")
BATCH = 4                   # images at 224 x 224, where a batch of a hundred would fill the memory of a small machine


def operations(quick: bool = False) -> list[Case]:
    """All of them; quick: small ones, with a hundredth of the pixels, that show that everything runs and time nothing."""
    def pixels(n: int) -> int:
        return max(7, n // 16) if quick else n

    def features(n: int) -> int:
        return n // 16 if quick else n

    convolutions = [_convolution(c, pixels(size), *rest, bias=table is VGG16)
                    for table in (VGG16, RESNET18, RESNET50) for c, size, *rest in table]
    everything = [
        *convolutions,
        _pool("max_pool2d", 64, pixels(224), kernel_size=2), _pool("max_pool2d", 512, pixels(28), kernel_size=2),    # VGG
        _pool("max_pool2d", 64, pixels(112), kernel_size=3, stride=2, padding=1),                                    # ResNet
        _pool("avg_pool2d", 256, pixels(56), kernel_size=2),
        _pool("global_avg_pool2d", 2048, 7),
        *(_batch_norm(c, pixels(size)) for c, size in ((64, 224), (64, 112), (256, 56), (512, 7))),
        *(_on_images("relu", c, pixels(size), ("x",)) for c, size in ((64, 224), (64, 112), (256, 56), (512, 7))),
        *(_on_images("add", c, pixels(size), ("a", "b")) for c, size in ((64, 56), (256, 56))),
        *(_linear(features(n), features(out)) for n, out in ((25088, 4096), (4096, 4096), (2048, 1000))),
        Case("cross_entropy 1000 classes", "cross_entropy", 256, {"logits": (1000,), "labels": ()}, constants=("labels",)),
    ]
    return list({case.name: case for case in everything}.values())         # quick sizes coincide: each once


def _convolution(channels: int, size: int, out_channels: int, kernel: int, stride: int, *, bias: bool) -> Case:
    """kernel // 2 of padding, as everywhere in these models; ResNet's convolutions have no bias."""
    weights: dict[str, Shape] = {"weight": (out_channels, channels, kernel, kernel)}
    if bias:
        weights["bias"] = (out_channels,)
    step = f" /{stride}" if stride > 1 else ""
    return Case(f"conv2d {channels}->{out_channels} {kernel}x{kernel}{step} at {size}", "conv2d", BATCH,
                {"x": (channels, size, size)}, weights, {"stride": stride, "padding": kernel // 2},
                constants=("x",) if channels == 3 else ())                  # nobody asks for the gradient of the pictures


def _pool(kind: str, channels: int, size: int, **window: int) -> Case:
    kernel = window.get("kernel_size", size)
    step = f" /{window['stride']}" if "stride" in window else ""
    return Case(f"{kind} {channels} {kernel}x{kernel}{step} at {size}", kind, BATCH, {"x": (channels, size, size)}, options=window)


def _batch_norm(channels: int, size: int) -> Case:
    return Case(f"batch_norm {channels} at {size}", "batch_norm", BATCH, {"x": (channels, size, size)},
                {"weight": (channels,), "bias": (channels,)})


def _on_images(kind: str, channels: int, size: int, names: tuple[str, ...]) -> Case:
    return Case(f"{kind} {channels} at {size}", kind, BATCH, dict.fromkeys(names, (channels, size, size)))


def _linear(features: int, out_features: int) -> Case:
    return Case(f"linear {features}->{out_features}", "linear", BATCH, {"x": (features,)},
                {"weight": (out_features, features), "bias": (out_features,)})


# ---------------------------------------------------------------- models
MODELS = {"vgg16": (16, 8), "vgg16_bn": (16, 8), "resnet18": (16, 16), "resnet50": (8, 8), "resnet20": (128, 128)}   # batches
_SMALL = ("resnet20",)          # made for images of 32 x 32


def side_of(name: str, quick: bool = False) -> int:
    """Pixels a side of the images that a model is compared at."""
    return 32 if quick or name in _SMALL else 224


def model(name: str, quick: bool = False, batch: int | None = None, side: int | None = None) -> list[Case]:
    """Inference and training step, each at the model's own batch size and image size or at those given."""
    side = side or side_of(name, quick)
    options: dict[str, Any] = {"hidden": 64, "pool": 1} if quick and name.startswith("vgg") else {}     # its bulk otherwise
    sizes = (batch, batch) if batch else (2, 2) if quick else MODELS[name]
    return [Case(name, "model", size, {"x": (3, side, side), "labels": ()}, options=options, tasks=(task,))
            for size, task in zip(sizes, ("inference", "training step"), strict=True)]
