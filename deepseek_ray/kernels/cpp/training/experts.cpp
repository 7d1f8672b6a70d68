// The routed experts of one layer, forward and backward: SwiGLU networks with stacked weights, each over its own rows.
//
// Letters: N rows in the order of the experts, E experts, H hidden size, I width of an expert. gate_up is [E, 2 I, H], gate
// above up; down is [E, H, I]; sizes [E] counts the rows of each expert. A task is a part of one expert's work that no other
// task writes to, so the result does not depend on the number of threads.

#include "product.h"
#include "swiglu.h"

namespace {

constexpr int64_t kTaskRows = 42 * kTileRows;  // of an expert with many; a block of them is half of a level-2 cache

struct Group { int64_t expert, first, rows; };

// Every expert that has rows, at most `most` of them each, those with many first: what is done last is short.
std::vector<Group> groups_of(const int64_t* sizes, int64_t experts, int64_t most) {
    std::vector<Group> found;
    for (int64_t expert = 0, first = 0; expert < experts; first += sizes[expert++])
        for (int64_t start = 0; start < sizes[expert]; start += most)
            found.push_back({expert, first + start, std::min(most, sizes[expert] - start)});
    std::stable_sort(found.begin(), found.end(), [](const Group& a, const Group& b) { return a.rows > b.rows; });
    return found;
}

}  // namespace

extern "C" {

// rows [N, H] -> out [N, H]. gate_up_out [N, 2 I] is kept for the backward pass.
void dt_experts(const float* rows, const float* gate_up, const float* down, const int64_t* sizes, int64_t experts,
                int64_t hidden, int64_t width, float* gate_up_out, float* out, int32_t threads) {
    const std::vector<Group> groups = groups_of(sizes, experts, kTaskRows);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size_t task = 0; task < groups.size(); ++task) {
        const Group group = groups[task];
        float *gate = gate_up_out + group.first * 2 * width, *inner = scratch(2, group.rows * width);
        multiply(Operand{rows + group.first * hidden, hidden, false},
                 Operand{gate_up + group.expert * 2 * width * hidden, hidden, false}, group.rows, 2 * width, hidden, gate,
                 2 * width, false);
        for (int64_t r = 0; r < group.rows; ++r)
            swiglu(gate + r * 2 * width, gate + r * 2 * width + width, width, inner + r * width);
        multiply(Operand{inner, width, false}, Operand{down + group.expert * hidden * width, width, false}, group.rows,
                 hidden, width, out + group.first * hidden, hidden, false);
    }
}

// Gradients of rows [N, H], gate_up and down, from that of out [N, H] and what the forward pass kept. Null: not wanted.
// inner [N, I] and of_gate_up_out [N, 2 I] are working memory.
void dt_experts_backward(const float* rows, const float* gate_up, const float* down, const int64_t* sizes,
                         int64_t experts, int64_t hidden, int64_t width, const float* gate_up_out, const float* of_out,
                         float* inner, float* of_gate_up_out, float* of_rows, float* of_gate_up, float* of_down,
                         int32_t threads) {
    const std::vector<Group> groups = groups_of(sizes, experts, kTaskRows);
    const std::vector<Group> whole = groups_of(sizes, experts, INT64_MAX);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < groups.size(); ++task) {
            const Group group = groups[task];
            float *of_gate = of_gate_up_out + group.first * 2 * width, *of_inner = scratch(2, group.rows * width);
            const float* gate = gate_up_out + group.first * 2 * width;
            multiply(Operand{of_out + group.first * hidden, hidden, false},
                     Operand{down + group.expert * hidden * width, width, true}, group.rows, width, hidden, of_inner, width,
                     false);
            for (int64_t r = 0, at = 0; r < group.rows; ++r, at += 2 * width)
                swiglu_backward(gate + at, gate + at + width, of_inner + r * width, width, of_gate + at, of_gate + at + width,
                                inner + (group.first + r) * width);
            if (of_rows)
                multiply(Operand{of_gate, 2 * width, false},
                         Operand{gate_up + group.expert * 2 * width * hidden, hidden, true}, group.rows, hidden, 2 * width,
                         of_rows + group.first * hidden, hidden, false);
        }
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < whole.size(); ++task) {
            const Group group = whole[task];
            if (of_gate_up)
                multiply(Operand{of_gate_up_out + group.first * 2 * width, 2 * width, true},
                         Operand{rows + group.first * hidden, hidden, true}, 2 * width, hidden, group.rows,
                         of_gate_up + group.expert * 2 * width * hidden, hidden, false);
            if (of_down)
                multiply(Operand{of_out + group.first * hidden, hidden, true},
                         Operand{inner + group.first * width, width, true}, hidden, width, group.rows,
                         of_down + group.expert * hidden * width, width, false);
        }
    }
    for (int64_t expert = 0; expert < experts; ++expert) {
        if (sizes[expert]) continue;
        if (of_gate_up) std::fill_n(of_gate_up + expert * 2 * width * hidden, 2 * width * hidden, 0.0f);
        if (of_down) std::fill_n(of_down + expert * hidden * width, hidden * width, 0.0f);
    }
}

}  // extern "C"
