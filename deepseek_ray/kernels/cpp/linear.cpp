// Matrix products with packed weights. A row's bits never depend on the other rows, on their number or on the number of
// threads: every output element has an accumulator of its own, which takes the products in one order.
//
// Packed weight of a linear layer [N, K]: columns in blocks of 16, zero padded.
//   float32   [ceil(N/16)][K][16]
//   bfloat16  [ceil(N/16)][ceil(K/2)][16][2]: two inputs beside each other, the order of vdpbf16ps, in which the second of
//             a pair is added first
//   int8      [ceil(N/16)][K][16], and float32 scales [ceil(N/16)][16], by which a finished sum is multiplied
//   int4      [ceil(N/16)][ceil(K/32)][4][16] units of 4 bytes with 8 inputs each, the first in the lowest bits, and
//             bfloat16 scales [ceil(N/16)][ceil(K/32)][16], by which the sum over 32 inputs is multiplied

#include "lanes.h"

namespace {

#if defined(__AVX512F__)
constexpr int kMaxRows = 12;  // 24 accumulators of 32 registers, two blocks of columns beside each other
constexpr int blocks_of(int) { return 2; }
#else
constexpr int kMaxRows = 6;  // 12 of 16
constexpr int blocks_of(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
#endif
constexpr int64_t kPanel = 72;      // rows whose inputs stay in the second-level cache
constexpr int64_t kInputs = 1024;   // inputs that are taken together where rows are many
constexpr int64_t kAhead = 1536;    // bytes by which weights are fetched before they are used

struct Int4 { uint32_t unit; };
template <typename W> constexpr int kStep = 1;  // inputs that are taken together
template <> constexpr int kStep<uint16_t> = 2;
template <> constexpr int kStep<Int4> = 32;
template <typename W> constexpr int kPerElement = 1;  // inputs in one W
template <> constexpr int kPerElement<Int4> = 8;

struct Output {
    void* data;      // of the first row and column
    int64_t stride;  // elements
    int32_t dtype;
    int64_t columns;
};

// R rows by B blocks of 16 columns over the inputs [k0, k1), both multiples of kStep but for the last k1. `carry` holds
// the sums between two such runs: [B][R][16], each block `carry_stride` further.
template <int R, int B, typename W>
inline void tile(const float* x, int64_t x_stride, const W* w, int64_t block_stride, int64_t k0, int64_t k1,
                 float* carry, int64_t carry_stride, const void* all_scales, const Output* out) {
    constexpr int S = kStep<W>;
    const float* scales = static_cast<const float*>(all_scales);
    Vec acc[R][B];
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) acc[r][b] = k0 ? Vec::load(carry + b * carry_stride + r * kLanes) : Vec::zero();
    for (int64_t k = k0; k < k1; k += S) {
        if (R <= 2)
            for (int b = 0; b < B; ++b)
                __builtin_prefetch(reinterpret_cast<const char*>(w + b * block_stride + k * kLanes) + kAhead);
        for (int s = S - 1; s >= 0; --s) {
            Vec wk[B];
            for (int b = 0; b < B; ++b) {
                const W* p = w + b * block_stride + k * kLanes;
                if constexpr (S == 2) wk[b] = Vec::half(p, s); else wk[b] = Vec::load(p);
            }
            for (int r = 0; r < R; ++r) {
                Vec xk = Vec::all(x[r * x_stride + k + s]);
                for (int b = 0; b < B; ++b) acc[r][b] = acc[r][b].fma(xk, wk[b]);
            }
        }
    }
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) {
            if (!out) { acc[r][b].store(carry + b * carry_stride + r * kLanes); continue; }
            Vec y = scales ? acc[r][b] * Vec::load(scales + b * kLanes) : acc[r][b];
            store_some(y, at(out->data, r * out->stride + b * kLanes, out->dtype), out->columns - b * kLanes, out->dtype);
        }
}

