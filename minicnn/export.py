"""Models for other programs: an ONNX file says what a model computes at inference, and any ONNX runtime computes it.

    from minicnn import export
    export.onnx(models.resnet18(weights="imagenet"), "resnet18.onnx")

A model is a list of layers, so its nodes follow from a table, `NODES`: from the type of a layer to the nodes that compute the same.
A layer of your own gets a line there:

    export.NODES[Swish] = lambda graph, layer, x, path: graph.add("Mul", [x, graph.add("Sigmoid", [x], path)], path)

Batch norm stays a node of its own, though at inference it could be folded into the convolution before it: every array in the file
then has the name and the numbers that it has in `state_dict`, and runtimes fold it themselves when they load the file.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minicnn import __version__, layers
from minicnn.data import Normalize
from minicnn.layers import Layer
from minicnn.models.resnet import PadShortcut
from minicnn.ops.pooling import averaging
from minicnn.weights import atomically

OPSET, FORMAT = 18, 8           # of December 2022: runtimes since then read it, and later versions change no node that is used here
LARGEST = 2**31 - 2**20         # bytes: protobuf, in which the file is written, ends at 2 GiB
INPUT, OUTPUT = "images", "logits"


def onnx(model: Layer, path: str | os.PathLike[str], *, name: str = "minicnn", classes: Sequence[str] = (),
         normalize: Normalize | None = None) -> None:
    """Write a built model as an ONNX file, whole or not at all: images (N, C, H, W) in, logits (N, classes) out, N free.

    It computes in float32, whatever the model does. Dropout leaves no trace; batch norm uses the running statistics.
    name: of the model.   classes: the names of the outputs, in their order.   normalize: what is to be done to the pixels before.
    The file's metadata say these (normalize and classes as JSON); nothing in the file does it to the pixels.

    Raises ValueError for a layer without nodes in `NODES`, a path that does not end in .onnx, or weights of 2 GiB and more;
    ImportError where the onnx library is missing.
    """
    library = _library()
    if Path(path).suffix != ".onnx":
        raise ValueError(f"{path}: the name of an ONNX file ends in .onnx")
    graph = Graph(model.state_dict())
    if model.in_shape is None or model.out_shape is None:
        raise RuntimeError("the model is not built, so it has no sizes: Sequential(layers, in_shape) builds it")
    last = graph.layer(model, INPUT, "")
    if not graph.nodes:
        graph.add("Identity", [last], "identity")
    graph.nodes[-1]["outputs"] = [OUTPUT]                           # no other node reads what the last one gives
    if sum(array.nbytes for array in graph.arrays.values()) > LARGEST:
        raise ValueError(f"{path}: the weights take 2 GiB and more, which one ONNX file cannot hold")
    about = {"model": name, "classes": json.dumps(list(classes)) if classes else "",
             "normalize": json.dumps(normalize.as_dict()) if normalize is not None else ""}
    content = _written(library, graph, name, model.in_shape, model.out_shape, about)

    def write(temporary: str) -> None:
        Path(temporary).write_bytes(content)
        library.checker.check_model(temporary, full_check=True)     # the shapes that follow from the nodes, too
    atomically(path, write)


class Graph:
    """Nodes in the order in which they run, and the arrays that they read. Every value goes by the name of what gives it."""

    def __init__(self, state: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self.state = state                                          # the model's
        self.nodes: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._taken = {INPUT, OUTPUT}

    def layer(self, layer: Layer, x: str, path: str) -> str:
        """Add the nodes of a layer that reads x; the name of what it gives."""
        if type(layer) not in NODES:                                # exactly: a subclass may compute something else
            raise ValueError(f"{path or 'the model'} ({type(layer).__name__}): there are no ONNX nodes for this layer; known are "
                             f"{', '.join(kind.__name__ for kind in NODES)}; others go into minicnn.export.NODES")
        return NODES[type(layer)](self, layer, x, path)

    def add(self, operator: str, inputs: Sequence[str], path: str, **attributes: Any) -> str:
        """Add a node for the layer at this path; the name of what it gives. Operators: https://onnx.ai/onnx/operators/"""
        name = self._free(path or operator)
        self.nodes.append({"op_type": operator, "name": name, "inputs": list(inputs), "outputs": [name], **attributes})
        return name

    def keep(self, array: Any, path: str) -> str:
        """Keep an array of floats as float32, one of integers as int64; its name."""
        array = np.asarray(array)
        name = self._free(path)
        self.arrays[name] = np.ascontiguousarray(array, np.int64 if array.dtype.kind in "iu" else np.float32)
        return name

    def parameters(self, path: str, *names: str) -> list[str]:
        """Keep those of a layer's arrays that it has, by their names in state_dict."""
        entries = [f"{path}.{name}" if path else name for name in names]
        return [self.keep(self.state[entry], entry) for entry in entries if entry in self.state]

    def _free(self, name: str) -> str:
        """The name, with a number behind it where it is taken."""
        free = next(n for n in (name, *(f"{name}:{i}" for i in range(2, len(self._taken) + 3))) if n not in self._taken)
        self._taken.add(free)
        return free


