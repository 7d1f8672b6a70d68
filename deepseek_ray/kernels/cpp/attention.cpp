// Absorbed MLA over the paged latent cache: every head reads the same latents (multi-query, key width `width`, value =
// the first `value_width` of it).
//
// A context is cut into parts by its length alone. Their positions come in order, 128 at a time, with a running maximum
// and sum as in arXiv 2205.14135, and the results of the parts are merged in order. So a head's bits depend on its query
// and on its context alone, never on the batch, on other heads or on the threads.
//
// A score takes its products in the order of the width, one position in each lane; a value takes them in the order of
// positions; of two bfloat16 the second comes first. Weights are rounded to bfloat16 where queries and latents are, and
// their sum is of the rounded ones. Latents come from memory once: those of a block stay as they are in the
// second-level cache, the 16 whose scores are computed in the first-level cache.

#include "attention_tiles.h"
#include "latents.h"
#include "pool.h"

namespace {

constexpr int64_t kParts = 8, kShortestPart = 2 * kPositions;  // of a context: at most so many, of whole blocks
constexpr int64_t kMostResults = int64_t(1) << 25;             // floats that a call whose contexts are divided may need

inline int64_t part_length(int64_t context) {
    return std::max(kShortestPart, (context + kPositions * kParts - 1) / (kPositions * kParts) * kPositions);
}

// What the positions of a part add up to: sums [heads][values], largest score and sum of weights [heads] each.
struct Result {
    float *sums, *top, *total;
    Result(float* from, int64_t heads, int64_t values)
        : sums(from), top(from + heads * values), total(top + heads) {}
    static int64_t size(int64_t heads, int64_t values) { return heads * (values + 2); }
};

// What one thread works with: all heads of one token.
template <typename Form>
struct Heads {
    using T = typename Form::Latent;
    using Factor = typename Form::Factor;
    std::vector<Factor> query;
    std::vector<T> turned, stripe;
    std::vector<float> scores, keep, row;
    float *sums, *top, *total;  // of the part at hand
    int64_t heads, width, wide, values;

    void start(const T* from, int64_t number, int64_t key_width, int64_t value_width) {
        heads = number, width = key_width, wide = padded(width), values = padded(value_width);
        turned.resize(size_t(wide * kLanes));
        stripe.resize(size_t(kPositions * kLanes));
        scores.resize(size_t(heads * kPositions));
        keep.assign(size_t(padded(heads)), 0.0f);
        row.resize(size_t(wide));
        const int64_t factors = wide / Form::kSize * Form::kFactors;
        query.resize(size_t(heads * factors));
        for_groups(heads, [&](int64_t first, auto number) {
            Factor* to = query.data() + first * factors;
            for (int h = 0; h < number; ++h) {
                const Factor* own = Form::factors_of(from + (first + h) * width, width, wide, row.data());
                for (int64_t i = 0; i < factors; ++i) to[i * number + h] = own[i];
            }
        });
    }

    void start_part(const Result& result) {
        sums = result.sums, top = result.top, total = result.total;
        std::fill_n(sums, heads * values, 0.0f);
        std::fill_n(top, heads, -INFINITY);
        std::fill_n(total, heads, 0.0f);
    }

    // Of 16 positions, the first of them position `at` of the block; `next` are the rows of the 16 after them.
    void score(const T* const* rows, const T* const* next, int64_t at, float scale) {
        turn_rows(rows, width, wide, turned.data());
        for_groups(heads, [&](int64_t first, auto number) {
            score_tile<number, Form>(query.data() + first * wide / Form::kSize * Form::kFactors, turned.data(), wide,
                                     first ? nullptr : next, scale, scores.data() + first * kPositions + at);
        });
    }