// The same for int4: `scales` are those of the first block, the others' follow after K/32 times 16.
template <int R, int B>
inline void tile(const float* x, int64_t x_stride, const Int4* w, int64_t block_stride, int64_t k0, int64_t k1,
                 float* carry, int64_t carry_stride, const void* all_scales, const Output* out) {
    const uint16_t* scales = static_cast<const uint16_t*>(all_scales);
    Vec total[R][B];
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) total[r][b] = k0 ? Vec::load(carry + b * carry_stride + r * kLanes) : Vec::zero();
    for (int64_t k = k0; k < k1; k += kStep<Int4>) {
        Vec acc[R][B];
        for (int b = 0; b < B; ++b) for (int r = 0; r < R; ++r) acc[r][b] = Vec::zero();
        for (int64_t u = k / 8; u < k / 8 + 4; ++u) {
            if (R <= 2)
                for (int b = 0; b < B; ++b)
                    __builtin_prefetch(reinterpret_cast<const char*>(w + b * block_stride + u * kLanes) + kAhead);
            for (int i = 0; i < 8; ++i) {
                Vec wk[B];
                for (int b = 0; b < B; ++b) wk[b] = Vec::nibble(&w[b * block_stride + u * kLanes].unit, i);
                for (int r = 0; r < R; ++r) {
                    Vec xk = Vec::all(x[r * x_stride + u * 8 + i]);
                    for (int b = 0; b < B; ++b) acc[r][b] = acc[r][b].fma(xk, wk[b]);
                }
            }
        }
        for (int b = 0; b < B; ++b) {
            Vec scale = Vec::load(scales + b * block_stride / 4 + k / kStep<Int4> * kLanes);
            for (int r = 0; r < R; ++r) total[r][b] = total[r][b].fma(acc[r][b], scale);
        }
    }
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) {
            if (!out) { total[r][b].store(carry + b * carry_stride + r * kLanes); continue; }
            store_some(total[r][b], at(out->data, r * out->stride + b * kLanes, out->dtype), out->columns - b * kLanes,
                       out->dtype);
        }
}

#if defined(__AVX512BF16__)
// The same for bfloat16 inputs: x holds pairs. The instruction rounds after each of its two additions, as fma does, so
// the bits are those of `tile`; `dr_check` looks whether this CPU agrees.
template <int R, int B>
inline void tile(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t block_stride, int64_t k0, int64_t k1,
                 float* carry, int64_t carry_stride, const void*, const Output* out) {
    Vec acc[R][B];
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) acc[r][b] = k0 ? Vec::load(carry + b * carry_stride + r * kLanes) : Vec::zero();
    for (int64_t k = k0; k < k1; k += 2) {
        if (R <= 2)
            for (int b = 0; b < B; ++b)
                __builtin_prefetch(reinterpret_cast<const char*>(w + b * block_stride + k * kLanes) + kAhead);
        __m512bh wk[B];
        for (int b = 0; b < B; ++b) wk[b] = (__m512bh)_mm512_loadu_si512(w + b * block_stride + k * kLanes);
        for (int r = 0; r < R; ++r) {
            int32_t pair; std::memcpy(&pair, x + r * x_stride + k, 4);
            __m512bh xk = (__m512bh)_mm512_set1_epi32(pair);
            for (int b = 0; b < B; ++b) acc[r][b].v = _mm512_dpbf16_ps(acc[r][b].v, wk[b], xk);
        }
    }
    for (int b = 0; b < B; ++b)
        for (int r = 0; r < R; ++r) {
            if (!out) { acc[r][b].store(carry + b * carry_stride + r * kLanes); continue; }
            store_some(acc[r][b], at(out->data, r * out->stride + b * kLanes, out->dtype), out->columns - b * kLanes,
                       out->dtype);
        }
}
#endif

bool use_pairs = false;  // vdpbf16ps, where it is there and has the bits of fma

// One matrix and the rows that meet it. X is float, or uint16_t for pairs of bfloat16.
template <typename X, typename W>
struct Product {
    const X* x;
    int64_t x_stride, rows;
    const W* w;
    const void* scales;
    int64_t num_out, num_in;
    void* out;
    int64_t out_stride;
    int32_t out_dtype;

    // Elements of a block of 16 columns; of int4 four times as many as it has scales.
    int64_t block_stride() const {
        return (num_in + kStep<W> - 1) / kStep<W> * kStep<W> / kPerElement<W> * kLanes;
    }

    const void* scales_of(int64_t block) const {
        if constexpr (sizeof(W) == sizeof(Int4) && kPerElement<W> == 8)
            return static_cast<const uint16_t*>(scales) + block * block_stride() / 4;
        else
            return scales ? static_cast<const float*>(scales) + block * kLanes : nullptr;
    }

