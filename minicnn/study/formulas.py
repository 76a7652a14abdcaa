"""What each operation computes and what its backward computes, as LaTeX, and why numbers are kept for the backward.

L is the loss; g is what came back to the output, dL/dy. A bar over a name is the gradient that goes on to it.
An operation that is not in the table is shown by its docstring and its source alone.
"""
from __future__ import annotations

import importlib
from typing import NamedTuple


class Formula(NamedTuple):
    """An operation in LaTeX: y, the gradient of each argument, and what must be known for it."""

    says: str                           # in words
    forward: str
    backward: dict[str, str]            # by argument
    why: dict[str, str] = {}            # by what is kept


_CONV = Formula(
    "Each filter is slid over the image; every output pixel is the sum of products of its window with the filter "
    "(s: stride, a: padding, d: dilation).",
    r"y_{n,k,p,q} = b_k + \sum_{c,i,j} w_{k,c,i,j}\; x_{n,c,\;ps-a+id,\;qs-a+jd}",
    {"x": r"\bar x_{n,c,h,v} = \sum_k \sum_{ps-a+id\,=\,h} \sum_{qs-a+jd\,=\,v} w_{k,c,i,j}\; g_{n,k,p,q}",
     "weight": r"\bar w_{k,c,i,j} = \sum_{n,p,q} g_{n,k,p,q}\; x_{n,c,\;ps-a+id,\;qs-a+jd}",
     "bias": r"\bar b_k = \sum_{n,p,q} g_{n,k,p,q}"},
    {"x": "The weight's gradient multiplies each output's gradient with the pixels that the output saw.",
     "weight": "The input's gradient takes each output's gradient back along the filter that made it."})

_NORM = Formula(
    "Each channel is shifted and scaled to mean 0 and variance 1 over the batch, then by two learned numbers.",
    r"\hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}}, \qquad y = \gamma\, \hat x + \beta",
    {"x": r"\bar x = \frac{\gamma}{\sqrt{\sigma^2+\varepsilon}} "
          r"\left( g - \mathrm{mean}(g) - \hat x\; \mathrm{mean}(g\, \hat x) \right)",
     "weight": r"\bar\gamma = \sum_{n,h,v} g\, \hat x",
     "bias": r"\bar\beta = \sum_{n,h,v} g"},
    {"x": "x hat is computed again from it.", "weight": "gamma scales what goes back.",
     "batch_mean": "The mean of the batch, to compute x hat again.",
     "batch_var": "The variance of the batch, to compute x hat again.",
     "y": "The gradient passes where the ReLU's result is positive."})

_RELU_WHY = {"y": "Where the result is positive the gradient passes, elsewhere it stops."}

