// Vectors of 8 fp32 numbers: AVX2 with FMA. The names are those of vectors_avx512.h, and so are the bits of every z.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>
#include <cstring>

namespace sae {

using V = __m256;
using I = __m256i;
using Bits = unsigned;  // of a comparison, one a lane

constexpr long LANES = 8;
constexpr long VECTORS = 2;  // of a register tile: 6 latents by 16 rows are 12 sums, of 16 registers

// Of a load or store: the first n lanes. Whole vectors branch around the masked instructions, which are slow on AMD.
struct Lanes {
    long n;
    bool all() const { return n >= LANES; }
    I mask() const { return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
};

inline Lanes lanes(long left) { return {left < LANES ? left : LANES}; }
inline Bits bits_of(Lanes m) { return (1u << m.n) - 1; }

inline V zero() { return _mm256_setzero_ps(); }
inline V splat(float v) { return _mm256_set1_ps(v); }
inline I splat(int v) { return _mm256_set1_epi32(v); }
inline I iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load(const float* p, Lanes m) { return m.all() ? load(p) : _mm256_maskload_ps(p, m.mask()); }
inline I load(const int* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline I load_words(const uint16_t* p, Lanes m) {
    if (m.all()) return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    uint16_t words[LANES] = {};
    memcpy(words, p, m.n * sizeof(uint16_t));
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)words));
}
inline I load_bytes(const uint8_t* p, Lanes m) {
    uint64_t bytes = 0;
    memcpy(&bytes, p, m.all() ? LANES : m.n);
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
}
inline V load(const uint16_t* p, Lanes m) { return _mm256_castsi256_ps(_mm256_slli_epi32(load_words(p, m), 16)); }

inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline void store(float* p, Lanes m, V v) { m.all() ? store(p, v) : _mm256_maskstore_ps(p, m.mask(), v); }
inline void store(int* p, I v) { _mm256_storeu_si256((__m256i*)p, v); }
inline void store_words(void* p, Lanes m, __m128i v) {
    if (m.all()) _mm_storeu_si128((__m128i*)p, v);
    else memcpy(p, &v, m.n * sizeof(uint16_t));
}
inline void store_low_words(uint16_t* p, Lanes m, I v) {  // of words below 2^16
    store_words(p, m, _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
inline void store_bytes(uint8_t* p, Lanes m, I v) {  // of words below 2^8
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const long long bytes = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
    memcpy(p, &bytes, m.all() ? LANES : m.n);
}
// To bf16: to nearest, ties to even; subnormal numbers become zero, NaN stays NaN.
inline void store_bf16(uint16_t* p, Lanes m, V v) {
    const I bits = _mm256_castps_si256(v), exponent = splat(0x7f800000);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), splat(1));
    const I rounded = _mm256_add_epi32(_mm256_add_epi32(bits, splat(0x7fff)), odd);
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    I out = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, splat(0x00400000)), nan);
    const I tiny = _mm256_cmpeq_epi32(_mm256_and_si256(bits, exponent), _mm256_setzero_si256());
    out = _mm256_blendv_epi8(out, _mm256_and_si256(bits, splat((int)0x80000000)), tiny);
    store_low_words(p, m, _mm256_srli_epi32(out, 16));
}

inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V sqrt(V a) { return _mm256_sqrt_ps(a); }
inline V abs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline V larger(V a, V b) { return _mm256_max_ps(a, b); }
inline V smaller(V a, V b) { return _mm256_min_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
inline V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
inline V masked(V a, Lanes m) { return m.all() ? a : _mm256_and_ps(a, _mm256_castsi256_ps(m.mask())); }
inline float sum(V a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(V a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline I add(I a, I b) { return _mm256_add_epi32(a, b); }
inline I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
inline I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
inline I larger(I a, I b) { return _mm256_max_epi32(a, b); }
inline I smaller(I a, I b) { return _mm256_min_epi32(a, b); }
inline I both(I a, I b) { return _mm256_and_si256(a, b); }
inline I exclusive(I a, I b) { return _mm256_xor_si256(a, b); }
template <int N> inline I up(I a) { return _mm256_slli_epi32(a, N); }
template <int N> inline I down(I a) { return _mm256_srli_epi32(a, N); }  // zeros come in
inline I bits(V a) { return _mm256_castps_si256(a); }
inline V from_bits(I a) { return _mm256_castsi256_ps(a); }
inline I truncated(V a) { return _mm256_cvttps_epi32(a); }
// a < b ? x : y, lane by lane; integers are signed.
inline I where_less(V a, V b, I x, I y) { return _mm256_blendv_epi8(y, x, bits(_mm256_cmp_ps(a, b, _CMP_LT_OQ))); }
inline I where_less(I a, I b, I x, I y) { return _mm256_blendv_epi8(y, x, _mm256_cmpgt_epi32(b, a)); }
inline I either(I a, I b) { return _mm256_or_si256(a, b); }
inline I high_words(I a) { return _mm256_slli_epi32(a, 16); }
inline V to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline I to_int(V a) { return _mm256_cvtps_epi32(a); }
inline void store_int16(int16_t* p, Lanes m, I v) {
    store_words(p, m, _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}

inline Bits greater(V a, V b) { return (Bits)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline Bits equal(V a, V b) { return (Bits)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
inline Bits sign_bits(I a) { return (Bits)_mm256_movemask_ps(_mm256_castsi256_ps(a)); }
inline Bits at_least(I a, I b) { return 0xff & ~sign_bits(_mm256_cmpgt_epi32(b, a)); }
inline Bits equal(I a, I b) { return sign_bits(_mm256_cmpeq_epi32(a, b)); }

// Words 0 ... 7 of 8 rows, transposed: out[8 words][stride], lanes are rows.
inline void transpose(const uint32_t* const (&rows)[LANES], uint32_t* out, long stride) {
    V a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps((const float*)rows[i]);
    for (int i = 0; i < 8; i += 2)
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        store((float*)out + i * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        store((float*)out + (i + 4) * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

// v where a is not zero (bits of any kind), else zero.
inline V where_not_zero(V a, V v) {
    const I none = _mm256_cmpeq_epi32(_mm256_castps_si256(a), _mm256_setzero_si256());
    return _mm256_andnot_ps(_mm256_castsi256_ps(none), v);
}

// The places of the set bits of every byte, first.
inline constexpr auto PLACES = [] {
    std::array<std::array<uint8_t, LANES>, 1 << LANES> places{};
    for (int chosen = 0; chosen < 1 << LANES; chosen++)
        for (int lane = 0, n = 0; lane < LANES; lane++)
            if (chosen >> lane & 1) places[chosen][n++] = (uint8_t)lane;
    return places;
}();

// The chosen lanes, first; what lies behind them is not defined.
inline I compress(Bits chosen, I v) {
    return _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)PLACES[chosen].data())));
}
inline V compress(Bits chosen, V v) { return _mm256_castsi256_ps(compress(chosen, _mm256_castps_si256(v))); }

// The two inner steps as instructions: compilers otherwise copy and reorder until the sums leave the registers (GCC 12:
// half the speed). Twelve sums, two vectors of rows, one latent and one register more are all sixteen.
inline void add_product(V& z, V a, V b) { asm("vfmadd231ps %2, %1, %0" : "+x"(z) : "x"(a), "x"(b)); }
inline void add_products(I& z, I a, I b) {
#ifdef __AVXVNNI__
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(z) : "x"(a), "x"(b));
#else
    I both;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(z), "=&x"(both) : "x"(a), "x"(b));
#endif
}

// z[m][v] += both products of the bf16 pairs w[m * stride] and x[8 v ...], the odd dimension's first. A product of two
// bf16 numbers is exact in fp32, so each addition rounds once, as in vdpbf16ps.
template <int ROWS>
inline __attribute__((always_inline)) void add_pairs(V (&z)[ROWS][VECTORS], const uint32_t* w, long stride,
                                                     const uint32_t* x) {
    const auto all = [&](auto&& expand) __attribute__((always_inline)) {
        V rows[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) rows[v] = _mm256_castsi256_ps(expand(load((const int*)x + v * LANES)));
#pragma GCC unroll 6
        for (int m = 0; m < ROWS; m++) {
            const V latent = _mm256_castsi256_ps(expand(_mm256_set1_epi32((int)w[m * stride])));
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) add_product(z[m][v], latent, rows[v]);
        }
    };
    all([](I pairs) { return _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)); });
    asm volatile("" ::: "memory");  // load again: kept, the pairs would push sums out of the registers
    all([](I pairs) { return _mm256_slli_epi32(pairs, 16); });
}

// The same of int16 pairs, exactly, modulo 2^32.
template <int ROWS>
inline __attribute__((always_inline)) void add_pairs(I (&z)[ROWS][VECTORS], const uint32_t* w, long stride,
                                                     const uint32_t* x) {
    I rows[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) rows[v] = load((const int*)x + v * LANES);
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; m++) {
        const I latent = _mm256_set1_epi32((int)w[m * stride]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) add_products(z[m][v], latent, rows[v]);
    }
}

}  // namespace sae
