// Batch normalisation of rows (m, channels): each channel's sums, forward and backward, and what follows from them.
//
// A sum over a channel is taken in two stages. First, `sums` and `grad_sums` cut the rows into chunks: a block of TX x TY
// threads adds up TX channels of one chunk, each thread every TY-th row, then the TY partial sums in a tree:
//
//     partial[chunk, 0 and 1, channel]
//
// Second, `moments` and `coefficients` add the chunks up, in double and as many threads to a channel, and do its arithmetic.
// Source: Ioffe, Szegedy, "Batch Normalization", 2015.
#include "common.cuh"

#define TX 32
#define TY 8

// The sum over the TY threads of each column, in every thread of it.
template <class Number>     // real or double
__device__ Number column_sum(Number mine)
{
    __shared__ Number sums[TY][TX];
    sums[threadIdx.y][threadIdx.x] = mine;
    __syncthreads();
    for (int half = TY / 2; half > 0; half /= 2) {
        if (threadIdx.y < half) sums[threadIdx.y][threadIdx.x] += sums[threadIdx.y + half][threadIdx.x];
        __syncthreads();
    }
    Number sum = sums[0][threadIdx.x];
    __syncthreads();                                    // before anybody writes there again
    return sum;
}

// partial = sum (x - x0) and sum (x - x0)^2 with x0 = the channel's first number: where the mean is large beside the deviation, the
// square of the mean would swallow the variance.
extern "C" __global__ void sums(const stored* x, real* partial, int m, int channels, int rows)
{
    int channel = blockIdx.x * TX + threadIdx.x, first = blockIdx.y * rows;
    real sum = 0, squares = 0;
    if (channel < channels) {
        real x0 = x[channel];
        for (int row = first + threadIdx.y; row < min(first + rows, m); row += TY) {
            real off = x[(long long)row * channels + channel] - x0;
            sum += off;
            squares += off * off;
        }
    }
    sum = column_sum(sum);
    squares = column_sum(squares);
    if (channel < channels && threadIdx.y == 0) {
        partial[(2LL * blockIdx.y) * channels + channel] = sum;
        partial[(2LL * blockIdx.y + 1) * channels + channel] = squares;
    }
}

// The sum over the chunks of one of the numbers that they have of a channel, in every thread of its column.
__device__ double over_chunks(const real* partial, int chunks, int step, int channel, int channels)
{
    double sum = 0;
    if (channel < channels)
        for (int chunk = threadIdx.y; chunk < chunks; chunk += TY) sum += partial[(long long)chunk * step + channel];
    return column_sum(sum);
}

// mean, biased variance, and scale = weight / sqrt(var + eps), shift = bias - scale mean.
extern "C" __global__ void moments(const real* partial, const stored* x, const real* weight, const real* bias, real* mean, real* var,
                                   real* scale, real* shift, int m, int channels, int chunks, real eps)
{
    int channel = blockIdx.x * TX + threadIdx.x;
    double sum = over_chunks(partial, chunks, 2 * channels, channel, channels);
    double squares = over_chunks(partial + channels, chunks, 2 * channels, channel, channels);
    if (channel < channels && threadIdx.y == 0) {
        double off = sum / m, variance = max(squares / m - off * off, 0.0), slope = weight[channel] / sqrt(variance + eps);
        mean[channel] = x[channel] + off;
        var[channel] = variance;
        scale[channel] = slope;
        shift[channel] = bias[channel] - slope * (x[channel] + off);
    }
}

// partial = sum dz and sum dz (x - mean), with dz = dy where y > 0 (all of dy where y is null).
extern "C" __global__ void grad_sums(const stored* dy, const stored* x, const stored* y, const real* mean, real* partial, int m,
                                     int channels, int rows)
{
    int channel = blockIdx.x * TX + threadIdx.x, first = blockIdx.y * rows;
    real sum = 0, along = 0;
    if (channel < channels)
        for (int row = first + threadIdx.y; row < min(first + rows, m); row += TY) {
            long long e = (long long)row * channels + channel;
            real given = dy[e], dz = !y || y[e] > 0 ? given : 0;        // read in any case, so as not to wait for y first
            sum += dz;
            along += dz * (x[e] - mean[channel]);
        }
    sum = column_sum(sum);
    along = column_sum(along);
    if (channel < channels && threadIdx.y == 0) {
        partial[(2LL * blockIdx.y) * channels + channel] = sum;
        partial[(2LL * blockIdx.y + 1) * channels + channel] = along;
    }
}

