"""Run by a Python that a test starts: CuPy on the host there, too."""
import hostcuda

if hostcuda.wanted():
    hostcuda.install()
