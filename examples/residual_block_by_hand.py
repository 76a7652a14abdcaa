"""A residual block of ResNet forward and backward, by hand, on plain NumPy arrays.

    python examples/residual_block_by_hand.py

             x ──┬── conv 3x3 /2 ── batch norm ── relu ── conv 3x3 ── batch norm ──┬── add ── relu ── y
                 └────────────────── conv 1x1 /2 ── batch norm ────────────────────┘

Everything that happens is on this page: im2col, one matrix product a convolution, batch norm, relu, the addition, and for
each its backward. At the end all ten gradients are compared with those of the engine.
Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015.
"""
import numpy as np

import minicnn as mc
from minicnn.layers import BatchNorm2d, Conv2d, ReLU, Residual, Sequential

EPS = 1e-5


# ---- convolution: every window becomes a column, and every filter is a row that meets every column
def im2col(x, k, stride, padding):
    """(N, C, H, W) -> (N, C*k*k, P*Q): column (p, q) holds the pixels that output (p, q) sees."""
    n, c, h, w = x.shape
    p, q = (h + 2 * padding - k) // stride + 1, (w + 2 * padding - k) // stride + 1
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    columns = np.empty((n, c, k, k, p, q))
    for i in range(k):
        for j in range(k):                      # through tap (i, j) all outputs at once see every stride-th pixel from (i, j) on
            columns[:, :, i, j] = padded[:, :, i:i + stride * p:stride, j:j + stride * q:stride]
    return columns.reshape(n, c * k * k, p * q), (p, q)


def col2im(columns, in_shape, k, stride, padding):
    """The adjoint of im2col: a pixel that was copied into several columns gets the sum of what they send back."""
    n, c, h, w = in_shape
    p, q = (h + 2 * padding - k) // stride + 1, (w + 2 * padding - k) // stride + 1
    columns = columns.reshape(n, c, k, k, p, q)
    padded = np.zeros((n, c, h + 2 * padding, w + 2 * padding))
    for i in range(k):
        for j in range(k):
            padded[:, :, i:i + stride * p:stride, j:j + stride * q:stride] += columns[:, :, i, j]
    return padded[:, :, padding:padding + h, padding:padding + w]


def conv(x, weight, stride, padding):
    filters = weight.reshape(len(weight), -1)                           # (K, C*k*k)
    columns, (p, q) = im2col(x, weight.shape[2], stride, padding)
    y = (filters @ columns).reshape(len(x), len(weight), p, q)
    return y, (x.shape, weight, columns, stride, padding)


def conv_backward(dy, saved):
    """y = W c, so dW = dy c^T (summed over the images) and dc = W^T dy; then dc goes back to the pixels."""
    in_shape, weight, columns, stride, padding = saved
    dy = dy.reshape(len(dy), len(weight), -1)                           # (N, K, P*Q)
    dweight = (dy @ columns.transpose(0, 2, 1)).sum(0).reshape(weight.shape)
    dcolumns = weight.reshape(len(weight), -1).T @ dy
    return col2im(dcolumns, in_shape, weight.shape[2], stride, padding), dweight


# ---- batch norm: every channel gets mean 0 and variance 1 over the batch, then a learned scale and shift
def batch_norm(x, weight, bias):
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    x_hat = (x - mean) / np.sqrt(var + EPS)
    y = weight[:, None, None] * x_hat + bias[:, None, None]
    return y, (x_hat, weight, var)


def batch_norm_backward(dy, saved):
    """Moving one number moves the mean and the variance that all the others are measured by: hence the two means."""
    x_hat, weight, var = saved
    dbias, dweight = dy.sum((0, 2, 3)), (dy * x_hat).sum((0, 2, 3))
    centred = dy - dy.mean((0, 2, 3), keepdims=True) - x_hat * (dy * x_hat).mean((0, 2, 3), keepdims=True)
    return weight[:, None, None] / np.sqrt(var + EPS) * centred, dweight, dbias