# ---------------------------------------------------------------- lists of layers
def _sequential(graph: Graph, layer: layers.Sequential, x: str, path: str) -> str:
    for name, child in layer.children():
        x = graph.layer(child, x, _inside(path, name))
    return x


def _residual(graph: Graph, layer: layers.Residual, x: str, path: str) -> str:
    return graph.add("Add", _beside(graph, layer, x, path), path)


def _branches(graph: Graph, layer: layers.Branches, x: str, path: str) -> str:
    return graph.add("Concat", _beside(graph, layer, x, path), path, axis=1)


def _beside(graph: Graph, layer: Layer, x: str, path: str) -> list[str]:
    return [graph.layer(child, x, _inside(path, name)) for name, child in layer.children()]


def _inside(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)


# ---------------------------------------------------------------- layers with parameters
def _conv(graph: Graph, layer: layers.Conv2d, x: str, path: str) -> str:
    windows = layer.windows
    return graph.add("Conv", [x, *graph.parameters(path, "weight", "bias")], path, kernel_shape=windows.kernel_size,
                     strides=windows.stride, pads=windows.padding * 2, dilations=windows.dilation, group=layer.groups)


def _batch_norm(graph: Graph, layer: layers.BatchNorm2d, x: str, path: str) -> str:
    arrays = graph.parameters(path, "weight", "bias", "running_mean", "running_var")
    return graph.add("BatchNormalization", [x, *arrays], path, epsilon=float(layer.eps))


def _linear(graph: Graph, layer: layers.Linear, x: str, path: str) -> str:
    return graph.add("Gemm", [x, *graph.parameters(path, "weight", "bias")], path, transB=1)


# ---------------------------------------------------------------- pools
def _max_pool(graph: Graph, layer: layers.MaxPool2d, x: str, path: str) -> str:
    over = _overhang(layer)
    return graph.add("MaxPool", [x], path, kernel_shape=layer.windows.kernel_size, strides=layer.windows.stride,
                     pads=[*layer.windows.padding, *(max(0, o + p) for o, p in zip(over, layer.windows.padding, strict=True))])


def _avg_pool(graph: Graph, layer: layers.AvgPool2d, x: str, path: str) -> str:
    """The padding's zeros count, and are made first; pixels beyond it do not, which is what a node's own padding is."""
    (ph, pw), over = layer.windows.padding, _overhang(layer)
    if ph or pw:
        x = graph.add("Pad", [x, graph.keep(np.array([0, 0, ph, pw] * 2), f"{path}.pads")], path)
    return graph.add("AveragePool", [x], path, kernel_shape=layer.windows.kernel_size, strides=layer.windows.stride,
                     pads=[0, 0, *(max(0, o) for o in over)], count_include_pad=0)


def _overhang(layer: layers.MaxPool2d | layers.AvgPool2d) -> list[int]:
    """Rows and columns by which the last window reaches beyond the padded image; below 0 where some are left over.

    Written as padding of the node, they make its rounding down the layer's, up or down: what ceil_mode means has changed
    between ONNX's versions and differs between runtimes.
    """
    assert layer.in_shape is not None and layer.out_shape is not None
    windows = layer.windows
    return [(out - 1) * s + k - (n + 2 * p) for out, s, k, n, p in zip(
        layer.out_shape[1:], windows.stride, windows.kernel_size, layer.in_shape[1:], windows.padding, strict=True)]


def _global_avg_pool(graph: Graph, layer: layers.GlobalAvgPool2d, x: str, path: str) -> str:
    return graph.add("Flatten", [graph.add("GlobalAveragePool", [x], path)], path, axis=1)


