// What happens per latent: its pairs with rows of the batch become its gradient, and its gradient becomes its update.
//
// The gradient of one latent lives in L1 between the two: the dense gradient exists only when it is asked for.
#pragma once

#include <cmath>
#include <vector>

#include "parallel.h"
#include "rows.h"
#include "vectors.h"

namespace sae {

// out += c a
template <class T>
inline void add_scaled(float* out, float c, const T* a, long d) {
    for (long i = 0; i < d; i += LANES) {
        const Lanes m = lanes(d - i);
        store(out + i, m, fma(splat(c), load(a + i, m), load(out + i, m)));
    }
}

// One active latent of one row: the weight of errors[error_row] in dW_dec and of rows[row] in dW_enc.
struct Pair {
    int error_row, row;
    float decoder, encoder;
};

// (values, indices) [batch, k] of the batch, or of AuxK: weights of the errors from first_error on, of a row's own or
// of those that `source` says. An empty place has the index -1. `weights` take the place of scale * values.
struct Chosen {
    const float* values; const int* indices; const float* d_z; const float* weights; const int* source;
    long k, first_error;
    float scale;  // d loss / d x_hat = scale * error

    float weight(long i) const { return weights ? weights[i] : scale * values[i]; }
    int error(long i) const { return (int)(first_error + (source ? source[i] : i / k)); }
};

// What latents have besides their pairs: enc[j] * row in dW_enc and enc[j] in db_enc; in dW_dec its own row times
// dec[j, site], in the equal parts of d_out. Either may be absent.
struct Linear {
    const float *enc, *row, *dec;
    long sites;

    float bias(long j) const { return enc ? enc[j] : 0; }

    template <class T>
    void add(long j, float* g_enc, float* g_dec, const T* W_dec, long d_in, long d_out) const {
        if (enc) add_scaled(g_enc, enc[j], row, d_in);
        const long d = d_out / (dec ? sites : 1);
        for (long s = 0; dec && s < sites; s++)
            add_scaled(g_dec + s * d, dec[j * sites + s], W_dec + j * d_out + s * d, d);
    }
};

// Sorts the pairs by latent, keeping the order of rows: offsets [n_latents + 1], pairs [offsets[n_latents]].
inline void pairs_by_latent(const Chosen* chosen, int kinds, long batch, long n_latents, long threads, long* offsets,
                            Pair* pairs) {
    const long parts = threads, size = blocks(n_latents, parts);
    std::vector<long> total(parts + 1, 0);
    auto each = [&](long part, auto&& use) {
        const long low = part * size, high = low + size;
        for (int kind = 0; kind < kinds; kind++)
            for (long i = 0; i < batch * chosen[kind].k; i++) {
                const long j = chosen[kind].indices[i];
                if (j >= low && j < high) use(chosen[kind], i, j);
            }
    };
    parallel(parts, threads, [&](long part) {
        for (long j = part * size; j < n_latents && j < (part + 1) * size; j++) offsets[j + 1] = 0;
        each(part, [&](const Chosen&, long, long j) { offsets[j + 1]++; total[part + 1]++; });
    });
    for (long part = 0; part < parts; part++) total[part + 1] += total[part];
    offsets[0] = 0;
    parallel(parts, threads, [&](long part) {
        long at = total[part];
        std::vector<long> next;
        for (long j = part * size; j < n_latents && j < (part + 1) * size; j++) {
            next.push_back(at);
            at += offsets[j + 1];
            offsets[j + 1] = at;
        }
        each(part, [&](const Chosen& c, long i, long j) {
            pairs[next[j - part * size]++] = {c.error(i), (int)(i / c.k), c.weight(i), c.d_z[i]};
        });
    });
}

struct Adam {
    // new = 1 - beta, which is not rounded from beta in fp32; bias = 1 - beta^step, unbias = 1 / bias
    float lr, beta2, new1, new2, eps, bias1, bias2, unbias1, unbias2;

    V operator()(V p, V g, float* first, float* second, Lanes mask) const {
        const V m0 = load(first, mask), v0 = load(second, mask);
        const V m = fma(splat(new1), sub(g, m0), m0);
        const V v = fma(mul(splat(new2), g), g, mul(splat(beta2), v0));
        store(first, mask, m);
        store(second, mask, v);
        const V root = sqrt(mul(v, splat(unbias2)));
        const V step = div(mul(m, splat(unbias1)), add(root, splat(eps)));
        return fnma(splat(lr), step, p);
    }

    void row(float* p, const float* g, float* first, float* second, long d) const {
        for (long i = 0; i < d; i += LANES) {
            const Lanes m = lanes(d - i);
            store(p + i, m, (*this)(load(p + i, m), load(g + i, m), first + i, second + i, m));
        }
    }
};

// A decoder row: the gradient without its part along the row, Adam, norm 1.
inline void decoder_row(float* w, const float* g, float* first, float* second, long d, const Adam& adam, bool any) {
    const V along = splat(any ? dot(g, w, d) : 0);
    V squares = zero();
    for (long i = 0; i < d; i += LANES) {
        const Lanes m = lanes(d - i);
        const V old = load(w + i, m), across = fnma(along, old, load(g + i, m));
        const V p = adam(old, across, first + i, second + i, m);
        store(w + i, m, p);
        const V own = masked(p, m);  // with eps = 0, the lanes beyond d are NaN
        squares = fma(own, own, squares);
    }
    const V norm = splat(std::fmax(std::sqrt(sum(squares)), 1e-12f));
    for (long i = 0; i < d; i += LANES) {
        const Lanes m = lanes(d - i);
        store(w + i, m, div(load(w + i, m), norm));
    }
}

}  // namespace sae
