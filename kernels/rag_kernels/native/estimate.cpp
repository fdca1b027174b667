// The choice of SALE: estimated logits of blocks of rows against blocks of keys, compared with the rows' thresholds.
//
// A task is a group of row blocks that look at the same keys, with all query heads that share one key/value head. Its
// thresholds come from the first keys and the neighbourhood in full precision (sale_thresholds.h), its queries become
// 7-bit integers (sale_rows.h). Then it walks over the keys (sale_look.h), which were packed once for all tasks of a
// key/value head (sale_keys.h).
//
// sparse/sale/estimate.py has the formulas; the integers here are the same as there. Sums of products in fp32 may
// differ in the last bits, so a key exactly at a threshold may fall to the other side.
#include "sale_look.h"
#include "sale_thresholds.h"

namespace {

using namespace rag;

template <class T, class Q, class E>
void run_task(const SaleKeys& keys, int64_t head, int64_t index, SaleScratch& s) {
    const RagSale& c = keys.c;
    const RagSaleGroup& g = c.groups[index];
    const int64_t group = c.q_heads / c.kv_heads, num_blocks = g.candidates / c.key_block;
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
    const int dim = keys.dim, words = dim / T::PAIR, lanes = up(dim, LANES);
    const int width = int(g.width), padded_width = up(width, ROWS);
    const int count = int(looking.size()), all_rows = count * width;

    word* raw = s.raw.get<word>(size_t(all_rows) * words);
    float *thresholds = s.sums.get<float>(size_t(all_rows) + size_t(width) * lanes), *q = thresholds + all_rows;
    std::fill(q, q + size_t(width) * lanes, 0.0f);
    const auto query = [&](const Looking& look, int i) {
        const int64_t row = c.rows[g.first_row + look.block * width + i];
        return static_cast<const typename Q::type*>(c.q) + (c.order == nullptr ? row : c.order[row]) * c.q_row +
               look.head * c.q_head;
    };
    for (int i = 0; i < all_rows; i++)
        put_row<T, Q>(query(looking[size_t(i / width)], i % width), dim, raw + long(i) * words, words);
    std::vector<float> tau;
    for (const Looking& look : looking) tau.push_back(std::min(c.tau[look.head], c.largest_tau));
    Reference<T, E>(c, index, head, s).thresholds(raw, all_rows, thresholds, tau.data());

    const size_t packed = size_t(count) * padded_width;
    const RowNumbers all_numbers{s.means.get<float>(size_t(count) * dim), s.rows.get<row_number>(packed * keys.padded),
                                 s.starts.get<row_start>(packed * (STOPS + 1)),
                                 s.norms.get<float>(packed / ROWS * STOPS)};
    const SaleKeys::Pack& pack = keys.packs[size_t(keys.pack_of[size_t(head * c.num_groups + index)])];
    RowPacker packer(keys, pack, width);
    for (int m = 0; m < count; m++) {
        Looking& look = looking[size_t(m)];
        for (int i = 0; i < width; i++)
            put_row<InFloat, Q>(query(look, i), dim, reinterpret_cast<word*>(q + i * lanes), dim);
        const long first = long(m) * padded_width;
        const int64_t* rows = c.rows + g.first_row + look.block * width;
        int own = width;
        while (own > 1 && rows[own - 2] == rows[width - 1]) own--;
        packer.put(q, thresholds + m * width, own, look,
                   {all_numbers.mean + long(m) * dim, all_numbers.rows + first * keys.padded,
                    all_numbers.starts + first * (STOPS + 1), all_numbers.norms + first / ROWS * STOPS});
    }
    Walk(keys, pack, g.candidates, padded_width).look_at(looking, all_numbers, s.limits.get<float>(size_t(count) * PANEL));
}

template <class F>
void each(int64_t threads, int64_t count, F work) {
    std::atomic<int64_t> next{0};
    in_parallel(int(std::min(threads, count)), [&] {
        for (int64_t i; (i = next.fetch_add(1)) < count;) work(i);
    });
}

template <class T, class Q, class E>
int choose(const RagSale& c) {
    static thread_local SaleMemory memory;
    SaleKeys keys(c, memory);
    each(c.threads, c.kv_heads * keys.panels,
         [&](int64_t i) { keys.smooth_panel<E>(i / keys.panels, i % keys.panels); });
    keys.order_channels();
    keys.find_packs(memory);
    std::vector<std::pair<int, int64_t>> panels;
    for (size_t p = 0; p < keys.packs.size(); p++)
        for (int64_t i = 0; i < keys.packs[p].panels; i++) panels.push_back({int(p), i});
    each(c.threads, int64_t(panels.size()), [&](int64_t i) {
        keys.quantise_panel(keys.packs[size_t(panels[size_t(i)].first)], panels[size_t(i)].second);
    });
    // Long ones first, so that threads end together.
    struct Task { int64_t head, group, cost; };
    std::vector<Task> tasks;
    for (int64_t h = 0; h < c.kv_heads; h++)
        for (int64_t g = 0; g < c.num_groups; g++)
            tasks.push_back({h, g, c.groups[g].candidates * c.groups[g].blocks * c.groups[g].width});
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
    each(c.threads, int64_t(tasks.size()), [&](int64_t i) {
        static thread_local SaleScratch scratch;
        run_task<T, Q, E>(keys, tasks[size_t(i)].head, tasks[size_t(i)].group, scratch);
    });
    memory.give_back();
    return 0;
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
