// Keys of SALE's estimate: without their mean, then as integers, packed once for all rows of a key/value head.
#pragma once
#include "product.h"
#include "sale_integers.h"

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

namespace rag {

// Half powers of two, rounded up: what a head's keys are divided by
inline float unit_of(float largest) {
    if (!(largest > 0.0f)) return 1.0f;
    int exponent;
    const float part = std::frexp(largest, &exponent);
    const float step = part <= 0.5f ? 0.5f : part <= 0.70710678f ? 0.70710678f : 1.0f;
    return std::ldexp(step, exponent) / LARGEST;
}

// Channels are packed four by four, the largest first. Behind each of STOPS parts of them, what is left of a product is at
// most that of two norms: rows that no key can reach then need no more channels. Any order gives the same choice.
constexpr int STOPS = 2;

// Memory of one call, for the next one: new pages cost as much as what is written to them.
struct SaleMemory {
    static constexpr size_t MOST = size_t(256) << 20;  // bytes that stay; a prompt of 128k tokens takes twice as much
    Memory smooth, scales, strips, norms;

    void give_back() {
        Memory* parts[] = {&smooth, &strips, &scales, &norms};  // the largest first
        size_t held = 0;
        for (const Memory* part : parts) held += part->size;
        for (Memory* part : parts) {
            if (held <= MOST) return;
            held -= part->size;
            part->clear();
        }
    }
};

struct SaleKeys {
    const RagSale& c;
    const int dim, padded, lanes;
    const int stops[STOPS + 1];  // channels behind which is looked; the last are all
    int64_t num_keys = 0, panels;
    float *smooth, *scales;     // [kv_heads, panels][lanes][PANEL], [kv_heads, panels * PANEL]
    std::vector<int> fours;     // [kv_heads, padded / 4]: first channels of four, the largest first

    // The first panels of a head on one scale: that of the groups that look at no larger key
    struct Pack {
        int64_t head, panels, first;  // `first` counts the panels of the packs before
        float unit;
    };
    std::vector<Pack> packs;
    std::vector<int> pack_of;   // [kv_heads, groups]
    int64_t packed_panels = 0;
    key_number* strips;         // [packed_panels * PANEL / STRIP][padded][STRIP]
    float* norms;               // [STOPS, packed_panels * PANEL]: of the channels behind each stop

    SaleKeys(const RagSale& call, SaleMemory& memory)
        : c(call), dim(int(call.dim)), padded(up(dim, 4)), lanes(up(dim, 16)),
          stops{up(padded / 2, 4), up(padded * 3 / 4, 4), padded} {
        for (int64_t g = 0; g < c.num_groups; g++) num_keys = std::max(num_keys, c.groups[g].candidates);
        panels = (num_keys + PANEL - 1) / PANEL;
        const size_t keys = size_t(c.kv_heads * panels) * PANEL;
        smooth = memory.smooth.get<float>(keys * lanes);
        scales = memory.scales.get<float>(keys);
    }

    float* panel_of(int64_t head, int64_t panel) const { return smooth + (head * panels + panel) * lanes * PANEL; }
    int64_t place_of(int64_t head, int64_t key) const { return head * panels * PANEL + key; }
    const key_number* strip_of(const Pack& pack, int64_t first) const {
        return strips + (pack.first * PANEL + first) * padded;
    }
    const float* norms_of(const Pack& pack, int stop, int64_t first) const {
        return norms + (stop * packed_panels + pack.first) * PANEL + first;
    }

