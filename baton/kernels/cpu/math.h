// Exponentials in registers: 2^n times a Taylor polynomial on |r| ≤ 1/2 (of 2^r) or ln 2 / 2 (of e^r).
#pragma once

#include <immintrin.h>

#include <initializer_list>

#include "common.h"

namespace baton {

inline __m512 nearest(__m512 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

template <int N>
inline __m512 polynomial(__m512 r, const float (&c)[N]) {
    __m512 y = _mm512_set1_ps(c[0]);
#pragma GCC unroll 8
    for (int i = 1; i < N; i++) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c[i]));
    return y;
}

// e^x within about 1 ulp; ln 2 is taken off in two parts.
inline __m512 exp(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-150.0f));
    const __m512 n = nearest(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    return _mm512_scalef_ps(polynomial(r, {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}), n);
}

// 2^x, relative error 1.2e-7, or 2.4e-6 where the result becomes a bf16; -inf gives 0.
template <bool BRIEF>
inline __m512 exp2(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
    const __m512 n = nearest(x), r = _mm512_sub_ps(x, n);
    if (BRIEF) return _mm512_scalef_ps(polynomial(r, {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 0.240226507f, 0.693147181f, 1.0f}), n);
    return _mm512_scalef_ps(
        polynomial(r, {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 0.240226507f, 0.693147181f, 1.0f}), n);
}

// x / (1 + e^-x), rounded to T.
template <typename T>
inline __m512 silu(__m512 x) {
    const __m512 e = Type<T>::per_dword == 2 ? exp2<true>(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f))) : exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return Type<T>::round(_mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e)));
}

}  // namespace baton