    template <int R, int B>
    void run_tile(int64_t row, int64_t block, int64_t k0, int64_t k1, float* carry, int64_t carry_stride) const {
        Output output{at(out, row * out_stride + block * kLanes, out_dtype), out_stride, out_dtype,
                      num_out - block * kLanes};
        tile<R, B>(x + row * x_stride, x_stride, w + block * block_stride(), block_stride(), k0, k1, carry, carry_stride,
                   scales_of(block), k1 == num_in ? &output : nullptr);
    }

    // R rows of the blocks [first, last) that still make a group of B(R), and the rest one by one.
    template <int R>
    void run_rows(int64_t row, int64_t first, int64_t last, int64_t k0, int64_t k1, float* carry,
                  int64_t carry_stride) const {
        constexpr int B = blocks_of(R);
        int64_t b = first;
        for (; b + B <= last; b += B) run_tile<R, B>(row, b, k0, k1, carry + (b - first) * carry_stride, carry_stride);
        for (; b < last; ++b) run_tile<R, 1>(row, b, k0, k1, carry + (b - first) * carry_stride, carry_stride);
    }

    template <int R = kMaxRows>
    void run_rows_of(int64_t count, int64_t row, int64_t first, int64_t last, int64_t k0, int64_t k1, float* carry,
                     int64_t carry_stride) const {
        if constexpr (R > 0) {
            if (count == R) run_rows<R>(row, first, last, k0, k1, carry, carry_stride);
            else run_rows_of<R - 1>(count, row, first, last, k0, k1, carry, carry_stride);
        }
    }

    // All rows against the blocks [first, last). Rows are cut into panels, panels into tiles of like heights.
    void run(int64_t first, int64_t last) const {
        thread_local std::vector<float> sums;
        const int64_t panels = (rows + kPanel - 1) / kPanel, group = blocks_of(kMaxRows);
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t begin = rows * p / panels, height = rows * (p + 1) / panels - begin;
            const int64_t tiles = (height + kMaxRows - 1) / kMaxRows;
            const int64_t inputs = tiles > 2 ? kInputs : num_in;
            if (tiles > 2) sums.resize(size_t((last - first) * height * kLanes));
            for (int64_t k0 = 0; k0 < num_in; k0 += inputs)
                for (int64_t b = first; b < last; b += tiles > 1 ? group : last - first)
                    for (int64_t t = 0; t < tiles; ++t) {
                        const int64_t top = height * t / tiles, count = height * (t + 1) / tiles - top;
                        run_rows_of(count, begin + top, b, tiles > 1 ? std::min(last, b + group) : last, k0,
                                    std::min(num_in, k0 + inputs), sums.data() + ((b - first) * height + top) * kLanes,
                                    height * kLanes);
                    }
        }
    }
};

// A row as X; its end is padded with zeros.
template <typename X>
void copy_row(const void* source, int32_t dtype, int64_t K, int64_t padded, X* to) {
    for (int64_t k = 0; k < K; k += kLanes) {
        if constexpr (sizeof(X) == 4) {
            store_some(load_some(at(source, k, dtype), K - k, dtype), to + k, K - k, kFloat32);
        } else {
            std::memcpy(to + k, static_cast<const uint16_t*>(source) + k, size_t(std::min<int64_t>(kLanes, K - k)) * 2);
        }
    }
    std::fill(to + K, to + padded, X(0));
}

