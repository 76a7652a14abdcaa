"""The examples run as a reader runs them, and print the numbers that they promise."""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch):
    """Run an example in a process of its own, warnings being errors; what it printed."""
    # Small matrices gain nothing by a second thread, and lose much where several tests share the cores.
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")

    def run(name, *arguments):
        done = subprocess.run([sys.executable, "-W", "error", EXAMPLES / name, *arguments], capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    return run


def test_write_an_op(run):
    output = run("write_an_op.py")
    assert "gradcheck passed" in output
    assert "gradgradcheck passed" in output
    assert re.search(r"the wrong one is rejected: .*wrong_swish.*input 0", output)
    # d(sum of y)/d(beta) by differences of the definition, without a line of the engine.
    rng = np.random.default_rng(0)
    x, beta = rng.standard_normal((2, 3, 4, 4)), rng.uniform(0.5, 2.0, (3, 1, 1))

    def channel_sums(beta):
        return (x / (1 + np.exp(-beta * x))).sum((0, 2, 3))

    expected = (channel_sums(beta + 1e-6) - channel_sums(beta - 1e-6)) / 2e-6
    printed = re.search(r"d\(beta\) = \[(.*)\]", output)
    np.testing.assert_allclose(np.array(printed[1].split(), float), expected, atol=1e-4)


def test_residual_block_by_hand(run):
    output = run("residual_block_by_hand.py")
    lines = re.findall(r"^(y|d \S+) +[\dx]+ +(\S+)$", output, re.M)
    assert len(dict(lines)) == 11                                   # the output, x, three convolutions, three batch norms' two
    assert all(float(error) < 1e-12 for _, error in lines)
    # A gradient that is zero on both sides would agree, too: batch norm's is, under an output gradient of ones.
    assert any(float(error) > 0 for _, error in lines)


def test_train_by_hand(run):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install scikit-learn")
    output = run("train_by_hand.py")
    losses = [float(loss) for loss in re.findall(r"mean loss (\S+)", output)]
    assert len(losses) == 8
    assert losses[-1] < 0.1 * losses[0]
    right, unseen = map(int, re.search(r"^right on (\d+) of (\d+) unseen digits", output, re.M).groups())
    assert unseen == 360
    assert right >= 0.97 * 360


def test_hessian_vector_product(run):
    output = run("hessian_vector_product.py")
    parameters = int(re.search(r"([\d,]+) parameters", output)[1].replace(",", ""))
    assert parameters == 75_290
    assert float(re.search(r"finite differences .* (\S+)$", output, re.M)[1]) < 1e-5
    left, right = map(float, re.search(r"<u, H v> = (\S+), <v, H u> = (\S+)", output).groups())
    assert left == pytest.approx(right, rel=1e-9)
    assert abs(left) > 1                                            # not two zeros


def test_every_example_is_run_here():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_fast_convolution(run):
    output = run("fast_convolution.py", "--quick")
    rows = re.findall(r"^(\S.+?) {2,}([\d.]+) +(?:x \S+)? +(\S+)$", output, re.M)
    assert [name.split()[0] for name, *_ in rows] == ["the", "im2col", "in", "and", "and", "Winograd", "and", "and", "and"]
    assert all(float(ms) > 0 for _, ms, _ in rows)


def test_transfer_learning(run, tmp_path):
    for library in ("sklearn", "PIL", "matplotlib"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    weights = Path(os.environ.get("MINICNN_DATA", "")) / "resnet20-12fca82f.th"
    if not weights.is_file():
        pytest.skip("MINICNN_DATA names no folder with resnet20-12fca82f.th")
    output = run("transfer_learning.py", "--weights", weights, "--images", "20", "--epochs", "1", "--out", tmp_path / "curves.png")
    assert [line.split(":")[0] for line in output.splitlines() if " of 360) in " in line] == ["frozen", "tuned", "from scratch"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_transfer_learning_without_weights(tmp_path):
    done = subprocess.run([sys.executable, EXAMPLES / "transfer_learning.py", "--weights", tmp_path / "no.th"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path / 'no.th'} does not exist\nname the weights with --weights FILE\n"
