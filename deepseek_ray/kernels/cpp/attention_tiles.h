// The two products of attention over latents, as outer products: some heads by 16 lanes, whose sums stay in registers.
//
// Latents come in steps: one float32 or two bfloat16 of each lane, of which the second is added first. What they meet,
// elements of a query or weights of positions, are factors: floats, or pairs of bfloat16 for vdpbf16ps with the same bits.

#pragma once

#include <type_traits>

#include "dot_pairs.h"

namespace {

constexpr int64_t kPositions = 128;  // of a block
constexpr int64_t kLine = 64;  // bytes
#if defined(__AVX512F__)
constexpr int kHeads = 16;
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

template <typename T>
struct Floats {
    using Latent = T;
    using Factor = float;
    static constexpr int kSize = 4 / sizeof(T), kFactors = kSize;  // of a step

    // A row of a query, with zeros up to `wide`; `room` is as wide.
    static const float* factors_of(const T* row, int64_t width, int64_t wide, float* room) {
        for (int64_t k = 0; k < wide; k += kLanes)
            load_some(row + k, width - k, kSize == 1 ? kFloat32 : kBfloat16).store(room + k);
        return room;
    }
    static Vec rounded(Vec x) {
        if constexpr (kSize == 1) return x;
        uint16_t narrow[kLanes];
        x.store(narrow);
        return Vec::load(narrow);
    }
    static void pack(float*, int64_t) {}

    // Sums of H heads += latents [16][kSize] * factors, those of a head `of_head` after those of the one before.
    template <int H>
    static inline void add(Vec (&sums)[H], const float* factors, int64_t of_head, int64_t of_element, const T* latents) {
        for (int s = kSize - 1; s >= 0; --s) {
            Vec c;
            if constexpr (kSize == 2) c = Vec::half(latents, s); else c = Vec::load(latents);
            for (int h = 0; h < H; ++h) sums[h] = sums[h].fma(Vec::all(factors[h * of_head + s * of_element]), c);
        }
    }
};

#if defined(__AVX512BF16__)
struct Pairs {
    using Latent = uint16_t;
    using Factor = Pair;
    static constexpr int kSize = 2, kFactors = 1;

    static const Pair* factors_of(const uint16_t* row, int64_t width, int64_t wide, float* room) {
        uint16_t* to = reinterpret_cast<uint16_t*>(room);
        std::copy_n(row, width, to);
        std::fill(to + width, to + wide, uint16_t(0));
        return reinterpret_cast<const Pair*>(room);
    }
    static Vec rounded(Vec x) { return Floats<uint16_t>::rounded(x); }
    // Rounded weights become pairs, in place; their number is a multiple of 16.
    static void pack(float* weights, int64_t count) {
        uint16_t* to = reinterpret_cast<uint16_t*>(weights);
        for (int64_t i = 0; i < count; i += kLanes) Vec::load(weights + i).store(to + i);
    }
    template <int H>
    static inline void add(Vec (&sums)[H], const Pair* factors, int64_t of_head, int64_t, const uint16_t* latents) {
        const __m512i c = _mm512_loadu_si512(latents);
        for (int h = 0; h < H; ++h) sums[h] = add_pairs(sums[h], c, factors + h * of_head);
    }
};
#endif

// The tiles are functions of their own so that all registers are theirs.

// scores[h][j] = scale * query[h] . latent j, of H heads and 16 positions. query [factors][H], turned [steps][16][kSize]
// of `wide` elements. `next`, if not null: 16 rows that are fetched meanwhile, a line at each step: there are as many
// steps as lines.
template <int H, typename Form, typename T = typename Form::Latent>
[[gnu::noinline]] void score_tile(const typename Form::Factor* query, const T* turned, int64_t wide,
                                  const T* const* next, float scale, float* scores) {
    Vec acc[H];
    for (int h = 0; h < H; ++h) acc[h] = Vec::zero();
    int64_t k = 0;
    for (int j = 0; j < kLanes; ++j) {
        const T* line = next ? next[j] : turned;  // to fetch what is here already costs next to nothing
        for (const int64_t end = wide * (j + 1) / kLanes; k < end; k += Form::kSize) {
            __builtin_prefetch(line, 0, 2);
            line += kLine / sizeof(T);
            Form::add(acc, query, 1, H, turned);
            query += Form::kFactors * H;
            turned += Form::kSize * kLanes;
        }
    }
    for (int h = 0; h < H; ++h) (acc[h] * Vec::all(scale)).store(scores + h * kPositions);
}

// sums[h] = sums[h] * keep[h] + sum over j of weights[h][j] * latents[j], 16 values of H heads. A head's weights are
// kPositions after those of the one before; latents [steps][16][kSize]. At each step, what is `ahead` elements into the
// next of `rows` is fetched.
template <int H, typename Form, typename T = typename Form::Latent>
[[gnu::noinline]] void value_tile(const typename Form::Factor* weights, const float* keep, const T* latents,
                                  int64_t steps, const T* const* rows, int64_t ahead, float* sums, int64_t stride) {
    Vec acc[H];
    for (int h = 0; h < H; ++h) acc[h] = Vec::load(sums + h * stride) * Vec::all(keep[h]);
    for (int64_t j = 0; j < steps; ++j) {
        __builtin_prefetch(rows[j * Form::kSize] + ahead);
        Form::add(acc, weights, kPositions, 1, latents);
        weights += Form::kFactors;
        latents += Form::kSize * kLanes;
    }
    for (int h = 0; h < H; ++h) acc[h].store(sums + h * stride);
}

}  // namespace
