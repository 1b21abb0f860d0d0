// What happens per row of the batch once its latents are chosen: rounding, reconstruction, error, gradient of z.
#pragma once

#include "parallel.h"
#include "vectors.h"

namespace sae {

// use(W) with the type that the matrix is stored in.
template <class Use>
inline void typed(const void* W, long bf16, const Use& use) {
    bf16 ? use((const uint16_t*)W) : use((const float*)W);
}

// out = bf16(a - minus), to nearest, ties to even: torch's rounding, except that subnormal numbers become zero.
template <class T>
inline void round_row(const T* a, const float* minus, uint16_t* out, long d, long padded) {
    for (long i = 0; i < padded; i += LANES) {
        const Lanes in = lanes(i < d ? d - i : 0);
        V v = load(a + i, in);
        if (minus) v = sub(v, load(minus + i, in));
        store_bf16(out + i, lanes(padded - i), v);
    }
}

// W_dec, here and below, is fp32 or bf16.
// out = sum_i values_i W_dec[indices_i]; an empty place has the index -1 and the value 0.
template <class T>
inline void row_partial(const float* values, const int* indices, long k, const T* W_dec, float* out, long d) {
    while (k && indices[k - 1] < 0) k--;
    auto row = [&](long i) { return W_dec + (indices[i] < 0 ? 0 : indices[i]) * d; };
    weighted_sum(out, d, k, row, [&](long i) { return values[i]; });
}

// error = target - sum_i values_i W_dec[indices_i] (- b_dec, when given); returns ||error||^2.
template <class T>
inline float row_error(const float* target, const float* b_dec, const float* values, const int* indices, long k,
                       const T* W_dec, float* error, long d) {
    row_partial(values, indices, k, W_dec, error, d);
    V squares = zero();
    for (long i = 0; i < d; i += LANES) {
        const Lanes m = lanes(d - i);
        V e = sub(load(target + i, m), load(error + i, m));
        if (b_dec) e = sub(e, load(b_dec + i, m));
        store(error + i, m, e);
        squares = fma(e, e, squares);
    }
    return sum(squares);
}

// d_z_i = scale * error . W_dec[indices_i], 0 at empty places: the rows of W_dec are in L2 from `row_error`. With
// `source`, a place takes that row of the errors instead.
template <class T>
inline void row_d_z(const float* error, const float* errors, const int* source, const int* indices, long k,
                    const T* W_dec, float scale, float* d_z, long d) {
    for (long i = 0; i < k; i++) {
        const float* e = source ? errors + source[i] * d : error;
        d_z[i] = indices[i] < 0 ? 0 : scale * dot(e, W_dec + indices[i] * d, d);
    }
}

}  // namespace sae
