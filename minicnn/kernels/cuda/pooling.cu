// Max-pooling of (images, h, w, c), forward and backward.
//
// Padding counts as minus infinity, NaN beats everything; of equal pixels the first in row-major order wins, and gets all of the gradient.
//
// A row, of outputs or of pixels, for each blockIdx.x, and its numbers over the threads: see im2col.cu.
#include "common.cuh"

template <class Some>       // one number, or four channels at once
__device__ void largest(const Some* image, Some* best, int images, int h, int w, int c, int kh, int kw, int sh, int sw,
                        int ph, int pw, int p, int q)
{
    for (int row = blockIdx.x; row < images * p; row += gridDim.x) {
        int n = row / p, y0 = row % p * sh - ph;
        for (int e = blockIdx.y * blockDim.x + threadIdx.x; e < q * c; e += gridDim.y * blockDim.x) {
            int channel = e % c, x0 = e / c * sw - pw;
            real most[how_many<Some>];
            for (int k = 0; k < how_many<Some>; ++k) most[k] = -1 / real(0);
            for (int y = max(y0, 0); y < min(y0 + kh, h); ++y) {
                const Some* pixels = image + (long long)(n * h + y) * w * c + channel;
                for (int x = max(x0, 0); x < min(x0 + kw, w); ++x) {
                    Some seen = pixels[x * c];
                    for (int k = 0; k < how_many<Some>; ++k)
                        if (part(seen, k) > most[k] || part(seen, k) != part(seen, k)) most[k] = part(seen, k);
                }
            }
            best[(long long)row * q * c + e] = from_real<Some>(most);
        }
    }
}

extern "C" __global__ void max_pool2d(const stored* image, stored* best, int images, int h, int w, int c, int kh, int kw, int sh, int sw,
                                      int ph, int pw, int p, int q)
{
    largest(image, best, images, h, w, c, kh, kw, sh, sw, ph, pw, p, q);
}

extern "C" __global__ void max_pool2d_by_fours(const StoredFour* image, StoredFour* best, int images, int h, int w, int c, int kh, int kw,
                                               int sh, int sw, int ph, int pw, int p, int q)
{
    largest(image, best, images, h, w, c / 4, kh, kw, sh, sw, ph, pw, p, q);
}

// The first window that has seen `place`, counted from where the first window begins.
__device__ int first_window(int place, int kernel, int step) { return place < kernel ? 0 : (place - kernel) / step + 1; }

// Each pixel asks the windows that saw it whether it was the first of their largest, and adds up the gradients of those that say so.
// No winner was written down: to look at the window again takes less memory, and what it reads was just read by its neighbours.
template <class Some>
__device__ void to_the_largest(const Some* dy, const Some* image, const Some* best, Some* dx, int images, int h, int w, int c, int kh,
                               int kw, int sh, int sw, int ph, int pw, int p, int q)
{
    for (int row = blockIdx.x; row < images * h; row += gridDim.x) {
        int n = row / h, y = row % h, first = first_window(y + ph, kh, sh);
        for (int e = blockIdx.y * blockDim.x + threadIdx.x; e < w * c; e += gridDim.y * blockDim.x) {
            int channel = e % c, x = e / c;
            Some mine = image[(long long)row * w * c + e];
            real sum[how_many<Some>] = {};
            for (int i = first; i < p && i * sh - ph <= y; ++i)
                for (int j = first_window(x + pw, kw, sw); j < q && j * sw - pw <= x; ++j) {
                    long long window = ((long long)(n * p + i) * q + j) * c + channel;
                    Some most = best[window], given = dy[window];
                    bool wins[how_many<Some>];
                    for (int k = 0; k < how_many<Some>; ++k)
                        wins[k] = part(mine, k) == part(most, k) || part(mine, k) != part(mine, k);
                    int y0 = max(i * sh - ph, 0), x0 = max(j * sw - pw, 0), x1 = min(j * sw - pw + kw, w);
                    for (int above = y0; above <= y; ++above)                           // unless one before it is as large
                        for (int left = x0; left < (above < y ? x1 : x); ++left) {
                            Some seen = image[((long long)(n * h + above) * w + left) * c + channel];
                            for (int k = 0; k < how_many<Some>; ++k)
                                if (part(seen, k) == part(most, k) || part(seen, k) != part(seen, k)) wins[k] = false;
                        }
                    for (int k = 0; k < how_many<Some>; ++k)
                        if (wins[k]) sum[k] += part(given, k);
                }
            dx[(long long)row * w * c + e] = from_real<Some>(sum);
        }
    }
}

extern "C" __global__ void max_pool2d_grad(const stored* dy, const stored* image, const stored* best, stored* dx, int images, int h, int w,
                                           int c, int kh, int kw, int sh, int sw, int ph, int pw, int p, int q)
{
    to_the_largest(dy, image, best, dx, images, h, w, c, kh, kw, sh, sw, ph, pw, p, q);
}

extern "C" __global__ void max_pool2d_grad_by_fours(const StoredFour* dy, const StoredFour* image, const StoredFour* best, StoredFour* dx,
                                                    int images, int h, int w, int c, int kh, int kw, int sh, int sw, int ph, int pw,
                                                    int p, int q)
{
    to_the_largest(dy, image, best, dx, images, h, w, c / 4, kh, kw, sh, sw, ph, pw, p, q);
}
