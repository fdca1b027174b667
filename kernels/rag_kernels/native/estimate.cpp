// The choice of SALE: estimated logits of blocks of rows against blocks of keys, compared with the rows' thresholds.
//
// A task is a group of row blocks that look at the same keys, with all query heads that share one key/value head. Its
// thresholds come from the first keys and the neighbourhood in full precision, its queries become 7-bit integers. Then
// it walks over the keys, which were packed once for all tasks of a key/value head: a strip of keys stays in the
// first-level cache while all heads and blocks look at it, ROWS rows at a time, and each of them leaves it as soon as
// every block of keys in it is kept. Products are never stored. Channels stand with the largest first: behind half of
// them the rest is at most the product of two norms, and where even that lifts no key above its threshold, it is not
// computed; the choice is the same.
//
// sparse/sale/estimate.py has the formulas; the integers here are the same as there. Sums of products in fp32 may
// differ in the last bits, so a key exactly at a threshold may fall to the other side.
#include "product.h"

// The same fields stand in library.py.
extern "C" {

struct RagSaleGroup {
    int64_t candidates, end;    // keys that are looked at, and one past the last row's position
    int64_t blocks, width;      // row blocks, and rows of each
    int64_t first_block, first_row;  // where they begin in the lists of RagSale
};

struct RagSale {
    const void *q, *k;
    const int64_t *order, *slots;  // query row of each sorted row, or null; slots by position
    const float *mean, *tau;    // [kv_heads, dim], [q_heads]
    const RagSaleGroup* groups;
    const int64_t *blocks;      // row of `allowed` of each row block
    const int64_t *rows, *positions;  // sorted row and its position, width of each row block
    uint8_t* allowed;           // [q_heads, mask_rows, mask_cols]: the candidates of these rows are written
    int64_t num_groups, mask_rows, mask_cols, key_block, q_row, q_head, k_slot, k_head;
    int64_t q_heads, kv_heads, dim, q_type, kv_type, threads;
    float scale, dense_tau, largest_tau;  // below dense_tau a head reads everything
};

}  // extern "C"

namespace {

using namespace rag;

constexpr int LARGEST = 127, INT4_MAX = 7;
constexpr float MOST_ABOVE = 3.0f * LARGEST * LARGEST;
constexpr float TINY = std::numeric_limits<float>::min();
constexpr int STRIP = 2 * LANES;  // keys of an inner loop; a PANEL is whole strips

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

// Keys of a strip and rows as integers, whichever way this CPU multiplies them best.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
constexpr int ROWS = 8;
typedef uint8_t key_number;   // plus 128: the instruction takes unsigned numbers on this side
typedef int8_t row_number;
typedef int32_t row_start;

// Four channels of LANES keys
inline void put_keys(const vf* x, int channel, int at, key_number* strip) {
    __m512i packed = _mm512_setzero_si512();
    for (int i = 3; i >= 0; i--)
        packed = _mm512_or_si512(_mm512_slli_epi32(packed, 8),
                                 _mm512_add_epi32(_mm512_cvtps_epi32((__m512)x[i]), _mm512_set1_epi32(128)));
    _mm512_storeu_si512(strip + (long(channel) * STRIP + at * 4), packed);
}

// What a row's products of unsigned keys are too large by
inline float excess_of(const row_number* row, int from, int to) {
    int32_t sum = 0;
    for (int i = from; i < to; i++) sum += row[i];
    return 128.0f * float(sum);
}

// Sums of ROWS rows with the keys of a strip
struct Sums {
    __m512i sum[ROWS][2];

    explicit Sums(const row_start* start) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = _mm512_set1_epi32(start[r]);
    }

