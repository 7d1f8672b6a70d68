// Causal multi-head latent attention over whole sequences, forward and backward, from queries, expanded keys and values as
// the projections leave them: rotation, scores, softmax and sums of one head by one thread, without copies of all heads.
//
// Letters: B sequences, S tokens, N heads; of a head: C widths without rotation, R rotated, D = C + R, V of values.
// queries [B, S, N, D]; expanded [B, S, N, C + V], keys before values; k_rope [B, S, R], of all heads; cos and sin
// [B or 1, S, R / 2]; documents [B, S], null where each sequence is one: a token sees those before it in its own; out
// [B, S, N, V]; logs [B, N, S] = ln sum exp(scores).

#include "product.h"

namespace {

constexpr int64_t kQueries = 66;  // of a block: eleven tiles; later keys are left out block by block

struct Shape {
    int64_t sequences, length, heads, plain, rope, value;
    int64_t one_rotation;  // cos and sin are those of every sequence
    int64_t interleaved;
    float scale;
    int64_t width() const { return plain + rope; }
    int64_t expanded() const { return plain + value; }
    int64_t padded() const { return (length + kLanes - 1) / kLanes * kLanes; }
};

struct Inputs {
    const float *queries, *expanded, *k_rope, *cos, *sin;
    const int64_t* documents;
};

// One head of one sequence: where its rows are.
struct Head {
    const Shape& shape;
    int64_t sequence, head;
    int64_t token(int64_t s) const { return sequence * shape.length + s; }
    int64_t query(int64_t s) const { return (token(s) * shape.heads + head) * shape.width(); }
    int64_t key(int64_t s) const { return (token(s) * shape.heads + head) * shape.expanded(); }
    int64_t value(int64_t s) const { return key(s) + shape.plain; }
    int64_t out(int64_t s) const { return (token(s) * shape.heads + head) * shape.value; }
    int64_t log(int64_t s) const { return (sequence * shape.heads + head) * shape.length + s; }
    int64_t angle(int64_t s) const { return (shape.one_rotation ? s : token(s)) * (shape.rope / 2); }
};

// Pairs (neighbours or halves) of x [rope] turned by their angles, as halves.
inline void rotate(const float* x, const float* cos, const float* sin, const Shape& shape, float scale, float* out) {
    const int64_t half = shape.rope / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = scale * (shape.interleaved ? x[2 * i] : x[i]);
        const float b = scale * (shape.interleaved ? x[2 * i + 1] : x[i + half]);
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = b * cos[i] + a * sin[i];
    }
}

// The gradient of x from that of the turned pairs.
inline void rotate_back(const float* of_out, const float* cos, const float* sin, const Shape& shape, float scale,
                        float* of_x) {
    const int64_t half = shape.rope / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float c = scale * of_out[i], d = scale * of_out[i + half];
        of_x[shape.interleaved ? 2 * i : i] = c * cos[i] + d * sin[i];
        of_x[shape.interleaved ? 2 * i + 1 : i + half] = d * cos[i] - c * sin[i];
    }
}

// Queries (scaled) and keys of a head, rotated: [S, D] each.
inline void assemble(const Head& at, const Inputs& in, float* queries, float* keys) {
    const Shape& shape = at.shape;
    for (int64_t s = 0; s < shape.length; ++s) {
        const float *q = in.queries + at.query(s), *k = in.expanded + at.key(s);
        const float *cos = in.cos + at.angle(s), *sin = in.sin + at.angle(s);
        float *to_q = queries + s * shape.width(), *to_k = keys + s * shape.width();
        for (int64_t i = 0; i < shape.plain; ++i) to_q[i] = shape.scale * q[i];
        std::copy_n(k, shape.plain, to_k);
        rotate(q + shape.plain, cos, sin, shape, shape.scale, to_q + shape.plain);
        rotate(in.k_rope + at.token(s) * shape.rope, cos, sin, shape, 1.0f, to_k + shape.plain);
    }
}

// row[i] = value for the keys before token s that are in other documents.
inline void hide(const Head& at, const Inputs& in, int64_t s, float value, float* row) {
    if (!in.documents) return;
    const int64_t* documents = in.documents + at.token(0);
    const int64_t own = documents[s];
    for (int64_t i = 0; i < s; ++i) row[i] = documents[i] == own ? row[i] : value;
}

