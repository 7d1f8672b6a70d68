// silu(gate) * up of a row, and its gradients.

#pragma once

#include "../lanes.h"

namespace {

inline Vec sigmoid(Vec x) { return Vec::all(1.0f) / (Vec::all(1.0f) + exp_of(Vec::zero() - x)); }

// inner = silu(gate) * up.
inline void swiglu(const float* gate, const float* up, int64_t width, float* inner) {
    for (int64_t i = 0; i < width; i += kLanes) {
        const Vec g = load_some(gate + i, width - i, kFloat32), u = load_some(up + i, width - i, kFloat32);
        store_some(g * sigmoid(g) * u, inner + i, width - i, kFloat32);
    }
}

// From the gradient of inner: those of gate and up, and inner itself once more unless that is null.
inline void swiglu_backward(const float* gate, const float* up, const float* of_inner, int64_t width, float* of_gate,
                            float* of_up, float* inner) {
    const Vec one = Vec::all(1.0f);
    for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t some = width - i;
        const Vec g = load_some(gate + i, some, kFloat32), u = load_some(up + i, some, kFloat32);
        const Vec d = load_some(of_inner + i, some, kFloat32), s = sigmoid(g), silu = g * s;
        store_some(d * u * s * (one + g * (one - s)), of_gate + i, some, kFloat32);
        store_some(d * silu, of_up + i, some, kFloat32);
        if (inner) store_some(silu * u, inner + i, some, kFloat32);
    }
}

}  // namespace
