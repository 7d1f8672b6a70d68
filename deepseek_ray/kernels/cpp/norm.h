// The norm of a row, for whatever includes one.

#pragma once

#include "lanes.h"

namespace {

// out = x * rsqrt(mean(x^2) + eps) * weight, one row. x and out share a dtype; weight is float32.
inline void norm_row(const void* x, const float* weight, void* out, int32_t dtype, int64_t width, float eps) {
    Vec squares = Vec::zero();
    for (int64_t i = 0; i < width; i += kLanes) {
        Vec v = load_some(at(x, i, dtype), width - i, dtype);
        squares = squares.fma(v, v);
    }
    const Vec scale = Vec::all(1.0f / std::sqrt(sum_lanes(squares) / float(width) + eps));
    for (int64_t i = 0; i < width; i += kLanes) {
        Vec v = load_some(at(x, i, dtype), width - i, dtype) * scale;
        store_some(v * load_some(weight + i, width - i, kFloat32), at(out, i, dtype), width - i, dtype);
    }
}

}  // namespace
