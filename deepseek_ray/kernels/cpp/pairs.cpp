// (token, expert) pairs of an MoE layer on their way to expert shards and back: see `kernels/pairs.py`. Nothing is
// computed here; but it runs once per layer and step while everybody waits, in caches full of other things.

#include "lanes.h"

namespace {

// Copies a row; whether all of its elements are finite.
bool copy_finite(const void* from, void* to, int64_t width, int32_t dtype) {
    Vec zeros = Vec::zero();
    for (int64_t i = 0; i < width; i += kLanes) {
        Vec x = load_some(at(from, i, dtype), width - i, dtype);
        zeros = zeros.fma(x, Vec::zero());  // NaN from what is not finite
    }
    std::memcpy(to, from, size_t(width) * (dtype == kFloat32 ? 4 : 2));
    return sum_lanes(zeros) == 0.0f;
}

}  // namespace

extern "C" {

// counts [experts]: how often each is among ids [n].
void dr_count_experts(const int64_t* ids, int64_t n, int64_t* counts, int64_t experts) {
    std::fill(counts, counts + experts, 0);
    for (int64_t i = 0; i < n; ++i) ++counts[ids[i]];
}

// One call for each owner of a wanted pair, in order of owners; returns how many. wanted [n]: flat pairs, ascending; null
// means 0 .. n-1. Of call c: shards[c], num_rows[c] and num_pairs[c]. The calls stand behind each other in token_rows and
// places, each beginning where its pairs do, and in indices, twice as long: rows of its pairs, then their experts.
int64_t dr_plan_calls(const int64_t* ids, int64_t top_k, const int64_t* owners, const int64_t* wanted, int64_t n,
                      int64_t* shards, int64_t* num_rows, int64_t* num_pairs, int64_t* token_rows, int64_t* places,
                      int32_t* indices) {
    std::vector<int64_t> owner_of(n);
    for (int64_t i = 0; i < n; ++i) owner_of[i] = owners[ids[wanted ? wanted[i] : i]];
    std::vector<int64_t> asked(owner_of);
    std::sort(asked.begin(), asked.end());
    asked.erase(std::unique(asked.begin(), asked.end()), asked.end());
    const int64_t calls = int64_t(asked.size());
    std::vector<int64_t> start(calls), token(calls, -1);
    std::copy(asked.begin(), asked.end(), shards);
    std::fill(num_rows, num_rows + calls, 0);
    std::fill(num_pairs, num_pairs + calls, 0);
    for (int64_t& own : owner_of) {
        own = std::lower_bound(asked.begin(), asked.end(), own) - asked.begin();
        ++num_pairs[own];
    }
    for (int64_t c = 1; c < calls; ++c) start[c] = start[c - 1] + num_pairs[c - 1];
    std::vector<int64_t> filled(calls, 0);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t place = wanted ? wanted[i] : i, c = owner_of[i], at = filled[c]++;
        if (place / top_k != token[c]) {  // the pairs of a token are beside each other
            token[c] = place / top_k;
            token_rows[start[c] + num_rows[c]++] = token[c];
        }
        places[start[c] + at] = place;
        indices[2 * start[c] + at] = int32_t(num_rows[c] - 1);
        indices[2 * start[c] + num_pairs[c] + at] = int32_t(ids[place]);
    }
    return calls;
}

// to [n, width] = the rows `rows` [n] of from, whose rows are `step` elements apart.
void dr_pick_rows(const void* from, int64_t step, const int64_t* rows, int64_t n, int64_t width, int32_t dtype, void* to) {
    const size_t bytes = size_t(width) * (dtype == kFloat32 ? 4 : 2);
    for (int64_t i = 0; i < n; ++i) std::memcpy(at(to, i * width, dtype), at(from, rows[i] * step, dtype), bytes);
}

// The rows `places` [n] of to = from [n, width]; 1 if every element is finite, 0 otherwise.
int32_t dr_put_rows(const void* from, const int64_t* places, int64_t n, int64_t width, int32_t dtype, void* to) {
    bool finite = true;
    for (int64_t i = 0; i < n; ++i)
        finite &= copy_finite(at(from, i * width, dtype), at(to, places[i] * width, dtype), width, dtype);
    return finite;
}

}  // extern "C"
