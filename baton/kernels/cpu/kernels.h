// The kernels' arguments: plain pointers, sizes and strides (in elements). Shapes are those of baton/kernels/cpu/__init__.py.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace baton {

struct Linear {
    const void *x, *weight, *bias;  // [m, k], packed, [n] or null
    void* out;                      // [m, n], or [m, n / 2] if gated
    int64_t m, n, k, x_stride, out_stride;
    bool is_bf16, gated;
};
int64_t num_panels(int64_t n, bool gated);  // of a packed weight
void linear(const Linear& p);
void pack_weight(const void* weight, int64_t stride, int64_t n, int64_t k, bool gated, void* packed, bool is_bf16);
void gather_rows(const void* packed, int64_t k, const int64_t* ids, int64_t count, void* out, bool is_bf16);

struct Norm {
    const void *x, *weight;
    void *residual, *out;  // residual null: no addition; else residual += x, in place, and that is normed
    int64_t rows, size, x_stride, residual_stride;
    float eps;
    bool is_bf16;
};
void rms_norm(const Norm& p);

struct KVCache {
    void* data;  // of one layer
    int64_t block_stride, kind_stride, head_stride, token_stride, block_size, num_heads;
};

struct Rope {
    const void* qkv;
    const float* cos_sin;  // [positions, dim]
    const int64_t *positions, *slots;
    const void *q_weight, *k_weight;  // [dim] or null
    void* q;                          // [tokens, num_heads, dim]
    KVCache kv;
    int64_t tokens, qkv_stride, num_heads, dim;
    float eps;
    bool is_bf16;
};
void rope_write(const Rope& p);

struct PagedAttention {
    const void* q;
    void* out;
    KVCache kv;
    const int32_t *block_tables, *query_start, *context_lens;
    int64_t sequences, table_stride, num_heads, dim, q_stride, out_stride;  // q and out: [tokens, num_heads, dim], heads contiguous
    int64_t window;                                                         // 0: none
    bool is_bf16;
};
void paged_attention(const PagedAttention& p);

void argmax(const void* logits, int64_t stride, int64_t rows, int64_t size, int64_t* out, bool is_bf16);

struct Layer {  // weights; products' are packed; biases and the norms of q and k may be null
    const void *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *post_norm, *gate_up, *gate_up_bias, *down, *down_bias;
    int64_t window;
};

struct Decoder {
    std::vector<Layer> layers;
    const void *embedding, *norm, *head;
    int64_t vocab, hidden, intermediate, num_heads, num_kv_heads, dim;
    float eps;
    bool is_bf16;
};

struct Step {  // of all sequences' new tokens
    const int64_t *token_ids, *positions, *slots;
    const float* cos_sin;
    KVCache kv;           // of the first layer
    int64_t layer_bytes;  // from one layer's to the next one's
    const int32_t *block_tables, *query_start, *context_lens;
    int64_t sequences, table_stride, tokens;
    const int64_t* rows;  // whose logits are wanted
    int64_t num_rows;     // negative: all
    void* logits;  // [num_rows, vocab]
};
void forward(const Decoder& decoder, const Step& step);

}  // namespace baton