// scores [count] -> probabilities in place, zeros up to `end`; returns ln sum exp(scores).
inline float softmax(float* row, int64_t count, int64_t end) {
    std::fill(row + count, row + end, -INFINITY);
    Vec most = Vec::load(row);
    for (int64_t i = kLanes; i < end; i += kLanes) most = most.max(Vec::load(row + i));
    const float largest = max_lanes(most);
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < end; i += kLanes) {
        const Vec p = exp_of(Vec::load(row + i) - Vec::all(largest));
        p.store(row + i);
        sum = sum + p;
    }
    std::fill(row + count, row + end, 0.0f);
    const float total = sum_lanes(sum);
    for (int64_t i = 0; i < end; i += kLanes) (Vec::load(row + i) * Vec::all(1.0f / total)).store(row + i);
    return largest + std::log(total);
}

// A block of queries and the keys that they may see: `seen`, and that rounded up to whole panels.
struct Block {
    int64_t first, rows, seen, end;
    Block(const Shape& shape, int64_t start)
        : first(start), rows(std::min(kQueries, shape.length - start)), seen(start + rows),
          end((seen + kLanes - 1) / kLanes * kLanes) {}
};

void forward_head(const Head& at, const Inputs& in, float* out, float* logs) {
    const Shape& shape = at.shape;
    const int64_t length = shape.length, width = shape.width(), padded = shape.padded();
    float *queries = scratch(2, length * width), *keys = scratch(3, length * width);
    assemble(at, in, queries, keys);
    float* key_panels = scratch(4, padded * width);
    pack_right(Operand{keys, width, false}, length, width, key_panels);
    float* value_panels = scratch(5, (shape.value + kLanes) * length);
    pack_right(Operand{in.expanded + at.value(0), shape.heads * shape.expanded(), true}, shape.value, length, value_panels);
    float *scores = scratch(6, kQueries * padded), *tiles = scratch(0, (kQueries + kTileRows) * std::max(padded, width));
    for (int64_t start = 0; start < length; start += kQueries) {
        const Block block(shape, start);
        pack_left(Operand{queries + start * width, width, false}, block.rows, width, tiles);
        multiply_packed(tiles, width, block.rows, key_panels, width, block.end, width, scores, padded, false);
        for (int64_t r = 0; r < block.rows; ++r) {
            float* row = scores + r * padded;
            hide(at, in, start + r, -INFINITY, row);
            logs[at.log(start + r)] = softmax(row, start + r + 1, block.end);
            hide(at, in, start + r, 0.0f, row);  // the exponential of minus infinity is not quite zero
        }
        pack_left(Operand{scores, padded, false}, block.rows, block.seen, tiles);
        multiply_packed(tiles, block.seen, block.rows, value_panels, length, shape.value, block.seen, out + at.out(start),
                        shape.heads * shape.value, false);
    }
}

struct Gradients { float *queries, *expanded, *k_rope; };  // k_rope [B, N, S, R]: the caller sums over heads

// probabilities [rows, padded] from scores, and of_scores from the gradient of the probabilities, both in place.
inline void softmax_backward(const Head& at, const Inputs& in, const Block& block, const float* out, const float* of_out,
                             const float* logs, float* scores, float* of_scores) {
    const Shape& shape = at.shape;
    const int64_t padded = shape.padded();
    for (int64_t r = 0; r < block.rows; ++r) {
        const int64_t s = block.first + r, count = s + 1;
        const float *o = out + at.out(s), *g = of_out + at.out(s);
        Vec dot = Vec::zero();
        for (int64_t i = 0; i < shape.value; i += kLanes)
            dot = dot.fma(load_some(o + i, shape.value - i, kFloat32), load_some(g + i, shape.value - i, kFloat32));
        const Vec mean = Vec::all(sum_lanes(dot)), log = Vec::all(logs[at.log(s)]);
        float *p = scores + r * padded, *d = of_scores + r * padded;
        for (int64_t i = 0; i < block.end; i += kLanes) {
            const Vec probability = exp_of(Vec::load(p + i) - log);
            (probability * (Vec::load(d + i) - mean)).store(d + i);
            probability.store(p + i);
        }
        std::fill(p + count, p + block.end, 0.0f);
        std::fill(d + count, d + block.end, 0.0f);
        hide(at, in, s, 0.0f, p);
        hide(at, in, s, 0.0f, d);
    }
}