def _adaptive_avg_pool(graph: Graph, layer: layers.AdaptiveAvgPool2d, x: str, path: str) -> str:
    """Equal windows are a pool; others, which no node knows, two matrix products, as in the operation itself."""
    assert layer.in_shape is not None
    (h, w), (p, q) = layer.in_shape[1:], layer.output_size
    if (h, w) == (p, q):
        return x
    if h % p == 0 and w % q == 0:
        return graph.add("AveragePool", [x], path, kernel_shape=[h // p, w // q], strides=[h // p, w // q])
    rows = graph.keep(averaging(h, p, np.dtype(np.float64)), f"{path}.rows")
    columns = graph.keep(averaging(w, q, np.dtype(np.float64)).T, f"{path}.columns")
    return graph.add("MatMul", [graph.add("MatMul", [rows, x], path), columns], path)


# ---------------------------------------------------------------- the others
def _relu(graph: Graph, layer: layers.ReLU, x: str, path: str) -> str:
    return graph.add("Relu", [x], path)


def _flatten(graph: Graph, layer: layers.Flatten, x: str, path: str) -> str:
    return graph.add("Flatten", [x], path, axis=1)


def _nothing(graph: Graph, layer: layers.Dropout, x: str, path: str) -> str:
    return x


def _pad_shortcut(graph: Graph, layer: PadShortcut, x: str, path: str) -> str:
    assert layer.in_shape is not None
    side = (layer.channels - layer.in_shape[0]) // 2
    slices = {"starts": [0, 0], "ends": layer.in_shape[1:], "axes": [2, 3], "steps": [layer.stride] * 2}
    pixels = graph.add("Slice", [x, *(graph.keep(np.array(value), f"{path}.{key}") for key, value in slices.items())], path)
    return graph.add("Pad", [pixels, graph.keep(np.array([0, side, 0, 0] * 2), f"{path}.pads")], path)


def _simam(graph: Graph, layer: layers.SimAM, x: str, path: str) -> str:
    """The lines of `ops.simam`."""
    assert layer.in_shape is not None
    n = layer.in_shape[1] * layer.in_shape[2]
    pixels = graph.keep(np.array([2, 3]), f"{path}.axes")

    def number(value: float, name: str) -> str:
        return graph.keep(np.array(value), f"{path}.{name}")

    d = graph.add("Sub", [x, graph.add("ReduceMean", [x, pixels], path)], path)
    square = graph.add("Mul", [d, d], path)
    v = graph.add("Mul", [graph.add("ReduceSum", [square, pixels], path), number(1 / (n - 1), "share")], path)
    below = graph.add("Mul", [graph.add("Add", [v, number(layer.e_lambda, "e_lambda")], path), number(4.0, "four")], path)
    e = graph.add("Add", [graph.add("Div", [square, below], path), number(0.5, "half")], path)
    return graph.add("Mul", [x, graph.add("Sigmoid", [e], path)], path)


# {type of a layer: (graph, layer, x, path) -> the name of what it makes of x, its nodes added}
NODES: dict[type[Layer], Callable[[Graph, Any, str, str], str]] = {
    layers.Sequential: _sequential, layers.Residual: _residual, layers.Branches: _branches,
    layers.Conv2d: _conv, layers.BatchNorm2d: _batch_norm, layers.Linear: _linear,
    layers.MaxPool2d: _max_pool, layers.AvgPool2d: _avg_pool, layers.AdaptiveAvgPool2d: _adaptive_avg_pool,
    layers.GlobalAvgPool2d: _global_avg_pool,
    layers.ReLU: _relu, layers.Flatten: _flatten, layers.Dropout: _nothing, layers.SimAM: _simam, PadShortcut: _pad_shortcut,
}


# ---------------------------------------------------------------- the file
def _written(library: Any, graph: Graph, name: str, in_shape: Sequence[int], out_shape: Sequence[int],
             about: Mapping[str, str]) -> bytes:
    make, real = library.helper, library.TensorProto.FLOAT
    file = make.make_model(
        make.make_graph([make.make_node(**node) for node in graph.nodes], name,
                        [make.make_tensor_value_info(INPUT, real, ["N", *in_shape])],
                        [make.make_tensor_value_info(OUTPUT, real, ["N", *out_shape])],
                        [library.numpy_helper.from_array(array, name) for name, array in graph.arrays.items()]),
        opset_imports=[make.make_opsetid("", OPSET)], ir_version=FORMAT, producer_name="minicnn", producer_version=__version__)
    make.set_model_props(file, {key: value for key, value in about.items() if value})
    content: bytes = file.SerializeToString()
    return content


def _library() -> Any:
    try:
        import onnx as library
        import onnx.checker
    except ImportError:
        raise ImportError("ONNX files need the onnx library, which is not installed: pip install onnx") from None
    return library