# ---- the block
def block(x, p):
    """Forward. Returns y, and what the backward needs of each step."""
    a, conv1 = conv(x, p["body.0.weight"], stride=2, padding=1)
    b, bn1 = batch_norm(a, p["body.1.weight"], p["body.1.bias"])
    c = np.maximum(b, 0)
    d, conv2 = conv(c, p["body.3.weight"], stride=1, padding=1)
    e, bn2 = batch_norm(d, p["body.4.weight"], p["body.4.bias"])
    f, conv3 = conv(x, p["shortcut.0.weight"], stride=2, padding=0)
    g, bn3 = batch_norm(f, p["shortcut.1.weight"], p["shortcut.1.bias"])
    y = np.maximum(e + g, 0)
    return y, (conv1, bn1, c, conv2, bn2, conv3, bn3, y)


def block_backward(dy, saved):
    """The same steps in reverse; each turns the gradient of its output into that of its inputs."""
    conv1, bn1, c, conv2, bn2, conv3, bn3, y = saved
    grads = {}
    dsum = dy * (y > 0)                             # relu lets through where it was positive
    de = dg = dsum                                  # an addition hands its gradient to both sides
    dd, grads["body.4.weight"], grads["body.4.bias"] = batch_norm_backward(de, bn2)
    dc, grads["body.3.weight"] = conv_backward(dd, conv2)
    db = dc * (c > 0)
    da, grads["body.1.weight"], grads["body.1.bias"] = batch_norm_backward(db, bn1)
    dx_body, grads["body.0.weight"] = conv_backward(da, conv1)
    df, grads["shortcut.1.weight"], grads["shortcut.1.bias"] = batch_norm_backward(dg, bn3)
    dx_shortcut, grads["shortcut.0.weight"] = conv_backward(df, conv3)
    grads["x"] = dx_body + dx_shortcut              # x was used twice: its gradients add up
    return grads


def main() -> None:
    # The same block as a layer list, built for images of 4 channels and 9 x 9 pixels, in float64.
    residual = Residual([Conv2d(8, 3, stride=2, padding=1, bias=False), BatchNorm2d(), ReLU(),
                         Conv2d(8, 3, padding=1, bias=False), BatchNorm2d()],
                        [Conv2d(8, 1, stride=2, bias=False), BatchNorm2d()])
    layers = Sequential([residual.named(""), ReLU()], in_shape=(4, 9, 9), dtype=np.float64)

    rng = np.random.default_rng(0)
    for p in layers.parameters():                   # batch norm begins with ones and zeros, which would hide mistakes
        p.data[...] = rng.standard_normal(p.shape)
    x, dy = rng.standard_normal((2, 4, 9, 9)), rng.standard_normal((2, 8, 5, 5))

    y, saved = block(x, layers.state_dict())
    ours = block_backward(dy, saved)

    engine_x = mc.Tensor(x, requires_grad=True)
    engine_y = layers(engine_x, train=True)
    engine_y.backward(dy)
    theirs = {name: p.grad for name, p in layers.named_parameters().items()} | {"x": engine_x.grad}
    assert ours.keys() == theirs.keys()

    print(f"{'':20} {'shape':>14}   by hand and by the engine differ, relative, by")
    errors = {"y": relative_error(y, engine_y)} | {name: relative_error(ours[name], theirs[name]) for name in ours}
    for name, error in errors.items():
        shape = y.shape if name == "y" else ours[name].shape
        print(f"{name if name == 'y' else 'd ' + name:20} {'x'.join(map(str, shape)):>14}   {error:.1e}")
    worst = max(errors.values())
    assert worst < 1e-12, f"by hand and by the engine differ by {worst:.1e}"
    print(f"largest relative difference of {len(ours)} gradients and the output: {worst:.1e}")


def relative_error(a: np.ndarray, b: mc.Tensor | None) -> float:
    assert b is not None
    return float(np.abs(a - b.numpy()).max() / np.abs(a).max())


if __name__ == "__main__":
    main()
