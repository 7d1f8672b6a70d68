// How a grouped matrix product is cut into tiles. What a tile computes, with which weights and inputs, is a Kind:
//
//   Kind::Weight                     element of the packed weight
//   Kind::Rows                       inputs of the rows of one group; `from(r)` are those from row r on
//   Kind::Store                      inputs as the tiles want them, of all groups; made once per product
//   Kind::kStep                      inputs that are taken together: runs of inputs begin at multiples of it
//   Kind::block_stride(K)            elements of Weight in a block of 16 columns
//   Kind::kMaxRows                   the largest tile of several
//   Kind::kAloneRows                 rows that one tile takes if they are all there are: weights are read once
//   Kind::blocks_of(rows, alone)     blocks of a tile: its sums fit the registers
//   Kind::tile<R, B>(...)            R rows by B blocks over the inputs [k0, k1)
//
// A row's bits never depend on the other rows, on their number or on the number of threads: every output element has an
// accumulator of its own, which takes the products in one order.

#pragma once

#include "lanes.h"
#include "pool.h"

namespace {

#if defined(__AVX512F__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
// Blocks of columns beside each other: with few rows more of them, so that there are enough sums to wait for.
constexpr int few_registers_blocks(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
constexpr int64_t kPanel = 72;      // rows whose inputs stay in the second-level cache

// Weights on their way before they are used, for a tile of B blocks. With AVX-512 they come to the second-level cache, as
// measured on a Zen 4: int8 and int4 read 1.2 times as fast as by way of the first. 8 KB of all blocks together are on
// their way, so that memory has the same time to bring them. The distance without AVX-512 was measured on a Milan.
template <int B>
inline void fetch_ahead(const void* p) {
#if defined(__AVX512F__)
    __builtin_prefetch(static_cast<const char*>(p) + 8192 / B, 0, 2);
#else
    __builtin_prefetch(static_cast<const char*>(p) + 1536);
#endif
}

struct Output {
    void* data;      // of the first row and column
    int64_t stride;  // elements
    int32_t dtype;
    int64_t columns;

    void put(Vec x, int64_t row, int64_t column) const {
        store_some(x, at(data, row * stride + column, dtype), columns - column, dtype);
    }
};

// Sums between two runs of inputs: [B][R][16], each block `stride` further.
struct Carry {
    float* data;
    int64_t stride;

    float* of(int row, int block) const { return data + block * stride + row * kLanes; }
    template <int R, int B> void load(Vec (&sums)[R][B], bool first) const {
        for (int b = 0; b < B; ++b)
            for (int r = 0; r < R; ++r) sums[r][b] = first ? Vec::zero() : Vec::load(of(r, b));
    }
    template <int R, int B> void keep(const Vec (&sums)[R][B]) const {
        for (int b = 0; b < B; ++b) for (int r = 0; r < R; ++r) sums[r][b].store(of(r, b));
    }
};

// One matrix and the rows that meet it.
template <typename Kind>
struct Product {
    typename Kind::Rows x;
    int64_t rows;
    const typename Kind::Weight* w;
    const void* scales;
    int64_t num_out, num_in;
    void* out;
    int64_t out_stride;
    int32_t out_dtype;

    template <int R, int B>
    void run_tile(int64_t row, int64_t block, int64_t k0, int64_t k1, Carry carry) const {
        Output output{at(out, row * out_stride + block * kLanes, out_dtype), out_stride, out_dtype,
                      num_out - block * kLanes};
        Kind::template tile<R, B>(x.from(row), w + block * Kind::block_stride(num_in), num_in,
                                  Kind::scales_of(scales, block, num_in), k0, k1, carry, k1 == num_in ? &output : nullptr);
    }

    // R rows of the blocks [first, last): groups of B(R) as long as there are, and the rest one by one.
    template <int R, bool Alone>
    void run_rows(int64_t row, int64_t first, int64_t last, int64_t k0, int64_t k1, Carry carry) const {
        constexpr int B = Kind::blocks_of(R, Alone);
        int64_t b = first;
        for (; b + B <= last; b += B) run_tile<R, B>(row, b, k0, k1, {carry.of(0, int(b - first)), carry.stride});
        for (; b < last; ++b) run_tile<R, 1>(row, b, k0, k1, {carry.of(0, int(b - first)), carry.stride});
    }

    template <bool Alone, int R = Alone ? Kind::kAloneRows : Kind::kMaxRows>
    void run_rows_of(int64_t count, int64_t row, int64_t first, int64_t last, int64_t k0, int64_t k1, Carry carry) const {
        if constexpr (R > 0) {
            if (count == R) run_rows<R, Alone>(row, first, last, k0, k1, carry);
            else run_rows_of<Alone, R - 1>(count, row, first, last, k0, k1, carry);
        }
    }

    // Inputs that are taken together where rows are many: 32 KB of a block, or what was best on CPUs without AVX-512.
    static constexpr int64_t kInputBytes = Kind::block_stride(32) * int64_t(sizeof(typename Kind::Weight)) / 32;
    static constexpr int64_t kInputs = kRegisters == 32 ? (1 << 15) / kInputBytes : 1024;

    // All rows against the blocks [first, last). Rows are cut into panels, panels into tiles of like heights.
    void run(int64_t first, int64_t last) const {
        thread_local std::vector<float> sums;
        const int64_t panels = (rows + kPanel - 1) / kPanel;
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t begin = rows * p / panels, height = rows * (p + 1) / panels - begin;
            if (height <= Kind::kAloneRows) {
                run_rows_of<true>(height, begin, first, last, 0, num_in, {});
                continue;
            }
            const int64_t tiles = (height + Kind::kMaxRows - 1) / Kind::kMaxRows;
            const int64_t group = Kind::blocks_of(int((height + tiles - 1) / tiles), false);  // of the tallest tile
            const int64_t inputs = tiles > 2 ? kInputs : num_in;
            if (tiles > 2) sums.resize(size_t((last - first) * height * kLanes));
            for (int64_t k0 = 0; k0 < num_in; k0 += inputs)
                for (int64_t b = first; b < last; b += group)
                    for (int64_t t = 0; t < tiles; ++t) {
                        const int64_t top = height * t / tiles, count = height * (t + 1) / tiles - top;
                        const Carry carry{sums.data() + ((b - first) * height + top) * kLanes, height * kLanes};
                        run_rows_of<false>(count, begin + top, b, std::min(last, b + group), k0,
                                           std::min(num_in, k0 + inputs), carry);
                    }
        }
    }
};

struct Call {
    int64_t groups;
    const int64_t* rows;
    const void* const* x;
    int64_t x_stride;
    int32_t x_dtype;
    const void* const* weights;
    const void* const* scales;
    void* const* out;
    int64_t out_stride;
    int32_t out_dtype;
    int64_t N, K;
    int32_t threads;
};

template <typename Kind>
void run_call(const Call& call) {
    thread_local typename Kind::Store store_of_thread;
    typename Kind::Store& store = store_of_thread;  // the caller's: a thread of the pool has another
    int64_t total = 0, busy = 0;
    std::vector<int64_t> first(call.groups);
    for (int64_t g = 0; g < call.groups; ++g) {
        first[g] = total;
        total += call.rows[g];
        busy += call.rows[g] > 0;
    }
    if (!total) return;
    const bool as_is = Kind::takes(call);
    if (!as_is) store.make_room(total, call.K);
    const int64_t blocks = (call.N + kLanes - 1) / kLanes;
    const int32_t threads = total * call.N * call.K < kSmallWork ? 1 : call.threads;
    // A task is a run of column blocks of one group: enough tasks to balance, few enough to keep rows in cache.
    int64_t chunk = std::max<int64_t>(4, (blocks * busy + int64_t(threads) * 8 - 1) / (int64_t(threads) * 8));
    const int64_t unit = chunk > 8 ? 12 : 4;  // whole tiles of 4, 3 or 2 blocks
    chunk = std::min((chunk + unit - 1) / unit * unit, blocks);
    const int64_t chunks = (blocks + chunk - 1) / chunk;
    if (!as_is) {
        std::vector<int64_t> group_of(total);
        for (int64_t g = 0; g < call.groups; ++g) std::fill_n(group_of.begin() + first[g], call.rows[g], g);
        pool::run(total, total * call.K < kSmallWork ? 1 : threads, [&](int64_t row) {
            const int64_t g = group_of[row];
            store.put(row, at(call.x[g], (row - first[g]) * call.x_stride, call.x_dtype), call.x_dtype, call.K);
        });
    }
    pool::run(call.groups * chunks, threads, [&](int64_t task) {
        const int64_t g = task / chunks, c = task % chunks;
        if (!call.rows[g]) return;
        Product<Kind> product{as_is ? Kind::rows_at(call.x[g], call.x_stride) : store.rows(first[g]),
                              call.rows[g],
                              static_cast<const typename Kind::Weight*>(call.weights[g]),
                              call.scales ? call.scales[g] : nullptr,
                              call.N,
                              call.K,
                              call.out[g],
                              call.out_stride,
                              call.out_dtype};
        product.run(c * chunk, std::min(blocks, (c + 1) * chunk));
    });
}

}  // namespace
