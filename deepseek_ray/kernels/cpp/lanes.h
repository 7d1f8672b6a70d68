// Sixteen floats at a time, and the types of tensors. AVX-512 and AVX2 have intrinsics, everything else runs plain loops;
// all three do the same operations in the same order, so a row has the same bits on each of them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;
constexpr int64_t kSmallWork = 1 << 17;  // multiply-adds below which waking a second thread costs more than it saves
enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };

#if defined(__AVX512F__)
struct Vec {
    __m512 v;
    static inline Vec zero() { return {_mm512_setzero_ps()}; }
    static inline Vec all(float x) { return {_mm512_set1_ps(x)}; }
    static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static inline Vec load(const uint16_t* p) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    // Of 16 pairs of bfloat16: the second (s = 1) or the first (s = 0) of each.
    static inline Vec half(const uint16_t* p, int s) {
        __m512i raw = _mm512_loadu_si512(p);
        return {_mm512_castsi512_ps(s ? _mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000u)))
                                      : _mm512_slli_epi32(raw, 16))};
    }
    inline void store(float* p) const { _mm512_storeu_ps(p, v); }
    inline void store(uint16_t* p) const {  // round to nearest even, NaN stays NaN
        __m512i bits = _mm512_castps_si512(v);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        __m512i kept = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
    }
    inline void store(int8_t* p) const {  // the nearest whole numbers, which bytes can hold; ties to even
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    inline Vec fma(Vec a, Vec b) const { return {_mm512_fmadd_ps(a.v, b.v, v)}; }  // this + a * b
    inline Vec operator*(Vec o) const { return {_mm512_mul_ps(v, o.v)}; }
    inline Vec operator+(Vec o) const { return {_mm512_add_ps(v, o.v)}; }
    inline Vec operator-(Vec o) const { return {_mm512_sub_ps(v, o.v)}; }
    inline Vec operator/(Vec o) const { return {_mm512_div_ps(v, o.v)}; }
    inline Vec max(Vec o) const { return {_mm512_max_ps(v, o.v)}; }
    inline Vec min(Vec o) const { return {_mm512_min_ps(v, o.v)}; }
    inline Vec floor() const { return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
    inline Vec power_of_two() const {  // 2 ** this, of whole numbers
        __m512i n = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(n, 23))};
    }
};
#elif defined(__AVX2__) && defined(__FMA__)
struct Vec {
    __m256 lo, hi;
    static inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static inline Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static inline __m256 widen8(const uint16_t* p) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static inline Vec load(const uint16_t* p) { return {widen8(p), widen8(p + 8)}; }
    static inline __m256 half8(const uint16_t* p, int s) {
        __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm256_castsi256_ps(s ? _mm256_and_si256(raw, _mm256_set1_epi32(int(0xffff0000u)))
                                     : _mm256_slli_epi32(raw, 16));
    }
    static inline Vec half(const uint16_t* p, int s) { return {half8(p, s), half8(p + 16, s)}; }
    inline void store(float* p) const { _mm256_storeu_ps(p, lo); _mm256_storeu_ps(p + 8, hi); }
    static inline __m256i rounded(__m256 x) {
        __m256i bits = _mm256_castps_si256(x);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i near = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(near), _mm256_castsi256_ps(quiet),
                                       _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        return _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    }
    inline void store(uint16_t* p) const {
        __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(lo), rounded(hi)), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
    }
    inline void store(int8_t* p) const {
        __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(lo), _mm256_cvtps_epi32(hi));
        __m256i order = _mm256_permute4x64_epi64(both, 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm_packs_epi16(_mm256_castsi256_si128(order), _mm256_extracti128_si256(order, 1)));
    }
    inline Vec fma(Vec a, Vec b) const { return {_mm256_fmadd_ps(a.lo, b.lo, lo), _mm256_fmadd_ps(a.hi, b.hi, hi)}; }
    inline Vec operator*(Vec o) const { return {_mm256_mul_ps(lo, o.lo), _mm256_mul_ps(hi, o.hi)}; }
    inline Vec operator+(Vec o) const { return {_mm256_add_ps(lo, o.lo), _mm256_add_ps(hi, o.hi)}; }
    inline Vec operator-(Vec o) const { return {_mm256_sub_ps(lo, o.lo), _mm256_sub_ps(hi, o.hi)}; }
    inline Vec operator/(Vec o) const { return {_mm256_div_ps(lo, o.lo), _mm256_div_ps(hi, o.hi)}; }
    inline Vec max(Vec o) const { return {_mm256_max_ps(lo, o.lo), _mm256_max_ps(hi, o.hi)}; }
    inline Vec min(Vec o) const { return {_mm256_min_ps(lo, o.lo), _mm256_min_ps(hi, o.hi)}; }
    inline Vec floor() const { return {_mm256_floor_ps(lo), _mm256_floor_ps(hi)}; }
    static inline __m256 power8(__m256 x) {
        __m256i n = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
    }
    inline Vec power_of_two() const { return {power8(lo), power8(hi)}; }
};
#else
inline float widen_bits(uint32_t bits) { float y; std::memcpy(&y, &bits, 4); return y; }
struct Vec {
    float v[kLanes];
    template <typename F> static inline Vec each(F f) { Vec r; for (int i = 0; i < kLanes; ++i) r.v[i] = f(i); return r; }
    static inline Vec zero() { return all(0.0f); }
    static inline Vec all(float x) { return each([&](int) { return x; }); }
    static inline Vec load(const float* p) { return each([&](int i) { return p[i]; }); }
    static inline Vec load(const uint16_t* p) { return each([&](int i) { return widen_bits(uint32_t(p[i]) << 16); }); }
    static inline Vec half(const uint16_t* p, int s) {
        return each([&](int i) { return widen_bits(uint32_t(p[2 * i + s]) << 16); });
    }
    inline void store(float* p) const { std::memcpy(p, v, sizeof v); }
    inline void store(uint16_t* p) const {
        for (int i = 0; i < kLanes; ++i) {
            uint32_t bits; std::memcpy(&bits, &v[i], 4);
            bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
            p[i] = uint16_t((nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
        }
    }
    inline void store(int8_t* p) const { for (int i = 0; i < kLanes; ++i) p[i] = int8_t(std::nearbyint(v[i])); }
    inline Vec fma(Vec a, Vec b) const { return each([&](int i) { return std::fma(a.v[i], b.v[i], v[i]); }); }
    inline Vec operator*(Vec o) const { return each([&](int i) { return v[i] * o.v[i]; }); }
    inline Vec operator+(Vec o) const { return each([&](int i) { return v[i] + o.v[i]; }); }
    inline Vec operator-(Vec o) const { return each([&](int i) { return v[i] - o.v[i]; }); }
    inline Vec operator/(Vec o) const { return each([&](int i) { return v[i] / o.v[i]; }); }
    inline Vec max(Vec o) const { return each([&](int i) { return v[i] > o.v[i] ? v[i] : o.v[i]; }); }
    inline Vec min(Vec o) const { return each([&](int i) { return v[i] < o.v[i] ? v[i] : o.v[i]; }); }
    inline Vec floor() const { return each([&](int i) { return std::floor(v[i]); }); }
    inline Vec power_of_two() const { return each([&](int i) { return widen_bits(uint32_t(int32_t(v[i]) + 127) << 23); }); }
};
#endif

inline const char* at(const void* p, int64_t elements, int32_t dtype) {
    return static_cast<const char*>(p) + elements * (dtype == kFloat32 ? 4 : 2);
}
inline char* at(void* p, int64_t elements, int32_t dtype) {
    return static_cast<char*>(p) + elements * (dtype == kFloat32 ? 4 : 2);
}

// The first `count` of 16 elements of a row; the others are 0, so a tail runs the code of a full vector.
inline Vec load_some(const void* p, int64_t count, int32_t dtype) {
    if (count >= kLanes)
        return dtype == kFloat32 ? Vec::load(static_cast<const float*>(p)) : Vec::load(static_cast<const uint16_t*>(p));
    alignas(64) char part[kLanes * 4] = {0};
    std::memcpy(part, p, size_t(count) * (dtype == kFloat32 ? 4 : 2));
    return load_some(part, kLanes, dtype);
}
inline void store_some(Vec x, void* p, int64_t count, int32_t dtype) {
    alignas(64) char part[kLanes * 4];
    void* to = count >= kLanes ? p : part;
    if (dtype == kFloat32) x.store(static_cast<float*>(to)); else x.store(static_cast<uint16_t*>(to));
    if (count < kLanes) std::memcpy(p, part, size_t(count) * (dtype == kFloat32 ? 4 : 2));
}

// A fixed tree: lane i with lane i + 8, of those i with i + 4, then i + 2, then i + 1.
template <typename Two>
inline float fold_lanes(Vec x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    __m256 eight = Two::of(_mm512_castps512_ps256(x.v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1)));
#else
    __m256 eight = Two::of(x.lo, x.hi);
#endif
    __m128 four = Two::of(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = Two::of(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(Two::of(two, _mm_shuffle_ps(two, two, 1)));
#else
    float t[kLanes]; x.store(t);
    for (int step = 8; step; step >>= 1) for (int i = 0; i < step; ++i) t[i] = Two::of(t[i], t[i + step]);
    return t[0];
#endif
}

struct Sum {
    static inline float of(float a, float b) { return a + b; }
#if defined(__AVX2__)
    static inline __m128 of(__m128 a, __m128 b) { return _mm_add_ps(a, b); }
    static inline __m256 of(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
#endif
};

struct Larger {  // the second, where one is no number
    static inline float of(float a, float b) { return a > b ? a : b; }
#if defined(__AVX2__)
    static inline __m128 of(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
    static inline __m256 of(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
#endif
};

inline float sum_lanes(Vec x) { return fold_lanes<Sum>(x); }
inline float max_lanes(Vec x) { return fold_lanes<Larger>(x); }

// Cephes expf: range reduction by ln 2 in two parts, degree-5 polynomial. Below -87.3 it is 0, above 88.37 very large;
// NaN stays NaN.
inline Vec exp_of(Vec x) {
    Vec inside = Vec::all(-87.3365478515625f).max(Vec::all(88.3762626647949f).min(x));  // NaN: both give the second
    Vec n = Vec::all(0.5f).fma(inside, Vec::all(1.44269504088896341f)).floor();
    Vec r = inside.fma(n, Vec::all(-0.693359375f)).fma(n, Vec::all(2.12194440e-4f));
    Vec p = Vec::all(1.3981999507e-3f).fma(Vec::all(1.9875691500e-4f), r);
    p = Vec::all(8.3334519073e-3f).fma(p, r);
    p = Vec::all(4.1665795894e-2f).fma(p, r);
    p = Vec::all(1.6666665459e-1f).fma(p, r);
    p = Vec::all(5.0000001201e-1f).fma(p, r);
    p = r.fma(p, r * r) + Vec::all(1.0f);
    return p * n.power_of_two();
}

}  // namespace
