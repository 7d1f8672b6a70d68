// Row-invariant operators for CPU inference: a row's bits never depend on the other rows, on their number or on the
// number of threads. Every output element is owned by one thread and accumulated in one fixed order.
//
// Plain C interface, no torch headers, so it builds in seconds with any C++17 compiler; AVX-512 and AVX2 have
// intrinsics, everything else runs the portable branch (same order of operations, so invariant too).
//
// Packed weight of a linear layer [N, K]: columns in blocks of 16, [ceil(N/16)][K][16], zero padded. float or bfloat16.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <vector>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;
constexpr int64_t kSmallWork = 1 << 17;  // multiply-adds below which waking a second thread costs more than it saves
enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };

// ---- 16 floats at a time --------------------------------------------------------------------------------------

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
    inline void store(float* p) const { _mm512_storeu_ps(p, v); }
    inline Vec fma(Vec a, Vec b) const { return {_mm512_fmadd_ps(a.v, b.v, v)}; }  // this + a * b
};
#elif defined(__AVX2__) && defined(__FMA__)
struct Vec {
    __m256 lo, hi;
    static inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static inline Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static inline __m256 widen(const uint16_t* p) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static inline Vec load(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
    inline void store(float* p) const { _mm256_storeu_ps(p, lo); _mm256_storeu_ps(p + 8, hi); }
    inline Vec fma(Vec a, Vec b) const { return {_mm256_fmadd_ps(a.lo, b.lo, lo), _mm256_fmadd_ps(a.hi, b.hi, hi)}; }
};
#else
struct Vec {
    float v[kLanes];
    static inline Vec zero() { return all(0.0f); }
    static inline Vec all(float x) { Vec r; for (float& y : r.v) y = x; return r; }
    static inline Vec load(const float* p) { Vec r; std::memcpy(r.v, p, sizeof r.v); return r; }
    static inline Vec load(const uint16_t* p) {
        Vec r;
        for (int i = 0; i < kLanes; ++i) { uint32_t bits = uint32_t(p[i]) << 16; std::memcpy(&r.v[i], &bits, 4); }
        return r;
    }
    inline void store(float* p) const { std::memcpy(p, v, sizeof v); }
    inline Vec fma(Vec a, Vec b) const { Vec r; for (int i = 0; i < kLanes; ++i) r.v[i] = std::fma(a.v[i], b.v[i], v[i]); return r; }
};
#endif

inline float widen(uint16_t x) { uint32_t bits = uint32_t(x) << 16; float y; std::memcpy(&y, &bits, 4); return y; }

inline uint16_t narrow(float x) {  // round to nearest even, NaN stays NaN
    uint32_t bits; std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float load_one(const void* p, int64_t i, int32_t dtype) {
    return dtype == kFloat32 ? static_cast<const float*>(p)[i] : widen(static_cast<const uint16_t*>(p)[i]);
}
inline void store_one(void* p, int64_t i, int32_t dtype, float x) {
    if (dtype == kFloat32) static_cast<float*>(p)[i] = x; else static_cast<uint16_t*>(p)[i] = narrow(x);
}
inline const char* at(const void* p, int64_t elements, int32_t dtype) {
    return static_cast<const char*>(p) + elements * (dtype == kFloat32 ? 4 : 2);
}

inline float sum_lanes(Vec x) {  // fixed tree
    float t[kLanes]; x.store(t);
    for (int step = 8; step; step >>= 1) for (int i = 0; i < step; ++i) t[i] += t[i + step];
    return t[0];
}

// ---- linear ---------------------------------------------------------------------------------------------------

// R rows by B blocks of 16 columns; each accumulator walks K in order.
template <int R, int B, typename W>
void tile(const float* x, int64_t x_stride, const W* w, int64_t block_stride, int64_t K,
          void* out, int32_t out_dtype, int64_t out_stride, int64_t columns) {
    Vec acc[R][B];
    for (int r = 0; r < R; ++r) for (int b = 0; b < B; ++b) acc[r][b] = Vec::zero();
    for (int64_t k = 0; k < K; ++k) {
        Vec wk[B];
        for (int b = 0; b < B; ++b) wk[b] = Vec::load(w + b * block_stride + k * kLanes);
        for (int r = 0; r < R; ++r) {
            Vec xk = Vec::all(x[r * x_stride + k]);
            for (int b = 0; b < B; ++b) acc[r][b] = acc[r][b].fma(xk, wk[b]);
        }
    }
    for (int r = 0; r < R; ++r) for (int b = 0; b < B; ++b) {
        int64_t count = std::min<int64_t>(kLanes, columns - b * kLanes);
        float t[kLanes]; acc[r][b].store(t);
        for (int64_t i = 0; i < count; ++i) store_one(out, r * out_stride + b * kLanes + i, out_dtype, t[i]);
    }
}

template <int B, typename W>
void rows_by_blocks(const float* x, int64_t x_stride, int64_t rows, const W* w, int64_t block_stride, int64_t K,
                    void* out, int32_t out_dtype, int64_t out_stride, int64_t columns) {
    int64_t r = 0;
    auto go = [&](auto tile_of_rows, int64_t n) {
        tile_of_rows(x + r * x_stride, x_stride, w, block_stride, K,
                     const_cast<char*>(at(out, r * out_stride, out_dtype)), out_dtype, out_stride, columns);
        r += n;
    };
    while (rows - r >= 8) go(tile<8, B, W>, 8);
    switch (rows - r) {
        case 7: go(tile<7, B, W>, 7); break;
        case 6: go(tile<6, B, W>, 6); break;
        case 5: go(tile<5, B, W>, 5); break;
        case 4: go(tile<4, B, W>, 4); break;
        case 3: go(tile<3, B, W>, 3); break;
        case 2: go(tile<2, B, W>, 2); break;
        case 1: go(tile<1, B, W>, 1); break;
        default: break;
    }
}

template <typename W>
void column_blocks(const float* x, int64_t x_stride, int64_t rows, const W* w, int64_t first, int64_t last, int64_t N,
                   int64_t K, void* out, int32_t out_dtype, int64_t out_stride) {
    int64_t block_stride = K * kLanes, b = first;
    for (; b + 2 <= last; b += 2)
        rows_by_blocks<2, W>(x, x_stride, rows, w + b * block_stride, block_stride, K,
                             const_cast<char*>(at(out, b * kLanes, out_dtype)), out_dtype, out_stride, N - b * kLanes);
    for (; b < last; ++b)
        rows_by_blocks<1, W>(x, x_stride, rows, w + b * block_stride, block_stride, K,
                             const_cast<char*>(at(out, b * kLanes, out_dtype)), out_dtype, out_stride, N - b * kLanes);
}

// ---- exp, the same code for every lane and every tail ---------------------------------------------------------

inline float exp_of(float x) {  // Cephes expf: range reduction by ln 2 in two parts, degree-5 polynomial
    if (!(x < 88.3762626647949f)) return x != x ? x : INFINITY;
    if (x < -87.3365478515625f) return 0.0f;
    float n = std::floor(std::fma(x, 1.44269504088896341f, 0.5f));
    float r = std::fma(n, -0.693359375f, x);
    r = std::fma(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = std::fma(p, r, 1.3981999507e-3f);
    p = std::fma(p, r, 8.3334519073e-3f);
    p = std::fma(p, r, 4.1665795894e-2f);
    p = std::fma(p, r, 1.6666665459e-1f);
    p = std::fma(p, r, 5.0000001201e-1f);
    p = std::fma(p, r * r, r) + 1.0f;
    uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float scale; std::memcpy(&scale, &bits, 4);
    return p * scale;
}

}  // namespace

extern "C" {

// For each group g: out[g] = x[g] @ weight[g].T for rows[g] rows. Row strides are in elements.
void dr_grouped_linear(int64_t groups, const int64_t* rows, const void* const* x, int64_t x_stride, int32_t x_dtype,
                       const void* const* weights, int32_t w_dtype, void* const* out, int64_t out_stride,
                       int32_t out_dtype, int64_t N, int64_t K, int32_t threads) {
    int64_t total = 0;
    std::vector<int64_t> first(groups);
    for (int64_t g = 0; g < groups; ++g) { first[g] = total; total += rows[g]; }
    if (!total) return;
    std::vector<float> wide;
    if (x_dtype != kFloat32) wide.resize(size_t(total) * K);
    const int64_t blocks = (N + kLanes - 1) / kLanes;
    if (total * N * K < kSmallWork) threads = 1;
    // A task is a run of column blocks of one group: enough tasks to balance, few enough to keep rows in cache.
    int64_t busy = 0;
    for (int64_t g = 0; g < groups; ++g) busy += rows[g] > 0;
    int64_t chunk = std::max<int64_t>(2, (blocks * busy + int64_t(threads) * 8 - 1) / (int64_t(threads) * 8));
    chunk = std::min((chunk + 1) / 2 * 2, blocks + blocks % 2);
    const int64_t chunks = (blocks + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads)
    {
        if (x_dtype != kFloat32) {
            for (int64_t g = 0; g < groups; ++g) {
                const uint16_t* source = static_cast<const uint16_t*>(x[g]);
#pragma omp for schedule(static) nowait
                for (int64_t r = 0; r < rows[g]; ++r)
                    for (int64_t k = 0; k < K; ++k) wide[(first[g] + r) * K + k] = widen(source[r * x_stride + k]);
            }
#pragma omp barrier
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * chunks; ++task) {
            int64_t g = task / chunks, c = task % chunks;
            if (!rows[g]) continue;
            const float* xg = x_dtype == kFloat32 ? static_cast<const float*>(x[g]) : wide.data() + first[g] * K;
            int64_t stride = x_dtype == kFloat32 ? x_stride : K;
            int64_t lo = c * chunk, hi = std::min(blocks, lo + chunk);
            if (w_dtype == kFloat32)
                column_blocks(xg, stride, rows[g], static_cast<const float*>(weights[g]), lo, hi, N, K, out[g],
                              out_dtype, out_stride);
            else
                column_blocks(xg, stride, rows[g], static_cast<const uint16_t*>(weights[g]), lo, hi, N, K, out[g],
                              out_dtype, out_stride);
        }
    }
}

// out = x * rsqrt(mean(x^2) + eps) * weight, statistics in float32. x and out share a dtype; weight is float32.
void dr_rms_norm(const void* x, int64_t x_stride, const float* weight, void* out, int64_t out_stride, int32_t dtype,
                 int64_t rows, int64_t width, float eps, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > kSmallWork)
    for (int64_t r = 0; r < rows; ++r) {
        const void* row = at(x, r * x_stride, dtype);
        float lanes[kLanes] = {0};
        for (int64_t i = 0; i < width; ++i) {
            float v = load_one(row, i, dtype);
            lanes[i % kLanes] = std::fma(v, v, lanes[i % kLanes]);
        }
        float scale = 1.0f / std::sqrt(sum_lanes(Vec::load(lanes)) / float(width) + eps);
        for (int64_t i = 0; i < width; ++i)
            store_one(out, r * out_stride + i, dtype, load_one(row, i, dtype) * scale * weight[i]);
    }
}

// gate_up [rows, 2 * width] -> out [rows, width] = silu(gate) * up, in float32, rounded once.
void dr_silu_mul(const void* gate_up, void* out, int32_t dtype, int64_t rows, int64_t width, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > kSmallWork / 8)
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i) {
            float gate = load_one(gate_up, r * 2 * width + i, dtype);
            float up = load_one(gate_up, (r * 2 + 1) * width + i, dtype);
            store_one(out, r * width + i, dtype, gate / (1.0f + exp_of(-gate)) * up);
        }
}

