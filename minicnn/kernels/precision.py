"""How exactly a GPU multiplies matrices of float32."""
from __future__ import annotations

_precision = "fp32"


def set_precision(name: str) -> None:
    """"fp32": products of float32 in float32.   "tf32": their factors rounded to 10 bits behind the point (a relative 5e-4), sums
    in float32, on the tensor cores that NVIDIA's GPUs have since Ampere.

    For the whole process, and on a GPU alone: NumPy's products, and those of float64, are what they are.
    """
    global _precision
    if name not in ("fp32", "tf32"):
        raise ValueError(f'precision {name!r}: choose "fp32" or "tf32"')
    _precision = name


def get_precision() -> str:
    """What `set_precision` was given last; "fp32" before."""
    return _precision
