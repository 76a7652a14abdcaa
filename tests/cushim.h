// CUDA on a CPU, as far as the kernels of minicnn/kernels/cuda need it: a launch runs every thread of every block.
//
// A kernel without __syncthreads runs thread after thread. With it, the threads of a block take turns: each is a coroutine that
// runs up to the next __syncthreads, and goes on when all of them have come so far. With -DSHIM_THREADS they are threads of the
// operating system, so that the thread sanitizer sees what two of them do to shared memory between two barriers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>
#ifdef SHIM_THREADS
#include <barrier>
#include <thread>
#else
#include <ucontext.h>
#endif

struct Place { unsigned x = 0, y = 0, z = 0; };

#define __global__
#define __device__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static                       // one block at a time

using std::max;                                 // as CUDA has them
using std::min;
inline long long min(int a, long long b) { return std::min<long long>(a, b); }
inline long long min(long long a, int b) { return std::min<long long>(a, b); }

inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline float widened(unsigned short bits) { _Float16 x; std::memcpy(&x, &bits, 2); return x; }     // of common.cuh, there in PTX
inline unsigned short narrowed(float x) { _Float16 half = x; unsigned short bits; std::memcpy(&bits, &half, 2); return bits; }

namespace shim {

inline Place block_dim, grid_dim;
inline thread_local Place thread_idx, block_idx;
inline bool meets = false;                      // whether the threads of a block can wait for each other in this launch

inline void must_meet()
{
    if (!meets) {
        std::fputs("a kernel reached __syncthreads, and was started as one that has none\n", stderr);
        std::abort();
    }
}

#ifdef SHIM_THREADS
inline std::barrier<>* meeting;
inline void meet() { must_meet(); meeting->arrive_and_wait(); }

template <class Body> void together(const Body& body, int count)
{
    std::barrier<> all(count);
    meeting = &all;
    std::vector<std::thread> threads;
    Place block = block_idx;
    for (int i = 0; i < count; ++i)
        threads.emplace_back([&, i] {
            block_idx = block;
            thread_idx = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
            body();
            all.arrive_and_drop();              // one that has returned is not waited for
        });
    for (auto& thread : threads) thread.join();
}
#else
inline ucontext_t scheduler;
inline std::vector<ucontext_t> coroutines;
inline std::vector<char> stacks;
inline std::vector<bool> done;
inline int current;
inline const void* running;
inline void (*run_body)(const void*);
constexpr size_t STACK = 1 << 15;

inline void meet() { must_meet(); swapcontext(&coroutines[current], &scheduler); }
inline void begin() { run_body(running); done[current] = true; }

template <class Body> void together(const Body& body, int count)
{
    running = &body;
    run_body = [](const void* what) { (*static_cast<const Body*>(what))(); };
    coroutines.assign(count, {});
    done.assign(count, false);
    stacks.resize(count * STACK);
    for (int i = 0; i < count; ++i) {
        getcontext(&coroutines[i]);
        coroutines[i].uc_stack.ss_sp = &stacks[i * STACK];
        coroutines[i].uc_stack.ss_size = STACK;
        coroutines[i].uc_link = &scheduler;
        makecontext(&coroutines[i], begin, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (current = 0; current < count; ++current) {
            if (done[current]) continue;
            unsigned i = current;
            thread_idx = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
            swapcontext(&scheduler, &coroutines[current]);
            any = any || !done[current];
        }
    }
}
#endif

template <class Body> void apart(const Body& body)
{
    for (unsigned z = 0; z < block_dim.z; ++z)
        for (unsigned y = 0; y < block_dim.y; ++y)
            for (unsigned x = 0; x < block_dim.x; ++x) {
                thread_idx = {x, y, z};
                body();
            }
}

// Every argument lies where `arguments` points, in the size that the kernel declares, just as a driver reads them.
template <class... P, size_t... I>
void run(void (*kernel)(P...), const unsigned* grid, const unsigned* block, void** arguments, bool waits, std::index_sequence<I...>)
{
    grid_dim = {grid[0], grid[1], grid[2]};
    block_dim = {block[0], block[1], block[2]};
    meets = waits;
    auto body = [&] { kernel(*static_cast<P*>(arguments[I])...); };
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                block_idx = {x, y, z};
                if (meets) together(body, block[0] * block[1] * block[2]);
                else apart(body);
            }
}

template <class... P> void launch(void (*kernel)(P...), const unsigned* grid, const unsigned* block, void** arguments, bool waits)
{
    run(kernel, grid, block, arguments, waits, std::index_sequence_for<P...>{});
}

// The size of each parameter, in bytes; how many there are.
template <class... P> int sizes(void (*)(P...), int* out)
{
    int i = 0;
    ((out[i++] = sizeof(P)), ...);
    return i;
}

// Where each parameter that is a pointer must point: at a multiple of so many bytes, or a GPU stops; 1 for what is no pointer.
template <class P> constexpr int alignment = 1;
template <class T> constexpr int alignment<T*> = alignof(T);
template <class... P> void alignments(void (*)(P...), int* out)
{
    int i = 0;
    ((out[i++] = alignment<P>), ...);
}

}  // namespace shim

#define threadIdx shim::thread_idx
#define blockIdx shim::block_idx
#define blockDim shim::block_dim
#define gridDim shim::grid_dim
#define __syncthreads shim::meet

#define SHIM_ENTRY(kernel) \
    extern "C" void launch_##kernel(const unsigned* grid, const unsigned* block, void** arguments, bool waits) \
    { shim::launch(kernel, grid, block, arguments, waits); } \
    extern "C" int sizes_##kernel(int* out) { return shim::sizes(kernel, out); } \
    extern "C" void alignments_##kernel(int* out) { shim::alignments(kernel, out); }
