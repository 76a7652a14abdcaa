// The transforms of Winograd's convolution F(4x4, 3x3); ../winograd.py tells what it computes and where its matrices come from.
//
//     Y = A^T [ (G g G^T) * (B^T d B) ] A        summed over channels: 36 products of matrices, which the BLAS does
//
// The points are 0, a, -a, b, -b and infinity with a = 2/3, b = 3/2. As a b = 1 and the points come in pairs, the matrices are a few
// sums and differences: what is even in the point is shared by a pair, what is odd changes its sign.
//
// One thread has one tile of one channel; neighbouring threads have neighbouring channels, which lie side by side in memory.
// Tile t of down x across tiles an image; its spectrum is [f, t, channel] for f = 0 .. 35.
#include "common.cuh"

#define A (real(2) / 3)
#define B (real(3) / 2)
#define S (A * A + B * B)
#define N_A (2 * A * A * (A * A - B * B))           // the products of (point - other points) for +-a, and for +-b
#define N_B (2 * B * B * (B * B - A * A))

// The 1-D transforms, over numbers that lie `step` apart: B^T (6 to 6), G (3 to 6), A^T (6 to 4), and the transposes A (4 to 6), G^T (6 to 3).
__device__ void b_t(const real* d, real* v, int step)
{
    real d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    real even_a = d4 - B * B * d2, odd_a = A * d3 - B * d1, even_b = d4 - A * A * d2, odd_b = B * d3 - A * d1;
    v[0] = d0 - S * d2 + d4;
    v[step] = even_a + odd_a;
    v[2 * step] = even_a - odd_a;
    v[3 * step] = even_b + odd_b;
    v[4 * step] = even_b - odd_b;
    v[5 * step] = d1 - S * d3 + d5;
}

__device__ void g(const real* taps, int from, real* u, int to)
{
    real g0 = taps[0], g1 = taps[from], g2 = taps[2 * from];
    u[0] = g0;
    u[to] = (g0 + A * A * g2 + A * g1) / N_A;
    u[2 * to] = (g0 + A * A * g2 - A * g1) / N_A;
    u[3 * to] = (g0 + B * B * g2 + B * g1) / N_B;
    u[4 * to] = (g0 + B * B * g2 - B * g1) / N_B;
    u[5 * to] = g2;
}

__device__ void a_t(const real* m, int from, real* y, int to)
{
    real sum_a = m[from] + m[2 * from], off_a = m[from] - m[2 * from];
    real sum_b = m[3 * from] + m[4 * from], off_b = m[3 * from] - m[4 * from];
    y[0] = m[0] + sum_a + sum_b;
    y[to] = A * off_a + B * off_b;
    y[2 * to] = A * A * sum_a + B * B * sum_b;
    y[3 * to] = A * A * A * off_a + B * B * B * off_b + m[5 * from];
}

__device__ void a(const real* y, int from, real* w, int to)
{
    real y0 = y[0], y1 = y[from], y2 = y[2 * from], y3 = y[3 * from];
    real even_a = y0 + A * A * y2, odd_a = A * y1 + A * A * A * y3, even_b = y0 + B * B * y2, odd_b = B * y1 + B * B * B * y3;
    w[0] = y0;
    w[to] = even_a + odd_a;
    w[2 * to] = even_a - odd_a;
    w[3 * to] = even_b + odd_b;
    w[4 * to] = even_b - odd_b;
    w[5 * to] = y3;
}

__device__ void g_t(const real* u, int from, real* taps, int to)
{
    real sum_a = (u[from] + u[2 * from]) / N_A, off_a = (u[from] - u[2 * from]) / N_A;
    real sum_b = (u[3 * from] + u[4 * from]) / N_B, off_b = (u[3 * from] - u[4 * from]) / N_B;
    taps[0] = u[0] + sum_a + sum_b;
    taps[to] = A * off_a + B * off_b;
    taps[2 * to] = A * A * sum_a + B * B * sum_b + u[5 * from];
}

