// Rows of the latent cache turned into columns, so that one vector holds the same element of 16 positions.
//
// A unit is 4 bytes: one float32, or two bfloat16 beside each other, which are widened where they are used (Vec::half).

#pragma once

#include "lanes.h"

namespace {

constexpr int64_t kUnits = 8;  // that are turned together

#if defined(__AVX2__)
// Unit k of vector i becomes unit i of vector k.
inline void transpose(__m256 (&r)[8]) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; ++k) {
            fours[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0x44);
            fours[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + k + 2], 0xee);
        }
    for (int k = 0; k < 4; ++k) {
        r[k] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x20);
        r[k + 4] = _mm256_permute2f128_ps(fours[k], fours[k + 4], 0x31);
    }
}
#endif

// to[unit][row] of 8 units of 16 rows; `offset` bytes into each row.
inline void turn_units(const char* const (&rows)[kLanes], int64_t offset, float* to) {
#if defined(__AVX2__)
    for (int first = 0; first < kLanes; first += 8) {
        __m256 r[8];
        for (int j = 0; j < 8; ++j) r[j] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[first + j] + offset));
        transpose(r);
        for (int k = 0; k < 8; ++k) _mm256_storeu_ps(to + k * kLanes + first, r[k]);
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