FORMULAS: dict[str, Formula] = {
    "conv2d": _CONV,
    "conv2d_relu": _CONV._replace(
        says=_CONV.says + " What is negative becomes 0.", forward=r"z = w * x + b, \qquad y = \max(z, 0)",
        backward={"x": r"\bar z = g\,[y > 0], \qquad \bar x = w^{\top} * \bar z", "weight": r"\bar w = \bar z * x",
                  "bias": r"\bar b_k = \sum_{n,p,q} \bar z_{n,k,p,q}"},
        why={**_CONV.why, **_RELU_WHY}),
    "conv2d_affine": Formula(
        "A convolution, one number times each channel plus another, a residual addition and a ReLU, in one pass.",
        r"y = \max(s\,(w * x) + t + r,\; 0)",
        {"x": r"\bar z = g\,[y>0], \qquad \bar x = w^{\top} * (s\,\bar z)", "weight": r"\bar w = (s\,\bar z) * x",
         "scale": r"\bar s = \sum \bar z\,(w * x)", "shift": r"\bar t = \sum \bar z", "residual": r"\bar r = \bar z"},
        {**_CONV.why, **_RELU_WHY, "scale": "It scales what goes back to the convolution."}),
    "normalize": _NORM,
    "normalize_relu": _NORM._replace(
        says=_NORM.says + " What is negative becomes 0.",
        forward=r"\hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}}, \qquad y = \max(\gamma\, \hat x + \beta,\; 0)"),
    "affine": Formula(
        "One number times each channel plus another: batch norm by its running statistics.",
        r"y = s_c\, x + t_c",
        {"x": r"\bar x = s_c\, g", "scale": r"\bar s_c = \sum_{n,h,v} g\, x", "shift": r"\bar t_c = \sum_{n,h,v} g"},
        {"x": "The scale's gradient is a sum of products with x.", "scale": "It scales what goes back to x."}),
    "relu": Formula("What is negative becomes 0.", r"y = \max(x, 0)", {"x": r"\bar x = g\,[y > 0]"}, _RELU_WHY),
    "add_relu": Formula("The sum of two arrays; what is negative becomes 0.", r"y = \max(a + b,\; 0)",
                        {"a": r"\bar a = g\,[y > 0]", "b": r"\bar b = g\,[y > 0]"}, _RELU_WHY),
    "add": Formula("The sum. Its gradient goes to both sides unchanged.", r"y = a + b",
                   {"a": r"\bar a = g", "b": r"\bar b = g"}, {}),
    "sub": Formula("The difference.", r"y = a - b", {"a": r"\bar a = g", "b": r"\bar b = -g"}, {}),
    "mul": Formula("The product.", r"y = a\, b", {"a": r"\bar a = g\, b", "b": r"\bar b = g\, a"},
                   {"a": "Each factor is the other's derivative.", "b": "Each factor is the other's derivative."}),
    "div": Formula("The quotient.", r"y = \frac{a}{b}", {"a": r"\bar a = \frac{g}{b}", "b": r"\bar b = -\frac{g\, y}{b}"},
                   {"b": "It divides what goes back.", "y": "The quotient itself is part of the derivative in b."}),
    "neg": Formula("The negative.", r"y = -x", {"x": r"\bar x = -g"}),
    "power": Formula("A power.", r"y = x^{e}", {"x": r"\bar x = g\, e\, x^{e-1}", "exponent": r"\bar e = g\, y \ln x"},
                     {"x": "The derivative is a power of it."}),
    "exp": Formula("The exponential.", r"y = e^{x}", {"x": r"\bar x = g\, y"}, {"y": "The exponential is its own derivative."}),
    "log": Formula("The natural logarithm.", r"y = \ln x", {"x": r"\bar x = \frac{g}{x}"}, {"x": "It divides what goes back."}),
    "sqrt": Formula("The square root.", r"y = \sqrt{x}", {"x": r"\bar x = \frac{g}{2y}"},
                    {"y": "The derivative is written in it."}),
    "tanh": Formula("The hyperbolic tangent.", r"y = \tanh x", {"x": r"\bar x = g\,(1 - y^2)"},
                    {"y": "The derivative is written in it."}),
    "sigmoid": Formula("The logistic function.", r"y = \frac{1}{1 + e^{-x}}", {"x": r"\bar x = g\, y\,(1 - y)"},
                       {"y": "The derivative is written in it."}),
    "softmax": Formula("Positive numbers that add up to 1.", r"y_i = \frac{e^{x_i}}{\sum_j e^{x_j}}",
                       {"x": r"\bar x_i = y_i \left( g_i - \sum_j g_j\, y_j \right)"}, {"y": "The derivative is written in it."}),
    "log_softmax": Formula("The logarithm of a softmax.", r"y_i = x_i - \ln \sum_j e^{x_j}",
                           {"x": r"\bar x_i = g_i - e^{y_i} \sum_j g_j"}, {"y": "The derivative is written in it."}),
    "softmax_cross_entropy": Formula(
        "Minus the logarithm of the probability that the model gives to the right class, averaged over the batch.",
        r"L = \frac{1}{N} \sum_n \left( \ln \sum_j e^{z_{nj}} - \sum_j t_{nj}\, z_{nj} \right)",
        {"logits": r"\bar z_{nj} = \frac{g}{N} \left( \mathrm{softmax}(z_n)_j - t_{nj} \right)"},
        {"logits": "The gradient is the probabilities less the target, and these are computed again from the logits.",
         "labels": "They say where the target is 1."}),
    "linear": Formula(
        "A matrix product: every output is a weighted sum of all inputs.",
        r"y_{nk} = b_k + \sum_i w_{ki}\, x_{ni}",
        {"x": r"\bar x_{ni} = \sum_k w_{ki}\, g_{nk}", "weight": r"\bar w_{ki} = \sum_n g_{nk}\, x_{ni}",
         "bias": r"\bar b_k = \sum_n g_{nk}"},
        {"x": "The weight's gradient is the output's gradient times the input.",
         "weight": "The input's gradient takes the output's gradient back through the same weights."}),
    "matrix_product": Formula("A matrix product.", r"Y = A\, B", {"a": r"\bar A = G\, B^{\top}", "b": r"\bar B = A^{\top} G"},
                              {"a": "Each factor is the other's derivative.", "b": "Each factor is the other's derivative."}),
    "max_of_windows": Formula(
        "The largest number of each window; of equal ones, the first (s: stride, a: padding).",
        r"y_{n,c,p,q} = \max_{i,j}\; x_{n,c,\;ps-a+i,\;qs-a+j}",
        {"x": r"\bar x_{n,c,h,v} = \sum_{p,q} g_{n,c,p,q}\, \left[ (h,v) \text{ won the window at } (p,q) \right]"},
        {"x": "Compared with y it says which pixel won.", "y": "Compared with x it says which pixel won."}),
    "window_sum": Formula("The sum over each window.", r"y_{n,c,p,q} = \sum_{i,j} x_{n,c,\;ps-a+i,\;qs-a+j}",
                          {"x": r"\bar x_{n,c,h,v} = \sum_{(p,q) \text{ that see } (h,v)} g_{n,c,p,q}"}),
    "sum": Formula("The sum along some axes: every number gets the gradient of the sum that it went into.", r"y = \sum_i x_i",
                   {"x": r"\bar x_i = g"}),
    "broadcast_to": Formula("The same numbers again along new axes.", r"y_i = x", {"x": r"\bar x = \sum_i g_i"}),
    "reshape": Formula("The same numbers under another shape.", r"y_{r(i)} = x_i", {"x": r"\bar x_i = g_{r(i)}"}),
    "transpose": Formula("The same numbers with the axes in another order.", r"y_{ji} = x_{ij}", {"x": r"\bar x_{ij} = g_{ji}"}),
    "getitem": Formula("Some of the numbers. The others get the gradient 0.", r"y_i = x_{s(i)}",
                       {"x": r"\bar x_h = \sum_{i:\; s(i) = h} g_i"}),
    "place": Formula("Numbers put among zeros.", r"y_h = \sum_{i:\; s(i)=h} x_i", {"values": r"\bar x_i = g_{s(i)}"}),
    "pad": Formula("Surrounded with zeros: a border, or new channels.", r"y_{h + a} = x_h,\quad 0 \text{ elsewhere}",
                   {"x": r"\bar x_h = g_{h + a}"}),
    "concatenate": Formula("Arrays joined along an axis; each gets back its own stretch of the gradient.",
                           r"y = (x^{(0)}, x^{(1)}, \ldots)", {"arrays": r"\bar x^{(i)} = \text{its stretch of } g"}),
    "where": Formula("One of two, by a mask.", r"y = m\, a + (1 - m)\, b", {"a": r"\bar a = m\, g", "b": r"\bar b = (1 - m)\, g"},
                     {"condition": "It says which side each number came from."}),
    "maximum": Formula("The larger of each pair.", r"y = \max(a, b)", {"a": r"\bar a = g\,[a \ge b]", "b": r"\bar b = g\,[a < b]"},
                       {"a": "Compared, they say which was larger.", "b": "Compared, they say which was larger."}),
    "minimum": Formula("The smaller of each pair.", r"y = \min(a, b)", {"a": r"\bar a = g\,[a \le b]", "b": r"\bar b = g\,[a > b]"},
                       {"a": "Compared, they say which was smaller.", "b": "Compared, they say which was smaller."}),
    "max_of_last": Formula("The largest along the last axis.", r"y = \max_i x_i", {"x": r"\bar x_i = g\,[i \text{ won}]"},
                           {"winner": "The gradient goes to it."}),
}


def mathml(latex: str) -> str:
    """LaTeX as a MathML element. ImportError, with the cure, where latex2mathml is not installed."""
    try:
        convert = importlib.import_module("latex2mathml.converter").convert
    except ImportError as error:
        raise ImportError("the report typesets its equations with latex2mathml, which is not installed: "
                          "pip install latex2mathml") from error
    return str(convert(latex, display="block"))
