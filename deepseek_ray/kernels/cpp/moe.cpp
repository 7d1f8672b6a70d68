// Of an MoE layer: which experts compute a token, all that they compute, and the weighted sum of it.

#include "lanes.h"
#include "operators.h"
#include "pool.h"

#include <limits>
#include <memory>
#include <numeric>

namespace {

// The places of the `count` largest of `from`, largest first, of equal ones the first.
void find_largest(const std::vector<float>& from, int64_t count, int64_t* ids) {
    for (int64_t k = 0; k < count; ++k) {
        int64_t best = -1;
        for (int64_t i = 0; i < int64_t(from.size()); ++i)
            if ((best < 0 || from[i] > from[best]) && std::find(ids, ids + k, i) == ids + k) best = i;
        ids[k] = best;
    }
}

// How good a group of experts is: its two best together, or its best one.
float group_score(const float* own, int64_t size, bool two) {
    float best = -std::numeric_limits<float>::infinity(), second = best;
    for (int64_t i = 0; i < size; ++i) {
        if (own[i] > best) second = best, best = own[i];
        else if (own[i] > second) second = own[i];
    }
    return two ? best + second : best;
}

}  // namespace

extern "C" {

// scores [tokens, E], bias [E] or null -> ids and weights [tokens, top_k], best first. With `best_groups`, experts count
// only in that many of `groups` groups. `normalised` weights of a token sum to 1 before `factor`.
void dr_choose_experts(const float* scores, const float* bias, int64_t tokens, int64_t num_experts, int64_t top_k,
                       int64_t groups, int64_t best_groups, int32_t two, int32_t normalised, float factor, int64_t* ids,
                       float* weights) {
    std::vector<float> wanted(num_experts), group(groups);
    std::vector<int64_t> chosen(groups);
    const int64_t size = num_experts / groups;
    for (int64_t t = 0; t < tokens; ++t, scores += num_experts, ids += top_k, weights += top_k) {
        for (int64_t e = 0; e < num_experts; ++e) wanted[e] = bias ? scores[e] + bias[e] : scores[e];
        if (best_groups) {
            for (int64_t g = 0; g < groups; ++g) group[g] = group_score(wanted.data() + g * size, size, two);
            find_largest(group, best_groups, chosen.data());
            std::sort(chosen.begin(), chosen.begin() + best_groups);
            for (int64_t g = 0, next = 0; g < groups; ++g) {
                if (next < best_groups && chosen[next] == g) ++next;
                else std::fill_n(wanted.begin() + g * size, size, -std::numeric_limits<float>::infinity());
            }
        }
        find_largest(wanted, top_k, ids);
        float sum = scores[ids[0]];
        for (int64_t k = 1; k < top_k; ++k) sum += scores[ids[k]];
        for (int64_t k = 0; k < top_k; ++k) weights[k] = (normalised ? scores[ids[k]] / (sum + 1e-20f) : scores[ids[k]]) * factor;
    }
}

// out [pairs, hidden]: down(silu(gate x) * up x) of row token_rows[p] of x with expert ids[p]. If one of them is not here,
// nothing is computed, and the result is 0.
int32_t dr_experts(const void* x, int64_t stride, int32_t dtype, const int64_t* token_rows, const int64_t* ids,
                   int64_t pairs, const ExpertTable* table, void* out, int32_t threads) {
    const int64_t num_experts = table->num_experts, hidden = table->hidden, width = table->width;
    std::vector<int64_t> place(num_experts + 1, 0), order(pairs), rows;
    for (int64_t p = 0; p < pairs; ++p) {
        if (ids[p] < 0 || ids[p] >= num_experts || !table->gate_up[ids[p]]) return 0;
        ++place[ids[p] + 1];
    }
    std::vector<const void*> first, second, first_scales, second_scales;
    for (int64_t e = 0; e < num_experts; ++e)
        if (place[e + 1]) {
            rows.push_back(place[e + 1]);
            first.push_back(table->gate_up[e]);
            second.push_back(table->down[e]);
            first_scales.push_back(table->gate_up_scales[e]);
            second_scales.push_back(table->down_scales[e]);
        }
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (int64_t p = 0; p < pairs; ++p) order[place[ids[p]]++] = p;

    const size_t item = dtype == kFloat32 ? 4 : 2, row_bytes = size_t(hidden) * item;
    const auto room = [&](int64_t columns) { return std::unique_ptr<char[]>(new char[size_t(pairs * columns) * item]); };
    const auto sorted = room(hidden), both = room(2 * width), gated = room(width), result = room(hidden);
    for (int64_t i = 0; i < pairs; ++i)
        std::memcpy(sorted.get() + i * row_bytes, at(x, token_rows[order[i]] * stride, dtype), row_bytes);
    const auto product = [&](char* from, int64_t num_in, const std::vector<const void*>& weights,
                             const std::vector<const void*>& scales, char* to, int64_t num_out) {
        std::vector<const void*> starts;
        std::vector<void*> ends;
        int64_t row = 0;
        for (int64_t count : rows) {
            starts.push_back(at(from, row * num_in, dtype));
            ends.push_back(at(to, row * num_out, dtype));
            row += count;
        }
        dr_grouped_linear(int64_t(rows.size()), rows.data(), starts.data(), num_in, dtype, weights.data(), table->dtype,
                          scales[0] ? scales.data() : nullptr, ends.data(), num_out, dtype, num_out, num_in, threads);
    };
    product(sorted.get(), hidden, first, first_scales, both.get(), 2 * width);
    dr_silu_mul(both.get(), gated.get(), dtype, pairs, width, threads);
    product(gated.get(), width, second, second_scales, result.get(), hidden);
    for (int64_t i = 0; i < pairs; ++i)
        std::memcpy(at(out, order[i] * hidden, dtype), result.get() + i * row_bytes, row_bytes);
    return 1;
}

// rows [tokens, slots, width], weights [tokens, slots] float32 -> out [tokens, width]: weighed and summed in slot order,
// in float32, rounded once. Then each of `more` [tokens, width] is added, and each sum rounded.
void dr_combine_slots(const void* rows, const float* weights, int64_t tokens, int64_t slots, int64_t width, int32_t dtype,
                      const void* const* more, int64_t num_more, void* out, int32_t threads) {
    pool::run(tokens, tokens * (slots + num_more) * width > kSmallWork ? threads : 1, [&](int64_t t) {
        for (int64_t i = 0; i < width; i += kLanes) {
            Vec total = Vec::zero();
            for (int64_t k = 0; k < slots; ++k) {
                const Vec weighted = load_some(at(rows, (t * slots + k) * width + i, dtype), width - i, dtype) *
                                     Vec::all(weights[t * slots + k]);
                total = k ? total + weighted : weighted;
            }
            void* to = at(out, t * width + i, dtype);
            store_some(total, to, width - i, dtype);
            for (int64_t m = 0; m < num_more; ++m)
                store_some(load_some(to, width - i, dtype) + load_some(at(more[m], t * width + i, dtype), width - i, dtype),
                           to, width - i, dtype);
        }
    });
}

}  // extern "C"
