// Attention of rows that lie anywhere in a prompt, causal by absolute position, over a paged pool.
//
// A tile is some rows of one request with all query heads that share one key/value head. A tile walks over its keys in
// steps of STEP keys: it gathers and packs them once, then takes its rows MR at a time: logits, online softmax, and the
// product with V, all in fp32. Keys behind the last row of such a group, outside its window or in blocks that the mask
// hides from it cost nothing. Tiles of all requests and heads stand in one queue, the most expensive first.
//
// With bf16 the weights of V are rounded to bf16, as torch's fused attention does. A row's result depends neither on the
// rows beside it nor on the number of threads.
#include "product.h"

// The same fields stand in library.py.
extern "C" {

struct RagRequest {
    int64_t row_lo, row_hi;     // sorted rows
    const int64_t* slots;       // of every position
    const uint8_t* allowed;     // [mask_heads, mask_rows, mask_cols], or null
    int64_t mask_heads, mask_rows, mask_cols, query_block, key_block, first_query_block;
};

struct RagCall {
    const void *q, *k, *v;
    void* out;                  // [rows, q_heads, dim], type of q
    const int64_t* order;       // query row of each sorted row, or null
    const int32_t* positions;   // of the sorted rows
    const RagRequest* requests;
    const float* sinks;         // logit per query head of a key without a value, or null
    int64_t num_requests, q_row, q_head, k_slot, k_head, v_slot, v_head;  // strides in numbers
    int64_t q_heads, kv_heads, dim, q_type, kv_type, window, threads;     // window 0: none
    float scale, cap;           // cap 0: none
};

}  // extern "C"

namespace {

using namespace rag;

struct Tile {
    int request, head, lo, hi;
    int64_t cost;
};

struct Scratch {
    Memory q, k, v, sums;
};

constexpr int MOST = 144, FEWEST = 24;  // query rows of a tile, those of all heads of its group counted
constexpr int64_t PACKING = 30;         // about what packing the keys of a tile costs, in query rows

// Parts to cut the rows of so many heads into, and when the last of them ends if all threads take tiles of equal cost.
struct Parts {
    int64_t count, time;
};

Parts parts_of(int64_t rows, int group, int64_t heads, int64_t threads) {
    const int64_t count = rows * group;
    Parts best{1, std::numeric_limits<int64_t>::max()};
    for (int64_t parts = 1; parts <= (count + FEWEST - 1) / FEWEST; parts++) {
        const int64_t each = (rows + parts - 1) / parts * group;
        const int64_t time = (parts * heads + threads - 1) / threads * (each + PACKING);
        if (time < best.time) best = {parts, time};
    }
    return best;
}

// Cut a request's rows for key/value heads `first` to `stop` into tiles of at most `size` rows.
void cut_heads(const RagCall& c, int group, int64_t request, int64_t first, int64_t stop, int64_t size,
               std::vector<Tile>& tiles) {
    const RagRequest& r = c.requests[request];
    for (int64_t lo = r.row_lo; lo < r.row_hi;) {
        int64_t hi = std::min<int64_t>(lo + size, r.row_hi);
        if (r.allowed != nullptr) {
            // Rows of one query block read the same keys: a block whole, or in equal parts; few rows with the next.
            int64_t end = lo;
            do {
                const int64_t block = c.positions[end] / r.query_block;
                while (end < r.row_hi && c.positions[end] / r.query_block == block) end++;
            } while (end < r.row_hi && (end - lo) * group < 24);
            const int64_t parts = std::max<int64_t>(1, (end - lo + size / 2) / size);
            hi = std::min(end, lo + (end - lo + parts - 1) / parts);
        }
        int64_t cost = 0;
        for (int64_t at = lo; at < hi; at++) cost += c.positions[at] + 1;
        for (int64_t h = first; h < stop; h++) tiles.push_back({int(request), int(h), int(lo), int(hi), cost});
        lo = hi;
    }
}

// Cut rows into tiles for every key/value head.
std::vector<Tile> cut(const RagCall& c, int group) {
    int64_t rows = 0;
    for (int64_t i = 0; i < c.num_requests; i++) rows += c.requests[i].row_hi - c.requests[i].row_lo;
    // Large tiles pack keys for more rows; small ones keep all threads busy to the end.
    const int64_t heads = c.kv_heads, share = rows * group * heads / (4 * c.threads);
    const int most = int(std::clamp<int64_t>(share, FEWEST, MOST));
    const int64_t tile_rows = std::max(1, up(std::max(1, most / group), MR));
    const auto equal = [](int64_t count, int64_t parts) { return (count + parts - 1) / parts; };
    std::vector<Tile> tiles;
    if (c.num_requests == 1 && rows > 0 && rows * group <= 2 * MOST) {
        const Parts alike = parts_of(rows, group, heads, c.threads);
        // As many heads as all threads can take at once stay whole and pack their keys once; the others are shared out.
        const int64_t left = heads % c.threads, whole = heads - left;
        const Parts rest = parts_of(rows, group, std::max<int64_t>(left, 1), c.threads);
        const int64_t time = whole / c.threads * (rows * group + PACKING) + rest.time;
        if (left > 0 && whole > 0 && time < alike.time) {
            cut_heads(c, group, 0, 0, whole, rows, tiles);
            cut_heads(c, group, 0, whole, heads, equal(rows, rest.count), tiles);
        } else {
            cut_heads(c, group, 0, 0, heads, equal(rows, alike.count), tiles);
        }
    } else {
        for (int64_t i = 0; i < c.num_requests; i++) {
            const int64_t own = c.requests[i].row_hi - c.requests[i].row_lo;
            // Parts of one size: a last one of few rows would pack all keys for them.
            const int64_t parts = std::max<int64_t>(1, (own + tile_rows / 2) / tile_rows);
            cut_heads(c, group, i, 0, heads, c.requests[i].allowed == nullptr ? equal(own, parts) : tile_rows, tiles);
        }
    }
    std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.cost > b.cost; });
    return tiles;
}

