"""The `minicnn` command: reads the command line, calls the library, prints what it found.

Whatever goes wrong by somebody's hand ends in one line on stderr, `minicnn: error: ...`, and a status that is not 0: 2 for a
command line that makes no sense, 130 for Ctrl-C, 1 for all else. `python -X dev -m minicnn ...` shows where it was raised.
"""
from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

import minicnn
from minicnn import backend, data, export, models, train
from minicnn.accelerator import OutOfDeviceMemory
from minicnn.layers import MisfitError
from minicnn.testing import table

LEFT_OUT = {"tqdm": "no progress bar", "matplotlib": "no pictures"}       # where these libraries are missing
EXTRAS = ("scikit-learn", "matplotlib", "pillow", "tqdm", "safetensors", "latex2mathml", "onnx")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:          # closed before we began
            setattr(sys, name, open(os.devnull, "w"))       # noqa: SIM115 (open as long as the process lives)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _tell(f"note: {message}")
        try:
            options = vars(_parse(arguments))
            del options["name"]
            status = options.pop("command")(**options)
            sys.stdout.flush()                  # a full disk or a closed pipe is to show here
            return int(status or 0)
        except UsageError as error:
            _tell(f"error: {error}")
            return 2
        except KeyboardInterrupt as interrupt:
            _tell(str(interrupt) or "interrupted")
            return 130
        except BrokenPipeError:                 # `minicnn summary vgg16 | head` has read enough
            _discard_output()
            return 141                          # as of a program that the closed pipe ended: 128 + SIGPIPE
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError) as error:
            if sys.flags.dev_mode:
                raise
            _tell(f"error: {_in_words(error)}")
            _discard_output()
            return 1


class UsageError(Exception):
    """A command line that makes no sense."""


# ---------------------------------------------------------------- commands
def _train(resume: str | None = "", save_every: int = 0, augment: bool = True, **options: Any) -> None:
    if not augment:
        options.update(shift=0, flip=False)
    if resume == "":
        run = train.begin(**options)
    else:
        run = train.resume(train.newest_run() if resume is None else resume, **_may_change(options))
    _fit(run, save_every)


def _finetune(weights: str, save_every: int = 0, augment: bool = True, mean: tuple[float, ...] | None = None,
              std: tuple[float, ...] | None = None, **options: Any) -> None:
    if not augment:
        options.update(shift=0, flip=False)
    run = train.begin(start=weights, normalize=_normalize(mean, std), **options)
    share = run.trainer.config.body_lr
    print(f"weights {weights}: all but the last layer, "
          + (f"at {share:g} of the learning rate" if share else "frozen; what it makes of each image is computed once"))
    _fit(run, save_every)


def _fit(run: train.Run, save_every: int) -> None:
    """Train it to its end, and say what comes of it."""
    trainer, about = run.trainer, run.about
    print(f"data    {about['data']}: {about['train_images']:,} images to train on, {about['test_images']:,} held out; "
          f"{' x '.join(map(str, about['in_shape']))}, {about['num_classes']} classes")
    print(f"model   {about['model']}: {sum(p.size for p in trainer.model.parameters()):,} parameters, {about['dtype']}")
    print(f"device  {_device(about)}")
    print(f"folder  {run.folder}", flush=True)
    if lacking := [library for library in LEFT_OUT if importlib.util.find_spec(library) is None]:
        print(f"        {' and '.join(LEFT_OUT[library] for library in lacking)}: {' and '.join(lacking)} cannot be found; "
              f"pip install {' '.join(lacking)}")
    finished = run.finished
    if finished:
        print(f"\nthis run is finished, with {trainer.epoch} epochs; --epochs and a larger number would train it longer")
    elif trainer.epoch or trainer.step:
        print(f"\ngoing on behind {_behind(trainer)}")

    shown, began = Progress(trainer), time.monotonic()
    try:
        run.fit(on_step=shown.step, on_epoch=shown.epoch, save_every=save_every)
        shown.close()
        print(f"\n{run.evaluation()}{'' if finished else f', after {time.monotonic() - began:.0f} s'}", flush=True)
        pictures = [] if "matplotlib" in lacking else run.draw()
    except KeyboardInterrupt:
        shown.close()
        raise KeyboardInterrupt(f"interrupted behind {_behind(trainer)}; saved. "
                                f"Go on with `minicnn train --resume {run.folder}`") from None
    print(f"in {run.folder}: " + ", ".join(["model.npz", "metrics.jsonl", *(path.name for path in pictures)]))


