// A decoder's whole pass, from token ids to logits: the kernels one after the other, in one call that holds no lock of Python's.
#include "kernels.h"

namespace baton {
namespace {

struct Memory {  // of one pass, kept by the thread
    char* at;
    explicit Memory(int64_t bytes) : at((char*)scratch(2, bytes)) {}
    void* take(int64_t bytes) {
        void* taken = at;
        at += padded(bytes);
        return taken;
    }
    static int64_t padded(int64_t bytes) { return ceil_div(bytes, 64) * 64; }
};

void select(const void* from, const int64_t* rows, int64_t count, int64_t bytes, void* to) {
    for (int64_t i = 0; i < count; i++) std::memcpy((char*)to + i * bytes, (const char*)from + rows[i] * bytes, bytes);
}

}  // namespace

void forward(const Decoder& d, const Step& s) {
    const int64_t size = d.is_bf16 ? 2 : 4, heads = d.num_heads * d.dim, qkv_size = heads + 2 * d.num_kv_heads * d.dim;
    const int64_t pitch = d.intermediate + (is_bad_pitch(d.intermediate * size) ? kPanel : 0);  // of what `down` reads
    const int64_t widths[] = {d.hidden, d.hidden, d.hidden, d.hidden, qkv_size, heads, heads, pitch};
    int64_t bytes = 0;
    for (int64_t width : widths) bytes += Memory::padded(s.tokens * width * size);
    Memory memory(bytes);
    void* buffers[8];
    for (int i = 0; i < 8; i++) buffers[i] = memory.take(s.tokens * widths[i] * size);
    auto [residual, spare, normed, update, qkv, q, attended, gated] = buffers;

    int64_t rows = s.tokens;
    auto norm = [&](const void* x, void* sum, const void* weight) {
        rms_norm({x, weight, sum, normed, rows, d.hidden, d.hidden, d.hidden, d.eps, d.is_bf16});
    };
    auto product = [&](const void* x, const void* weight, const void* bias, void* out, int64_t n, int64_t k, int64_t stride) {
        linear({x, weight, bias, out, rows, n, k, stride, n, d.is_bf16, false});
    };
    gather_rows(d.embedding, d.hidden, s.token_ids, rows, residual, d.is_bf16);
    for (size_t i = 0; i < d.layers.size(); i++) {
        const Layer& w = d.layers[i];
        KVCache kv = s.kv;
        kv.data = (char*)kv.data + i * s.layer_bytes;
        i ? norm(update, residual, w.input_norm) : norm(residual, nullptr, w.input_norm);
        product(normed, w.qkv, w.qkv_bias, qkv, qkv_size, d.hidden, d.hidden);
        rope_write({qkv, s.cos_sin, s.positions, s.slots, w.q_norm, w.k_norm, q, kv, rows, qkv_size, d.num_heads, d.dim, d.eps, d.is_bf16});
        paged_attention({q, attended, kv, s.block_tables, s.query_start, s.context_lens, s.sequences, s.table_stride, d.num_heads, d.dim, heads,
                         heads, w.window, d.is_bf16});
        if (s.num_rows >= 0 && i + 1 == d.layers.size()) {  // from here on, nobody reads the other rows
            rows = s.num_rows;
            if (!rows) return;
            select(attended, s.rows, rows, heads * size, q);
            select(residual, s.rows, rows, d.hidden * size, spare);
            std::swap(attended, q), std::swap(residual, spare);
        }
        product(attended, w.o, w.o_bias, update, d.hidden, heads, heads);
        norm(update, residual, w.post_norm);
        linear({normed, w.gate_up, w.gate_up_bias, gated, rows, 2 * d.intermediate, d.hidden, d.hidden, pitch, d.is_bf16, true});
        product(gated, w.down, w.down_bias, update, d.hidden, d.intermediate, pitch);
    }
    norm(update, residual, d.norm);
    product(normed, d.head, nullptr, s.logits, d.vocab, d.hidden, d.hidden);
}

}  // namespace baton