    // Scores become weights relative to the largest score so far; what was summed before shrinks by `keep`.
    void weigh(int64_t count) {
        const int64_t end = padded(count);
        for (int64_t h = 0; h < heads; ++h) {
            float* s = scores.data() + h * kPositions;
            std::fill(s + count, s + end, -INFINITY);
            Vec most = Vec::load(s);
            for (int64_t j = kLanes; j < end; j += kLanes) most = most.max(Vec::load(s + j));
            const float highest = std::max(top[h], max_lanes(most));
            keep[h] = top[h] - highest;
            top[h] = highest;
        }
        for (int64_t h = 0; h < heads; h += kLanes) exp_of(Vec::load(keep.data() + h)).store(keep.data() + h);
        for (int64_t h = 0; h < heads; ++h) {
            float* s = scores.data() + h * kPositions;
            for (int64_t j = 0; j < end; j += kLanes)
                Form::rounded(exp_of(Vec::load(s + j) - Vec::all(top[h]))).store(s + j);
            std::fill(s + count, s + end, 0.0f);
            Vec sum = Vec::zero();
            for (int64_t j = 0; j < end; j += kLanes) sum = sum + Vec::load(s + j);
            total[h] = total[h] * keep[h] + sum_lanes(sum);
            Form::pack(s, end);
        }
    }

    void add_values(const T* const* rows, int64_t count) {
        const int64_t steps = (count + Form::kSize - 1) / Form::kSize;
        for (int64_t i = 0; i < values; i += kLanes) {
            take_columns(rows, steps * Form::kSize, i, width, stripe.data());
            for_groups(heads, [&](int64_t first, auto number) {
                value_tile<number, Form>(reinterpret_cast<const Factor*>(scores.data()) + first * kPositions,
                                         keep.data() + first, stripe.data(), steps, rows + (i / kLanes) % Form::kSize,
                                         i + 2 * kLanes, sums + first * values + i, values);
            });
        }
    }
};

// The latents of one sequence up to a token; `table` has the blocks of the cache that hold them.
template <typename T>
struct Context {
    const T* cache;
    const int32_t* table;
    int64_t block_size, width, length;

    // The last row stands for those beyond it: their scores are not used.
    const T* row(int64_t position) const {
        position = std::min(position, length - 1);
        return cache + (int64_t(table[position / block_size]) * block_size + position % block_size) * width;
    }

    template <typename Form>
    void attend(int64_t first, int64_t last, Heads<Form>& state, float scale) const {
        const T* rows[kPositions + kLanes];
        for (int64_t begin = first; begin < last; begin += kPositions) {
            const int64_t count = std::min(kPositions, last - begin);
            for (int64_t j = 0; j < padded(count) + kLanes; ++j) rows[j] = row(begin + j);
            for (int64_t j = 0; j < count; j += kLanes) state.score(rows + j, rows + j + kLanes, j, scale);
            state.weigh(count);
            state.add_values(rows, count);
        }
    }
};

// out [heads, value_width] from the results of all parts of a context.
void merge(float* results, int64_t parts, int64_t heads, int64_t value_width, int32_t dtype, void* out) {
    const int64_t values = padded(value_width), size = Result::size(heads, values);
    for (int64_t h = 0; h < heads; ++h) {
        float share[kLanes], total = 0.0f;
        std::fill_n(share, kLanes, -INFINITY);
        for (int64_t p = 0; p < parts; ++p) share[p] = Result(results + p * size, heads, values).top[h];
        const Vec tops = Vec::load(share);
        exp_of(tops - Vec::all(max_lanes(tops))).store(share);
        for (int64_t p = 0; p < parts; ++p) total += Result(results + p * size, heads, values).total[h] * share[p];
        for (int64_t i = 0; i < value_width; i += kLanes) {
            Vec y = Vec::zero();
            for (int64_t p = 0; p < parts; ++p)
                y = y.fma(Vec::all(share[p]), Vec::load(results + p * size + h * values + i));
            store_some(y / Vec::all(total), at(out, h * value_width + i, dtype), value_width - i, dtype);
        }
    }
}

// One call; see dr_latent_attention.
struct Attention {
    const void* query;
    const void* cache;
    int32_t dtype;
    const int32_t* block_tables;
    int64_t max_blocks, block_size;
    const int32_t* sequence_rows;
    const int64_t* positions;
    void* out;
    int64_t tokens, heads, width, value_width;
    float scale;