def _may_change(options: dict[str, Any]) -> dict[str, Any]:
    if fixed := sorted(options.keys() - {"epochs", "device"}):
        flag = {"source": "data", "shift": "no-augment", "flip": "no-augment"}.get(fixed[0], fixed[0].replace("_", "-"))
        raise UsageError(f"--{flag} cannot change in a run that is resumed; only --epochs, --device and --checkpoint-every can")
    return options


def _behind(trainer: train.Trainer) -> str:
    steps = f" and {trainer.step} of {trainer.steps} steps" if trainer.step else ""
    return f"{trainer.epoch} of {trainer.config.epochs} epochs{steps}"


class Progress:
    """What is shown while a model trains: a line an epoch on stdout and, on a terminal, a bar below."""

    HEAD = "   epoch        lr     loss  accuracy   held out: loss  accuracy"

    def __init__(self, trainer: train.Trainer) -> None:
        self.bar: Any = None
        self.looked = 0.0
        self.headed = False
        if importlib.util.find_spec("tqdm") is not None:
            self.bar = importlib.import_module("tqdm").tqdm(
                total=trainer.config.epochs * trainer.steps, initial=trainer.epoch * trainer.steps + trainer.step, unit="step",
                dynamic_ncols=True, leave=False, disable=None)      # None: only on a terminal

    def step(self, trainer: train.Trainer) -> None:
        """Move the bar on by a step."""
        if self.bar is None or self.bar.disable:
            return
        if time.monotonic() - self.looked > 0.5:            # not at every step: to look is to wait for the device
            self.looked = time.monotonic()
            loss, accuracy = trainer.running()
            self.bar.set_postfix_str(f"loss {loss:.4f}, {100 * accuracy:.1f} %, lr {trainer.optimizer.lr:.4f}", refresh=False)
        self.bar.update()

    def epoch(self, trainer: train.Trainer) -> None:
        """Print the line of the epoch that has just ended."""
        row, total = trainer.history[-1], len(trainer.test_set)
        self._line(f"{row['epoch']:4} / {trainer.config.epochs:<4}{row['lr']:7.4f}  {row['train_loss']:7.4f}  "
                   f"{100 * row['train_accuracy']:6.2f} %  {row['test_loss']:15.4f}  {100 * row['test_accuracy']:6.2f} %"
                   f"  ({row['test_correct']} of {total})")

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()

    def _line(self, text: str) -> None:
        write = print if self.bar is None else self.bar.write
        if not self.headed:
            write(self.HEAD)
            self.headed = True
        write(text)
        sys.stdout.flush()


def _eval(run: str | None = None, weights: str | None = None, source: str | None = None, root: str | None = None,
          model: str | None = None, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
          image_size: tuple[int, ...] | None = None, skip_bad: bool = False, whole: bool = False, batch_size: int = train.AT_ONCE,
          device: str = "auto", as_json: bool = False) -> None:
    normalize = _normalize(mean, std)
    if model is None and (image_size is not None or skip_bad):
        raise UsageError("--image-size and --skip-bad are for weights from elsewhere, with --model; a run knows its own")
    if whole and source is None:
        raise UsageError("--all is for the images of another folder, which --data names: the run was trained on most of its own")
    if model is not None:
        if run is not None or weights is None or source is None:
            raise UsageError("--model is for weights from elsewhere: it takes --weights FILE and --data DATA, and no --run")
        test_set = train.only_held_out(source, root, image_size, skip_bad, whole)
        trained = train.load_published(model, weights, test_set.classes, test_set.images.shape[1:], normalize, device)
    else:
        trained = train.load_trained(run, weights, device, normalize)
        test_set = train.held_out(trained.about, source, root, whole)
    found = train.evaluate(trained.model, test_set, trained.normalize, batch_size)
    if as_json:
        print(json.dumps({"model": trained.about["model"], "weights": str(trained.path), "data": test_set.name, "loss": found.loss,
                          "accuracy": found.accuracy, "correct": found.correct, "total": len(test_set)}))
    else:
        print(f"{trained.path} on {test_set.name}")
        print(f"{found}")


