"""Training: the loop, what it measures, and the folder a run is kept in.

    run = train.begin("digits")             # data, model and a new folder, runs/digits-resnet20-1
    run.fit()                               # Ctrl-C saves; train.resume("runs/digits-resnet20-1").fit() goes on
    run.draw()                              # curves, confusion matrix, mistakes

The parts serve alone too: `train` fits any model to any two ImageSets, `evaluate` counts what a model gets right.

A run is a function of its configuration, its data and the machine. Whatever changes from step to step lies in a `Trainer`,
and all of it goes into a checkpoint, so a run that is stopped after any step and resumed ends in the same bits.
"""
from __future__ import annotations

import difflib
import glob
import json
import os
import platform
import re
import signal
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minicnn import __version__, data, models, ops, optim, plots, transfer
from minicnn.accelerator import Captured, told_when_full, uploaded_ahead
from minicnn.autograd import no_grad
from minicnn.backend import array_module, resolve_device, to_device, to_numpy
from minicnn.data import DataError, ImageSet, Normalize, augment, batches, channel_statistics, fitted, steps_per_epoch
from minicnn.data.cifar import CIFAR10_CLASSES, SHAPE
from minicnn.data.loading import NAMES
from minicnn.kernels.precision import PRECISIONS, half_type, precision
from minicnn.layers import BatchNorm2d, Dropout, Sequential
from minicnn.models import published
from minicnn.threads import num_threads
from minicnn.weights import WeightsError, atomically, load, save

PathLike = str | Path
Row = dict[str, Any]                # one epoch's metrics: a line of metrics.jsonl
RUNS = Path("runs")
ABOUT = {"model", "model_options", "in_shape", "num_classes", "classes", "normalize", "dtype", "data", "root", "image_size",
         "fingerprint", "training", "device", "threads"}        # what config.json needs to have
PICTURES = ("curves.png", "confusion.png", "mistakes.png")
FILES = ("config.json", "metrics.jsonl", "checkpoint.npz", "model.npz", *PICTURES)
SCHEDULES = ("constant", "step", "cosine")
AT_ONCE = 256                       # images in a batch of which nothing is learnt


# ---------------------------------------------------------------- how to train
@dataclass(frozen=True)
class Config:
    """How a model is trained: SGD with Nesterov momentum under a schedule, on shifted and flipped images."""

    epochs: int = 30
    batch_size: int = 32
    lr: float = 0.1                 # the highest, behind the warm-up
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"        # falls to 0;  "step": a tenth from half of all steps on, a hundredth from three quarters on
    warmup: float = 1.0             # epochs on a straight line from lr / 10 to lr
    label_smoothing: float = 0.0
    body_lr: float = 1.0            # the share of the learning rate below the last layer;  0: frozen, and what it makes of each
                                    # image is computed once, so that images are neither cropped, shifted nor flipped
    crop_area: float = 1.0          # of each image a random box, of at least this share of its area, is enlarged to the whole, a
                                    # fresh draw every time;  1: none;  0.08: ImageNet's usual training
    shift: int = 0                  # each image moves by up to so many pixels, a fresh draw every time
    flip: bool = False              # and is mirrored, left to right, half of the time
    cutout: int = 0                 # and a square of so many pixels a side is blackened, at a random place
    precision: str = "fp32"         # in which a GPU computes, see `set_precision`: "tf32", "bf16" or "fp16"
    cuda_graph: bool = False        # on a GPU: capture a step once, and ask for it with one order from then on; not with dropout
    seed: int = 0                   # of the first weights, the order, the augmentation and the dropout

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1}
        for name in ("epochs", "batch_size", "lr", "momentum", "weight_decay", "warmup", "label_smoothing", "body_lr",
                     "crop_area", "shift", "cutout", "seed"):
            if not least.get(name, 0) <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least.get(name, 0)}, and finite")
        for name in ("momentum", "label_smoothing"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be below 1")
        if self.body_lr > 1:
            raise ValueError(f"body_lr={self.body_lr} is a share of the learning rate, from 0 to 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} must be one of {', '.join(PRECISIONS)}")
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"crop_area={self.crop_area} is a share of an image's area, above 0 and at most 1; 1 crops nothing")
        if self.body_lr == 0 and (self.shift or self.flip or self.cutout or self.crop_area < 1):
            raise ValueError("body_lr=0 computes what the frozen layers make of an image once, so none can be cropped, shifted, "
                             "flipped or cut")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}" + _meant(self.schedule, SCHEDULES))


