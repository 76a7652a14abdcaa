"""How a NumPy convolution outruns PyTorch, one step at a time: the figures of fast_convolution.md, measured on your machine.

    python examples/fast_convolution.py                         128 channels, 56 x 56, 8 images
    python examples/fast_convolution.py --channels 512 --size 28 --batch 16
    python examples/fast_convolution.py --quick                 shows that it runs

Each step is the same 3x3 convolution, checked against the first, and timed in turn with the others: medians, milliseconds an image.
"""
import argparse
import time
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np

import minicnn as mc
from minicnn import memory
from minicnn.kernels import blocks, direct, im2col, tiles, winograd
from minicnn.kernels.windows import Windows

WINDOWS = Windows.of(3, stride=1, padding=1)


# ---- 1: the definition, one multiplication at a time
def loops(images, filters):
    return direct.conv2d(images.transpose(0, 3, 1, 2), filters.transpose(3, 2, 0, 1), padding=(1, 1)).transpose(0, 2, 3, 1)


# ---- 2: im2col as most read it first: channels first, the columns of the whole batch, one product
def whole_batch(images, filters):
    x = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    n, c, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    columns = np.empty((n, c, 3, 3, h, w), x.dtype)
    for i in range(3):
        for j in range(3):
            columns[:, :, i, j] = padded[:, :, i:i + h, j:j + w]
    y = np.tensordot(columns, filters.transpose(3, 2, 0, 1), ((1, 2, 3), (1, 2, 3)))       # (N, H, W, K)
    return np.ascontiguousarray(y.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)              # and back to channels first


# ---- 3 to 7: the engine's kernels, with what makes them fast taken away again
def by_blocks(images, filters):
    return im2col.convolve(images, filters, None, WINDOWS)


def by_winograd(images, filters):
    return winograd.convolve(images, filters, None, WINDOWS)


@contextmanager
def fresh_memory():
    """Every workspace and every result from the system, as np.empty gives it."""
    def fresh(name, shape, dtype):
        return np.empty(shape, dtype)

    with ExitStack() as changed:
        changed.enter_context(mock.patch.object(blocks.threads, "workspace", fresh))
        changed.enter_context(mock.patch.object(winograd, "workspace", fresh))
        changed.enter_context(mock.patch.object(memory, "empty", np.empty))
        yield


def whole_products():
    """Every product handed to the BLAS in one piece."""
    return mock.patch.object(tiles, "FEWEST_ROWS", float("inf"))


def off_the_line():
    """The filters' numbers 16 bytes past a line of the cache, where arrays of NumPy's own often begin."""
    spectrum = winograd._filter_spectrum

    def moved(filters):
        u = spectrum(filters)
        room = np.empty(u.nbytes + 128, np.uint8)
        start = -room.ctypes.data % 64 + 16
        there = room[start:start + u.nbytes].view(u.dtype).reshape(u.shape)
        there[...] = u
        return there

    return mock.patch.object(winograd, "_filter_spectrum", moved)


@contextmanager
def threads(n):
    before = mc.get_num_threads()
    mc.set_num_threads(n)
    try:
        yield
    finally:
        mc.set_num_threads(before)


def with_(run, *contexts):
    """The function, run inside the contexts."""
    def inside(images, filters):
        with ExitStack() as entered:
            for context in contexts:
                entered.enter_context(context())
            return run(images, filters)
    return inside


def steps(cores):
    """(what is new, the function) from the slowest to the fastest."""
    return [
        ("im2col of the whole batch, channels first", whole_batch),
        ("in blocks that fit the cache, channels last; one thread", with_(by_blocks, lambda: threads(1), fresh_memory)),
        ("and workspaces used again", with_(by_blocks, lambda: threads(1))),
        (f"and {cores} threads", with_(by_blocks, lambda: threads(cores))),
        (f"Winograd in place of im2col, {cores} threads, fresh memory",
         with_(by_winograd, lambda: threads(cores), fresh_memory, whole_products, off_the_line)),
        ("and workspaces used again", with_(by_winograd, lambda: threads(cores), whole_products, off_the_line)),
        ("and products in tiles that the BLAS does not repack", with_(by_winograd, lambda: threads(cores), off_the_line)),
        ("and filters that begin with a line of the cache", with_(by_winograd, lambda: threads(cores))),
    ]


def milliseconds(run, *arguments):
    start = time.perf_counter()
    run(*arguments)
    return (time.perf_counter() - start) * 1e3


def main():
    parser = argparse.ArgumentParser(description="Time a 3x3 convolution, from loops to the engine's own.")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="8 channels at 8 x 8, twice: shows that it runs")
    args = parser.parse_args()
    if args.quick:
        args.channels, args.size, args.batch, args.repeats = 8, 8, 2, 2

    rng = np.random.default_rng(0)
    images = rng.standard_normal((args.batch, args.size, args.size, args.channels), dtype=np.float32)
    filters = rng.standard_normal((3, 3, args.channels, args.channels), dtype=np.float32)
    operations = 2 * 9 * args.channels ** 2 * args.size ** 2
    print(f"3x3, {args.channels} channels, {args.size} x {args.size}, {args.batch} images: {operations / 1e9:.3g} GFLOP an image\n")

    corner = images[:1, :2, :2, :8], filters[:, :, :8, :8]              # loops over all of it would take hours
    pairs = 16 * 8 * 8                                                  # (tap, pixel) pairs that see a pixel there, by channels
    slow = milliseconds(loops, *corner) / pairs * operations / 2
    rows = [("the definition: loops in Python (from a corner of 2 x 2 pixels)", slow)]

    found = steps(mc.get_num_threads())
    expected = found[0][1](images.astype(float), filters.astype(float))
    for name, run in found:
        error = np.abs(run(images, filters) - expected).max() / np.abs(expected).max()
        assert error < 2e-5, f"{name}: {error}"
    taken = {i: [] for i in range(len(found))}
    for _ in range(args.repeats):
        for i, (_, run) in enumerate(found):
            taken[i].append(milliseconds(run, images, filters) / args.batch)
    rows += [(name, float(np.median(taken[i]))) for i, (name, _) in enumerate(found)]

    print(f"{'':64}{'ms':>10} {'gain':>10} {'GFLOP/s':>9}")
    for i, (name, ms) in enumerate(rows):
        gain = f"x {rows[i - 1][1] / ms:.3g}" if i else ""
        print(f"{name:64}{ms:10.4g} {gain:>10} {operations / ms / 1e6:9.3g}")


if __name__ == "__main__":
    main()
