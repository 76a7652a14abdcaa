// Passes over arrays of one shape, element by element; those of channels-last rows know the channel by the place.
#include "common.cuh"

// out = max(scale[channel] x + shift[channel] + residual, 0): batch norm, a bias, a residual addition and a ReLU, those that are there.
// A null pointer leaves its part away; out may be x.
//
// A thread stays in its column and goes from row to row, so that it looks up the channel's numbers once. Rows of few channels are
// taken several as one, `width` numbers long, so that neighbouring threads have work.
extern "C" __global__ void affine(const real* x, const real* scale, const real* shift, const real* residual, real* out,
                                  long long count, int channels, int width, int rectified)
{
    int column = blockIdx.x * blockDim.x + threadIdx.x, channel = column % channels;
    if (column >= width) return;
    real slope = scale ? scale[channel] : 1, offset = shift ? shift[channel] : 0;
    long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y, step = (long long)gridDim.y * blockDim.y * width;
    for (long long e = row * width + column; e < count; e += step) {
        real y = slope * x[e] + offset;
        if (residual) y += residual[e];
        out[e] = rectified && y < 0 ? 0 : y;            // so that NaN stays
    }
}

// dx = dy where y > 0, else 0
extern "C" __global__ void relu_grad(const real* dy, const real* y, real* dx, long long count)
{
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x; e < count; e += step) dx[e] = y[e] > 0 ? dy[e] : 0;
}
