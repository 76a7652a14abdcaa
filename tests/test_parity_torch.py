"""Every operation beside PyTorch's, in float64, over drawn shapes and settings: values and all gradients to 1e-10."""
import warnings

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from witnesses import host, nothing_written, same

import minicnn as mc
from minicnn import ops
from minicnn.kernels.windows import pair
from minicnn.testing.strategies import broadcastable_pairs, conv_cases, loss_cases, norm_cases, pool_cases

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    functional = torch.nn.functional

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring on arrays of a few numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_parity(device, fn, theirs, arrays, *, limit=1e-10, second_order=False):
    """fn(*Tensors) beside theirs(*torch tensors): the output, and each gradient of <output, a random dy>.

    With second_order also the gradients of the sum of squares of these gradients, dy's own included.
    """
    leaves = device.tensors(arrays)
    y = fn(*leaves)
    torch_leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
    expected = theirs(*torch_leaves)
    same(y, expected.detach().numpy(), limit, "y")
    dy = np.random.default_rng(0).standard_normal(y.shape)
    with nothing_written():
        gradients = mc.grad(y, leaves, device.put(dy), retain_graph=True)
    torch_dy = torch.tensor(dy, requires_grad=True)
    torch_gradients = torch.autograd.grad(expected, torch_leaves, torch_dy, create_graph=second_order)
    for i, (g, e) in enumerate(zip(gradients, torch_gradients, strict=True)):
        same(g, e.detach().numpy(), limit, f"gradient of input {i}")
    if second_order:
        seed = device.tensor(dy)
        graph = mc.grad(y, leaves, seed, create_graph=True)
        second = mc.grad([(g * g).sum() for g in graph], [*leaves, seed])
        torch_second = torch.autograd.grad(sum((g * g).sum() for g in torch_gradients), [*torch_leaves, torch_dy],
                                           allow_unused=True)
        for i, (g, e) in enumerate(zip(second, torch_second, strict=True)):
            same(g, np.zeros(g.shape) if e is None else e.numpy(), limit * 10, f"second-order gradient of input {i}")


# ---------------------------------------------------------------- convolution

@hypothesis.given(case=conv_cases())
def test_conv2d(device, case):
    check_parity(device, lambda *arrays: ops.conv2d(*arrays, **case.options),
                 lambda *arrays: functional.conv2d(*arrays, **case.options),
                 case.arrays, second_order=True)


@hypothesis.given(case=conv_cases(max_groups=1))
def test_im2col_is_unfold_and_col2im_is_fold(device, case):
    kernel, size = case.weight.shape[2:], case.x.shape[2:]
    how = {name: case.options[name] for name in ("stride", "padding", "dilation")}
    columns = functional.unfold(torch.tensor(case.x), kernel, **how)
    same(mc.im2col(device.put(case.x), kernel, **how), columns.numpy(), 0)
    c = np.random.default_rng(0).standard_normal(columns.shape)
    same(mc.col2im(device.put(c), size, kernel, **how), functional.fold(torch.tensor(c), size, kernel, **how).numpy(), 1e-14)


@hypothesis.given(case=conv_cases())
def test_conv2d_input_grad_is_the_transposed_convolution(device, case):
    size, kernel = case.x.shape[2:], case.weight.shape[2:]
    y_shape = functional.conv2d(torch.tensor(case.x), torch.tensor(case.weight), **case.options).shape
    dy = np.random.default_rng(0).standard_normal(y_shape)
    stride, padding, dilation = (pair(case.options[name], name) for name in ("stride", "padding", "dilation"))
    # The pixels that no window saw: PyTorch's transposed convolution has to be told.
    rest = [n - ((p - 1) * s - 2 * pad + d * (k - 1) + 1)
            for n, p, s, pad, d, k in zip(size, y_shape[2:], stride, padding, dilation, kernel, strict=True)]
    check_parity(device, lambda dy, w: ops.conv2d_input_grad(dy, w, size, **case.options),
                 lambda dy, w: functional.conv_transpose2d(dy, w, output_padding=rest, **case.options), [dy, case.weight])


# ---------------------------------------------------------------- pooling

