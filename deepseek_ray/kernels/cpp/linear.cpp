// Matrix products with packed weights of floating-point numbers; those of integers are in integer.h.
//
// Packed weight of a linear layer [N, K]: columns in blocks of 16, zero padded.
//   float32   [ceil(N/16)][K][16]
//   bfloat16  [ceil(N/16)][ceil(K/2)][16][2]: two inputs beside each other, the order of vdpbf16ps, in which the second of
//             a pair is added first

#include "dot_pairs.h"
#include "integer.h"
#include "product.h"

namespace {

template <typename X>
struct PlainRows {
    const X* data;
    int64_t stride;
    PlainRows from(int64_t row) const { return {data + row * stride, stride}; }
};

// Rows as X, each padded with zeros to a multiple of `Step`.
template <typename X, int Step>
struct PlainStore {
    std::vector<X> values;
    int64_t stride = 0;

    void make_room(int64_t rows, int64_t K) {
        stride = (K + Step - 1) / Step * Step;
        if (values.size() < size_t(rows * stride)) values.resize(size_t(rows * stride));
    }
    void put(int64_t row, const void* from, int32_t dtype, int64_t K) {
        X* to = values.data() + row * stride;
        if constexpr (sizeof(X) == 4) {
            for (int64_t k = 0; k < K; k += kLanes)
                store_some(load_some(at(from, k, dtype), K - k, dtype), to + k, K - k, kFloat32);
        } else {
            std::memcpy(to, from, size_t(K) * 2);
        }
        std::fill(to + K, to + stride, X(0));
    }
    PlainRows<X> rows(int64_t first) const { return {values.data() + first * stride, stride}; }
};

template <typename X, typename W>
struct Floating {
    static constexpr int kStep = sizeof(W) == 2 ? 2 : 1;
    static constexpr bool kMany = kRegisters == 32;
    static constexpr int kMaxRows = kMany ? 8 : 6, kAloneRows = kMany ? 12 : 6;
    // Of 24 sums, 8 by 3 load the least for what they add: 12 by 2 wait for loads.
    static constexpr int blocks_of(int rows, bool) {
        return !kMany ? few_registers_blocks(rows) : rows <= 4 ? 4 : rows <= kMaxRows ? 3 : 2;
    }
    using Weight = W;
    using Rows = PlainRows<X>;
    using Store = PlainStore<X, kStep>;

    static bool takes(const Call& call) {
        return call.x_dtype == (sizeof(X) == 4 ? kFloat32 : kBfloat16) && call.K % kStep == 0;
    }
    static Rows rows_at(const void* x, int64_t stride) { return {static_cast<const X*>(x), stride}; }
    static constexpr int64_t block_stride(int64_t K) { return (K + kStep - 1) / kStep * kStep * kLanes; }
    static const void* scales_of(const void*, int64_t, int64_t) { return nullptr; }

    template <int R, int B>
    static inline void tile(Rows x, const W* w, int64_t K, const void*, int64_t k0, int64_t k1, Carry carry,
                            const Output* out) {
        const int64_t stride = block_stride(K);
        Vec sums[R][B];
        carry.load(sums, k0 == 0);
        for (int64_t k = k0; k < k1; k += kStep) {
            for (int b = 0; b < B; ++b) fetch_ahead<B>(w + b * stride + k * kLanes);
            add<R, B>(sums, x.data + k, x.stride, w + k * kLanes, stride);
        }
        if (!out) return carry.keep(sums);
        for (int b = 0; b < B; ++b) for (int r = 0; r < R; ++r) out->put(sums[r][b], r, b * kLanes);
    }

    // The products of kStep inputs.
    template <int R, int B>
    static inline void add(Vec (&sums)[R][B], const X* x, int64_t x_stride, const W* w, int64_t stride) {
        if constexpr (sizeof(X) == 2) {
#if defined(__AVX512BF16__)
            for (int r = 0; r < R; ++r)
                for (int b = 0; b < B; ++b)
                    sums[r][b] = add_pairs(sums[r][b], _mm512_loadu_si512(w + b * stride), x + r * x_stride);
#endif
        } else {
            for (int s = kStep - 1; s >= 0; --s) {
                Vec wk[B];
                for (int b = 0; b < B; ++b) {
                    if constexpr (kStep == 2) wk[b] = Vec::half(w + b * stride, s); else wk[b] = Vec::load(w + b * stride);
                }
                for (int r = 0; r < R; ++r) {
                    Vec xk = Vec::all(x[r * x_stride + s]);
                    for (int b = 0; b < B; ++b) sums[r][b] = sums[r][b].fma(xk, wk[b]);
                }
            }
        }
    }
};

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
        add_pairs(Vec::load(start), _mm512_loadu_si512(w), x).store(got);
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
    const Call call{groups, rows, x, x_stride, x_dtype, weights, scales, out, out_stride, out_dtype, N, K, threads};
    if (w_dtype == kFloat32) return run_call<Floating<float, float>>(call);
    if (w_dtype == kInt8) return run_call<Integer<8>>(call);
    if (w_dtype == kInt4) return run_call<Integer<4>>(call);
#if defined(__AVX512BF16__)
    if (use_pairs && x_dtype == kBfloat16) return run_call<Floating<uint16_t, uint16_t>>(call);
#endif
    run_call<Floating<float, uint16_t>>(call);
}

}  // extern "C"
