// What every kernel here starts from.
//
// REAL is float or double: each file is compiled once for either, so that float64 gradients are checked through the very lines that
// float32 runs. Images lie channels-last: pixel (n, y, x) of an (N, H, W, C) image begins at ((n H + y) W + x) C.
// No atomics and no sum whose order depends on the threads: the same input gives the same bits.
typedef REAL real;

// Four numbers that are read and written at once, 16 bytes of float32: memory is used best so.
struct __align__(16) Four { real a[4]; };

// for each i of [0, count), shared out over all threads of the launch, neighbours to neighbours
#define EACH(i, count) \
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += (long long)gridDim.x * blockDim.x)