// What a head's own threads' sums give to the gradients of queries, keys, values and rotated keys.
inline void write_gradients(const Head& at, const Inputs& in, const float* of_queries, const float* of_keys,
                            const float* of_values, const Gradients& to) {
    const Shape& shape = at.shape;
    for (int64_t s = 0; s < shape.length; ++s) {
        const float *q = of_queries + s * shape.width(), *k = of_keys + s * shape.width();
        const float *cos = in.cos + at.angle(s), *sin = in.sin + at.angle(s);
        for (int64_t i = 0; i < shape.plain; ++i) to.queries[at.query(s) + i] = shape.scale * q[i];
        rotate_back(q + shape.plain, cos, sin, shape, shape.scale, to.queries + at.query(s) + shape.plain);
        std::copy_n(k, shape.plain, to.expanded + at.key(s));
        std::copy_n(of_values + s * shape.value, shape.value, to.expanded + at.value(s));
        rotate_back(k + shape.plain, cos, sin, shape, 1.0f, to.k_rope + at.log(s) * shape.rope);
    }
}

void backward_head(const Head& at, const Inputs& in, const float* out, const float* logs, const float* of_out,
                   const Gradients& to) {
    const Shape& shape = at.shape;
    const int64_t length = shape.length, width = shape.width(), padded = shape.padded(), value = shape.value;
    const int64_t expanded_stride = shape.heads * shape.expanded(), out_stride = shape.heads * value;
    float *queries = scratch(2, length * width), *keys = scratch(3, length * width);
    assemble(at, in, queries, keys);
    float* key_panels = scratch(4, padded * width);  // columns are keys
    pack_right(Operand{keys, width, false}, length, width, key_panels);
    float* value_panels = scratch(5, padded * value);  // columns are keys
    pack_right(Operand{in.expanded + at.value(0), expanded_stride, false}, length, value, value_panels);
    float* key_rows = scratch(7, (width + kLanes) * length);  // columns are those of a key
    pack_right(Operand{keys, width, true}, width, length, key_rows);
    float *scores = scratch(6, kQueries * padded), *of_scores = scratch(8, kQueries * padded);
    float *of_queries = scratch(9, length * width), *of_keys = scratch(10, length * width);
    float* of_values = scratch(11, length * value);
    float* tiles = scratch(0, (padded + kTileRows) * (kQueries + width + value));
    float* panels = scratch(1, (width + value + kLanes) * kQueries);
    std::fill_n(of_keys, length * width, 0.0f);
    std::fill_n(of_values, length * value, 0.0f);
    for (int64_t start = 0; start < length; start += kQueries) {
        const Block block(shape, start);
        const int64_t rows = block.rows, seen = block.seen;
        const float *q = queries + start * width, *g = of_out + at.out(start);
        pack_left(Operand{q, width, false}, rows, width, tiles);
        multiply_packed(tiles, width, rows, key_panels, width, block.end, width, scores, padded, false);
        pack_left(Operand{g, out_stride, false}, rows, value, tiles);
        multiply_packed(tiles, value, rows, value_panels, value, block.end, value, of_scores, padded, false);
        softmax_backward(at, in, block, out, of_out, logs, scores, of_scores);
        pack_left(Operand{of_scores, padded, false}, rows, seen, tiles);
        multiply_packed(tiles, seen, rows, key_rows, length, width, seen, of_queries + start * width, width, false);
        pack_left(Operand{of_scores, padded, true}, seen, rows, tiles);
        pack_right(Operand{q, width, true}, width, rows, panels);
        multiply_packed(tiles, rows, seen, panels, rows, width, rows, of_keys, width, true);
        pack_left(Operand{scores, padded, true}, seen, rows, tiles);
        pack_right(Operand{g, out_stride, true}, value, rows, panels);
        multiply_packed(tiles, rows, seen, panels, rows, value, rows, of_values, value, true);
    }
    write_gradients(at, in, of_queries, of_keys, of_values, to);
}

}  // namespace

extern "C" {

void dt_attention(const float* queries, const float* expanded, const float* k_rope, const float* cos, const float* sin,
                  const int64_t* documents, const int64_t* sizes, float scale, float* out, float* logs, int32_t threads) {
    const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], scale};
    const Inputs in{queries, expanded, k_rope, cos, sin, documents};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < shape.sequences * shape.heads; ++task)
        forward_head(Head{shape, task / shape.heads, task % shape.heads}, in, out, logs);
}

void dt_attention_backward(const float* queries, const float* expanded, const float* k_rope, const float* cos,
                           const float* sin, const int64_t* documents, const int64_t* sizes, float scale, const float* out,
                           const float* logs, const float* of_out, float* of_queries, float* of_expanded,
                           float* of_k_rope, int32_t threads) {
    const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], scale};
    const Inputs in{queries, expanded, k_rope, cos, sin, documents};
    const Gradients to{of_queries, of_expanded, of_k_rope};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < shape.sequences * shape.heads; ++task)
        backward_head(Head{shape, task / shape.heads, task % shape.heads}, in, out, logs, of_out, to);
}

}  // extern "C"
