// Norms, activations and gate scores: row by row, statistics in float32.

#include "norm.h"
#include "pool.h"

extern "C" {

// out = x * rsqrt(mean(x^2) + eps) * weight. x and out share a dtype; weight is float32.
void dr_rms_norm(const void* x, int64_t x_stride, const float* weight, void* out, int64_t out_stride, int32_t dtype,
                 int64_t rows, int64_t width, float eps, int32_t threads) {
    pool::run(rows, rows * width > kSmallWork ? threads : 1, [&](int64_t r) {
        norm_row(at(x, r * x_stride, dtype), weight, at(out, r * out_stride, dtype), dtype, width, eps);
    });
}

// gate_up [rows, 2 * width] -> out [rows, width] = silu(gate) * up, in float32, rounded once.
void dr_silu_mul(const void* gate_up, void* out, int32_t dtype, int64_t rows, int64_t width, int32_t threads) {
    pool::run(rows, rows * width > kSmallWork / 2 ? threads : 1, [&](int64_t r) {
        for (int64_t i = 0; i < width; i += kLanes) {
            Vec gate = load_some(at(gate_up, r * 2 * width + i, dtype), width - i, dtype);
            Vec up = load_some(at(gate_up, (r * 2 + 1) * width + i, dtype), width - i, dtype);
            Vec silu = gate / (Vec::all(1.0f) + exp_of(Vec::zero() - gate));
            store_some(silu * up, at(out, r * width + i, dtype), width - i, dtype);
        }
    });
}

// logits [rows, width] float32 -> scores, in place. kind 0: sigmoid, 1: softmax.
void dr_scores(float* logits, int64_t rows, int64_t width, int32_t kind) {
    for (int64_t r = 0; r < rows; ++r) {
        float* row = logits + r * width;
        float top = kind == 1 ? *std::max_element(row, row + width) : 0.0f, sum = 0.0f;
        for (int64_t i = 0; i < width; i += kLanes) {
            Vec v = load_some(row + i, width - i, kFloat32);
            Vec one = Vec::all(1.0f);
            Vec score = kind == 1 ? exp_of(v - Vec::all(top)) : one / (one + exp_of(Vec::zero() - v));
            store_some(score, row + i, width - i, kFloat32);
        }
        if (kind == 0) continue;
        for (int64_t i = 0; i < width; ++i) sum += row[i];
        for (int64_t i = 0; i < width; ++i) row[i] /= sum;
    }
}

}  // extern "C"
