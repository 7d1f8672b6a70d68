// Matrix products with weights of 8 or 4 bits. Inputs are rounded to 7 bits with a scale for 32 of a row; the products of
// 32 inputs are summed exactly, in integers, and these sums, times both scales, in float32 in the order of the inputs.
//
//   int8      [ceil(N/16)][ceil(K/32)][8][16] units of 4 bytes with 4 inputs each, every byte 128 more than the weight,
//             and float32 scales [ceil(N/16)][16], one for an output
//   int4      [ceil(N/16)][ceil(K/32)][4][16] units of 4 bytes with 8 inputs each: the low halves of its bytes are the
//             first 4, the high halves the others, each 8 more than the weight; bfloat16 scales
//             [ceil(N/16)][ceil(K/32)][16], one for 32 inputs of an output

#pragma once

#include <numeric>

#include "product.h"

namespace {

constexpr int64_t kGroup = 32;  // inputs that share a scale
// Of a rounded input: two products with bytes up to 255 fit 16 signed bits, so that an instruction of AVX2 adds them.
constexpr int kLargestInput = 63;
static_assert(2 * 255 * kLargestInput < 1 << 15);

// Sixteen 32-bit integers, each the sum of products of bytes: of those of weights, 0 to 255, with those of inputs, of which
// four are the same for all lanes. `first` is what a sum has beside them: it is added where that costs least.
#if defined(__AVX512VNNI__)
struct Dots {
    __m512i v;
    static inline Dots start(int32_t first) { return {_mm512_set1_epi32(first)}; }
    inline void add_bytes(const uint32_t* w, int32_t inputs) {
        v = _mm512_dpbusd_epi32(v, _mm512_loadu_si512(w), _mm512_set1_epi32(inputs));
    }
    // Halves of bytes, 0 to 15: `high` ones or low ones.
    inline void add_half(const uint32_t* w, bool high, int32_t inputs) {
        const __m512i raw = _mm512_loadu_si512(w);
        const __m512i half = _mm512_and_si512(high ? _mm512_srli_epi16(raw, 4) : raw, _mm512_set1_epi8(15));
        v = _mm512_dpbusd_epi32(v, half, _mm512_set1_epi32(inputs));
    }
    inline Dots widened() const { return *this; }
    inline Vec to_float(int32_t) const { return {_mm512_cvtepi32_ps(v)}; }
};
#elif defined(__AVX2__)
struct Dots {
    __m256i lo, hi;
    static inline Dots start(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static inline __m256i plus_bytes8(__m256i sums, __m256i raw, __m256i x) {
        return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(raw, x), _mm256_set1_epi16(1)));
    }
    static inline __m256i load8(const uint32_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
    inline void add_bytes(const uint32_t* w, int32_t inputs) {
        __m256i x = _mm256_set1_epi32(inputs);
        lo = plus_bytes8(lo, load8(w), x);
        hi = plus_bytes8(hi, load8(w + 8), x);
    }
    // Halves of bytes, 0 to 15: `high` ones or low ones. Sums of 8 such are kept in 16 bits: 8 * 2 * 15 * 63 < 2^15.
    static inline __m256i half8(const uint32_t* w, bool high) {
        __m256i raw = load8(w);
        return _mm256_and_si256(high ? _mm256_srli_epi16(raw, 4) : raw, _mm256_set1_epi8(15));
    }
    inline void add_half(const uint32_t* w, bool high, int32_t inputs) {
        __m256i x = _mm256_set1_epi32(inputs);
        lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(half8(w, high), x));
        hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(half8(w + 8, high), x));
    }
    inline Dots widened() const {
        const __m256i one = _mm256_set1_epi16(1);
        return {_mm256_madd_epi16(lo, one), _mm256_madd_epi16(hi, one)};
    }
    inline Vec to_float(int32_t first) const {
        const __m256i x = _mm256_set1_epi32(first), low = _mm256_add_epi32(lo, x), high = _mm256_add_epi32(hi, x);
#if defined(__AVX512F__)
        return {_mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1))};
#else
        return {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)};
#endif
    }
};
#else
struct Dots {
    int32_t v[kLanes];
    static inline Dots start(int32_t) { return Dots{}; }
    static inline int byte(uint32_t x, int i) { return int8_t(x >> (8 * i)); }
    inline void add_bytes(const uint32_t* w, int32_t inputs) {
        for (int l = 0; l < kLanes; ++l)
            for (int i = 0; i < 4; ++i) v[l] += int(w[l] >> (8 * i) & 255) * byte(uint32_t(inputs), i);
    }
    inline void add_half(const uint32_t* w, bool high, int32_t inputs) {
        for (int l = 0; l < kLanes; ++l)
            for (int i = 0; i < 4; ++i) v[l] += int(w[l] >> (8 * i + 4 * high) & 15) * byte(uint32_t(inputs), i);
    }
    inline Dots widened() const { return *this; }
    inline Vec to_float(int32_t first) const {
        float y[kLanes];
        for (int i = 0; i < kLanes; ++i) y[i] = float(v[i] + first);
        return Vec::load(y);
    }
};
#endif

inline int32_t four(const int8_t* inputs) {
    int32_t all;
    std::memcpy(&all, inputs, 4);
    return all;
}

struct RoundedRows {
    const int8_t* values;   // [rows][stride]
    const float* scales;    // [rows][stride / 32]
    const int32_t* firsts;  // what the sums of products begin with: [rows][stride / 32]
    int64_t stride;
    RoundedRows from(int64_t row) const {
        return {values + row * stride, scales + row * (stride / kGroup), firsts + row * (stride / kGroup), stride};
    }
};

