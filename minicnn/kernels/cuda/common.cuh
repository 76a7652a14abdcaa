// What every kernel here starts from.
//
// REAL is what is computed in, float or double: each file is compiled once for either, so that float64 gradients are checked through
// the very lines that float32 runs. STORED is what images lie in memory as: the same, or 2 bytes a number, bf16 or fp16. A number is
// widened as it is read and rounded as it is written, and all between is REAL; so are a channel's numbers and the weights.
// Images lie channels-last: pixel (n, y, x) of an (N, H, W, C) image begins at ((n H + y) W + x) C.
// No atomics and no sum whose order depends on the threads: the same input gives the same bits.

// The upper half of a float: its range, and 8 of its 24 bits.
struct bf16 {
    unsigned short bits;
    bf16() = default;
    __device__ bf16(float x)                            // to the nearest, of two to the even one
    {
        unsigned whole = __float_as_uint(x);
        bits = x != x ? whole >> 16 | 64 : (whole + 0x7fff + (whole >> 16 & 1)) >> 16;      // 64: a NaN stays one
    }
    __device__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
};

// 11 bits, from 6e-8 to 65504. The GPU has an instruction either way, and no header is needed to ask for it.
#ifdef __CUDACC__
__device__ inline float widened(unsigned short bits)
{
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
__device__ inline unsigned short narrowed(float x)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif
struct fp16 {
    unsigned short bits;
    fp16() = default;
    __device__ fp16(float x) : bits(narrowed(x)) {}
    __device__ operator float() const { return widened(bits); }
};

typedef REAL real;
typedef STORED stored;

// Four numbers that are read and written at once, 16 bytes of float32: memory is used best so.
template <class Number> struct alignas(sizeof(Number) < 4 ? 8 : 16) FourOf { Number a[4]; };
typedef FourOf<real> Four;
typedef FourOf<stored> StoredFour;

// One number or four, for kernels that are written once for either: how many, and the i-th.
template <class Some> constexpr int how_many = 1;
template <class Number> constexpr int how_many<FourOf<Number>> = 4;
template <class Number> __device__ Number& part(Number& one, int) { return one; }
template <class Number> __device__ Number& part(FourOf<Number>& four, int i) { return four.a[i]; }

// One number or four, rounded from what was computed.
template <class Some> __device__ Some from_real(const real* numbers)
{
    Some made = {};
    for (int i = 0; i < how_many<Some>; ++i) part(made, i) = numbers[i];
    return made;
}

// For each i of [0, count), shared out over all threads of the launch, neighbours to neighbours. An int, since kernels divide it to
// find their place, and to divide 64 bits takes a GPU several times as long: count is at most 2^30, and more work comes in parts.
#define EACH(i, count) for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += gridDim.x * blockDim.x)
