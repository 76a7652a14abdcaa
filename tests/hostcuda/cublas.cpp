// A libcublas of the functions that are called here: products by columns, as NVIDIA documents them, on the host's memory.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

enum { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };     // cublasStatus_t
enum { R_32F = 0, R_64F = 1, R_16F = 2, R_16BF = 14, AS_TF32 = -1 };      // cudaDataType_t, and R_32F to be rounded to 10 bits
enum { COMPUTE_32F = 68, COMPUTE_64F = 70, COMPUTE_32F_FAST_TF32 = 77 };                                     // cublasComputeType_t
static void* const HANDLE = (void*)4711;
static intptr_t stream = 0;                     // what is asked for next goes there

static double read(const void* from, int type, long long i)
{
    if (type == R_32F) return ((const float*)from)[i];
    if (type == R_64F) return ((const double*)from)[i];
    if (type == R_16F) {
        _Float16 x;
        std::memcpy(&x, (const uint16_t*)from + i, 2);
        return x;
    }
    if (type == AS_TF32) {
        uint32_t bits = (((const uint32_t*)from)[i] + 0x1000) & 0xffffe000;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    uint32_t bits = (uint32_t)((const uint16_t*)from)[i] << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static void write(void* to, int type, long long i, double value)
{
    if (type == R_64F) ((double*)to)[i] = value;
    else if (type == R_32F) ((float*)to)[i] = value;
    else if (type == R_16F) {
        _Float16 x = (float)value;
        std::memcpy((uint16_t*)to + i, &x, 2);
    } else {
        float x = value;
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        ((uint16_t*)to)[i] = x != x ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

struct Matrix { const void* at; int type, leading; };
struct Product { bool transposed_a, transposed_b; int m, n, k; double alpha, beta; Matrix a, b, c; };

static std::vector<double> dense(const Matrix& from, bool transposed, int rows, int columns)      // row by row
{
    std::vector<double> numbers((size_t)rows * columns);
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j)
            numbers[(size_t)i * columns + j] = read(from.at, from.type, transposed ? j + (long long)i * from.leading
                                                                                   : i + (long long)j * from.leading);
    return numbers;
}
static void multiply(void* what)                // C = alpha op(A) op(B) + beta C
{
    const Product& p = *(Product*)what;
    std::vector<double> a = dense(p.a, p.transposed_a, p.m, p.k), b = dense(p.b, p.transposed_b, p.k, p.n), row(p.n);
    for (int i = 0; i < p.m; ++i) {
        row.assign(p.n, 0);
        for (int l = 0; l < p.k; ++l)
            for (int j = 0; j < p.n; ++j) row[j] += a[(size_t)i * p.k + l] * b[(size_t)l * p.n + j];
        for (int j = 0; j < p.n; ++j) {
            long long at = i + (long long)j * p.c.leading;
            double kept = p.beta == 0 ? 0 : p.beta * read(p.c.at, p.c.type, at);                  // else it is not read, NaN or not
            write((void*)p.c.at, p.c.type, at, p.alpha * row[j] + kept);
        }
    }
}
static int ask(void* handle, Product* product)
{
    static auto later_or_now = (void (*)(void (*)(void*), void*))dlsym(RTLD_DEFAULT, "hostcuda_later_or_now");
    static auto captured = (intptr_t (*)())dlsym(RTLD_DEFAULT, "hostcuda_captured");
    const Product& p = *product;
    if (handle != HANDLE) return NOT_INITIALIZED;
    if (p.m < 0 || p.n < 0 || p.k < 0 || p.a.leading < (p.transposed_a ? p.k : p.m) || p.b.leading < (p.transposed_b ? p.n : p.k)
        || p.c.leading < p.m) return INVALID_VALUE;
    if (captured() && captured() != stream) return EXECUTION_FAILED;
    later_or_now(multiply, product);            // kept: a graph may ask for it again
    return SUCCESS;
}
static Matrix nth(Matrix of, long long step, int i)
{
    int bytes = of.type == R_64F ? 8 : of.type == R_32F ? 4 : 2;
    return {(const char*)of.at + i * step * bytes, of.type, of.leading};
}
static double number(const void* at, int compute) { return compute == COMPUTE_64F ? *(const double*)at : *(const float*)at; }

API cublasCreate_v2(void** handle) { *handle = HANDLE; return SUCCESS; }
API cublasDestroy_v2(void*) { return SUCCESS; }
API cublasGetVersion_v2(void*, int* version) { *version = 130000; return SUCCESS; }
API cublasSetStream_v2(void* handle, intptr_t next) { stream = next; return handle == HANDLE ? SUCCESS : NOT_INITIALIZED; }
API cublasGetStream_v2(void*, intptr_t* now) { *now = stream; return SUCCESS; }
API cublasSetMathMode(void*, int) { return SUCCESS; }
API cublasGetMathMode(void*, int* mode) { *mode = 0; return SUCCESS; }
API cublasSetPointerMode_v2(void*, int) { return SUCCESS; }
API cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return SUCCESS; }

API cublasGemmStridedBatchedEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha,
                               const void* a, int a_type, int lda, long long step_a,
                               const void* b, int b_type, int ldb, long long step_b, const void* beta,
                               void* c, int c_type, int ldc, long long step_c, int count, int compute, int)
{
    bool half = a_type == R_16F || a_type == R_16BF;
    bool allowed = compute == COMPUTE_64F ? a_type == R_64F && c_type == R_64F
        : compute == COMPUTE_32F_FAST_TF32 ? a_type == R_32F && c_type == R_32F
        : compute == COMPUTE_32F && (half ? c_type == a_type || c_type == R_32F : a_type == R_32F && c_type == R_32F);
    if (a_type != b_type || !allowed) return NOT_SUPPORTED;
    for (int i = 0; i < count; ++i) {
        Product* product = new Product{ta != 0, tb != 0, m, n, k, number(alpha, compute), number(beta, compute),
                                       nth({a, a_type, lda}, step_a, i), nth({b, b_type, ldb}, step_b, i),
                                       nth({c, c_type, ldc}, step_c, i)};
        if (compute == COMPUTE_32F_FAST_TF32) product->a.type = product->b.type = AS_TF32;
        if (int status = ask(handle, product)) return status;
    }
    return SUCCESS;
}
API cublasGemmEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
                 const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute, int algorithm)
{
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0, beta,
                                      c, c_type, ldc, 0, 1, compute, algorithm);
}

