"""Products cut in pieces: the same numbers as a whole product, for shapes that fill tiles, leave rests, and are not cut at all."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicnn.kernels import linear, tiles
from minicnn.kernels.blocks import copy_pixels

# (m, K, N): one number; primes; nothing; whole tiles; rests of rows; wide, deep, and too large to be cut
SHAPES = [(1, 1, 1), (5, 3, 7), (0, 4, 4), (1000, 16, 16), (4097, 64, 64), (500, 64, 256), (997, 144, 16), (500, 100, 97),
          (700, 576, 64), (61, 256, 1024), (1023, 147, 64), (40, 600, 128), (3, 2000, 640)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random(rng, *shapes, dtype=np.float64):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("m, k, n", SHAPES)
def test_multiply(m, k, n, rng):
    rows, matrix = random(rng, (m, k), (k, n))
    for laid in (matrix, np.asfortranarray(matrix)):
        out = np.full((m, n), np.nan)
        tiles.multiply(rows, tiles.tiled(laid), out)
        np.testing.assert_allclose(out, np.einsum("mk,kn->mn", rows, matrix), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("m, k, n", [shape for shape in SHAPES if shape[0]])
def test_sums_of_products(m, k, n, rng):
    left, right = random(rng, (m, k), (m, n))
    for product in (tiles.multiply_transposed, tiles.sum_of_products):
        out = np.full((k, n), np.nan)
        product(left, right, out)
        np.testing.assert_allclose(out, np.einsum("mk,mn->kn", left, right), rtol=1e-9, atol=1e-9)


def test_stacks_of_products(rng):
    rows, matrices, others = random(rng, (6, 98, 128), (6, 128, 192), (6, 98, 192))
    out = np.full((6, 98, 192), np.nan)
    tiles.multiply(rows, tiles.tiled(matrices), out)
    np.testing.assert_allclose(out, np.einsum("fmk,fkn->fmn", rows, matrices), rtol=1e-9, atol=1e-9)
    out = np.full((6, 128, 192), np.nan)
    tiles.multiply_transposed(rows, others, out)
    np.testing.assert_allclose(out, np.einsum("fmk,fmn->fkn", rows, others), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pixel, count", [(1, 1), (16, 50), (16, 0), (64, 97), (7, 1001), (2000, 3)])
def test_planes_are_cut_between_pixels(pixel, count, rng, monkeypatch):
    """What lies under one another, as the points of a spectrum do; the planes' rows need not follow each other in memory."""
    matrix, planes = random(rng, (16, 37), (37, pixel * (count + 2)))
    planes, out = planes[:, :pixel * count], np.full((16, pixel * count), np.nan)
    monkeypatch.setattr(tiles, "TILE", 16 * 37 * 640)
    tiles.multiply_planes(matrix, planes, out, pixel)
    np.testing.assert_allclose(out, np.einsum("mk,kn->mn", matrix, planes), rtol=1e-9, atol=1e-9)


# (m, K, N) and into how many pieces the sum is cut
@pytest.mark.parametrize("m, k, n, pieces", [
    (49, 4608, 512, 16), (1, 4096, 128, 8), (3, 2304, 64, 6), (98, 4608, 64, 32), (49, 2048, 64, 8),
    (300, 4608, 512, 1), (49, 512, 512, 1), (49, 4608, 100, 1), (49, 2053, 64, 1)])
def test_a_long_sum_of_few_rows_is_cut(m, k, n, pieces, rng, threads):
    a, b = random(rng, (m, k), (k, n))
    assert linear._pieces(m, k, n) == pieces
    expected = np.einsum("mk,kn->mn", a, b, optimize=True)
    into = np.full((m, n), np.nan)
    for y in (linear.product(a, b), linear.product(a, b, out=into), linear.product(np.asfortranarray(a), b),
              linear.product(a, np.asfortranarray(b))):
        np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(into, linear.product(a, b))


def test_no_tile_has_more_multiplications_than_the_blas_takes_unpacked(monkeypatch, rng):
    sizes, matmul = [], np.matmul

    def counted(a, b, out):
        sizes.append(a.shape[-2] * a.shape[-1] * b.shape[-1])
        return matmul(a, b, out=out)

    monkeypatch.setattr(np, "matmul", counted)
    for m, k, n in ((4097, 64, 256), (997, 144, 16), (700, 576, 64)):
        rows, matrix, right = random(rng, (m, k), (k, n), (m, n), dtype=np.float32)
        tiles.multiply(rows, tiles.tiled(matrix), np.empty((m, n), np.float32))
        tiles.sum_of_products(rows, right, np.empty((k, n), np.float32))
    a, b, matrix, planes = random(rng, (49, 4608), (4608, 64), (16, 37), (37, 64 * 196), dtype=np.float32)
    linear.product(a, b)
    tiles.multiply_planes(matrix, planes, np.empty((16, 64 * 196), np.float32), 64)
    assert sizes and max(sizes) <= tiles.TILE
    assert min(sizes) > 500, "and not many tiny ones"


@given(st.integers(0, 5000), st.integers(1, 700))
def test_runs_cover_all_rows_once(m, most):
    runs = tiles._runs(m, most)
    assert [i for part, _ in runs for i in range(part.start, part.stop)] == list(range(m))
    for part, height in runs:
        assert 0 < height <= most and (part.stop - part.start) % height == 0
    assert len(runs) <= 2


def test_matrices_are_cut_only_where_it_pays():
    assert tiles.tiled(np.zeros((64, 256), np.float32)).shape == (4, 64, 64)
    assert tiles.tiled(np.zeros((144, 16), np.float32)).shape == (1, 144, 16)
    assert tiles.tiled(np.zeros((64, 97), np.float32)).shape == (1, 64, 97), "a prime has no tiles"
    large = np.zeros((2048, 512), np.float32)
    assert np.shares_memory(tiles.tiled(large), large), "to lay it out would take longer than it saves"
    assert np.shares_memory(tiles.tiled(large.T), large)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_copy_pixels(dtype, rng):
    image, = random(rng, (2, 6, 8, 3), dtype=dtype)
    out = np.zeros((2, 3, 4, 3), dtype)
    copy_pixels(image[:, ::2, ::-2], out)
    np.testing.assert_array_equal(out, image[:, ::2, ::-2])
    into = np.zeros((2, 6, 9, 3), dtype)
    copy_pixels(image, into[:, :, 1:])                                  # gaps in what is written
    np.testing.assert_array_equal(into[:, :, 1:], image)
    assert not into[:, :, 0].any()
    copy_pixels(np.broadcast_to(np.arange(3, dtype=dtype), (2, 6, 8, 3)), image)
    np.testing.assert_array_equal(image, np.broadcast_to(np.arange(3), image.shape))
    copy_pixels(np.zeros((0, 3), dtype), np.zeros((0, 3), dtype))       # nothing to copy, no complaint
