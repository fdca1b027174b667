// Spans of stored KV into a layer of a paged pool: keys turned by their span's angles, values as they are.
//
// A product is rounded before the other is added to it in one step where the CPU can, as torch's operations do it: the
// bits are those of the path without this.
#include "numbers.h"

// The same fields stand in library.py.
extern "C" {

struct RagSpan {
    const void* rows;           // [count, heads, dim] of the pool's type
    int64_t first, count;       // place of its first token among all tokens
    int64_t row, head;          // strides in numbers
    int64_t angles;             // row of the tables, or -1: copied
};

struct RagLoad {
    void* pool;
    const RagSpan* spans;
    const int64_t* slots;       // of all tokens, span after span
    const float *cos, *sin;     // [angles, rotary_dim / 2]
    int64_t num_spans, tokens, slot, pool_head, heads, dim, rotary_dim, is_neox, type;
};

}  // extern "C"

namespace {

using namespace rag;

// sum + x * y
inline float added(float sum, float x, float y) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(x, y, sum);
#else
    return sum + x * y;
#endif
}

constexpr int64_t PART = 32;  // tokens that a thread takes at once

template <class E>
void turned(const typename E::type* __restrict from, const float* __restrict cos, const float* __restrict sin,
            const RagLoad& c, typename E::type* __restrict to) {
    const int half = int(c.rotary_dim) / 2;
    if (c.is_neox) {
        for (int i = 0; i < half; i++) {
            const float x = E::get(from[i]), y = E::get(from[i + half]);
            to[i] = E::put(added(x * cos[i], -y, sin[i]));
            to[i + half] = E::put(added(y * cos[i], x, sin[i]));
        }
    } else {
        for (int i = 0; i < half; i++) {
            const float x = E::get(from[2 * i]), y = E::get(from[2 * i + 1]);
            to[2 * i] = E::put(added(x * cos[i], -y, sin[i]));
            to[2 * i + 1] = E::put(added(y * cos[i], x, sin[i]));
        }
    }
    for (int64_t i = c.rotary_dim; i < c.dim; i++) to[i] = from[i];
}

template <class E>
void load_part(const RagLoad& c, int64_t lo, int64_t hi) {
    typedef typename E::type type;
    const RagSpan* span = std::upper_bound(c.spans, c.spans + c.num_spans, lo,
                                           [](int64_t at, const RagSpan& s) { return at < s.first; }) - 1;
    const int64_t half = c.rotary_dim / 2;
    for (int64_t at = lo; at < hi; at++) {
        while (at >= span->first + span->count) span++;
        const type* from = static_cast<const type*>(span->rows) + (at - span->first) * span->row;
        type* to = static_cast<type*>(c.pool) + c.slots[at] * c.slot;
        for (int64_t h = 0; h < c.heads; h++, from += span->head, to += c.pool_head) {
            if (span->angles < 0)
                std::memcpy(to, from, size_t(c.dim) * sizeof(type));
            else
                turned<E>(from, c.cos + span->angles * half, c.sin + span->angles * half, c, to);
        }
    }
}

int64_t parts_of(const RagLoad& c) { return (c.tokens + PART - 1) / PART; }

}  // namespace

// Loads that write different places, keys and values, as one queue of work.
extern "C" int rag_load(const RagLoad* loads, int64_t count, int64_t threads) {
    int64_t parts = 0;
    for (int64_t i = 0; i < count; i++) {
        if (loads[i].type < FLOAT || loads[i].type > HALF) return 1;
        parts += parts_of(loads[i]);
    }
    std::atomic<int64_t> next{0};
    in_parallel(int(std::min(threads, parts)), [&] {
        for (int64_t part; (part = next.fetch_add(1)) < parts;) {
            const RagLoad* c = loads;
            while (part >= parts_of(*c)) part -= parts_of(*c++);
            const int64_t lo = part * PART, hi = std::min(c->tokens, lo + PART);
            if (c->type == FLOAT) load_part<Float>(*c, lo, hi);
            if (c->type == BFLOAT) load_part<BFloat>(*c, lo, hi);
            if (c->type == HALF) load_part<Half>(*c, lo, hi);
        }
    });
    return 0;
}
