// A layer's linear map of few rows: bf16 rows times bf16 weights, sums in fp32, rounded once.
//
// With few rows most of the time of a library's product goes into laying out the weights anew and into threads that wait
// for the one with the larger part. Here a task is some columns: a thread lays them out in its own cache and takes all
// rows past them. Columns per task are those with which all threads end together.
#include "product.h"

// The same fields stand in library.py.
extern "C" {

struct RagLinear {
    const void *x, *w, *bias;   // x [rows, depth], w [columns, depth], bias [columns] or null
    void* out;                  // [rows, columns] in one piece
    int64_t rows, depth, columns, x_row, w_row, threads;  // strides in numbers
};

}  // extern "C"

namespace {

using namespace rag;

#ifdef HAS_BF16
void columns_of(const RagLinear& c, int64_t first, int vectors, Memory& packed, Memory& sums_of) {
    const int words = int(c.depth / 2), wide = vectors * LANES;
    word* panel = packed.get<word>(size_t(words) * PANEL);
    float* sums = sums_of.get<float>(size_t(MR) * PANEL);
    const uint16_t* w = static_cast<const uint16_t*>(c.w);
    for (int at = 0; at < wide; at += LANES) {
        const word* rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = reinterpret_cast<const word*>(w + (first + at + i) * c.w_row);
        put_columns(rows, words, words, panel + at);
    }
    const uint16_t* x = static_cast<const uint16_t*>(c.x);
    for (int64_t row = 0; row < c.rows; row += MR) {
        const int count = int(std::min<int64_t>(MR, c.rows - row));
        product_for<InBFloat>(count, vectors)(reinterpret_cast<const word*>(x + row * c.x_row), c.x_row / 2, panel, words,
                                              sums, PANEL, false);
        for (int i = 0; i < count; i++) {
            uint16_t* out = static_cast<uint16_t*>(c.out) + (row + i) * c.columns + first;
            if (c.bias != nullptr) {
                const uint16_t* bias = static_cast<const uint16_t*>(c.bias) + first;
                for (int n = 0; n < wide; n++) sums[i * PANEL + n] += BFloat::get(bias[n]);
            }
            for (int at = 0; at < wide; at += LANES)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at),
                                    (__m256i)_mm512_cvtneps_pbh((__m512)load(sums + i * PANEL + at)));
        }
    }
}

// Vectors of columns per task: wide tasks read the rows less often, narrow ones leave no thread without work at the end.
int vectors_of(const RagLinear& c) {
    int best = NV;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int vectors = NV; vectors >= 1; vectors /= 2) {
        const int64_t tasks = (c.columns + vectors * LANES - 1) / (vectors * LANES);
        const int64_t time = (tasks + c.threads - 1) / c.threads * vectors * (8 + NV / vectors);
        if (time < least) best = vectors, least = time;
    }
    return best;
}
#endif

}  // namespace

// 1 where this CPU has no such instructions. Depth is a multiple of two vectors, columns are one of a vector.
extern "C" int rag_linear(const RagLinear* call) {
#ifdef HAS_BF16
    const RagLinear& c = *call;
    if (c.rows == 0) return 0;
    const int vectors = vectors_of(c);
    const int64_t wide = vectors * LANES, tasks = (c.columns + wide - 1) / wide;
    std::atomic<int64_t> next{0};
    in_parallel(int(std::min(c.threads, tasks)), [&] {
        static thread_local Memory packed, sums;
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
            const int64_t first = task * wide;
            columns_of(c, first, int(std::min(wide, c.columns - first) / LANES), packed, sums);
        }
    });
    return 0;
#else
    (void)call;
    return 1;
#endif
}
