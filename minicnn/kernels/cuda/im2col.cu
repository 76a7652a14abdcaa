// im2col, and its adjoint col2im: what a window sees becomes a row of a matrix, and goes back.
//
//     columns[(n, p, q), (i, j, c)] = image[n, p sh - ph + i dh, q sw - pw + j dw, c]          0 in the padding
//
// image: (images, h, w, c).   columns: (images p q, kh kw c).
#include "common.cuh"

// A row of outputs for each blockIdx.x, so that its divisions are done once for many threads. What a window sees of one row of the
// image lies side by side on both sides, kw c numbers; neighbouring threads take neighbours of these, and each goes down the kh rows,
// so that it divides twice, which takes a GPU long, for all of them.
template <class Some>       // one number, or four channels at once
__device__ void gather(const Some* image, Some* columns, int images, int h, int w, int c, int kh, int kw, int sh, int sw,
                       int ph, int pw, int dh, int dw, int p, int q)
{
    int run = kw * c, length = q * run;
    for (int row = blockIdx.x; row < images * p; row += gridDim.x) {
        int n = row / p, top = row % p * sh - ph;
        for (int e = blockIdx.y * blockDim.x + threadIdx.x; e < length; e += gridDim.y * blockDim.x) {
            int window = e / run, place = e % run, channel = place % c, x = window * sw - pw + place / c * dw;
            const Some* pixel = image + ((long long)(n * h + top) * w + x) * c + channel;
            Some* column = columns + ((long long)row * q + window) * kh * run + place;
            for (int i = 0; i < kh; ++i) {
                int y = top + i * dh;
                Some seen = {};
                if (0 <= y && y < h && 0 <= x && x < w) seen = pixel[i * dh * w * c];
                column[i * run] = seen;
            }
        }
    }
}

extern "C" __global__ void im2col(const stored* image, stored* columns, int images, int h, int w, int c, int kh, int kw, int sh, int sw,
                                  int ph, int pw, int dh, int dw, int p, int q)
{
    gather(image, columns, images, h, w, c, kh, kw, sh, sw, ph, pw, dh, dw, p, q);
}

extern "C" __global__ void im2col_by_fours(const StoredFour* image, StoredFour* columns, int images, int h, int w, int c, int kh, int kw,
                                           int sh, int sw, int ph, int pw, int dh, int dw, int p, int q)
{
    gather(image, columns, images, h, w, c / 4, kh, kw, sh, sw, ph, pw, dh, dw, p, q);
}

// The output that saw `place` (counted in the padded image from the tap on), or -1 where it falls between two or outside.
__device__ int seen_by(int place, int step, int outputs)
{
    if (place < 0) return -1;
    int output = step == 1 ? place : place / step;      // to divide takes a GPU long, and most steps are 1
    return output < outputs && output * step == place ? output : -1;
}

// Each pixel looks for the windows that saw it and adds up what they say, taps in row-major order. The other way round, windows
// that add to their pixels, several would write to one pixel at a time.
template <class Some>
__device__ void gather_back(const Some* columns, Some* image, int images, int h, int w, int c, int kh, int kw, int sh, int sw,
                            int ph, int pw, int dh, int dw, int p, int q)
{
    int length = w * c;
    for (int row = blockIdx.x; row < images * h; row += gridDim.x) {
        int n = row / h, y = row % h + ph;
        for (int e = blockIdx.y * blockDim.x + threadIdx.x; e < length; e += gridDim.y * blockDim.x) {
            int channel = e % c, x = e / c + pw;
            real sum[how_many<Some>] = {};
            for (int i = 0; i < kh; ++i) {
                int down = seen_by(y - i * dh, sh, p);
                if (down < 0) continue;
                const Some* windows = columns + (((long long)n * p + down) * q * kh + i) * kw * c + channel;
                for (int j = 0; j < kw; ++j) {
                    int along = seen_by(x - j * dw, sw, q);
                    if (along < 0) continue;
                    Some said = windows[(along * kh * kw + j) * c];
                    for (int k = 0; k < how_many<Some>; ++k) sum[k] += part(said, k);
                }
            }
            image[(long long)row * length + e] = from_real<Some>(sum);
        }
    }
}

extern "C" __global__ void col2im(const stored* columns, stored* image, int images, int h, int w, int c, int kh, int kw, int sh, int sw,
                                  int ph, int pw, int dh, int dw, int p, int q)
{
    gather_back(columns, image, images, h, w, c, kh, kw, sh, sw, ph, pw, dh, dw, p, q);
}

extern "C" __global__ void col2im_by_fours(const StoredFour* columns, StoredFour* image, int images, int h, int w, int c, int kh, int kw,
                                           int sh, int sw, int ph, int pw, int dh, int dw, int p, int q)
{
    gather_back(columns, image, images, h, w, c / 4, kh, kw, sh, sw, ph, pw, dh, dw, p, q);
}
