"""Layers: operations that own their parameters and infer their sizes, and lists of them.

A layer is made with what a reader wants to say (`Conv2d(64, 3, padding=1)`), and learns the rest, once, in
`build(in_shape, rng, dtype)`: channels come from the layer before it. A list of layers is a Python list; `Sequential` runs
one in order, `Residual` adds a list's result to its input, `Branches` joins what several lists make of the same input. Nothing is
allocated later than `build`.

A layer has no mode: `layer(x)` is inference, `layer(x, train=True)` is training.
"""
from minicnn.layers.base import Layer, LoadReport, MisfitError
from minicnn.layers.lists import Branches, FusedResidual, Residual, Sequential, fused, fusion
from minicnn.layers.steps import (
    AdaptiveAvgPool2d, AvgPool2d, BatchNorm2d, Conv2d, Dropout, Flatten, FusedBatchNorm2d, FusedConv2d, GlobalAvgPool2d, Linear,
    MaxPool2d, ReLU, SimAM,
)
from minicnn.layers.summary import Row, Shape, Summary

__all__ = [
    "AdaptiveAvgPool2d", "AvgPool2d", "BatchNorm2d", "Branches", "Conv2d", "Dropout", "Flatten", "FusedBatchNorm2d", "FusedConv2d",
    "FusedResidual", "GlobalAvgPool2d", "Layer", "Linear", "LoadReport", "MaxPool2d", "MisfitError", "ReLU", "Residual", "Row",
    "Sequential", "Shape", "SimAM", "Summary", "fused", "fusion",
]
