// What CuPy's own kernels need beside ../cushim.h to be compiled by g++: functions of the device, and the headers that they begin with.
#pragma once
#include "cushim.h"

#include <cassert>
#include <cfloat>

#define __forceinline__ inline
#define __host__
#define __constant__ static

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;
template <class A, class B> auto max(A a, B b) -> decltype(a + b) { return a > b ? a : b; }
template <class A, class B> auto min(A a, B b) -> decltype(a + b) { return a < b ? a : b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
#define __popc(x) __builtin_popcount(x)         // macros: templates of CuPy's name them before any declaration is seen
#define __popcll(x) __builtin_popcountll(x)
#define __syncwarp shim::meet                   // all of a block's threads are one warp here

template <class To, class From> To same_bits(From from)
{
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline double __longlong_as_double(long long bits) { return same_bits<double>(bits); }
inline long long __double_as_longlong(double x) { return same_bits<long long>(x); }

// float16.cuh makes a class `half` of these where there is no cuda_fp16.h.
struct half;
inline unsigned short __float2half_rn(float x) { return narrowed(x); }
inline float __half2float(unsigned short bits) { return widened(bits); }
inline unsigned short __half_as_ushort(const half& x) { return *(const unsigned short*)&x; }
inline float __ushort_as_half(unsigned short bits) { return widened(bits); }

#include <cupy/complex.cuh>
#include <cupy/carray.cuh>
#include <cupy/atomics.cuh>
#include <cupy/math_constants.h>
