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
    real* param = params[k];
    const real* grad = grads[k];
    real* velocity = velocities ? velocities[k] : 0;
    for (long long i = first + threadIdx.x; i < behind; i += blockDim.x) {
        real p = param[i], g = grad[i] + decay * p;
        if (velocity) {
            real v = momentum * velocity[i] + g;
            velocity[i] = v;
            g = nesterov ? g + momentum * v : v;
        }
        param[i] = p - lr * g;
    }
}

// p <- p - lr decay p,   m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   p <- p - rate m / (sqrt(v) root + eps)
// with rate = lr / (1 - b1^t) and root = 1 / sqrt(1 - b2^t).
extern "C" __global__ void adamw(real* const* params, const real* const* grads, real* const* m, real* const* v, const long long* sizes,
                                 const int* owner, const int* part, real kept, real b1, real b2, real rate, real root, real eps)
{
    int k = owner[blockIdx.x];
    long long first = (long long)part[blockIdx.x] * CHUNK, behind = min(first + CHUNK, sizes[k]);
    real *param = params[k], *means = m[k], *squares = v[k];
    const real* grad = grads[k];
    for (long long i = first + threadIdx.x; i < behind; i += blockDim.x) {
        real g = grad[i], mean = means[i] + (g - means[i]) * (1 - b1), square = b2 * squares[i] + (1 - b2) * g * g;
        means[i] = mean;
        squares[i] = square;
        param[i] = kept * param[i] - rate * mean / (sqrt(square) * root + eps);
    }
}
