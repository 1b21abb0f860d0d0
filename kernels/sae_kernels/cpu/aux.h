// AuxK over few dead latents: its products taken dense over the compacted dead set, with bf16 operands and fp32 sums.
//
// With a the [batch, n_dead] matrix of selected values: e_hat = a W, r = e - e_hat, d_z = (r W^T) where a > 0,
// dW_dec = a^T r, dW_enc = d_z^T x. Of the four, each runs at the speed of the encoder's product, and reads operands
// from L2; gathering k_aux rows for every row of the batch runs at the speed of L3 (measured: 4 times slower at 328
// dead, equal near 9 k_aux). Rows come in blocks, so that a is never whole.
#pragma once

#include "select.h"

namespace sae {

constexpr long BLOCK = 512, BLOCK_PAIRS = BLOCK / 2;  // rows at a time

struct Aux {
    const float* error;         // [batch, d]
    const uint16_t* rows;       // [batch, padded]: x as the encoder saw it
    const float* values; const int* indices;  // [batch, k], indices among the dead
    const void* W_dec;          // [n_latents, d], fp32 or bf16
    const long* places;         // [n_dead] latents
    long bf16, batch, k, n_dead, d, padded;
    float scale;                // d loss / d e_hat = scale * r
    float *squares, *d_dec, *d_enc, *d_bias;  // [batch], [n_dead, d], [n_dead, d], [n_dead]
};

inline uint16_t to_bf16(float v) {
    uint16_t out;
    store_bf16(&out, lanes(1), splat(v));
    return out;
}

// Two rows of bf16 numbers as pairs, by panels of dimensions: out [panels][stride][PANEL] at place `at`.
inline void interleave(const uint16_t* even, const uint16_t* odd, long d, long stride, long at, uint32_t* out) {
    for (long i = 0; i < d; i += LANES) {
        const Lanes in = lanes(d - i);
        I pairs = load_words(even + i, in);
        if (odd) pairs = either(pairs, high_words(load_words(odd + i, in)));
        store((int*)out + (i / PANEL * stride + at) * PANEL + i % PANEL, pairs);
    }
}

template <int ROWS, class Use>
__attribute__((noinline)) void dense_tile(const uint32_t* w, const uint32_t* x, long pairs, const Use& use) {
    static const float zeros[TILE] = {};
    V z[ROWS][VECTORS];
    tile<ROWS>(w, x, pairs, zeros, z);
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) use(m, v, z[m][v]);
}

// use(m, v, sums of w [rows, pairs] row m with vector v of the panel x [pairs, PANEL]) for every m < rows <= 6.
template <int ROWS = TILE, class Use>
inline void dense(long rows, const uint32_t* w, const uint32_t* x, long pairs, const Use& use) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) dense_tile<ROWS>(w, x, pairs, use);
        else dense<ROWS - 1>(rows, w, x, pairs, use);
    }
}

