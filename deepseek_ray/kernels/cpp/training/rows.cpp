// What lies between the products of a training step, forward and backward: norms, activations, the slots of a token and the
// cross-entropy. Rows of float32, one after another; a sum over rows is a sum over fixed blocks of them, so no result depends
// on the number of threads.

#include "swiglu.h"

namespace {

constexpr int64_t kBlock = 32;  // rows of a partial sum

inline Vec get(const float* row, int64_t i, int64_t width) { return load_some(row + i, width - i, kFloat32); }
inline void put(Vec x, float* row, int64_t i, int64_t width) { store_some(x, row + i, width - i, kFloat32); }

// The largest of a row, and the sum of exp(x - largest).
struct Exponentials { float largest, sum; };

inline Exponentials exponentials(const float* row, int64_t width) {
    float largest = row[0];
    int64_t i = 0;
    if (width >= kLanes) {
        Vec most = Vec::load(row);
        for (i = kLanes; i + kLanes <= width; i += kLanes) most = most.max(Vec::load(row + i));
        largest = max_lanes(most);
    }
    for (; i < width; ++i) largest = std::max(largest, row[i]);
    Vec sum = Vec::zero();
    const Vec top = Vec::all(largest);
    for (i = 0; i + kLanes <= width; i += kLanes) sum = sum + exp_of(Vec::load(row + i) - top);
    float total = sum_lanes(sum);
    for (; i < width; ++i) total += std::exp(row[i] - largest);
    return {largest, total};
}

}  // namespace

extern "C" {

// out = weight * x / root, where root = sqrt(mean(x^2) + eps); 1 / root is kept in scales [rows].
void dt_rms_norm(const float* x, int64_t x_stride, const float* weight, int64_t rows, int64_t width, float eps, float* out,
                 float* scales, int32_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = x + r * x_stride;
        Vec squares = Vec::zero();
        for (int64_t i = 0; i < width; i += kLanes) squares = squares.fma(get(row, i, width), get(row, i, width));
        scales[r] = 1.0f / std::sqrt(sum_lanes(squares) / float(width) + eps);
        const Vec scale = Vec::all(scales[r]);
        for (int64_t i = 0; i < width; i += kLanes)
            put(get(row, i, width) * scale * get(weight, i, width), out + r * width, i, width);
    }
}

// Gradients of x [rows, width] and, summed over each block of 32 rows, of the weight: parts [rows / 32 rounded up, width].
void dt_rms_norm_backward(const float* x, int64_t x_stride, const float* weight, const float* scales, const float* of_out,
                          int64_t rows, int64_t width, float* of_x, float* parts, int32_t threads) {
    const int64_t blocks = (rows + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block) {
        float* part = parts + block * width;
        std::fill_n(part, width, 0.0f);
        for (int64_t r = block * kBlock; r < std::min(rows, (block + 1) * kBlock); ++r) {
            const float *row = x + r * x_stride, *grad = of_out + r * width;
            const Vec scale = Vec::all(scales[r]);
            Vec dot = Vec::zero();
            for (int64_t i = 0; i < width; i += kLanes) {
                const Vec through = get(grad, i, width) * get(row, i, width);
                dot = dot.fma(through, get(weight, i, width));
                put(get(part, i, width).fma(through, scale), part, i, width);
            }
            const Vec along = Vec::all(sum_lanes(dot) * scales[r] * scales[r] / float(width));
            for (int64_t i = 0; i < width; i += kLanes)
                put((get(grad, i, width) * get(weight, i, width) - get(row, i, width) * along) * scale, of_x + r * width, i,
                    width);
        }
    }
}

// out = silu(gate) * up, all of `count` floats.
void dt_swiglu(const float* gate, const float* up, int64_t count, float* out, int32_t threads) {
    constexpr int64_t kPiece = 4096;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += kPiece) swiglu(gate + i, up + i, std::min(kPiece, count - i), out + i);
}

void dt_swiglu_backward(const float* gate, const float* up, const float* of_out, int64_t count, float* of_gate,
                        float* of_up, int32_t threads) {
    constexpr int64_t kPiece = 4096;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += kPiece)
        swiglu_backward(gate + i, up + i, of_out + i, std::min(kPiece, count - i), of_gate + i, of_up + i, nullptr);
}

// out [tokens, width] = sum over slots s of rows[places[token, s]], each times weights[token, s] unless that is null.
void dt_gather_slots(const float* rows, const int64_t* places, const float* weights, int64_t tokens, int64_t slots,
                     int64_t width, float* out, int32_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < width; i += kLanes) {
            Vec total = Vec::zero();
            for (int64_t s = t * slots; s < (t + 1) * slots; ++s) {
                const Vec own = get(rows + places[s] * width, i, width);
                total = total + (weights ? own * Vec::all(weights[s]) : own);
            }
            put(total, out + t * width, i, width);
        }
}

// Gradients of rows [tokens * slots, width] and weights [tokens, slots] of the weighted sum above.
void dt_gather_slots_backward(const float* rows, const int64_t* places, const float* weights, const float* of_out,
                              int64_t tokens, int64_t slots, int64_t width, float* of_rows, float* of_weights,
                              int32_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t s = 0; s < tokens * slots; ++s) {
        const float *own = rows + places[s] * width, *grad = of_out + s / slots * width;
        const Vec weight = Vec::all(weights[s]);
        Vec dot = Vec::zero();
        for (int64_t i = 0; i < width; i += kLanes) {
            const Vec g = get(grad, i, width);
            dot = dot.fma(g, get(own, i, width));
            put(g * weight, of_rows + places[s] * width, i, width);
        }
        of_weights[s] = sum_lanes(dot);
    }
}

// losses [rows] = -ln softmax(logits)[target], 0 where the target is negative; logs [rows] = ln sum exp(logits).
void dt_cross_entropy(const float* logits, const int64_t* targets, int64_t rows, int64_t width, float* losses, float* logs,
                      int32_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        losses[r] = 0.0f;
        if (targets[r] < 0) continue;
        const Exponentials found = exponentials(logits + r * width, width);
        logs[r] = found.largest + std::log(found.sum);
        losses[r] = std::log(found.sum) - (logits[r * width + targets[r]] - found.largest);
    }
}

// of_logits = scale * (softmax(logits) - one at the target), 0 where the target is negative.
void dt_cross_entropy_backward(const float* logits, const int64_t* targets, const float* logs, float scale, int64_t rows,
                               int64_t width, float* of_logits, int32_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        float* to = of_logits + r * width;
        if (targets[r] < 0) {
            std::fill_n(to, width, 0.0f);
            continue;
        }
        for (int64_t i = 0; i < width; i += kLanes)
            put(exp_of(get(logits + r * width, i, width) - Vec::all(logs[r])) * Vec::all(scale), to, i, width);
        to[targets[r]] -= scale;
    }
}

}  // extern "C"