@hypothesis.given(case=pool_cases(ties=None))
def test_max_pool2d(device, case):
    check_parity(device, lambda x: ops.max_pool2d(x, **case.options), lambda x: functional.max_pool2d(x, **case.options), [case.x],
                 second_order=True)


def test_windows_of_minus_infinity(device):
    x = np.full((1, 1, 3, 3), -np.inf)
    x[0, 0, 2, 2] = -1.0
    check_parity(device, lambda x: ops.max_pool2d(x, 2, 1, 1), lambda x: functional.max_pool2d(x, 2, 1, 1), [x])


@hypothesis.given(case=pool_cases())
def test_avg_pool2d(device, case):
    check_parity(device, lambda x: ops.avg_pool2d(x, **case.options), lambda x: functional.avg_pool2d(x, **case.options), [case.x])


@hypothesis.given(size=st.tuples(st.integers(1, 7), st.integers(1, 7)), to=st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_adaptive_avg_pool2d(device, size, to):
    x = np.random.default_rng(1).standard_normal((2, 2, *size))
    check_parity(device, lambda x: ops.adaptive_avg_pool2d(x, to), lambda x: functional.adaptive_avg_pool2d(x, to), [x])
    check_parity(device, ops.global_avg_pool2d, lambda x: functional.adaptive_avg_pool2d(x, 1).flatten(1), [x])


# ---------------------------------------------------------------- batch norm

@hypothesis.given(case=norm_cases())
def test_batch_norm(device, case):
    if case.options["train"]:       # else rounding is all there is to compare: of two numbers, dx is what cancelling leaves
        hypothesis.assume(case.x.var((0, 2, 3)).min() > 0.05 and case.x[:, 0].size > 2)
    statistics = case.running_mean, case.running_var
    running, torch_running = [device.put(s) for s in statistics], [torch.tensor(s) for s in statistics]
    options = {**case.options, "training": case.options["train"]}
    del options["train"]
    check_parity(device, lambda x, w, b: ops.batch_norm(x, w, b, *running, **case.options),
                 lambda x, w, b: functional.batch_norm(x, *torch_running, w, b, **options), [case.x, case.weight, case.bias],
                 second_order=True)
    for ours, theirs in zip(running, torch_running, strict=True):
        same(ours, theirs.numpy())


# ---------------------------------------------------------------- activations and losses

@hypothesis.given(shape=hnp.array_shapes(max_dims=4, max_side=4), data=st.data(), seed=seeds)
def test_activations(device, shape, data, seed):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = np.random.default_rng(seed).uniform(-4, 4, shape)      # further out tanh is 1 to all but a few digits, and so its slope
    for fn, theirs in ((ops.relu, functional.relu), (ops.sigmoid, torch.sigmoid), (ops.tanh, torch.tanh),
                       (lambda x: ops.softmax(x, axis), lambda x: torch.softmax(x, axis)),
                       (lambda x: ops.log_softmax(x, axis), lambda x: torch.log_softmax(x, axis))):
        check_parity(device, fn, theirs, [x], second_order=fn is ops.tanh)


@hypothesis.given(case=loss_cases(), size=st.sampled_from([1.0, 10.0]))
def test_cross_entropy(device, case, size):
    labels = torch.tensor(case.labels)
    check_parity(device, lambda z: ops.cross_entropy(z, case.labels, **case.options),
                 lambda z: functional.cross_entropy(z, labels, **case.options), [case.logits * size], second_order=size == 1.0)


@hypothesis.given(n=st.integers(1, 4), n_in=st.integers(1, 5), n_out=st.integers(1, 5), seed=seeds)
def test_linear(device, n, n_in, n_out, seed):
    rng = np.random.default_rng(seed)
    check_parity(device, ops.linear, functional.linear, [rng.standard_normal(s) for s in ((n, n_in), (n_out, n_in), (n_out,))],
                 second_order=True)


# ---------------------------------------------------------------- arithmetic and movement

@hypothesis.given(arrays=broadcastable_pairs())
def test_arithmetic_with_broadcasting(device, arrays):
    positive = [np.abs(a) + 0.5 for a in arrays]
    for f in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b, lambda a, b: a ** b):
        check_parity(device, f, f, positive, second_order=True)
    a, b = arrays
    for fn, theirs in ((ops.maximum, torch.maximum), (ops.minimum, torch.minimum)):     # of equals PyTorch gives half to each
        check_parity(device, fn, theirs, [a, b + 1e-3])