inline void aux_dense(const Aux& a, long threads) {
    const long n_panels = blocks(a.d, PANEL), dead_pairs = blocks(a.n_dead, 2), dim_pairs = a.padded / 2;
    using Words = std::vector<uint32_t>;
    std::vector<uint16_t> dead_rows(a.n_dead * a.padded);
    Words dead_panels(n_panels * dead_pairs * PANEL);
    Words x_panels(n_panels * BLOCK_PAIRS * PANEL), r_panels(x_panels.size());
    Words active(BLOCK * dead_pairs), by_dead(a.n_dead * BLOCK_PAIRS), d_z(by_dead.size());
    parallel(blocks(dead_pairs, CHUNK), threads, [&](long task) {
        for (long p = task * CHUNK; p < dead_pairs && p < (task + 1) * CHUNK; p++) {
            const bool both = 2 * p + 1 < a.n_dead;
            uint16_t* own = dead_rows.data() + 2 * p * a.padded;
            for (long j = 2 * p; j < 2 * p + 1 + both; j++)
                typed(a.W_dec, a.bf16, [&](const auto* W_dec) {
                    round_row(W_dec + a.places[j] * a.d, nullptr, dead_rows.data() + j * a.padded, a.d, a.padded);
                });
            interleave(own, both ? own + a.padded : nullptr, a.d, dead_pairs, p, dead_panels.data());
        }
    });
    memset(a.d_dec, 0, a.n_dead * a.d * sizeof(float));
    memset(a.d_enc, 0, a.n_dead * a.d * sizeof(float));
    memset(a.d_bias, 0, a.n_dead * sizeof(float));
    for (long start = 0; start < a.batch; start += BLOCK) {
        parallel(BLOCK / PANEL, threads, [&](long panel) {  // some rows: a, e_hat, r, d_z
            const long first = start + panel * PANEL;
            const long count = a.batch - first < 0 ? 0 : a.batch - first < PANEL ? a.batch - first : PANEL;
            uint32_t* own = active.data() + panel * PANEL * dead_pairs;
            uint16_t* transposed = (uint16_t*)by_dead.data();
            memset(own, 0, PANEL * dead_pairs * sizeof(uint32_t));
            for (long j = 0; j < a.n_dead; j++) memset(transposed + j * BLOCK + panel * PANEL, 0, PANEL * 2);
            for (long r = 0; r < count; r++)
                for (long i = (first + r) * a.k; i < (first + r + 1) * a.k; i++)
                    if (a.indices[i] >= 0) {
                        const uint16_t value = to_bf16(a.values[i]);
                        ((uint16_t*)(own + r * dead_pairs))[a.indices[i]] = value;
                        transposed[a.indices[i] * BLOCK + panel * PANEL + r] = value;
                    }
            std::vector<float> r_rows(PANEL * a.d);
            for (long c = 0; c < n_panels; c++)
                for (long r = 0; r < count; r += TILE)
                    dense(count - r < TILE ? count - r : TILE, own + r * dead_pairs,
                          dead_panels.data() + c * dead_pairs * PANEL, dead_pairs, [&](int m, int v, V e_hat) {
                              const long i = c * PANEL + v * LANES;
                              if (i >= a.d) return;
                              const Lanes in = lanes(a.d - i);
                              const V e = load(a.error + (first + r + m) * a.d + i, in);
                              store(r_rows.data() + (r + m) * a.d + i, in, sub(e, e_hat));
                          });
            std::vector<uint16_t> r_rounded(PANEL * a.padded, 0);
            for (long r = 0; r < count; r++) {
                const float* row = r_rows.data() + r * a.d;
                a.squares[first + r] = dot(row, row, a.d);
                round_row(row, nullptr, r_rounded.data() + r * a.padded, a.d, a.padded);
            }
            const std::vector<uint16_t> nothing(a.padded, 0);
            for (long r = 0; r < PANEL; r += 2) {
                const uint16_t* x = r < count ? a.rows + (first + r) * a.padded : nothing.data();
                const uint16_t* rounded = r_rounded.data() + r * a.padded;
                const long at = (panel * PANEL + r) / 2;
                interleave(x, r + 1 < count ? x + a.padded : nullptr, a.d, BLOCK_PAIRS, at, x_panels.data());
                interleave(rounded, rounded + a.padded, a.d, BLOCK_PAIRS, at, r_panels.data());
            }
            Words lanes_are_rows(dim_pairs * PANEL);
            pack([&](long r) { return (const uint32_t*)r_rounded.data() + r * dim_pairs; }, lanes_are_rows.data(),
                 dim_pairs);
            for (long j = 0; j < a.n_dead; j += TILE)
                dense(a.n_dead - j < TILE ? a.n_dead - j : TILE, (const uint32_t*)dead_rows.data() + j * dim_pairs,
                      lanes_are_rows.data(), dim_pairs, [&](int m, int v, V product) {
                          const long at = (j + m) * BLOCK + panel * PANEL + v * LANES;
                          const V value = load(transposed + at, lanes(LANES));
                          const V d = where_not_zero(value, mul(product, splat(a.scale)));
                          store_bf16((uint16_t*)d_z.data() + at, lanes(LANES), d);
                      });
        });
        parallel(blocks(a.n_dead, TILE), threads, [&](long task) {  // 6 latents: their gradients from these rows
            const long j = task * TILE, count = a.n_dead - j < TILE ? a.n_dead - j : TILE;
            for (long c = 0; c < n_panels; c++) {
                auto into = [&](float* out, float scale) {
                    return [=, &a](int m, int v, V own) {
                        const long i = c * PANEL + v * LANES;
                        if (i >= a.d) return;
                        const Lanes in = lanes(a.d - i);
                        float* place = out + (j + m) * a.d + i;
                        store(place, in, fma(own, splat(scale), load(place, in)));
                    };
                };
                const long at = c * BLOCK_PAIRS * PANEL;
                dense(count, by_dead.data() + j * BLOCK_PAIRS, r_panels.data() + at, BLOCK_PAIRS,
                      into(a.d_dec, a.scale));
                dense(count, d_z.data() + j * BLOCK_PAIRS, x_panels.data() + at, BLOCK_PAIRS, into(a.d_enc, 1));
            }
            for (long m = j; m < j + count; m++) {
                V total = zero();
                for (long r = 0; r < BLOCK; r += LANES)
                    total = add(total, load((const uint16_t*)d_z.data() + m * BLOCK + r, lanes(LANES)));
                a.d_bias[m] += sum(total);
            }
        });
    }
}

}  // namespace sae
