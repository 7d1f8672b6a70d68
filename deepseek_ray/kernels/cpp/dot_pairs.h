// vdpbf16ps: products of two pairs of bfloat16 added to a float32, in 16 lanes. It rounds after each of its two additions
// and takes the second of a pair first, so its bits are those of two fused multiply-adds; `dr_check` looks whether this
// CPU agrees.

#pragma once

#include "lanes.h"

inline bool use_pairs = false;  // it is there, and has those bits

namespace {

struct Pair {  // of bfloat16, beside each other
    uint16_t first, second;
};

#if defined(__AVX512BF16__)
inline Vec add_pairs(Vec sum, __m512i many, const void* pair) {
    int32_t one;
    std::memcpy(&one, pair, 4);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)many, (__m512bh)_mm512_set1_epi32(one))};
}
#endif

}  // namespace
