// The parts of a decoder layer, each in one call: between two calls of short operators, the way through Python takes longer
// than they do.

#include <memory>

#include "lanes.h"
#include "operators.h"
#include "pool.h"

extern "C" {

// Absorbed MLA with the norms before and after it. Biases may be null, as may be q_a, without which `q` takes the hidden
// state itself. The heads of w_uk [heads][rank, nope] and of w_uv [heads][value, rank] lie one after the other.
struct AttentionWeights {
    const float *input_norm, *q_norm, *kv_norm, *post_norm;
    const float *q_a_bias, *kv_a_bias, *o_bias;
    PackedMatrix q_a, q, kv_a, w_uk, w_uv, o;
    int64_t heads;
    float eps, latent_eps, softmax_scale;
};

// A mixture of experts, all but the routed ones; the numbers are as in dr_scores and dr_choose_experts. There may be no
// shared experts.
struct MoeWeights {
    PackedMatrix gate, shared_gate_up, shared_down;
    const float* bias;
    int64_t top_k, groups, best_groups;
    int32_t two, normalised, kind;
    float factor;
};

// Where the tokens of a step are: `kernels/base.Step`.
struct Step {
    const float *cosine, *sine;
    const int64_t *slots, *positions;
    const int32_t *sequence_rows, *block_tables;
    int64_t tokens, half, max_blocks, block_size;
    int32_t interleaved;
};

}  // extern "C"

namespace {

// Rows of some width that last for a call.
struct Rows {
    std::unique_ptr<char[]> room;
    int64_t width;
    int32_t dtype;

    Rows(int64_t rows, int64_t width, int32_t dtype)
        : room(new char[size_t(rows * width) * (dtype == kFloat32 ? 4 : 2)]), width(width), dtype(dtype) {}
    void* data() const { return room.get(); }
    float* floats() const { return reinterpret_cast<float*>(room.get()); }
};

// Rows that are not ours.
struct View {
    const void* data;
    int64_t stride;
    int32_t dtype;
    View(const void* data, int64_t stride, int32_t dtype) : data(data), stride(stride), dtype(dtype) {}
    View(const Rows& rows) : data(rows.data()), stride(rows.width), dtype(rows.dtype) {}
};

struct Maker {
    int64_t tokens;
    int32_t threads;

    Rows rows(int64_t width, int32_t dtype) const { return {tokens, width, dtype}; }

    Rows linear(View x, const PackedMatrix& weight, int32_t dtype) const {
        Rows out = rows(weight.num_out, dtype);
        const void *data = weight.data, *scales = weight.scales;
        void* to = out.data();
        dr_grouped_linear(1, &tokens, &x.data, x.stride, x.dtype, &data, weight.dtype, scales ? &scales : nullptr, &to,
                          out.width, dtype, weight.num_out, weight.num_in, threads);
        return out;
    }

    // The sum with a bias is in float32, rounded once.
    Rows biased(View x, const PackedMatrix& weight, const float* bias) const {
        if (!bias) return linear(x, weight, x.dtype);
        const Rows sums = linear(x, weight, kFloat32);
        Rows out = rows(weight.num_out, x.dtype);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < out.width; i += kLanes) {
                const int64_t left = out.width - i;
                const Vec sum = load_some(sums.floats() + t * out.width + i, left, kFloat32);
                store_some(sum + load_some(bias + i, left, kFloat32), at(out.data(), t * out.width + i, x.dtype), left,
                           x.dtype);
            }
        return out;
    }

    // Head h of x, `x_step` elements after the one before, meets weight h; its results are `out_step` further.
    void per_head(View x, int64_t x_step, const PackedMatrix& weight, int64_t heads, void* out, int64_t out_step,
                  int32_t dtype) const {
        const int64_t blocks = (weight.num_out + kLanes - 1) / kLanes;
        std::vector<int64_t> counts(heads, tokens);
        std::vector<const void*> from(heads), weights(heads), scales(heads);
        std::vector<void*> to(heads);
        for (int64_t h = 0; h < heads; ++h) {
            from[h] = at(x.data, h * x_step, x.dtype);
            weights[h] = weight.data + h * blocks * weight.data_bytes;
            scales[h] = weight.scales + h * blocks * weight.scale_bytes;
            to[h] = at(out, h * out_step, dtype);
        }
        dr_grouped_linear(heads, counts.data(), from.data(), x.stride, x.dtype, weights.data(), weight.dtype,
                          weight.scales ? scales.data() : nullptr, to.data(), heads * out_step, dtype, weight.num_out,
                          weight.num_in, threads);
    }

    Rows norm(View x, int64_t width, const float* weight, float eps) const {
        Rows out = rows(width, x.dtype);
        dr_rms_norm(x.data, x.stride, weight, out.data(), width, x.dtype, tokens, width, eps, threads);
        return out;
    }
};

// Queries [tokens, heads, rank + 2 * half] that meet latents: absorbed by W_uk, and rotated.
Rows turned_queries(const Maker& make, const AttentionWeights& own, const Step& step, View normed) {
    const auto narrow = [&] {
        const Rows compressed = make.biased(normed, own.q_a, own.q_a_bias);
        return make.norm(compressed, compressed.width, own.q_norm, own.latent_eps);
    };
    const int32_t dtype = normed.dtype;
    const Rows query = own.q_a.data ? make.linear(narrow(), own.q, dtype) : make.linear(normed, own.q, dtype);
    const int64_t width = query.width / own.heads, rank = own.w_uk.num_out, turned = rank + 2 * step.half;
    Rows out = make.rows(own.heads * turned, dtype);
    make.per_head(query, width, own.w_uk, own.heads, out.data(), turned, dtype);
    dr_turn_queries(query.data(), dtype, make.tokens, own.heads, width, rank, step.half, step.cosine, step.sine,
                    step.interleaved, out.data(), make.threads);
    return out;
}

