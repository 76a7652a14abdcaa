"""What `minicnn study attribute` and `minicnn study compare` do: call the room, write files, print what they found."""
from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minicnn import data, train
from minicnn.bench.progress import Progress
from minicnn.study import compare as comparison
from minicnn.study import heatmaps
from minicnn.study.attribution import layer_at
from minicnn.study.explained import explain
from minicnn.weights import save

STUDIES = Path("studies")           # where folders go that nobody named
FEW_IMAGES = 2000                   # that are compared on where the data are not the digits and nobody says how many


# ---------------------------------------------------------------- attribute
def attribute(path: str, trained: train.Trained, target: str | None = None, layer: str | None = None,
              position: tuple[int, int] | None = None, out: str | None = None, as_json: bool = False) -> None:
    """Saliency, Grad-CAM and the receptive field for an image file and a class, as pictures and arrays in a folder."""
    train.check_vacant(out)
    c = None if target is None else class_number(target, trained.classes)
    if layer is not None:
        layer_at(trained.model, layer)
    image = data.read_image(path, trained.about["in_shape"])
    probabilities = train.predict(trained.model, image[None], trained.normalize)[0]
    best = int(probabilities.argmax())
    c = best if c is None else c
    found = explain(trained.model, trained.normalize, image, c, layer, position)
    pictures = found.pictures(trained.classes[c])

    folder = train.make_folder(out, f"{Path(path).stem}-{trained.about['model']}", STUDIES)
    heatmaps.write_png(folder / "image.png", heatmaps.enlarged(heatmaps.in_colour(image)))
    for name, picture in pictures.items():
        heatmaps.write_png(folder / f"{name}.png", picture.pixels)
    save(folder / "maps.npz", {"gradient": found.gradient, "saliency": found.saliency, "grad_cam": found.cam.heat,
                               "grad_cam_weights": found.cam.weights, "effective_receptive_field": found.effective})
    about: dict[str, Any] = {
        "image": path, "model": trained.about["model"], "class": trained.classes[c], "probability": float(probabilities[c]),
        "taken_for": trained.classes[best], "taken_for_probability": float(probabilities[best]), "layer": found.cam.layer,
        "grad_cam_size": list(found.cam.heat.shape), "grad_cam_largest": float(found.cam.heat.max()),
        "receptive_field": {"position": list(found.position), "size": list(found.field.size), "stride": list(found.field.stride),
                            "rows": [found.box[0].start, found.box[0].stop], "columns": [found.box[1].start, found.box[1].stop]},
        "folder": str(folder)}
    train.write_text(folder / "attribution.json", json.dumps(about, indent=1) + "\n")
    if as_json:
        print(json.dumps(about))
        return
    print(f"{path}: taken for {about['taken_for']} ({100 * about['taken_for_probability']:.2f} %); "
          f"asked about {about['class']} ({100 * about['probability']:.2f} %)")
    for name, picture in pictures.items():
        print(f"  {name + '.png':21}{picture.caption}")
    print(f"in {folder}: image.png, {', '.join(f'{name}.png' for name in pictures)}, maps.npz, attribution.json")


def class_number(name: str, classes: Sequence[str]) -> int:
    """The place of a class among the model's outputs, by its name. ValueError, with the nearest name, where there is none."""
    if name in classes:
        return list(classes).index(name)
    close = difflib.get_close_matches(name, classes, 1)
    known = ", ".join(classes[:12]) + (f" and {len(classes) - 12} more" if len(classes) > 12 else "")
    raise ValueError(f"the model knows no class {name!r}" + (f"; did you mean {close[0]!r}?" if close else f": it knows {known}"))


# ---------------------------------------------------------------- compare
def compare(source: str = "digits", root: str | None = None, depths: Sequence[int] = comparison.DEPTHS, epochs: int | None = None,
            images: int | None = None, threads: int | None = None, out: str | None = None, **changes: Any) -> None:
    """Plain networks against residual ones: trains them; leaves comparison.json, with .png and .svg where matplotlib is there."""
    train.check_vacant(out)
    comparison.check_depths(depths)
    config = comparison.default_config(source, epochs, **changes)
    train_set, test_set = share_of(train.read_data(source, root), source, images, config.seed)
    threads = threads or train.default_threads(train_set.images.shape[1:])
    folder = train.make_folder(out, f"compare-{Path(source).name}", STUDIES)
    print(f"data    {train_set.name}: {len(train_set):,} images to train on, {len(test_set):,} held out")
    print(f"recipe  {config.epochs} epochs, batches of {config.batch_size}, learning rate {config.lr:g}, weight decay "
          f"{config.weight_decay:g}, seed {config.seed}; {threads} thread{'s' * (threads > 1)}")
    print(f"folder  {folder}\n", flush=True)
    lacking = importlib.util.find_spec("matplotlib") is None
    done: list[comparison.Comparison] = []
    epoch = data.steps_per_epoch(len(train_set), config.batch_size, drop_last=len(train_set) >= config.batch_size)
    with Progress(2 * len(depths) * config.epochs * epoch, "step") as shown:
        shown.say(comparison.HEAD)

        def ended(found: comparison.Comparison) -> None:
            """Behind every network, so that who stops it early has those that are done."""
            done[:] = [found]
            train.write_text(folder / "comparison.json", found.to_json())
            shown.say(comparison.row(found.results[-1]))
        try:
            comparison.measure(train_set, test_set, config, depths, threads=threads, on_end=ended,
                               on_begin=lambda result: shown.begin(result.name), on_step=lambda _: shown.step())
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; the networks that are done are in {folder}") from None
        finally:
            for found in [] if lacking else done:
                comparison.draw(found, [folder / "comparison.png", folder / "comparison.svg"])
    print()
    for sentence in comparison.in_words(done[0]):
        print(sentence)
    print(f"in {folder}: comparison.json" + ("; no picture: matplotlib cannot be found; pip install matplotlib" if lacking else
                                             ", comparison.png, comparison.svg"))


def share_of(sets: tuple[data.ImageSet, data.ImageSet], source: str, images: int | None,
             seed: int) -> tuple[data.ImageSet, data.ImageSet]:
    """So many images to train on, drawn at random, and half as many held out; of the digits all, unless somebody says how many."""
    if images is None and source == "digits":
        return sets
    wanted, rng = images or FEW_IMAGES, np.random.default_rng(seed)
    train_set, test_set = (part.subset(np.sort(rng.permutation(len(part))[:count]))
                           for part, count in zip(sets, (wanted, max(1, wanted // 2)), strict=True))
    return train_set, test_set