@hypothesis.given(shapes=hnp.mutually_broadcastable_shapes(signature="(m?,k),(k,n?)->(m?,n?)", max_dims=2, max_side=3), seed=seeds)
def test_matmul(device, shapes, seed):
    rng = np.random.default_rng(seed)
    a, b = (np.asarray(rng.standard_normal(shape)) for shape in shapes.input_shapes)
    check_parity(device, lambda a, b: a @ b, lambda a, b: a @ b, [a, b], limit=1e-9, second_order=True)


@hypothesis.given(shape=hnp.array_shapes(min_dims=1, max_dims=4, max_side=4), data=st.data(), seed=seeds)
def test_reductions_and_movement(device, shape, data, seed):
    axes = data.draw(hnp.valid_tuple_axes(len(shape), min_size=1))
    order = data.draw(st.permutations(range(len(shape))))
    keepdims = data.draw(st.booleans())
    x = np.random.default_rng(seed).standard_normal(shape)
    for fn, theirs in ((lambda x: x.sum(axes, keepdims), lambda x: x.sum(axes, keepdims)),
                       (lambda x: x.mean(axes, keepdims), lambda x: x.mean(axes, keepdims)),
                       (lambda x: x.max(axes[0]), lambda x: x.max(axes[0]).values),
                       (lambda x: x.var(axes, keepdims=keepdims), lambda x: x.var(axes, correction=0, keepdim=keepdims)),
                       (lambda x: x.transpose(order), lambda x: x.permute(*order)), (lambda x: x[..., :1], lambda x: x[..., :1]),
                       (lambda x: ops.pad(x, 1), lambda x: functional.pad(x, (1, 1) * x.ndim)),
                       (lambda x: ops.concatenate([x, x], axis=axes[0]), lambda x: torch.cat([x, x], dim=axes[0]))):
        check_parity(device, fn, theirs, [x])


@hypothesis.given(x=hnp.arrays(float, hnp.array_shapes(max_dims=3, max_side=3), elements=st.floats(0.25, 4)))
def test_elementwise(device, x):
    for fn, theirs in ((ops.exp, torch.exp), (ops.log, torch.log), (ops.sqrt, torch.sqrt), (lambda x: x ** 3, lambda x: x ** 3),
                       (lambda x: 2.0 ** x, lambda x: 2.0 ** x),
                       (lambda x: 1 / x, lambda x: 1 / x), (lambda x: x ** -0.5, lambda x: x ** -0.5)):
        check_parity(device, fn, theirs, [x], second_order=True)


# ---------------------------------------------------------------- a network at once

def test_gradients_of_a_residual_block_and_of_their_norm(device):
    """conv, batch norm, relu, a residual addition, pooling, a linear layer and cross-entropy, to second order."""
    rng = np.random.default_rng(3)
    labels = np.array([0, 2, 1, 2])
    arrays = [rng.standard_normal(s) * 0.5 for s in ((4, 3, 6, 6), (3, 3, 3, 3), (3,), (3,), (3, 3, 3, 3), (3, 3))]

    def ours(x, w1, g, b, w2, w3):
        running = device.put(np.zeros(3)), device.put(np.ones(3))
        y = ops.relu(ops.batch_norm(ops.conv2d(x, w1, padding=1), g, b, *running, train=True))
        y = ops.max_pool2d(ops.conv2d(y, w2, padding=1) + x, 3, 2, 1)
        return ops.cross_entropy(ops.linear(ops.global_avg_pool2d(y), w3), labels)

    def theirs(x, w1, g, b, w2, w3):
        y = torch.relu(functional.batch_norm(functional.conv2d(x, w1, padding=1), None, None, g, b, True))
        y = functional.max_pool2d(functional.conv2d(y, w2, padding=1) + x, 3, 2, 1)
        return functional.cross_entropy(functional.linear(y.mean((2, 3)), w3), torch.tensor(labels))

    check_parity(device, ours, theirs, arrays, second_order=True)
    assert host(ours(*device.tensors(arrays))) > 0
