// Float32 matrix products of one thread, over operands that lie either way and rows that need not follow one another.
//
// The right operand is packed into panels of 16 columns, the left one is read where it lies or packed six rows at a time;
// a tile of the result stays in registers along a block of the inner dimension. Every element is summed in the order of
// that dimension, block after block, whatever the tile it falls into.

#pragma once

#include "../lanes.h"

namespace {

constexpr int64_t kTileRows = 6;     // with 16 columns: 12 of AVX2's 16 registers
constexpr int64_t kInner = 256;      // a panel of 16 columns is half of a level-1 cache
constexpr int64_t kColumns = 128;    // a block of panels is a quarter of a level-2 cache

// Rows of floats, `stride` apart. If `inner_is_row`, a row holds one place of the inner dimension; else it runs along it.
struct Operand {
    const float* data;
    int64_t stride;
    bool inner_is_row;
    inline const float* row(int64_t i) const { return data + i * stride; }
    inline Operand from(int64_t outer, int64_t inner) const {
        return {data + (inner_is_row ? inner * stride + outer : outer * stride + inner), stride, inner_is_row};
    }
};

constexpr int kSlots = 16;

// A thread's own floats, kept from call to call, and a few more. `slot` tells apart those that are in use at once.
inline float* scratch(int slot, int64_t count) {
    thread_local std::vector<float> kept[kSlots];
    if (int64_t(kept[slot].size()) < count + 2 * kLanes) kept[slot].resize(size_t(count + 2 * kLanes));
    const auto address = reinterpret_cast<uintptr_t>(kept[slot].data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// out[i][r] = row r [i], eight floats of R rows, i in order; `step` floats from one `out` to the next. Writes eight floats
// each time, zeros in place of rows 6 and 7 if R is 6.
template <int R>
inline void transpose_eight(const float* rows, int64_t stride, float* out, int64_t step) {
#if defined(__AVX2__)
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = i < R ? _mm256_loadu_ps(rows + i * stride) : _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + i * step, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + (i + 4) * step, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
#else
    for (int i = 0; i < 8; ++i) for (int j = 0; j < R; ++j) out[i * step + j] = rows[j * stride + i];
#endif
}

inline void prefetch(const float* p) { __builtin_prefetch(p); }

// Panels [inner][16], one after another, of a b whose rows are places of the inner dimension. Four panels at a time, so
// that memory is read in longer pieces.
inline void pack_right_rows(const Operand& b, int64_t columns, int64_t inner, float* out) {
    for (int64_t j = 0; j < columns; j += 4 * kLanes)
        for (int64_t k = 0; k < inner; ++k)
            for (int64_t p = j; p < std::min(columns, j + 4 * kLanes); p += kLanes) {
                prefetch(b.row(k + 8) + p);
                load_some(b.row(k) + p, columns - p, kFloat32).store(out + p * inner + k * kLanes);
            }
}

// The same of a b whose rows are columns of the product.
inline void pack_right_columns(const Operand& b, int64_t columns, int64_t inner, float* out) {
    for (int64_t j = 0; j < columns; j += kLanes) {
        float* panel = out + j * inner;
        int64_t k = 0;
        for (; k + kLanes <= inner && j + kLanes <= columns; k += kLanes)  // a line of each row
            for (int64_t r = 0; r < kLanes; r += 8) {
                for (int64_t i = r; i < r + 8; ++i) prefetch(b.row(j + i) + k + 2 * kLanes);
                transpose_eight<8>(b.row(j + r) + k, b.stride, panel + k * kLanes + r, kLanes);
                transpose_eight<8>(b.row(j + r) + k + 8, b.stride, panel + (k + 8) * kLanes + r, kLanes);
            }
        for (; k < inner; ++k)
            for (int64_t c = 0; c < kLanes; ++c) panel[k * kLanes + c] = j + c < columns ? b.row(j + c)[k] : 0.0f;
    }
}

// The same of either; columns that are missing in the last panel are 0.
inline void pack_right(const Operand& b, int64_t columns, int64_t inner, float* out) {
    if (b.inner_is_row) pack_right_rows(b, columns, inner, out); else pack_right_columns(b, columns, inner, out);
}

// a's first `rows` rows -> tiles [inner][6], one after another, 2 floats of slack at the end; missing rows are 0.
inline void pack_left(const Operand& a, int64_t rows, int64_t inner, float* out) {
    for (int64_t i = 0; i < rows; i += kTileRows, out += inner * kTileRows) {
        const int64_t height = std::min(kTileRows, rows - i);
        int64_t k = 0;
        if (height == kTileRows && !a.inner_is_row)
            for (; k + 8 <= inner; k += 8)  // eight floats each: six overwrite the last two of those before
                transpose_eight<kTileRows>(a.row(i) + k, a.stride, out + k * kTileRows, kTileRows);
        if (a.inner_is_row && i + 8 <= rows)
            for (; k < inner; ++k) std::memcpy(out + k * kTileRows, a.row(k) + i, 8 * sizeof(float));
        for (; k < inner; ++k)
            for (int64_t r = 0; r < kTileRows; ++r)
                out[k * kTileRows + r] = r >= height ? 0.0f : a.inner_is_row ? a.row(k)[i + r] : a.row(i + r)[k];
    }
}

// c [R][columns] = a tile [inner][6] * panel [inner][16], added to what is there if `adds`.
template <int R>
inline void tile(const float* a, const float* panel, int64_t inner, float* c, int64_t c_stride, int64_t columns,
                 bool adds) {
    Vec sum[R];
    for (int r = 0; r < R; ++r) sum[r] = Vec::zero();
#pragma GCC unroll 4
    for (int64_t k = 0; k < inner; ++k) {
        const Vec b = Vec::load(panel + k * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) sum[r] = sum[r].fma(Vec::all(a[k * kTileRows + r]), b);
    }
    for (int r = 0; r < R; ++r) {
        float* to = c + r * c_stride;
        store_some(adds ? load_some(to, columns, kFloat32) + sum[r] : sum[r], to, columns, kFloat32);
    }
}

inline void tile_of(int64_t rows, const float* a, const float* panel, int64_t inner, float* c, int64_t c_stride,
                    int64_t columns, bool adds) {
    switch (rows) {
        case 6: return tile<6>(a, panel, inner, c, c_stride, columns, adds);
        case 5: return tile<5>(a, panel, inner, c, c_stride, columns, adds);
        case 4: return tile<4>(a, panel, inner, c, c_stride, columns, adds);
        case 3: return tile<3>(a, panel, inner, c, c_stride, columns, adds);
        case 2: return tile<2>(a, panel, inner, c, c_stride, columns, adds);
        default: return tile<1>(a, panel, inner, c, c_stride, columns, adds);
    }
}

// Lines of an operand that will be packed next, fetched one by one between tiles: packing would wait for memory otherwise.
class Ahead {
public:
    Ahead() = default;
    Ahead(const Operand& b, int64_t columns, int64_t inner)
        : from_(b.data), stride_(b.stride), rows_(b.inner_is_row ? inner : columns),
          floats_(b.inner_is_row ? columns : inner) {}
    inline void fetch(int64_t lines) {
        for (; lines > 0 && row_ < rows_; --lines) {
            __builtin_prefetch(from_ + row_ * stride_ + at_, 0, 2);
            if ((at_ += kLanes) >= floats_) at_ = 0, ++row_;
        }
    }
    // Lines for each of so many tiles.
    inline int64_t share(int64_t tiles) const { return rows_ * (floats_ / kLanes + 1) / tiles + 1; }

private:
    const float* from_ = nullptr;
    int64_t stride_ = 0, rows_ = 0, floats_ = 0, row_ = 0, at_ = 0;
};

// c [rows][columns] = tiles x panels, added to what is there if `adds`. From one tile or panel to the next it is `depth`
// places; of those the first `inner` count.
inline void multiply_packed(const float* tiles, int64_t tiles_depth, int64_t rows, const float* panels,
                            int64_t panels_depth, int64_t columns, int64_t inner, float* c, int64_t c_stride, bool adds,
                            Ahead ahead = {}) {
    const int64_t lines = ahead.share((rows + kTileRows - 1) / kTileRows * ((columns + kLanes - 1) / kLanes));
    for (int64_t p = 0; p < columns; p += kLanes)
        for (int64_t i = 0; i < rows; i += kTileRows) {
            ahead.fetch(lines);
            tile_of(std::min(kTileRows, rows - i), tiles + i * tiles_depth, panels + p * panels_depth, inner,
                    c + i * c_stride + p, c_stride, std::min<int64_t>(kLanes, columns - p), adds);
        }
}

// c [rows][columns] = a b, or c + a b if `adds`. Uses scratch 0 and 1.
inline void multiply(const Operand& a, const Operand& b, int64_t rows, int64_t columns, int64_t inner, float* c,
                     int64_t c_stride, bool adds) {
    for (int64_t k = 0; k < inner; k += kInner) {
        const int64_t depth = std::min(kInner, inner - k);
        float* tiles = scratch(0, (rows + kTileRows) * depth);
        pack_left(a.from(0, k), rows, depth, tiles);
        for (int64_t j = 0; j < columns; j += kColumns) {
            const int64_t width = std::min(kColumns, columns - j);
            float* panels = scratch(1, (width + kLanes) * depth);
            pack_right(b.from(j, k), width, depth, panels);
            const bool is_last = j + kColumns >= columns;
            const int64_t next_j = is_last ? 0 : j + kColumns, next_k = is_last ? k + kInner : k;
            const Ahead ahead = next_k < inner ? Ahead(b.from(next_j, next_k), std::min(kColumns, columns - next_j),
                                                       std::min(kInner, inner - next_k))
                                               : Ahead();
            multiply_packed(tiles, depth, rows, panels, depth, width, depth, c + j, c_stride, adds || k > 0, ahead);
        }
    }
}

}  // namespace
