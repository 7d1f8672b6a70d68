// The next tokens of rows of logits where nothing but the temperature decides: see `engine/sampler.py`.

#include <vector>

#include "lanes.h"
#include "pool.h"

namespace {

constexpr int64_t kBlock = 512;  // weights whose sum is kept, so that the search computes few of them again

// The largest; `finite` says whether every one is finite.
float largest(const float* logits, int64_t size, bool& finite) {
    Vec most = Vec::all(logits[0]), zeros = Vec::zero();
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        Vec x = Vec::load(logits + i);
        most = most.max(x);
        zeros = zeros.fma(x, Vec::zero());  // NaN from what is not finite
    }
    float top = max_lanes(most), rest = sum_lanes(zeros);
    for (; i < size; ++i) {
        top = std::max(top, logits[i]);
        rest += logits[i] * 0.0f;
    }
    finite = rest == 0.0f;
    return top;
}

// exp((logit - top) / temperature) of one vector's lanes; lanes beyond the end are 0.
inline void weights_at(const float* logits, int64_t count, float top, float temperature, float* weights) {
    Vec x = load_some(logits, count, kFloat32);
    exp_of((x - Vec::all(top)) / Vec::all(temperature)).store(weights);
    for (int64_t i = count; i < kLanes; ++i) weights[i] = 0.0f;
}

// A number in [0, 1) of 53 bits for a place of an output, as `engine/philox.py` has it (Philox4x32-10).
double uniform(uint64_t seed, uint64_t position) {
    uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), 0, 0}, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
        const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
        std::copy_n(next, 4, c);
    }
    return (double(c[0] >> 5) * (1 << 26) + double(c[1] >> 6)) / double(int64_t(1) << 53);
}

// The token at `number` in [0, 1) of the cumulative distribution in id order; the most likely one, the lowest among
// equals, when the temperature is 0; -1 when a logit is not finite.
int64_t token_at(const float* logits, int64_t size, float temperature, double number) {
    bool finite;
    const float top = largest(logits, size, finite);
    if (!finite) return -1;
    if (temperature == 0.0f) return std::find(logits, logits + size, top) - logits;
    float weights[kLanes];
    std::vector<double> sums;
    double total = 0.0;
    for (int64_t start = 0; start < size; start += kBlock) {
        double sum = 0.0;
        for (int64_t i = start; i < std::min(start + kBlock, size); i += kLanes) {
            weights_at(logits + i, size - i, top, temperature, weights);
            for (float weight : weights) sum += weight;
        }
        sums.push_back(sum);
        total += sum;
    }
    double left = number * total;
    int64_t block = 0, last = 0;
    while (block + 1 < int64_t(sums.size()) && left >= sums[block]) left -= sums[block++];
    for (int64_t i = block * kBlock; i < std::min((block + 1) * kBlock, size); i += kLanes) {
        weights_at(logits + i, size - i, top, temperature, weights);
        for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, size - i); ++lane) {
            if (weights[lane] > 0.0f) last = i + lane;
            if (left < weights[lane]) return i + lane;
            left -= weights[lane];
        }
    }
    return last;  // rounding: the sum was reached by none
}

}  // namespace

extern "C" {

// tokens[i] of row rows[i] of logits [n, size]; see `Kernels.draw`.
void dr_draw(const float* logits, int64_t size, const int64_t* rows, const float* temperatures, const uint64_t* seeds,
             const int64_t* positions, int64_t count, int64_t* tokens, int32_t threads) {
    pool::run(count, count * size < kSmallWork ? 1 : threads, [&](int64_t i) {
        tokens[i] = token_at(logits + rows[i] * size, size, temperatures[i], uniform(seeds[i], uint64_t(positions[i])));
    });
}

}  // extern "C"
