// What a layer does to each of its rows beside products and attention: norm, rotation of queries and keys, gated unit.
//
// In torch each of them is several operations, and on few rows an operation takes longer to begin than to compute, on one
// thread. Here each is one call, and the rows are shared out.
#include "numbers.h"

// The same fields stand in library.py.
extern "C" {

struct RagNorm {
    const void *x, *residual, *weight;  // [rows, dim]; residual null: none
    void *out, *sums;                   // [rows, dim]; sums of x and residual, null without
    int64_t rows, dim, x_row, residual_row, type, threads;  // strides in numbers; out and sums lie in one piece
    float eps;
};

struct RagTurn {
    const void *q, *k, *table;          // [rows, heads * dim], table [positions, rotary_dim]: cosines, then sines
    void *q_out, *k_out;                // in one piece
    const int64_t* positions;
    int64_t rows, table_rows, q_row, k_row, q_heads, k_heads, dim, rotary_dim, is_neox, type, threads;
};

struct RagGate {
    const void* x;                      // [rows, 2 * dim]: gate, then what it lets through
    void* out;                          // [rows, dim], in one piece
    int64_t rows, dim, x_row, type, threads;
};

}  // extern "C"

namespace {

using namespace rag;

// Numbers for which a further thread is worth waking: a thread that sleeps takes as long to wake as this does in one.
constexpr int64_t FEWEST = 65536;

template <class F>
void for_rows(int64_t rows, int64_t width, int64_t threads, F work) {
    const int64_t team = std::max<int64_t>(1, std::min({threads, rows, rows * width / FEWEST}));
    std::atomic<int64_t> next{0};
    const int64_t part = std::max<int64_t>(1, rows / (4 * team));
    in_parallel(int(team), [&] {
        static thread_local Memory of;
        float* scratch = of.get<float>(size_t(up(int(width), LANES)));
        for (int64_t lo; (lo = next.fetch_add(part)) < rows;)
            for (int64_t row = lo; row < std::min(rows, lo + part); row++) work(row, scratch);
    });
}

// Loops of their own: inside others the compiler fears that what is written are their bounds, and takes number by number.
template <class E>
void read(const typename E::type* __restrict from, int count, float* __restrict to) {
    for (int i = 0; i < count; i++) to[i] = E::get(from[i]);
}

template <class E>
void add(const typename E::type* __restrict from, int count, float* __restrict to) {
    for (int i = 0; i < count; i++) to[i] += E::get(from[i]);
}

template <class E>
void write(const float* __restrict from, int count, typename E::type* __restrict to) {
    for (int i = 0; i < count; i++) to[i] = E::put(from[i]);
}

template <class E>
float rounded(float x) { return E::get(E::put(x)); }

// x * factor, rounded or not, times y
template <class E, bool ROUNDS>
void times(const float* __restrict x, float factor, const typename E::type* __restrict y, int count,
           typename E::type* __restrict to) {
    for (int i = 0; i < count; i++) {
        const float one = x[i] * factor;
        to[i] = E::put((ROUNDS ? rounded<E>(one) : one) * E::get(y[i]));
    }
}

template <class E>
void norm(const RagNorm& c) {
    typedef typename E::type type;
    const int dim = int(c.dim);
    for_rows(c.rows, c.dim, c.threads, [&, dim](int64_t row, float* x) {
        const type* from = static_cast<const type*>(c.x) + row * c.x_row;
        read<E>(from, dim, x);
        if (c.residual != nullptr) {
            add<E>(static_cast<const type*>(c.residual) + row * c.residual_row, dim, x);
            write<E>(x, dim, static_cast<type*>(c.sums) + row * c.dim);
        }
        vf squares = {};
        int at = 0;
        for (; at + LANES <= dim; at += LANES) squares += load(x + at) * load(x + at);
        float sum = sum_across(squares);
        for (; at < dim; at++) sum += x[at] * x[at];
        const float share = 1.0f / std::sqrt(sum / float(dim) + c.eps);
        times<E, false>(x, share, static_cast<const type*>(c.weight), dim, static_cast<type*>(c.out) + row * c.dim);
    });
}

// Rounded after each product, as torch's operations on this type do it.
template <class E>
void turn(const typename E::type* __restrict from, const typename E::type* __restrict table, const RagTurn& c,
          typename E::type* __restrict to) {
    const int half = int(c.rotary_dim) / 2, step = c.is_neox ? 1 : 2, apart = c.is_neox ? half : 1;
    for (int i = 0; i < half; i++) {
        const float x = E::get(from[i * step]), y = E::get(from[i * step + apart]);
        const float cos = E::get(table[i]), sin = E::get(table[half + i]);
        to[i * step] = E::put(rounded<E>(x * cos) - rounded<E>(y * sin));
        to[i * step + apart] = E::put(rounded<E>(y * cos) + rounded<E>(x * sin));
    }
    for (int64_t i = c.rotary_dim; i < c.dim; i++) to[i] = from[i];
}

template <class E>
void turn_rows(const RagTurn& c) {
    typedef typename E::type type;
    for_rows(c.rows, (c.q_heads + c.k_heads) * c.dim, c.threads, [&](int64_t row, float*) {
        const type* table = static_cast<const type*>(c.table) + c.positions[row] * c.rotary_dim;
        const type *q = static_cast<const type*>(c.q) + row * c.q_row, *k = static_cast<const type*>(c.k) + row * c.k_row;
        type* q_out = static_cast<type*>(c.q_out) + row * c.q_heads * c.dim;
        type* k_out = static_cast<type*>(c.k_out) + row * c.k_heads * c.dim;
        for (int64_t h = 0; h < c.q_heads; h++) turn<E>(q + h * c.dim, table, c, q_out + h * c.dim);
        for (int64_t h = 0; h < c.k_heads; h++) turn<E>(k + h * c.dim, table, c, k_out + h * c.dim);
    });
}

template <class E>
void gate(const RagGate& c) {
    typedef typename E::type type;
    const int dim = int(c.dim);
    for_rows(c.rows, c.dim, c.threads, [&, dim](int64_t row, float* x) {
        const type* from = static_cast<const type*>(c.x) + row * c.x_row;
        read<E>(from, dim, x);
        for (int i = dim; i < up(dim, LANES); i++) x[i] = 0.0f;
        for (int at = 0; at < dim; at += LANES) {
            const vf one = load(x + at);
            // The exponent is never positive: e / (1 + e) on the left of 0, 1 / (1 + e) on its right.
            const vi is_left = one < all(0.0f);
            const vf e = exp2_of((is_left ? one : -one) * 1.44269504f);
            store(x + at, one * (is_left ? e : all(1.0f)) / (all(1.0f) + e));
        }
        times<E, true>(x, 1.0f, from + dim, dim, static_cast<type*>(c.out) + row * c.dim);
    });
}

}  // namespace

extern "C" int rag_norm(const RagNorm* call) {
    switch (call->type) {
        case FLOAT: norm<Float>(*call); return 0;
        case BFLOAT: norm<BFloat>(*call); return 0;
        case HALF: norm<Half>(*call); return 0;
    }
    return 1;
}

extern "C" int rag_turn(const RagTurn* call) {
    for (int64_t i = 0; i < call->rows; i++)
        if (call->positions[i] < 0 || call->positions[i] >= call->table_rows) return 2;
    switch (call->type) {
        case FLOAT: turn_rows<Float>(*call); return 0;
        case BFLOAT: turn_rows<BFloat>(*call); return 0;
        case HALF: turn_rows<Half>(*call); return 0;
    }
    return 1;
}

extern "C" int rag_gate(const RagGate* call) {
    switch (call->type) {
        case FLOAT: gate<Float>(*call); return 0;
        case BFLOAT: gate<BFloat>(*call); return 0;
        case HALF: gate<Half>(*call); return 0;
    }
    return 1;
}