// `More` is what bytes of weights have more than the weights.
template <int More>
struct RoundedStore {
    std::vector<int8_t> values;
    std::vector<float> scales;
    std::vector<int32_t> firsts;
    int64_t stride = 0;

    void make_room(int64_t rows, int64_t K) {
        stride = (K + kGroup - 1) / kGroup * kGroup;
        if (values.size() >= size_t(rows * stride)) return;
        values.resize(size_t(rows * stride));
        scales.resize(size_t(rows * stride / kGroup));
        firsts.resize(size_t(rows * stride / kGroup));
    }
    void put(int64_t row, const void* from, int32_t dtype, int64_t K) {
        for (int64_t g = 0; g < stride / kGroup; ++g) {
            const int64_t k = g * kGroup, count = K - k;
            Vec low = load_some(at(from, k, dtype), count, dtype), high = Vec::zero();
            if (count > kLanes) high = load_some(at(from, k + kLanes, dtype), count - kLanes, dtype);
            Vec most = low.max(Vec::zero() - low).max(high).max(Vec::zero() - high);
            const float scale = max_lanes(most) / float(kLargestInput);
            const Vec inverse = Vec::all(scale > 0 ? 1.0f / scale : 0.0f);
            int8_t* to = values.data() + row * stride + k;
            (low * inverse).store(to);
            (high * inverse).store(to + kLanes);
            // What is not finite stays so: it must not come out as a number. Times 0, it is none.
            const float zero = sum_lanes(low * Vec::zero() + high * Vec::zero());
            scales[row * (stride / kGroup) + g] = zero == 0.0f ? scale : NAN;
            firsts[row * (stride / kGroup) + g] = -More * std::accumulate(to, to + kGroup, 0);
        }
    }
    RoundedRows rows(int64_t first) const { return RoundedRows{values.data(), scales.data(), firsts.data(), stride}.from(first); }
};

template <int Bits>
struct Integer {
    static constexpr int64_t kUnits = kGroup * Bits / 32;  // of 4 bytes, for 32 inputs of an output
    static constexpr bool kMany = kRegisters == 32;
    static constexpr int kMaxRows = 6, kAloneRows = kMany ? 12 : kMaxRows;
    // With AVX-512 it pays to read several blocks at a time with few rows, though not all sums stay in registers then. Not
    // so with int4, whose scales are read beside the weights.
    static constexpr int blocks_of(int rows, bool alone) {
        if (!kMany) return few_registers_blocks(rows);
        if (Bits == 4 && alone) return 1;
        return rows <= 2 ? 4 : rows <= 4 ? 3 : rows <= kMaxRows ? 2 : 1;
    }
    using Weight = uint32_t;
    using Rows = RoundedRows;
    using Store = RoundedStore<1 << (Bits - 1)>;

    static bool takes(const Call&) { return false; }
    static Rows rows_at(const void*, int64_t) { return {}; }
    static constexpr int64_t groups(int64_t K) { return (K + kGroup - 1) / kGroup; }
    static constexpr int64_t block_stride(int64_t K) { return groups(K) * kUnits * kLanes; }
    static const void* scales_of(const void* scales, int64_t block, int64_t K) {
        if constexpr (Bits == 8) return static_cast<const float*>(scales) + block * kLanes;
        else return static_cast<const uint16_t*>(scales) + block * groups(K) * kLanes;
    }

    template <int R, int B>
    static inline void tile(Rows x, const uint32_t* w, int64_t K, const void* scales, int64_t k0, int64_t k1, Carry carry,
                            const Output* out) {
        const int64_t stride = block_stride(K);
        Vec sums[R][B];
        carry.load(sums, k0 == 0);
        for (int64_t g = k0 / kGroup; g < (k1 + kGroup - 1) / kGroup; ++g) {
            Dots dots[R][B];
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < B; ++b) dots[r][b] = Dots::start(x.firsts[r * (x.stride / kGroup) + g]);
            for (int64_t u = 0; u < kUnits; ++u) {
                const uint32_t* units = w + (g * kUnits + u) * kLanes;
                for (int b = 0; b < B; ++b) fetch_ahead<B>(units + b * stride);
                for (int r = 0; r < R; ++r) {
                    const int8_t* inputs = x.values + r * x.stride + g * kGroup + u * (kGroup / kUnits);
                    for (int b = 0; b < B; ++b) {
                        if constexpr (Bits == 8) {
                            dots[r][b].add_bytes(units + b * stride, four(inputs));
                        } else {
                            dots[r][b].add_half(units + b * stride, false, four(inputs));
                            dots[r][b].add_half(units + b * stride, true, four(inputs + 4));
                        }
                    }
                }
            }
            for (int r = 0; r < R; ++r) {
                const int64_t place = r * (x.stride / kGroup) + g;
                for (int b = 0; b < B; ++b) {
                    if constexpr (Bits == 8) {
                        Vec dot = dots[r][b].to_float(x.firsts[place]);
                        sums[r][b] = sums[r][b].fma(dot, Vec::all(x.scales[place]));
                    } else {
                        Vec scale = Vec::load(static_cast<const uint16_t*>(scales) + (b * groups(K) + g) * kLanes);
                        Vec dot = dots[r][b].widened().to_float(x.firsts[place]);
                        sums[r][b] = sums[r][b].fma(dot, scale * Vec::all(x.scales[place]));
                    }
                }
            }
        }
        if (!out) return carry.keep(sums);
        for (int b = 0; b < B; ++b)
            for (int r = 0; r < R; ++r) {
                if constexpr (Bits == 8)
                    out->put(sums[r][b] * Vec::load(static_cast<const float*>(scales) + b * kLanes), r, b * kLanes);
                else
                    out->put(sums[r][b], r, b * kLanes);
            }
    }
};

}  // namespace
