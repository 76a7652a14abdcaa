// The optimisers' rules, for many parameters in one launch: a ResNet has over a hundred, most of them small, and to start a kernel
// takes longer than to move one of these.
//
// A block takes CHUNK numbers of one parameter: which one, and which of them, stands in the lists `owner` and `part`. The
// addresses of the arrays are in lists, too.
#include "common.cuh"

#define CHUNK 4096

// g <- g + decay p,   v <- momentum v + g,   p <- p - lr v   (nesterov: p - lr (g + momentum v));   v is null without momentum
extern "C" __global__ void sgd(real* const* params, const real* const* grads, real* const* velocities, const long long* sizes,
                               const int* owner, const int* part, real lr, real momentum, real decay, int nesterov)
{
    int k = owner[blockIdx.x];
    long long first = (long long)part[blockIdx.x] * CHUNK, behind = min(first + CHUNK, sizes[k]);
    for (long long i = first + threadIdx.x; i < behind; i += blockDim.x) {
        real p = params[k][i], g = grads[k][i] + decay * p;
        if (velocities) {
            real v = momentum * velocities[k][i] + g;
            velocities[k][i] = v;
            g = nesterov ? g + momentum * v : v;
        }
        params[k][i] = p - lr * g;
    }
}

// p <- p - lr decay p,   m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   p <- p - rate m / (sqrt(v) root + eps)
// with rate = lr / (1 - b1^t) and root = 1 / sqrt(1 - b2^t).
extern "C" __global__ void adamw(real* const* params, const real* const* grads, real* const* m, real* const* v, const long long* sizes,
                                 const int* owner, const int* part, real kept, real b1, real b2, real rate, real root, real eps)
{
    int k = owner[blockIdx.x];
    long long first = (long long)part[blockIdx.x] * CHUNK, behind = min(first + CHUNK, sizes[k]);
    for (long long i = first + threadIdx.x; i < behind; i += blockDim.x) {
        real g = grads[k][i], mean = m[k][i] + (g - m[k][i]) * (1 - b1), square = b2 * v[k][i] + (1 - b2) * g * g;
        m[k][i] = mean;
        v[k][i] = square;
        params[k][i] = kept * params[k][i] - rate * mean / (sqrt(square) * root + eps);
    }
}