template <typename X, typename W>
void grouped(int64_t groups, const int64_t* rows, const void* const* x, int64_t x_stride, int32_t x_dtype,
             const void* const* weights, const void* const* scales, void* const* out, int64_t out_stride,
             int32_t out_dtype, int64_t N, int64_t K, int32_t threads) {
    thread_local std::vector<X> copies;
    int64_t total = 0, busy = 0;
    std::vector<int64_t> first(groups);
    for (int64_t g = 0; g < groups; ++g) { first[g] = total; total += rows[g]; busy += rows[g] > 0; }
    if (!total) return;
    const bool as_is = x_dtype == (sizeof(X) == 4 ? kFloat32 : kBfloat16) && K % kStep<W> == 0;
    const int64_t padded = (K + kStep<W> - 1) / kStep<W> * kStep<W>;
    if (!as_is && copies.size() < size_t(total * padded)) copies.resize(size_t(total * padded));
    X* const copied = copies.data();
    const int64_t blocks = (N + kLanes - 1) / kLanes;
    if (total * N * K < kSmallWork) threads = 1;
    // A task is a run of column blocks of one group: enough tasks to balance, few enough to keep rows in cache.
    int64_t chunk = std::max<int64_t>(4, (blocks * busy + int64_t(threads) * 8 - 1) / (int64_t(threads) * 8));
    chunk = std::min((chunk + 3) / 4 * 4, blocks);
    const int64_t chunks = (blocks + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads)
    {
        if (!as_is) {
            for (int64_t g = 0; g < groups; ++g) {
#pragma omp for schedule(static) nowait
                for (int64_t r = 0; r < rows[g]; ++r)
                    copy_row(at(x[g], r * x_stride, x_dtype), x_dtype, K, padded, copied + (first[g] + r) * padded);
            }
#pragma omp barrier
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * chunks; ++task) {
            const int64_t g = task / chunks, c = task % chunks;
            if (!rows[g]) continue;
            Product<X, W> product{as_is ? static_cast<const X*>(x[g]) : copied + first[g] * padded,
                                  as_is ? x_stride : padded,
                                  rows[g],
                                  static_cast<const W*>(weights[g]),
                                  scales ? scales[g] : nullptr,
                                  N,
                                  K,
                                  out[g],
                                  out_stride,
                                  out_dtype};
            product.run(c * chunk, std::min(blocks, (c + 1) * chunk));
        }
    }
}

}  // namespace

extern "C" {

// Whether vdpbf16ps is used from now on: it is there, and gives the bits of two fused multiply-adds, the second first.
int32_t dr_check() {
#if defined(__AVX512BF16__)
    uint32_t state = 1;
    auto next = [&] { state = state * 1664525u + 1013904223u; return uint16_t((state >> 16 & 0x80ffu) | 0x3f00u); };
    bool same = true;
    for (int round = 0; round < 64; ++round) {
        alignas(64) uint16_t w[32], x[2];
        alignas(64) float start[16], got[16];
        for (auto& y : w) y = next();
        for (auto& y : x) y = next();
        for (auto& y : start) { uint32_t bits = uint32_t(next()) << 16 | next(); std::memcpy(&y, &bits, 4); }
        int32_t pair; std::memcpy(&pair, x, 4);
        __m512 sum = _mm512_dpbf16_ps(_mm512_loadu_ps(start), (__m512bh)_mm512_loadu_si512(w),
                                      (__m512bh)_mm512_set1_epi32(pair));
        _mm512_storeu_ps(got, sum);
        auto wide = [](uint16_t y) { uint32_t bits = uint32_t(y) << 16; float z; std::memcpy(&z, &bits, 4); return z; };
        for (int i = 0; i < 16; ++i) {
            float expected = std::fma(wide(w[2 * i + 1]), wide(x[1]), start[i]);
            same = same && got[i] == std::fma(wide(w[2 * i]), wide(x[0]), expected);
        }
    }
    use_pairs = same;
#endif
    return use_pairs;
}

// For each group g: out[g] = x[g] @ weight[g].T for rows[g] rows. Row strides are in elements. `scales` is null unless
// the weights are integers.
void dr_grouped_linear(int64_t groups, const int64_t* rows, const void* const* x, int64_t x_stride, int32_t x_dtype,
                       const void* const* weights, int32_t w_dtype, const void* const* scales, void* const* out,
                       int64_t out_stride, int32_t out_dtype, int64_t N, int64_t K, int32_t threads) {
    auto go = [&](auto run) {
        run(groups, rows, x, x_stride, x_dtype, weights, scales, out, out_stride, out_dtype, N, K, threads);
    };
    if (w_dtype == kFloat32) return go(grouped<float, float>);
    if (w_dtype == kInt8) return go(grouped<float, int8_t>);
    if (w_dtype == kInt4) return go(grouped<float, Int4>);
#if defined(__AVX512BF16__)
    if (use_pairs && x_dtype == kBfloat16) return go(grouped<uint16_t, uint16_t>);
#endif
    go(grouped<float, uint16_t>);
}

}  // extern "C"