    void add(const row_number* rows, int padded, int from, int to, const key_number* strip) {
        for (int d = from; d < to; d += 4) {
            const __m512i one = _mm512_load_si512(strip + d * STRIP), two = _mm512_load_si512(strip + d * STRIP + 64);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                int32_t four;
                std::memcpy(&four, rows + r * padded + d, 4);
                const __m512i row = _mm512_set1_epi32(four);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], one, row);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], two, row);
            }
        }
    }

    // The most of all rows for each key, with what each row adds
    void most(const row_start* more, vf* most) const {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512i top = _mm512_add_epi32(sum[0][i], _mm512_set1_epi32(more[0]));
#pragma GCC unroll 8
            for (int r = 1; r < ROWS; r++)
                top = _mm512_max_epi32(top, _mm512_add_epi32(sum[r][i], _mm512_set1_epi32(more[r])));
            most[i] = (vf)_mm512_cvtepi32_ps(top);
        }
    }

    void most(vf* most) const {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512i top = sum[0][i];
#pragma GCC unroll 8
            for (int r = 1; r < ROWS; r++) top = _mm512_max_epi32(top, sum[r][i]);
            most[i] = (vf)_mm512_cvtepi32_ps(top);
        }
    }
};
#else
// In fp32, where these integers and their sums are exact.
constexpr int ROWS = 4;
typedef float key_number;
typedef float row_number;
typedef float row_start;

inline void put_keys(const vf* x, int channel, int at, key_number* strip) {
    for (int i = 0; i < 4; i++) store(strip + long(channel + i) * STRIP + at, x[i]);
}

inline float excess_of(const row_number*, int, int) { return 0.0f; }

struct Sums {
    vf sum[ROWS][2];

    explicit Sums(const row_start* start) {
        for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = all(start[r]);
    }

    void add(const row_number* rows, int padded, int from, int to, const key_number* strip) {
        for (int d = from; d < to; d++) {
            const vf one = load(strip + d * STRIP), two = load(strip + d * STRIP + LANES);
            for (int r = 0; r < ROWS; r++) {
                sum[r][0] += one * rows[r * padded + d];
                sum[r][1] += two * rows[r * padded + d];
            }
        }
    }

    void most(const row_start* more, vf* most) const {
        for (int i = 0; i < 2; i++) {
            most[i] = sum[0][i] + more[0];
            for (int r = 1; r < ROWS; r++) most[i] = max_of(most[i], sum[r][i] + more[r]);
        }
    }

    void most(vf* most) const {
        for (int i = 0; i < 2; i++) {
            most[i] = sum[0][i];
            for (int r = 1; r < ROWS; r++) most[i] = max_of(most[i], sum[r][i]);
        }
    }
};
#endif

// Which keys of a strip are above their limit
inline uint32_t above_of(const vf* most, vf unit, const float* limit) {
    uint32_t found = 0;
    for (int i = 0; i < 2; i++) {
        const vf x = most[i] * unit;
#if defined(__AVX512F__)
        found |= uint32_t(_mm512_cmp_ps_mask((__m512)x, (__m512)load(limit + i * LANES), _CMP_GT_OQ)) << (i * LANES);
#else
        for (int l = 0; l < LANES; l++) found |= uint32_t(x[l] > limit[i * LANES + l]) << (i * LANES + l);
#endif
    }
    return found;
}

// Half powers of two, rounded up: what a head's keys are divided by
inline float unit_of(float largest) {
    if (!(largest > 0.0f)) return 1.0f;
    int exponent;
    const float part = std::frexp(largest, &exponent);
    const float step = part <= 0.5f ? 0.5f : part <= 0.70710678f ? 0.70710678f : 1.0f;
    return std::ldexp(step, exponent) / LARGEST;
}

struct Scratch {
    Memory raw, keys, sums, means, by_mean, rows, starts, rests;
};

// A row as integers: what its sum begins with, and the channels behind the half: norm, and what their products are too
// large by
struct Rest {
    float norm, excess;
};

template <class T, class Q, class E>
struct Sale {
    typedef typename E::type type;
    const RagSale& c;
    const int group, dim, padded, half, words, padded_words;
    int64_t num_keys = 0, panels;
    Memory smooth_of, scales_of, strips_of, norms_of;
    float *smooth, *scales;     // [kv_heads, panels][dim][PANEL], [kv_heads, panels * PANEL]
    key_number* strips;         // [kv_heads, panels * PANEL / STRIP][padded][STRIP]
    float* norms;               // [kv_heads, panels * PANEL / STRIP]: largest of the channels behind the half
    std::vector<float> units;   // [kv_heads, groups]
    std::vector<int> channels;  // [kv_heads, padded]: the largest first; dim and more: none