// Keys of one step: positions in order, and where their slots are.
struct Keys {
    int count = 0;
    bool is_run = true;         // positions follow one another
    int32_t at[STEP];
    int num_pieces = 0;         // with a mask: keys of one block each
    struct { int lo, hi; int64_t block; } pieces[STEP];
    int upper(int32_t p) const {  // keys at positions <= p
        if (count == 0 || p < at[0]) return 0;
        if (is_run) return std::min<int64_t>(int64_t(p) - at[0] + 1, count);
        return int(std::upper_bound(at, at + count, p) - at);
    }
};

template <class T, class E>
struct Worker {
    const RagCall& c;
    Scratch& s;
    const int group, dim, words, padded_words, padded_dim, panels;
    word *kp, *vp;

    Worker(const RagCall& call, Scratch& scratch)
        : c(call), s(scratch), group(int(call.q_heads / call.kv_heads)), dim(int(call.dim)),
          words(dim / T::PAIR), padded_words(up(words, 16)), padded_dim(up(dim, LANES)),
          panels((padded_dim + PANEL - 1) / PANEL) {
        kp = s.k.get<word>(size_t(padded_words) * STEP);
        vp = s.v.get<word>(size_t(panels) * PANEL * (STEP / T::PAIR));
    }

    void pack_keys(const Keys& keys, const RagRequest& r, int head) {
        typedef typename E::type type;
        const type* pool = static_cast<const type*>(c.k) + head * c.k_head;
        word spare[LANES][WIDEST + 16];
        const bool in_place = (T::PAIR == 2 || std::is_same<E, Float>::value) && words == padded_words;
        for (int from = 0; from < keys.count; from += LANES) {
            const word* rows[LANES];
            for (int i = 0; i < LANES; i++) {
                if (from + i >= keys.count) {
                    std::memset(spare[i], 0, size_t(padded_words) * 4);
                    rows[i] = spare[i];
                    continue;
                }
                const type* key = pool + r.slots[keys.at[from + i]] * c.k_slot;
                if (in_place) {
                    rows[i] = reinterpret_cast<const word*>(key);
                } else {
                    put_row<T, E>(key, dim, spare[i], padded_words);
                    rows[i] = spare[i];
                }
            }
            put_columns(rows, words, padded_words,
                        kp + long(from / PANEL) * padded_words * PANEL + from % PANEL);
        }
    }

