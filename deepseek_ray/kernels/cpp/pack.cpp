// Weights [N, K] into the layout of linear.cpp.

#include "lanes.h"
#include "pool.h"

namespace {

constexpr int64_t kTogether = 16;  // units of a row that are read at once: a line of the cache

// A unit is what lies together in the packed weight: one float32, or two bfloat16 beside each other.
inline uint32_t unit(const char* row, int64_t u, int32_t dtype, int64_t K) {
    uint32_t bits = 0;
    const int64_t size = dtype == kFloat32 ? 4 : std::min<int64_t>(4, 2 * K - 4 * u);
    std::memcpy(&bits, row + 4 * u, size_t(size));
    return bits;
}

}  // namespace

extern "C" {

// out: [ceil(N/16)][ceil(K/step)][16] units of 4 bytes. The rows of `weight` are `stride` elements apart.
void dr_pack(const void* weight, int64_t stride, int32_t dtype, int64_t N, int64_t K, uint32_t* out, int32_t threads) {
    const int64_t units = dtype == kFloat32 ? K : (K + 1) / 2, blocks = (N + kLanes - 1) / kLanes;
    pool::run(blocks, N * K > kSmallWork ? threads : 1, [&](int64_t b) {
        uint32_t* to = out + b * units * kLanes;
        for (int64_t begin = 0; begin < units; begin += kTogether) {
            const int64_t end = std::min(units, begin + kTogether);
            for (int64_t i = 0; i < kLanes; ++i) {
                const int64_t row = b * kLanes + i;
                const char* from = at(weight, row * stride, dtype);
                if (row < N && (end < units || K % 2 == 0 || dtype == kFloat32)) {
                    for (int64_t u = begin; u < end; ++u) std::memcpy(to + u * kLanes + i, from + 4 * u, 4);
                } else {
                    for (int64_t u = begin; u < end; ++u) to[u * kLanes + i] = row < N ? unit(from, u, dtype, K) : 0;
                }
            }
        }
    });
}

// Symmetric int8 with a scale per output; the layout is in integer.h.
void dr_pack_int8(const void* weight, int64_t stride, int32_t dtype, int64_t N, int64_t K, uint8_t* out, float* scales,
                  int32_t threads) {
    const int64_t blocks = (N + kLanes - 1) / kLanes, units = (K + 31) / 32 * 8;
    pool::run(blocks, N * K > kSmallWork ? threads : 1, [&](int64_t b) {
        for (int64_t i = 0; i < kLanes; ++i) {
            const int64_t row = b * kLanes + i, count = row < N ? K : 0;
            const void* from = at(weight, row * stride, dtype);
            Vec most = Vec::zero();
            for (int64_t k = 0; k < count; k += kLanes) {
                Vec v = load_some(at(from, k, dtype), count - k, dtype);
                most = most.max(v).max(Vec::zero() - v);
            }
            const float scale = scales[b * kLanes + i] = max_lanes(most) / 127.0f;
            const Vec inverse = Vec::all(scale > 0 ? 1.0f / scale : 0.0f);
            for (int64_t k = 0; k < units * 4; k += kLanes) {
                float scaled[kLanes] = {0};
                if (k < count) (load_some(at(from, k, dtype), count - k, dtype) * inverse).store(scaled);
                for (int64_t j = 0; j < kLanes; ++j)
                    out[((b * units + (k + j) / 4) * kLanes + i) * 4 + j % 4] = uint8_t(128 + int(std::nearbyint(scaled[j])));
            }
        }
    });
}

// int4 with a bfloat16 scale for 32 inputs of an output; the layout is in integer.h. The value of largest magnitude
// becomes -8, so a scale may be negative.
void dr_pack_int4(const void* weight, int64_t stride, int32_t dtype, int64_t N, int64_t K, uint32_t* out,
                  uint16_t* scales, int32_t threads) {
    constexpr int64_t kGroup = 32;
    const int64_t blocks = (N + kLanes - 1) / kLanes, groups = (K + kGroup - 1) / kGroup;
    pool::run(blocks, N * K > kSmallWork ? threads : 1, [&](int64_t b) {
        for (int64_t i = 0; i < kLanes; ++i)
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t row = b * kLanes + i, count = row < N ? std::min(kGroup, K - g * kGroup) : 0;
                float values[kGroup] = {0}, largest = 0;
                for (int64_t k = 0; k < count; k += kLanes)
                    load_some(at(weight, row * stride + g * kGroup + k, dtype), count - k, dtype).store(values + k);
                for (float v : values) if (std::fabs(v) > std::fabs(largest)) largest = v;
                uint16_t stored[kLanes];
                Vec::all(largest / -8.0f).store(stored);
                float scale[kLanes];
                Vec::load(stored).store(scale);
                scales[(b * groups + g) * kLanes + i] = stored[0];
                const float inverse = scale[0] != 0 ? 1.0f / scale[0] : 0.0f;
                for (int64_t u = 0; u < kGroup / 8; ++u) {
                    uint32_t unit = 0;
                    for (int64_t j = 0; j < 8; ++j) {
                        const float near = std::nearbyint(values[u * 8 + j] * inverse);
                        unit |= uint32_t(8 + std::max(-8.0f, std::min(7.0f, near))) << (j % 4 * 8 + j / 4 * 4);
                    }
                    out[((b * groups + g) * 4 + u) * kLanes + i] = unit;
                }
            }
    });
}

}  // extern "C"
