"""What a model says to one image, explained by all three maps: saliency, Grad-CAM and the receptive field, with their pictures."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minicnn.data import Normalize
from minicnn.kernels.windows import Pair
from minicnn.layers import Sequential
from minicnn.study import heatmaps
from minicnn.study.attribution import Cam, grad_cam, input_gradient, layer_at
from minicnn.study.receptive import Field, effective_receptive_field, place, receptive_fields

Array = np.ndarray[Any, Any]


class Picture(NamedTuple):
    """A map as a picture (H, W, 3) uint8, and in words what it shows."""

    title: str
    pixels: Array
    caption: str


@dataclass(frozen=True, eq=False)
class Explained:
    """An image (C, H, W) uint8; dy_c/dx of it; its saliency (H, W); Grad-CAM; the kind of the layer that this was taken of; its
    receptive field, by geometry and, at a position, measured (H, W)."""

    image: Array
    gradient: Array
    saliency: Array
    cam: Cam
    kind: str
    field: Field
    position: Pair
    effective: Array

    @property
    def box(self) -> tuple[slice, slice]:
        """The pixels of the image that the layer's number at the position sees."""
        return self.field.box(self.position)

    def pictures(self, class_name: str) -> dict[str, Picture]:
        """{file name without suffix: its picture}; the class c by its name."""
        height, width = (side.stop - side.start for side in self.box)
        nothing = "" if self.cam.heat.max() > 0 else ", all of it 0: nothing that this layer found speaks for the class"
        by_geometry = f"{' x '.join(map(str, self.field.size))} pixels by geometry, {height} x {width} in the image (the frame)"
        layer, numbers = f"{self.kind} {self.cam.layer}", " x ".join(map(str, self.cam.heat.shape))
        salient = f"{half_of(self.saliency)} of {self.saliency.size} pixels"
        return {
            "saliency": Picture(
                "Saliency", heatmaps.enlarged(heatmaps.heat_colours(self.saliency)),
                f"|d score / d pixel| of the class {class_name}; half of it lies in {salient}"),
            "grad_cam": Picture(
                "Grad-CAM", heatmaps.enlarged(heatmaps.overlay(self.image, self.cam.enlarged(self.saliency.shape))),
                f"what {layer} holds for the class {class_name}: {numbers} numbers, enlarged{nothing}"),
            "receptive_field": Picture(
                "Receptive field", heatmaps.framed(heatmaps.overlay(self.image, self.effective), self.box),
                f"of {layer} at {self.position}: {by_geometry}; measured by backward passes, half of it lies in "
                f"{half_of(self.effective)}")}


def explain(model: Sequential, normalize: Normalize, image: Array, target: int | None = None, layer: str | None = None,
            position: Pair | None = None, draws: int = 16) -> Explained:
    """All three maps of an image (C, H, W) uint8.

    target: the class, by default the likeliest.   layer: of Grad-CAM and the receptive field, by default `last_image_layer`.
    position: of that layer's map, by default its middle.   draws: backward passes by which its field is measured.
    """
    x = normalize(image, model.dtype or np.float32)
    cam = grad_cam(model, x, target, layer)
    looked_at = layer_at(model, cam.layer)
    assert looked_at.out_shape is not None
    at = place(looked_at.out_shape, position)
    assert len(at) == 2
    gradient = input_gradient(model, x, cam.target)
    return Explained(image, gradient, np.abs(gradient).max(axis=0), cam, type(looked_at).__name__,
                     receptive_fields(model)[cam.layer], at,
                     effective_receptive_field(model, x[None], cam.layer, at, draws=draws))


def half_of(values: Array) -> int:
    """How many of the largest numbers make up half of the sum."""
    falling = np.sort(values.ravel())[::-1]
    return int(np.searchsorted(falling.cumsum(), falling.sum() / 2)) + 1
