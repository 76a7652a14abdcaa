"""PyTorch's column: the same kernels on the same arrays, in a process of its own, in the faster of its two memory formats.

Of its own, because the threads of one library go on spinning after their work and would slow down the other. The parent asks for
one case at a time, by a line of JSON, and while it measures the child sleeps:

    python -m minicnn.bench.rival THREADS
"""
from __future__ import annotations

import importlib
import importlib.util
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from statistics import median
from typing import IO, Any

from minicnn.bench import kernels, measure
from minicnn.bench.cases import Case
from minicnn.bench.measure import Care
from minicnn.kernels.windows import Windows


class Rival:
    """The process, as its parent sees it. ImportError where PyTorch is not installed."""

    def __init__(self, threads: int) -> None:
        if importlib.util.find_spec("torch") is None:
            raise ImportError("--pytorch needs PyTorch, which is not installed: pip install torch")
        self.process = subprocess.Popen([sys.executable, "-m", "minicnn.bench.rival", str(threads)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.version = str(self._answer()["version"])

    def __enter__(self) -> Rival:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def seconds(self, case: Case, care: Care) -> list[float] | None:
        """Seconds of each repetition; None where it has no such kernel, or fails."""
        assert self.process.stdin is not None
        fall_asleep()                                       # our own threads may be spinning
        print(json.dumps({"case": asdict(case), "care": care}), file=self.process.stdin, flush=True)
        found: list[float] | None = self._answer().get("seconds")
        return found

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of PyTorch ended with code {self.process.wait()}; -9 is mostly a lack of memory: "
                               "try a smaller --batch")
        answer: dict[str, Any] = json.loads(line)
        return answer


def fall_asleep(limit: float = 1.0) -> None:
    """Wait until this process uses no processor any more, at most `limit` seconds: threads spin after their work."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(0.01)
        if time.process_time() - used < 0.001:
            return


# ---------------------------------------------------------------- in the child
def main() -> None:
    """Answer until the parent closes the pipe."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(int(sys.argv[1]))
    answers, sys.stdout = sys.stdout, sys.stderr            # what a library prints must not mix with the answers
    _say({"version": torch.__version__}, answers)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer: dict[str, Any] = {"seconds": _faster_format(torch, case_of(asked["case"]), Care(*asked["care"]))}
        except (RuntimeError, MemoryError, KeyError) as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        fall_asleep()
        _say(answer, answers)


def _say(answer: dict[str, Any], answers: IO[str]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def case_of(fields: dict[str, Any]) -> Case:
    """A case that came as JSON, whose tuples have become lists."""
    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value
    windows = fields["windows"]
    case = Case(**{name: tuples(value) for name, value in fields.items() if name != "windows"}, windows=None)
    return case if windows is None else replace(case, windows=Windows(**{name: tuples(v) for name, v in windows.items()}))


def _faster_format(torch: Any, case: Case, care: Care) -> list[float]:
    arrays = kernels.arrays(case)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        tensors = {name: tensor.contiguous(memory_format=memory_format) if tensor.ndim == 4 else tensor
                   for name, tensor in tensors.items()}
        call = call_of(torch, case, tensors)
        with torch.enable_grad() if case.kernel in _BY_TAPE else torch.inference_mode():
            found.append(measure.repeat(call, measure.wall, care))
    return min(found, key=median)


_BY_TAPE = ("max_pool2d_grad", "batch_norm_grad", "linear_input_grad", "linear_weight_grad")


def call_of(torch: Any, case: Case, t: dict[str, Any]) -> measure.Call:
    """The kernel in PyTorch, ready to be called. KeyError where it has none."""
    F, grads, w = torch.nn.functional, torch.nn.grad, case.windows or Windows((1, 1))
    steps: dict[str, Any] = {"stride": w.stride, "padding": w.padding, "dilation": w.dilation}
    pool: dict[str, Any] = {"stride": w.stride, "padding": w.padding, "ceil_mode": w.ceil_mode}

    def by_tape(forward: Any, *of: str) -> measure.Call:
        leaves = {name: tensor.detach().requires_grad_(name in of) for name, tensor in t.items() if name != "dy"}
        y, wanted = forward(leaves), [leaves[name] for name in of]
        return lambda: torch.autograd.grad(y, wanted, t["dy"], retain_graph=True)

    def normalize(a: dict[str, Any]) -> Any:
        return F.batch_norm(a["x"], None, None, a["scale"], a["shift"], training=True)

    starts: dict[str, Any] = {
        "im2col": lambda: lambda: F.unfold(t["x"], w.kernel_size, **steps),
        "col2im": lambda: lambda: F.fold(t["columns"], case.in_shape[1:], w.kernel_size, **steps),
        "conv2d": lambda: lambda: F.conv2d(t["x"], t["weight"], **steps),
        "conv2d_input_grad": lambda: lambda: grads.conv2d_input(kernels.shape_of("x", case), t["weight"], t["dy"], **steps),
        "conv2d_weight_grad": lambda: lambda: grads.conv2d_weight(t["x"], kernels.shape_of("weight", case), t["dy"], **steps),
        "max_pool2d": lambda: lambda: F.max_pool2d(t["x"], w.kernel_size, **pool),
        "max_pool2d_grad": lambda: by_tape(lambda a: F.max_pool2d(a["x"], w.kernel_size, **pool), "x"),
        "batch_norm": lambda: lambda: normalize(t),
        "batch_norm_grad": lambda: by_tape(normalize, "x", "scale", "shift"),
        "linear": lambda: lambda: F.linear(t["x"], t["weight"]),
        "linear_input_grad": lambda: by_tape(lambda a: F.linear(a["x"], a["weight"]), "x"),
        "linear_weight_grad": lambda: by_tape(lambda a: F.linear(a["x"], a["weight"]), "weight"),
        "residual_add": lambda: lambda: t["x"] + t["other"],
    }
    call: measure.Call = starts[case.kernel]()
    return call


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is the parent's to hear; it ends this process
    main()
