// What lies between the products of absorbed attention: rotation, and the places that latents and queries go to.

#include "norm.h"
#include "operators.h"
#include "pool.h"

namespace {

inline float one(const void* p, int64_t i, int32_t dtype) {
    if (dtype == kFloat32) return static_cast<const float*>(p)[i];
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(p)[i]) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// Turns the pairs of x [2 * half] by their angles, in float32; pairs are neighbours (interleaved) or halves, and come out
// as halves.
inline void turn(const void* x, int32_t dtype, const float* cosine, const float* sine, int64_t half, bool interleaved,
                 void* to) {
    thread_local std::vector<float> out_of_thread;
    out_of_thread.resize(size_t(2 * half));
    float* out = out_of_thread.data();
    for (int64_t i = 0; i < half; ++i) {
        const float first = one(x, interleaved ? 2 * i : i, dtype), second = one(x, interleaved ? 2 * i + 1 : i + half, dtype);
        const float a = first * cosine[i], b = second * sine[i], c = second * cosine[i], d = first * sine[i];
        out[i] = a - b;
        out[half + i] = c + d;
    }
    for (int64_t i = 0; i < 2 * half; i += kLanes)
        store_some(load_some(out + i, 2 * half - i, kFloat32), at(to, i, dtype), 2 * half - i, dtype);
}

}  // namespace

extern "C" {

// kv [tokens, rank + 2 * half] -> latents[slots[t]] = (norm of the first `rank`, rotation of the rest), of one dtype.
void dr_write_latents(const void* kv, int64_t stride, int32_t dtype, int64_t tokens, int64_t rank, int64_t half,
                      const float* weight, float eps, const float* cosine, const float* sine, int32_t interleaved,
                      const int64_t* slots, void* latents, int32_t threads) {
    const int64_t width = rank + 2 * half;
    pool::run(tokens, tokens * width > kSmallWork ? threads : 1, [&](int64_t t) {
        const void* row = at(kv, t * stride, dtype);
        void* to = at(latents, slots[t] * width, dtype);
        norm_row(row, weight, to, dtype, rank, eps);
        turn(at(row, rank, dtype), dtype, cosine + t * half, sine + t * half, half, interleaved, at(to, rank, dtype));
    });
}

// The last 2 * half of each row of out [tokens, heads, rank + 2 * half] = rotation of the last 2 * half of query [tokens,
// heads, width], both of one dtype.
void dr_turn_queries(const void* query, int32_t dtype, int64_t tokens, int64_t heads, int64_t width, int64_t rank,
                     int64_t half, const float* cosine, const float* sine, int32_t interleaved, void* out,
                     int32_t threads) {
    pool::run(tokens, tokens * heads * half > kSmallWork / 4 ? threads : 1, [&](int64_t t) {
        for (int64_t row = t * heads; row < (t + 1) * heads; ++row)
            turn(at(query, (row + 1) * width - 2 * half, dtype), dtype, cosine + t * half, sine + t * half, half,
                 interleaved, at(out, row * (rank + 2 * half) + rank, dtype));
    });
}

}  // extern "C"
