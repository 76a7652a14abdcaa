// What every kernel here starts from.
//
// REAL is float or double: each file is compiled once for either, so that float64 gradients are checked through the very lines that
// float32 runs. Images lie channels-last: pixel (n, y, x) of an (N, H, W, C) image begins at ((n H + y) W + x) C.
// No atomics and no sum whose order depends on the threads: the same input gives the same bits.
typedef REAL real;

// Four numbers that are read and written at once, 16 bytes of float32: memory is used best so.
struct __align__(16) Four { real a[4]; };

// For each i of [0, count), shared out over all threads of the launch, neighbours to neighbours. An int, since kernels divide it to
// find their place, and to divide 64 bits takes a GPU several times as long: count is at most 2^30, and more work comes in parts.
#define EACH(i, count) for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += gridDim.x * blockDim.x)
