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
from minicnn.study.attribution import grad_cam, input_gradient, layer_at, saliency
from minicnn.study.receptive import effective_receptive_field, place, receptive_fields
from minicnn.weights import save

STUDIES = Path("studies")           # where folders go that nobody named
FEW_IMAGES = 2000                   # that are compared on where the data are not the digits and nobody says how many


# ---------------------------------------------------------------- attribute
def attribute(path: str, trained: train.Trained, target: str | None = None, layer: str | None = None,
              position: tuple[int, int] | None = None, out: str | None = None, as_json: bool = False) -> None:
    """Saliency, Grad-CAM and the receptive field for an image file and a class, as pictures and arrays in a folder."""
    train.check_vacant(out)
    c = None if target is None else class_number(target, trained.classes)
    model = trained.model
    if layer is not None:
        layer_at(model, layer)
    image = data.read_image(path, trained.about["in_shape"])
    x = trained.normalize(image, model.dtype or np.float32)
    probabilities = train.predict(model, image[None], trained.normalize)[0]
    best = int(probabilities.argmax())
    c = best if c is None else c

    cam = grad_cam(model, x, c, layer)
    shape = layer_at(model, cam.layer).out_shape
    assert shape is not None
    at = place(shape, position)
    gradient = input_gradient(model, x, c)
    salient = saliency(model, x, c)
    effective = effective_receptive_field(model, x[None], cam.layer, position)
    field = receptive_fields(model)[cam.layer]
    box = field.box(at or None)

    folder = train.make_folder(out, f"{Path(path).stem}-{trained.about['model']}", STUDIES)
    heatmaps.write_png(folder / "image.png", heatmaps.enlarged(heatmaps.in_colour(image)))
    heatmaps.write_png(folder / "saliency.png", heatmaps.enlarged(heatmaps.heat_colours(salient)))
    heatmaps.write_png(folder / "grad_cam.png", heatmaps.enlarged(heatmaps.overlay(image, cam.enlarged(image.shape[1:]))))
    heatmaps.write_png(folder / "receptive_field.png", heatmaps.framed(heatmaps.overlay(image, effective), box))
    save(folder / "maps.npz", {"gradient": gradient, "saliency": salient, "grad_cam": cam.heat, "grad_cam_weights": cam.weights,
                               "effective_receptive_field": effective})
    about: dict[str, Any] = {
        "image": path, "model": trained.about["model"], "class": trained.classes[c], "probability": float(probabilities[c]),
        "taken_for": trained.classes[best], "taken_for_probability": float(probabilities[best]),
        "grad_cam": {"layer": cam.layer, "size": list(cam.heat.shape), "largest": float(cam.heat.max())},
        "salient_pixels": half_of(salient), "pixels": salient.size,
        "receptive_field": {"layer": cam.layer, "position": list(at), "size": list(field.size), "stride": list(field.stride),
                            "rows": [box[0].start, box[0].stop], "columns": [box[1].start, box[1].stop],
                            "important_pixels": half_of(effective)},
        "folder": str(folder)}
    train.write_text(folder / "attribution.json", json.dumps(about, indent=1) + "\n")
    print(json.dumps(about) if as_json else _attributed(about))


def class_number(name: str, classes: Sequence[str]) -> int:
    """The place of a class among the model's outputs, by its name. ValueError, with the nearest name, where there is none."""
    if name in classes:
        return list(classes).index(name)
    close = difflib.get_close_matches(name, classes, 1)
    known = ", ".join(classes[:12]) + (f" and {len(classes) - 12} more" if len(classes) > 12 else "")
    raise ValueError(f"the model knows no class {name!r}" + (f"; did you mean {close[0]!r}?" if close else f": it knows {known}"))


def half_of(values: np.ndarray[Any, Any]) -> int:
    """How many of the largest numbers make up half of the sum."""
    falling = np.sort(values.ravel())[::-1]
    return int(np.searchsorted(falling.cumsum(), falling.sum() / 2)) + 1


def _attributed(about: dict[str, Any]) -> str:
    cam, field = about["grad_cam"], about["receptive_field"]
    height, width = (field[side][1] - field[side][0] for side in ("rows", "columns"))
    by_geometry = f"{' x '.join(map(str, field['size']))} pixels by geometry, {height} x {width} of them in the image (the frame)"
    nothing = "" if cam["largest"] > 0 else "; all of it is 0: nothing that this layer found speaks for the class"
    return "\n".join([
        f"{about['image']}: taken for {about['taken_for']} ({100 * about['taken_for_probability']:.2f} %); "
        f"asked about {about['class']} ({100 * about['probability']:.2f} %)",
        f"  saliency.png         |d score / d pixel|; half of it lies in {about['salient_pixels']} of {about['pixels']} pixels",
        f"  grad_cam.png         of {cam['layer']}, {' x '.join(map(str, cam['size']))}, enlarged{nothing}",
        f"  receptive_field.png  of {field['layer']} at {tuple(field['position'])}: {by_geometry}; "
        f"measured, half of it lies in {field['important_pixels']}",
        f"in {about['folder']}: image.png, saliency.png, grad_cam.png, receptive_field.png, maps.npz, attribution.json"])


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
    pictures = importlib.util.find_spec("matplotlib") is not None

    def write(found: comparison.Comparison) -> None:
        """Behind every network, so that who stops it early has those that are done."""
        train.write_text(folder / "comparison.json", found.to_json())
        if pictures:
            comparison.draw(found, [folder / "comparison.png", folder / "comparison.svg"])

    epoch = data.steps_per_epoch(len(train_set), config.batch_size, drop_last=len(train_set) >= config.batch_size)
    with Progress(2 * len(depths) * config.epochs * epoch, "step") as shown:
        shown.say(comparison.HEAD)

        def ended(found: comparison.Comparison) -> None:
            write(found)
            shown.say(comparison.row(found.results[-1]))
        try:
            found = comparison.measure(train_set, test_set, config, depths, threads=threads, on_end=ended,
                                       on_begin=lambda result: shown.begin(result.name), on_step=lambda _: shown.step())
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; the networks that are done are in {folder}") from None
    print()
    for sentence in comparison.in_words(found):
        print(sentence)
    print(f"in {folder}: comparison.json" + (", comparison.png, comparison.svg" if pictures else
                                             "; no picture: matplotlib cannot be found; pip install matplotlib"))


def share_of(sets: tuple[data.ImageSet, data.ImageSet], source: str, images: int | None,
             seed: int) -> tuple[data.ImageSet, data.ImageSet]:
    """So many images to train on, drawn at random, and half as many held out; of the digits all, unless somebody says how many."""
    if images is None and source == "digits":
        return sets
    wanted, rng = images or FEW_IMAGES, np.random.default_rng(seed)
    train_set, test_set = (part.subset(np.sort(rng.permutation(len(part))[:count]))
                           for part, count in zip(sets, (wanted, max(1, wanted // 2)), strict=True))
    return train_set, test_set