    explicit Sale(const RagSale& call)
        : c(call), group(int(call.q_heads / call.kv_heads)), dim(int(call.dim)), padded(up(dim, 4)),
          half(up(padded / 2, 4)), words(dim / T::PAIR), padded_words(up(words, 16)) {
        for (int64_t g = 0; g < c.num_groups; g++) num_keys = std::max(num_keys, c.groups[g].candidates);
        panels = (num_keys + PANEL - 1) / PANEL;
        const size_t keys = size_t(c.kv_heads * panels) * PANEL;
        smooth = smooth_of.get<float>(keys * dim);
        scales = scales_of.get<float>(keys);
        strips = strips_of.get<key_number>(keys * padded);
        norms = norms_of.get<float>(keys / STRIP);
    }

    const type* key(int64_t head, int64_t position) const {
        return static_cast<const type*>(c.k) + head * c.k_head + c.slots[position] * c.k_slot;
    }

    // Keys without their mean, and their 4-bit scales
    void smooth_panel(int64_t head, int64_t panel) {
        alignas(64) float spare[LANES][256 + 16];
        const float* mean = c.mean + head * dim;
        float *out = smooth + (head * panels + panel) * dim * PANEL, *scale = scales + (head * panels + panel) * PANEL;
        for (int from = 0; from < PANEL; from += LANES) {
            for (int i = 0; i < LANES; i++) {
                const int64_t position = std::min(panel * PANEL + from + i, num_keys - 1);
                const type* x = key(head, position);
                float largest = 0.0f;
                for (int d = 0; d < dim; d++) {
                    spare[i][d] = E::get(x[d]) - mean[d];
                    largest = std::max(largest, std::fabs(spare[i][d]));
                }
                scale[from + i] = largest / INT4_MAX;
            }
            for (int d = 0; d < dim; d++)
                for (int i = 0; i < LANES; i++) out[long(d) * PANEL + from + i] = spare[i][d];
        }
    }

    // Any order gives the same choice; the fewer keys are left at the half, the faster.
    void order_channels() {
        channels.resize(size_t(c.kv_heads * padded));
        for (int64_t h = 0; h < c.kv_heads; h++) {
            std::vector<float> size(size_t(padded), -1.0f);
            for (int d = 0; d < dim; d++) {
                vf sum = {};
                for (int64_t p = 0; p < panels; p += 8)
                    for (int i = 0; i < PANEL; i += LANES) {
                        const vf x = load(smooth + ((h * panels + p) * dim + d) * PANEL + i);
                        sum += x * x;
                    }
                size[size_t(d)] = sum_across(sum);
            }
            int* own = channels.data() + h * padded;
            for (int d = 0; d < padded; d++) own[d] = d;
            std::stable_sort(own, own + padded, [&](int a, int b) { return size[size_t(a)] > size[size_t(b)]; });
        }
    }

    void find_units() {
        units.assign(size_t(c.kv_heads * c.num_groups), 1.0f);
        for (int64_t h = 0; h < c.kv_heads; h++) {
            float largest = 0.0f;
            int64_t at = c.key_block;  // the size of the first keys says nothing of the others
            for (int64_t g = 0; g < c.num_groups; g++) {
                for (; at < c.groups[g].candidates; at++)
                    largest = std::max(largest, scales[h * panels * PANEL + at] * INT4_MAX);
                units[size_t(h * c.num_groups + g)] = unit_of(largest);
            }
        }
    }

