// Vectors of 16 fp32 numbers: AVX-512 with BF16. The names are those of vectors_avx2.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sae {

using V = __m512;
using I = __m512i;
using Lanes = __mmask16;  // of a load or store
using Bits = unsigned;    // of a comparison, one a lane

constexpr long LANES = 16;
constexpr long VECTORS = 4;  // of a register tile: 6 latents by 64 rows are 24 sums, of 32 registers

inline Lanes lanes(long left) { return left >= LANES ? 0xffff : (Lanes)((1u << left) - 1); }
inline Bits bits_of(Lanes m) { return m; }

inline V zero() { return _mm512_setzero_ps(); }
inline V splat(float v) { return _mm512_set1_ps(v); }
inline I splat(int v) { return _mm512_set1_epi32(v); }
inline I iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load(const float* p, Lanes m) { return _mm512_maskz_loadu_ps(m, p); }
inline I load(const int* p) { return _mm512_loadu_si512(p); }
inline I load_words(const uint16_t* p, Lanes m) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)); }
inline I load_bytes(const uint8_t* p, Lanes m) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, p)); }
inline V load(const uint16_t* p, Lanes m) { return _mm512_castsi512_ps(_mm512_slli_epi32(load_words(p, m), 16)); }

inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline void store(float* p, Lanes m, V v) { _mm512_mask_storeu_ps(p, m, v); }
inline void store(int* p, I v) { _mm512_storeu_si512(p, v); }
inline void store_low_words(uint16_t* p, Lanes m, I v) {  // of words below 2^16
    _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(v));
}
inline void store_bytes(uint8_t* p, Lanes m, I v) { _mm_mask_storeu_epi8(p, m, _mm512_cvtepi32_epi8(v)); }
// To bf16: to nearest, ties to even; subnormal numbers become zero.
inline void store_bf16(uint16_t* p, Lanes m, V v) { _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v)); }

inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V sqrt(V a) { return _mm512_sqrt_ps(a); }
inline V abs(V a) { return _mm512_abs_ps(a); }
inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
inline V smaller(V a, V b) { return _mm512_min_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline V masked(V a, Lanes m) { return _mm512_maskz_mov_ps(m, a); }
inline float sum(V a) { return _mm512_reduce_add_ps(a); }
inline float largest(V a) { return _mm512_reduce_max_ps(a); }

inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline I larger(I a, I b) { return _mm512_max_epi32(a, b); }
inline I smaller(I a, I b) { return _mm512_min_epi32(a, b); }
inline I both(I a, I b) { return _mm512_and_si512(a, b); }
inline I exclusive(I a, I b) { return _mm512_xor_si512(a, b); }
template <int N> inline I up(I a) { return _mm512_slli_epi32(a, N); }
template <int N> inline I down(I a) { return _mm512_srli_epi32(a, N); }  // zeros come in
inline I bits(V a) { return _mm512_castps_si512(a); }
inline V from_bits(I a) { return _mm512_castsi512_ps(a); }
inline I truncated(V a) { return _mm512_cvttps_epi32(a); }
// a < b ? x : y, lane by lane; integers are signed.
inline I where_less(V a, V b, I x, I y) { return _mm512_mask_mov_epi32(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x); }
inline I where_less(I a, I b, I x, I y) { return _mm512_mask_mov_epi32(y, _mm512_cmplt_epi32_mask(a, b), x); }
inline I either(I a, I b) { return _mm512_or_si512(a, b); }
inline I high_words(I a) { return _mm512_slli_epi32(a, 16); }
inline V to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I to_int(V a) { return _mm512_cvtps_epi32(a); }
inline void store_int16(int16_t* p, Lanes m, I v) { _mm256_mask_storeu_epi16(p, m, _mm512_cvtsepi32_epi16(v)); }

inline Bits greater(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Bits equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Bits at_least(I a, I b) { return _mm512_cmp_epi32_mask(a, b, _MM_CMPINT_NLT); }
inline Bits equal(I a, I b) { return _mm512_cmp_epi32_mask(a, b, _MM_CMPINT_EQ); }

// Words 0 ... 15 of 16 rows, transposed: out[16 words][stride], lanes are rows.
inline void transpose(const uint32_t* const (&rows)[LANES], uint32_t* out, long stride) {
    for (long word = 0; word < LANES; word++)
        for (long r = 0; r < LANES; r++) out[word * stride + r] = rows[r][word];
}

// v where a is not zero (bits of any kind), else zero.
inline V where_not_zero(V a, V v) {
    const I bits = _mm512_castps_si512(a);
    return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(bits, bits), v);
}

// The chosen lanes, first; what lies behind them is not defined.
inline V compress(Bits chosen, V v) { return _mm512_maskz_compress_ps((Lanes)chosen, v); }
inline I compress(Bits chosen, I v) { return _mm512_maskz_compress_epi32((Lanes)chosen, v); }

// z[m][v] += both products of the bf16 pairs w[m * stride] and x[16 v ...], the odd dimension's first.
template <int ROWS>
inline void add_pairs(V (&z)[ROWS][VECTORS], const uint32_t* w, long stride, const uint32_t* x) {
    __m512bh rows[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) rows[v] = (__m512bh)_mm512_loadu_si512(x + v * LANES);
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; m++) {
        const __m512bh latent = (__m512bh)_mm512_set1_epi32((int)w[m * stride]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) z[m][v] = _mm512_dpbf16_ps(z[m][v], latent, rows[v]);
    }
}

// The same of int16 pairs, exactly, modulo 2^32.
template <int ROWS>
inline void add_pairs(I (&z)[ROWS][VECTORS], const uint32_t* w, long stride, const uint32_t* x) {
    I rows[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) rows[v] = _mm512_loadu_si512(x + v * LANES);
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; m++) {
        const I latent = _mm512_set1_epi32((int)w[m * stride]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) z[m][v] = _mm512_add_epi32(z[m][v], _mm512_madd_epi16(latent, rows[v]));
    }
}

}  // namespace sae
