"""The CUDA kernels: what takes the place of a portable kernel for arrays of CuPy.

A function here stands in for the function of the same name and the same parameters in the file of the same name one folder up
(`cuda/pooling.py`'s `max_pool2d` for `pooling.py`'s), which says when: see `dispatch.py`. The kernels themselves are the `.cu`
files, one idea each; `launch.py` starts them, `gemm.py` is the one way to the BLAS.
"""