    // 4-bit keys on one scale
    void quantise_panel(int64_t head, int64_t panel, float unit) {
        const float *x = smooth + (head * panels + panel) * dim * PANEL, *scale = scales + (head * panels + panel) * PANEL;
        for (int at = 0; at < PANEL; at += LANES) {
            const vf own = load(scale + at), divisor = max_of(own, all(TINY)), whole = all(unit);
            key_number* strip = strips + ((head * panels + panel) * PANEL + at / STRIP * STRIP) * padded;
            const int* channel = channels.data() + head * padded;
            vf squares = {};
            for (int d = 0; d < padded; d += 4) {
                vf lanes[4] = {};
                for (int i = 0; i < 4; i++) {
                    if (channel[d + i] >= dim) continue;
                    const vf four = clamp_of(round_of(load(x + long(channel[d + i]) * PANEL + at) / divisor), INT4_MAX);
                    lanes[i] = clamp_of(round_of(four * own / whole), LARGEST);
                    if (d >= half) squares += lanes[i] * lanes[i];
                }
                put_keys(lanes, d, at % STRIP, strip);
            }
            float& norm = norms[((head * panels + panel) * PANEL + at) / STRIP];
            const float found = std::sqrt(max_across(squares)) * (1.0f + 1e-5f);
            norm = at % STRIP == 0 ? found : std::max(norm, found);
        }
    }

    // Query blocks of one task: heads of the group that look, times its row blocks
    struct Looking {
        int64_t head, block;    // query head, and which block of the group
        uint8_t* allowed;
        float unit, smallest;
    };

    // Largest logit and sum of the rows with the keys from .. to - 1, those before them added
    void add_reference(const RagSaleGroup& g, int64_t head, int64_t from, int64_t to, int count, const word* raw,
                       float* most, float* total, Scratch& s) const {
        word* keys = s.keys.get<word>(size_t(padded_words) * PANEL);
        word spare[LANES][256 + 16];
        const float unit = c.scale * 1.44269504f;
        const int width = int(g.width), all_rows = int(g.blocks * g.width);
        const int64_t* positions = c.positions + g.first_row;
        alignas(64) float logits[MR][PANEL];
        for (int64_t first = from; first < to; first += PANEL) {
            for (int at = 0; at < PANEL; at += LANES) {
                const word* rows[LANES];
                for (int i = 0; i < LANES; i++) {
                    rows[i] = spare[i];
                    put_row<T, E>(key(head, std::min(first + at + i, to - 1)), dim, spare[i], padded_words);
                }
                put_columns(rows, words, padded_words, keys + at);
            }
            for (int begin = 0; begin < count; begin += width)
                for (int i = begin; i < begin + width; i += MR) {
                    const int n = std::min(MR, begin + width - i);
                    if (positions[(i + n - 1) % all_rows] < first) continue;
                    product_for<T>(n, NV)(raw + long(i) * words, words, keys, words, logits[0], PANEL, false);
                    for (int r = 0; r < n; r++) {
                        float* x = logits[r];
                        const int64_t last = std::min(positions[(i + r) % all_rows] + 1, to);
                        const int seen = int(std::clamp<int64_t>(last - first, 0, PANEL));
                        if (seen == 0) continue;
                        std::fill(x + seen, x + PANEL, NEG_INF);
                        vf peak = all(most[i + r]), sum = {};
                        for (int at = 0; at < PANEL; at += LANES) peak = max_of(peak, load(x + at));
                        const float now = max_across(peak);
                        const vf shift = all(now * unit);
                        for (int at = 0; at < PANEL; at += LANES) sum += exp2_of(load(x + at) * unit - shift);
                        if (now > most[i + r]) total[i + r] *= std::exp2((most[i + r] - now) * unit);
                        most[i + r] = now;
                        total[i + r] += sum_across(sum);
                    }
                }
        }
    }

