"""Every operation of the engine, forward and backwards side by side. Each takes Tensors or plain arrays."""
from minicnn.ops.activation import add_relu, dropout, log_softmax, relu, sigmoid, softmax
from minicnn.ops.arithmetic import (
    add, div, exp, log, matmul, matrix_product, max, max_of_last, maximum, min, minimum, mul, neg, power, sqrt, sub, tanh, where,
)
from minicnn.ops.attention import simam
from minicnn.ops.conv import conv2d, conv2d_affine, conv2d_input_grad, conv2d_relu, conv2d_weight_grad
from minicnn.ops.linear import linear
from minicnn.ops.loss import cross_entropy, softmax_cross_entropy
from minicnn.ops.movement import (
    astype, broadcast_to, concatenate, getitem, mean, pad, place, reshape, sum, sum_to, to, transpose, var,
)
from minicnn.ops.normalization import affine, batch_norm, normalize, normalize_relu
from minicnn.ops.pooling import (
    adaptive_avg_pool2d, avg_pool2d, give_to_winner, global_avg_pool2d, max_pool2d, max_of_windows, take_from_winner,
    window_spread, window_sum,
)

__all__ = [
    "adaptive_avg_pool2d", "add", "add_relu", "affine", "astype", "avg_pool2d", "batch_norm", "broadcast_to", "concatenate",
    "conv2d", "conv2d_affine", "conv2d_input_grad", "conv2d_relu", "conv2d_weight_grad", "cross_entropy", "div", "dropout", "exp",
    "getitem", "give_to_winner", "global_avg_pool2d", "linear", "log", "log_softmax", "matmul", "matrix_product", "max",
    "max_of_last", "max_of_windows", "max_pool2d", "maximum", "mean", "min", "minimum", "mul", "neg", "normalize",
    "normalize_relu", "pad", "place", "power", "relu", "reshape", "sigmoid", "simam", "softmax", "softmax_cross_entropy",
    "sqrt", "sub", "sum", "sum_to", "take_from_winner", "tanh", "to", "transpose", "var", "where", "window_spread", "window_sum",
]
