// Half the arithmetic for the same selection: an int16 product that bounds every z, and exact z for what may be chosen.
//
// Rows of x and of the encoder are rounded to int16 numbers q with one scale a row, chosen so that |q(x) . q(w)| stays
// below 2^31: the sums are exact integers. Then |x.w - q(x).q(w)| <= ||x - q(x)|| ||w|| + ||q(x)|| ||w - q(w)||, some 3e-4
// of ||x|| ||w||, which leaves one or two candidates a row more than k. (With int8 it would be 2e-2 and hundreds.) Their z
// are computed as everywhere, by `tile`, so that the selection is the reference's bit by bit. A row with too many
// candidates, or with a bound that is not finite, is not certified: it takes the product of select.h, and is counted.
#pragma once

#include <atomic>
#include <cmath>
#include <vector>

#include "select.h"

namespace sae {

constexpr float NORM = 46000;  // of q: its square, and rounding, stay below 2^31

struct Rounded {
    float scale, norm, residual;  // a = scale q + the rest; ||a|| (0: nothing but zeros), ||a - scale q||
};

// q = a / scale to the nearest integers, into out (where given); returns the rest's norm.
inline float quantise(const uint16_t* a, float scale, int16_t* out, long n) {
    const float inverse = scale > 1e-30f ? 1 / scale : 0;
    V squares = zero();
    for (long i = 0; i < n; i += LANES) {
        const Lanes m = lanes(n - i);
        const V own = load(a + i, m);
        const I q = to_int(mul(own, splat(inverse)));
        const V rest = fnma(to_float(q), splat(scale), own);
        squares = fma(rest, rest, squares);
        if (out) store_int16(out + i, m, q);
    }
    return std::sqrt(sum(squares));
}

inline Rounded rounded(const uint16_t* a, int16_t* out, long n) {
    V squares = zero(), most = zero();
    for (long i = 0; i < n; i += LANES) {
        const V own = load(a + i, lanes(n - i));
        squares = fma(own, own, squares);
        most = larger(abs(own), most);
    }
    const float root = std::sqrt(sum(squares)), norm = root < largest(most) ? largest(most) : root;  // NaN stays
    const float scale = std::fmax(norm / NORM, largest(most) / 32766);
    return {scale, norm, quantise(a, scale, out, n)};
}

// The encoder's scales, and the largest norms that the bound needs: infinite where anything is not finite.
struct Encoder {
    std::vector<float> scales;
    float norm = 0, residual = 0, bias = 0;

    Encoder(const uint16_t* w, const float* b_enc, long n_latents, long padded, long threads) : scales(n_latents) {
        std::vector<Rounded> most(blocks(n_latents, CHUNK), Rounded{0, 0, 0});  // of a chunk: bias, norm, residual
        parallel((long)most.size(), threads, [&](long chunk) {
            Rounded& own = most[chunk];
            for (long j = chunk * CHUNK; j < n_latents && j < (chunk + 1) * CHUNK; j++) {
                const Rounded row = rounded(w + j * padded, nullptr, padded);
                scales[j] = row.scale;
                own.scale = highest(own.scale, std::fabs(b_enc[j]));
                own.norm = highest(own.norm, row.norm), own.residual = highest(own.residual, row.residual);
            }
        });
        for (const Rounded& own : most)
            norm = highest(norm, own.norm), residual = highest(residual, own.residual), bias = highest(bias, own.scale);
    }

    // |z of the product - z of the screen| of any latent with a row x of d numbers. Beside the two roundings: the order of
    // the product's additions, d of them (u = 2^-24 each), the screen's own few, and 0.1 % for the norms' rounding.
    float bound(const Rounded& x, long d) const {
        if (tiny(x.norm) || tiny(norm)) return INFINITY;
        const float u = 0x1p-24f;
        const float rounding = x.residual * norm + (x.norm + x.residual) * residual;
        return 1.001f * (rounding + (d + 16) * u * x.norm * norm + 8 * u * bias) + 1e-30f;
    }

