// Softmax cross-entropy of logits (images, classes), forward and backward.
//
//     loss_n = log sum_j e^(z_nj) - sum_j t_nj z_nj,      t = (1 - smoothing) [j = label] + smoothing / classes
//
// One block an image; a thread takes every THREADS-th class.
#include "common.cuh"

#define THREADS 128

__device__ real larger(real a, real b) { return a > b || a != a ? a : b; }
__device__ real plus(real a, real b) { return a + b; }

// The numbers of all threads of the block as one, in each of them, by a tree.
template <class Operation>
__device__ real combined(real mine, Operation of)
{
    __shared__ real numbers[THREADS];
    numbers[threadIdx.x] = mine;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) numbers[threadIdx.x] = of(numbers[threadIdx.x], numbers[threadIdx.x + half]);
        __syncthreads();
    }
    real all = numbers[0];
    __syncthreads();                                    // before anybody writes there again
    return all;
}

// The largest logit and the sum of e^(z - largest).
__device__ real largest_logit(const real* z, int classes)
{
    real most = -1 / real(0);
    for (int j = threadIdx.x; j < classes; j += THREADS) most = larger(z[j], most);
    return combined(most, larger);
}

__device__ real sum_of_powers(const real* z, int classes, real most)
{
    real sum = 0;
    for (int j = threadIdx.x; j < classes; j += THREADS) sum += exp(z[j] - most);
    return combined(sum, plus);
}

// losses[n] / images, to be added up by `total`.
extern "C" __global__ void losses(const real* logits, const long long* labels, real* losses, int images, int classes, real smoothing)
{
    for (int n = blockIdx.x; n < images; n += gridDim.x) {
        const real* z = logits + (long long)n * classes;
        real most = largest_logit(z, classes), sum = sum_of_powers(z, classes, most), spread = 0;
        for (int j = threadIdx.x; j < classes; j += THREADS) spread += z[j] - most;
        spread = combined(spread, plus);
        if (threadIdx.x == 0)
            losses[n] = (log(sum) - (1 - smoothing) * (z[labels[n]] - most) - smoothing / classes * spread) / images;
    }
}

// *sum = all the numbers, by one block.
extern "C" __global__ void total(const real* numbers, real* sum, int count)
{
    real mine = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) mine += numbers[i];
    mine = combined(mine, plus);
    if (threadIdx.x == 0) *sum = mine;
}

// dz = dy (softmax(z) - t) / images
extern "C" __global__ void losses_grad(const real* dy, const real* logits, const long long* labels, real* dlogits, int images,
                                       int classes, real smoothing)
{
    for (int n = blockIdx.x; n < images; n += gridDim.x) {
        const real* z = logits + (long long)n * classes;
        real most = largest_logit(z, classes), sum = sum_of_powers(z, classes, most);
        for (int j = threadIdx.x; j < classes; j += THREADS) {
            real target = (j == labels[n] ? 1 - smoothing : 0) + smoothing / classes;
            dlogits[(long long)n * classes + j] = *dy * (exp(z[j] - most) / sum - target) / images;
        }
    }
}