    void pack_values(const Keys& keys, const RagRequest& r, int head) {
        typedef typename E::type type;
        const type* pool = static_cast<const type*>(c.v) + head * c.v_head;
        const long panel_words = long(STEP / T::PAIR) * PANEL;
        for (int from = 0; from < keys.count; from += T::PAIR) {
            const type* one = pool + r.slots[keys.at[from]] * c.v_slot;
            const type* two =
                from + 1 < keys.count ? pool + r.slots[keys.at[from + 1]] * c.v_slot : nullptr;
            for (int p = 0; p < panels; p++) {
                word* to = vp + p * panel_words + long(from / T::PAIR) * PANEL;
                const int lo = p * PANEL, n = std::min(dim - lo, PANEL);
                if constexpr (T::PAIR == 2) {
                    if (two != nullptr)
                        for (int i = 0; i < n; i++) to[i] = uint32_t(one[lo + i]) | uint32_t(two[lo + i]) << 16;
                    else
                        for (int i = 0; i < n; i++) to[i] = uint32_t(one[lo + i]);
                } else {
                    for (int i = 0; i < n; i++) to[i] = to_bits(E::get(one[lo + i]));
                }
                for (int i = n; i < PANEL; i++) to[i] = 0;
            }
        }
        // A pair or a vector of weights may reach behind the last key; its weights are 0, and so are the values.
        for (int at = (keys.count + T::PAIR - 1) / T::PAIR; at < up(keys.count, LANES) / T::PAIR; at++)
            for (int p = 0; p < panels; p++)
                std::memset(vp + p * panel_words + long(at) * PANEL, 0, PANEL * 4);
    }

    // The mask's row for a row of the tile, of query head `h` of the group
    const uint8_t* mask_row(const RagRequest& r, int kv_head, int h, int32_t position) const {
        const int64_t head = r.mask_heads == 1 ? 0 : r.mask_heads == c.kv_heads ? kv_head : kv_head * group + h;
        return r.allowed + (head * r.mask_rows + position / r.query_block - r.first_query_block) * r.mask_cols;
    }

    // Blocks of keys that some row of the tile reads
    void blocks_of(const Tile& t, const RagRequest& r, std::vector<uint8_t>& read) const {
        const int64_t last = c.positions[t.hi - 1] / r.key_block;
        read.assign(size_t(last) + 1, 0);
        const int heads = r.mask_heads == c.q_heads && r.mask_heads != c.kv_heads ? group : 1;
        for (int row = t.lo; row < t.hi; row++) {
            const int32_t p = c.positions[row];
            const int64_t own = p / r.key_block;
            read[size_t(own)] = 1;
            const bool is_new = row == t.lo || p / r.query_block != c.positions[row - 1] / r.query_block;
            if (!is_new && own == c.positions[row - 1] / r.key_block) continue;
            for (int h = 0; h < heads; h++) {
                const uint8_t* allowed = mask_row(r, t.head, h, p);
                for (int64_t b = 0; b < own; b++) read[size_t(b)] |= allowed[b];
            }
        }
    }

    // Hide the keys that a mask keeps from a row; returns whether any is left.
    bool hide(const Keys& keys, const uint8_t* allowed, int64_t own, int lo, int hi, float* logits) const {
        bool any = false;
        for (int i = 0; i < keys.num_pieces; i++) {
            const auto& piece = keys.pieces[i];
            const int from = std::max(lo, piece.lo), to = std::min(hi, piece.hi);
            if (from >= to) continue;
            if (piece.block == own || allowed[piece.block])
                any = true;
            else if (logits != nullptr)
                std::fill(logits + from, logits + to, NEG_INF);
        }
        return any;
    }