// V = B^T d B:   image (images, h, w, c) -> v (36, tiles, c)
extern "C" __global__ void image_spectrum(const real* image, real* v, int images, int h, int w, int c, int down, int across,
                                          int ph, int pw)
{
    int tiles = images * down * across;
    EACH(e, tiles * c) {
        int channel = e % c, left = e / c % across * 4 - pw, top = e / c / across % down * 4 - ph, n = e / c / across / down;
        real d[36];
        for (int i = 0; i < 6; ++i)
            for (int j = 0; j < 6; ++j) {
                int y = top + i, x = left + j;
                bool inside = 0 <= y && y < h && 0 <= x && x < w;
                d[6 * i + j] = inside ? image[((long long)(n * h + y) * w + x) * c + channel] : 0;
            }
        for (int j = 0; j < 6; ++j) b_t(d + j, d + j, 6);
        for (int i = 0; i < 6; ++i) b_t(d + 6 * i, d + 6 * i, 1);
        for (int f = 0; f < 36; ++f) v[(long long)f * tiles * c + e] = d[f];
    }
}

// U = G g G^T:   filters (3, 3, count) -> u (36, count), with count = C K
extern "C" __global__ void filter_spectrum(const real* filters, real* u, int count)
{
    EACH(e, count) {
        real taps[9], half[18], whole[36];
        for (int t = 0; t < 9; ++t) taps[t] = filters[(long long)t * count + e];
        for (int j = 0; j < 3; ++j) g(taps + j, 3, half + j, 3);
        for (int i = 0; i < 6; ++i) g(half + 3 * i, 1, whole + 6 * i, 1);
        for (int f = 0; f < 36; ++f) u[(long long)f * count + e] = whole[f];
    }
}

// Y = A^T M A, then max(scale Y + shift + residual, 0), as in elementwise.cu:   m (36, tiles, k) -> y (images, p, q, k)
extern "C" __global__ void outputs(const real* m, const real* scale, const real* shift, const real* residual, real* y, int images,
                                   int p, int q, int k, int down, int across, int rectified)
{
    int tiles = images * down * across;
    EACH(e, tiles * k) {
        int channel = e % k, left = e / k % across * 4, top = e / k / across % down * 4, n = e / k / across / down;
        real whole[36], half[24], out[16];
        for (int f = 0; f < 36; ++f) whole[f] = m[(long long)f * tiles * k + e];
        for (int j = 0; j < 6; ++j) a_t(whole + j, 6, half + j, 6);
        for (int i = 0; i < 4; ++i) a_t(half + 6 * i, 1, out + 4 * i, 1);
        for (int i = 0; i < 4 && top + i < p; ++i)
            for (int j = 0; j < 4 && left + j < q; ++j) {
                long long at = ((long long)(n * p + top + i) * q + left + j) * k + channel;
                real value = out[4 * i + j];
                if (scale) value *= scale[channel];
                if (shift) value += shift[channel];
                if (residual) value += residual[at];
                y[at] = rectified && value < 0 ? 0 : value;
            }
    }
}

// W = A dY A^T:   dy (images, p, q, k) -> w (36, tiles, k)
extern "C" __global__ void output_spectrum(const real* dy, real* w, int images, int p, int q, int k, int down, int across)
{
    int tiles = images * down * across;
    EACH(e, tiles * k) {
        int channel = e % k, left = e / k % across * 4, top = e / k / across % down * 4, n = e / k / across / down;
        real tile[16], half[24], whole[36];
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j)
                tile[4 * i + j] = top + i < p && left + j < q ? dy[((long long)(n * p + top + i) * q + left + j) * k + channel] : 0;
        for (int j = 0; j < 4; ++j) a(tile + j, 4, half + j, 4);
        for (int i = 0; i < 6; ++i) a(half + 4 * i, 1, whole + 6 * i, 1);
        for (int f = 0; f < 36; ++f) w[(long long)f * tiles * k + e] = whole[f];
    }
}

// dg = G^T dU G:   du (36, count) -> dg (3, 3, count)
extern "C" __global__ void filter_gradient(const real* du, real* dg, int count)
{
    EACH(e, count) {
        real whole[36], half[18], taps[9];
        for (int f = 0; f < 36; ++f) whole[f] = du[(long long)f * count + e];
        for (int j = 0; j < 6; ++j) g_t(whole + j, 6, half + j, 6);
        for (int i = 0; i < 3; ++i) g_t(half + 6 * i, 1, taps + 3 * i, 1);
        for (int t = 0; t < 9; ++t) dg[(long long)t * count + e] = taps[t];
    }
}
