// Passes over arrays of one shape, element by element; those of channels-last rows know the channel by the place.
#include "common.cuh"

// out = max(scale[channel] x + shift[channel] + residual, 0): batch norm, a bias, a residual addition and a ReLU, those that are there.
// A null pointer leaves its part away; out may be x.
//
// A thread stays in its column and goes from row to row, so that it looks up the channel's numbers once. Rows of few channels are
// taken several as one, `width` numbers long, so that neighbouring threads have work.
template <class Some, class Each>       // one number, or four channels at once; count, channels and width are in such
__device__ void affine_of(const Some* x, const Each* scale, const Each* shift, const Some* residual, Some* out, long long count,
                          int channels, int width, int rectified)
{
    int column = blockIdx.x * blockDim.x + threadIdx.x, channel = column % channels;
    if (column >= width) return;
    Each slope = {}, offset = {};
    Some more = {};
    for (int i = 0; i < how_many<Some>; ++i) part(slope, i) = 1;
    if (scale) slope = scale[channel];
    if (shift) offset = shift[channel];
    long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y, step = (long long)gridDim.y * blockDim.y * width;
    for (long long e = row * width + column; e < count; e += step) {
        Some seen = x[e];
        if (residual) more = residual[e];
        for (int i = 0; i < how_many<Some>; ++i) {
            real y = part(slope, i) * part(seen, i) + part(offset, i) + part(more, i);
            part(seen, i) = rectified && y < 0 ? 0 : y;         // so that NaN stays
        }
        out[e] = seen;
    }
}

extern "C" __global__ void affine(const stored* x, const real* scale, const real* shift, const stored* residual, stored* out,
                                  long long count, int channels, int width, int rectified)
{
    affine_of(x, scale, shift, residual, out, count, channels, width, rectified);
}

extern "C" __global__ void affine_by_fours(const StoredFour* x, const Four* scale, const Four* shift, const StoredFour* residual,
                                           StoredFour* out, long long count, int channels, int width, int rectified)
{
    affine_of(x, scale, shift, residual, out, count / 4, channels / 4, width / 4, rectified);
}

// dx = dy where y > 0, else 0
template <class Some>
__device__ void relu_grad_of(const Some* dy, const Some* y, Some* dx, long long count)
{
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x; e < count; e += step) {
        Some given = dy[e], result = y[e];
        for (int i = 0; i < how_many<Some>; ++i)
            if (!(part(result, i) > 0)) part(given, i) = 0;
        dx[e] = given;
    }
}

extern "C" __global__ void relu_grad(const stored* dy, const stored* y, stored* dx, long long count)
{
    relu_grad_of(dy, y, dx, count);
}

extern "C" __global__ void relu_grad_by_fours(const StoredFour* dy, const StoredFour* y, StoredFour* dx, long long count)
{
    relu_grad_of(dy, y, dx, count / 4);
}

// What is computed in, as it is stored, and back.
template <class To, class From>
__device__ void copy_of(const From* x, To* out, long long count)
{
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x; e < count; e += step) {
        From seen = x[e];
        To made = {};
        for (int i = 0; i < how_many<From>; ++i) part(made, i) = part(seen, i);
        out[e] = made;
    }
}

extern "C" __global__ void narrow(const real* x, stored* out, long long count) { copy_of(x, out, count); }

extern "C" __global__ void narrow_by_fours(const Four* x, StoredFour* out, long long count) { copy_of(x, out, count / 4); }

extern "C" __global__ void widen(const stored* x, real* out, long long count) { copy_of(x, out, count); }

extern "C" __global__ void widen_by_fours(const StoredFour* x, Four* out, long long count) { copy_of(x, out, count / 4); }