// What CuPy's own `matmul` and `dot` call.
template <class Number>
static int gemm(void* handle, int type, int ta, int tb, int m, int n, int k, const Number* alpha, const Number* a, int lda,
                const Number* b, int ldb, const Number* beta, Number* c, int ldc)
{
    return ask(handle, new Product{ta != 0, tb != 0, m, n, k, *alpha, *beta, {a, type, lda}, {b, type, ldb}, {c, type, ldc}});
}
#define GEMM(LETTER, Number, TYPE) \
    API cublas##LETTER##gemm_v2(void* h, int ta, int tb, int m, int n, int k, const Number* alpha, const Number* a, int lda, \
                                const Number* b, int ldb, const Number* beta, Number* c, int ldc) \
    { return gemm(h, TYPE, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc); } \
    API cublas##LETTER##gemmBatched(void* h, int ta, int tb, int m, int n, int k, const Number* alpha, const Number** a, int lda, \
                                    const Number** b, int ldb, const Number* beta, Number** c, int ldc, int count) \
    { \
        for (int i = 0; i < count; ++i) \
            if (int status = gemm(h, TYPE, ta, tb, m, n, k, alpha, a[i], lda, b[i], ldb, beta, c[i], ldc)) return status; \
        return SUCCESS; \
    }
GEMM(S, float, R_32F)
GEMM(D, double, R_64F)
