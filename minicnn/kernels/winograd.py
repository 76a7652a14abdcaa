"""Winograd's convolution F(4x4, 3x3): a 3x3 convolution of stride 1 with a quarter of the multiplications.

Four outputs in a row of a filter of three taps cost 12 multiplications by the definition. They are also coefficients of a product
of two polynomials, and such a product is known from its values at six points: evaluate both factors (B^T d and G g),
multiply the six pairs of values, and interpolate (A^T):

    y = A^T [ (G g) * (B^T d) ]                     d: 6 inputs, g: 3 taps, y: 4 outputs

Along both axes of an image, with tiles of 6 x 6 inputs that overlap by two:

    Y = A^T [ (G g G^T) * (B^T d B) ] A             36 multiplications for 16 outputs, where the definition takes 144

Summed over C channels, each of the 36 products is one of matrices: for every point f of the 36, and all T tiles at once,

    M[f] = V[f] U[f]                                V: (36, T, C) images,  U: (36, C, K) filters,  M: (36, T, K)

One block of tiles, which stays in the cache from the first step to the last (widths in pixels, C or K numbers a pixel):

      image rows           B^T down         columns, taken apart     B^T along      x U[f]       A^T both ways    and laid out
    +------------+     6 +-------------+     6 x 6 +--------+        +--------+    +--------+    16 +--------+    +-----------+
    | 4r+2 x W   |  -> r |  W+2        | ->  r x   | W / 4  |   ->   | V      | -> | M      | -> r  | W / 4  | -> | 4 r x W   |
    +------------+       +-------------+           +--------+        +--------+    +--------+       +--------+    +-----------+

Cost for an output pixel: 2.25 C K multiply-adds (4 times fewer than 9 C K, less what tiles hang over the edge); and for the
transforms (9 + 13.5) C and 36 K more, as products with a 6x6 and a 16x36 matrix, the first of which the BLAS does at a third of
its best rate, and two copies that lay tiles out. It pays from 16 channels on (32 x 32, two threads: 0.034 ms an image, im2col
0.051), and the more channels there are, the more the products decide.

The price is rounding: values far from 0 grow with the point's powers, and cancel in the end. The usual points, 0, +-1, +-2, make
matrices of small integers, which saves multiplications where they are coded one by one; here they are products with a matrix,
so the points may be chosen for their error alone. 0, +-2/3, +-3/2 round 6 times less: 2e-6 of the largest output, where
im2col has 6e-7 (128 channels at 28 x 28; `minicnn bench kernels` prints it for every layer).

The adjoint maps are as cheap. The gradient in x is the same convolution of dy, with the filters turned by 180 degrees. The gradient
in the weights is, read backwards, dU[f] = V[f]^T (A dY A^T)[f] and dg = G^T dU G.

Source: Lavin, Gray, "Fast Algorithms for Convolutional Neural Networks", 2016; Winograd, "Arithmetic Complexity of
Computations", 1980; on points, Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution", 2020.
The plain kernel that this one must equal is im2col.py's.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from threading import get_ident
from typing import Any, NamedTuple, TypeVar

import numpy as np

from minicnn import memory
from minicnn.kernels.blocks import PER_NUMBER, Finish, copy_padded, copy_pixels, slices, threads_for, total
from minicnn.kernels.dispatch import has_cuda_for_real
from minicnn.kernels.tiles import multiply, multiply_planes, multiply_transposed, tiled
from minicnn.kernels.windows import Pair, Windows
from minicnn.threads import get_num_threads, parallel, workspace

Array = np.ndarray[Any, Any]
S = TypeVar("S")

POINTS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)        # and infinity


def transforms(points: Sequence[float]) -> tuple[Array, Array, Array]:
    """B^T (6, 6), G (6, 3) and A^T (4, 6) of six points, the five given and infinity.

    With p_j a point and L_j(x) the product of (x - p_k) over the others, N_j = L_j(p_j):
    row j of G evaluates the filter at p_j, over N_j; row j of B^T has the coefficients of L_j; column j of A^T the powers of p_j.
    Infinity looks at the highest coefficient alone, and its row of B^T is the product over all points.
    Source: Toom, 1963, and Cook, 1966; transposed (to a convolution that slides) by Winograd, 1980.
    """
    b_t, g, a_t = np.zeros((6, 6)), np.zeros((6, 3)), np.zeros((4, 6))
    for j, p in enumerate(points):
        others = [q for q in points if q != p]
        b_t[j, :5] = np.poly(others)[::-1]
        g[j] = np.power(p, range(3)) / np.prod([p - q for q in others])
        a_t[:, j] = np.power(p, range(4))
    b_t[5], g[5, 2], a_t[3, 5] = np.poly(points)[::-1], 1, 1
    return b_t, g, a_t


B_T, G, A_T = transforms(POINTS)


class Block(NamedTuple):
    """Some rows of tiles: of one image, or all of several images."""

    images: slice
    tiles: slice

    @property
    def size(self) -> Pair:
        """Images, and rows of tiles of each."""
        return self.images.stop - self.images.start, self.tiles.stop - self.tiles.start


# ---------------------------------------------------------------- the maps
@has_cuda_for_real
def convolve(image: Array, filters: Array, bias: Array | None, windows: Windows, finish: Finish | None = None) -> Array:
    """(N, H, W, C), (3, 3, C, K), (K,) -> (N, P, Q, K) with P = H + 2 padding - 2, Q alike."""
    n, h, w, c = image.shape
    (p, q), k = windows.out_size((h, w)), filters.shape[3]
    spectrum = _filter_spectrum(filters)
    y = memory.empty((n, p, q, k), image.dtype)
    forth = _own(lambda size: ToSpectrum(image, windows.padding, q, size))

    if not _few_tiles(n, p, q, c, k):
        blocks = _blocks(n, p, q, c, k)
        most = _most_rows(blocks)
        back = _own(lambda size: FromSpectrum(y, bias, finish, size, most))

        def one(block: Block) -> None:
            v, way_back = forth(block.size)(block), back(block.size)
            multiply(v, spectrum, way_back.m)
            way_back(block)

        parallel(one, blocks)
        return y
    v, parts = _all_spectra(lambda block: forth(block.size)(block), (n, p, q), c, image.dtype)
    m = memory.empty((36, v.shape[1], k), image.dtype)
    most = _most_rows(block for block, _ in parts)
    back = _own(lambda size: FromSpectrum(y, bias, finish, size, most))

    def some(part: tuple[Block, slice]) -> None:
        way_back = back(part[0].size)
        way_back.m[...] = m[:, part[1]]
        way_back(part[0])

    parallel(lambda f: multiply(v[f:f + 3], spectrum[f:f + 3], m[f:f + 3]), range(0, 36, 3))
    parallel(some, parts)
    return y


def convolve_input_grad(dy: Array, filters: Array, in_size: Pair, windows: Windows) -> Array:
    """(N, P, Q, K), (3, 3, C, K) -> (N, H, W, C): the convolution of dy with the filters turned by 180 degrees.

    dx[h, w] = sum_{i, j} dy[h + ph - i, w + pw - j] g[i, j]^T,  so the turned filters see dy under a padding of 2 - padding.
    """
    down, right = windows.padding
    return convolve(dy, filters[::-1, ::-1].transpose(0, 1, 3, 2), None, Windows.of(3, 1, (2 - down, 2 - right)))


@has_cuda_for_real
def convolve_weight_grad(image: Array, dy: Array, windows: Windows) -> Array:
    """(N, H, W, C), (N, P, Q, K) -> (3, 3, C, K): dg = G^T [ sum over tiles of (B^T d B) * (A dY A^T) ] G."""
    c, (n, p, q, k), dtype = image.shape[3], dy.shape, image.dtype
    forth = _own(lambda size: ToSpectrum(image, windows.padding, q, size))
    if _few_tiles(n, p, q, c, k):
        v, _ = _all_spectra(lambda block: forth(block.size)(block), (n, p, q), c, dtype)
        w, _ = _all_spectra(lambda block: _output_spectrum(dy, block), (n, p, q), k, dtype)
        du = memory.empty((36, c, k), dtype)
        parallel(lambda f: multiply_transposed(v[f:f + 3], w[f:f + 3], du[f:f + 3]), range(0, 36, 3))
        return _filter_gradient(du.reshape(6, 6, -1)).reshape(3, 3, c, k)

    together = list(slices(36, max(6, SUM // (c * k))))         # so many points that what is added has not left the cache

    def summed(blocks: Sequence[Block]) -> Array:
        """dU, the sum over some blocks: (36, C, K)."""
        du = memory.empty((36, c, k), dtype)
        for i, block in enumerate(blocks):
            v, w = forth(block.size)(block), _output_spectrum(dy, block)
            for points in together:
                product = du[points] if i == 0 else workspace("winograd d", du[points].shape, dtype)
                multiply_transposed(v[points], w[points], product)
                if i > 0:
                    du[points] += product
        return du

    du = total(np, summed, _blocks(n, p, q, c, k))
    return _filter_gradient(du.reshape(6, 6, -1)).reshape(3, 3, c, k)


# ---------------------------------------------------------------- the spectra: values at the 36 points
SUM = 1 << 16               # numbers of dU that are added to at a time
SPECTRUM_STEP = 1 << 14      # filters (C K of them) whose spectra are computed at a time


def _filter_spectrum(filters: Array) -> Array:
    """(3, 3, C, K) -> U = G g G^T, (36, J, C, n): in tiles, cut before the numbers are four times as many."""
    turn, cut = G.astype(filters.dtype), tiled(filters)
    flipped = cut.strides[-1] > cut.strides[-2]         # not cut, and (K, C) in memory, as the input gradient has them: leave them
    cut = cut.swapaxes(-1, -2) if flipped else cut
    taps = np.ascontiguousarray(cut).reshape(3, 3, -1)
    u = memory.empty((6, 6, taps.shape[2]), filters.dtype)

    def one(part: slice) -> None:
        down = turn @ taps[..., part].reshape(3, -1)
        np.matmul(turn, down.reshape(6, 3, -1), out=u[..., part])

    parallel(one, list(slices(taps.shape[2], SPECTRUM_STEP)))
    spectrum = u.reshape(36, *cut.shape[2:])
    return spectrum.swapaxes(-1, -2) if flipped else spectrum


def _filter_gradient(du: Array) -> Array:
    """dU, (6, 6, C K) -> dg = G^T dU G, (3, 3, C K): the adjoint of `_filter_spectrum`."""
    back = G.T.astype(du.dtype)
    dg = np.empty((3, 3, du.shape[2]), du.dtype)

    def one(part: slice) -> None:
        down = np.matmul(back, du[..., part])                       # along: (6, 3, ...)
        np.matmul(back, down.reshape(6, -1), out=workspace("winograd a", (3, down.size // 6), du.dtype))
        dg[..., part] = workspace("winograd a", (3, 3, down.shape[2]), du.dtype)

    parallel(one, list(slices(du.shape[2], SPECTRUM_STEP)))
    return dg


class ToSpectrum:
    """V = B^T d B of the tiles of a block, (36, T, C): a thread's arrays for it, as the steps see them.

    Made once for all blocks of a size. Between two calls of NumPy's a thread holds Python's lock, for which the others wait; so a
    block takes as few calls as can be, and nothing is worked out between them that is known beforehand.
    """

    def __init__(self, image: Array, padding: Pair, q: int, size: Pair) -> None:
        (images, rows), (h, w, c), dtype = size, image.shape[1:], image.dtype
        across, left = -(-q // 4), padding[1]
        self.rows, self.padding, self.turn = rows, padding, B_T.astype(dtype)
        self.seen = image.reshape(len(image), h, w * c)
        down = workspace("winograd b", (images, rows, 6, 4 * across + 2, c), dtype)
        self.margins = [margin for margin in (down[..., :left, :], down[..., left + w:, :]) if margin.size]
        self.down = down.reshape(images, rows, 6, -1)[..., left * c:(left + w) * c]
        self.apart = workspace("winograd a", (6, 6, images, rows, across, c), dtype)            # (down, along, ...)
        step = down.strides
        self.tiles = np.ndarray(self.apart.shape, dtype, down, 0, (step[2], step[3], step[0], step[1], 4 * step[3], step[4]))
        self.v = workspace("winograd b", (6, 6, images * rows * across * c), dtype)
        self.result = self.v.reshape(36, -1, c)

    def __call__(self, block: Block) -> Array:
        for margin in self.margins:
            margin[...] = 0
        seen, turn = self.seen[block.images], self.turn
        whole, edges = _rows_of_tiles(block.tiles.start, self.rows, self.padding[0], self.seen.shape[1])
        if whole.stop > whole.start:                        # their rows of pixels, six by six, as a view
            step, first = seen.strides, 4 * (block.tiles.start + whole.start) - self.padding[0]
            sixes = np.ndarray((len(seen), whole.stop - whole.start, 6, seen.shape[2]), seen.dtype, seen, first * step[1],
                               (step[0], 4 * step[1], *step[1:]))
            np.matmul(turn, sixes, out=self.down[:, whole])
        for i, inside, pixels in edges:                     # what lies outside is 0
            np.matmul(turn[:, inside], seen[:, pixels], out=self.down[:, i])
        copy_pixels(self.tiles, self.apart)
        np.matmul(turn, self.apart.reshape(self.v.shape), out=self.v)
        return self.result


@functools.lru_cache(maxsize=256)
def _rows_of_tiles(start: int, rows: int, above: int, h: int) -> tuple[slice, list[tuple[int, slice, slice]]]:
    """Of some rows of tiles, those that lie wholly inside the image, and of each of the others (its number, which of its six
    rows of pixels are inside, where these are in the image)."""
    tops = [4 * (start + i) - above for i in range(rows)]
    whole = [i for i in range(rows) if 0 <= tops[i] <= h - 6]
    edges = [(i, slice(first - tops[i], behind - tops[i]), slice(first, behind)) for i in range(rows) if i not in whole
             for first, behind in [(max(tops[i], 0), max(tops[i], 0, min(tops[i] + 6, h)))]]
    return slice(whole[0], whole[-1] + 1) if whole else slice(0, 0), edges


class FromSpectrum:
    """A^T M A + bias of a block, to where it lies in y: a thread's arrays for it, as the steps see them; `m` is to be filled.

    Both ways back are one product, with all 16 x 36 products of a row of A^T and another's numbers. The bias is a 37th
    row under the 36 of M, and a column of ones beside the matrix.
    """

    def __init__(self, y: Array, bias: Array | None, finish: Finish | None, size: Pair, most: int) -> None:
        """size: of the blocks, images and rows of tiles of each; most: rows of tiles of the largest block."""
        (images, rows), (p, q, k), dtype = size, y.shape[1:], y.dtype
        across = -(-q // 4)
        self.y, self.finish, self.count = y, finish, images * rows * across
        whole = workspace("winograd c", (37, most * across, k), dtype)      # smaller blocks lie alike, and leave the bias be
        self.m = whole[:36, :self.count]
        self.planes = whole[:36 + (bias is not None), :self.count].reshape(-1, self.count * k)
        self.inverse = np.kron(A_T, A_T).astype(dtype)
        if bias is not None:
            whole[36] = bias
            self.inverse = np.append(self.inverse, np.ones((16, 1), dtype), axis=1)
        self.both = workspace("winograd a", (16, self.count * k), dtype)
        self.placed = self.both.reshape(4, 4, images, rows, across, k).transpose(2, 3, 0, 4, 1, 5)
        self.hanging = None if p % 4 == q % 4 == 0 else workspace("winograd b", (images, 4 * rows, 4 * across, k), dtype)

    def __call__(self, block: Block) -> None:
        p, q, k = self.y.shape[1:]
        multiply_planes(self.inverse, self.planes, self.both, k)
        out = self.y[block.images, 4 * block.tiles.start:4 * block.tiles.stop]
        laid = out if self.hanging is None else self.hanging
        copy_pixels(self.placed, laid.reshape(self.placed.shape))
        if self.hanging is not None:                                        # tiles that hang over the edge
            copy_pixels(laid[:, :out.shape[1], :q], out)
        if self.finish is not None:
            self.finish(out.reshape(-1, k), (block.images.start * p + 4 * block.tiles.start) * q)


def _most_rows(blocks: Iterable[Block]) -> int:
    """Rows of tiles of the largest block."""
    return max((images * rows for images, rows in (block.size for block in blocks)), default=0)


def _own(make: Callable[[Pair], S]) -> Callable[[Pair], S]:
    """make(size of a block), once for each thread that asks, and each size."""
    made: dict[tuple[int, Pair], S] = {}

    def own(size: Pair) -> S:
        key = get_ident(), size
        if key not in made:
            made[key] = make(size)
        return made[key]

    return own


def _output_spectrum(dy: Array, block: Block) -> Array:
    """W = A dY A^T of the tiles of a block: (36, T, K), in the workspace c."""
    (images, rows), (p, q, k), dtype = block.size, dy.shape[1:], dy.dtype
    turn, across = A_T.T.astype(dtype), -(-q // 4)
    width = 4 * across
    if p % 4 or q % 4:
        whole = workspace("winograd a", (images, 4 * rows, width, k), dtype)
        copy_padded(dy[block.images], whole, 4 * block.tiles.start, 0)
    else:
        whole = dy[block.images, 4 * block.tiles.start:4 * block.tiles.stop]
    down = workspace("winograd c", (images, rows, 6, across, 4, k), dtype)
    np.matmul(turn, whole.reshape(images, rows, 4, -1), out=down.reshape(images, rows, 6, -1))
    apart = workspace("winograd a", (6, 4, images, rows, across, k), dtype)
    copy_pixels(down.transpose(2, 4, 0, 1, 3, 5), apart)
    w = workspace("winograd c", (6, 6, images * rows * across * k), dtype)
    np.matmul(turn, apart.reshape(6, 4, -1), out=w)
    return w.reshape(36, -1, k)


# ---------------------------------------------------------------- the blocks
def _few_tiles(n: int, p: int, q: int, c: int, k: int) -> bool:
    """Whether U is so much larger than V that reading it for every block would cost more than leaving the cache between the steps.

    Then the steps are taken for all tiles, one after the other: the spectra, shared out by blocks of tiles; the products,
    shared out by points, so that each U[f] is read (or in the weight gradient written) once; the way back, by blocks again.
    """
    return n * -(-p // 4) * -(-q // 4) <= c * k // 400


def _all_spectra(spectrum: Callable[[Block], Array], outputs: tuple[int, int, int], c: int,
                 dtype: Any) -> tuple[Array, list[tuple[Block, slice]]]:
    """The spectra of all tiles, (36, N tiles, C), and which of them are whose block's."""
    n, down, tiles = outputs[0], -(-outputs[1] // 4), -(-outputs[1] // 4) * -(-outputs[2] // 4)
    step = max(1, min(64 // tiles, -(-n // get_num_threads())))
    parts = [(Block(some, slice(0, down)), slice(some.start * tiles, some.stop * tiles)) for some in slices(n, step)]
    whole = memory.empty((36, n * tiles, c), dtype)

    def one(part: tuple[Block, slice]) -> None:
        whole[:, part[1]] = spectrum(part[0])

    parallel(one, parts)
    return whole, parts


def _tiles_a_block(c: int, k: int) -> int:
    """Tiles that a block should have: so many that reading U (C x K) is paid back, so few that V (T x C) stays in the cache."""
    return max(112, 12288 // max(c, k), c * k // 1024)


def _blocks(n: int, p: int, q: int, c: int, k: int) -> list[Block]:
    """Cut the outputs into blocks of tiles, and into one a thread at least: runs of images, or of the rows of one."""
    down, across = -(-p // 4), -(-q // 4)
    threads = threads_for(36 * n * down * across * c * k // PER_NUMBER)
    tiles = min(_tiles_a_block(c, k), -(-n * down * across // threads))
    if down * across > tiles:
        step = -(-down // max(1, round(down * across / tiles)))
        return [Block(slice(i, i + 1), slice(start, min(start + step, down))) for i in range(n) for start in range(0, down, step)]
    count = min(n, -(-n * down * across // (tiles * threads)) * threads)
    ends = [n * i // count for i in range(count + 1)]
    return [Block(slice(i, j), slice(0, down)) for i, j in zip(ends, ends[1:], strict=False)]