def _normalize(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> data.Normalize | None:
    if (mean is None) != (std is None):
        raise UsageError("--mean and --std go together: one number a channel in each")
    return data.Normalize(mean, std) if mean is not None and std is not None else None


def _predict(images: list[str], top: int = 5, as_json: bool = False, **which: Any) -> None:
    trained = _model(**which)
    answers = []
    for path in images:                                     # one by one: there may be many, and the first answers are of use
        image = data.read_image(path, trained.about["in_shape"])
        probabilities = train.predict(trained.model, image[None], trained.normalize)[0]
        likeliest = [(trained.classes[i], float(probabilities[i])) for i in np.argsort(-probabilities, kind="stable")[:top]]
        if as_json:
            answers.append({"image": path, "classes": [{"class": name, "probability": p} for name, p in likeliest]})
            continue
        width = max(len(name) for name, _ in likeliest)
        print(path)
        for name, p in likeliest:
            print(f"  {name:{width}}  {100 * p:6.2f} %  {_bar(p)}".rstrip())
        sys.stdout.flush()
    if as_json:
        print(json.dumps(answers))


def _export(onnx: str, **which: Any) -> None:
    trained = _model(**which, device="cpu")
    export.onnx(trained.model, onnx, name=trained.about["model"], classes=trained.classes, normalize=trained.normalize)
    shape = ", ".join(map(str, trained.about["in_shape"]))
    print(f"{onnx}: {trained.about['model']} of {trained.path}, {os.path.getsize(onnx) / 1e6:.1f} MB\n"
          f"  in   {export.INPUT} (N, {shape}), float32: (pixel / 255 - mean) / std\n"
          f"  out  {export.OUTPUT} (N, {len(trained.classes)})\n"
          f"mean, std and the names of the classes are in its metadata, normalize and classes, as JSON")


def _model(run: str | None = None, weights: str | None = None, model: str | None = None, classes: str | None = None,
           in_shape: tuple[int, ...] | None = None, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
           device: str = "auto") -> train.Trained:
    """The trained model that the options of `_add_which` and `_add_elsewhere` name."""
    normalize = _normalize(mean, std)
    names = None if classes is None else _lines(classes)
    if model is not None:
        if run is not None or weights is None:
            raise UsageError("--model is for weights from elsewhere: it takes --weights FILE, and no --run")
        trained = train.load_published(model, weights, None, in_shape, normalize, device)
        if names is not None and len(names) != len(trained.classes):
            raise ValueError(f"{classes} names {len(names)} classes, but {trained.path} knows {len(trained.classes)}")
        return trained if names is None else trained._replace(about={**trained.about, "classes": names})
    if names is not None or in_shape is not None:
        raise UsageError("--classes and --in-shape are for weights from elsewhere, with --model; a run knows its own")
    return train.load_trained(run, weights, device, normalize)


def _bar(share: float, width: int = 30) -> str:
    """A line of so many blocks for the whole, in eighths of a block; of signs that any terminal has, where it has no blocks."""
    eighths = round(share * width * 8)
    bar = "\u2588" * (eighths // 8) + " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[eighths % 8].strip()
    try:
        bar.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#" * round(share * width)
    return bar


def _lines(path: str) -> list[str]:
    """The names in a file, one a line."""
    try:
        with open(path, encoding="utf-8") as file:
            names = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError:
        names = []
    if not names:
        raise ValueError(f"{path} holds no names of classes: write one a line, in the order of the model's outputs")
    return names


def _summary(model: str, classes: int | None = None, in_shape: tuple[int, ...] | None = None, as_json: bool = False) -> None:
    summary = models.build(model, classes, in_shape).summary()
    if as_json:
        print(json.dumps({"model": model, "layers": [row._asdict() for row in summary.rows], "parameters": summary.parameters,
                          "multiply_adds": summary.multiply_adds, "activation_bytes": summary.activation_bytes}))
    else:
        print(summary)


def _study(model: str | None = None, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
           as_json: bool = False, **options: Any) -> int:
    def tell(subject: Any) -> None:
        if not as_json:
            print(f"{subject.name}, weights: {subject.weights}")
            print(f"{subject.image_name}, labelled {subject.classes[int(subject.labels[0])]} ({subject.said_by})", flush=True)

    path, subject, report = importlib.import_module("minicnn.study.report").run(
        model, normalize=_normalize(mean, std), tell=tell, **options)
    if as_json:
        print(json.dumps({"file": str(path), "model": subject.name, "weights": subject.weights, "steps": len(report.tape),
                          "checked": report.checked, "wrong": report.wrong}))
    else:
        print(f"{len(report.tape)} steps; {report.checked:,} numbers of their gradients compared with differences, "
              f"{report.wrong} wrong")
        print(f"{path}, {path.stat().st_size / 1e6:.1f} MB: open it in a browser, and go on with the right arrow key")
    return 1 if report.wrong else 0


def _bench() -> None:
    """Never called: one of the commands below it is."""


def _bench_kernels(words: Sequence[str] = (), **options: Any) -> Any:
    return _laboratory("laboratory").run(words, **options)


def _bench_models(names: Sequence[str] = (), **options: Any) -> Any:
    return _laboratory("whole").run(names, **options)


def _bench_compare(before: str, after: str) -> None:
    _laboratory("compare").run(before, after)


def _bench_plot(file: str, out: str | None = None) -> None:
    _laboratory("plot").run(file, out)


def _bench_tune(**options: Any) -> None:
    _laboratory("tune").run(**options)


def _laboratory(module: str) -> Any:
    """A module of the laboratory, which only those who measure wait for."""
    return importlib.import_module(f"minicnn.bench.{module}")


def _study_attribute(image: str, target: str | None = None, layer: str | None = None, position: tuple[int, int] | None = None,
                     out: str | None = None, as_json: bool = False, **which: Any) -> None:
    trained = _model(**which)
    importlib.import_module("minicnn.study.commands").attribute(image, trained, target, layer, position, out, as_json)


def _study_compare(**options: Any) -> None:
    importlib.import_module("minicnn.study.commands").compare(**options)


def _info() -> None:
    print(f"minicnn {minicnn.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(backend.describe())
    print("extras")
    for name in EXTRAS:
        try:
            state = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            state = f"not installed: pip install {name}"
        print(f"  {name:<18}  {state}")


def _gradcheck() -> int:
    print(f"{'gradients of':<24}  {'order':<6}  {'arrays':>6}  {'largest relative error':>22}  {'seconds':>7}")
    results = table.check_everything(on_result=_show_result)
    wrong = [result for result in results if not result.ok]
    seconds = sum(result.seconds for result in results)
    print(f"{len(wrong)} of {len(results)} wrong" if wrong else f"all {len(results)} right", f"in {seconds:.0f} s")
    return 1 if wrong else 0


def _show_result(result: table.Result) -> None:
    order = {1: "first", 2: "second"}[result.order]
    verdict = "" if result.ok else "  WRONG"
    print(f"{result.name:<24}  {order:<6}  {result.inputs:6}  {result.worst:22.1e}  {result.seconds:7.2f}{verdict}")
    if not result.ok:
        print(textwrap.indent(result.message, "    "))
    sys.stdout.flush()          # one line after the other, also through a pipe


# ---------------------------------------------------------------- the command line
class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest name there is."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **settings)    # the library's defaults hold

    def error(self, message: str) -> NoReturn:
        """What argparse calls with its complaint."""
        if choice := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            message += _did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser, commands = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    two, of_two = " ".join(words[:2]), [name for name in commands if " " in name]          # such as `study compare`
    if two in of_two:
        words[:2] = [two]
    elif close := difflib.get_close_matches(two, of_two, 1, cutoff=0.85):
        raise UsageError(f"no command {two!r}; did you mean `minicnn {close[0]}`?")
    options, unknown = parser.parse_known_args(words)
    if unknown:
        command = commands[options.name]
        flags = re.findall(r"--[\w-]+", command.format_usage())
        raise UsageError(f"unknown: {' '.join(unknown)}{_did_you_mean(unknown[0].partition('=')[0], flags)}; "
                         f"see `{command.prog} --help`")
    return options


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _parser() -> tuple[Parser, Mapping[str, argparse.ArgumentParser]]:
    parser = Parser(prog="minicnn", description="A from-scratch convolutional-network engine: train, use and look at its models.")
    parser.add_argument("--version", action="version", version=f"minicnn {minicnn.__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND", parser_class=Parser)

    def command(function: Callable[..., Any], line: str) -> argparse.ArgumentParser:
        name = function.__name__.removeprefix("_").replace("_", " ")
        added = commands.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        added.set_defaults(command=function)
        return added

    add = command(_train, "train a model; without any option, ResNet-20 on scikit-learn's handwritten digits").add_argument
    _add_training(add, "for the digits 30")
    add("--model", metavar="MODEL", help="one of " + ", ".join(models.names()))
    add("--dtype", choices=["float32", "float64"], help="what is computed in; float32")
    add("--resume", nargs="?", metavar="RUN", help="go on with an interrupted run, the newest in ./runs unless named; with more "
        "--epochs also with a finished one, on the schedule of a run with so many")

    add = command(_finetune, "train a new last layer on a model that knows other images, or all of it, gently").add_argument
    add("--weights", metavar="FILE", required=True, help="a model.npz of a run, or a checkpoint from elsewhere (.pth, "
        ".safetensors, .npz), of which --model says what it is of: a file, its address, or imagenet")
    add("--model", metavar="MODEL", help="one of " + ", ".join(models.names()))
    add("--body-lr", type=float, metavar="SHARE", help="of the learning rate, for all but the last layer; 0, the default: they are "
        "frozen, and what they make of each image is computed once")
    add("--mean", type=_numbers, metavar="M,M,M", help="of each channel of pixel / 255, which is taken off; by default what the "
        "weights' run did, or ImageNet's, else the training images' own")
    add("--std", type=_numbers, metavar="S,S,S", help="of each channel, by which it is divided")
    _add_training(add, "10")

    add = command(_eval, "count what a trained model gets right of the held-out images").add_argument
    _add_which(add)
    _add_use(add)
    add("--data", dest="source", metavar="DATA", help="other images with the same classes: the name of a data set, or a folder")
    add("--root", metavar="FOLDER", help="where the files of a data set lie, but for the digits")
    add("--all", dest="whole", action="store_true", default=argparse.SUPPRESS, help="judge by all images of a folder, for a "
        "model that was trained on none of them; by default by test/ or val/, or by a fifth where it is not divided")
    add("--image-size", type=_sizes("H,W"), metavar="H,W", help="with --model: resize and crop the images of a folder")
    add("--skip-bad", action="store_true", default=argparse.SUPPRESS, help="with --model: leave out files of a folder that are no "
        "images or damaged, and say which")
    add("--batch-size", type=_count, metavar="N", help=f"images at a time; {train.AT_ONCE}")

    add = command(_predict, "say what is on an image: the likeliest classes, with their probabilities").add_argument
    add("images", nargs="+", metavar="IMAGE")
    _add_which(add)
    _add_elsewhere(add)
    _add_use(add)
    add("--top", type=_count, metavar="K", help="classes to name; 5")

    add = command(_export, "write a trained model down for other programs, as an ONNX file").add_argument
    add("--onnx", metavar="FILE", required=True, help="a name that ends in .onnx")
    _add_which(add)
    _add_elsewhere(add)

    add = command(_summary, "print a model layer by layer: shapes, parameters, multiply-adds").add_argument
    add("model", metavar="MODEL", help="one of " + ", ".join(models.names()))
    add("--classes", type=_count, metavar="N", help="outputs; 1000, or 10 for the models made for CIFAR-10")
    add("--in-shape", type=_sizes("C,H,W"), metavar="C,H,W", help="of one image; 3,224,224, or 3,32,32 for those")
    add("--json", dest="as_json", action="store_true", default=argparse.SUPPRESS, help="for machines")

    add = command(_study, "lay one forward and one backward pass open, step by step, as a page to walk through").add_argument
    add("model", nargs="?", metavar="MODEL", help="one of " + ", ".join(models.names()) + "; by default that of the newest run, "
        "else resnet20")
    add("--image", metavar="FILE", help="what is looked at; by default a real digit, of those held out")
    add("--label", metavar="CLASS", help="what is on it; by default what its data set says, or what the model takes it for")
    add("--run", metavar="FOLDER", help="whose trained model it is; by default the newest of this model in ./runs, and without one "
        "the first, random weights")
    add("--weights", metavar="FILE", help="weights from elsewhere (.pth, .safetensors, .npz): a file, its address, or imagenet")
    add("--in-shape", type=_sizes("C,H,W"), metavar="C,H,W", help="an untrained model for images of this shape")
    add("--mean", type=_numbers, metavar="M,M,M", help="of each channel of pixel / 255, which is taken off; by default what the "
        "run did")
    add("--std", type=_numbers, metavar="S,S,S", help="of each channel, by which it is divided")
    add("--batch", type=_count, metavar="N", help="images that run together, of which one is looked at; batch norm needs several: "
        "by default 8 small or 2 "
        "large ones where there is batch norm, else 1")
    add("--inference", dest="training", action="store_false", help="run as at inference: batch norm by its running statistics, no "
        "dropout; by default as in training")
    add("--out", metavar="FILE", help="the page; by default study-MODEL.html here, with a number where there is one")
    add("--json", dest="as_json", action="store_true", default=argparse.SUPPRESS, help="for machines")

    command(_gradcheck, "check the gradients of every op, of a small VGG and of a small ResNet")
    laboratory = command(_bench, "time kernels and models, compare what was measured, and draw it").add_subparsers(
        dest="name", required=True, metavar="WHAT", parser_class=Parser)
    _add_bench(laboratory)
    _add_studies(command)
    command(_info, "print versions, and the state of the CPU and the GPU backend")
    return parser, {**commands.choices, **laboratory.choices}


def _add_training(add: Callable[..., Any], epochs: str) -> None:
    """The options of a command that trains."""
    add("--data", dest="source", metavar="DATA", help=f"{', '.join(train.NAMES)} (the default: digits), or a folder of images")
    add("--root", metavar="FOLDER", help="where the files of a data set lie, but for the digits")
    add("--image-size", type=_sizes("H,W"), metavar="H,W", help="resize and crop the images of a folder")
    add("--skip-bad", action="store_true", default=argparse.SUPPRESS, help="leave out files of a folder that are no images or "
        "damaged, and say which")
    add("--decode", choices=["once", "ahead"], help="the images of a folder: once, into memory, or ahead of the training, on "
        "threads, as they are needed; once, unless that took more than a quarter of the memory")
    add("--epochs", type=_count, metavar="N", help=f"times that every image is seen; {epochs}")
    add("--batch-size", type=_count, metavar="N", help="images a step; for the digits 32")
    add("--lr", type=float, metavar="RATE", help="the highest learning rate; 0.1")
    add("--momentum", type=float, metavar="M", help="of SGD, Nesterov's; 0.9")
    add("--weight-decay", type=float, metavar="D", help="pulls every weight towards 0; for the digits 1e-3")
    add("--schedule", choices=train.SCHEDULES, help="of the learning rate: cosine (to 0; the default), step (a tenth from half of "
        "all steps on, a hundredth from three quarters on) or constant")
    add("--warmup", type=float, metavar="EPOCHS", help="epochs in which the learning rate rises to its highest; 1")
    add("--label-smoothing", type=float, metavar="SHARE", help="of the target that is spread over all classes; for the digits 0.1")
    add("--augment", action=argparse.BooleanOptionalAction, help="shift the images at random and, except handwriting, flip them; "
        "done unless you say --no-augment")
    add("--crop-area", type=float, metavar="SHARE", help="enlarge a random box of each image, of at least this share of its area, "
        "to the whole, in place of the shifts: 0.08 is usual for ImageNet; of a folder it is cut from what is in the files")
    add("--cutout", type=_count, metavar="PIXELS", help="blacken a square of so many pixels a side, at a random place of each")
    add("--device", choices=["auto", "cpu", "cuda"], help="auto: the GPU where one works")
    add("--precision", choices=train.PRECISIONS, help="in which a GPU computes: fp32 (the default); tf32 rounds the factors of "
        "products, for the tensor cores; bf16 and fp16 keep images in half the memory, too")
    add("--cuda-graph", action="store_true", default=argparse.SUPPRESS, help="on a GPU: capture a step once, and ask for it with "
        "one order from then on; for small models, whose kernels wait for Python")
    add("--threads", type=_count, metavar="N", help="of the matrix products")
    add("--seed", type=int, metavar="N", help="of the weights, the order, the augmentation; 0")
    add("--out", metavar="FOLDER", help="the run's folder, new or empty; by default ./runs/DATA-MODEL-NUMBER")
    add("--checkpoint-every", dest="save_every", type=_count, metavar="STEPS", help="save behind so many steps, too, not just "
        "behind every epoch")


def _add_bench(commands: Any) -> None:
    """The commands of the laboratory."""
    def command(function: Callable[..., Any], line: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(function.__name__.removeprefix("_bench_"), help=line,
                                                             description=line[0].upper() + line[1:] + ".")
        added.set_defaults(command=function)
        return added

    def add_care(add: Callable[..., Any]) -> None:
        add("--repeats", type=_count, metavar="N", help="repetitions, of which the median counts; kernels 9, models 7, tune 5")
        add("--threads", type=_count, metavar="N", help="to compute with; by default one a core")
        add("--quick", action="store_true", help="tiny sizes and 2 repeats: shows that everything runs, measures nothing")

    def add_common(add: Callable[..., Any]) -> None:
        add("--batch", type=_count, metavar="N", help="images a batch; 4 of 224 x 224, 128 of 32 x 32")
        add_care(add)
        add("--backend", choices=["auto", "cpu", "cuda"], help="auto: the CPU, and the GPU where one works")
        add("--json", metavar="FILE", help="write every repetition there, and all that it depends on")

    add = command(_bench_kernels, "check every kernel against float64, then time it, at the shapes of real layers").add_argument
    add("words", nargs="*", metavar="NAME|SHAPE|PATTERN", help="a kernel (conv2d_input_grad), a shape or a part of it (64x56x56, "
        "3x3), an algorithm (winograd), a model (vgg16), a pattern ('conv2d*'); of each sort that is given, one must fit. "
        "By default every kernel of VGG-16, ResNet-50 and ResNet-20")
    add_common(add)
    add("--pytorch", action="store_true", help="PyTorch's times beside, from a process of its own")

    add = command(_bench_models, "time whole models: inference, a training step, images a second, peak memory").add_argument
    add("names", nargs="*", metavar="NAME", help="by default vgg16, resnet50 and resnet20; known are " + ", ".join(models.names()))
    add_common(add)
    add("--layers", action="store_true", help="every layer by itself, too")

    add = command(_bench_compare, "say what changed from one file to another beyond the noise").add_argument
    add("before", metavar="A", help="written by `minicnn bench ... --json A`")
    add("after", metavar="B", help="the same, later, or on another machine")

    add = command(_bench_tune, "measure which convolution algorithm is the fastest here, for `auto` to choose by").add_argument
    add_care(add)
    add("--out", metavar="FILE", help="by default the engine's own table")

    add = command(_bench_plot, "draw what was measured: the roofline and the times by algorithm, or the models").add_argument
    add("file", metavar="FILE", help="written by `minicnn bench ... --json FILE`")
    add("--out", metavar="PICTURE", help="a .png, .svg or .pdf; by default FILE's name with .png")


def _add_which(add: Callable[..., Any]) -> None:
    """The options of a command that uses a trained model."""
    add("--run", metavar="FOLDER", help="the run whose model it is; by default the newest in ./runs")
    add("--weights", metavar="FILE", help="a model.npz; or, with --run, other weights for its model; or, with --model, weights "
        "from elsewhere (.pth, .safetensors, .npz): a file, its address, or imagenet")
    add("--model", metavar="MODEL", help="what weights from elsewhere are of, one of " + ", ".join(models.names()))
    add("--mean", type=_numbers, metavar="M,M,M", help="of each channel of pixel / 255, which is taken off; by default the "
        "run's own")
    add("--std", type=_numbers, metavar="S,S,S", help="of each channel, by which it is divided")


def _add_elsewhere(add: Callable[..., Any]) -> None:
    """What weights from elsewhere do not say of themselves."""
    add("--classes", metavar="FILE", help="with --model: the names of its classes, one a line; by default CIFAR-10's, where "
        "the model is made for that and has ten, else they are numbered")
    add("--in-shape", type=_sizes("C,H,W"), metavar="C,H,W", help="with --model: what images are made to be; by default what the "
        "model is made for")


def _add_use(add: Callable[..., Any]) -> None:
    """The options of a command that runs a trained model."""
    add("--device", choices=["auto", "cpu", "cuda"])
    add("--json", dest="as_json", action="store_true", default=argparse.SUPPRESS, help="for machines")


def _add_studies(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that look at what a model does, beside the report."""
    add = command(_study_attribute, "show which pixels a class's score hangs on, and which ones a layer sees").add_argument
    add("image", metavar="IMAGE")
    _add_which(add)
    _add_elsewhere(add)
    _add_use(add)
    add("--class", dest="target", metavar="NAME", help="whose score is looked at; by default the likeliest")
    add("--layer", metavar="PATH", help="for Grad-CAM and the receptive field; by default the last that gives an image, before the "
        "pooling at the end; `minicnn summary MODEL` names them")
    add("--position", type=_place, metavar="ROW,COLUMN", help="of that layer, whose receptive field is measured; its middle")
    add("--out", metavar="FOLDER", help="new or empty; by default ./studies/IMAGE-MODEL-NUMBER")

    add = command(_study_compare, "train plain networks of several depths beside residual ones, and draw both").add_argument
    add("--data", dest="source", metavar="DATA", help=f"{', '.join(train.NAMES)} (the default: digits), or a folder of images")
    add("--root", metavar="FOLDER", help="where the files of a data set lie, but for the digits")
    add("--depths", type=_counts, metavar="N,N", help="6 n + 2: 20, 32, 44, 56, 110, ...; 20,56")
    add("--epochs", type=_count, metavar="N", help="times that every image is seen; 12")
    add("--images", type=_count, metavar="N", help="to train on, and half as many to hold out; of the digits all, else 2000")
    add("--batch-size", type=_count, metavar="N", help="images a step; 64")
    add("--lr", type=float, metavar="RATE", help="the highest learning rate; 0.1")
    add("--threads", type=_count, metavar="N", help="of the matrix products")
    add("--seed", type=int, metavar="N", help="of the weights, the order, the augmentation; 0")
    add("--out", metavar="FOLDER", help="new or empty; by default ./studies/compare-DATA-NUMBER")


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _place(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COLUMN, such as 3,3")
    row, column = map(int, text.split(","))
    return row, column


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between, such as 0.485,0.456,0.406") from None


def _sizes(form: str) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        if not re.fullmatch(",".join(r"[1-9]\d*" for _ in form.split(",")), text):
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}, such as {','.join(['1', '8', '8'][-len(form.split(',')):])}")
        return tuple(int(n) for n in text.split(","))
    return parse


# ---------------------------------------------------------------- in words
def _tell(message: str) -> None:
    with contextlib.suppress(OSError):          # nobody listens
        print(f"minicnn: {message}", file=sys.stderr)


def _discard_output() -> None:
    """What cannot be written now cannot be written at the exit either, where Python would complain again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _in_words(error: Exception) -> str:
    if isinstance(error, MemoryError) and not isinstance(error, OutOfDeviceMemory):     # which says what would fit
        why = str(error).rstrip(".")
        return f"out of memory{f' ({why})' if why else ''}; a smaller --batch-size takes less"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    words = f"the state does not fit the model. {error.report.words(most=3)}" if isinstance(error, MisfitError) else str(error)
    return " ".join(words.split()) or type(error).__name__


def _device(about: dict[str, Any]) -> str:
    if about["device"] == "cuda":
        return f"GPU: {backend.cuda_status().facts.get('device', 'unknown')}"
    threads = about["threads"]
    return f"CPU, NumPy {np.__version__}, {threads} thread{'s' * (threads > 1)}; `minicnn info` tells of the GPU"
