// The entry points that Python calls through ctypes: plain pointers, no torch, so nothing to rebuild for another torch.
//
// Needs AVX-512 with BF16, or AVX2 with FMA; `build.py` asks the processor first.

#include <algorithm>

#include "aux.h"
#include "compact.h"
#include "latents.h"
#include "parallel.h"
#include "rows.h"
#include "screen.h"
#include "select.h"
#include "vectors.h"

using namespace sae;

extern "C" {

// 16 with AVX-512, 8 with AVX2.
long sae_lanes() { return LANES; }

// sum [16] + both products of 16 pairs: lets the caller compare this processor's order of additions with the documented.
void sae_pair_product(const float* sum, const uint32_t* a, const uint32_t* b, float* out) {
    FlushSubnormals flush;
    alignas(64) uint32_t panel[PANEL] = {};
    alignas(64) float sums[PANEL] = {};
    memcpy(panel, b, 16 * sizeof(uint32_t));
    for (int i = 0; i < 16; i++) {
        memset(sums, 0, sizeof(sums)), sums[i] = sum[i];
        V z[1][VECTORS];
        for (int v = 0; v < VECTORS; v++) z[0][v] = load(sums + v * LANES);
        add_pairs<1>(z, a + i, 1, panel);
        for (int v = 0; v < VECTORS; v++) store(sums + v * LANES, z[0][v]);
        out[i] = sums[i];
    }
}

// out [n, padded] = bf16(a [n, d] - minus [d]), zero beyond d.
void sae_round(const float* a, const float* minus, uint16_t* out, long n, long d, long padded, long threads) {
    parallel(blocks(n, CHUNK), threads, [&](long task) {
        for (long r = task * CHUNK; r < n && r < (task + 1) * CHUNK; r++)
            round_row(a + r * d, minus, out + r * padded, d, padded);
    });
}

// The k best of relu(z) per row -> values, indices [batch, k]. x [batch, pairs], w [n_latents, pairs]: bf16 pairs.
// Scratch: panels, least and count [rows of whole panels], candidates [batch, capacity]. With `screened`, through int16, and
// counts [2] grow by the rows that were not certified and the candidates of the others.
void sae_select(const uint32_t* x, const uint32_t* w, const float* b_enc, long batch, long n_latents, long pairs,
                uint32_t* panels, long k, long capacity, float* least, int* count, float* candidate_values,
                int* candidate_indices, float* values, int* indices, long sorted, long screened, long* counts,
                long threads) {
    const Selection selection{x, w, b_enc, batch, n_latents, pairs, panels,
                              {k, capacity, least, count, candidate_values, candidate_indices}, values, indices, sorted != 0};
    const long n_panels = blocks(batch, PANEL);
    const long size = std::clamp(n_panels / (4 * threads), 1L, TASK_PANELS);
    auto by_panels = [&](auto&& select) {
        parallel(blocks(n_panels, size), threads, [&](long task) {
            select(task * size, std::min((task + 1) * size, n_panels));
        });
    };
    if (!screened) return by_panels([&](long first, long last) { select_exactly(selection, first, last); });
    const Encoder encoder((const uint16_t*)w, b_enc, n_latents, 2 * pairs, threads);
    std::atomic<long> found[2] = {};
    by_panels([&](long first, long last) { select_screened(selection, encoder, first, last, found); });
    counts[0] += found[0], counts[1] += found[1];
}

// error [batch, d] = target - decode(values, indices) (- b_dec), squares [batch], d_z [batch, k] = scale error . W_dec.
// W_dec, here and below, is bf16 or fp32.
void sae_rows(const float* target, const float* b_dec, const float* values, const int* indices, const void* W_dec,
              long bf16, long batch, long k, long d, float scale, float* error, float* squares, float* d_z,
              long threads) {
    typed(W_dec, bf16, [&](const auto* W) {
        parallel(blocks(batch, 16), threads, [&](long task) {
            for (long r = task * 16; r < batch && r < (task + 1) * 16; r++) {
                float* e = error + r * d;
                squares[r] = row_error(target + r * d, b_dec, values + r * k, indices + r * k, k, W, e, d);
                row_d_z(e, nullptr, nullptr, indices + r * k, k, W, scale, d_z + r * k, d);
            }
        });
    });
}

// out [batch, d] = sum_i values_i W_dec[indices_i], without b_dec.
void sae_partial(const float* values, const int* indices, const void* W_dec, long bf16, long batch, long k, long d,
                 float* out, long threads) {
    typed(W_dec, bf16, [&](const auto* W) {
        parallel(blocks(batch, 16), threads, [&](long task) {
            for (long r = task * 16; r < batch && r < (task + 1) * 16; r++)
                row_partial(values + r * k, indices + r * k, k, W, out + r * d, d);
        });
    });
}

// d_z [batch, k] = scale error . W_dec[indices], 0 at empty places; with the errors that `source` says, or a row's own.
void sae_dots(const float* errors, const int* source, const int* indices, const void* W_dec, long bf16, long batch,
              long k, long d, float scale, float* d_z, long threads) {
    typed(W_dec, bf16, [&](const auto* W) {
        parallel(blocks(batch, 16), threads, [&](long task) {
            for (long r = task * 16; r < batch && r < (task + 1) * 16; r++)
                row_d_z(errors + r * d, errors, source ? source + r * k : nullptr, indices + r * k, k, W, scale,
                        d_z + r * k, d);
        });
    });
}

// fired [n_latents] = how often a latent is among the chosen; returns how many places are not empty.
long sae_fired(const int* indices, long n, long* fired, long n_latents) {
    long active = 0;
    memset(fired, 0, n_latents * sizeof *fired);
    for (long i = 0; i < n; i++)
        if (indices[i] >= 0) active++, fired[indices[i]]++;
    return active;
}

void sae_pairs(const Chosen* chosen, int kinds, long batch, long n_latents, long* offsets, Pair* pairs, long threads) {
    pairs_by_latent(chosen, kinds, batch, n_latents, threads, offsets, pairs);
}

struct Tensors {
    Matrix enc, dec;                           // [n_latents, d_in], [n_latents, d_out]
    float *bias, *bias_first, *bias_second;    // [n_latents], and Adam's moments
    uint16_t* rounded;                         // bf16 of enc, [n_latents, padded]; perhaps enc itself
    long compact;                              // how the matrices are updated; the caller then updates the bias
};

// Of dense gradients that AuxK gave for some latents: slots [n_latents] is their row, or -1.
struct Dense {
    const int* slots;
    const float *dec, *enc, *bias;
};

// Latent j learns from its gradient, of which `any` says whether it may differ from zero.
static void update(const Tensors& p, long j, const float* g_enc, const float* g_dec, float g_bias, long padded,
                   const Adam& adam, long unit, bool any, Workspace& workspace) {
    if (p.compact) {
        compact_row(p.dec, j, g_dec, adam, unit, any, workspace);
        compact_row(p.enc, j, g_enc, adam, false, any, workspace);
    } else {
        auto row = [&](const Matrix& a, void* of) { return (float*)of + j * a.d; };
        float *dec = row(p.dec, p.dec.value), *first = row(p.dec, p.dec.first), *second = row(p.dec, p.dec.second);
        if (unit)
            decoder_row(dec, g_dec, first, second, p.dec.d, adam, any);
        else
            adam.row(dec, g_dec, first, second, p.dec.d);
        adam.row(row(p.enc, p.enc.value), g_enc, row(p.enc, p.enc.first), row(p.enc, p.enc.second), p.enc.d);
        adam.row(p.bias + j, &g_bias, p.bias_first + j, p.bias_second + j, 1);
    }
    if (p.rounded == p.enc.value) return;
    typed(p.enc.value, p.enc.bf16, [&](const auto* enc) {
        round_row(enc + j * p.enc.d, nullptr, p.rounded + j * padded, p.enc.d, padded);
    });
}

// The gradient of every latent from its pairs and, where given, from AuxK and `linear`; `through_centre` [blocks(n_latents, 64), d_in]
// gets rounded enc * d_bias, summed over a chunk. Then the gradient is stored (d_enc given) or the update is made, which
// keeps decoder rows at norm 1 where they are `unit`. d_bias may be asked for with either.
void sae_latents(const long* offsets, const Pair* pairs, const float* errors, const uint16_t* rows, const Dense* dense,
                 const Linear* linear, const Tensors* parameters, long n_latents, long padded, const Adam* adam, long unit,
                 float* d_enc, float* d_dec, float* d_bias, float* through_centre, long threads) {
    const Tensors& p = *parameters;
    const long d_in = p.enc.d, d_out = p.dec.d;
    parallel(blocks(n_latents, CHUNK), threads, [&](long chunk) {
        std::vector<float> scratch(d_in + d_out), biases(CHUNK);
        Workspace workspace(p.compact ? std::max(d_in, d_out) : 0);
        const long first = chunk * CHUNK, last = first + CHUNK < n_latents ? first + CHUNK : n_latents;
        auto slot = [&](long j) { return dense ? dense->slots[j] : -1; };
        for (long j = first; j < last; j++) {
            float bias = slot(j) < 0 ? 0 : dense->bias[slot(j)];
            for (long i = offsets[j]; i < offsets[j + 1]; i++) bias += pairs[i].encoder;
            if (linear) bias += linear->bias(j);
            biases[j - first] = bias;
        }
        auto encoder_row = [&](long j) { return p.rounded + (first + j) * padded; };
        weighted_sum(through_centre + chunk * d_in, d_in, last - first, encoder_row, [&](long j) { return biases[j]; });
        for (long j = first; j < last; j++) {
            const Pair* own = pairs + offsets[j];
            const long n = offsets[j + 1] - offsets[j], s = slot(j);
            float* g_dec = d_dec ? d_dec + j * d_out : scratch.data();
            float* g_enc = d_enc ? d_enc + j * d_in : scratch.data() + d_out;
            weighted_sum(g_dec, d_out, n, [&](long i) { return errors + own[i].error_row * d_out; },
                         [&](long i) { return own[i].decoder; });
            weighted_sum(g_enc, d_in, n, [&](long i) { return rows + own[i].row * padded; },
                         [&](long i) { return own[i].encoder; });
            if (s >= 0) {
                add_row(g_dec, dense->dec + s * d_out, d_out);
                add_row(g_enc, dense->enc + s * d_in, d_in);
            }
            if (linear)
                typed(p.dec.value, p.dec.bf16,
                      [&](const auto* W_dec) { linear->add(j, g_enc, g_dec, W_dec, d_in, d_out); });
            if (d_bias) d_bias[j] = biases[j - first];
            if (d_dec) continue;
            update(p, j, g_enc, g_dec, biases[j - first], padded, *adam, unit, n > 0 || s >= 0 || linear, workspace);
        }
    });
}

void sae_aux_dense(const Aux* aux, long threads) { aux_dense(*aux, threads); }

// The update from a dense gradient.
void sae_update(const float* d_enc, const float* d_dec, const float* d_bias, const Tensors* parameters,
                long n_latents, long padded, const Adam* adam, long unit, long threads) {
    const Tensors& p = *parameters;
    parallel(blocks(n_latents, CHUNK), threads, [&](long chunk) {
        Workspace workspace(p.compact ? std::max(p.enc.d, p.dec.d) : 0);
        for (long j = chunk * CHUNK; j < n_latents && j < (chunk + 1) * CHUNK; j++)
            update(p, j, d_enc + j * p.enc.d, d_dec + j * p.dec.d, d_bias[j], padded, *adam, unit, true, workspace);
    });
}

void sae_adam(float* p, const float* g, float* first, float* second, long n, const Adam* adam) {
    FlushSubnormals flush;
    adam->row(p, g, first, second, n);
}

// out [d] = sum over rows of a [n, d], fixed order: partial sums of 64 rows, then their sum.
void sae_sum_rows(const float* a, long n, long d, float* out, long threads) {
    const long parts = blocks(n, CHUNK);
    std::vector<float> partial(parts * d);
    auto one = [](long) { return 1.0f; };
    parallel(parts, threads, [&](long part) {
        const long first = part * CHUNK, size = n - first < CHUNK ? n - first : CHUNK;
        weighted_sum(partial.data() + part * d, d, size, [&](long i) { return a + (first + i) * d; }, one);
    });
    weighted_sum(out, d, parts, [&](long i) { return partial.data() + i * d; }, one);
}

}  // extern "C"
