// Rows of the latent cache as attention wants them: turned into columns, so that one vector holds the same element of 16
// positions, or 16 elements of positions that are taken together, beside each other.
//
// A unit is 4 bytes: one float32, or two bfloat16.

#pragma once

#include "lanes.h"

namespace {

constexpr int64_t kUnits = 8;  // that are turned together

// to[unit][row] of 8 units of 16 rows; `offset` bytes into each row.
inline void turn_units(const char* const (&rows)[kLanes], int64_t offset, float* to) {
#if defined(__AVX512F__)
    for (int half = 0; half < 2; ++half) {
        __m512 r[4];  // four units of the rows i, i + 4, i + 8 and i + 12
        for (int i = 0; i < 4; ++i) {
            const auto four = [&](int j) {
                return _mm_loadu_ps(reinterpret_cast<const float*>(rows[i + j] + offset) + 4 * half);
            };
            r[i] = _mm512_castps128_ps512(four(0));
            r[i] = _mm512_mask_broadcast_f32x4(r[i], 0x00f0, four(4));
            r[i] = _mm512_mask_broadcast_f32x4(r[i], 0x0f00, four(8));
            r[i] = _mm512_mask_broadcast_f32x4(r[i], 0xf000, four(12));
        }
        const __m512 a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
        const __m512 c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
        float* t = to + 4 * half * kLanes;
        _mm512_storeu_ps(t, _mm512_shuffle_ps(a, c, 0x44));
        _mm512_storeu_ps(t + kLanes, _mm512_shuffle_ps(a, c, 0xee));
        _mm512_storeu_ps(t + 2 * kLanes, _mm512_shuffle_ps(b, d, 0x44));
        _mm512_storeu_ps(t + 3 * kLanes, _mm512_shuffle_ps(b, d, 0xee));
    }
#elif defined(__AVX2__)
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
void turn_rows(const T* const* from, int64_t width, int64_t wide, T* turned) {
    constexpr int64_t kBytes = 4 * kUnits;
    float* to = reinterpret_cast<float*>(turned);  // as units
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

// to[i] = a[i], b[i] of 16 bfloat16.
inline void beside(const uint16_t* a, const uint16_t* b, uint16_t* to) {
#if defined(__AVX512F__)
    const auto wide = [](const uint16_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    _mm512_storeu_si512(to, _mm512_or_si512(wide(a), _mm512_slli_epi32(wide(b), 16)));
#elif defined(__AVX2__)
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    const __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kLanes), _mm256_permute2x128_si256(low, high, 0x31));
#else
    for (int i = 0; i < kLanes; ++i) to[2 * i] = a[i], to[2 * i + 1] = b[i];
#endif
}

// to[unit][16] of `count` rows, an even number of bfloat16: their columns [first, first + 16), zero beyond `width`.
template <typename T>
void take_columns(const T* const* rows, int64_t count, int64_t first, int64_t width, T* to) {
    constexpr int kSize = 4 / sizeof(T);
    if (width - first < kLanes) {
        for (int64_t j = 0; j < count; ++j)
            for (int i = 0; i < kLanes; ++i)
                to[(j / kSize * kLanes + i) * kSize + j % kSize] = first + i < width ? rows[j][first + i] : T(0);
        return;
    }
    for (int64_t j = 0; j < count; j += kSize, to += kLanes * kSize) {
        if constexpr (kSize == 1) Vec::load(rows[j] + first).store(to);
        else beside(rows[j] + first, rows[j + 1] + first, to);
    }
}

}  // namespace
