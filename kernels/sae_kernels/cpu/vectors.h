// The processor's vectors under one set of names, and sums over rows of d_model numbers: fp32 arithmetic, fp32 or bf16
// rows.
#pragma once

#include <cstdint>

#ifdef __AVX512BF16__
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif

namespace sae {

template <int N, class Row, class Weight>
inline void weighted_sum_part(float* out, Lanes mask, long count, const Row& row, const Weight& weight) {
    V sums[N];
#pragma GCC unroll 12
    for (int v = 0; v < N; v++) sums[v] = zero();
    for (long i = 0; i < count; i++) {
        const auto* source = row(i);
        const V w = splat(weight(i));
#pragma GCC unroll 12
        for (int v = 0; v < N; v++) sums[v] = fma(w, load(source + v * LANES, mask), sums[v]);
    }
#pragma GCC unroll 12
    for (int v = 0; v < N; v++) store(out + v * LANES, mask, sums[v]);
}

// out[0:d] = sum_i weight(i) * row(i)[0:d]; the sums live in registers, at most 12 vectors of dimensions at a time.
template <class Row, class Weight>
inline void weighted_sum(float* out, long d, long count, const Row& row, const Weight& weight) {
    long start = 0;
    auto from = [&](long i) { return row(i) + start; };
    auto parts = [&]<int N>() {
        for (; d - start >= N * LANES; start += N * LANES)
            weighted_sum_part<N>(out + start, lanes(LANES), count, from, weight);
    };
    parts.template operator()<12>();
    parts.template operator()<8>();
    parts.template operator()<4>();
    parts.template operator()<1>();
    if (start < d) weighted_sum_part<1>(out + start, lanes(d - start), count, from, weight);
}

inline void add_row(float* to, const float* a, long d) {
    for (long i = 0; i < d; i += LANES) {
        const Lanes m = lanes(d - i);
        store(to + i, m, add(load(to + i, m), load(a + i, m)));
    }
}

template <class T>
inline float dot(const float* a, const T* b, long d) {
    V s0 = zero(), s1 = s0, s2 = s0, s3 = s0;
    long i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES) {
        s0 = fma(load(a + i), load(b + i, lanes(LANES)), s0);
        s1 = fma(load(a + i + LANES), load(b + i + LANES, lanes(LANES)), s1);
        s2 = fma(load(a + i + 2 * LANES), load(b + i + 2 * LANES, lanes(LANES)), s2);
        s3 = fma(load(a + i + 3 * LANES), load(b + i + 3 * LANES, lanes(LANES)), s3);
    }
    for (; i < d; i += LANES) {
        const Lanes m = lanes(d - i);
        s0 = fma(load(a + i, m), load(b + i, m), s0);
    }
    return sum(add(add(s0, s1), add(s2, s3)));
}

}  // namespace sae
