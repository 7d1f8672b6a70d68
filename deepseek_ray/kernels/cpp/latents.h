// Rows of the latent cache turned into columns, so that one vector holds the same element of 16 positions.
//
// A unit is 4 bytes: one float32, or two bfloat16 beside each other, which are widened where they are used (Vec::half).

#pragma once

#include "lanes.h"

namespace {

constexpr int64_t kUnits = 8;  // that are turned together

// to[unit][row] of 8 units of 16 rows; `offset` bytes into each row.
inline void turn_units(const char* const (&rows)[kLanes], int64_t offset, float* to) {
#if defined(__AVX2__)
    for (int first = 0; first < kLanes; first += 8)
        for (int half = 0; half < 2; ++half) {
            __m256 r[4];  // four units of row i and four of row i + 4
            for (int i = 0; i < 4; ++i) {
                const auto four = [&](int j) {
                    return _mm_loadu_ps(reinterpret_cast<const float*>(rows[first + j] + offset) + 4 * half);
                };
                r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(four(i)), four(i + 4), 1);
            }
            const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
            const __m256 c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
            float* t = to + 4 * half * kLanes + first;
            _mm256_storeu_ps(t, _mm256_shuffle_ps(a, c, 0x44));
            _mm256_storeu_ps(t + kLanes, _mm256_shuffle_ps(a, c, 0xee));
            _mm256_storeu_ps(t + 2 * kLanes, _mm256_shuffle_ps(b, d, 0x44));
            _mm256_storeu_ps(t + 3 * kLanes, _mm256_shuffle_ps(b, d, 0xee));
        }
#else
    for (int k = 0; k < kUnits; ++k)
        for (int j = 0; j < kLanes; ++j) std::memcpy(to + k * kLanes + j, rows[j] + offset + 4 * k, 4);
#endif
}

// to[unit][row] of 16 rows of `width` elements, zero beyond, up to `wide` elements.
template <typename T>
void turn_rows(const T* const* from, int64_t width, int64_t wide, float* to) {
    constexpr int64_t kBytes = 4 * kUnits;
    const char* rows[kLanes];
    for (int j = 0; j < kLanes; ++j) rows[j] = reinterpret_cast<const char*>(from[j]);
    const int64_t bytes = width * int64_t(sizeof(T));
    int64_t done = 0;
    for (; done + kBytes <= bytes; done += kBytes) turn_units(rows, done, to + done / 4 * kLanes);
    if (done < bytes) {
        char ends[kLanes][kBytes] = {};
        for (int j = 0; j < kLanes; ++j) {
            std::memcpy(ends[j], rows[j] + done, size_t(bytes - done));
            rows[j] = ends[j];
        }
        turn_units(rows, 0, to + done / 4 * kLanes);
        done += kBytes;
    }
    std::fill(to + done / 4 * kLanes, to + wide * int64_t(sizeof(T)) / 4 * kLanes, 0.0f);
}

}  // namespace
