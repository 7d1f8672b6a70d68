// The two products of attention over latents, as outer products: some heads by 16 lanes, whose sums stay in registers.

#pragma once

#include <type_traits>

#include "lanes.h"

namespace {

constexpr int64_t kPositions = 128;  // of a block
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

}  // namespace
