// Thresholds of SALE: what a row's keys are compared with, from its own logits with the keys that it reads anyway.
#pragma once
#include "sale_keys.h"

namespace rag {

struct SaleScratch {
    Memory raw, keys, logits, sums, means, limits, rows, starts, norms;
};

// Logits of some rows with the keys that they read anyway: the first `c.key_block`, and those from `g.candidates` on
template <class T, class E>
class Reference {
    const RagSale& c;
    const RagSaleGroup& g;
    const int words, padded_words, sink, columns;  // each of the two ranges fills up whole panels
    word* keys;                 // [columns / PANEL][padded_words][PANEL]
    float* logits;              // [MR][columns]

public:
    Reference(const RagSale& call, int64_t group, int64_t head, SaleScratch& s)
        : c(call), g(call.groups[group]), words(int(c.dim) / T::PAIR), padded_words(up(words, 16)),
          sink(up(int(c.key_block), PANEL)), columns(sink + up(int(g.end - g.candidates), PANEL)),
          keys(s.keys.get<word>(size_t(columns) * padded_words)), logits(s.logits.get<float>(size_t(columns) * MR)) {
        pack(head, 0, c.key_block, keys);
        pack(head, g.candidates, g.end, keys + long(sink) * padded_words);
    }

    // What a key must be above, for each of `count` rows: those of the group once for each head and block that looks
    void thresholds(const word* raw, int count, float* out, const float* tau) const {
        const int width = int(g.width), all_rows = int(g.blocks * g.width);
        for (int begin = 0; begin < count; begin += width)
            for (int i = begin; i < begin + width; i += MR)
                add_rows(raw + long(i) * words, std::min(MR, begin + width - i),
                         c.positions + g.first_row + i % all_rows, tau[begin / width], out + i);
    }

private:
    void pack(int64_t head, int64_t from, int64_t to, word* out) const {
        typedef typename E::type type;
        const type* pool = static_cast<const type*>(c.k) + head * c.k_head;
        word spare[LANES][256 + 16];
        for (int64_t first = from; first < to; first += LANES) {
            const word* rows[LANES];
            for (int i = 0; i < LANES; i++) {
                rows[i] = spare[i];
                put_row<T, E>(pool + c.slots[std::min(first + i, to - 1)] * c.k_slot, int(c.dim), spare[i], padded_words);
            }
            const long at = first - from;
            put_columns(rows, words, padded_words, out + at / PANEL * PANEL * padded_words + at % PANEL);
        }
    }

    // Columns of a row that are set: those of a range up to its position, filled up to whole vectors
    int fill_up(float* x, int64_t seen) const {
        const int end = up(int(seen), LANES);
        std::fill(x + seen, x + end, NEG_INF);
        return end;
    }

    void add_rows(const word* raw, int n, const int64_t* positions, float tau, float* out) const {
        const int64_t last = std::min(positions[n - 1] + 1, g.end) - g.candidates;
        multiply(raw, n, 0, c.key_block);
        multiply(raw, n, sink, last);
        const float unit = c.scale * 1.44269504f;
        for (int r = 0; r < n; r++) {
            float *x = logits + long(r) * columns, *y = x + sink;
            const int first = fill_up(x, c.key_block);
            const int second = fill_up(y, std::clamp<int64_t>(positions[r] + 1 - g.candidates, 0, last));
            vf peak = all(NEG_INF), sum = {};
            for (int at = 0; at < first; at += LANES) peak = max_of(peak, load(x + at));
            for (int at = 0; at < second; at += LANES) peak = max_of(peak, load(y + at));
            const float most = max_across(peak);
            const vf shift = all(most * unit);
            for (int at = 0; at < first; at += LANES) sum += exp2_of(load(x + at) * unit - shift);
            for (int at = 0; at < second; at += LANES) sum += exp2_of(load(y + at) * unit - shift);
            out[r] = most + std::log2(sum_across(sum) * tau) / unit;
        }
    }

    void multiply(const word* raw, int n, int from, int64_t count) const {
        for (int64_t at = 0; at < count; at += PANEL)
            product_for<T>(n, int(std::min<int64_t>(up(int(count - at), LANES), PANEL)) / LANES)(
                raw, words, keys + (from + at) * padded_words, words, logits + from + at, columns, false);
    }
};

}  // namespace rag
