// The integers of SALE's estimate: how keys and rows are packed, multiplied and compared with limits.
//
// Keys of a strip and ROWS rows meet in registers; channels come four at a time. With AVX512-VNNI they are 8-bit
// integers, elsewhere fp32 numbers of the same values, whose sums are exact, too.
#pragma once
#include "numbers.h"

namespace rag {

constexpr int LARGEST = 127, INT4_MAX = 7;
constexpr float MOST_ABOVE = 3.0f * LARGEST * LARGEST;
constexpr float TINY = std::numeric_limits<float>::min();
constexpr int STRIP = 2 * LANES;  // keys of an inner loop; a PANEL is whole strips
constexpr float SLACK = 1.0f + 1e-5f;  // of a norm, so that rounding never makes a bound too small

inline vf round_of(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_roundscale_ps((__m512)x, 8);
#else
    vf y;
    for (int i = 0; i < LANES; i++) y[i] = std::nearbyint(x[i]);
    return y;
#endif
}

inline vf clamp_of(vf x, float most) { return -max_of(-max_of(x, all(-most)), all(-most)); }
inline vf abs_of(vf x) { return max_of(x, -x); }

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
constexpr int ROWS = 8;
typedef uint8_t key_number;   // plus 128: the instruction takes unsigned numbers on this side
typedef int8_t row_number;
typedef int32_t row_start;
typedef __m512i sum_type;

// Four channels of LANES keys
inline void put_keys(const vf* x, int channel, int at, key_number* strip) {
    __m512i packed = _mm512_setzero_si512();
    for (int i = 3; i >= 0; i--)
        packed = _mm512_or_si512(_mm512_slli_epi32(packed, 8),
                                 _mm512_add_epi32(_mm512_cvtps_epi32((__m512)x[i]), _mm512_set1_epi32(128)));
    _mm512_storeu_si512(strip + (long(channel) * STRIP + at * 4), packed);
}

// What the products of a row with keys are too large by
constexpr float KEY_OFFSET = 128.0f;

inline sum_type same(row_start x) { return _mm512_set1_epi32(x); }
inline sum_type plus(sum_type a, sum_type b) { return _mm512_add_epi32(a, b); }
inline sum_type larger(sum_type a, sum_type b) { return _mm512_max_epi32(a, b); }
inline vf as_float(sum_type x) { return (vf)_mm512_cvtepi32_ps(x); }

// GCC copies every sum before and behind the intrinsic in a loop; so the instruction itself.
inline void multiply(sum_type& sum, __m512i keys, __m512i row) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(keys), "v"(row));
}
#else
constexpr int ROWS = 4;
typedef float key_number;
typedef float row_number;
typedef float row_start;
typedef vf sum_type;

inline void put_keys(const vf* x, int channel, int at, key_number* strip) {
    for (int i = 0; i < 4; i++) store(strip + long(channel + i) * STRIP + at, x[i]);
}

constexpr float KEY_OFFSET = 0.0f;

inline sum_type same(row_start x) { return all(x); }
inline sum_type plus(sum_type a, sum_type b) { return a + b; }
inline sum_type larger(sum_type a, sum_type b) { return max_of(a, b); }
inline vf as_float(sum_type x) { return x; }
#endif

// Where four channels of a row stand among those of ROWS rows
inline long row_place(int row, int channel) { return (long(channel / 4) * ROWS + row) * 4; }

// Numbers of a row, of which `lanes` can be read, as they are multiplied
inline void put_row_numbers(const float* x, int lanes, row_number* to) {
    for (int d = 0; d < lanes; d++) to[d] = row_number(x[d]);
}

// Sums of ROWS rows with the keys of a strip
struct Sums {
    sum_type sum[ROWS][2];

    explicit Sums(const row_start* start) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = same(start[r]);
    }

    // Add to the sums of each row
    void add(const row_start* more) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 2; i++) sum[r][i] = plus(sum[r][i], same(more[r]));
    }

    // Channels from .. to - 1, multiples of 4
    void add(const row_number* rows, int from, int to, const key_number* strip) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
        for (int d = from; d < to; d += 4) {
            const __m512i one = _mm512_load_si512(strip + d * STRIP), two = _mm512_load_si512(strip + d * STRIP + 64);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                int32_t four;
                std::memcpy(&four, rows + row_place(r, d), 4);
                const __m512i row = _mm512_set1_epi32(four);
                multiply(sum[r][0], one, row);
                multiply(sum[r][1], two, row);
            }
        }
#else
        for (int d = from; d < to; d++) {
            const vf one = load(strip + d * STRIP), two = load(strip + d * STRIP + LANES);
            for (int r = 0; r < ROWS; r++) {
                sum[r][0] += one * rows[row_place(r, d) + d % 4];
                sum[r][1] += two * rows[row_place(r, d) + d % 4];
            }
        }
#endif
    }

    // The most of all rows for the keys of one half of the strip
    vf most(int half) const {
        sum_type top = sum[0][half];
#pragma GCC unroll 8
        for (int r = 1; r < ROWS; r++) top = larger(top, sum[r][half]);
        return as_float(top);
    }
};

// Which of LANES keys are above their limits
inline uint32_t above_of(vf x, vf limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, (__m512)limit, _CMP_GT_OQ);
#else
    uint32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= uint32_t(x[i] > limit[i]) << i;
    return found;
#endif
}

}  // namespace rag