def learning_rate(config: Config, steps: int) -> optim.Schedule:
    """The learning rate of each step, counted from 0 over the whole training, with so many steps an epoch."""
    total, warm = config.epochs * steps, round(config.warmup * steps)
    schedule = {"constant": optim.constant_schedule(config.lr),
                "step": optim.step_schedule(config.lr, [total // 2, total * 3 // 4]),
                "cosine": optim.cosine_schedule(config.lr, total)}[config.schedule]
    return optim.warmup(schedule, warm, start=config.lr / 10) if warm else schedule


# ---------------------------------------------------------------- what a model gets right
@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model said to each of N images: predictions and labels, int64 (N,); confidences, its probability for what
    it said, (N,); and the mean cross-entropy."""

    labels: np.ndarray[Any, Any]
    predictions: np.ndarray[Any, Any]
    confidences: np.ndarray[Any, Any]
    loss: float

    @property
    def correct(self) -> int:
        """How many images it was right on."""
        return int((self.predictions == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """The share of the images that it was right on, from 0 to 1."""
        return self.correct / len(self.labels)

    def __str__(self) -> str:
        return f"accuracy {100 * self.accuracy:.2f} % ({self.correct} of {len(self.labels)})"


def evaluate(model: Sequential, dataset: ImageSet, normalize: Normalize, batch_size: int = AT_ONCE) -> Evaluation:
    """Run the data set through the model, at inference: neither gradients nor running statistics move."""
    _check_fits(model, dataset)
    predictions, confidences, losses = [], [], []           # stay on the model's device until all is under way
    with no_grad():
        for images, labels in batches(dataset, batch_size, seed=0, epoch=0, shuffle=False):
            logits = model(_to_input(images, normalize, model))
            probabilities = ops.softmax(logits).data
            predictions.append(probabilities.argmax(axis=1))
            confidences.append(probabilities.max(axis=1))
            losses.append(ops.cross_entropy(logits, labels).data * len(labels))
    xp = array_module(predictions[0])
    return Evaluation(dataset.labels, to_numpy(xp.concatenate(predictions)).astype(np.int64), to_numpy(xp.concatenate(confidences)),
                      float(to_numpy(xp.stack(losses)).sum(dtype=np.float64)) / len(dataset))


def predict(model: Sequential, images: np.ndarray[Any, Any], normalize: Normalize) -> np.ndarray[Any, Any]:
    """The probability of each class: images (N, C, H, W) uint8 -> (N, classes)."""
    with no_grad():
        return to_numpy(ops.softmax(model(_to_input(images, normalize, model))).data)


def confusion_matrix(labels: np.ndarray[Any, Any], predictions: np.ndarray[Any, Any], classes: int) -> np.ndarray[Any, Any]:
    """(classes, classes) counts: row t, column p says how many images of class t were taken for class p."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def _to_input(images: np.ndarray[Any, Any], normalize: Normalize, model: Sequential) -> Any:
    return to_device(normalize(images, model.dtype or np.float32), model.device)


# ---------------------------------------------------------------- the loop
class Trainer:
    """A training that can stop after any step: what changes from step to step, and the steps.

    epoch and step say how many whole epochs, and steps of the one that runs, are behind it; history has a row for each epoch.
    Images are normalised by the training set's own mean and standard deviation, unless `normalize` says otherwise.
    A last batch that is smaller than the others is left out (it has other images in every epoch), unless it is the only one.
    """

    def __init__(self, model: Sequential, train_set: ImageSet, test_set: ImageSet, config: Config,
                 normalize: Normalize | None = None) -> None:
        for dataset in (train_set, test_set):
            _check_fits(model, dataset)
        if config.cuda_graph and any(isinstance(layer, Dropout) and layer.p > 0 for _, layer in model.walk()):
            raise ValueError("cuda_graph: this model has Dropout, whose masks are drawn on the host anew at every step; leave one "
                             "of the two out")
        self.model, self.train_set, self.test_set, self.config = model, train_set, test_set, config
        self.normalize = normalize or normalization_of(train_set)
        _check_channels(self.normalize, model)
        self.optimizer = optim.SGD(self._groups(), config.lr, config.momentum, config.weight_decay, config.momentum > 0)
        self.scaler = optim.GradScaler() if config.precision == "fp16" else None
        self.drop_last = len(train_set) >= config.batch_size
        self.steps = steps_per_epoch(len(train_set), config.batch_size, drop_last=self.drop_last)      # of one epoch
        self.learning_rate = learning_rate(config, self.steps)
        self.epoch = self.step = 0
        self.history: list[Row] = []
        self.evaluation: Evaluation | None = None       # the last epoch's, on the held-out images
        self._captured: CapturedGradients | None = None
        p = self.model.parameters()[0].data
        self._sums = array_module(p).zeros(2, p.dtype)  # this epoch's summed loss and count of right answers, on the device

    def fit(self, *, on_step: Callable[[Trainer], None] | None = None, on_epoch: Callable[[Trainer], None] | None = None,
            save: Callable[[Trainer], None] | None = None, save_every: int = 0) -> list[Row]:
        """Train until the last epoch's end, from where it stands; return the history.

        on_step, on_epoch: called behind each, to look and to show.
        save: called behind each epoch, behind every `save_every` steps, and when Ctrl-C (KeyboardInterrupt) ends the training.
        Raises FloatingPointError behind an epoch in which the loss stopped being a number.
        """
        try:
            while self.epoch < self.config.epochs:
                with self._full(), precision(self.config.precision):
                    for inputs, labels in uploaded_ahead(self._inputs(), self.model.device):
                        with uninterrupted():           # a step is done, or it is not
                            self._train_step(inputs, labels)
                        del inputs
                        if on_step:
                            on_step(self)
                        if save and save_every and self.step % save_every == 0:
                            save(self)
                with self._full(), np.errstate(over="ignore", invalid="ignore"):
                    evaluation = self.evaluate()
                with uninterrupted():
                    self._end_epoch(evaluation)
                if save:
                    save(self)
                if on_epoch:
                    on_epoch(self)
        except KeyboardInterrupt:
            if save:
                with uninterrupted():
                    save(self)
            raise
        return self.history

    def running(self) -> tuple[float, float]:
        """Mean loss and accuracy over this epoch's steps so far. The host waits for the device, so look now and then only."""
        seen = max(1, self.step * min(self.config.batch_size, len(self.train_set)))
        loss, correct = to_numpy(self._sums)
        return float(loss) / seen, float(correct) / seen

    def evaluate(self) -> Evaluation:
        """What the model says to the held-out images now."""
        return evaluate(self.model, self.test_set, self.normalize, self._at_once())

    def _groups(self) -> list[Any]:
        """What the optimiser moves; where the body is slower, as two groups, the body's and the head's."""
        if self.config.body_lr == 1:
            return self.model.parameters()
        head = transfer.head_of(self.model)[1].parameters()
        mine = {id(p) for p in head}
        return [{"params": [p for p in self.model.parameters() if id(p) not in mine]}, {"params": head}]

    def _logits(self, inputs: Any) -> Any:
        return self.model(inputs, train=True)

    def _inputs(self) -> Iterator[tuple[np.ndarray[Any, Any], Any]]:
        """What the model reads, batch by batch, on the host."""
        return ((self.normalize(images, self.model.dtype or np.float32), labels) for images, labels in self._batches())

    def _at_once(self) -> int:
        """How many images run through the model where nothing is learnt: no more than in a step, so that what fits there fits."""
        return min(self.config.batch_size, AT_ONCE)

    @contextmanager
    def _full(self) -> Iterator[None]:
        """Says which batch would fit where the memory of a GPU is full."""
        with told_when_full(self.model.parameters()[0].data, self._try, self.config.batch_size):
            try:
                yield
            except MemoryError:
                self._captured = None           # a graph keeps the memory of its step
                raise

    def _try(self, images: int) -> None:
        """A step with so many images, all black, that leaves nothing behind."""
        state, rng = self.model.state_dict(), self.model.rng.bit_generator.state
        try:
            with precision(self.config.precision):
                ops.cross_entropy(self._logits(self._black(images)), np.zeros(images, int)).backward()
        finally:
            self.optimizer.zero_grad()
            self.model.load_state_dict(state)
            self.model.rng.bit_generator.state = rng

    def _black(self, images: int) -> Any:
        p = self.model.parameters()[0].data
        return array_module(p).zeros((images, *(self.model.in_shape or ())), p.dtype)

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        config = self.config
        crops = config.crop_area < 1
        changed = self._augmented if crops or config.shift or config.flip or config.cutout else None
        return batches(self.train_set, config.batch_size, seed=config.seed, epoch=self.epoch, start=self.step,
                       augmentation=changed, originals=crops, drop_last=self.drop_last)

    def _augmented(self, images: Any, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """What the configuration says is done to images at random: cropped, shifted, flipped, cut."""
        config, size = self.config, self.train_set.images.shape[2:]
        if config.crop_area < 1:
            images = data.random_resized_crop(images, rng, (size[0], size[1]), config.crop_area)
        return augment(images, rng, pad=config.shift, flip=config.flip, cutout=config.cutout)

    def _train_step(self, inputs: Any, labels: np.ndarray[Any, Any]) -> None:
        """Move the parameters by a batch."""
        self.optimizer.lr = self.learning_rate(self.epoch * self.steps + self.step)
        if self.config.body_lr < 1:
            self.optimizer.groups[0]["lr"] = self.optimizer.lr * self.config.body_lr
        with np.errstate(over="ignore", invalid="ignore"):      # a loss that diverges is told at the epoch's end
            there = to_device(labels, self.model.device)
            if self.config.cuda_graph and self.model.device != "cpu":
                if self._captured is None or not self._captured.knows(self):
                    self._captured = CapturedGradients(self, inputs, there)
                self._captured(inputs, there)
            else:
                self.find_gradients(inputs, there)
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
        self.step += 1

    def find_gradients(self, inputs: Any, labels: Any) -> None:
        """Forward and backward, of inputs and labels on the model's device; what the loss adds up to in this epoch is kept there.

        Reading a number here would make the host wait for the device at every step.
        """
        self.optimizer.zero_grad()
        logits = self._logits(inputs)
        loss = ops.softmax_cross_entropy(logits, labels, self.config.label_smoothing)       # an ImageSet's labels are in range
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._sums[0] += loss.data * len(labels)
        self._sums[1] += (logits.data.argmax(axis=1) == labels).sum()

    def _end_epoch(self, evaluation: Evaluation) -> None:
        loss, accuracy = self.running()
        if not np.isfinite([loss, evaluation.loss]).all():
            raise FloatingPointError(f"the loss is no number any more ({loss}) behind epoch {self.epoch + 1}: the learning rate "
                                     f"{self.config.lr:g} is too high; begin again with a lower one (--lr {self.config.lr / 10:g})")
        self.history.append({"epoch": self.epoch + 1, "steps": (self.epoch + 1) * self.steps, "lr": self.optimizer.groups[-1]["lr"],
                             "train_loss": loss, "train_accuracy": accuracy, "test_loss": evaluation.loss,
                             "test_accuracy": evaluation.accuracy, "test_correct": evaluation.correct})
        self.evaluation = evaluation
        self.epoch, self.step = self.epoch + 1, 0
        self._sums[...] = 0                             # in place: a captured step adds to this very array

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: with the configuration and the data, all that the steps to come depend on."""
        scaler = {} if self.scaler is None else {"scaler": self.scaler.state_dict()}
        return {**scaler, "epoch": self.epoch, "step": self.step, "sums": np.array(to_numpy(self._sums)),
                "history": json.dumps(self.history), "rng": json.dumps(self.model.rng.bit_generator.state),
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, and go on from there."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.rng.bit_generator.state = json.loads(str(state["rng"]))
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.history = json.loads(str(state["history"]))
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self._sums = to_device(np.array(state["sums"], self._sums.dtype), self.model.device)


class CapturedGradients:
    """A trainer's `find_gradients`, captured: batches are copied to where the graph reads, and it is asked for with one order.

    The graph knows arrays by their addresses: those that it reads are kept here, and the gradients that it makes are given to the
    parameters anew each time. Batch norm's counts are the host's affair, and made there. What the steps before the capture moved is
    put back.
    """

    def __init__(self, trainer: Trainer, inputs: Any, labels: Any) -> None:
        self.inputs, self.labels = inputs.copy(), labels.copy()
        self.parameters = trainer.model.parameters()
        self.buffers = [(layer, name) for _, layer in trainer.model.walk() for name in layer.buffer_names]
        moved = [(array, array.copy()) for array in (*self._buffers(), trainer._sums)]
        # The graph keeps its step: one that held this or the trainer would keep both from being freed when they are let go.
        arrays, owner = (self.inputs, self.labels), weakref.proxy(trainer)
        self.graph = Captured(lambda: owner.find_gradients(*arrays), trainer.model.device)
        for array, before in moved:
            array[...] = before
        self.read = self._read(trainer)
        self.gradients = [(p, p.grad) for p in self.parameters if p.requires_grad]
        self.counted = [layer for _, layer in trainer.model.walk() if isinstance(layer, BatchNorm2d) and layer.learns(train=True)]

    def __call__(self, inputs: Any, labels: Any) -> None:
        self.inputs[...], self.labels[...] = inputs, labels
        self.graph()
        for p, grad in self.gradients:
            p.grad = grad
        for layer in self.counted:
            layer.num_batches_tracked += 1

    def knows(self, trainer: Trainer) -> bool:
        """Whether the trainer's arrays are those that the graph reads; a state that was loaded since has others."""
        return all(a is b for a, b in zip(self.read, self._read(trainer), strict=True))

    def _read(self, trainer: Trainer) -> list[Any]:
        scaling = [] if trainer.scaler is None else [trainer.scaler._scaling]
        return [*(p.data for p in self.parameters), *self._buffers(), trainer._sums, *scaling]

    def _buffers(self) -> list[Any]:
        return [getattr(layer, name) for layer, name in self.buffers]


class Features(NamedTuple):
    """What a frozen body makes of the images of a set, (N, D), with their labels: batches are taken from it as from the set."""

    images: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    name: str

    def __len__(self) -> int:
        return len(self.labels)


class HeadTrainer(Trainer):
    """Trains the last layer alone. The layers below are frozen, so what they make of each image is computed once, and kept.

    An epoch then costs a matrix product an image, whatever the body costs.
    """

    def __init__(self, model: Sequential, train_set: ImageSet, test_set: ImageSet, config: Config,
                 normalize: Normalize | None = None) -> None:
        super().__init__(model, train_set, test_set, config, normalize)
        transfer.freeze_body(model)
        self.head = transfer.head_of(model)[1]
        self.known: dict[str, Features] = {}

    def features(self, which: str) -> Features:
        """Of "train" or "test", computed when they are first asked for."""
        if which not in self.known:
            dataset = self.train_set if which == "train" else self.test_set
            found = transfer.features(self.model, dataset, self.normalize, self._at_once())
            self.known[which] = Features(found, dataset.labels, dataset.name)
        return self.known[which]

    def evaluate(self) -> Evaluation:
        """What the model says to the held-out images now."""
        seen = self.features("test")
        with no_grad():
            logits = self.head(to_device(seen.images, self.model.device))
            probabilities = to_numpy(ops.softmax(logits).data)
            loss = float(ops.cross_entropy(logits, seen.labels))
        return Evaluation(seen.labels, probabilities.argmax(axis=1).astype(np.int64), probabilities.max(axis=1), loss)

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        return batches(self.features("train"), self.config.batch_size, seed=self.config.seed, epoch=self.epoch,     # type: ignore[arg-type]
                       start=self.step, drop_last=self.drop_last)

    def _inputs(self) -> Iterator[tuple[np.ndarray[Any, Any], Any]]:
        return self._batches()

    def _logits(self, inputs: Any) -> Any:
        return self.head(inputs, train=True)

    def _try(self, images: int) -> None:
        """What takes most: the layers below."""
        with precision(self.config.precision), no_grad():
            self.model(self._black(images))


def trainer_of(model: Sequential, train_set: ImageSet, test_set: ImageSet, config: Config,
               normalize: Normalize | None = None) -> Trainer:
    """The trainer that the configuration asks for."""
    return (Trainer if config.body_lr else HeadTrainer)(model, train_set, test_set, config, normalize)


def train(model: Sequential, train_set: ImageSet, test_set: ImageSet, config: Config = Config(), *,     # noqa: B008 (frozen)
          on_epoch: Callable[[Trainer], None] | None = None) -> Trainer:
    """Fit a built model, where it lies, to the training set; nothing is written. The trainer has `.history` and `.evaluation`."""
    trainer = trainer_of(model, train_set, test_set, config)
    trainer.fit(on_epoch=on_epoch)
    return trainer


def normalization_of(train_set: ImageSet) -> Normalize:
    """To mean 0 and standard deviation 1 a channel; a channel that is constant only loses its mean."""
    mean, std = channel_statistics(train_set.images)
    return Normalize(mean, tuple(s or 1.0 for s in std))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C inside the block takes effect at its end."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield                           # Python hands signals to the main thread alone; here none comes, or all are ignored
        return
    pressed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arrived: pressed.append(arrived))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        before(*pressed[0])


def _check_fits(model: Sequential, dataset: ImageSet) -> None:
    if model.in_shape is None or model.out_shape is None:
        raise ValueError("the model is not built: Sequential(layers, in_shape) builds it")
    if not len(dataset):
        raise ValueError(f"{dataset.name} has no images")
    image, classes = dataset.images.shape[1:], len(dataset.classes)
    if (image, (classes,)) != (model.in_shape, model.out_shape):
        raise ValueError(f"{dataset.name} has images {image} of {classes} classes, but the model takes {model.in_shape} and gives "
                         f"{model.out_shape}: build it with in_shape={image} and num_classes={classes}")


def _check_channels(normalize: Normalize, model: Sequential) -> None:
    channels = (model.in_shape or (0,))[0]
    if len(normalize.mean) != channels:
        raise ValueError(f"mean and std have a number for each of {len(normalize.mean)} channels, but the model reads {channels}")


# ---------------------------------------------------------------- a run and its folder
class Trained(NamedTuple):
    """A model with what is needed to use it. `about` is what config.json says."""

    path: Path
    model: Sequential
    normalize: Normalize
    about: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the outputs."""
        return self.about["classes"]


class Run:
    """A training and its folder.

        config.json         what the run is: data, model, how it is trained, versions
        metrics.jsonl       a JSON object an epoch
        checkpoint.npz      what it takes to go on, as of the last whole epoch, or later
        model.npz           the model as of the last whole epoch, with config.json in it: `load_trained` needs nothing else
        curves.png, confusion.png, mistakes.png         drawn at the end
    """

    def __init__(self, folder: Path, about: dict[str, Any], trainer: Trainer) -> None:
        self.folder, self.about, self.trainer = folder, about, trainer

    @property
    def finished(self) -> bool:
        """Whether all of its epochs are behind it."""
        return self.trainer.epoch >= self.trainer.config.epochs

    def fit(self, *, on_step: Callable[[Trainer], None] | None = None, on_epoch: Callable[[Trainer], None] | None = None,
            save_every: int = 0) -> None:
        """Train to the end. Ctrl-C saves a checkpoint, and goes on as KeyboardInterrupt."""
        with num_threads(self.about["threads"]):
            self.trainer.fit(on_step=on_step, on_epoch=on_epoch, save=self._save, save_every=save_every)

    def evaluation(self) -> Evaluation:
        """What the model of the last epoch says to the held-out images."""
        trainer = self.trainer
        if trainer.evaluation is None:          # the run was resumed behind its last epoch
            with num_threads(self.about["threads"]):
                trainer.evaluation = trainer.evaluate()
        return trainer.evaluation

    def draw(self) -> list[Path]:
        """Draw the pictures of a run with at least one epoch behind it. ImportError where matplotlib is missing."""
        found, images, classes = self.evaluation(), self.trainer.test_set.images, self.about["classes"]
        paths = [self.folder / name for name in PICTURES]
        with _saving(self.folder):
            plots.curves(paths[0], self.trainer.history)
            plots.confusion(paths[1], confusion_matrix(found.labels, found.predictions, len(classes)), classes)
            plots.mistakes(paths[2], images, found.labels, found.predictions, found.confidences, classes)
        return paths

    def _save(self, trainer: Trainer) -> None:
        with _saving(self.folder):
            if trainer.history and trainer.step == 0:
                _write_metrics(self.folder, trainer.history)
                save(self.folder / "model.npz", {"state_dict": trainer.model.state_dict(), "about": json.dumps(self.about)})
            save(self.folder / "checkpoint.npz", trainer.state_dict())      # last, for it vouches for the others


def begin(source: str = "digits", root: PathLike | None = None, *, model: str | None = None,
          image_size: Sequence[int] | None = None, skip_bad: bool = False, decode: str | None = None, dtype: str = "float32",
          device: str = "auto", threads: int | None = None, out: PathLike | None = None, start: PathLike | None = None,
          normalize: Normalize | None = None, **training: Any) -> Run:
    """A new run: data read, model built, folder made; nothing is trained yet.

    source: "digits", "mnist", "fashion_mnist", "cifar10", "cifar100" or a folder of images; of a folder, `image_size` (H, W)
        resizes the images, `skip_bad` leaves out files that are no images, and `decode` is "once", into memory, or "ahead", on
        threads ahead of the training (`data.image_folder`; with a crop_area below 1 "ahead", for it crops what is in the files).
    out: a folder that is new or empty; by default runs/DATA-MODEL-NUMBER.
    threads: of the matrix products; by default what suits the size of the images, see `default_threads`.
    start: weights to begin with, all but the head's (transfer.py): a model.npz, or, with `model`, a checkpoint from elsewhere.
        The images are made to fit what the model reads.
    normalize: what is done to the pixels; by default what was done to those that the start was trained on, as far as it says so or
        is "imagenet", else what gives them mean 0 and standard deviation 1.
    training: fields of Config that differ from the defaults for this data.
    """
    if model is not None and model not in models.names():
        models.build(model)                     # says so, before the data are read
    device = resolve_device(device)
    check_vacant(out)
    if str(start) == "imagenet" and model is not None and normalize is None:
        normalize = Normalize(*published.pixels_of(model))
    if start is not None and model is not None:
        start = published.find(model, start)
    body = _load_named(start) if start is not None else {}
    before = _parse_about(str(body["about"]), start or "") if "about" in body else {}
    if model is not None:
        _check_model(model, before, start or "")
    model = before.get("model", model)
    if body and model is None:
        raise ValueError(f"{start} does not say what model it is of: name it, too (--model MODEL)")
    form: dict[str, Any] = {}
    if body and not before:
        body, form = published.of_model(str(model), body)
    if decode is None and training.get("crop_area", 1) < 1 and source not in NAMES:
        decode = "ahead"
    if body:
        wanted = tuple(before.get("in_shape") or (image_size and (3, *image_size)) or models.default_in_shape(str(model)))
        image_size = wanted[1:] if source not in NAMES else image_size
    train_set, test_set = read_data(source, root, image_size, skip_bad, decode)
    if body:
        train_set, test_set = fitted(train_set, wanted), fitted(test_set, wanted)
    in_shape, classes = train_set.images.shape[1:], list(train_set.classes)
    fine = default_fine_tuning(training.get("body_lr", 0.0)) if body else {}
    crop = {"shift": 0} if training.get("crop_area", 1) < 1 else {}         # it moves them, too
    config = Config(**{**default_training(source, in_shape), **fine, **crop, **training})
    if normalize is None:
        normalize = Normalize.from_dict(before["normalize"]) if before else normalization_of(train_set)
    if config.cuda_graph and device == "cpu":
        raise ValueError("cuda_graph captures what a GPU is asked for, and this run is on the CPU: leave it out")
    if config.precision != "fp32" and device == "cpu":
        raise ValueError(f"precision={config.precision} is how a GPU computes, and this run is on the CPU: leave it out")
    half_type(config.precision)                 # raises where NumPy does not know it, before a folder is made
    model = model or default_model(in_shape)
    about: dict[str, Any] = {
        "model": model, "model_options": before.get("model_options", form if body else model_options(model, in_shape)),
        "in_shape": list(in_shape), "num_classes": len(classes),
        "classes": classes, "normalize": normalize.as_dict(), "dtype": str(np.dtype(dtype)),
        "data": source if source in NAMES else str(Path(root or "", source).resolve()),
        "root": str(Path(root).resolve()) if root and source in NAMES else None, "image_size": image_size, "skip_bad": skip_bad,
        "decode": "ahead" if isinstance(train_set.images, data.ImageFiles) else "once",
        "train_images": len(train_set), "test_images": len(test_set), "fingerprint": fingerprint(train_set, test_set),
        "training": asdict(config), "device": device, "threads": threads or default_threads(in_shape),
        "versions": {"minicnn": __version__, "numpy": np.__version__, "python": platform.python_version(),
                     "machine": platform.machine()},
        **({"start": str(Path(start).resolve())} if start is not None else {}),
    }
    built = _build(about)
    if body:
        transfer.load_body(built, body)
    trainer = trainer_of(built, train_set, test_set, config, normalize)
    folder = make_folder(out, f"{Path(about['data']).name}-{model}")
    with _saving(folder, cure="begin again"):
        _write_json(folder / "config.json", about)
    return Run(folder, about, trainer)


def resume(folder: PathLike, *, epochs: int | None = None, device: str | None = None) -> Run:
    """The run of that folder, as its last checkpoint has it; what was written behind the checkpoint is forgotten.

    epochs: a new number of them, for the rest of the run. The schedule is that of a run with so many epochs, from here on.
    device: another than the run began on; the numbers then differ in their last digits.
    Raises ValueError where the data are not those that the run began with.
    """
    folder = Path(folder)
    about = _read_about(folder)
    train_set, test_set = _data_of(about)
    if fingerprint(train_set, test_set) != about["fingerprint"]:
        raise DataError(f"the images of {about['data']} are not those that {folder} began with, and some held out then may be "
                        "trained on now: begin a new run")
    about["device"] = resolve_device(device or about["device"])
    done = load(folder / "checkpoint.npz") if (folder / "checkpoint.npz").exists() else None
    if epochs is not None and epochs != about["training"]["epochs"]:
        if done and epochs < int(done["epoch"]) + bool(done["step"]):
            raise ValueError(f"{folder} is in epoch {int(done['epoch']) + 1} already, so it cannot end behind epoch {epochs}")
        about["epochs_before"] = [*about.get("epochs_before", []), about["training"]["epochs"]]
        about["training"]["epochs"] = epochs
    trainer = trainer_of(_build(about), train_set, test_set, Config(**about["training"]), Normalize.from_dict(about["normalize"]))
    if done:
        try:
            trainer.load_state_dict(done)
        except KeyError as error:
            raise WeightsError(f"{folder / 'checkpoint.npz'} is no checkpoint: it lacks {error}") from None
    with _saving(folder):
        for name in map(Path, FILES):           # what a kill left half-written, beside its place
            for stray in folder.glob(f".{name.stem}-*{name.suffix}"):
                stray.unlink()
        _write_json(folder / "config.json", about)
        _write_metrics(folder, trainer.history)
    return Run(folder, about, trainer)


def newest_run(holding: str = "config.json", runs: Path = RUNS) -> Path:
    """The run in ./runs that wrote this file last."""
    found = sorted(runs.glob(f"*/{holding}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no run in ./{runs} has a {holding}: train one with `minicnn train`, "
                                "or name a run's folder with --run")
    return found[-1].parent


def load_trained(folder: PathLike | None = None, weights: PathLike | None = None, device: str = "auto",
                 normalize: Normalize | None = None) -> Trained:
    """A trained model, to use: of the run in `folder`, or of the newest one in ./runs.

    weights: a model.npz, which needs no folder; or, beside `folder`, any file of weights for that run's model.
    normalize: what is done to the pixels, where that is not what the run did.
    """
    if weights is None:
        folder = newest_run("model.npz") if folder is None else Path(folder)
        weights = folder / "model.npz"
        if _read_about(folder) and not weights.exists():
            raise FileNotFoundError(f"{folder} has no model yet, since its first epoch is not over; go on with "
                                    f"`minicnn train --resume {folder}`")
    state = _load_named(weights)
    if folder is None and "about" not in state:
        raise ValueError(f"{weights} holds weights alone: name the run whose model they are for, too (--run FOLDER), or the model "
                         "(--model MODEL)")
    about = _read_about(Path(folder)) if folder is not None else _parse_about(str(state["about"]), weights)
    model = _build({**about, "device": resolve_device(device)})
    model.load_state_dict(state)
    normalize = normalize or Normalize.from_dict(about["normalize"])
    _check_channels(normalize, model)
    return Trained(Path(weights), model, normalize, about)


def _load_named(weights: PathLike) -> dict[str, Any]:
    """What is in a file. ValueError for weights that are found by the name of their model, where that is not said."""
    if str(weights) in published.PUBLISHED or "://" in str(weights):
        raise ValueError(f"{weights} does not say what model it is of: name it, too (--model MODEL)")
    return published.read(weights)


def load_published(model: str, weights: PathLike, classes: Sequence[str] | None = None, in_shape: Sequence[int] | None = None,
                   normalize: Normalize | None = None, device: str = "auto") -> Trained:
    """A model with weights from elsewhere, built by its name.

    weights: a file, its address, or "imagenet", as for the model functions. What is not said beside it, a model.npz of a run says.
    classes: their names; by default those of CIFAR-10 for ten classes of a model that is made for it, else numbers, as many as the
    last layer of the weights has.
    in_shape: of the images; by default what the model is made for.
    normalize: what was done to the pixels that it was trained on. Nobody but its makers knows; by default they are only divided by
    255, and a warning says so.
    """
    if model not in models.names():
        models.build(model)                     # says so, before a file is read
    if str(weights) == "imagenet" and normalize is None:
        normalize = Normalize(*published.pixels_of(model))
    weights = published.find(model, weights)
    checkpoint = published.read(weights)
    said = _parse_about(str(checkpoint["about"]), weights) if "about" in checkpoint else {}
    _check_model(model, said, weights)
    state, form = published.of_model(model, checkpoint)
    form = said.get("model_options", form)
    shape = tuple(in_shape or said.get("in_shape") or models.default_in_shape(model))
    if classes is None and not said:
        last = list(models.build(model, in_shape=shape, **form).state_dict())[-1]      # a file may hold them in another order
        if last not in state or not np.ndim(state[last]):
            raise WeightsError(f"{weights} has no {last} of {model}'s last layer, so it does not say how many classes it knows")
        classes = _class_names(model, shape, len(state[last]))
    classes = said["classes"] if classes is None else list(classes)
    if normalize is None and said:
        normalize = Normalize.from_dict(said["normalize"])
    if normalize is None:
        warnings.warn("the pixels are divided by 255 and nothing else; if the weights were trained on normalised images, say how, "
                      "with --mean and --std (in Python, normalize=Normalize(mean, std))", RuntimeWarning, stacklevel=2)
        normalize = Normalize((0.0,) * shape[0], (1.0,) * shape[0])
    about = {"model": model, "num_classes": len(classes), "in_shape": list(shape), "classes": classes, "dtype": "float32",
             "device": resolve_device(device), "training": {"seed": 0}, "model_options": form}
    built = _build(about)
    built.load_state_dict(state)
    _check_channels(normalize, built)
    return Trained(Path(weights), built, normalize, about)


def _class_names(model: str, shape: tuple[int, ...], count: int) -> list[str]:
    """What so many classes are called that nobody has named: those of a model for CIFAR-10 are most likely that; else by number."""
    if count == len(CIFAR10_CLASSES) and shape == models.default_in_shape(model) == SHAPE:
        return [*CIFAR10_CLASSES]
    return [str(i) for i in range(count)]


def _check_model(model: str, said: Mapping[str, Any], weights: PathLike) -> None:
    """ValueError where a run's file says that it is of another model."""
    if said and said["model"] != model:
        raise ValueError(f"{weights} says that it is of {said['model']}, not of {model}: leave the model's name out")


def only_held_out(source: str, root: PathLike | None = None, image_size: Sequence[int] | None = None,
                  skip_bad: bool = False, whole: bool = False) -> ImageSet:
    """The test images of a source alone: of CIFAR-10, which has five times as many to train on, only they are decoded.

    whole: of a folder all images, for a model that has been trained on none of them.
    """
    if source not in NAMES:
        return data.judged_images(_folder(source, root), _pair(image_size), whole=whole, skip_bad=skip_bad)
    if whole:
        raise ValueError(f"all images (--all) are for a folder; {source} has test images of its own")
    if source == "cifar10" and root is not None and image_size is None:
        return data.cifar10(root, parts=["test"])[0]
    return read_data(source, root, image_size, skip_bad)[1]


def held_out(about: Mapping[str, Any], source: str | None = None, root: PathLike | None = None, whole: bool = False) -> ImageSet:
    """The images that a run held out, or the test images of another source with the same classes; whole: all of a folder.

    Warns where the run's own source has changed since: what is held out now may have been trained on.
    """
    own, source, root = source is None, source or about["data"], root or about["root"]
    size = None if source in NAMES else about["image_size"]
    if own:
        train_set, test_set = _data_of({**about, "root": root})
    else:
        test_set = only_held_out(source, root, size, about.get("skip_bad", False), whole)
        test_set = fitted(test_set, about["in_shape"]) if "start" in about else test_set
    if own and fingerprint(train_set, test_set) != about["fingerprint"]:
        warnings.warn(f"the images of {source} have changed since the run began: some of the {len(test_set)} held out now may "
                      "have been trained on then", RuntimeWarning, stacklevel=2)
    if list(test_set.classes) != about["classes"]:
        raise ValueError(f"{source} has the classes {_few(test_set.classes)}, but the model knows {_few(about['classes'])}; "
                         "they must be the same, in the same order")
    return test_set


# ---------------------------------------------------------------- what suits which data
def read_data(source: str, root: PathLike | None = None, image_size: Sequence[int] | None = None,
              skip_bad: bool = False, decode: str | None = None) -> tuple[ImageSet, ImageSet]:
    """(train, test) of "digits", "mnist", "fashion_mnist", "cifar10", "cifar100" or a folder of images.

    image_size: (H, W) that those of a folder are resized to.   skip_bad: leave out its files that are no images.
    decode: of a folder "once" or "ahead", see `data.image_folder`.
    """
    if source in NAMES:
        if image_size is not None:
            raise ValueError(f"image_size={image_size} is for a folder of images; those of {source} have one size")
        if decode == "ahead":
            raise ValueError(f'decode="ahead" is for a folder of images; those of {source} are decoded once, into memory')
        return data.load(source, root)
    return data.image_folder(_folder(source, root), _pair(image_size), skip_bad=skip_bad, decode=decode)


def _pair(size: Sequence[int] | None) -> tuple[int, int] | None:
    return None if size is None else (size[0], size[1])


def _folder(source: str, root: PathLike | None) -> Path:
    """Where a folder of images is, or an archive of one. DataError where nothing is."""
    path = Path(root or "", source)
    if not path.exists():
        raise DataError(f"no data set {source!r}: known are {', '.join(NAMES)}, and any folder of images, but {path} does not exist"
                        f"{_meant(source, NAMES)}")
    return path


def _data_of(about: Mapping[str, Any]) -> tuple[ImageSet, ImageSet]:
    """(train, test), as the run reads them: where it began with another's weights, made to fit what the model reads."""
    decode = about.get("decode") if about["data"] not in NAMES else None
    sets = read_data(about["data"], about["root"], about["image_size"], about.get("skip_bad", False), decode)
    return (fitted(sets[0], about["in_shape"]), fitted(sets[1], about["in_shape"])) if "start" in about else sets


def default_fine_tuning(body_lr: float) -> dict[str, Any]:
    """Fields of Config for a new head on a body that was trained before: it learns in a few epochs."""
    return {"epochs": 10, "body_lr": body_lr, **({} if body_lr else {"shift": 0, "flip": False})}


def default_training(source: str, in_shape: tuple[int, ...]) -> dict[str, Any]:
    """Fields of Config. What a shift or a flip leaves a digit or a thing to be depends on the data: a flipped 2 is none."""
    known: dict[str, dict[str, Any]] = {
        "digits": {"epochs": 30, "shift": 1, "weight_decay": 1e-3, "label_smoothing": 0.1},
        "mnist": {"epochs": 10, "batch_size": 128, "shift": 2},
        "fashion_mnist": {"epochs": 20, "batch_size": 128, "shift": 2, "flip": True},
        **dict.fromkeys(("cifar10", "cifar100"), {"epochs": 60, "batch_size": 128, "shift": 4, "flip": True})}
    return known.get(source, {"epochs": 30, "shift": in_shape[1] // 8, "flip": True})


def default_model(in_shape: tuple[int, ...]) -> str:
    """A model that quarters small images, and one that divides large ones by 32."""
    return "resnet20" if max(in_shape[1:]) <= 64 else "resnet18"


def model_options(model: str, in_shape: tuple[int, ...]) -> dict[str, Any]:
    """A VGG's fully connected layers were made for images of 224 x 224; on small ones a tenth of them is enough."""
    return {"pool": 1, "hidden": 512} if model.startswith("vgg") and max(in_shape[1:]) <= 64 else {}


def default_threads(in_shape: tuple[int, ...]) -> int:
    """Small images make small matrix products, in which a second thread mostly waits; worse, where another program has
    the other core, the first one waits too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if max(in_shape[1:]) <= 32 else cores


def fingerprint(*sets: ImageSet) -> str:
    """Eight hexadecimal digits that change with any pixel, label or order; of images that stay in files with any byte of these."""
    crc = 0
    for part in sets:
        images = part.images.crcs if isinstance(part.images, data.ImageFiles) else part.images
        for array in (images, part.labels):
            crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return f"{crc:08x}"


def _build(about: Mapping[str, Any]) -> Sequential:
    model = models.build(about["model"], about["num_classes"], about["in_shape"], seed=about["training"]["seed"],
                         dtype=about["dtype"], **about["model_options"])
    return model.to(about["device"])


# ---------------------------------------------------------------- files
def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no run's folder: it {'has no config.json' if folder.exists() else 'does not exist'}")
    return _parse_about(path.read_bytes(), path)


def _parse_about(text: str | bytes, where: PathLike) -> dict[str, Any]:
    try:
        about = json.loads(text)
        if lacking := ABOUT.difference(about):
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{where} is damaged, in what it says of its run: {error}") from None
    return about


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}\n")


def _write_metrics(folder: Path, history: list[Row]) -> None:
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    def write(temporary: str) -> None:
        Path(temporary).write_text(text, encoding="utf-8")
    atomically(path, write)


def check_vacant(out: PathLike | None) -> None:
    """FileExistsError where a folder that is to be written to holds something already, or is none."""
    if out is not None and Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        there = f", or go on with the run that is there by --resume {out}" if Path(out, "config.json").exists() else ""
        raise FileExistsError(f"{out} exists already, and nothing is written over: name a new folder with --out{there}")


def make_folder(out: PathLike | None, stem: str, parent: Path | None = None) -> Path:
    """The folder `out`, or PARENT/STEM-NUMBER with the next number; the parent is ./runs unless said."""
    parent = parent or RUNS
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    parent.mkdir(exist_ok=True)
    taken = [int(match[1]) for path in parent.glob(f"{glob.escape(stem)}-*") if (match := re.search(r"-(\d+)$", path.name))]
    number = max(taken, default=0) + 1
    while True:
        try:
            (parent / f"{stem}-{number}").mkdir()
            return parent / f"{stem}-{number}"
        except FileExistsError:                 # another run began at the same moment
            number += 1


@contextmanager
def _saving(folder: Path, cure: str = "go on with `minicnn train --resume {folder}`") -> Iterator[None]:
    """Say of a full disk, or whatever else keeps a file from being written, what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {folder} ({error.strerror or error}); what was saved before is whole: "
                                   f"mend that, then {cure.format(folder=folder)}") from error


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
