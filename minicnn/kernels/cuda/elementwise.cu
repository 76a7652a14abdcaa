// Passes over arrays of one shape, element by element; those of channels-last rows know the channel by the place.
#include "common.cuh"

// out = max(scale[channel] x + shift[channel] + residual, 0): batch norm, a bias, a residual addition and a ReLU, those that are there.
// A null pointer leaves its part away; out may be x.
extern "C" __global__ void affine(const real* x, const real* scale, const real* shift, const real* residual, real* out,
                                  long long count, int channels, int rectified)
{
    EACH(e, count) {
        int channel = e % channels;
        real y = x[e];
        if (scale) y *= scale[channel];
        if (shift) y += shift[channel];
        if (residual) y += residual[e];
        out[e] = rectified && y < 0 ? 0 : y;            // so that NaN stays
    }
}

// dx = dy where y > 0, else 0
extern "C" __global__ void relu_grad(const real* dy, const real* y, real* dx, long long count)
{
    EACH(e, count) dx[e] = y[e] > 0 ? dy[e] : 0;
}
