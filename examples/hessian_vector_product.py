"""How the gradient of a ResNet's loss changes along a direction: a Hessian-vector product.

    python examples/hessian_vector_product.py

The Hessian H of the loss L in p parameters has p^2 numbers; H v, for one direction v, has p and costs about two
gradients, because the gradient of a gradient needs no matrix:

    H v = d/d(theta) <dL/d(theta), v>

Source: Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.
"""
import numpy as np

import minicnn as mc
from minicnn.models.resnet import cifar_resnet

Vector = list[np.ndarray]           # one array for each parameter


def gradient(loss, parameters) -> Vector:
    return [g.numpy() for g in mc.grad(loss(), parameters)]


def hessian_vector_product(loss, parameters, v: Vector) -> Vector:
    g = mc.grad(loss(), parameters, create_graph=True)              # Tensors, recorded like everything else
    slope = sum(((gi * vi).sum() for gi, vi in zip(g, v)), start=mc.Tensor(0.0))        # <gradient, v>: how the loss rises along v
    return [hv.numpy() for hv in mc.grad(slope, parameters)]


def finite_difference(loss, parameters, v: Vector, step: float) -> Vector:
    """(gradient at theta + step v  -  gradient at theta - step v) / (2 step): the witness, which needs no second order."""
    def at(distance: float) -> Vector:
        for p, vi in zip(parameters, v):
            p.data += distance * vi
        g = gradient(loss, parameters)
        for p, vi in zip(parameters, v):
            p.data -= distance * vi
        return g
    return [(after - before) / (2 * step) for after, before in zip(at(step), at(-step))]


def dot(a: Vector, b: Vector) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b)))


def relative_difference(a: Vector, b: Vector) -> float:
    difference = [x - y for x, y in zip(a, b)]
    return (dot(difference, difference) / dot(b, b)) ** 0.5


def main() -> None:
    # A ResNet-8: a convolution, three residual blocks, batch norm everywhere. float64, for exact finite differences.
    model = cifar_resnet(8, num_classes=10, in_shape=(3, 12, 12), dtype=np.float64)
    parameters = model.parameters()
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((4, 3, 12, 12)), rng.integers(0, 10, 4)

    def loss() -> mc.Tensor:
        return mc.ops.cross_entropy(model(images, train=True), labels)

    u, v = ([rng.standard_normal(p.shape) for p in parameters] for _ in range(2))
    hv = hessian_vector_product(loss, parameters, v)

    size = sum(p.size for p in parameters)
    print(f"ResNet-8: {size:,} parameters, so its Hessian has {size**2:,} numbers; H v has {size:,}")

    # The step is small, so that no ReLU changes its side on the way: there the gradient jumps, and a difference misleads.
    difference = relative_difference(hv, finite_difference(loss, parameters, v, step=1e-7))
    print(f"against finite differences of the gradient: relative difference {difference:.1e}")
    assert difference < 1e-5

    # A Hessian is symmetric, <u, H v> = <v, H u>: a second witness, and an exact one.
    left, right = dot(u, hv), dot(v, hessian_vector_product(loss, parameters, u))
    print(f"symmetry: <u, H v> = {left:.12g}, <v, H u> = {right:.12g}")
    assert abs(left - right) < 1e-9 * abs(left)

    # What it is good for: how long a step downhill the curvature allows. Along g the loss is L - t <g, g> + t^2/2 <g, H g>.
    g = gradient(loss, parameters)
    curvature = dot(g, hessian_vector_product(loss, parameters, g)) / dot(g, g)
    print(f"curvature along the gradient: {curvature:.4g}, so the parabola is lowest at a learning rate of {1 / curvature:.4g}")


if __name__ == "__main__":
    main()
