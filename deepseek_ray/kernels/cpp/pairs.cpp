// (token, expert) pairs of an MoE layer on their way to expert shards and back: see `kernels/pairs.py`. Nothing is
// computed here; but it runs once per layer and step while everybody waits, in caches full of other things.

#include <utility>

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

// The shard to ask for each expert. first [experts]: what is asked where there is no choice or no token; starts
// [experts + 1] into shards, where the replicas of each expert stand, ascending. Largest cost first, each on the shard
// that has least to do so far; one that is to be avoided only where there is no other.
void dr_choose_shards(const int64_t* counts, int64_t experts, const int64_t* first, const int64_t* starts,
                      const int64_t* shards, const int64_t* avoid, int64_t num_avoided, int64_t reading,
                      int64_t* chosen) {
    std::vector<int64_t> known(shards, shards + starts[experts]);
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
    std::vector<int64_t> works(known.size(), 0);
    const auto work = [&](int64_t shard) -> int64_t& {
        return works[std::lower_bound(known.begin(), known.end(), shard) - known.begin()];
    };
    const auto is_avoided = [&](int64_t shard) {
        return std::find(avoid, avoid + num_avoided, shard) != avoid + num_avoided;
    };
    std::vector<std::pair<int64_t, int64_t>> present;  // -cost and expert, so that they sort by cost, then by expert
    for (int64_t expert = 0; expert < experts; ++expert) {
        chosen[expert] = first[expert];
        if (!counts[expert]) continue;
        const int64_t cost = std::max(reading + counts[expert], 4 * counts[expert]);  // expert_parallel/dispatch.expert_cost
        if (starts[expert + 1] - starts[expert] == 1) work(first[expert]) += cost;
        else present.emplace_back(-cost, expert);
    }
    std::sort(present.begin(), present.end());
    for (const auto& [cost, expert] : present) {
        int64_t best = -1;
        bool best_is_avoided = false;
        for (int64_t i = starts[expert]; i < starts[expert + 1]; ++i) {
            const bool avoided = is_avoided(shards[i]);
            const bool better = best < 0 || (best_is_avoided && !avoided) ||
                                (best_is_avoided == avoided && work(shards[i]) < work(best));
            if (better) { best = shards[i]; best_is_avoided = avoided; }
        }
        work(best) -= cost;
        chosen[expert] = best;
    }
}

// One call for each owner of a wanted pair, in order of owners; returns how many. wanted [n]: flat pairs, ascending;
// null means 0 .. n-1. Of call c: shards[c], num_rows[c] and num_pairs[c]. The calls stand behind each other in
// token_rows and places, each beginning where its pairs do, and in indices, twice as long: rows of its pairs, then
// their experts.
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

// All for a whole step: counts [experts], how often each is among ids [n], the shard of each, and the calls, as above. `shards` is
// null where no expert has a choice.
int64_t dr_divide_pairs(const int64_t* ids, int64_t top_k, int64_t n, int64_t experts, const int64_t* first,
                        const int64_t* starts, const int64_t* shards, const int64_t* avoid, int64_t num_avoided,
                        int64_t reading, int64_t* counts, int64_t* asked, int64_t* num_rows, int64_t* num_pairs,
                        int64_t* token_rows, int64_t* places, int32_t* indices) {
    std::fill(counts, counts + experts, 0);
    for (int64_t i = 0; i < n; ++i) ++counts[ids[i]];
    std::vector<int64_t> chosen(first, first + experts);
    if (shards)
        dr_choose_shards(counts, experts, first, starts, shards, avoid, num_avoided, reading, chosen.data());
    return dr_plan_calls(ids, top_k, chosen.data(), nullptr, n, asked, num_rows, num_pairs, token_rows, places, indices);
}

// to [n, width] = the rows `rows` [n] of from, whose rows are `step` elements apart.
void dr_pick_rows(const void* from, int64_t step, const int64_t* rows, int64_t n, int64_t width, int32_t dtype,
                  void* to) {
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
