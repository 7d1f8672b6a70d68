// Operators of one file that others are made of.

#pragma once

#include <cstdint>

extern "C" {

// Packed weights of one linear layer or of several of one shape. The bytes are those of a block of 16 columns; `scales` is
// null unless the weights are integers, `data` where there is no such layer.
struct PackedMatrix {
    const char* data;
    const char* scales;
    int64_t data_bytes, scale_bytes, num_out, num_in;
    int32_t dtype;
};

// Where the weights of a layer's experts are, [num_experts] each: null where an expert is not here, and scales unless its
// weights are integers.
struct ExpertTable {
    const void* const* gate_up;
    const void* const* gate_up_scales;
    const void* const* down;
    const void* const* down_scales;
    int64_t num_experts, hidden, width;
    int32_t dtype;
};

// linear.cpp
void dr_grouped_linear(int64_t groups, const int64_t* rows, const void* const* x, int64_t x_stride, int32_t x_dtype,
                       const void* const* weights, int32_t w_dtype, const void* const* scales, void* const* out,
                       int64_t out_stride, int32_t out_dtype, int64_t N, int64_t K, int32_t threads);
// pointwise.cpp
void dr_rms_norm(const void* x, int64_t x_stride, const float* weight, void* out, int64_t out_stride, int32_t dtype,
                 int64_t rows, int64_t width, float eps, int32_t threads);
void dr_silu_mul(const void* gate_up, void* out, int32_t dtype, int64_t rows, int64_t width, int32_t threads);
void dr_scores(float* logits, int64_t rows, int64_t width, int32_t kind);
// rope.cpp
void dr_write_latents(const void* kv, int64_t stride, int32_t dtype, int64_t tokens, int64_t rank, int64_t half,
                      const float* weight, float eps, const float* cosine, const float* sine, int32_t interleaved,
                      const int64_t* slots, void* latents, int32_t threads);
void dr_turn_queries(const void* query, int32_t dtype, int64_t tokens, int64_t heads, int64_t width, int64_t rank,
                     int64_t half, const float* cosine, const float* sine, int32_t interleaved, void* out,
                     int32_t threads);
// attention.cpp
void dr_latent_attention(const void* query, const void* cache, int32_t dtype, const int32_t* block_tables,
                         int64_t max_blocks, int64_t block_size, const int32_t* sequence_rows,
                         const int64_t* positions, void* out, int64_t tokens, int64_t heads, int64_t width,
                         int64_t value_width, float scale, int32_t threads);
// moe.cpp
void dr_choose_experts(const float* scores, const float* bias, int64_t tokens, int64_t num_experts, int64_t top_k,
                       int64_t groups, int64_t best_groups, int32_t two, int32_t normalised, float factor, int64_t* ids,
                       float* weights);
int32_t dr_experts(const void* x, int64_t stride, int32_t dtype, const int64_t* token_rows, const int64_t* ids,
                   int64_t pairs, const ExpertTable* table, void* out, int32_t threads);
void dr_combine_slots(const void* rows, const float* weights, int64_t tokens, int64_t slots, int64_t width, int32_t dtype,
                      const void* const* more, int64_t num_more, void* out, int32_t threads);

}  // extern "C"