// partial[chunk, channel] = the sum of a chunk, and `add_chunks`, which adds these up: a bias's gradient.
extern "C" __global__ void channel_sums(const stored* x, real* partial, int m, int channels, int rows)
{
    int channel = blockIdx.x * TX + threadIdx.x, first = blockIdx.y * rows;
    real sum = 0;
    if (channel < channels)
        for (int row = first + threadIdx.y; row < min(first + rows, m); row += TY) sum += x[(long long)row * channels + channel];
    sum = column_sum(sum);
    if (channel < channels && threadIdx.y == 0) partial[(long long)blockIdx.y * channels + channel] = sum;
}

extern "C" __global__ void add_chunks(const real* partial, real* total, int channels, int chunks)
{
    int channel = blockIdx.x * TX + threadIdx.x;
    double sum = over_chunks(partial, chunks, channels, channel, channels);
    if (channel < channels && threadIdx.y == 0) total[channel] = sum;
}

// dbias = sum dz,   dweight = sum dz x_hat,   and dx = scale dz + slope x + rest, which is
// weight / std (dz - dbias / m - x_hat dweight / m) with x_hat = (x - mean) / std.
extern "C" __global__ void coefficients(const real* partial, const real* weight, const real* mean, const real* var, real* dweight,
                                        real* dbias, real* scale, real* slope, real* rest, int m, int channels, int chunks, real eps)
{
    int channel = blockIdx.x * TX + threadIdx.x;
    double sum = over_chunks(partial, chunks, 2 * channels, channel, channels);
    double along = over_chunks(partial + channels, chunks, 2 * channels, channel, channels);
    if (channel < channels && threadIdx.y == 0) {
        double inv_std = 1 / sqrt(var[channel] + (double)eps), factor = weight[channel] * inv_std;
        double tilt = -factor * inv_std * inv_std * along / m;
        dbias[channel] = sum;
        dweight[channel] = along * inv_std;
        scale[channel] = factor;
        slope[channel] = tilt;
        rest[channel] = -factor * sum / m - tilt * mean[channel];
    }
}

// dx = scale dz + slope x + rest, column by column as `affine` in elementwise.cu
template <class Some, class Each>
__device__ void normalize_grad_of(const Some* dy, const Some* x, const Some* y, const Each* scale, const Each* slope,
                                  const Each* rest, Some* dx, long long count, int channels, int width)
{
    int column = blockIdx.x * blockDim.x + threadIdx.x, channel = column % channels;
    if (column >= width) return;
    Each factor = scale[channel], tilt = slope[channel], offset = rest[channel];
    Some result = {};
    long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y, step = (long long)gridDim.y * blockDim.y * width;
    for (long long e = row * width + column; e < count; e += step) {
        Some given = dy[e], seen = x[e];
        if (y) result = y[e];
        for (int i = 0; i < how_many<Some>; ++i) {
            real dz = !y || part(result, i) > 0 ? real(part(given, i)) : 0;
            part(given, i) = part(factor, i) * dz + part(tilt, i) * part(seen, i) + part(offset, i);
        }
        dx[e] = given;
    }
}

extern "C" __global__ void normalize_grad(const stored* dy, const stored* x, const stored* y, const real* scale, const real* slope,
                                          const real* rest, stored* dx, long long count, int channels, int width)
{
    normalize_grad_of(dy, x, y, scale, slope, rest, dx, count, channels, width);
}

extern "C" __global__ void normalize_grad_by_fours(const StoredFour* dy, const StoredFour* x, const StoredFour* y, const Four* scale,
                                                   const Four* slope, const Four* rest, StoredFour* dx, long long count, int channels, int width)
{
    normalize_grad_of(dy, x, y, scale, slope, rest, dx, count / 4, channels / 4, width / 4);
}

// scale x + shift is what batch norm is with constant statistics: scale = weight / sqrt(var + eps), shift = bias - scale mean.
extern "C" __global__ void scale_and_shift(const real* weight, const real* bias, const real* mean, const real* var, real* scale,
                                           real* shift, int channels, real eps)
{
    EACH(channel, channels) {
        real slope = weight[channel] / sqrt(var[channel] + eps);
        scale[channel] = slope;
        shift[channel] = bias[channel] - slope * mean[channel];
    }
}

// running += momentum (batch - running), of the mean and of the unbiased variance, which is var m / (m - 1).
extern "C" __global__ void follow(real* running_mean, real* running_var, const real* mean, const real* var, int channels,
                                  real momentum, real unbiased)
{
    EACH(channel, channels) {
        running_mean[channel] += momentum * (mean[channel] - running_mean[channel]);
        running_var[channel] += momentum * (var[channel] * unbiased - running_var[channel]);
    }
}
