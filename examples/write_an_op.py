"""Write an operation of your own, and have its gradients checked.

    python examples/write_an_op.py

The operation is Swish, x sigmoid(beta x), with one learned beta for each channel. An op is a forward on arrays and its
backwards; the engine does the rest: the tape, broadcasting Tensors, gradients of gradients.
Source: Ramachandran, Zoph, Le, "Searching for Activation Functions", 2017.
"""
import numpy as np

import minicnn as mc
from minicnn.ops import sigmoid, sum_to
from minicnn.testing import GradcheckError, gradcheck, gradgradcheck


# The forward: arrays in, array out. It knows nothing of gradients.
#     y = x s,   s = sigmoid(beta x)
@mc.op
def swish(x, beta):
    """x: (N, C, H, W).   beta: (C, 1, 1), one number a channel.   Returns (N, C, H, W)."""
    return x * sigmoid(beta * x)


# The backward: `dy` is dL/dy. What else it needs it names: arguments of the forward, or the shape of one. The tape keeps just that.
#     dy/dx    = s + x s (1 - s) beta
#     dy/dbeta = x^2 s (1 - s)
# One number of beta was copied to every image and pixel of its channel; the adjoint of copying is summing: sum_to.
# The lines below are made of operations, so they serve plain arrays (first order) and Tensors (second order) alike.
@swish.backward("x", "beta")
def swish_backward(dy, x, beta, beta_shape):
    s = sigmoid(beta * x)
    slope = x * s * (1.0 - s)
    dx = dy * (s + slope * beta)
    dbeta = sum_to(dy * x * slope, beta_shape)
    return dx, dbeta


# The same with a slip that is easily made: the chain rule's factor beta is missing in dx. It runs, and has the right shapes.
@mc.op
def wrong_swish(x, beta):
    return x * sigmoid(beta * x)


@wrong_swish.backward("x", "beta")
def wrong_swish_backward(dy, x, beta, beta_shape):
    s = sigmoid(beta * x)
    slope = x * s * (1.0 - s)
    return dy * (s + slope), sum_to(dy * x * slope, beta_shape)


def main() -> None:
    rng = np.random.default_rng(0)
    x, beta = rng.standard_normal((2, 3, 4, 4)), rng.uniform(0.5, 2.0, (3, 1, 1))

    # Called with arrays an op is a plain function; called with a Tensor it is recorded and can be differentiated.
    assert isinstance(swish(x, beta), np.ndarray)
    learned = mc.Tensor(beta, requires_grad=True)
    swish(x, learned).sum().backward()
    assert learned.grad is not None
    print("d(sum of y)/d(beta) =", learned.grad.numpy().ravel().round(4))

    # Backward against finite differences of the forward, in float64, with a random output gradient.
    print("first order:  gradcheck", "passed" if gradcheck(swish, [x, beta]) else "failed")
    # The backward's own gradient, against finite differences of the backward.
    print("second order: gradgradcheck", "passed" if gradgradcheck(swish, [x, beta]) else "failed")

    try:
        gradcheck(wrong_swish, [x, beta])
    except GradcheckError as report:
        print("the wrong one is rejected:", str(report).splitlines()[0])
    else:
        raise AssertionError("the wrong backward was not noticed")


if __name__ == "__main__":
    main()
