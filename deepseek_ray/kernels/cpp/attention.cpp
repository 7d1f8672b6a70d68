// Absorbed MLA over the paged latent cache: every head reads the same latents (multi-query, key width `width`, value =
// the first `value_width` of it).
//
// Positions come in order, 128 at a time from position 0, with a running maximum and sum as in arXiv 2205.14135. So a
// head's bits depend on its query and on its context alone, never on the batch, on other heads or on the threads.
//
// Both products are outer products, some heads by 16 lanes whose sums stay in registers. A score takes its products in
// the order of the width (of two bfloat16 the second first), one position in each lane; a value takes them in the order
// of positions. Latents come from memory once: those of a block stay as they are in the second-level cache, the 16 whose
// scores are computed in the first-level cache.

#include <type_traits>

#include "latents.h"
#include "pool.h"

namespace {

constexpr int64_t kPositions = 128;
constexpr int64_t kLine = 64;  // bytes
#if defined(__AVX512F__)
constexpr int kHeads = 8;
#else
constexpr int kHeads = 6;
#endif

inline int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// f(first head, their number as a type) for groups of like size, of at most kHeads heads.
template <int H = kHeads, typename F>
inline void with_number(int64_t number, F&& f) {
    if constexpr (H > 0) {
        if (number == H) f(std::integral_constant<int, H>());
        else with_number<H - 1>(number, f);
    }
}
template <typename F>
inline void for_groups(int64_t heads, F&& f) {
    const int64_t groups = (heads + kHeads - 1) / kHeads;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = heads * g / groups;
        with_number(heads * (g + 1) / groups - first, [&](auto number) { f(first, number); });
    }
}

// The tiles are functions of their own so that all registers are theirs.

// scores[h][j] = scale * query[h] . latent j, of H heads and 16 positions. query [wide][H], turned [units of wide][16].
// `next`, if not null: 16 rows that are fetched meanwhile, a line at each step: there are as many steps as lines.
template <int H, typename T>
[[gnu::noinline]] void score_tile(const float* query, const T* turned, int64_t wide, const T* const* next, float scale,
                                  float* scores) {
    constexpr int kStep = 4 / sizeof(T);
    Vec acc[H];
    for (int h = 0; h < H; ++h) acc[h] = Vec::zero();
    int64_t k = 0;
    for (int j = 0; j < kLanes; ++j) {
        const T* line = next ? next[j] : turned;  // to fetch what is here already costs next to nothing
        for (const int64_t end = wide * (j + 1) / kLanes; k < end; k += kStep) {
            __builtin_prefetch(line, 0, 2);
            line += kLine / sizeof(T);
            for (int s = kStep - 1; s >= 0; --s) {
                Vec c;
                if constexpr (kStep == 2) c = Vec::half(turned, s); else c = Vec::load(turned);
                for (int h = 0; h < H; ++h) acc[h] = acc[h].fma(Vec::all(query[s * H + h]), c);
            }
            query += kStep * H;
            turned += kStep * kLanes;
        }
    }
    for (int h = 0; h < H; ++h) (acc[h] * Vec::all(scale)).store(scores + h * kPositions);
}

// sums[h] = sums[h] * keep[h] + sum over j of weights[h][j] * latents(j), 16 values of H heads.
template <int H, typename F>
[[gnu::noinline]] void value_tile(const float* weights, const float* keep, F latents, int64_t count, float* sums,
                                  int64_t stride) {
    Vec acc[H];
    for (int h = 0; h < H; ++h) acc[h] = Vec::load(sums + h * stride) * Vec::all(keep[h]);
    for (int64_t j = 0; j < count; ++j) {
        const Vec c = latents(j);
        for (int h = 0; h < H; ++h) acc[h] = acc[h].fma(Vec::all(weights[h * kPositions + j]), c);
    }
    for (int h = 0; h < H; ++h) acc[h].store(sums + h * stride);
}

// What one thread works with: some heads of one token.
struct Heads {
    std::vector<float> query, turned, stripe, scores, sums, top, total, keep;
    int64_t heads, width, wide, values;

    void start(const float* from, int64_t number, int64_t key_width, int64_t value_width) {
        heads = number, width = key_width, wide = padded(width), values = padded(value_width);
        query.assign(size_t(heads * wide), 0.0f);
        turned.resize(size_t(wide * kLanes));
        stripe.resize(size_t(kPositions * kLanes));
        scores.resize(size_t(heads * kPositions));
        sums.assign(size_t(heads * values), 0.0f);
        top.assign(size_t(heads), -INFINITY);
        total.assign(size_t(heads), 0.0f);
        keep.assign(size_t(padded(heads)), 0.0f);
        for_groups(heads, [&](int64_t first, auto number) {
            float* to = query.data() + first * wide;
            for (int h = 0; h < number; ++h)
                for (int64_t k = 0; k < width; ++k) to[k * number + h] = from[(first + h) * width + k];
        });
    }