// logits [rows, width] float32 -> scores, in place. kind 0: sigmoid, 1: softmax.
void dr_scores(float* logits, int64_t rows, int64_t width, int32_t kind) {
    for (int64_t r = 0; r < rows; ++r) {
        float* row = logits + r * width;
        if (kind == 0) {
            for (int64_t i = 0; i < width; ++i) row[i] = 1.0f / (1.0f + exp_of(-row[i]));
            continue;
        }
        float top = row[0], sum = 0.0f;
        for (int64_t i = 1; i < width; ++i) top = std::max(top, row[i]);
        for (int64_t i = 0; i < width; ++i) { row[i] = exp_of(row[i] - top); sum += row[i]; }
        for (int64_t i = 0; i < width; ++i) row[i] /= sum;
    }
}

// Absorbed MLA over the paged latent cache: every head reads the same latents (multi-query, key width `width`, value =
// the first `value_width` of it). One pass for scores, one for the weighted sum, positions in order, no split.
//   query [tokens, heads, width] float32; cache [slots, width]; out [tokens, heads, value_width] float32
//   block_tables [sequences, max_blocks]; sequence_rows [tokens]; positions [tokens]
void dr_latent_attention(const float* query, const void* cache, int32_t cache_dtype, const int32_t* block_tables,
                         int64_t max_blocks, int64_t block_size, const int32_t* sequence_rows,
                         const int64_t* positions, float* out, int64_t tokens, int64_t heads, int64_t width,
                         int64_t value_width, float scale, int32_t threads) {
    constexpr int64_t kHeads = 4;  // heads that share one read of a latent
    const int64_t head_groups = (heads + kHeads - 1) / kHeads;
    const int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
    int64_t longest = 0, work = 0;
    for (int64_t t = 0; t < tokens; ++t) {
        longest = std::max(longest, positions[t] + 1);
        work += (positions[t] + 1) * heads * (width + value_width);
    }
    if (work < kSmallWork) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(size_t(kHeads) * longest), latent(padded, 0.0f);
        std::vector<float> q(size_t(kHeads) * padded, 0.0f), sum(size_t(kHeads) * padded);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t hg = 0; hg < head_groups; ++hg) {
                const int64_t h0 = hg * kHeads, nh = std::min(kHeads, heads - h0), context = positions[t] + 1;
                const int32_t* table = block_tables + int64_t(sequence_rows[t]) * max_blocks;
                for (int64_t h = 0; h < nh; ++h)
                    std::memcpy(q.data() + h * padded, query + (t * heads + h0 + h) * width, sizeof(float) * width);
                auto read = [&](int64_t j) -> const float* {
                    const void* row = at(cache, (int64_t(table[j / block_size]) * block_size + j % block_size) * width,
                                         cache_dtype);
                    if (cache_dtype == kFloat32 && padded == width) return static_cast<const float*>(row);
                    if (cache_dtype == kFloat32) std::memcpy(latent.data(), row, sizeof(float) * width);
                    else for (int64_t i = 0; i < width; ++i) latent[i] = widen(static_cast<const uint16_t*>(row)[i]);
                    return latent.data();
                };
                for (int64_t j = 0; j < context; ++j) {
                    const float* row = read(j);
                    Vec acc[kHeads];
                    for (Vec& a : acc) a = Vec::zero();
                    for (int64_t i = 0; i < padded; i += kLanes) {
                        Vec c = Vec::load(row + i);
                        for (int64_t h = 0; h < kHeads; ++h) acc[h] = acc[h].fma(Vec::load(q.data() + h * padded + i), c);
                    }
                    for (int64_t h = 0; h < nh; ++h) scores[h * longest + j] = sum_lanes(acc[h]) * scale;
                }
                for (int64_t h = 0; h < nh; ++h) {
                    float* s = scores.data() + h * longest;
                    float top = s[0], total = 0.0f;
                    for (int64_t j = 1; j < context; ++j) top = std::max(top, s[j]);
                    for (int64_t j = 0; j < context; ++j) { s[j] = exp_of(s[j] - top); total += s[j]; }
                    for (int64_t j = 0; j < context; ++j) s[j] /= total;
                }
                std::fill(sum.begin(), sum.end(), 0.0f);
                for (int64_t j = 0; j < context; ++j) {
                    const float* row = read(j);
                    for (int64_t h = 0; h < nh; ++h) {
                        Vec p = Vec::all(scores[h * longest + j]);
                        float* o = sum.data() + h * padded;
                        for (int64_t i = 0; i < value_width; i += kLanes)
                            Vec::load(o + i).fma(p, Vec::load(row + i)).store(o + i);
                    }
                }
                for (int64_t h = 0; h < nh; ++h)
                    std::memcpy(out + (t * heads + h0 + h) * value_width, sum.data() + h * padded,
                                sizeof(float) * value_width);
            }
        }
    }
}

}  // extern "C"