    // Keys without their mean, and their 4-bit scales
    template <class E>
    void smooth_panel(int64_t head, int64_t panel) {
        typedef typename E::type type;
        alignas(64) float mean[256 + 16] = {};
        alignas(64) word spare[LANES][256 + 16];
        std::copy(c.mean + head * dim, c.mean + (head + 1) * dim, mean);
        float *out = panel_of(head, panel), *scale = scales + place_of(head, panel * PANEL);
        const type* keys = static_cast<const type*>(c.k) + head * c.k_head;
        for (int from = 0; from < PANEL; from += LANES) {
            const word* rows[LANES];
            for (int i = 0; i < LANES; i++) {
                const int64_t position = std::min(panel * PANEL + from + i, num_keys - 1);
                put_row<InFloat, E>(keys + c.slots[position] * c.k_slot, dim, spare[i], lanes);
                vf largest = {};
                for (int d = 0; d < lanes; d += LANES) {
                    const vf x = load(spare[i] + d) - load(mean + d);
                    largest = max_of(largest, abs_of(x));
                    store(spare[i] + d, x);
                }
                scale[from + i] = max_across(largest) / INT4_MAX;
                rows[i] = spare[i];
            }
            put_columns(rows, dim, lanes, reinterpret_cast<word*>(out + from));
        }
    }

    void order_channels() {
        fours.resize(size_t(c.kv_heads * padded / 4));
        for (int64_t h = 0; h < c.kv_heads; h++) {
            std::vector<float> size(size_t(padded), 0.0f);
            for (int d = 0; d < dim; d++) {
                vf sum = {};
                for (int64_t p = 0; p < panels; p += 8)
                    for (int i = 0; i < PANEL; i += LANES) {
                        const vf x = load(panel_of(h, p) + long(d) * PANEL + i);
                        sum += x * x;
                    }
                size[size_t(d / 4 * 4)] += sum_across(sum);
            }
            int* own = fours.data() + h * padded / 4;
            for (int i = 0; i < padded / 4; i++) own[i] = 4 * i;
            std::stable_sort(own, own + padded / 4, [&](int a, int b) { return size[size_t(a)] > size[size_t(b)]; });
        }
    }

    // Which packs there are: a scale is that of the largest key that a group looks at, so it never falls.
    void find_packs(SaleMemory& memory) {
        for (int64_t h = 0; h < c.kv_heads; h++) {
            float largest = 0.0f;
            int64_t at = c.key_block;  // the size of the first keys says nothing of the others
            for (int64_t g = 0; g < c.num_groups; g++) {
                for (; at < c.groups[g].candidates; at++)
                    largest = std::max(largest, scales[place_of(h, at)] * INT4_MAX);
                const float unit = unit_of(largest);
                if (g == 0 || packs.back().unit != unit) packs.push_back({h, 0, 0, unit});
                packs.back().panels = (c.groups[g].candidates + PANEL - 1) / PANEL;
                pack_of.push_back(int(packs.size()) - 1);
            }
        }
        for (Pack& pack : packs) {
            pack.first = packed_panels;
            packed_panels += pack.panels;
        }
        strips = memory.strips.get<key_number>(size_t(packed_panels) * PANEL * padded);
        norms = memory.norms.get<float>(size_t(packed_panels) * PANEL * STOPS);
    }

    // 4-bit keys on the scale of a pack
    void quantise_panel(const Pack& pack, int64_t panel) {
        const float *x = panel_of(pack.head, panel), *scale = scales + place_of(pack.head, panel * PANEL);
        const int* first = fours.data() + pack.head * padded / 4;
        for (int at = 0; at < PANEL; at += LANES) {
            const int64_t place = (pack.first + panel) * PANEL + at;
            const vf own = load(scale + at), divisor = max_of(own, all(TINY)), whole = all(pack.unit);
            key_number* strip = strips + place / STRIP * STRIP * padded;
            vf squares[STOPS] = {};
            for (int d = 0; d < padded; d += 4) {
                vf four[4] = {};
                for (int i = 0; i < std::min(4, dim - first[d / 4]); i++) {
                    const vf number = load(x + long(first[d / 4] + i) * PANEL + at) / divisor;
                    four[i] = clamp_of(round_of(clamp_of(round_of(number), INT4_MAX) * own / whole), LARGEST);
                    for (int stop = 0; stop < STOPS; stop++)
                        if (d >= stops[stop]) squares[stop] += four[i] * four[i];
                }
                put_keys(four, d, at % STRIP, strip);
            }
            for (int stop = 0; stop < STOPS; stop++)
                for (int i = 0; i < LANES; i++)
                    norms[stop * packed_panels * PANEL + place + i] = std::sqrt(squares[stop][i]) * SLACK;
        }
    }
};

}  // namespace rag