   private:
    // The squares of the remainders would underflow.
    static bool tiny(float norm) { return norm > 0 && norm < 1e-6f; }

    static float highest(float a, float b) { return std::isfinite(b) ? std::fmax(a, b) : INFINITY; }
};

// z + shift of the row, within its bound, of latents j ... and the rows of a panel.
struct Screen {
    const uint16_t* w;       // [n_latents, 2 pairs]
    const uint32_t* panels;  // [panels][pairs][PANEL], int16
    long pairs;
    const float *b_enc, *scales;    // [n_latents]
    const float *x_scales, *shifts; // [rows]
    std::vector<uint32_t> group;    // int16 latents from `from` on
    long from;

    void begin(long start, long end) {
        from = start;
        for (long j = start; j < end; j++)
            quantise(w + j * 2 * pairs, scales[j], (int16_t*)(group.data() + (j - start) * pairs), 2 * pairs);
    }

    template <int LATENTS>
    __attribute__((always_inline)) void operator()(long j, long panel, V (&z)[LATENTS][VECTORS]) const {
        I sums[LATENTS][VECTORS];
        const uint32_t *own = group.data() + (j - from) * pairs, *x = panels + panel * pairs * PANEL;
#pragma GCC unroll 6
        for (int m = 0; m < LATENTS; m++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[m][v] = splat(0);
        for (long p = 0; p < pairs; p++) add_pairs<LATENTS>(sums, own + p, pairs, x + p * PANEL);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const V scale = load(x_scales + panel * PANEL + v * LANES), shift = load(shifts + panel * PANEL + v * LANES);
#pragma GCC unroll 6
            for (int m = 0; m < LATENTS; m++)
                z[m][v] = fma(mul(to_float(sums[m][v]), scale), splat(scales[j + m]), add(shift, splat(b_enc[j + m])));
        }
    }
};

// What selection reads and writes.
struct Selection {
    const uint32_t *x, *w;  // bf16 pairs [batch, pairs], [n_latents, pairs]
    const float* b_enc;
    long batch, n_latents, pairs;
    uint32_t* panels;  // [rows of whole panels, pairs]
    Best best;
    float* values; int* indices;  // [batch, k]
    bool sorted;
};

// Rows of panels [first, last) by the exact product.
inline void select_exactly(const Selection& s, long first, long last) {
    for (long r = first * PANEL; r < last * PANEL; r++)
        s.best.least[r] = r < s.batch ? 0 : INFINITY, s.best.count[r] = 0;
    for (long panel = first; panel < last; panel++)
        pack([&](long r) { return panel * PANEL + r < s.batch ? s.x + (panel * PANEL + r) * s.pairs : nullptr; },
             s.panels + panel * s.pairs * PANEL, s.pairs);
    Exact exact{s.w, s.panels, s.pairs, s.b_enc};
    select_panels(exact, s.n_latents, group_size(s.pairs), first, last, s.best);
    for (long r = first * PANEL; r < last * PANEL && r < s.batch; r++)
        finish(s.best, r, s.sorted, s.values + r * s.best.k, s.indices + r * s.best.k);
}

// The row's candidates get their exact values, and those that are not positive go.
inline void rescore(const Selection& s, long row, const Best& best, uint32_t* panel) {
    float* values = best.values + row * best.capacity;
    int* indices = best.indices + row * best.capacity;
    const long n = best.count[row];
    static const float none[1] = {0};
    long kept = 0;
    for (long i = 0; i < n; i += PANEL) {
        pack([&](long c) { return i + c < n ? s.w + (long)indices[i + c] * s.pairs : nullptr; }, panel, s.pairs);
        alignas(64) float z[PANEL], biases[PANEL] = {};
        for (long c = 0; c < PANEL && i + c < n; c++) biases[c] = s.b_enc[indices[i + c]];
        V sums[1][VECTORS];
        tile<1>(s.x + row * s.pairs, panel, s.pairs, none, sums);  // the row broadcast, candidates as lanes
        for (int v = 0; v < VECTORS; v++) store(z + v * LANES, add(sums[0][v], load(biases + v * LANES)));
        for (long c = 0; c < PANEL && i + c < n; c++)
            if (z[c] > 0) values[kept] = z[c], indices[kept++] = indices[i + c];
    }
    best.count[row] = (int)kept, best.least[row] = 0;
}

// Rows of panels [first, last) through the screen; counts: rows that were not certified, candidates of the others.
inline void select_screened(const Selection& s, const Encoder& encoder, long first, long last,
                            std::atomic<long> (&counts)[2]) {
    const long rows = (last - first) * PANEL, begin = first * PANEL;
    const long left = s.batch - begin < rows ? s.batch - begin : rows;
    std::vector<float> scales(rows, 0), shifts(rows, 0);
    {
        std::vector<uint32_t> q(PANEL * s.pairs);
        for (long panel = 0; panel < last - first; panel++) {
            for (long r = panel * PANEL; r < (panel + 1) * PANEL; r++) {
                s.best.count[begin + r] = 0, s.best.least[begin + r] = INFINITY;
                if (r >= left) continue;
                int16_t* own = (int16_t*)(q.data() + r % PANEL * s.pairs);
                const Rounded x = rounded((const uint16_t*)(s.x + (begin + r) * s.pairs), own, 2 * s.pairs);
                const float bound = encoder.bound(x, 2 * s.pairs);
                if (!std::isfinite(bound)) continue;
                scales[r] = x.scale, shifts[r] = 2 * bound, s.best.least[begin + r] = bound;
            }
            pack([&](long r) { return panel * PANEL + r < left ? q.data() + r * s.pairs : nullptr; },
                 s.panels + (first + panel) * s.pairs * PANEL, s.pairs);
        }
    }
    const long group = group_size(s.pairs);
    const float *all_scales = scales.data() - begin, *all_shifts = shifts.data() - begin;
    Screen screen{(const uint16_t*)s.w, s.panels, s.pairs, s.b_enc, encoder.scales.data(), all_scales, all_shifts,
                  std::vector<uint32_t>(group * s.pairs), 0};
    Best best = s.best;
    best.slack = all_shifts;
    select_panels(screen, s.n_latents, group, first, last, best);
    std::vector<uint32_t> panel(PANEL * s.pairs);
    std::vector<long> uncertified;
    for (long r = begin; r < begin + left; r++) {
        best.cut(r, best.k);
        if (s.best.least[r] == INFINITY) {
            uncertified.push_back(r);
            continue;
        }
        counts[1] += s.best.count[r];
        rescore(s, r, s.best, panel.data());
        finish(s.best, r, s.sorted, s.values + r * best.k, s.indices + r * best.k);
    }
    counts[0] += (long)uncertified.size();
    for (size_t i = 0; i < uncertified.size(); i += PANEL) {  // packed together, selected, and put back
        const long n = std::min((long)(uncertified.size() - i), PANEL), k = best.k;
        std::vector<uint32_t> x(n * s.pairs);
        std::vector<float> least(PANEL), candidates(n * best.capacity), values(n * k);
        std::vector<int> count(PANEL), places(n * best.capacity), indices(n * k);
        for (long r = 0; r < n; r++) memcpy(&x[r * s.pairs], s.x + uncertified[i + r] * s.pairs, s.pairs * 4);
        const Best own{k, best.capacity, least.data(), count.data(), candidates.data(), places.data()};
        select_exactly({x.data(), s.w, s.b_enc, n, s.n_latents, s.pairs, panel.data(), own, values.data(),
                        indices.data(), s.sorted}, 0, 1);
        for (long r = 0; r < n; r++) {
            memcpy(s.values + uncertified[i + r] * k, &values[r * k], k * sizeof(float));
            memcpy(s.indices + uncertified[i + r] * k, &indices[r * k], k * sizeof(int));
        }
    }
}

}  // namespace sae
