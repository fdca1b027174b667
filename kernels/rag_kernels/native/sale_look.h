// The walk of SALE over the keys: which blocks of keys a group of row blocks keeps.
//
// A strip of keys stays in the first-level cache while all heads and blocks of a group look at it, ROWS rows at a
// time, and each of them leaves it as soon as every block of keys in it is kept. Products are never stored.
#pragma once
#include "sale_rows.h"

namespace rag {

class Walk {
    const SaleKeys& keys;
    const SaleKeys::Pack& pack;
    const int64_t candidates;
    const int width;            // of the rows as they are packed

public:
    Walk(const SaleKeys& all_keys, const SaleKeys::Pack& own, int64_t num_candidates, int padded_width)
        : keys(all_keys), pack(own), candidates(num_candidates), width(padded_width) {}

    // `limits` has room for [looking.size()][PANEL]; means are [looking.size()][dim], the other numbers likewise.
    void look_at(const std::vector<Looking>& looking, const RowNumbers& all_rows, float* limits) const {
        const int count = int(looking.size()), dim = keys.dim;
        for (int64_t panel = 0; panel * PANEL < candidates; panel++) {
            const word* smooth = reinterpret_cast<const word*>(keys.panel_of(pack.head, panel));
            for (int m = 0; m < count; m += MR)
                product_for<InFloat>(std::min(MR, count - m), NV)(
                    reinterpret_cast<const word*>(all_rows.mean + long(m) * dim), dim, smooth, dim,
                    limits + long(m) * PANEL, PANEL, false);
            for (int at = 0; at < PANEL; at += STRIP) {
                const int64_t first = panel * PANEL + at;
                if (first >= candidates) break;
                for (int m = 0; m < count; m++) {
                    const Looking& look = looking[size_t(m)];
                    const uint32_t open = open_keys(look.allowed, first);
                    if (open == 0) continue;
                    const float* by_mean = limits + long(m) * PANEL + at;
                    const vf limit[2] = {look.smallest - load(by_mean), look.smallest - load(by_mean + LANES)};
                    const long own = long(m) * width;
                    look_at_strip(look, first, open, limit,
                                  {nullptr, all_rows.rows + own * keys.padded, all_rows.starts + own * (STOPS + 1),
                                   all_rows.norms + own / ROWS * STOPS});
                }
            }
        }
    }

private:
    void look_at_strip(const Looking& look, int64_t first, uint32_t open, const vf* limit, const RowNumbers& own) const {
        const key_number* strip = keys.strip_of(pack, first);
        const float* norms[STOPS];
        for (int stop = 0; stop < STOPS; stop++) norms[stop] = keys.norms_of(pack, stop, first);
        const vf unit = all(look.unit);
        // In units of the sums and less by one, as the sum of the rest is rounded: whatever comes of it stays a bound.
        const vf one = limit[0] / unit - 1.0f, two = limit[1] / unit - 1.0f;
        for (int i = 0; i < width; i += ROWS) {
            const row_number* rows = own.rows + long(i) * keys.padded;
            Sums sums(own.starts + i);
            sums.add(rows, 0, keys.stops[0], strip);
            bool is_open = true;
#pragma GCC unroll 2
            for (int stop = 0; stop < STOPS && is_open; stop++) {
                const vf rest = all(own.norms[(stop * width + i) / ROWS]);
                const uint32_t reached = above_of(sums.most(0), one - rest * load(norms[stop])) |
                                         above_of(sums.most(1), two - rest * load(norms[stop] + LANES)) << LANES;
                is_open = (reached & open) != 0;
                if (!is_open) break;
                sums.add(own.starts + (stop + 1) * width + i);
                sums.add(rows, keys.stops[stop], keys.stops[stop + 1], strip);
            }
            if (!is_open) continue;
            uint32_t found = above_of(sums.most(0) * unit, limit[0]) | above_of(sums.most(1) * unit, limit[1]) << LANES;
            for (found &= open; found != 0; found &= open) {
                const int64_t block = (first + __builtin_ctz(found)) / keys.c.key_block;
                look.allowed[block] = 1;
                open &= ~keys_of(block, first);
            }
            if (open == 0) return;
        }
    }

    // Keys of a block within a strip
    uint32_t keys_of(int64_t block, int64_t first) const {
        const int64_t from = std::max<int64_t>(block * keys.c.key_block - first, 0);
        const int64_t to = std::min<int64_t>((block + 1) * keys.c.key_block - first, STRIP);
        return uint32_t((uint64_t(1) << to) - (uint64_t(1) << from));
    }

    // Keys of a strip whose block is not kept yet
    uint32_t open_keys(const uint8_t* allowed, int64_t first) const {
        uint32_t open = 0;
        const int64_t end = std::min(first + STRIP, candidates);
        for (int64_t block = first / keys.c.key_block; block * keys.c.key_block < end; block++)
            if (!allowed[block]) open |= keys_of(block, first);
        return open;
    }
};

}  // namespace rag
