// Rows of SALE's estimate: queries of one block as integers, ROWS of them side by side.
#pragma once
#include "sale_keys.h"

namespace rag {

// A row block with one query head
struct Looking {
    int64_t head, block;        // query head, and which block of the group
    uint8_t* allowed;           // blocks of keys that it keeps
    float unit, smallest;       // what 1 of a sum stands for; the lowest threshold
};

// Rows of one `Looking` as integers
struct RowNumbers {
    float* mean;                // [dim]: of the queries
    row_number* rows;           // [padded_width / ROWS][padded][ROWS], see row_place
    row_start* starts;          // [STOPS + 1][padded_width]: what is added to a sum before the channels up to each stop
    float* norms;               // [STOPS][padded_width / ROWS]: largest of the channels behind each stop
};

class RowPacker {
    const SaleKeys& keys;
    const SaleKeys::Pack& pack;
    const int width, padded_width, lanes;
    alignas(64) float mean_k[256 + 16] = {};
    alignas(64) float behind[STOPS][256 + 16] = {};  // 1 for the channels behind a stop

public:
    RowPacker(const SaleKeys& all_keys, const SaleKeys::Pack& own, int rows)
        : keys(all_keys), pack(own), width(rows), padded_width(up(rows, ROWS)), lanes(up(all_keys.dim, LANES)) {
        const float* mean = keys.c.mean + pack.head * keys.dim;
        std::copy(mean, mean + keys.dim, mean_k);
        for (int stop = 0; stop < STOPS; stop++)
            for (int d = keys.stops[stop]; d < keys.padded; d += 4)
                std::fill_n(behind[stop] + keys.fours[size_t((pack.head * keys.padded + d) / 4)], 4, 1.0f);
    }

    // Queries q [width][lanes], which are written over, with their thresholds; those behind the first `count` repeat the
    // last, and must not move the mean
    void put(float* q, float* threshold, int count, Looking& look, const RowNumbers& out) {
        const int dim = keys.dim;
        double sums[256 + 16] = {};
        for (int i = 0; i < count; i++)
            for (int d = 0; d < dim; d++) sums[d] += q[i * lanes + d];
        alignas(64) float mean_q[256 + 16] = {};
        for (int d = 0; d < dim; d++) out.mean[d] = mean_q[d] = float(sums[d] / count);
        vf largest = {};
        look.smallest = std::numeric_limits<float>::infinity();
        for (int i = 0; i < width; i++) {
            vf own = {}, by_mean = {};
            float* x = q + i * lanes;
            for (int d = 0; d < lanes; d += LANES) {
                const vf from = load(x + d), smooth = from - load(mean_q + d);
                by_mean += from * load(mean_k + d);
                own = max_of(own, abs_of(smooth));
                store(x + d, smooth);
            }
            const float scale = max_across(own) / INT4_MAX;
            const vf divisor = all(std::max(scale, TINY));
            for (int d = 0; d < lanes; d += LANES) {
                const vf four = clamp_of(round_of(load(x + d) / divisor), INT4_MAX) * scale;
                largest = max_of(largest, abs_of(four));
                store(x + d, four);
            }
            threshold[i] -= sum_across(by_mean);
            look.smallest = std::min(look.smallest, threshold[i]);
        }
        const float most = max_across(largest), unit = most > 0.0f ? most / LARGEST : 1.0f;
        look.unit = unit * pack.unit;
        place(q, threshold, unit, look, out);
    }

private:
    // A row's integers behind a stop
    struct Part {
        float norm[STOPS], sum[STOPS + 1];  // the sums are those of the channels up to each stop
    };

    void place(float* q, const float* threshold, float unit, const Looking& look, const RowNumbers& out) {
        parts.resize(size_t(width));
        for (int i = 0; i < width; i++) {
            vf squares[STOPS] = {}, sums[STOPS + 1] = {};
            for (int d = 0; d < lanes; d += LANES) {
                const vf number = round_of(load(q + i * lanes + d) / all(unit));
                sums[0] += number;
                for (int stop = 0; stop < STOPS; stop++) {
                    const vf back = number * load(behind[stop] + d);
                    squares[stop] += back * back;
                    sums[stop + 1] += back;
                }
                store(q + i * lanes + d, number);
            }
            Part& own = parts[size_t(i)];
            for (int stop = 0; stop < STOPS; stop++) own.norm[stop] = std::sqrt(sum_across(squares[stop])) * SLACK;
            for (int stop = 0; stop <= STOPS; stop++)
                own.sum[stop] = sum_across(stop < STOPS ? sums[stop] - sums[stop + 1] : sums[stop]);
        }
        put_in_order(threshold);
        const int* first = keys.fours.data() + pack.head * keys.padded / 4;
        row_number numbers[256 + 16];
        for (int at = 0; at < padded_width; at += ROWS) {
            row_number* rows = out.rows + long(at) * keys.padded;
            float largest[STOPS] = {};
            for (int r = 0; r < ROWS; r++) {
                const int from = order[size_t(std::min(at + r, width - 1))];
                put_row_numbers(q + long(from) * lanes, lanes, numbers);
                for (int d = 0; d < keys.padded; d += 4)
                    std::memcpy(rows + row_place(r, d), numbers + first[d / 4], 4 * sizeof(row_number));
                const Part& own = parts[size_t(from)];
                const float above = std::nearbyint((threshold[from] - look.smallest) / look.unit);
                out.starts[at + r] = row_start(-std::min(above, MOST_ABOVE) - KEY_OFFSET * own.sum[0]);
                for (int stop = 0; stop < STOPS; stop++) {
                    out.starts[(stop + 1) * padded_width + at + r] = row_start(-KEY_OFFSET * own.sum[stop + 1]);
                    largest[stop] = std::max(largest[stop], own.norm[stop]);
                }
            }
            for (int stop = 0; stop < STOPS; stop++) out.norms[(stop * padded_width + at) / ROWS] = largest[stop];
        }
    }

    // The lowest thresholds first: most blocks that are kept are found there. Then by norm, roughly: rows that are tested
    // together share the largest of theirs.
    void put_in_order(const float* threshold) {
        constexpr int STEPS = 16;
        rest.resize(size_t(width));
        order.resize(size_t(width));
        for (int i = 0; i < width; i++) rest[size_t(i)] = i;
        const auto then = rest.begin() + std::min(ROWS, width);
        std::partial_sort(rest.begin(), then, rest.end(), [&](int a, int b) {
            return threshold[a] < threshold[b] || (threshold[a] == threshold[b] && a < b);
        });
        std::copy(rest.begin(), then, order.begin());
        float largest = TINY;
        for (auto at = then; at != rest.end(); at++) largest = std::max(largest, parts[size_t(*at)].norm[0]);
        const auto step_of = [&](int row) {
            const float share = parts[size_t(row)].norm[0] / largest;
            return share >= 0.0f && share <= 1.0f ? STEPS - 1 - int(share * (STEPS - 1)) : 0;  // NaN is no index
        };
        size_t place[STEPS + 1] = {};
        for (auto at = then; at != rest.end(); at++) place[step_of(*at) + 1]++;
        place[0] = size_t(then - rest.begin());
        for (int i = 0; i < STEPS; i++) place[i + 1] += place[i];
        for (auto at = then; at != rest.end(); at++) order[place[step_of(*at)]++] = *at;
    }

    std::vector<Part> parts;
    std::vector<int> rest, order;
};

}  // namespace rag
