// What happens per row of the batch once its latents are chosen: rounding, reconstruction, error, gradient of z.
#pragma once

#include "parallel.h"
#include "vectors.h"

namespace sae {

// out = bf16(a - minus), to nearest, ties to even: torch's rounding, except that subnormal numbers become zero.
inline void round_row(const float* a, const float* minus, uint16_t* out, long d, long padded) {
    for (long i = 0; i < padded; i += LANES) {
        const __mmask16 in = i < d ? lanes(d - i) : 0;
        __m512 v = load(a + i, in);
        if (minus) v = _mm512_sub_ps(v, load(minus + i, in));
        _mm256_mask_storeu_epi16(out + i, lanes(padded - i), (__m256i)_mm512_cvtneps_pbh(v));
    }
}

// error = target - sum_i values_i W_dec[indices_i] (- b_dec, when given); returns ||error||^2.
inline float row_error(const float* target, const float* b_dec, const float* values, const int* indices, long k,
                       const float* W_dec, float* error, long d) {
    weighted_sum(error, d, k, [&](long i) { return W_dec + indices[i] * d; }, [&](long i) { return values[i]; });
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < d; i += LANES) {
        const __mmask16 m = lanes(d - i);
        __m512 e = _mm512_sub_ps(load(target + i, m), load(error + i, m));
        if (b_dec) e = _mm512_sub_ps(e, load(b_dec + i, m));
        _mm512_mask_storeu_ps(error + i, m, e);
        squares = _mm512_fmadd_ps(e, e, squares);
    }
    return _mm512_reduce_add_ps(squares);
}

// d_z_i = scale * error . W_dec[indices_i], 0 where the value is: the rows of W_dec are in L2 from `row_error`.
inline void row_d_z(const float* error, const float* values, const int* indices, long k, const float* W_dec,
                    float scale, float* d_z, long d) {
    for (long i = 0; i < k; i++) d_z[i] = values[i] > 0 ? scale * dot(error, W_dec + indices[i] * d, d) : 0;
}

}  // namespace sae
