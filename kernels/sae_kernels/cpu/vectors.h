// Rows of d_model numbers: weighted sums of gathered rows, dot products. fp32 arithmetic; rows are fp32 or bf16.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sae {

constexpr long LANES = 16;

inline __mmask16 lanes(long left) { return left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1); }

inline __m512 load(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
inline __m512 load(const uint16_t* p, __mmask16 m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}

template <int VECTORS, class Row, class Weight>
inline void weighted_sum_part(float* out, __mmask16 mask, long count, const Row& row, const Weight& weight) {
    __m512 sum[VECTORS];
#pragma GCC unroll 12
    for (int v = 0; v < VECTORS; v++) sum[v] = _mm512_setzero_ps();
    for (long i = 0; i < count; i++) {
        const auto* source = row(i);
        const __m512 w = _mm512_set1_ps(weight(i));
#pragma GCC unroll 12
        for (int v = 0; v < VECTORS; v++) sum[v] = _mm512_fmadd_ps(w, load(source + v * LANES, mask), sum[v]);
    }
#pragma GCC unroll 12
    for (int v = 0; v < VECTORS; v++) _mm512_mask_storeu_ps(out + v * LANES, mask, sum[v]);
}

// out[0:d] = sum_i weight(i) * row(i)[0:d]; the sums live in registers, at most 192 dimensions at a time.
template <class Row, class Weight>
inline void weighted_sum(float* out, long d, long count, const Row& row, const Weight& weight) {
    long start = 0;
    auto from = [&](long i) { return row(i) + start; };
    auto parts = [&]<int VECTORS>() {
        for (; d - start >= VECTORS * LANES; start += VECTORS * LANES)
            weighted_sum_part<VECTORS>(out + start, 0xffff, count, from, weight);
    };
    parts.template operator()<12>();
    parts.template operator()<8>();
    parts.template operator()<4>();
    parts.template operator()<1>();
    if (start < d) weighted_sum_part<1>(out + start, lanes(d - start), count, from, weight);
}

inline void add_row(float* to, const float* a, long d) {
    for (long i = 0; i < d; i += LANES) {
        const __mmask16 m = lanes(d - i);
        _mm512_mask_storeu_ps(to + i, m, _mm512_add_ps(load(to + i, m), load(a + i, m)));
    }
}

template <class T>
inline float dot(const float* a, const T* b, long d) {
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    long i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES) {
        s0 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), load(b + i, 0xffff), s0);
        s1 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + LANES), load(b + i + LANES, 0xffff), s1);
        s2 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 2 * LANES), load(b + i + 2 * LANES, 0xffff), s2);
        s3 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 3 * LANES), load(b + i + 3 * LANES, 0xffff), s3);
    }
    for (; i < d; i += LANES) {
        const __mmask16 m = lanes(d - i);
        s0 = _mm512_fmadd_ps(load(a + i, m), load(b + i, m), s0);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
}

}  // namespace sae