    // Queries of one block of rows, up(dim, LANES) numbers each, as integers, the lowest thresholds first
    void put_queries(const float* q, float* threshold, int width, int padded_width, int64_t head, float key_unit,
                     Looking& look, float* mean, row_number* rows, row_start* starts, Rest* rests, float* x) const {
        const int lanes = up(dim, LANES);
        for (int d = 0; d < dim; d++) {
            double sum = 0.0;
            for (int i = 0; i < width; i++) sum += q[i * lanes + d];
            mean[d] = float(sum / width);
        }
        float mean_q[256 + 16] = {}, mean_k[256 + 16] = {};
        std::copy(mean, mean + dim, mean_q);
        std::copy(c.mean + head * dim, c.mean + (head + 1) * dim, mean_k);
        vf largest = {};
        look.smallest = std::numeric_limits<float>::infinity();
        for (int i = 0; i < width; i++) {
            vf own = {}, by_mean = {};
            for (int d = 0; d < lanes; d += LANES) {
                const vf from = load(q + i * lanes + d), smooth_q = from - load(mean_q + d);
                by_mean += from * load(mean_k + d);
                own = max_of(own, max_of(smooth_q, -smooth_q));
                store(x + i * lanes + d, smooth_q);
            }
            const float scale = max_across(own) / INT4_MAX;
            const vf divisor = all(std::max(scale, TINY));
            for (int d = 0; d < lanes; d += LANES) {
                const vf four = clamp_of(round_of(load(x + i * lanes + d) / divisor), INT4_MAX) * scale;
                largest = max_of(largest, max_of(four, -four));
                store(x + i * lanes + d, four);
            }
            threshold[i] -= sum_across(by_mean);
            look.smallest = std::min(look.smallest, threshold[i]);
        }
        const float unit = max_across(largest) > 0.0f ? max_across(largest) / LARGEST : 1.0f;
        look.unit = unit * key_unit;
        std::vector<int> order(size_t(width), 0);
        for (int i = 0; i < width; i++) order[size_t(i)] = i;
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return threshold[a] < threshold[b]; });
        const int* channel = channels.data() + head * padded;
        for (int i = 0; i < padded_width; i++) {
            const int from = order[size_t(std::min(i, width - 1))];
            row_number* row = rows + long(i) * padded;
            for (int d = 0; d < lanes; d += LANES) store(mean_q + d, round_of(load(x + from * lanes + d) / all(unit)));
            float squares = 0.0f;
            for (int d = 0; d < padded; d++) {
                const float number = channel[d] < dim ? mean_q[channel[d]] : 0.0f;
                row[d] = row_number(number);
                if (d >= half) squares += number * number;
            }
            const float above = std::min(std::nearbyint((threshold[from] - look.smallest) / look.unit), MOST_ABOVE);
            starts[i] = row_start(-above - excess_of(row, 0, padded));
            rests[i] = {std::sqrt(squares) * (1.0f + 1e-5f), excess_of(row, half, padded) + 1.0f};
        }
    }

    void run(int64_t head, int64_t index, Scratch& s) const {
        const RagSaleGroup& g = c.groups[index];
        const float key_unit = units[size_t(head * c.num_groups + index)];
        const int width = int(g.width), padded_width = up(width, ROWS);
        const int64_t num_blocks = g.candidates / c.key_block;
        std::vector<Looking> looking;
        for (int64_t h = head * group; h < (head + 1) * group; h++) {
            const bool looks = c.tau[h] >= c.dense_tau && !std::isinf(c.tau[h]);
            for (int64_t b = 0; b < g.blocks; b++) {
                uint8_t* allowed = c.allowed + (h * c.mask_rows + c.blocks[g.first_block + b]) * c.mask_cols;
                std::memset(allowed, c.tau[h] < c.dense_tau, size_t(num_blocks));
                allowed[0] = 1;
                if (looks) looking.push_back({h, b, allowed, 1.0f, 0.0f});
            }
        }
        if (looking.empty()) return;
        const int count = int(looking.size()), all_rows = count * width, lanes = up(dim, LANES);

        word* raw = s.raw.get<word>(size_t(all_rows) * words);
        float* most = s.sums.get<float>(size_t(all_rows) * 2 + size_t(width) * lanes * 2);
        float *total = most + all_rows, *q = total + all_rows, *x = q + size_t(width) * lanes;
        std::fill(q, q + size_t(width) * lanes, 0.0f);
        std::fill(most, most + all_rows, NEG_INF);
        std::fill(total, total + all_rows, 0.0f);
        const auto query = [&](const Looking& look, int i) {
            const int64_t row = c.rows[g.first_row + look.block * width + i];
            return static_cast<const typename Q::type*>(c.q) + (c.order == nullptr ? row : c.order[row]) * c.q_row +
                   look.head * c.q_head;
        };
        for (int i = 0; i < all_rows; i++)
            put_row<T, Q>(query(looking[size_t(i / width)], i % width), dim, raw + long(i) * words, words);
        add_reference(g, head, 0, c.key_block, all_rows, raw, most, total, s);
        add_reference(g, head, g.candidates, g.end, all_rows, raw, most, total, s);

        float* means = s.means.get<float>(size_t(count) * dim);
        row_number* rows = s.rows.get<row_number>(size_t(count) * padded_width * padded);
        row_start* starts = s.starts.get<row_start>(size_t(count) * padded_width);
        Rest* rests = s.rests.get<Rest>(size_t(count) * padded_width);
        for (int m = 0; m < count; m++) {
            float* threshold = most + m * width;
            const float tau = std::min(c.tau[looking[size_t(m)].head], c.largest_tau), log2_scale = c.scale * 1.44269504f;
            for (int i = 0; i < width; i++) {
                const typename Q::type* from = query(looking[size_t(m)], i);
                for (int d = 0; d < dim; d++) q[i * lanes + d] = Q::get(from[d]);
                threshold[i] += std::log2(total[m * width + i] * tau) / log2_scale;
            }
            const long first = long(m) * padded_width;
            put_queries(q, threshold, width, padded_width, head, key_unit, looking[size_t(m)], means + m * dim,
                        rows + first * padded, starts + first, rests + first, x);
        }
        look_at(head, g.candidates, padded_width, looking, means, rows, starts, rests, s);
    }

    void look_at(int64_t head, int64_t candidates, int width, const std::vector<Looking>& looking, const float* means,
                 const row_number* rows, const row_start* starts, const Rest* rests, Scratch& s) const {
        const int count = int(looking.size());
        float* limit = s.by_mean.get<float>(size_t(count) * PANEL);
        for (int64_t panel = 0; panel * PANEL < candidates; panel++) {
            const word* keys = reinterpret_cast<const word*>(smooth + (head * panels + panel) * dim * PANEL);
            for (int m = 0; m < count; m += MR)
                product_for<InFloat>(std::min(MR, count - m), NV)(reinterpret_cast<const word*>(means + m * dim), dim,
                                                                  keys, dim, limit + m * PANEL, PANEL, false);
            for (int at = 0; at < PANEL; at += STRIP) {
                const int64_t first = panel * PANEL + at;
                if (first >= candidates) break;
                const key_number* strip = strips + (head * panels * PANEL + first) * padded;
                for (int m = 0; m < count; m++) {
                    const Looking& look = looking[size_t(m)];
                    const uint32_t open = open_keys(look.allowed, first, candidates);
                    if (open == 0) continue;
                    float* own = limit + m * PANEL + at;
                    for (int i = 0; i < STRIP; i += LANES) store(own + i, look.smallest - load(own + i));
                    look_at_strip(look, first, open, width, own, strip, norms[(head * panels * PANEL + first) / STRIP],
                                  rows + long(m) * width * padded, starts + long(m) * width, rests + long(m) * width);
                }
            }
        }
    }

    void look_at_strip(const Looking& look, int64_t first, uint32_t open, int width, const float* limit,
                       const key_number* strip, float norm, const row_number* rows, const row_start* starts,
                       const Rest* rests) const {
        const vf unit = all(look.unit);
        for (int i = 0; i < width && open != 0; i += ROWS) {
            vf most[2];
            alignas(64) row_start rest[ROWS];
            for (int r = 0; r < ROWS; r++) rest[r] = row_start(rests[i + r].norm * norm + rests[i + r].excess);
            Sums sums(starts + i);
            sums.add(rows + long(i) * padded, padded, 0, half, strip);
            sums.most(rest, most);
            if ((above_of(most, unit, limit) & open) == 0) continue;
            sums.add(rows + long(i) * padded, padded, half, padded, strip);
            sums.most(most);
            for (uint32_t found = above_of(most, unit, limit) & open; found != 0; found &= open) {
                const int64_t block = (first + __builtin_ctz(found)) / c.key_block;
                look.allowed[block] = 1;
                open &= ~keys_of(block, first);
            }
        }
    }

    // Keys of a block within a strip
    uint32_t keys_of(int64_t block, int64_t first) const {
        const int64_t from = std::max<int64_t>(block * c.key_block - first, 0);
        const int64_t to = std::min<int64_t>((block + 1) * c.key_block - first, STRIP);
        return uint32_t((uint64_t(1) << to) - (uint64_t(1) << from));
    }

    // Keys of a strip whose block is not kept yet
    uint32_t open_keys(const uint8_t* allowed, int64_t first, int64_t candidates) const {
        uint32_t open = 0;
        const int64_t end = std::min(first + STRIP, candidates);
        for (int64_t block = first / c.key_block; block * c.key_block < end; block++)
            if (!allowed[block]) open |= keys_of(block, first);
        return open;
    }
};