    // Of 16 positions, the first of them position `at` of the block; `next` are the rows of the 16 after them.
    template <typename T>
    void score(const T* const* rows, const T* const* next, int64_t at, float scale) {
        turn_rows(rows, width, wide, turned.data());
        for_groups(heads, [&](int64_t first, auto number) {
            score_tile<number>(query.data() + first * wide, reinterpret_cast<const T*>(turned.data()), wide,
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
            for (int64_t j = 0; j < end; j += kLanes) exp_of(Vec::load(s + j) - Vec::all(top[h])).store(s + j);
            std::fill(s + count, s + end, 0.0f);
            Vec sum = Vec::zero();
            for (int64_t j = 0; j < end; j += kLanes) sum = sum + Vec::load(s + j);
            total[h] = total[h] * keep[h] + sum_lanes(sum);
        }
    }

    // The first group of heads leaves the latents it has widened to the others.
    template <typename T>
    void add_values(const T* const* rows, int64_t count) {
        for (int64_t i = 0; i < values; i += kLanes) {
            float* wide_stripe = stripe.data();
            const auto widened = [=](int64_t j) { return Vec::load(wide_stripe + j * kLanes); };
            const auto widen = [=](int64_t j) {
                const Vec c = Vec::load(rows[j] + i);
                c.store(wide_stripe + j * kLanes);
                return c;
            };
            const bool whole = width - i >= kLanes;
            if (!whole) widen_ends(rows, count, i);
            for_groups(heads, [&](int64_t first, auto number) {
                const float* weights = scores.data() + first * kPositions;
                float* to = sums.data() + first * values + i;
                if (whole && !first) value_tile<number>(weights, keep.data(), widen, count, to, values);
                else value_tile<number>(weights, keep.data() + first, widened, count, to, values);
            });
        }
    }

    // The last columns of rows that end before 16 more.
    template <typename T>
    void widen_ends(const T* const* rows, int64_t count, int64_t i) {
        for (int64_t j = 0; j < count; ++j)
            load_some(rows[j] + i, width - i, sizeof(T) == 4 ? kFloat32 : kBfloat16).store(stripe.data() + j * kLanes);
    }

    void finish(int64_t value_width, float* out) const {
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < value_width; i += kLanes) {
                Vec y = Vec::load(sums.data() + h * values + i) / Vec::all(total[h]);
                store_some(y, out + h * value_width + i, value_width - i, kFloat32);
            }
    }
};

// The cache of one sequence: `table` has its blocks.
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

    void attend(Heads& state, float scale) const {
        const T* rows[kPositions + kLanes];
        for (int64_t begin = 0; begin < length; begin += kPositions) {
            const int64_t count = std::min(kPositions, length - begin);
            for (int64_t j = 0; j < padded(count) + kLanes; ++j) rows[j] = row(begin + j);
            for (int64_t j = 0; j < count; j += kLanes) state.score(rows + j, rows + j + kLanes, j, scale);
            state.weigh(count);
            state.add_values(rows, count);
        }
    }
};

}  // namespace

extern "C" {

// query [tokens, heads, width] float32; cache [slots, width]; out [tokens, heads, value_width] float32
// block_tables [sequences, max_blocks]; sequence_rows [tokens]; positions [tokens]
void dr_latent_attention(const float* query, const void* cache, int32_t cache_dtype, const int32_t* block_tables,
                         int64_t max_blocks, int64_t block_size, const int32_t* sequence_rows,
                         const int64_t* positions, float* out, int64_t tokens, int64_t heads, int64_t width,
                         int64_t value_width, float scale, int32_t threads) {
    int64_t work = 0;
    for (int64_t t = 0; t < tokens; ++t) work += (positions[t] + 1) * heads * (width + value_width);
    if (work < kSmallWork) threads = 1;
    // Turning latents costs once per token if one thread has all of its heads; few tokens are divided all the same.
    const int64_t parts = tokens < 2 * threads ? std::min<int64_t>(heads, threads) : 1;
    pool::run(tokens * parts, threads, [&](int64_t task) {
        thread_local Heads state_of_thread;
        Heads& state = state_of_thread;  // looked up once
        const int64_t t = task / parts, part = task % parts;
        const int64_t first = heads * part / parts, number = heads * (part + 1) / parts - first;
        const int32_t* table = block_tables + int64_t(sequence_rows[t]) * max_blocks;
        state.start(query + (t * heads + first) * width, number, width, value_width);
        const auto attend = [&](auto* typed) {
            Context{typed, table, block_size, width, positions[t] + 1}.attend(state, scale);
        };
        if (cache_dtype == kBfloat16) attend(static_cast<const uint16_t*>(cache));
        else attend(static_cast<const float*>(cache));
        state.finish(value_width, out + (t * heads + first) * value_width);
    });
}

}  // extern "C"
