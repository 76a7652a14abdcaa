// The optimisers' rules, for many parameters in one launch: a ResNet has over a hundred, most of them small, and to start a kernel
// takes longer than to move one of these.
//
// A block takes CHUNK numbers of one parameter: which one, and which of them, stands in the lists `owner` and `part`. The
// addresses of the arrays are in lists, too.
#include "common.cuh"

#define CHUNK 4096
#define THREADS 256

// What is remembered of a loss that is scaled: the scale, its inverse in the step that runs, whether the step's gradients are all
// finite, whether all have been since the scale was last looked at, and for how many steps it has stayed.
enum { SCALE, INVERSE, FINITE, ALL_FINITE, STAYED };

// The number by which a gradient is multiplied, and whether there is a step at all; scaling is null where the loss is not scaled.
__device__ real unscaling(const real* scaling) { return scaling ? scaling[INVERSE] : 1; }
__device__ bool left_out(const real* scaling) { return scaling && scaling[FINITE] == 0; }

// g <- g + decay p,   v <- momentum v + g,   p <- p - lr v   (nesterov: p - lr (g + momentum v));   v is null without momentum
extern "C" __global__ void sgd(real* const* params, const real* const* grads, real* const* velocities, const long long* sizes,
                               const int* owner, const int* part, const real* scaling, real lr, real momentum, real decay,
                               int nesterov)
{
    if (left_out(scaling)) return;
    real inverse = unscaling(scaling);
    int k = owner[blockIdx.x];
    long long first = (long long)part[blockIdx.x] * CHUNK, behind = min(first + CHUNK, sizes[k]);
    real* param = params[k];
    const real* grad = grads[k];
    real* velocity = velocities ? velocities[k] : 0;
    for (long long i = first + threadIdx.x; i < behind; i += blockDim.x) {
        real p = param[i], g = inverse * grad[i] + decay * p;
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
                                 const int* owner, const int* part, const real* scaling, real kept, real b1, real b2, real rate,
                                 real root, real eps)
{
    if (left_out(scaling)) return;
    real inverse = unscaling(scaling);
    int k = owner[blockIdx.x];
    long long first = (long long)part[blockIdx.x] * CHUNK, behind = min(first + CHUNK, sizes[k]);
    real *param = params[k], *means = m[k], *squares = v[k];
    const real* grad = grads[k];
    for (long long i = first + threadIdx.x; i < behind; i += blockDim.x) {
        real g = inverse * grad[i], mean = means[i] + (g - means[i]) * (1 - b1), square = b2 * squares[i] + (1 - b2) * g * g;
        means[i] = mean;
        squares[i] = square;
        param[i] = kept * param[i] - rate * mean / (sqrt(square) * root + eps);
    }
}

// Whether any of the block's threads says yes, in each of them.
__device__ bool anybody(bool mine)
{
    __shared__ bool said[THREADS];
    said[threadIdx.x] = mine;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) said[threadIdx.x] = said[threadIdx.x] || said[threadIdx.x + half];
        __syncthreads();
    }
    return said[0];
}

// overflowed[block] = whether a number of the block's chunk is infinite or none
extern "C" __global__ void overflows(const real* const* grads, const long long* sizes, const int* owner, const int* part,
                                     int* overflowed)
{
    int k = owner[blockIdx.x];
    long long first = (long long)part[blockIdx.x] * CHUNK, behind = min(first + CHUNK, sizes[k]);
    const real* grad = grads[k];
    bool any = false;
    for (long long i = first + threadIdx.x; i < behind; i += THREADS) any = any || !(grad[i] - grad[i] == 0);
    any = anybody(any);
    if (threadIdx.x == 0) overflowed[blockIdx.x] = any;
}

// What the step that follows has to know, by one block.
extern "C" __global__ void settle(const int* overflowed, real* scaling, int count)
{
    bool any = false;
    for (int i = threadIdx.x; i < count; i += THREADS) any = any || overflowed[i];
    any = anybody(any);
    if (threadIdx.x == 0) {
        scaling[INVERSE] = 1 / scaling[SCALE];
        scaling[FINITE] = !any;
        if (any) scaling[ALL_FINITE] = 0;
    }
}

// Down where a gradient overflowed, up where none has for `interval` steps, as long as the inverse is not 0. One thread.
extern "C" __global__ void adapt(real* scaling, real growth, real backoff, int interval)
{
    if (scaling[ALL_FINITE] == 0) {
        scaling[SCALE] *= backoff;
        scaling[STAYED] = 0;
    } else if (++scaling[STAYED] >= interval) {
        real more = scaling[SCALE] * growth;
        if (1 / more > 0) scaling[SCALE] = more;
        scaling[STAYED] = 0;
    }
    scaling[ALL_FINITE] = 1;
}