    void run(const Tile& t) {
        const RagRequest& r = c.requests[t.request];
        const int rows = t.hi - t.lo, count = rows * group;  // group row i: head i / rows, row i % rows
        word* queries = s.q.get<word>(size_t(count) * words);
        for (int i = 0; i < count; i++) {
            const int64_t row = t.lo + i % rows;
            const int64_t from = c.order == nullptr ? row : c.order[row];
            put_query(from * c.q_row + (t.head * group + i / rows) * c.q_head, queries + long(i) * words);
        }
        const long ldo = long(panels) * PANEL;
        float* sums = s.sums.get<float>(size_t(count) * (ldo + 2));
        float *most = sums + count * ldo, *total = most + count;
        std::memset(sums, 0, size_t(count) * ldo * 4);
        std::fill(most, most + count, NEG_INF);
        std::fill(total, total + count, 0.0f);
        if (c.sinks != nullptr)  // a key read before all others; logits are scaled below where no cap was in the way
            for (int i = 0; i < count; i++) {
                most[i] = c.sinks[t.head * group + i / rows] / (c.cap > 0 ? 1.0f : c.scale);
                total[i] = 1.0f;
            }

        const int32_t last = c.positions[t.hi - 1];
        const int32_t window = int32_t(c.window);
        // Steps start at multiples of STEP, so that the sums of a row do not depend on its neighbours.
        int32_t next = window > 0 ? std::max(0, c.positions[t.lo] - window + 1) / STEP * STEP : 0;
        std::vector<uint8_t> read;
        if (r.allowed != nullptr) blocks_of(t, r, read);
        Keys keys;
        while (next <= last) {
            keys.count = 0;
            keys.num_pieces = 0;
            keys.is_run = true;
            while (keys.count < STEP && next <= last) {
                if (r.allowed != nullptr) {
                    const int64_t block = next / r.key_block;
                    const int32_t stop = int32_t(std::min<int64_t>((block + 1) * r.key_block, int64_t(last) + 1));
                    if (!read[size_t(block)]) {
                        next = stop;
                        continue;
                    }
                    if (keys.count > 0 && keys.at[keys.count - 1] != next - 1) keys.is_run = false;
                    const int from = keys.count;
                    while (next < stop && keys.count < STEP) keys.at[keys.count++] = next++;
                    keys.pieces[keys.num_pieces++] = {from, keys.count, block};
                } else {
                    while (keys.count < STEP && next <= last) keys.at[keys.count++] = next++;
                }
            }
            if (keys.count == 0) break;
            pack_keys(keys, r, t.head);
            pack_values(keys, r, t.head);
            for (int i = 0; i < count; i += MR) step(t, r, keys, queries, sums, most, total, i, std::min(MR, count - i));
        }
        finish(t, sums, total, ldo);
    }

    void step(const Tile& t, const RagRequest& r, const Keys& keys, const word* queries, float* sums, float* most,
              float* total, int first, int n) {
        const int rows = t.hi - t.lo;
        alignas(64) float logits[MR][STEP];
        alignas(64) word weights[MR][STEP / T::PAIR];
        const uint8_t* allowed[MR];
        int32_t own[MR];
        int from[MR], to[MR], lo = STEP, hi = 0;
        bool is_read[STEP / PANEL] = {};
        for (int i = 0; i < n; i++) {
            const int32_t p = c.positions[t.lo + (first + i) % rows];
            to[i] = keys.upper(p);
            from[i] = c.window > 0 ? keys.upper(p - int32_t(c.window)) : 0;
            allowed[i] = nullptr;
            if (from[i] >= to[i]) continue;
            lo = std::min(lo, from[i]);
            hi = std::max(hi, to[i]);
            if (r.allowed != nullptr) {
                allowed[i] = mask_row(r, t.head, (first + i) / rows, p);
                own[i] = int32_t(p / r.key_block);
            }
            for (int panel = from[i] / PANEL; panel * PANEL < to[i]; panel++)
                is_read[panel] = is_read[panel] || r.allowed == nullptr ||
                                 hide(keys, allowed[i], own[i], std::max(from[i], panel * PANEL),
                                      std::min(to[i], (panel + 1) * PANEL), nullptr);
        }
        if (lo >= hi) return;
        const int begin = lo / PANEL * PANEL, end = up(hi, LANES);
        for (int at = begin; at < end; at += PANEL) {
            if (!is_read[at / PANEL]) continue;
            product_for<T>(n, std::min(PANEL, end - at) / LANES)(
                queries + long(first) * words, words, kp + long(at / PANEL) * padded_words * PANEL, words,
                &logits[0][at], STEP, false);
        }
        const long ldo = long(panels) * PANEL;
        for (int i = 0; i < n; i++) {
            float* x = logits[i];
            if (c.cap > 0)
                for (int at = begin; at < end; at++) x[at] = c.cap * std::tanh(x[at] * c.scale / c.cap);
            const float unit = (c.cap > 0 ? 1.0f : c.scale) * 1.44269504f;
            if (allowed[i] != nullptr) hide(keys, allowed[i], own[i], from[i], to[i], x);
            const int a = std::max(begin, std::min(from[i], end)), b = std::max(a, std::min(to[i], end));
            std::fill(x + begin, x + a, NEG_INF);
            std::fill(x + b, x + end, NEG_INF);
            vf peak = all(NEG_INF);
            for (int at = begin; at < end; at += LANES)
                if (is_read[at / PANEL]) peak = max_of(peak, load(x + at));
            const float now = std::max(most[first + i], max_across(peak));
            word* w = weights[i];
            if (now == NEG_INF) {  // nothing read so far
                std::memset(w + begin / T::PAIR, 0, size_t(end - begin) / T::PAIR * 4);
                continue;
            }
            const vf shift = all(now * unit);
            vf sum = {};
            for (int at = begin; at < end; at += LANES) {
                if (!is_read[at / PANEL]) continue;
                const vf e = exp2_of(load(x + at) * unit - shift);
                sum += e;
                put_weights(w, at, e);
            }
            if (now > most[first + i]) {
                const float keep = std::exp2((most[first + i] - now) * unit);  // 0 at first
                most[first + i] = now;
                total[first + i] *= keep;
                float* o = sums + (first + i) * ldo;
                for (int d = 0; d < padded_dim; d += LANES) store(o + d, load(o + d) * keep);
            }
            total[first + i] += sum_across(sum);
        }
        for (int at = begin; at < end;) {
            if (!is_read[at / PANEL]) {
                at = (at / PANEL + 1) * PANEL;
                continue;
            }
            int stop = at;
            while (stop < end && is_read[stop / PANEL]) stop = std::min(end, (stop / PANEL + 1) * PANEL);
            for (int p = 0; p < panels; p++)
                product_for<T>(n, std::min(PANEL, padded_dim - p * PANEL) / LANES)(
                    weights[0] + at / T::PAIR, STEP / T::PAIR,
                    vp + (long(p) * (STEP / T::PAIR) + at / T::PAIR) * PANEL, (stop - at) / T::PAIR,
                    sums + first * ldo + p * PANEL, ldo, true);
            at = stop;
        }
    }

