// What the choice of rows costs in every layer: the attention mass of the question, and the mean shift of the others.
#include "product.h"

// The same fields stand in library.py.
extern "C" {

struct RagMass {
    const void *q, *k;          // q [rows, q_heads, dim]
    float* out;                 // [tiles, kv_len]: sums of softmax rows, one row per tile
    const int64_t* positions;   // of the rows
    const int64_t* slots;
    int64_t rows, kv_len, tile, q_row, q_head, k_slot, k_head, q_heads, kv_heads, dim, type, threads;
    float scale;
};

struct RagShift {
    void *k_pool, *v_pool;
    const void *k_new, *v_new, *k_old, *v_old;  // [rows, heads, dim]; old ones null: in the pool
    const int64_t *probe_rows, *probe_slots, *probe_ends, *other_slots, *other_ends;
    const float *weights, *probe_cos, *probe_sin, *other_cos, *other_sin;
    int64_t chunks, k_slot, k_head, v_slot, v_head, k_new_row, v_new_row, k_old_row, v_old_row;
    int64_t heads, dim, rotary_dim, is_neox, type, threads;
};

}  // extern "C"

namespace {

using namespace rag;

// One tile: some rows of a question with some query heads of one key/value head.
template <class T, class E>
void mass_of(const RagMass& c, int64_t head, int first, int count, float* out) {
    typedef typename E::type type;
    static thread_local Memory queries_of, keys_of, logits_of;
    const int dim = int(c.dim), words = dim / T::PAIR, padded = up(words, 16), group = int(c.q_heads / c.kv_heads);
    const int width = up(int(c.kv_len), PANEL);
    word* queries = queries_of.get<word>(size_t(count) * words);
    word* keys = keys_of.get<word>(size_t(padded) * PANEL);
    float* logits = logits_of.get<float>(size_t(count) * width);
    for (int i = 0; i < count; i++) {
        const int64_t row = (first + i) / group, own = head * group + (first + i) % group;
        put_row<T, E>(static_cast<const type*>(c.q) + row * c.q_row + own * c.q_head, dim, queries + i * words, words);
    }
    const type* pool = static_cast<const type*>(c.k) + head * c.k_head;
    word spare[LANES][WIDEST + 16];
    for (int from = 0; from < c.kv_len; from += PANEL) {
        for (int at = 0; at < PANEL; at += LANES) {
            const word* rows[LANES];
            for (int i = 0; i < LANES; i++) {
                rows[i] = spare[i];
                if (from + at + i < c.kv_len)
                    put_row<T, E>(pool + c.slots[from + at + i] * c.k_slot, dim, spare[i], padded);
                else
                    std::memset(spare[i], 0, size_t(padded) * 4);
            }
            put_columns(rows, words, padded, keys + at);
        }
        for (int i = 0; i < count; i += MR)
            product_for<T>(std::min(MR, count - i), NV)(queries + i * words, words, keys, words,
                                                        logits + size_t(i) * width + from, width, false);
    }
    const float unit = c.scale * 1.44269504f;
    for (int i = 0; i < count; i++) {
        float* x = logits + size_t(i) * width;
        const int seen = int(std::min(c.positions[(first + i) / group] + 1, c.kv_len)), end = up(seen, LANES);
        std::fill(x + seen, x + end, NEG_INF);
        vf peak = all(NEG_INF), sum = {};
        for (int at = 0; at < end; at += LANES) peak = max_of(peak, load(x + at));
        const vf shift = all(max_across(peak) * unit);
        for (int at = 0; at < end; at += LANES) {
            const vf e = exp2_of(load(x + at) * unit - shift);
            sum += e;
            store(x + at, e);
        }
        const float share = 1.0f / sum_across(sum);
        for (int at = 0; at < seen; at++) out[at] += x[at] * share;
    }
}

template <class T, class E>
void mass(const RagMass& c) {
    const int64_t each = c.rows * (c.q_heads / c.kv_heads), parts = (each + c.tile - 1) / c.tile;
    std::atomic<int64_t> next{0};
    in_parallel(int(std::min(c.threads, parts * c.kv_heads)), [&] {
        for (int64_t i; (i = next.fetch_add(1)) < parts * c.kv_heads;) {
            const int64_t first = i % parts * c.tile;
            mass_of<T, E>(c, i / parts, int(first), int(std::min(c.tile, each - first)), c.out + i * c.kv_len);
        }
    });
}

// x turned by the angles of a token
inline void turn(const float* x, const float* cos, const float* sin, int rotary, bool is_neox, int dim, float* out) {
    const int half = rotary / 2;
    if (is_neox)
        for (int i = 0; i < half; i++) {
            out[i] = x[i] * cos[i] - x[i + half] * sin[i];
            out[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
        }
    else
        for (int i = 0; i < half; i++) {
            out[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
            out[2 * i + 1] = x[2 * i + 1] * cos[i] + x[2 * i] * sin[i];
        }
    for (int i = rotary; i < dim; i++) out[i] = x[i];
}

// Mean change of a chunk's keys, at its first position, and of its values: 2 * dim numbers
template <class E>
void mean_of(const RagShift& c, int64_t chunk, int64_t head, float* k_sum) {
    typedef typename E::type type;
    const int dim = int(c.dim), rotary = int(c.rotary_dim), half = rotary / 2;
    const auto at = [&](const void* rows, int64_t row, int64_t stride) {
        return static_cast<const type*>(rows) + row * stride + head * dim;
    };
    const type *k_pool = static_cast<type*>(c.k_pool) + head * c.k_head, *v_pool = static_cast<type*>(c.v_pool) + head * c.v_head;
    float *v_sum = k_sum + dim, moved[WIDEST], turned[WIDEST];
    std::fill(k_sum, k_sum + 2 * dim, 0.0f);
    for (int64_t p = chunk == 0 ? 0 : c.probe_ends[chunk - 1]; p < c.probe_ends[chunk]; p++) {
        const int64_t row = c.probe_rows[p], slot = c.probe_slots[p];
        const type *k_new = at(c.k_new, row, c.k_new_row), *v_new = at(c.v_new, row, c.v_new_row);
        const type* k_old = c.k_old == nullptr ? k_pool + slot * c.k_slot : at(c.k_old, row, c.k_old_row);
        const type* v_old = c.v_old == nullptr ? v_pool + slot * c.v_slot : at(c.v_old, row, c.v_old_row);
        const float weight = c.weights[p];
        for (int i = 0; i < dim; i++) moved[i] = E::get(k_new[i]) - E::get(k_old[i]);
        turn(moved, c.probe_cos + p * half, c.probe_sin + p * half, rotary, c.is_neox != 0, dim, turned);
        for (int i = 0; i < dim; i++) k_sum[i] += weight * turned[i];
        for (int i = 0; i < dim; i++) v_sum[i] += weight * (E::get(v_new[i]) - E::get(v_old[i]));
    }
}

template <class E>
void add_to(const RagShift& c, int64_t token, const float* sums) {
    typedef typename E::type type;
    const int dim = int(c.dim), half = int(c.rotary_dim) / 2;
    float turned[WIDEST];
    for (int64_t h = 0; h < c.heads; h++, sums += 2 * dim) {
        type* k = static_cast<type*>(c.k_pool) + c.other_slots[token] * c.k_slot + h * c.k_head;
        type* v = static_cast<type*>(c.v_pool) + c.other_slots[token] * c.v_slot + h * c.v_head;
        turn(sums, c.other_cos + token * half, c.other_sin + token * half, 2 * half, c.is_neox != 0, dim, turned);
        for (int i = 0; i < dim; i++) k[i] = E::put(E::get(k[i]) + turned[i]);
        for (int i = 0; i < dim; i++) v[i] = E::put(E::get(v[i]) + sums[dim + i]);
    }
}

template <class E>
void shift(const RagShift& c) {
    std::vector<float> sums(size_t(c.chunks * c.heads * 2 * c.dim));
    std::atomic<int64_t> next{0};
    in_parallel(int(std::min(c.threads, c.chunks * c.heads)), [&] {
        for (int64_t i; (i = next.fetch_add(1)) < c.chunks * c.heads;)
            mean_of<E>(c, i / c.heads, i % c.heads, sums.data() + i * 2 * c.dim);
    });
    constexpr int64_t PART = 64;
    const int64_t tokens = c.other_ends[c.chunks - 1], parts = (tokens + PART - 1) / PART;
    next = 0;
    in_parallel(int(std::min(c.threads, parts)), [&] {
        for (int64_t i; (i = next.fetch_add(1)) < parts;) {
            int64_t chunk = std::upper_bound(c.other_ends, c.other_ends + c.chunks, i * PART) - c.other_ends;
            for (int64_t t = i * PART; t < std::min(tokens, (i + 1) * PART); t++) {
                while (t >= c.other_ends[chunk]) chunk++;
                add_to<E>(c, t, sums.data() + chunk * c.heads * 2 * c.dim);
            }
        }
    });
}

}  // namespace

extern "C" int rag_mass(const RagMass* call) {
    switch (call->type) {
        case FLOAT: mass<InFloat, Float>(*call); return 0;
        case HALF: mass<InFloat, Half>(*call); return 0;
        case BFLOAT:
#ifdef HAS_BF16
            if (call->dim % 2 == 0) {
                mass<InBFloat, BFloat>(*call);
                return 0;
            }
#endif
            mass<InFloat, BFloat>(*call);
            return 0;
    }
    return 1;
}

extern "C" int rag_mean_shift(const RagShift* call) {
    switch (call->type) {
        case FLOAT: shift<Float>(*call); return 0;
        case BFLOAT: shift<BFloat>(*call); return 0;
        case HALF: shift<Half>(*call); return 0;
    }
    return 1;
}
