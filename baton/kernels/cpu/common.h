// What all kernels share: the two element types behind one interface, the tasks, and the inner product of a register tile.
//
// A "dword" is the unit along the reduced axis: two bf16 or one fp32. A panel is 32 columns of a right-hand matrix, dword by dword:
//
//     panel[dword][32]      two zmm registers per dword; lane n holds the dword of column n
//
// Every output is one accumulator that runs over its dwords in order, in slices of a fixed length, so its bits depend on its own row and
// column only, never on how many rows, columns or threads share the call.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace baton {

constexpr int kPanel = 32;  // columns
constexpr int kRows = 12;   // rows of a register tile: 12 × 2 accumulators, 2 panel registers, 1 broadcast

struct BF16 {
    uint16_t bits;
};

template <typename T>
struct Type;

template <>
struct Type<BF16> {
    static constexpr int per_dword = 2;
    static inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
    static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
    static inline __m512 load(const BF16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
    static inline __m512 load(const BF16* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
    static inline void store(BF16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
    static inline void store(BF16* p, __m512 x, __mmask16 m) { _mm256_mask_storeu_epi16(p, m, narrow(x)); }
    static inline __m512 round(__m512 x) { return widen(narrow(x)); }
    static inline __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static inline float to_float(BF16 x) {
        uint32_t bits = uint32_t(x.bits) << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    }
};

template <>
struct Type<float> {
    static constexpr int per_dword = 1;
    static inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
    static inline __m512 load(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
    static inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
    static inline void store(float* p, __m512 x, __mmask16 m) { _mm512_mask_storeu_ps(p, m, x); }
    static inline __m512 round(__m512 x) { return x; }
    static inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    static inline float to_float(float x) { return x; }
};

inline __mmask16 tail_mask(int64_t count) { return count >= 16 ? __mmask16(0xffff) : __mmask16((1u << (count > 0 ? count : 0)) - 1); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows that lie a multiple of 1 KiB apart would fall into the same few sets of L1.
inline bool is_bad_pitch(int64_t bytes) { return bytes % 1024 == 0; }

// Runs body(task) for 0 … tasks - 1 on torch's threads or on our own; each thread takes the next task when it is done with one.
using TaskBody = void (*)(void* context, int64_t task);
void run_tasks(int64_t tasks, TaskBody body, void* context);
void run_on_torch(int64_t tasks, TaskBody body, void* context);
void use_own_threads(bool on);
int num_threads();  // torch's setting

template <typename F>
inline void parallel(int64_t tasks, F&& body) {
    using Body = std::remove_reference_t<F>;
    run_tasks(tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, (void*)&body);
}

// Scratch memory of the calling thread, 64-byte aligned, kept between calls; valid until the thread's next scratch() of the same slot.
void* scratch(int slot, int64_t bytes);

// sum[m][0..1] += rows of a (MR rows, lda dwords apart, kd dwords each) times one panel. `ahead` is touched `step` bytes per dword, so
// that what is needed next is on its way; step 0: nothing is.
template <typename T, int MR, int HINT>
[[gnu::always_inline]] inline void tile(
    const uint32_t* a, int64_t lda, const uint32_t* panel, int64_t kd, __m512 (&sum)[MR][2], const char* ahead, int64_t step) {
    const char* base[4];
    const int64_t pitch = lda * 4;
    for (int i = 0; i < 4; i++) base[i] = (const char*)a + 3 * i * pitch;
    for (int64_t k = 0; k < kd; k++) {
        const __m512i w0 = _mm512_loadu_si512(panel), w1 = _mm512_loadu_si512(panel + 16);
        panel += kPanel;
        if (HINT >= 0) {
            if (HINT == _MM_HINT_T0) {
                _mm_prefetch(ahead, _MM_HINT_T0);
                _mm_prefetch(ahead + 64, _MM_HINT_T0);
                ahead += 128;
            } else {
                _mm_prefetch(ahead, _MM_HINT_T1);
                ahead += step;
            }
        }
#pragma GCC unroll 12
        for (int m = 0; m < MR; m++) {
            int32_t pair;
            std::memcpy(&pair, base[m / 3] + (m % 3) * pitch, 4);
            const __m512i x = _mm512_set1_epi32(pair);
            sum[m][0] = Type<T>::dot(sum[m][0], x, w0);
            sum[m][1] = Type<T>::dot(sum[m][1], x, w1);
        }
        for (int i = 0; i < 4; i++) base[i] += 4;
    }
}

// Calls body(std::integral_constant<int, MR>) for a run-time number of rows, 1 … 12.
template <int MR>
struct Rows {
    static constexpr int value = MR;
};
template <typename F>
[[gnu::always_inline]] inline void with_rows(int rows, F&& body) {
    switch (rows) {
        case 1: return body(Rows<1>());
        case 2: return body(Rows<2>());
        case 3: return body(Rows<3>());
        case 4: return body(Rows<4>());
        case 5: return body(Rows<5>());
        case 6: return body(Rows<6>());
        case 7: return body(Rows<7>());
        case 8: return body(Rows<8>());
        case 9: return body(Rows<9>());
        case 10: return body(Rows<10>());
        case 11: return body(Rows<11>());
        default: return body(Rows<12>());
    }
}

}  // namespace baton
