// Numbers, vectors of them, memory and threads: what every kernel here uses.
//
// Vectors are the extensions of GCC and Clang, so any CPU is served; AVX-512 has a few instructions of its own.
// Threads are those of OpenMP, whose symbols are torch's own library in a process that has torch: one team, one count.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace rag {

#if defined(__AVX512F__)
constexpr int LANES = 16, NV = 4, MR = 6;
#elif defined(__AVX__)
constexpr int LANES = 8, NV = 2, MR = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, NV = 4, MR = 6;
#else
constexpr int LANES = 4, NV = 2, MR = 4;
#endif
constexpr int PANEL = NV * LANES;  // columns that one call of the inner loop computes
constexpr int STEP = 256;          // keys of a step; a multiple of every PANEL
constexpr int WIDEST = 576;        // dimensions of a head: a latent of 512 and its position part of 64
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float vfu __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t word __attribute__((may_alias));  // one fp32, or a pair of bf16

inline vf load(const void* p) { return *static_cast<const vfu*>(p); }
inline void store(void* p, vf x) { *static_cast<vfu*>(p) = x; }
inline vf all(float x) { return vf{} + x; }
inline int up(int n, int step) { return (n + step - 1) / step * step; }

// -- types of the pool and of the queries -----------------------------------------------------------

inline float from_bits(uint32_t x) { float f; std::memcpy(&f, &x, 4); return f; }
inline uint32_t to_bits(float f) { uint32_t x; std::memcpy(&x, &f, 4); return x; }

struct Float {
    typedef float type;
    static float get(type x) { return x; }
    static type put(float x) { return x; }
};

struct BFloat {
    typedef uint16_t type;
    static float get(type x) { return from_bits(uint32_t(x) << 16); }
    static type put(float f) {
        const uint32_t x = to_bits(f);
        return f != f ? type(0x7fc0) : type((x + 0x7fff + ((x >> 16) & 1)) >> 16);
    }
};

struct Half {
    typedef uint16_t type;
    static float get(type h) {
        const uint32_t rest = uint32_t(h & 0x7fff) << 13;
        const uint32_t bits = rest >= (31u << 23) ? rest | 0x7f800000u  // infinity, NaN
                                                  : to_bits(from_bits(rest) * 0x1p112f);
        return from_bits(bits | uint32_t(h & 0x8000) << 16);
    }
    static type put(float f) {
        const uint32_t sign = (to_bits(f) >> 16) & 0x8000;
        const float a = std::fabs(f);
        if (a != a) return type(sign | 0x7e00);
        if (a >= 65520.0f) return type(sign | 0x7c00);
        if (a < 0x1p-14f) return type(sign | uint32_t(std::nearbyint(a * 0x1p24f)));
        const uint32_t x = to_bits(a);
        return type(sign | ((x + 0xfff + ((x >> 13) & 1) - (112u << 23)) >> 13));
    }
};
// 2^x for x <= 0; 0 below the smallest normal number.
inline vf exp2_of(vf x) {
#if defined(__AVX512F__)
    const vf floor = all(-151.0f);
    x = (vf)_mm512_max_ps((__m512)x, (__m512)floor);
    const vf whole = (vf)_mm512_roundscale_ps((__m512)x, 8);
#else
    const vf floor = all(-126.0f);
    const vi is_zero = x < floor;
    x = is_zero ? floor : x;
    const vf magic = all(12582912.0f);  // rounds to whole numbers
    const vf whole = (x + magic) - magic;
#endif
    const vf f = x - whole;
    vf y = all(1.33977761e-3f);
    y = y * f + 9.67770915e-3f;
    y = y * f + 5.55027016e-2f;
    y = y * f + 2.40222458e-1f;
    y = y * f + 6.93147187e-1f;
    y = y * f + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
    const vi power = (__builtin_convertvector(whole, vi) + 127) << 23;
    vf scale;
    std::memcpy(&scale, &power, sizeof scale);
    const vf result = y * scale;
    return is_zero ? vf{} : result;
#endif
}

inline vf max_of(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

inline float max_across(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = std::max(m, float(x[i]));
    return m;
#endif
}

inline float sum_across(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float s = x[0];
    for (int i = 1; i < LANES; i++) s += x[i];
    return s;
#endif
}
template <class F>
inline void in_parallel(int threads, F work) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work();
        return;
    }
#endif
    work();
}

struct Memory {
    void* at = nullptr;
    size_t size = 0;
    ~Memory() { std::free(at); }
    void clear() {
        std::free(at);
        at = nullptr;
        size = 0;
    }
    template <class X>
    X* get(size_t count) {
        const size_t bytes = (count * sizeof(X) + 4095) / 4096 * 4096;
        if (bytes > size) {
            std::free(at);
            at = std::aligned_alloc(4096, bytes);
            size = at == nullptr ? 0 : bytes;
        }
        return static_cast<X*>(at);
    }
};

enum { FLOAT = 0, BFLOAT = 1, HALF = 2 };  // as library.py calls them

}  // namespace rag
