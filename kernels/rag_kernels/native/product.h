// Products of packed matrices. Every operand is words of 32 bits, each one fp32 number or a pair of bf16.
//
// bf16 queries and keys use AVX512-BF16 where the compiler targets it: exact products, sums in fp32. All else is
// computed in fp32 with the vector extensions of GCC and Clang.
#pragma once
#include "numbers.h"

namespace rag {

struct InFloat {
    static constexpr int PAIR = 1;
    static vf madd(vf sum, const word* a, vf b) { return sum + from_bits(*a) * b; }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_BF16 1
struct InBFloat {
    static constexpr int PAIR = 2;
    static vf madd(vf sum, const word* a, vf b) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(*a)), (__m512bh)b);
    }
};
#endif

// C[R, N vectors] = or += A[R, steps] * B[steps, PANEL]
template <class T, int R, int N>
void product(const word* a, long lda, const word* b, long steps, float* c, long ldc, bool adds) {
    vf sum[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sum[r][n] = adds ? load(c + r * ldc + n * LANES) : vf{};
    for (long s = 0; s < steps; s++) {
        vf right[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) right[n] = load(b + s * PANEL + n * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) sum[r][n] = T::madd(sum[r][n], a + r * lda + s, right[n]);
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(c + r * ldc + n * LANES, sum[r][n]);
}

typedef void (*Product)(const word*, long, const word*, long, float*, long, bool);

template <class T, int R, int... N>
Product product_of_width(int vectors, std::integer_sequence<int, N...>) {
    static const Product known[] = {product<T, R, N + 1>...};
    return known[vectors - 1];
}

template <class T, int... R>
Product product_of(int rows, int vectors, std::integer_sequence<int, R...>) {
    typedef Product (*Choose)(int, std::make_integer_sequence<int, NV>);
    static const Choose known[] = {product_of_width<T, R + 1>...};
    return known[rows - 1](vectors, {});
}

template <class T>
inline Product product_for(int rows, int vectors) {
    return product_of<T>(rows, vectors, std::make_integer_sequence<int, MR>{});
}

#if defined(__AVX512F__)
// 16 rows of 16 words each, to 16 rows of a panel
inline void transpose16(const word* const* from, long offset, word* to) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from[i] + offset);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + (i)*PANEL, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * PANEL, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 4) * PANEL, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 12) * PANEL, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}
#endif

// LANES keys as columns of a panel; rows of `words` words, `padded` of them readable.
inline void put_columns(const word* const* rows, [[maybe_unused]] int words, int padded, word* to) {
#if defined(__AVX512F__)
    for (int w = 0; w < padded; w += 16) transpose16(rows, w, to + long(w) * PANEL);
#else
    for (int w = 0; w < words; w++)
        for (int i = 0; i < LANES; i++) to[long(w) * PANEL + i] = rows[i][w];
#endif
}

// A row of numbers as words of T, zeros behind it.
template <class T, class E>
inline void put_row(const typename E::type* from, int dim, word* to, int padded) {
    if constexpr (T::PAIR == 2) {
        std::memcpy(to, from, size_t(dim) * 2);
        if (padded * 2 > dim) std::memset(reinterpret_cast<char*>(to) + dim * 2, 0, size_t(padded) * 4 - dim * 2);
    } else {
        float* out = reinterpret_cast<float*>(to);
        for (int i = 0; i < dim; i++) out[i] = E::get(from[i]);
        for (int i = dim; i < padded; i++) out[i] = 0.0f;
    }
}

}  // namespace rag