    static void put_weights(word* w, int at, vf e) {
#ifdef HAS_BF16
        if constexpr (T::PAIR == 2) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(w + at / 2), (__m256i)_mm512_cvtneps_pbh((__m512)e));
            return;
        }
#endif
        store(w + at, e);
    }

    template <class Q>
    void put_query_as(int64_t at, word* to) const {
        put_row<T, Q>(static_cast<const typename Q::type*>(c.q) + at, dim, to, words);
    }

    void put_query(int64_t at, word* to) const {
        if constexpr (T::PAIR == 2) {
            put_query_as<BFloat>(at, to);
        } else {
            if (c.q_type == FLOAT) put_query_as<Float>(at, to);
            if (c.q_type == BFLOAT) put_query_as<BFloat>(at, to);
            if (c.q_type == HALF) put_query_as<Half>(at, to);
        }
    }

    template <class Q>
    void finish_as(int64_t at, const float* sums, float share) const {
        typename Q::type* out = static_cast<typename Q::type*>(c.out) + at;
        for (int d = 0; d < dim; d++) out[d] = Q::put(sums[d] * share);
    }

    void finish(const Tile& t, const float* sums, const float* total, long ldo) const {
        const int rows = t.hi - t.lo;
        for (int i = 0; i < rows * group; i++) {
            const int64_t row = t.lo + i % rows;
            const int64_t to = c.order == nullptr ? row : c.order[row];
            const int64_t at = (to * c.q_heads + t.head * group + i / rows) * dim;
            if (c.q_type == FLOAT) finish_as<Float>(at, sums + i * ldo, 1.0f / total[i]);
            if (c.q_type == BFLOAT) finish_as<BFloat>(at, sums + i * ldo, 1.0f / total[i]);
            if (c.q_type == HALF) finish_as<Half>(at, sums + i * ldo, 1.0f / total[i]);
        }
    }
};

template <class T, class E>
int attend(const RagCall& c) {
    const std::vector<Tile> tiles = cut(c, int(c.q_heads / c.kv_heads));
    std::atomic<size_t> next{0};
    in_parallel(int(std::min<int64_t>(c.threads, int64_t(tiles.size()))), [&] {
        static thread_local Scratch scratch;
        Worker<T, E> worker(c, scratch);
        for (size_t i; (i = next.fetch_add(1)) < tiles.size();) worker.run(tiles[i]);
    });
    return 0;
}

}  // namespace

extern "C" int rag_attend(const RagCall* call) {
    if (call->q_type < FLOAT || call->q_type > HALF) return 1;
    switch (call->kv_type) {
        case FLOAT: return attend<InFloat, Float>(*call);
        case HALF: return attend<InFloat, Half>(*call);
        case BFLOAT:
#ifdef HAS_BF16
            if (call->q_type == BFLOAT && call->dim % 2 == 0) return attend<InBFloat, BFloat>(*call);
#endif
            return attend<InFloat, BFloat>(*call);
    }
    return 1;
}