template <class F>
void each(int64_t threads, int64_t count, F work) {
    std::atomic<int64_t> next{0};
    in_parallel(int(std::min(threads, count)), [&] {
        for (int64_t i; (i = next.fetch_add(1)) < count;) work(i);
    });
}

template <class T, class Q, class E>
int choose(const RagSale& c) {
    typedef Sale<T, Q, E> Choice;
    Choice choice(c);
    each(c.threads, c.kv_heads * choice.panels,
         [&](int64_t i) { choice.smooth_panel(i / choice.panels, i % choice.panels); });
    choice.find_units();
    choice.order_channels();
    // Keys are packed for one scale at a time: that of the first groups of each head, then the next larger.
    struct Task { int64_t head, group, cost; };
    std::vector<int64_t> done(size_t(c.kv_heads), 0);
    for (;;) {
        std::vector<Task> tasks, packs;
        for (int64_t h = 0; h < c.kv_heads; h++) {
            int64_t g = done[size_t(h)];
            if (g == c.num_groups) continue;
            const float* units = choice.units.data() + h * c.num_groups;
            const float unit = units[g];
            for (; g < c.num_groups && units[g] == unit; g++)
                tasks.push_back({h, g, c.groups[g].candidates * c.groups[g].blocks * c.groups[g].width});
            for (int64_t p = 0; p * PANEL < c.groups[g - 1].candidates; p++) packs.push_back({h, g - 1, p});
            done[size_t(h)] = g;
        }
        if (tasks.empty()) return 0;
        each(c.threads, int64_t(packs.size()), [&](int64_t i) {
            const Task& t = packs[size_t(i)];
            choice.quantise_panel(t.head, t.cost, choice.units[size_t(t.head * c.num_groups + t.group)]);
        });
        std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
        each(c.threads, int64_t(tasks.size()), [&](int64_t i) {
            static thread_local Scratch scratch;
            choice.run(tasks[size_t(i)].head, tasks[size_t(i)].group, scratch);
        });
    }
}

template <class E>
int choose_for(const RagSale& c) {
    switch (c.q_type) {
        case FLOAT: return choose<InFloat, Float, E>(c);
        case HALF: return choose<InFloat, Half, E>(c);
        case BFLOAT: return choose<InFloat, BFloat, E>(c);
    }
    return 1;
}

}  // namespace

extern "C" int rag_sale(const RagSale* call) {
    if (call->num_groups == 0) return 0;
    switch (call->kv_type) {
        case FLOAT: return choose_for<Float>(*call);
        case HALF: return choose_for<Half>(*call);
        case BFLOAT:
#ifdef HAS_BF16
            if (call->q_type == BFLOAT && call->dim % 2 == 0) return choose<InBFloat, BFloat, BFloat>(*call);
#endif
            return choose_for<BFloat>(*call);
    }
    return 1;
}
