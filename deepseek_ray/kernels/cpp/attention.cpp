// Absorbed MLA over the paged latent cache: every head reads the same latents (multi-query, key width `width`, value = the
// first `value_width` of it).
//
// Positions come in order, 64 at a time from position 0, with a running maximum and sum as in arXiv 2205.14135. So a
// head's bits depend on its query and on its context alone, never on the batch, on other heads or on the threads.

#include "lanes.h"
#include "pool.h"

namespace {

constexpr int64_t kPositions = 64;
#if defined(__AVX512F__)
constexpr int kQueryHeads = 4, kQueryPositions = 4, kValueHeads = 16;
#else
constexpr int kQueryHeads = 4, kQueryPositions = 3, kValueHeads = 6;
#endif

inline int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

#if defined(__AVX2__) && !defined(__AVX512F__)
// acc[h][p] = query[h] . latents[p], lane by lane. One half of the lanes after the other: twice as many sums fit the
// registers, and the bits stay those of whole vectors.
template <int H, int P>
inline void multiply(const float* query, const float* latents, int64_t width, Vec (&acc)[H][P]) {
    for (int half = 0; half < 2; ++half) {
        __m256 sums[H][P];
        for (int h = 0; h < H; ++h) for (int p = 0; p < P; ++p) sums[h][p] = _mm256_setzero_ps();
        for (int64_t i = half * kLanes / 2; i < width; i += kLanes) {
            __m256 c[P];
            for (int p = 0; p < P; ++p) {
                c[p] = _mm256_loadu_ps(latents + p * width + i);
                if (!half) __builtin_prefetch(latents + (p + P) * width + i);
            }
            for (int h = 0; h < H; ++h) {
                __m256 q = _mm256_loadu_ps(query + h * width + i);
                for (int p = 0; p < P; ++p) sums[h][p] = _mm256_fmadd_ps(q, c[p], sums[h][p]);
            }
        }
        for (int h = 0; h < H; ++h) for (int p = 0; p < P; ++p) (half ? acc[h][p].hi : acc[h][p].lo) = sums[h][p];
    }
}
#else
template <int H, int P>
inline void multiply(const float* query, const float* latents, int64_t width, Vec (&acc)[H][P]) {
    for (int h = 0; h < H; ++h) for (int p = 0; p < P; ++p) acc[h][p] = Vec::zero();
    for (int64_t i = 0; i < width; i += kLanes) {
        Vec c[P];
        for (int p = 0; p < P; ++p) {
            c[p] = Vec::load(latents + p * width + i);
            __builtin_prefetch(latents + (p + P) * width + i);
        }
        for (int h = 0; h < H; ++h) {
            Vec q = Vec::load(query + h * width + i);
            for (int p = 0; p < P; ++p) acc[h][p] = acc[h][p].fma(q, c[p]);
        }
    }
}
#endif

// scores[h][j] = scale * query[h] . latents[j] for H heads and P positions.
template <int H, int P>
inline void score_tile(const float* query, const float* latents, int64_t width, float scale, float* scores) {
    Vec acc[H][P];
    multiply<H, P>(query, latents, width, acc);
    for (int h = 0; h < H; ++h)
        for (int p = 0; p < P; ++p) scores[h * kPositions + p] = sum_lanes(acc[h][p]) * scale;
}

template <int H>
void score_heads(const float* query, const float* latents, int64_t count, int64_t width, float scale, float* scores) {
    int64_t j = 0;
    for (; j + kQueryPositions <= count; j += kQueryPositions)
        score_tile<H, kQueryPositions>(query, latents + j * width, width, scale, scores + j);
    for (; j < count; ++j) score_tile<H, 1>(query, latents + j * width, width, scale, scores + j);
}

// sums[h] = sums[h] * keep[h] + sum over j of weights[h][j] * latents[j], 16 values of H heads.
template <int H>
inline void value_tile(const float* weights, const float* keep, const float* latents, int64_t count, int64_t width,
                       float* sums, int64_t sums_stride) {
    Vec acc[H];
    for (int h = 0; h < H; ++h) acc[h] = Vec::load(sums + h * sums_stride) * Vec::all(keep[h]);
    for (int64_t j = 0; j < count; ++j) {
        Vec c = Vec::load(latents + j * width);
        for (int h = 0; h < H; ++h) acc[h] = acc[h].fma(Vec::all(weights[h * kPositions + j]), c);
    }
    for (int h = 0; h < H; ++h) acc[h].store(sums + h * sums_stride);
}

template <int H = kValueHeads>
void value_heads(int64_t heads, const float* weights, const float* keep, const float* latents, int64_t count,
                 int64_t width, float* sums, int64_t sums_stride) {
    if constexpr (H > 0) {
        if (heads == H) value_tile<H>(weights, keep, latents, count, width, sums, sums_stride);
        else value_heads<H - 1>(heads, weights, keep, latents, count, width, sums, sums_stride);
    }
}

constexpr int64_t kRowsAhead = 4;  // of the cache, fetched before they are widened

// A row of the cache in float32.
inline void widen(const void* row, int32_t dtype, int64_t width, float* to) {
    int64_t i = 0;
    if (dtype == kBfloat16) {
        const uint16_t* from = static_cast<const uint16_t*>(row);
        for (; i + kLanes <= width; i += kLanes) {
            __builtin_prefetch(from + kRowsAhead * width + i);
            Vec::load(from + i).store(to + i);
        }
    }
    for (; i < width; i += kLanes) load_some(at(row, i, dtype), width - i, dtype).store(to + i);
}

// What one thread works with: some heads of one token.
struct Heads {
    std::vector<float> query, latents, scores, sums, top, total, keep;