Rows attended_values(const Maker& make, const AttentionWeights& own, const Step& step, const Rows& query,
                     const void* latents) {
    const int64_t rank = own.w_uv.num_in;
    const int32_t dtype = query.dtype;
    const Rows mixed = make.rows(own.heads * rank, dtype);
    dr_latent_attention(query.data(), latents, dtype, step.block_tables, step.max_blocks, step.block_size,
                        step.sequence_rows, step.positions, mixed.data(), make.tokens, own.heads,
                        query.width / own.heads, rank, own.softmax_scale, make.threads);
    Rows values = make.rows(own.heads * own.w_uv.num_out, dtype);
    make.per_head(mixed, rank, own.w_uv, own.heads, values.data(), own.w_uv.num_out, dtype);
    return values;
}

}  // namespace

extern "C" {

// x [tokens, hidden], whose latents are written first -> sum = x + attention(norm(x)), normed = norm(sum), both of x's
// dtype, which is that of the latents, too.
void dr_attention(const AttentionWeights* own, const Step* step, const void* x, int64_t stride, int32_t dtype, void* latents,
                  void* sum, void* normed, int32_t threads) {
    const Maker make{step->tokens, threads};
    const int64_t width = own->o.num_out;
    const Rows input = make.norm({x, stride, dtype}, width, own->input_norm, own->eps);
    {
        const Rows kv = make.biased(input, own->kv_a, own->kv_a_bias);
        dr_write_latents(kv.data(), kv.width, dtype, make.tokens, own->w_uk.num_out, step->half, own->kv_norm,
                         own->latent_eps, step->cosine, step->sine, step->interleaved, step->slots, latents, threads);
    }
    const Rows query = turned_queries(make, *own, *step, input);
    const Rows values = attended_values(make, *own, *step, query, latents);
    const Rows output = make.biased(values, own->o, own->o_bias);
    pool::run(make.tokens, make.tokens * width > kSmallWork ? threads : 1, [&](int64_t t) {
        for (int64_t i = 0; i < width; i += kLanes) {
            const Vec before = load_some(at(x, t * stride + i, dtype), width - i, dtype);
            const Vec more = load_some(at(output.data(), t * width + i, dtype), width - i, dtype);
            store_some(before + more, at(sum, t * width + i, dtype), width - i, dtype);
        }
    });
    dr_rms_norm(sum, width, own->post_norm, normed, width, dtype, make.tokens, width, own->eps, threads);
}

// out [rows, hidden] = down(silu(gate x) * up x).
void dr_mlp(const void* x, int64_t stride, int32_t dtype, int64_t rows, const PackedMatrix* gate_up,
            const PackedMatrix* down, void* out, int32_t threads) {
    const Maker make{rows, threads};
    const Rows both = make.linear({x, stride, dtype}, *gate_up, dtype);
    const Rows gated = make.rows(down->num_in, dtype);
    dr_silu_mul(both.data(), gated.data(), dtype, rows, gated.width, threads);
    const void *from = gated.data(), *data = down->data, *scales = down->scales;
    dr_grouped_linear(1, &rows, &from, gated.width, dtype, &data, down->dtype, scales ? &scales : nullptr, &out,
                      down->num_out, dtype, down->num_out, down->num_in, threads);
}

// Ids and weights [tokens, top_k] of the experts that the gate chooses; `kind` as in dr_scores, the rest as in
// dr_choose_experts.
void dr_route(const void* x, int64_t stride, int32_t dtype, int64_t tokens, const PackedMatrix* gate, int32_t kind,
              const float* bias, int64_t top_k, int64_t groups, int64_t best_groups, int32_t two, int32_t normalised,
              float factor, int64_t* ids, float* weights, int32_t threads) {
    const Rows scores = Maker{tokens, threads}.linear({x, stride, dtype}, *gate, kFloat32);
    dr_scores(scores.floats(), tokens, scores.width, kind);
    dr_choose_experts(scores.floats(), bias, tokens, scores.width, top_k, groups, best_groups, two, normalised, factor, ids,
                      weights);
}

// out = x + what all experts make of normed, both [tokens, hidden]. If a routed expert is not here, nothing is computed,
// and the result is 0.
int32_t dr_moe(const MoeWeights* own, const ExpertTable* table, const void* x, const void* normed, int32_t dtype,
               int64_t tokens, void* out, int32_t threads) {
    const Maker make{tokens, threads};
    const int64_t top_k = own->top_k, pairs = tokens * top_k;
    std::vector<int64_t> ids(pairs), token_rows(pairs);
    std::vector<float> weights(pairs);
    dr_route(normed, table->hidden, dtype, tokens, &own->gate, own->kind, own->bias, top_k, own->groups, own->best_groups,
             own->two, own->normalised, own->factor, ids.data(), weights.data(), threads);
    for (int64_t p = 0; p < pairs; ++p) token_rows[p] = p / top_k;
    const Rows rows = make.rows(top_k * table->hidden, dtype);
    if (!dr_experts(normed, table->hidden, dtype, token_rows.data(), ids.data(), pairs, table, rows.data(), threads))
        return 0;
    const bool has_shared = own->shared_down.data;
    const Rows shared = make.rows(has_shared ? table->hidden : 0, dtype);
    if (has_shared)
        dr_mlp(normed, table->hidden, dtype, tokens, &own->shared_gate_up, &own->shared_down, shared.data(), threads);
    const void* more[] = {has_shared ? shared.data() : x, x};
    dr_combine_slots(rows.data(), weights.data(), tokens, top_k, table->hidden, dtype, more, has_shared ? 2 : 1, out,
                     threads);
    return 1;
}

}  // extern "C"
