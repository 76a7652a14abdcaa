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

    model: a name; by default that of the run.
    run: a folder of `minicnn train`; by default the newest one of this model in ./runs. Where there is none, or in_shape is given,
    the model is untrained.
    weights: a file instead.
    image: a file; by default a digit of the set that comes with scikit-learn, as large as the model wants it.
    label: what is on the image; by default what the data set says, else what the model takes it for.
    batch: images in all; batch norm learns from the others. By default 8 small ones or 2 large ones for a model with batch norm in
    training, else 1. Beside an image of your own, weights from elsewhere see no other: nobody knows what they were trained on.
    """
    if model is not None and model not in models.names():
        models.build(model)                                     # says so
    trained = (_trained(model, run, weights, in_shape, normalize)
               or _untrained(model or "resnet20", in_shape, normalize, of_digits=image is None))
    about = trained.about
    name, shape = about["model"], tuple(about["in_shape"])

    def fresh() -> Model:
        return models.build(name, about["num_classes"], shape, seed=about["training"]["seed"], dtype=about["dtype"],
                            **about["model_options"])

    if batch is None:
        learns = training and any(type(layer) is BatchNorm2d for _, layer in trained.model.walk())
        batch = (8 if max(shape[1:]) <= 64 else 2) if learns else 1
    images, labels, image_name, known = _batch(about, image, batch, trained.classes)
    pixels = trained.normalize or _own_scale(images)
    labels[0], said_by = _label(label, known, trained.classes, lambda: train.predict(trained.model, images[:1], pixels)[0])
    return Subject(name, trained.model, pixels, trained.classes, images, labels, image_name, said_by,
                   str(trained.path) if about.get("trained", True) else UNTRAINED, fresh)


UNTRAINED = "none: the first, random ones (seed 0)"


def _untrained(name: str, in_shape: Sequence[int] | None, normalize: Normalize | None, of_digits: bool) -> _Chosen:
    """A model with its first weights: for the digits as small as they are, where it is one for small images."""
    usual = models.default_in_shape(name)
    small = max(usual[1:]) <= 64
    shape = tuple(in_shape or (DIGITS if of_digits and small else usual))
    classes = [str(i) for i in range(10 if of_digits or small else 1000)]
    about: dict[str, Any] = {
        "model": name, "num_classes": len(classes), "in_shape": shape, "classes": classes, "training": {"seed": 0},
        "dtype": "float32", "model_options": train.model_options(name, shape), "trained": False}
    built = models.build(name, len(classes), shape, **about["model_options"])
    return _Chosen(Path(), built, normalize, about)


def _batch(about: dict[str, Any], image: str | None, count: int,
           classes: list[str]) -> tuple[Any, Any, str, int | None]:
    """Images and labels, the first of which is looked at; what it is called, and its label where a data set says it."""
    shape = tuple(about["in_shape"])
    if image is None:
        found = _images(about, shape, classes)
        if found is None:
            raise ValueError("there is no image to look at: the images that the run held out are not here, and digits have not its "
                             "classes; name a file with --image")
        return found.images[:count], found.labels[:count].astype(np.int64), f"an image of {found.name}", int(found.labels[0])
    first = data.read_image(image, (shape[0], shape[1], shape[2]))[None]
    knows_digits = "fingerprint" in about or not about.get("trained", True)         # or whatever its run held out
    others = _images(about, shape, classes) if count > 1 and knows_digits else None
    if others is None:
        return first, np.zeros(1, np.int64), Path(image).name, None
    return (np.concatenate([first, others.images[:count - 1]]),
            np.concatenate([[0], others.labels[:count - 1]]).astype(np.int64), Path(image).name, None)


def _own_scale(images: np.ndarray[Any, Any]) -> Normalize:
    """To mean 0 and standard deviation 1, for a model that has seen no others."""
    channels = images.shape[1]
    return Normalize((float(images.mean()) / 255,) * channels, ((float(images.std()) / 255) or 1.0,) * channels)


class _Chosen(NamedTuple):
    """As train.Trained, where nobody has said how pixels are normalised."""

    path: Path
    model: Model
    normalize: Normalize | None
    about: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        return list(self.about["classes"])


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
    for path in sorted(train.RUNS.glob("*/model.npz"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            trained = train.load_trained(path.parent, None, "cpu", normalize)
        except (ValueError, OSError):
            continue                                            # damaged, or another's; it was not asked for by name
        if model in (None, trained.about["model"]):
            return trained
    return None


def _images(about: dict[str, Any], shape: tuple[int, ...], classes: list[str]) -> ImageSet | None:
    """Images that the model was not trained on, as it reads them: those its run held out, else digits. None: there are none."""
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