    void start(const float* from, int64_t heads, int64_t width, int64_t value_width) {
        const int64_t wide = padded(width), values = padded(value_width);
        latents.resize(size_t(kPositions * wide));
        query.assign(size_t(heads * wide), 0.0f);
        scores.resize(size_t(heads * kPositions));
        sums.assign(size_t(heads * values), 0.0f);
        top.assign(size_t(heads), -INFINITY);
        total.assign(size_t(heads), 0.0f);
        keep.resize(size_t(heads));
        for (int64_t h = 0; h < heads; ++h)
            std::memcpy(query.data() + h * wide, from + h * width, sizeof(float) * size_t(width));
    }

    // `count` positions, whose latents are in `latents`.
    void add(int64_t heads, int64_t count, int64_t wide, int64_t value_width, float scale) {
        int64_t h = 0;
        for (; h + kQueryHeads <= heads; h += kQueryHeads)
            score_heads<kQueryHeads>(query.data() + h * wide, latents.data(), count, wide, scale,
                                     scores.data() + h * kPositions);
        for (; h < heads; ++h)
            score_heads<1>(query.data() + h * wide, latents.data(), count, wide, scale, scores.data() + h * kPositions);
        for (h = 0; h < heads; ++h) weigh(h, count);
        const int64_t values = padded(value_width), groups = (heads + kValueHeads - 1) / kValueHeads;
        for (int64_t i = 0; i < values; i += kLanes)
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t first = heads * g / groups, number = heads * (g + 1) / groups - first;
                value_heads(number, scores.data() + first * kPositions, keep.data() + first, latents.data() + i, count,
                            wide, sums.data() + first * values + i, values);
            }
    }

    // Scores of a head become weights relative to the largest score so far; what was summed before shrinks by `keep`.
    void weigh(int64_t h, int64_t count) {
        float* s = scores.data() + h * kPositions;
        std::fill(s + count, s + kPositions, -INFINITY);
        Vec most = Vec::load(s);
        for (int64_t j = kLanes; j < kPositions; j += kLanes) most = most.max(Vec::load(s + j));
        const float highest = std::max(top[h], max_lanes(most));
        keep[h] = of_one(top[h] - highest);
        top[h] = highest;
        Vec sum = Vec::zero();
        for (int64_t j = 0; j < kPositions; j += kLanes) {
            exp_of(Vec::load(s + j) - Vec::all(highest)).store(s + j);
            for (int64_t i = std::max(j, count); i < j + kLanes; ++i) s[i] = 0.0f;
            sum = sum + Vec::load(s + j);
        }
        total[h] = total[h] * keep[h] + sum_lanes(sum);
    }

    static float of_one(float x) { float y[kLanes]; exp_of(Vec::all(x)).store(y); return y[0]; }

    void finish(int64_t heads, int64_t value_width, float* out) const {
        const int64_t values = padded(value_width);
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < value_width; i += kLanes) {
                Vec y = Vec::load(sums.data() + h * values + i) / Vec::all(total[h]);
                store_some(y, out + h * value_width + i, value_width - i, kFloat32);
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
    const int64_t wide = padded(width);
    int64_t work = 0;
    for (int64_t t = 0; t < tokens; ++t) work += (positions[t] + 1) * heads * (width + value_width);
    if (work < kSmallWork) threads = 1;
    // Reading a latent costs once per token if one thread has all of its heads; few tokens are divided all the same.
    const int64_t parts = tokens < 2 * threads ? std::min<int64_t>(heads, threads) : 1;
    pool::run(tokens * parts, threads, [&](int64_t task) {
        thread_local Heads state_of_thread;
        Heads& state = state_of_thread;  // looked up once
        const int64_t t = task / parts, part = task % parts;
        const int64_t first = heads * part / parts, number = heads * (part + 1) / parts - first;
        const int64_t context = positions[t] + 1;
        const int32_t* table = block_tables + int64_t(sequence_rows[t]) * max_blocks;
        state.start(query + (t * heads + first) * width, number, width, value_width);
        for (int64_t begin = 0; begin < context; begin += kPositions) {
            const int64_t count = std::min(kPositions, context - begin);
            for (int64_t j = 0; j < count; ++j) {
                const int64_t slot = int64_t(table[(begin + j) / block_size]) * block_size + (begin + j) % block_size;
                widen(at(cache, slot * width, cache_dtype), cache_dtype, width, state.latents.data() + j * wide);
            }
            state.add(number, count, wide, value_width, scale);
        }
        state.finish(number, value_width, out + (t * heads + first) * value_width);
    });
}

}  // extern "C"
