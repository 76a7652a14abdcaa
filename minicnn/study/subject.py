"""What is studied: a model with its weights, and a batch of images of which one is looked at."""
from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minicnn import data, models, train
from minicnn.data import ImageSet, Normalize
from minicnn.layers import BatchNorm2d
from minicnn.layers import Sequential as Model

DIGITS = (1, 8, 8)


class Subject(NamedTuple):
    """A model and the batch that is run through it; the first image is the one that is looked at."""

    name: str
    model: Model
    normalize: Normalize
    classes: list[str]
    images: np.ndarray[Any, Any]        # (N, C, H, W) uint8
    labels: np.ndarray[Any, Any]        # (N,)
    image_name: str
    said_by: str                        # where the label of the first image comes from
    weights: str                        # where the weights come from
    fresh: Callable[[], Model]          # the same model with its first, untrained weights

    @property
    def inputs(self) -> np.ndarray[Any, Any]:
        """The images as the model reads them."""
        return self.normalize(self.images, self.model.dtype or np.float32)


def choose(model: str | None = None, image: str | None = None, *, run: str | None = None, weights: str | None = None,
           label: str | None = None, batch: int | None = None, training: bool = True, in_shape: Sequence[int] | None = None,
           normalize: Normalize | None = None) -> Subject:
    """The model and the images that are asked for.

    model: a name; by default that of the run.   run: a folder of `minicnn train`; by default the newest one of this model in ./runs,
    and where there is none, or in_shape is given, the untrained model.   weights: a file instead.
    image: a file; by default a digit of the set that comes with scikit-learn, as large as the model wants it.
    label: what is on the image; by default what the data set says, else what the model takes it for.
    batch: images in all; batch norm learns from the others. By default 8 small ones or 2 large ones for a model with batch norm in
    training, else 1.
    """
    if model is not None and model not in models.names():
        models.build(model)                                     # says so
    trained = _trained(model, run, weights, in_shape, normalize)
    if trained is None:
        name = model or "resnet20"
        usual = models.default_in_shape(name)
        shape = tuple(in_shape or (usual if image is not None or max(usual[1:]) > 64 else DIGITS))
        classes = [str(i) for i in range(10)] if max(usual[1:]) <= 64 or image is None else [str(i) for i in range(1000)]
        options = train.model_options(name, shape)

        def fresh() -> Model:
            return models.build(name, len(classes), shape, **options)

        built, kind, about = fresh(), "none: the first, random ones, untrained (seed 0)", {}
        pixels = normalize
    else:
        about, built, classes, pixels = trained.about, trained.model, list(trained.classes), trained.normalize
        name, shape, kind = about["model"], tuple(about["in_shape"]), str(trained.path)

        def fresh() -> Model:
            return train._build({**about, "device": "cpu"})
    if batch is None:
        learns = training and any(type(layer) is BatchNorm2d for _, layer in built.walk())
        batch = (8 if max(shape[1:]) <= 64 else 2) if learns else 1
    first, known, image_name = (None, None, "") if image is None else (data.read_image(image, shape), None, Path(image).name)
    others = _images(about, shape, batch if image is None else batch - 1, classes)
    if first is None:
        if others is None:
            raise ValueError("there is no image to look at: the run's data are not here; name a file with --image")
        images, labels = others.images[:batch], others.labels[:batch]
        known, image_name = int(labels[0]), f"an image of {others.name}"
    else:
        images = first[None] if others is None else np.concatenate([first[None], others.images[:batch - 1]])
        labels = np.zeros(1, np.int64) if others is None else np.concatenate([[0], others.labels[:batch - 1]]).astype(np.int64)
    if pixels is None:
        pixels = Normalize((float(images.mean()) / 255,) * shape[0], ((float(images.std()) / 255) or 1.0,) * shape[0])
    labels = np.array(labels, np.int64)
    labels[0], said_by = _label(label, known, classes, lambda: train.predict(built, images[:1], pixels)[0])
    return Subject(name, built, pixels, classes, np.ascontiguousarray(images), labels, image_name, said_by, kind, fresh)


def _trained(model: str | None, run: str | None, weights: str | None, in_shape: Sequence[int] | None,
             normalize: Normalize | None) -> train.Trained | None:
    """The trained model that is asked for, or that happens to be there."""
    if weights is not None and run is None:
        if model is None:
            raise ValueError(f"{weights} does not say what model it is of: name it, too (minicnn study MODEL --weights FILE)")
        return train.load_published(model, weights, None, in_shape, normalize, "cpu")
    if run is not None:
        trained = train.load_trained(run, weights, "cpu", normalize)
        if model not in (None, trained.about["model"]):
            raise ValueError(f"{run} has a {trained.about['model']}, no {model}: name another run, or leave the model's name out")
        return trained
    if in_shape is not None:
        return None
    folders = sorted(train.RUNS.glob("*/model.npz"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in (path.parent for path in folders):
        try:
            about = train._read_about(folder)
        except (ValueError, OSError):
            continue                                            # another's folder, or damaged: not what was asked for by name
        if model in (None, about["model"]):
            return train.load_trained(folder, None, "cpu", normalize)
    return None


def _images(about: dict[str, Any], shape: tuple[int, ...], count: int, classes: list[str]) -> ImageSet | None:
    """Images that the model was not trained on, as it reads them: those its run held out, else digits; None where none are needed."""
    if count < 1:
        return None
    if about.get("fingerprint"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return data.fitted(train.held_out(about), shape)
            except (ValueError, OSError):
                return None
    digits = data.digits()[1]
    return data.fitted(digits, shape) if len(classes) >= len(digits.classes) else None


def _label(asked: str | None, known: int | None, classes: list[str], guess: Callable[[], Any]) -> tuple[int, str]:
    if asked is not None:
        if asked not in classes:
            shown = ", ".join(classes[:12]) + (" ..." if len(classes) > 12 else "")
            raise ValueError(f"the model has no class {asked!r}; its classes are {shown}")
        return classes.index(asked), "as you said"
    if known is not None:
        return known, "as its data set says"
    return int(np.argmax(guess())), "what the model takes it for, since nobody said"
