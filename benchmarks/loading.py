"""How long a trainer waits for its images: ResNet-18 on JPEG files, decoded once, ahead on threads, or when they are needed.

    python benchmarks/loading.py                                 photographs of CIFAR-10 from $MINICNN_DATA, enlarged to 500 x 375
    python benchmarks/loading.py --data FOLDER                   JPEG files of your own, CLASS/IMAGE
    python benchmarks/loading.py --json out.json                 keep every step
    python benchmarks/loading.py --quick                         tiny sizes: does it all run?

A step is what the trainer does with a batch: normalise, forward, cross-entropy, backward, SGD; waiting is the time until the batch
is there. The ways take turns, some steps each, for the speed of a shared machine moves; medians over all steps.
"""
from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import report
from run import parse_common, positive, write

import minicnn as mc
from minicnn.data import ImageFiles, ImageSet, Normalize
from minicnn.threads import cores

PIXELS = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Way(NamedTuple):
    """How a trainer comes by its images."""

    name: str
    dataset: ImageSet
    crop: bool = False              # a random box of each, enlarged

    def batches(self, batch: int, size: int) -> Iterator[Any]:
        """Batch after batch, without an end."""
        def changed(images: Any, rng: np.random.Generator) -> Any:
            images = mc.data.random_resized_crop(images, rng, (size, size)) if self.crop else images
            return mc.data.augment(images, rng, pad=0, flip=True)
        epoch = 0
        while True:
            yield from mc.data.batches(self.dataset, batch, seed=0, epoch=epoch, augmentation=changed, originals=self.crop,
                                       drop_last=True)
            epoch += 1


class WhenNeeded:
    """Images in files, for a loader that does not know it and decodes each batch when it is asked for."""

    def __init__(self, images: ImageFiles) -> None:
        self.images, self.shape, self.ndim, self.dtype = images, images.shape, images.ndim, images.dtype

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index]


def ways(folder: Path, size: int) -> list[Way]:
    """What is compared, on the same files."""
    memory, _ = mc.data.image_folder(folder, (size, size), decode="once")
    files, _ = mc.data.image_folder(folder, (size, size), decode="ahead")
    needed = ImageSet(WhenNeeded(files.images), files.labels, files.classes, files.name)
    return [Way("once, into memory", memory), Way("ahead, on threads", files),
            Way("ahead, random crops", files, crop=True), Way("when needed", needed)]


class Trainer:
    """A model and what a step of its training is."""

    def __init__(self, name: str, classes: int, size: int) -> None:
        self.model = mc.models.build(name, classes, (3, size, size))
        self.optimizer = mc.optim.SGD(self.model.parameters(), 0.01, 0.9)

    def step(self, images: Any, labels: Any) -> None:
        """As `minicnn.train` does it."""
        self.optimizer.zero_grad()
        mc.ops.cross_entropy(self.model(PIXELS(images), train=True), labels).backward()
        self.optimizer.step()


def measure(way: Way, trainer: Trainer, batches: Iterator[Any], steps: int) -> list[tuple[float, float]]:
    """(seconds waited, seconds of the step with the wait) of so many steps."""
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        images, labels = next(batches)
        there = time.perf_counter()
        trainer.step(images, labels)
        found.append((there - start, time.perf_counter() - start))
    return found


@contextmanager
def photographs(count: int, width: int, height: int) -> Iterator[Path]:
    """A folder of so many photographs of CIFAR-10, of two classes, enlarged, as JPEG files of quality 90; gone afterwards."""
    image = importlib.import_module("PIL.Image")
    archive = Path(os.environ.get("MINICNN_DATA", ""), "cifar10-jpeg.tar.xz")
    if not archive.is_file():
        sys.exit("MINICNN_DATA names no folder with cifar10-jpeg.tar.xz; name a folder of JPEG files with --data")
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive, "r|xz") as tar:
        files = (member for member in tar if member.isfile() and member.name.endswith(".jpg"))
        for i, member in zip(range(count), files, strict=False):
            path = Path(folder, f"class{i % 2}", f"{i:05}.jpg")
            path.parent.mkdir(exist_ok=True)
            stream = tar.extractfile(member)
            assert stream is not None
            with image.open(io.BytesIO(stream.read())) as picture:
                picture.convert("RGB").resize((width, height), image.Resampling.BICUBIC).save(path, quality=90)
        yield Path(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = parse(arguments)
    print(f"{cores()} cores, {mc.get_num_threads()} threads")
    with photographs(20 * args.batch, *args.photograph) if args.data is None else nullcontext(Path(args.data)) as folder:
        compared = ways(folder, args.size)
        print(f"{compared[0].dataset!r}, {args.model}, batch {args.batch}")
        trainer = Trainer(args.model, len(compared[0].dataset.classes), args.size)
        streams = {way.name: way.batches(args.batch, args.size) for way in compared}
        seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in compared}
        for way in compared:
            measure(way, trainer, streams[way.name], 2)             # not counted: they fetch memory, and wait for the first batch
        for _ in range(args.repeats):
            for way in compared:
                seconds[way.name] += measure(way, trainer, streams[way.name], args.steps)
        for stream in streams.values():
            stream.close()
    rows = []
    for name, found in seconds.items():
        wait, step = (1e3 * median(times) for times in zip(*found, strict=True))
        share = sum(wait for wait, _ in found) / sum(step for _, step in found)
        rows.append([name, f"{step:.0f}", f"{wait:.1f}", f"{100 * share:.1f} %", f"{1e3 * max(wait for wait, _ in found):.0f}"])
    print(report.table(["decoded", "step, ms", "of it waiting", "share of the time", "longest wait"], rows, [0]))
    if args.json:
        surroundings = report.environment(mc.get_num_threads(), {"minicnn": mc.__version__, "NumPy": np.__version__,
                                                                 "Pillow": importlib.import_module("PIL").__version__})
        write(args.json, {"environment": surroundings, "model": args.model, "batch": args.batch, "pixels": args.size,
                          "photographs": args.data or "x".join(map(str, args.photograph)),
                          "seconds": {name: {"waiting": [w for w, _ in found], "step": [s for _, s in found]}
                                      for name, found in seconds.items()}})
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How long a trainer waits for its images.")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=positive, default=16)
    parser.add_argument("--size", type=positive, default=224, help="pixels a side that the model reads")
    parser.add_argument("--photograph", type=positive, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--data", metavar="FOLDER", help="of JPEG files, CLASS/IMAGE")
    parser.add_argument("--steps", type=positive, default=8, help="of each way, before the next one's turn")
    args = parse_common(parser, arguments)
    if args.quick:
        args.model, args.batch, args.size, args.photograph, args.steps = "resnet20", 2, 32, (50, 40), 1
    return args


if __name__ == "__main__":
    sys.exit(main())
