// Norms, rotation with the KV write, argmax. Each value is rounded to the element type wherever torch's layers round it.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "math.h"

namespace baton {
namespace {

constexpr int64_t kSerial = 8192;  // elements below which threads cost more than they save

// Rows in pieces that are worth a task each.
template <typename F>
void over_rows(int64_t rows, int64_t elements_per_row, F&& body) {
    const int64_t each = rows * elements_per_row <= kSerial ? rows : std::max<int64_t>(1, kSerial / 4 / elements_per_row);
    auto task = [&](int64_t i) {
        for (int64_t row = i * each; row < std::min(rows, (i + 1) * each); row++) body(row);
    };
    if (each == rows)
        task(0);
    else
        parallel(ceil_div(rows, each), task);
}

template <typename T>
float inverse_rms(const T* x, int64_t size, float eps) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + 64 <= size; i += 64)
        for (int j = 0; j < 4; j++) {
            const __m512 v = Type<T>::load(x + i + 16 * j);
            sum[j] = _mm512_fmadd_ps(v, v, sum[j]);
        }
    for (; i < size; i += 16) {
        const __m512 v = Type<T>::load(x + i, tail_mask(size - i));
        sum[0] = _mm512_fmadd_ps(v, v, sum[0]);
    }
    const __m512 all = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(all) / float(size) + eps);
}

template <typename T>
void norm_row(const T* x, const T* weight, T* out, int64_t size, float eps) {
    const __m512 scale = _mm512_set1_ps(inverse_rms(x, size, eps));
    for (int64_t i = 0; i < size; i += 16) {
        const __mmask16 m = tail_mask(size - i);
        const __m512 normed = Type<T>::round(_mm512_mul_ps(Type<T>::load(x + i, m), scale));
        Type<T>::store(out + i, _mm512_mul_ps(normed, Type<T>::load(weight + i, m)), m);
    }
}

template <typename T>
void norm(const Norm& p) {
    over_rows(p.rows, p.size, [&](int64_t row) {
        const T* x = (const T*)p.x + row * p.x_stride;
        if (p.residual) {
            T* residual = (T*)p.residual + row * p.residual_stride;
            for (int64_t i = 0; i < p.size; i += 16) {
                const __mmask16 m = tail_mask(p.size - i);
                Type<T>::store(residual + i, _mm512_add_ps(Type<T>::load(residual + i, m), Type<T>::load(x + i, m)), m);
            }
            x = residual;
        }
        norm_row(x, (const T*)p.weight, (T*)p.out + row * p.size, p.size, p.eps);
    });
}

// (x1, x2) → (x1 cos - x2 sin, x2 cos + x1 sin), each product and each sum rounded.
template <typename T>
void rotate(const T* x, const float* cos, T* out, int64_t half) {
    using E = Type<T>;
    const float* sin = cos + half;
    for (int64_t i = 0; i < half; i += 16) {
        const __mmask16 m = tail_mask(half - i);
        const __m512 c = E::round(_mm512_maskz_loadu_ps(m, cos + i)), s = E::round(_mm512_maskz_loadu_ps(m, sin + i));
        const __m512 a = E::load(x + i, m), b = E::load(x + half + i, m);
        const __m512 ac = E::round(_mm512_mul_ps(a, c)), bs = E::round(_mm512_mul_ps(b, s));
        const __m512 bc = E::round(_mm512_mul_ps(b, c)), as = E::round(_mm512_mul_ps(a, s));
        E::store(out + i, _mm512_sub_ps(ac, bs), m);
        E::store(out + half + i, _mm512_add_ps(bc, as), m);
    }
}

template <typename T>
void rope(const Rope& p) {
    const int64_t kv_heads = p.kv.num_heads, dim = p.dim;
    over_rows(p.tokens, (p.num_heads + 2 * kv_heads) * dim, [&](int64_t t) {
        T normed[512];
        const T* row = (const T*)p.qkv + t * p.qkv_stride;
        const float* cos = p.cos_sin + p.positions[t] * dim;
        auto head = [&](int64_t h, const void* weight, T* out) {
            const T* x = row + h * dim;
            if (weight) norm_row(x, (const T*)weight, normed, dim, p.eps), x = normed;
            rotate(x, cos, out, dim / 2);
        };
        for (int64_t h = 0; h < p.num_heads; h++) head(h, p.q_weight, (T*)p.q + (t * p.num_heads + h) * dim);
        const int64_t slot = p.slots[t];
        if (slot < 0) return;
        T* place = (T*)p.kv.data + slot / p.kv.block_size * p.kv.block_stride + slot % p.kv.block_size * p.kv.token_stride;
        for (int64_t h = 0; h < kv_heads; h++) {
            head(p.num_heads + h, p.k_weight, place + h * p.kv.head_stride);
            std::memcpy(place + p.kv.kind_stride + h * p.kv.head_stride, row + (p.num_heads + kv_heads + h) * dim, dim * sizeof(T));
        }
    });
}

struct Best {
    float value;
    int64_t id;
};

template <typename T>
Best best_of(const T* x, int64_t begin, int64_t end) {
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 value = lowest;
    __m512i id = _mm512_set1_epi32(INT32_MAX);
    __m512i at = _mm512_add_epi32(_mm512_set1_epi32(int(begin)), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int64_t i = begin; i < end; i += 16) {
        const __mmask16 m = tail_mask(end - i);
        const __m512 v = Type<T>::load(x + i, m);
        const __mmask16 better = _mm512_mask_cmp_ps_mask(m, v, value, _CMP_GT_OQ);
        value = _mm512_mask_mov_ps(value, better, v);
        id = _mm512_mask_mov_epi32(id, better, at);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
    }
    const float top = _mm512_reduce_max_ps(value);
    const __mmask16 tops = _mm512_cmp_ps_mask(value, _mm512_set1_ps(top), _CMP_EQ_OQ);
    return {top, _mm512_mask_reduce_min_epi32(tops, id)};
}

template <typename T>
void run_argmax(const T* logits, int64_t stride, int64_t rows, int64_t size, int64_t* out) {
    const int64_t each = 16384, parts = ceil_div(size, each);
    std::vector<Best> best(rows * parts);
    auto task = [&](int64_t i) {
        const int64_t begin = i % parts * each;
        best[i] = best_of(logits + i / parts * stride, begin, std::min(size, begin + each));
    };
    if (rows * size <= kSerial)
        for (int64_t i = 0; i < rows * parts; i++) task(i);
    else
        parallel(rows * parts, task);
    for (int64_t row = 0; row < rows; row++) {
        Best top = best[row * parts];
        for (int64_t i = 1; i < parts; i++)
            if (best[row * parts + i].value > top.value) top = best[row * parts + i];
        out[row] = top.id == INT32_MAX ? 0 : top.id;  // nothing above -inf
    }
}

}  // namespace

void rms_norm(const Norm& p) { p.is_bf16 ? norm<BF16>(p) : norm<float>(p); }

void rope_write(const Rope& p) { p.is_bf16 ? rope<BF16>(p) : rope<float>(p); }

void argmax(const void* logits, int64_t stride, int64_t rows, int64_t size, int64_t* out, bool is_bf16) {
    is_bf16 ? run_argmax((const BF16*)logits, stride, rows, size, out) : run_argmax((const float*)logits, stride, rows, size, out);
}

}  // namespace baton