    int64_t context(int64_t token) const { return positions[token] + 1; }
    int64_t parts(int64_t token) const {
        return (context(token) + part_length(context(token)) - 1) / part_length(context(token));
    }
    int64_t size() const { return Result::size(heads, padded(value_width)); }

    // The parts [first, last) of a token's context, with the result of part p at results + p * size().
    void attend(int64_t token, int64_t first, int64_t last, float* results) const {
        if (dtype == kFloat32) return attend_in<Floats<float>>(token, first, last, results);
#if defined(__AVX512BF16__)
        if (use_pairs) return attend_in<Pairs>(token, first, last, results);
#endif
        attend_in<Floats<uint16_t>>(token, first, last, results);
    }

    template <typename Form, typename T = typename Form::Latent>
    void attend_in(int64_t token, int64_t first, int64_t last, float* results) const {
        thread_local Heads<Form> state_of_thread;
        Heads<Form>& state = state_of_thread;  // looked up once
        state.start(static_cast<const T*>(query) + token * heads * width, heads, width, value_width);
        const int32_t* table = block_tables + int64_t(sequence_rows[token]) * max_blocks;
        const Context<T> rows{static_cast<const T*>(cache), table, block_size, width, context(token)};
        const int64_t length = part_length(context(token));
        for (int64_t p = first; p < last; ++p) {
            state.start_part(Result(results + p * size(), heads, state.values));
            rows.attend(p * length, std::min((p + 1) * length, context(token)), state, scale);
        }
    }

    void finish(int64_t token, float* results) const {
        merge(results, parts(token), heads, value_width, dtype, at(out, token * heads * value_width, dtype));
    }

    void run_whole(int32_t threads) const {
        pool::run(tokens, threads, [&](int64_t token) {
            thread_local std::vector<float> results;
            results.resize(size_t(kParts * size()));
            attend(token, 0, parts(token), results.data());
            finish(token, results.data());
        });
    }

    // The parts of a context are tasks of their own.
    void run_divided(int32_t threads) const {
        thread_local std::vector<float> results_of_thread;
        results_of_thread.resize(size_t(tokens * kParts * size()));
        float* results = results_of_thread.data();  // the caller's: a thread of the pool has another
        pool::run(tokens * kParts, threads, [&](int64_t task) {
            const int64_t token = task / kParts, p = task % kParts;
            if (p < parts(token)) attend(token, p, p + 1, results + token * kParts * size());
        });
        pool::run(tokens, threads, [&](int64_t token) { finish(token, results + token * kParts * size()); });
    }
};

}  // namespace

extern "C" {

// query [tokens, heads, width], cache [slots, width] and out [tokens, heads, value_width] of one dtype;
// block_tables [sequences, max_blocks]; sequence_rows [tokens]; positions [tokens]
void dr_latent_attention(const void* query, const void* cache, int32_t dtype, const int32_t* block_tables,
                         int64_t max_blocks, int64_t block_size, const int32_t* sequence_rows,
                         const int64_t* positions, void* out, int64_t tokens, int64_t heads, int64_t width,
                         int64_t value_width, float scale, int32_t threads) {
    const Attention call{query, cache, dtype, block_tables, max_blocks, block_size, sequence_rows, positions, out, tokens,
                         heads, width, value_width, scale};
    int64_t work = 0;
    for (int64_t t = 0; t < tokens; ++t) work += call.context(t) * heads * (width + value_width);
    if (work < kSmallWork) threads = 1;
    // Few tokens may be fewer than the threads, or have contexts that keep them busy unequally.
    const bool divide = threads > 1 && tokens < 8 * threads && tokens * kParts * call.size() <= kMostResults;
    if (divide) call.run_divided(threads); else call.run_whole(threads);
}

}  // extern "C"
