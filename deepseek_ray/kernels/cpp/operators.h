// Operators of one file that others are made of.

#pragma once

#include <cstdint>

extern "C" {
// linear.cpp
void dr_grouped_linear(int64_t groups, const int64_t* rows, const void* const* x, int64_t x_stride, int32_t x_dtype,
                       const void* const* weights, int32_t w_dtype, const void* const* scales, void* const* out,
                       int64_t out_stride, int32_t out_dtype, int64_t N, int64_t K, int32_t threads);
// pointwise.cpp
void dr_silu_mul(const void* gate_up, void* out, int32_t dtype, int64_t rows, int64_t width, int32_t threads);
}
